"""Does accumulation in JAX give the seed's numbers, bit for bit, as PyTorch does?

One weight w = 1, ŷ = w·x, y = 2·x, squared error; x = 4 and x = 2 as two batches of one, each loss
divided by 2 before its gradient is added; SGD with learning rate 0.01.

Command   python -m experiments toy
Cost      seconds
Expected  gradient −16, then −20; weight 1, then 1.2; the same bits from torch, from
          `jaxaccum.value_and_grad`, from `optax.MultiSteps` in a host loop, and from the two
          examples as one batch
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import jaxaccum
from experiments import _report
from torch_ref import toy as torch_toy

X = np.array([4.0, 2.0], np.float32)
LEARNING_RATE = 0.01


class Row(NamedTuple):
    """What the seed prints: the accumulated gradient and the weight."""

    grad: np.ndarray
    weight: np.ndarray


def run(*, full: bool = False, track: _report.Track = _report.quiet) -> _report.Record:
    """Every way to the seed's three rows, compared bit for bit with torch's."""
    del full  # there is nothing to lengthen
    made: dict[str, list[Any]] = {name: rows() for name, rows in track(list(WAYS.items()), "toy")}
    oracle = made["torch, .backward() loop"]
    differing = sum(bits(rows) != bits(oracle) for rows in made.values())
    return _report.Record(
        name="toy",
        question="Does accumulation in JAX give the seed's numbers, bit for bit, as PyTorch does?",
        settings={
            "x": X.tolist(),
            "weight": 1.0,
            "learning_rate": LEARNING_RATE,
            "dtype": "float32",
        },
        rows=[summary(name, rows) for name, rows in made.items()],
        checks=[
            _report.Check("ways whose bits differ from torch's", differing, 0),
            _report.Check("numbers that differ from the seed's", wrong_numbers(oracle), 0),
        ],
        figure=picture(made),
        text=side_by_side({"torch": oracle, "jaxaccum": made["jaxaccum.value_and_grad"]}),
    )


def loss(w: jax.Array, x: jax.Array, seen: jax.Array) -> jaxaccum.Mean:
    """The mean of (y − w·x)² over both examples, those that are not yet `seen` at zero."""
    return jaxaccum.Mean(jnp.sum(seen * (2 * x - w * x) ** 2), jnp.sum(jnp.ones_like(x)))


def scanned() -> list[Row]:
    """`value_and_grad` over two microbatches of one; a loop that has seen only the first stands for
    batch 0."""
    grad = jax.jit(jaxaccum.grad(loss, num_microbatches=2, in_axes=(None, 0, 0)))
    return stepped(
        [grad(jnp.ones(1, jnp.float32), X, np.array(seen, np.float32)) for seen in ([1, 0], [1, 1])]
    )


def one_batch() -> list[Row]:
    """The two examples in one pass; it has no row for batch 0 of its own."""
    grad = jax.jit(jax.grad(jaxaccum.full_batch(loss, in_axes=(None, 0, 0))))
    return stepped(
        [grad(jnp.ones(1, jnp.float32), X, np.array(seen, np.float32)) for seen in ([1, 0], [1, 1])]
    )


def stepped(grads: list[jax.Array]) -> list[Row]:
    """The gradients as rows, then one step of SGD with the last."""
    w = jnp.ones(1, jnp.float32)
    optimizer = optax.sgd(LEARNING_RATE)
    updates, _ = optimizer.update(grads[-1], optimizer.init(w))
    rows = [Row(np.asarray(grad), np.ones(1, np.float32)) for grad in grads]
    return [*rows, Row(rows[-1].grad, np.asarray(optax.apply_updates(w, updates)))]


def multi_steps() -> list[Row]:
    """`optax.MultiSteps` in a host loop, on gradients of the halved loss; it forgets the sum, so a
    probe keeps it."""
    inner = optax.chain(probe(), optax.sgd(LEARNING_RATE))
    optimizer = optax.MultiSteps(inner, every_k_schedule=2, use_grad_mean=False)
    w = jnp.ones(1, jnp.float32)
    state = optimizer.init(w)
    rows = []
    for x in X:
        grad = jax.grad(lambda w, x: jnp.sum((2 * x - w * x) ** 2) / 2)(w, x)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes on its own
            updates, state = optimizer.update(grad, state, w)
        stepping = bool(optimizer.has_updated(state))
        summed = state.inner_opt_state[0] if stepping else state.acc_grads
        rows.append(Row(np.asarray(summed), np.asarray(w)))
        w = jnp.asarray(optax.apply_updates(w, updates))
    return [*rows, Row(rows[-1].grad, np.asarray(w))]


def probe() -> optax.GradientTransformation:
    """A link of a chain that changes nothing and keeps what it saw last."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del state, params
        return updates, updates

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def torch_loop() -> list[torch_toy.Row]:
    """The seed's own loop."""
    return torch_toy.run(X, batches=2, learning_rate=LEARNING_RATE)


WAYS: dict[str, Callable[[], list[Any]]] = {
    "torch, .backward() loop": torch_loop,
    "jaxaccum.value_and_grad": scanned,
    "optax.MultiSteps": multi_steps,
    "jax, one batch of two": one_batch,
}


def side_by_side(columns: dict[str, list[Any]]) -> str:
    """The seed's printout, one framework a column."""
    printed = [[name, *printout(rows)] for name, rows in columns.items()]
    return "\n".join(
        "    ".join(f"{line:<50}" for line in lines).rstrip()
        for lines in zip(*printed, strict=True)
    )


def printout(rows: list[Any]) -> list[str]:
    """The seed's four lines."""
    shown = [f"grad {row.grad.item():g} weight {row.weight.item():g}" for row in rows]
    return [*(f"batch {i}: {line}" for i, line in enumerate(shown[:-1])), "=" * 50, shown[-1]]


def summary(name: str, rows: list[Any]) -> dict[str, Any]:
    """A table's row: numbers, and the bits of the last gradient and weight."""
    numbers = {f"grad, batch {i}": row.grad.item() for i, row in enumerate(rows[:-1])}
    last = rows[-1]
    weight = f"{last.weight.item():g}"
    return {
        "way": name,
        **numbers,
        "weight": weight,
        "their bits": f"{_hex(last.grad)} {_hex(last.weight)}",
    }


def bits(rows: list[Any]) -> list[bytes]:
    """Every printed number's bytes."""
    return [part.tobytes() for row in rows for part in row]


def wrong_numbers(rows: list[Any]) -> int:
    """How many of the seed's six numbers differ."""
    expected = np.array([-16, 1, -20, 1, -20, 1.2], np.float32)
    return int(np.sum(np.concatenate([part for row in rows for part in row]) != expected))


def picture(made: dict[str, list[Any]]) -> Figure:
    """The accumulated gradient and the weight, way upon way."""
    figure, (grads, weights) = _report.panels(2, height=3.0)
    moments = ["batch 0", "batch 1", "step"]
    markers = zip(
        "sox+", (13, 9, 9, 13), (_report.SKY, _report.BLUE, _report.RED, _report.BLACK), strict=True
    )
    for (name, rows), (marker, size, color) in zip(made.items(), markers, strict=True):
        style: dict[str, Any] = {
            "marker": marker,
            "markersize": size,
            "color": color,
            "linestyle": "none",
        }
        grads.plot(moments, [row.grad.item() for row in rows], label=name, **style)
        weights.plot(moments, [row.weight.item() for row in rows], label=name, **style)
    grads.set(ylabel="accumulated gradient", ylim=(-21.5, -14.5), xlabel="after")
    weights.set(ylabel="weight", ylim=(0.95, 1.25), xlabel="after")
    weights.legend(frameon=False, loc="upper left", fontsize=9)
    return figure


def _hex(array: np.ndarray) -> str:
    return array.astype(">f4").tobytes().hex()
