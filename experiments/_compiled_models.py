"""Three models for compiled programs: scanned layers, a decoder of a billion parameters, BERT."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from experiments.models import bert, decoder

Loss = Callable[[Any, Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class Model:
    """A loss, the shapes of its parameters, and those of its batch for a number of examples."""

    loss: Loss
    params: Any
    batch: Callable[[int], Any]
    scans: bool = True
    """Whether its layers are a scan: then no step makes a whole gradient."""

    @property
    def bytes(self) -> int:
        """Of its parameters."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.params))

    @property
    def largest(self) -> tuple[int, ...]:
        """The shape of its largest leaf."""
        return max(jax.tree.leaves(self.params), key=lambda leaf: leaf.size).shape

    @property
    def low_precision(self) -> bool:
        """Whether parameters are bfloat16, so that sums in float32 are wider."""
        return any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(self.params))


@functools.cache
def model(name: str) -> Model:
    """One of the three."""
    return {"scanned": _scanned, "decoder": _decoder, "bert": _bert}[name]()


def _scanned() -> Model:
    shapes = {"w": (12, 1024, 1024), "b": (12, 1024)}
    params = {key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in shapes.items()}
    rows = lambda count: jax.ShapeDtypeStruct((count, 1024), jnp.float32)
    return Model(mean_square, params, rows)


def mean_square(params: Any, x: jax.Array) -> jax.Array:
    """The loss of `scanned`: tanh(x w + b), layer after layer."""
    h, _ = lax.scan(lambda h, layer: (jnp.tanh(h @ layer["w"] + layer["b"][None]), None), x, params)
    return jnp.mean(h**2)


def _decoder() -> Model:
    config = decoder.Config()
    ids = lambda count: jax.ShapeDtypeStruct((count, 257), jnp.int32)
    loss = functools.partial(decoder.loss, config)
    return Model(loss, decoder.shapes(config, jnp.bfloat16), ids)


def _bert() -> Model:
    module = bert.BertForMaskedLM(bert.Config(30522, 768, 12, 12, 3072, 512))
    ids = lambda count: jax.ShapeDtypeStruct((count, 128), jnp.int32)
    params = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, x), ids(1))
    return Model(functools.partial(_masked, module), params, ids, scans=False)


def _masked(module: bert.BertForMaskedLM, params: Any, ids: jax.Array) -> jax.Array:
    scores: Any = module.apply(params, ids, jnp.ones_like(ids))
    chosen = jnp.take_along_axis(scores, ids[..., None], -1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(scores, axis=-1) - chosen)
