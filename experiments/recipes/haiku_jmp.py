"""Haiku: transform_with_state with BatchNorm, under a policy of jmp.

Command   python -m experiments.recipes.haiku_jmp

The policy here computes in float64, so that only a wrong rule is seen;
`"params=float32,compute=bfloat16"` changes no line of either step.
"""

import haiku as hk
import jax
import jmp
import optax

import jaxaccum
from experiments.recipes import _check, _texts

OPT = optax.sgd(0.1)
POLICY = jmp.get_policy("params=float64,compute=float64,output=float64")


def net(axis):
    """A hidden layer with BatchNorm, whose statistics span the axis."""

    def forward(x):
        x = hk.nets.MLP([32], activate_final=False)(x)
        x = hk.BatchNorm(True, True, 0.9, cross_replica_axis=axis)(x, is_training=True)
        return hk.nets.MLP([10], name="head")(jax.nn.relu(x))

    return hk.transform_with_state(forward)


def plain(params, state, opt_state, batch):
    """The training step as anybody would write it."""
    model = net(None)

    def loss_fn(params, batch):
        params, x = POLICY.cast_to_compute((params, batch["x"]))
        logits, new = model.apply(params, state, None, x)
        ce = optax.softmax_cross_entropy_with_integer_labels(
            POLICY.cast_to_output(logits), batch["label"]
        )
        return ce.mean(), new

    grads, state = jax.grad(loss_fn, has_aux=True)(params, batch)
    updates, opt_state = OPT.update(grads, opt_state)
    return optax.apply_updates(params, updates), state, opt_state


def accumulated(params, state, opt_state, batch):
    """The same step in 4 microbatches."""
    model = net("microbatch")

    def loss_fn(params, batch):
        params, x = POLICY.cast_to_compute((params, batch["x"]))
        logits, new = model.apply(params, state, None, x)
        ce = optax.softmax_cross_entropy_with_integer_labels(
            POLICY.cast_to_output(logits), batch["label"]
        )
        return ce.mean(), new

    grads, state = jaxaccum.grad(loss_fn, has_aux=True, num_microbatches=4)(params, batch)
    updates, opt_state = OPT.update(grads, opt_state)
    return optax.apply_updates(params, updates), state, opt_state


def usual(params, state, opt_state, batch):
    """The usual loop: each microbatch has statistics of its own, and gradients are averaged."""
    ends = [plain(params, state, opt_state, part) for part in _check.parts(batch, 4)]
    return _check.mean([end[0] for end in ends]), ends[-1][1], opt_state


def check() -> _check.Errors:
    """One step on 16 texts."""
    batch = _texts.letters(16)
    params, state = net(None).init(jax.random.key(0), batch["x"])
    args = params, state, OPT.init(params), batch
    ends = [jax.jit(step)(*args)[:2] for step in (plain, accumulated, usual)]
    return _check.errors(start=args[:2], full=ends[0], ours=ends[1], usual=ends[2])


if __name__ == "__main__":
    _check.main(check)
