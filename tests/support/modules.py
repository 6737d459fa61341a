"""A module as Equinox's: a pytree whose leaves are its fields, arrays or not."""

import jax


@jax.tree_util.register_pytree_node_class
class Module:
    def __init__(self, weight, field):
        self.weight, self.field = weight, field

    def tree_flatten(self):
        return (self.weight, self.field), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)
