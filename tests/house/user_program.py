"""A user's program: it runs with the base dependencies, and a type checker agrees with it."""

from collections.abc import Callable
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxaccum
import jaxaccum.nnx
from jaxaccum import AuditReport, Mean, MultiSteps, MultiStepsState, Plan
from jaxaccum.testing import assert_exact

Batch = dict[str, jax.Array]
EXACT = 1e-12  # in float64; thousands of roundings


def total(w: jax.Array, batch: Batch) -> jax.Array:
    """The summed squared error of the rows that count."""
    return jnp.sum((batch["x"] @ w - batch["y"]) ** 2 * batch["mask"])


def loss(w: jax.Array, batch: Batch) -> Mean:
    """A masked mean: the library divides by the weight of the whole batch."""
    return jaxaccum.Mean(total=total(w, batch), weight=jnp.sum(batch["mask"]))


def full_batch(w: jax.Array, batch: Batch) -> jax.Array:
    """The oracle: the same loss in one pass of plain JAX."""
    return total(w, batch) / jnp.sum(batch["mask"])


def microbatches(batch: Batch) -> list[Batch]:
    """Rows 0 to 3, 4 to 7, 8 and 9, each with another number of rows that count."""
    return [jax.tree.map(lambda x, i=i: x[i : i + 4], batch) for i in (0, 4, 8)]


def masked_mean(w: jax.Array, batch: Batch) -> jax.Array:
    """The gradient over three microbatches."""
    step = jaxaccum.value_and_grad(loss, microbatch_size=4)
    assert_type(step, Callable[..., Any])
    return step(w, batch)[1]


def window(w: jax.Array, batch: Batch, *, weighted: bool = True) -> jax.Array:
    """The update of SGD at the end of a window of three weighted microbatches."""
    opt = MultiSteps(optax.sgd(1.0), every_k_schedule=3)
    state, updates = opt.init(w), w
    for rows in microbatches(batch):
        weight = jnp.sum(rows["mask"])
        grads = jax.grad(total)(w, rows) / weight
        updates, state = opt.update(grads, state, w, weight=weight if weighted else None)
    assert_type(state, MultiStepsState)
    assert_type(opt.has_updated(state), jax.Array)
    assert opt.has_updated(state)
    return updates


def tools(w: jax.Array, batch: Batch) -> None:
    """The tools, and the types of what they return."""
    report = jaxaccum.audit(loss, w, batch)
    assert_type(report, AuditReport)
    assert_type(report.exact, bool)
    plan = jaxaccum.plan(loss, w, batch, memory_bytes=10**6, progress=print)
    assert_type(plan, Plan)
    assert_type(plan.best.microbatch_size, int)
    parts = jaxaccum.partition(w, batch, num_microbatches=3)
    assert_type(parts, list[tuple[Any, ...]])
    assert_type(0.5 * Mean(1.0, 2.0), Mean)
    assert_type(jaxaccum.__version__, str)
    assert report.exact
    assert plan.best.fits
    assert len(parts) == 3


def normalized(batch: Batch) -> None:
    """A BatchNorm under a mask, against the statistics of the rows that count."""
    model = jaxaccum.nnx.BatchNorm(3, rngs=nnx.Rngs(0), epsilon=0.0)
    mask = batch["mask"] > 0
    found = model(batch["x"], mask=mask[:, None])
    assert_type(found, jax.Array)
    rows = batch["x"][mask]
    expected = (rows - jnp.mean(rows, axis=0)) / jnp.std(rows, axis=0)
    assert apart(found[mask], expected) < EXACT
    assert apart(model(batch["x"])[mask], expected) > 1e9 * EXACT


def apart(a: jax.Array, b: jax.Array) -> float:
    """The largest difference over the largest entry."""
    return float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))


def main() -> None:
    """Compare with the full batch in float64; a window without weights is the negative control."""
    jax.config.update("jax_enable_x64", True)
    draw = np.random.default_rng(0)
    x, y, mask = draw.normal(size=(10, 3)), draw.normal(size=10), np.arange(10) % 3
    batch = {"x": jnp.asarray(x), "y": jnp.asarray(y), "mask": jnp.asarray(mask, jnp.float64)}
    w = jnp.ones(3)
    expected = jax.grad(full_batch)(w, batch)
    assert apart(masked_mean(w, batch), expected) < EXACT
    assert apart(-window(w, batch), expected) < EXACT
    assert apart(-window(w, batch, weighted=False), expected) > 1e9 * EXACT
    assert_exact(loss, w, batch)
    tools(w, batch)
    normalized(batch)
    print(f"jaxaccum {jaxaccum.__version__} is exact, from {jaxaccum.__file__}")


if __name__ == "__main__":
    main()
