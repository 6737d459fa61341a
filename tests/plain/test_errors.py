"""Bad input, row by row: each is refused at trace time by an error that names what arrived and what
to pass."""

import sys
import types

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jaxaccum as ja
from tests.support.helpers import refused
from tests.support.modules import Module

W, X, KEY = jnp.ones(3), jnp.ones((6, 3)), jax.random.key(0)


def mean(w, x):
    return jnp.mean(x @ w)


def call(loss=mean, *args, **options):
    """A call of `value_and_grad` that is to fail when it is made."""
    options = (
        options
        if {"num_microbatches", "microbatch_size"} & set(options)
        else options | {"num_microbatches": 2}
    )
    return lambda: ja.value_and_grad(loss, **options)(*(args or (W, X)))


def aux(value):
    """A loss with one auxiliary output."""
    return lambda w, x: (jnp.mean(x @ w), value(w, x))


def state(value):
    """A loss that returns a new state."""
    return lambda w, x, s: (jnp.mean(x @ w), value(s))


CARRIED = {"in_axes": (None, 0, ja.CARRY), "has_aux": True}
KEYED = {"in_axes": (None, 0, ja.KEY)}

SIZES = [
    (lambda: ja.value_and_grad(mean)(W, X), ["exactly one", "neither"]),
    (call(num_microbatches=2, microbatch_size=3), ["exactly one", "2", "3"]),
    (call(num_microbatches=0), ["num_microbatches", "at least 1", "0"]),
    (call(microbatch_size=-1), ["microbatch_size", "at least 1", "-1"]),
    (call(num_microbatches=2.5), ["num_microbatches", "int", "2.5"]),
    (call(microbatch_size=2.0), ["microbatch_size", "int", "2.0"]),
    (call(num_microbatches=True), ["num_microbatches", "True"]),
    (call(num_microbatches=7), ["num_microbatches=7", "6 examples"]),
    (call(num_microbatches=np.int64(9)), ["num_microbatches=9", "6 examples"]),
    (
        lambda: jax.jit(lambda n: call(num_microbatches=n)())(2),
        ["num_microbatches", "traced", "Python int"],
    ),
    (call(mean, W, X[:0], num_microbatches=1), ["empty", "0"]),
    (call(mean, W, X[:0], microbatch_size=1), ["empty", "0"]),
    (call(num_microbatches=4, split="strided"), ["strided", "num_microbatches=4", "6 examples"]),
    (call(split="random"), ["split", "'random'"]),
]
AXES = [
    (call(mean, W, {"a": X, "b": X[:5]}), ["argument 1['a']", "6", "argument 1['b']", "5"]),
    (call(in_axes=(None,)), ["in_axes", "1 entries", "2 positional"]),
    (call(in_axes=0), ["in_axes", "tuple"]),
    (call(in_axes=(None, 2)), ["argument 1", "axis 2", "[6, 3]"]),
    (call(in_axes=(None, -3)), ["argument 1", "axis -3", "[6, 3]"]),
    (call(in_axes=(None, None)), ["no argument has a batch axis"]),
    (call(in_axes=(None, "0")), ["in_axes", "'0'"]),
    (call(in_axes=(None, {"b": 0})), ["argument 1", "prefix"]),
    (call(mean, W, {"a": KEY}, in_axes=(None, {"a": ja.KEY})), ["['a']", "whole argument"]),
    (call(mean, W, jnp.float32(1)), ["argument 1", "axis 0", "[]"]),
    (call(mean, W, {"x": X, "key": KEY}), ["argument 1['key']", "[]", "jaxaccum.BATCH_KEY"]),
    (
        call(mean, W, {"x": X, "key": jax.random.PRNGKey(0)}),
        ["argument 1['key'] (if it is a PRNG key, declare it jaxaccum.BATCH_KEY) holds 2"],
    ),
    (call(mean, W, [1.0, 2.0]), ["argument 1[0]", "float"]),
    (call(axis_name=3), ["axis_name", "3"]),
    (call(mesh_axes="data"), ["mesh_axes", "'data'", "shard_map"]),
    (call(accumulator=3), ["accumulator", "3"]),
]
LOSSES = [
    (call(lambda w, x: jnp.sum(x > 0)), ["int", "floating"]),
    (call(lambda w, x: jnp.sum(x).astype(complex)), ["complex", "real"]),
    (call(lambda w, x: x @ w), ["[3]", "scalar", "Mean"]),
    (call(lambda w, x: ja.Mean(x @ w, 2)), ["[3]", "scalar"]),
    (call(lambda w, x: None), ["NoneType"]),
    (call(lambda w, x: {}), ["empty dict"]),
    (call(lambda w, x: {"a": {"b": jnp.sum(x)}}), ["loss['a']", "flat dict"]),
    (call(lambda w, x: ja.Max(jnp.sum(x))), ["Max", "Mean"]),
    (call(lambda w, x: (jnp.mean(x @ w), 1.0)), ["tuple", "has_aux=True"]),
    (call(lambda w, x: [jnp.mean(x @ w)]), ["list", "has_aux=True"]),
    (call(mean, has_aux=True), ["has_aux=True", "(loss, aux)"]),
    (call(lambda w, x: (1.0, 2.0, 3.0), has_aux=True), ["tuple of 3", "(loss, aux)"]),
]
OUTPUTS = [
    (call(aux(lambda w, x: x @ w), has_aux=True), ["aux", "[3]", "Concat", "Mean"]),
    (
        call(aux(lambda w, x: 2 * x[0, :2]), has_aux=True),
        [
            "Wrap it in jaxaccum.Sum(x) for a sum",
            "For the new state of a BatchNorm",
            'axis_name="microbatch"',
        ],
    ),
    (
        lambda: ja.microbatch(jax.value_and_grad(mean), num_microbatches=2)(W, X),
        ["output[1]", "remove the decorator", "jax.value_and_grad(jaxaccum.microbatch(loss, …))"],
    ),
    (call(aux(lambda w, x: {"n": 3}), has_aux=True), ["aux['n']", "Sum"]),
    (
        lambda: ja.microbatch(lambda w, x: {"z": x @ w}, num_microbatches=2)(W, X),
        ["output['z']", "Concat"],
    ),
    (lambda: ja.full_batch(lambda w, x: {"z": x @ w})(W, X), ["output['z']", "Concat"]),
    (call(aux(lambda w, x: ja.Sum("x")), has_aux=True), ["aux.Sum", "str"]),
    (
        call(aux(lambda w, x: ja.Mean({"a": 1.0, "b": 2.0}, {"a": 1.0})), has_aux=True),
        ["Mean", "structure"],
    ),
    (call(aux(lambda w, x: ja.Mean(jnp.ones(3), jnp.ones(2))), has_aux=True), ["[3]", "[2]"]),
    (
        call(aux(lambda w, x: ja.Sum(ja.Mean(1.0, 2.0))), has_aux=True),
        ["aux.Sum", "Mean", "not other tags"],
    ),
    (call(aux(lambda w, x: ja.Mean(1.0, 1j)), has_aux=True), ["weight", "complex"]),
    (
        call(aux(lambda w, x: ja.Concat(w)), has_aux=True, num_microbatches=3),
        ["aux.Concat", "[3]", "2 examples"],
    ),
    (
        call(aux(lambda w, x: ja.Sum(x @ w)), has_aux=True, num_microbatches=4),
        ["aux.Sum", "[2]", "[1]"],
    ),
    (
        call(lambda w, x: {str(len(x)): jnp.mean(x @ w)}, num_microbatches=4),
        ["2 examples", "one of 1", "'2'", "'1'"],
    ),
]
STATES = [
    (call(aux(lambda w, x: ja.Carry(w)), has_aux=True), ["Carry", "CARRY", "in_axes"]),
    (call(state(lambda s: None), W, X, W, **CARRIED), ["CARRY", "0 Carry"]),
    (call(state(lambda s: (ja.Carry(s), ja.Carry(s))), W, X, W, **CARRIED), ["2 Carry"]),
    (
        call(lambda w, x, s, t: mean(w, x), W, X, W, W, in_axes=(None, 0, ja.CARRY, ja.CARRY)),
        ["CARRY twice"],
    ),
    (call(state(lambda s: ja.Carry({"a": s})), W, X, W, **CARRIED), ["structure", "'a'"]),
    (call(state(lambda s: ja.Carry(s[:2])), W, X, W, **CARRIED), ["shape", "[3]", "[2]"]),
    (
        call(state(lambda s: ja.Carry(s.astype(jnp.bfloat16))), W, X, W, **CARRIED),
        ["dtype", "float64", "bfloat16"],
    ),
    (call(state(ja.Carry), W, X, "state", **CARRIED), ["argument 2", "str"]),
]
KEYS = [
    (call(lambda w, x, k: mean(w, x), W, X, W, **KEYED), ["argument 2", "KEY", "float64[3]"]),
    (
        call(lambda w, x, k: mean(w, x), W, X, 0, in_axes=(None, 0, ja.EXAMPLE_KEY)),
        ["argument 2", "EXAMPLE_KEY", "int"],
    ),
    (call(lambda w, x, k: mean(w, x), W, X, jax.random.split(KEY), **KEYED), ["argument 2", "[2]"]),
]
ARGNUMS = [
    (call(state(ja.Carry), W, X, W, argnums=2, **CARRIED), ["argnums=2", "CARRY"]),
    (
        call(lambda w, x, k: mean(w, x), W, X, KEY, argnums=(0, 2), **KEYED),
        ["argnums=(0, 2)", "KEY"],
    ),
    (call(argnums=5), ["argnums=5", "2 positional"]),
    (call(argnums=1.0), ["argnums", "1.0"]),
    (call(argnums=(0, 0)), ["argnums", "twice"]),
    (call(argnums=()), ["argnums", "empty"]),
    (call(mean, {"w": W, "n": jnp.int32(1)}, X), ["argument 0['n']", "int32"]),
    (call(mean, True, X), ["argument 0", "bool"]),
    (call(mean, "w", X), ["argument 0", "str"]),
]
PADDING = [
    (
        call(lambda w, x, n: mean(w, x), W, X, 3, in_axes=(None, 0, None), num_examples_argnum=2),
        ["tag", "Mean(total, weight)"],
    ),
    (
        call(lambda w, x, n: mean(w, x), W, X, 3, in_axes=(None, 0, None), num_examples_argnum=1),
        ["num_examples_argnum=1", "[6, 3]"],
    ),
    (call(num_examples_argnum=7), ["num_examples_argnum=7", "2 positional"]),
]
ROWS = [*SIZES, *AXES, *LOSSES, *OUTPUTS, *STATES, *KEYS, *ARGNUMS, *PADDING]


@pytest.mark.parametrize(("bad", "says"), ROWS, ids=[" ".join(says) for _, says in ROWS])
def test_is_refused(bad, says):
    refused(bad, *says)


def test_the_good_call_beside_them_is_accepted():
    value, grad = call(state(ja.Carry), W, X, W, **CARRIED)()
    assert float(value[0]) == 3.0
    assert grad.tolist() == [1.0, 1.0, 1.0]


def test_an_error_of_a_decorated_loss_says_that_it_is_decorated():
    loss = lambda w, x: ja.Mean(jnp.sum(x @ w), 3)
    for decorated, said in ((jax.value_and_grad(loss), True), (loss, False)):
        fails = ja.microbatch(decorated, num_microbatches=2)
        with pytest.raises(TypeError) as info:
            fails(W, X[:, :2])
        notes = " ".join(info.value.__notes__)
        assert ("is decorated: where a decorator differentiates it" in notes) == said


def test_an_index_inside_a_custom_rule_is_refused():
    @jax.custom_jvp
    def ruled(x):
        return x * jax.lax.axis_index("microbatch").astype(x.dtype)

    ruled.defjvp(lambda primals, tangents: (ruled(*primals), tangents[0]))
    refused(
        call(lambda w, x: jnp.mean(ruled(x @ w))),
        "axis_index",
        "custom_jvp_call",
        "argument",
        error=NotImplementedError,
    )


def test_a_batch_of_symbolic_size_is_refused():
    (size,) = jax.export.symbolic_shape("b")
    exported = jax.export.export(jax.jit(ja.value_and_grad(mean, microbatch_size=2)))
    with jax.enable_x64(False):
        whole, rows = (jax.ShapeDtypeStruct(s, jnp.float32) for s in [(3,), (size, 3)])
        refused(lambda: exported(whole, rows), "argument 1", "symbolic size b", "pad the batch")
        exported(whole, jax.ShapeDtypeStruct((6, 3), jnp.float32))


STATE = {"mean": jnp.ones(16), "count": jnp.int32(3)}
ONE_KEY = jax.random.PRNGKey(0)


@pytest.mark.parametrize(
    ("args", "entries"),
    [
        ((W, X, KEY), "None, 0, BATCH_KEY"),
        ((W, X, ONE_KEY), "None, 0, BATCH_KEY"),
        ((W, X, jnp.arange(6)), "None, 0, 0"),
        ((W, STATE, KEY, {"x": X, "y": X[:, 0]}), "None, None, BATCH_KEY, 0"),
        ((W, jnp.ones(16), X), "None, None, 0"),
        ((W, 0.5, 2.0), "None, None, None"),
    ],
)
def test_the_entries_that_are_suggested_fit_the_arguments(args, entries):
    """An example that fails when it is copied sends its reader astray."""
    refused(call(mean, *args), f"as in_axes=({entries}):")
    if "0" in entries:
        named = eval(f"({entries})", {"BATCH_KEY": ja.BATCH_KEY})
        ja.grad(lambda w, *rest: 0.0 * jnp.sum(w), num_microbatches=2, in_axes=named)(*args)


@pytest.mark.parametrize(("field", "says"), [(True, "its dtype is bool"), (max, "is a builtin")])
def test_a_module_of_equinox_is_sent_to_its_own_transformation(monkeypatch, field, says):
    monkeypatch.setitem(sys.modules, "equinox", types.SimpleNamespace(Module=Module))
    loss = lambda module, x: jnp.mean(x @ module.weight)
    refused(
        call(loss, Module(W, field), X),
        "argument 0",
        says,
        "equinox.filter_value_and_grad(jaxaccum.microbatch(fun, …))(module, batch)",
        error=TypeError,
    )
