"""MultiSteps refuses bad windows, weights and trees: concrete ones at once, traced ones under
checkify."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify

import jaxaccum as ja
from tests.support.helpers import data, refused

PARAMS = {"w": data(3, 2), "b": data(2, seed=1)}


@pytest.mark.parametrize("k", [0, -1, 2.5, 2.0, "3", None, True, np.array([2])], ids=repr)
def test_every_k_is_a_positive_int(k):
    refused(lambda: ja.MultiSteps(optax.sgd(1.0), k), "every_k_schedule")


def test_every_k_may_be_any_integer_type():
    for k in (3, np.int64(3)):
        assert ja.MultiSteps(optax.sgd(1.0), k).init(PARAMS).mini_step == 0


@pytest.mark.parametrize("k", [0, -2, 2.5, 2.0, [1, 2], True], ids=repr)
def test_a_schedule_returns_a_positive_integer(k):
    multi = ja.MultiSteps(optax.sgd(1.0), lambda step: jnp.asarray(k) if isinstance(k, list) else k)
    for update in (multi.update, jax.jit(multi.update)):
        refused(
            lambda update=update: update(PARAMS, multi.init(PARAMS), PARAMS), "every_k_schedule"
        )


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (-1.0, "-1.0"),
        (np.nan, "nan"),
        (np.inf, "inf"),
        (jnp.ones(2), "[2]"),
        ([1.0], "[1.0]"),
        (1j, "1j"),
        ("a", "'a'"),
    ],
    ids=repr,
)
def test_a_weight_is_a_non_negative_scalar(weight, says):
    multi = ja.MultiSteps(optax.sgd(1.0), 2)
    refused(lambda: multi.update(PARAMS, multi.init(PARAMS), PARAMS, weight=weight), "weight", says)
    refused(
        lambda: jax.jit(lambda: multi.update(PARAMS, multi.init(PARAMS), PARAMS, weight=weight))(),
        "weight",
        says,
    )


def test_traced_values_are_checked_under_checkify():
    multi = ja.MultiSteps(optax.sgd(1.0), lambda step: 2 - step)
    run = jax.jit(checkify.checkify(lambda s, w: multi.update(PARAMS, s, PARAMS, weight=w)))
    state = multi.init(PARAMS)
    for weight, says in (
        (1.0, None),
        (0.0, None),
        (-1.0, "weight"),
        (np.nan, "weight"),
        (np.inf, "weight"),
    ):
        message = run(state, weight)[0].get()
        assert message is None if says is None else says in message
    message = run(state._replace(gradient_step=jnp.int32(2)), 1.0)[0].get()
    assert "every_k_schedule returned 0" in message


UNDER = {
    "jit": lambda f: jax.jit(f),
    "vmap": lambda f: lambda w: jax.vmap(f)(jnp.stack([jnp.ones_like(w), w])),
    "grad": lambda f: jax.grad(f),
    "scan": lambda f: lambda w: jax.lax.scan(lambda c, w: (c + f(w), None), 0.0, w[None])[0],
    "cond": lambda f: lambda w: jax.lax.cond(w < 5, f, lambda w: w, w),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(f)),
}


@pytest.mark.parametrize("under", UNDER)
def test_a_weight_is_checked_under(under):
    """The check passes through the transformations, inside `checkify` and around it."""
    multi = ja.MultiSteps(optax.sgd(1.0), 1)
    step = lambda w: jnp.sum(multi.update(jnp.ones(2), multi.init(jnp.ones(2)), weight=w)[0])
    checked = checkify.checkify(UNDER[under](step))
    for weight, says in ((2.0, None), (-2.0, "weight must be finite and not negative")):
        for run in (checked, jax.jit(checked)):
            message = run(jnp.float64(weight))[0].get()
            assert message is None if says is None else says in message


def test_checks_of_the_user_stay_beside_ours():
    multi = ja.MultiSteps(optax.sgd(1.0), 1)

    def step(w):
        checkify.check(w < 5, "too large: {w}", w=w)
        return multi.update(jnp.ones(2), multi.init(jnp.ones(2)), weight=w)

    run = jax.jit(checkify.checkify(step))
    messages = [run(jnp.float64(w))[0].get() or "" for w in (1.0, 7.0, -1.0)]
    assert [m.split()[0] if m else m for m in messages] == ["", "too", "weight"]
    lanes = jax.vmap(checkify.checkify(step))(jnp.asarray([1.0, -1.0]))
    assert "weight" in lanes[0].get()


def test_a_changed_tree_is_refused():
    multi = ja.MultiSteps(optax.sgd(1.0), 2)
    state = multi.init(PARAMS)
    refused(lambda: multi.update({"w": PARAMS["w"]}, state, PARAMS), "updates", "structure", "init")
    refused(
        lambda: multi.update(PARAMS | {"w": jnp.ones((2, 3))}, state, PARAMS),
        "['w']",
        "[2, 3]",
        "[3, 2]",
    )
    refused(
        lambda: multi.update(PARAMS | {"w": PARAMS["w"].astype(complex)}, state, PARAMS),
        "['w']",
        "complex128",
        "float64",
    )
    refused(lambda: multi.flush(state, {"w": PARAMS["w"]}), "params", "structure")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ja.MultiSteps(lambda g: g, 2), "optax.GradientTransformation"),
        (
            lambda: ja.MultiSteps(optax.sgd(1.0), 2, accumulator_dtype=jnp.int32),
            "accumulator_dtype",
        ),
    ],
)
def test_other_bad_options(make, says):
    refused(make, says)


def test_a_skip_function_returns_a_boolean_scalar():
    multi = ja.MultiSteps(optax.sgd(1.0), 2, should_skip_update_fn=lambda *_: (jnp.zeros(2), ()))
    refused(
        lambda: multi.update(PARAMS, multi.init(PARAMS), PARAMS), "should_skip_update_fn", "[2]"
    )
