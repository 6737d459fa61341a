"""A batch, losses of its rows and of those that all microbatches gather, what the audit says of a
call, and how far it is off."""

import jax
import jax.numpy as jnp
from jax import lax

import jaxaccum
from tests.support import jitted
from tests.support.helpers import data, normwise

W = data(3, 4)
MASK = jnp.asarray(jnp.arange(24) % 3 > 0, jnp.float64)
BATCH = {"x": data(24, 3, seed=1), "y": jnp.arange(24) % 4, "mask": MASK}


def nll(w, rows):
    """The loss of each row."""
    log_probs = jax.nn.log_softmax(jnp.tanh(rows["x"] @ w))
    return -jnp.take_along_axis(log_probs, rows["y"][:, None], axis=1)[:, 0]


def off(loss, whole=None, w=W, b=BATCH, **options):
    """How far the value and the gradient of the microbatches are from those of the whole batch,
    which `whole` has where the loss names the loop's axis; nothing is audited."""
    options = {"num_microbatches": 2, "audit": None} | options
    ours = jax.jit(jaxaccum.value_and_grad(loss, **options))(w, b)
    return normwise(ours, jitted.value_and_grad(whole or jaxaccum.full_batch(loss))(w, b))


def is_called_exact(loss, w=W, b=BATCH, **options):
    """Whether an audited call raises nothing."""
    options = {"num_microbatches": 2, "audit": "raise"} | options
    try:
        jax.eval_shape(jaxaccum.grad(loss, **options), w, b)
    except jaxaccum.InexactError:
        return False
    return True


def gathered(w, b):
    """The rows of all microbatches, one microbatch after the other."""
    return lax.all_gather(b["x"] @ w, "microbatch", tiled=True)


def own(b):
    """A microbatch's places, where its rows are adjacent."""
    n = len(b["y"])
    return lax.axis_index("microbatch") * n + jnp.arange(n, dtype=jnp.int32)
