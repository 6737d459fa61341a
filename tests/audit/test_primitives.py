"""What the audit says of each family of primitives, and never "exact" where the numbers differ.

The truth is float64 value and gradient on microbatches of 6 and 2 of 8 examples; the audit has
traced 8 and 4.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback
from jax.experimental import pallas as pl
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxaccum
from jaxaccum import Concat, Last, Mean, Sum
from jaxaccum.testing.bounds import normwise
from tests.audit import cases, meeting
from tests.audit.cases import W
from tests.audit.truth import APART, differs
from tests.support.helpers import data, parts_of

BATCH = {
    "x": data(8, 3, seed=1), "y": jnp.asarray([0, 2, 1, 1, 0, 2, 1, 2]),
    "mask": jnp.asarray([1.0, 0, 1, 1, 0, 1, 1, 1]),
    "keys": jax.random.split(jax.random.key(0), 8),
}  # fmt: skip
PARTS = parts_of(BATCH, [6, 2])


def mean_of(f):
    return lambda w, b: jnp.mean(f(b["x"] * w[None], b))


def stepwise(under, w, b):
    """A sum over features, one at a time, of sums over examples."""
    step = under(lambda total, x: (total + jnp.sum(jnp.sin(x[0] * x[1])), None))
    return lax.scan(step, jnp.zeros(()), (b["x"].T, w))[0]


def audited(loss, **options):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return jaxaccum.audit(loss, W, BATCH, **options)


CASES = {
    **{name: (mean_of(f), "MEAN", True) for name, f in cases.APART.items()},
    **{name: (mean_of(f), verdict, False) for name, (f, verdict) in meeting.MEETING.items()},
    "segment_sum, linear": (
        lambda w, b: Sum(jnp.sum(jax.ops.segment_sum(b["x"] * w[None], b["y"], 3) * W)),
        "SUM",
        True,
    ),
    "integer quotient of a total": (
        lambda w, b: Sum(jnp.sum(w) * (jnp.sum(b["y"]) // 4)),
        "COUPLED",
        False,
    ),
    "a total in steps, under jax.checkpoint": (
        lambda w, b: stepwise(jax.checkpoint, w, b) / len(b["x"]),
        "MEAN",
        True,
    ),
    "a total in steps, under jax.jit of jax.checkpoint": (
        lambda w, b: Mean(stepwise(lambda f: jax.jit(jax.checkpoint(f)), w, b), len(b["x"])),
        "RATIO",
        True,
    ),
    "a weight of ones": (
        lambda w, b: Mean(jnp.sum(b["x"] @ w), jnp.sum(b["y"] >= 0)),
        "RATIO",
        True,
    ),
    "a complex total": (
        lambda w, b: Sum(jnp.real(lax.complex(jnp.sum(b["x"] @ w), jnp.sum(b["x"])) * (2 + 1j))),
        "SUM",
        True,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_exact_is_what_the_numbers_say(name):
    loss, verdict, exact = CASES[name]
    report = audited(loss)
    assert (report.verdict, report.exact) == (verdict, exact), report
    with jax.numpy_rank_promotion("allow"):
        error = differs(loss, W, BATCH, PARTS)
    assert error is not None
    assert (error < APART) == exact, error


# -- what has no rule ------------------------------------------------------------------------------


def kernel(h):
    def body(x, out):
        out[...] = jnp.tanh(x[...])

    return pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct(h.shape, h.dtype), interpret=True)(h)


def reference(h):
    return h * jax.new_ref(jnp.max(h))[...]


WITHOUT_A_RULE = {
    "pallas_call": kernel,
    "pure_callback": lambda h: jax.pure_callback(
        np.tanh, jax.ShapeDtypeStruct(h.shape, h.dtype), h
    ),
    "io_callback": lambda h: io_callback(np.tanh, jax.ShapeDtypeStruct(h.shape, h.dtype), h),
    "ffi_call": lambda h: jax.ffi.ffi_call("their_tanh", jax.ShapeDtypeStruct(h.shape, h.dtype))(h),
    "linear_call": lambda h: jax.custom_derivatives.linear_call(
        lambda _, x: 2.0 * x, lambda _, x: 2.0 * x, (), h
    ),
    "new_ref": reference,
}


@pytest.mark.parametrize("name", WITHOUT_A_RULE)
@pytest.mark.parametrize("end", [jnp.mean, lambda h: jnp.mean(h) * jnp.sum(h)])
def test_what_has_no_rule_is_unknown_by_its_name_and_line(name, end):
    report = audited(lambda w, b: end(WITHOUT_A_RULE[name](b["x"] * w[None])))
    assert (report.verdict, report.exact) == ("UNKNOWN", False)
    finding = next(f for f in report.findings if name in f.note)
    assert finding.kind == "unknown"
    assert finding.origin.file == __file__
    line = pathlib.Path(__file__).read_text().splitlines()[finding.origin.line - 1]
    assert name in line
    assert "probe=True" in finding.fix
    assert name in str(report)


def test_what_has_no_rule_is_fixed_where_nothing_of_the_batch_enters_and_nothing_else_could():
    shape = jax.ShapeDtypeStruct((3,), jnp.float64)
    pure = lambda w: jax.ffi.ffi_call("their_tanh", shape)(w)
    impure = lambda w: jax.ffi.ffi_call("their_tanh", shape, has_side_effect=True)(w)
    called = lambda w: jax.pure_callback(np.tanh, shape, w)
    for function, exact in ((pure, True), (impure, False), (called, False)):
        report = audited(lambda w, b, f=function: jnp.mean(b["x"] * f(w)[None]))
        assert report.exact == exact, report


def test_an_output_whose_shape_changes_with_the_batch_size_is_not_exact():
    for tag in (Concat, Last, lambda x: jnp.mean(x, 0)):
        loss = lambda w, b, tag=tag: (
            jnp.mean(b["x"] @ w),
            tag(jnp.broadcast_to(b["mask"][:, None], (len(b["x"]),) * 2)),
        )
        report = audited(loss, has_aux=True)
        assert report.exact == (tag is Last)


# -- devices and microbatches ----------------------------------------------------------------------


def over_devices(body, specs, out=None, **options):
    """The body on two devices, each with half of the examples."""
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,))
    return jax.shard_map(
        body, mesh=mesh, in_specs=specs, out_specs=P("data") if out is None else out, **options
    )


ROWS = P("data")
OVER_DEVICES = {
    "rows": (lambda h: over_devices(jnp.tanh, ROWS)(h), "MEAN", True),
    "replicated weights": (
        lambda h: over_devices(lambda h, v: h * v[None], (ROWS, P()))(h, W), "MEAN", True,
    ),
    "a psum": (
        lambda h: over_devices(lambda h: lax.psum(jnp.mean(h), "data") / 2.0, ROWS, P())(h),
        "MEAN", True,
    ),
    "a pmean, used": (
        lambda h: over_devices(lambda h: h - lax.pmean(h.mean(0), "data"), ROWS)(h) ** 2,
        "COUPLED", False,
    ),
    "a device's own mean": (
        lambda h: over_devices(lambda h: h - h.mean(0), ROWS)(h) ** 2, "COUPLED", False,
    ),
    "a device's place": (
        lambda h: over_devices(lambda h: h * lax.axis_index("data"), ROWS)(h), "POSITION", False,
    ),
    "an exchange": (
        lambda h: over_devices(lambda h: lax.ppermute(h, "data", [(0, 1), (1, 0)]), ROWS)(h) * h,
        "COUPLED", False,
    ),
    "divided weights": (
        lambda h: over_devices(lambda h, v: h * v.sum(), (ROWS, ROWS))(h, jnp.arange(4.0)),
        "UNKNOWN", False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OVER_DEVICES)
def test_shard_map(name):
    f, verdict, exact = OVER_DEVICES[name]
    loss = mean_of(lambda h, b: f(h))
    report = audited(loss)
    assert (report.verdict, report.exact) == (verdict, exact), report
    with jax.numpy_rank_promotion("allow"):
        assert (differs(loss, W, BATCH, PARTS) < APART) == exact


AXIS = "microbatch"
NUMBERS = jnp.arange(8.0)[:, None]
OVER_MICROBATCHES = {
    "a total": (lambda h: h / lax.psum(jnp.sum(h**2), AXIS), True),
    "the batch's rows": (
        lambda h: h * jnp.mean(lax.all_gather(h, AXIS, tiled=True) * NUMBERS), True,
    ),
    "the batch's rows, merged": (
        lambda h: h * jnp.mean(lax.all_gather(h, AXIS).reshape(-1, 3) * NUMBERS), True,
    ),
    "rows in another order": (
        lambda h: h * jnp.mean(lax.all_gather(h, AXIS).swapaxes(0, 1).reshape(-1, 3) * NUMBERS),
        False,
    ),
    "rows gathered inside": (
        lambda h: h * jnp.mean(lax.all_gather(h, AXIS, axis=1).reshape(-1, 3) * NUMBERS), False,
    ),
    "rows added up": (lambda h: h * lax.psum(h, AXIS), False),
    "a root": (lambda h: h * lax.psum(jnp.sqrt(jnp.sum(h**2)), AXIS), False),
    "a maximum": (lambda h: h * lax.pmax(lax.stop_gradient(h).max(0), AXIS)[None], True),
    "places as keys": (cases.places_as_keys, True),
}  # fmt: skip


@pytest.mark.parametrize("name", OVER_MICROBATCHES)
def test_collectives_over_the_microbatch_axis(name):
    """The truth: microbatches as devices, by `jax.vmap`."""
    f, exact = OVER_MICROBATCHES[name]
    loss = mean_of(lambda h, b: f(h))

    def spread(w, n):
        parts = jax.tree.map(lambda x: x.reshape(n, len(x) // n, *x.shape[1:]), BATCH)
        return jnp.mean(jax.vmap(lambda b: loss(w, b), axis_name=AXIS)(parts))

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        whole, parts = (jax.value_and_grad(spread)(W, n) for n in (1, 4))
    assert audited(loss, num_microbatches=4).exact == exact
    assert (normwise(parts, whole) < APART) == exact
    assert not audited(loss, num_microbatches=3).exact  # of 3, 3 and 2 examples


def test_a_collective_over_groups_is_unknown():
    groups = lambda: [[i] for i in range(lax.axis_size(AXIS))]
    report = audited(
        mean_of(lambda h, b: h / lax.psum(jnp.sum(h**2), AXIS, axis_index_groups=groups()))
    )
    assert (report.verdict, report.exact) == ("UNKNOWN", False)


def test_a_collective_over_the_microbatches_on_each_device_apart_is_unknown():
    body = lambda h: h - lax.pmean(h.mean(0), AXIS)
    report = audited(mean_of(lambda h, b: over_devices(body, ROWS, check_vma=False)(h) ** 2))
    assert (report.verdict, report.exact) == ("UNKNOWN", False)


def test_a_collective_over_another_axis_is_the_devices_own():
    """Each device accumulates its share: a sum over devices of the same statistic couples no other
    examples."""
    cases = {
        "rows": lambda h: h * lax.psum(h, "data"),
        "a mean": lambda h: lax.pmean(h.mean(), "data"),
        "a mean, used": lambda h: h * lax.pmean(h.mean(), "data"),
    }
    reports = {}

    def on_each(batch):
        for name, f in cases.items():
            with jax.numpy_rank_promotion("allow"):
                reports[name] = jaxaccum.audit(mean_of(lambda h, b, f=f: f(h)), W, batch)
        return batch["y"]

    over_devices(on_each, (ROWS,))(BATCH)
    assert {name: report.verdict for name, report in reports.items()} == {
        "rows": "MEAN", "a mean": "MEAN", "a mean, used": "COUPLED",
    }  # fmt: skip
