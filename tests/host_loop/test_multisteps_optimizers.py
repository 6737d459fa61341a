"""Every optimizer of optax, under MultiSteps and alone on the window's mean: bitwise the same."""

import inspect

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import jaxaccum as ja
from tests.support.covering import EVERY, covering
from tests.support.helpers import refused, same

DEEP = hypothesis.settings.default.max_examples >= EVERY
K, WINDOWS = 2, 3 if DEEP else 2
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
MASK = {"w": True, "b": False}
LABELS = {"w": "adam", "b": "zero"}
BY_LEAF = ["freeze", "masked", "multi_transform", "partition", "scale_by_muon"]
BY_LEAF += ["selective_transform"]
GROUPS = {"adam": optax.adam(0.1), "zero": optax.set_to_zero()}


def norm(updates):
    return optax.tree.norm(updates)


def even(step):
    return step % 2 == 0


def matrices(params):
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), params)


# How each is made, where its learning rate is not the only argument that it must be given.
ARGUMENTS = {
    "adaptive_grad_clip": lambda make: make(0.1),
    "add_noise": lambda make: make(0.1, 0.5, key=jax.random.key(0)),
    "apply_if_finite": lambda make: make(optax.adam(0.1), 2),
    "chain": lambda make: make(optax.clip(0.1), optax.adam(0.1)),
    "clip": lambda make: make(0.1),
    "clip_by_block_rms": lambda make: make(0.1),
    "clip_by_global_norm": lambda make: make(0.1),
    "conditionally_mask": lambda make: make(optax.adam(0.1), even),
    "conditionally_transform": lambda make: make(optax.adam(0.1), even),
    "ema": lambda make: make(0.9),
    "flatten": lambda make: make(optax.adam(0.1)),
    "freeze": lambda make: make(MASK),
    "galore": lambda make: make(0.1, rank=2),
    "inject_hyperparams": lambda make: make(optax.adam)(0.1),
    "inject_stateful_hyperparams": lambda make: make(optax.adam)(0.1),
    "lookahead": lambda make: make(optax.sgd(0.1), 2, 0.5),
    "masked": lambda make: make(optax.adam(0.1), MASK),
    "measure_with_ema": lambda make: make(norm, 0.9),
    "mechanize": lambda make: make(optax.adam(0.1)),
    "multi_transform": lambda make: make(GROUPS, LABELS),
    "named_chain": lambda make: make(("clip", optax.clip(0.1)), ("adam", optax.adam(0.1))),
    "noisy_sgd": lambda make: make(0.1, key=jax.random.key(0)),
    "partition": lambda make: make(GROUPS, LABELS),
    "sam": lambda make: make(optax.sgd(0.1), optax.sgd(0.1)),
    "scale": lambda make: make(-0.1),
    "scale_by_backtracking_linesearch": lambda make: make(5),
    "scale_by_galore": lambda make: make(rank=2),
    "scale_by_muon": lambda make: optax.masked(make(weight_dimension_numbers=matrices), MASK),
    "scale_by_schedule": lambda make: make(optax.linear_schedule(0.1, 0.01, 3)),
    "scale_by_zoom_linesearch": lambda make: make(5),
    "schedule_free": lambda make: make(optax.adam(0.1), 0.1),
    "selective_transform": lambda make: make(optax.adam(0.1), freeze_mask=MASK),
    "snapshot": lambda make: make("norm", norm),
    "split_real_and_imaginary": lambda make: make(optax.adam(0.1)),
    "stateless": lambda make: make(lambda updates, params: jax.tree.map(jnp.sign, updates)),
    "stateless_with_tree_map": lambda make: make(lambda update, param: update - param),
    "trace": lambda make: make(0.9),
    "with_extra_args_support": lambda make: make(optax.adam(0.1)),
}
PER_EXAMPLE = "it takes a gradient for each example, and MultiSteps one of the parameters' shapes"
NOT_APPLICABLE = {
    "differentially_private_aggregate": PER_EXAMPLE,
    "dpsgd": PER_EXAMPLE,
    "monitor": "the first step adds to its state, which no loop and no cond can hold",
}


def makers():
    """The functions of optax and optax.contrib that return a gradient transformation, by name."""
    functions = dict(inspect.getmembers(optax, inspect.isfunction))
    functions |= dict(inspect.getmembers(optax.contrib, inspect.isfunction))
    public = {name: make for name, make in functions.items() if not name.startswith("_")}
    return {name: make for name, make in public.items() if is_maker(name, make)}


def is_maker(name, make):
    """By what it says that it returns, or where it says nothing, by what it returns."""
    returns = inspect.signature(make).return_annotation
    if returns is not inspect.Signature.empty:
        return "GradientTransformation" in str(returns)
    try:
        return isinstance(made(name, make), optax.GradientTransformation)
    except TypeError:  # a function that needs other arguments: none of these is an optimizer
        return False


def made(name, make):
    if name in ARGUMENTS:
        return ARGUMENTS[name](make)
    return make(0.1) if "learning_rate" in inspect.signature(make).parameters else make()


MAKERS = {name: make for name, make in makers().items() if name not in NOT_APPLICABLE}


def dyadic(i, dtype, name=None):
    """Multiples of 1/16 between -1 and 1: the mean of two of them is exact in every dtype.

    One leaf, which compiles fastest, and two for an optimizer that tells them apart.
    """
    draw = np.random.default_rng(i).integers
    shapes = {"w": (4, 6), "b": (6,)} if name in BY_LEAF else {"w": (4, 6)}
    return {leaf: jnp.asarray(draw(-16, 17, shape) / 16, dtype) for leaf, shape in shapes.items()}


SEARCHES = ["lbfgs", "scale_by_backtracking_linesearch", "scale_by_zoom_linesearch"]
READ_THE_LOSS = ["momo", "momo_adam", "polyak_sgd", "reduce_on_plateau", "scale_by_polyak"]
CURVATURE = ["hutchinson_estimator_diag_hessian", "sophia"]
NEEDS = dict.fromkeys(SEARCHES, ("value", "grad", "value_fn"))
NEEDS |= dict.fromkeys(READ_THE_LOSS, ("value",))
NEEDS |= dict.fromkeys(CURVATURE, ("obj_fn",))
FUNCTIONS = ("value_fn", "obj_fn")


def squares(params):
    return sum(jnp.sum(x * x) for x in jax.tree.leaves(params))


def extras(name, mean):
    """What the optimizer asks for beside the gradient."""
    value = jnp.asarray(2.5, mean["w"].dtype)
    known = {"value": value, "grad": mean, "value_fn": squares, "obj_fn": squares}
    return {each: known[each] for each in NEEDS.get(name, ())}


def params_of(name, params):
    """The parameters that `update` is given: lookahead has two sets."""
    return optax.LookaheadParams(params, params) if name == "lookahead" else params


def assert_sees_the_mean(name, opt, dtype, compiled):
    """Bitwise: the mean is exact, so that the wrapper may change nothing at all."""
    params, multi = dyadic(100, dtype, name), ja.MultiSteps(opt, K)
    given = params_of(name, params)
    step = lambda tx: compiled(
        lambda grads, state, mean: tx.update(grads, state, given, **extras(name, mean))
    )
    alone, update = step(opt), step(multi)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        state, inner = multi.init(params), opt.init(params)
        traced = dtypes(jax.eval_shape(update, params, state, params))
        for window in range(WINDOWS):
            pair = [dyadic(K * window + i, dtype, name) for i in range(K)]
            mean = jax.tree.map(lambda a, b: (a + b) / 2, *pair)
            waiting, state = update(pair[0], state, mean)
            updates, state = update(pair[1], state, mean)
            expected, new = alone(mean, inner, mean)
            inner = jax.tree.map(in_dtype, new, inner)
            assert dtypes((updates, state)) == traced
            assert dtypes(updates) == dtypes(waiting) == dtypes(expected)
            assert not any(np.any(x) for x in jax.tree.leaves(waiting))
            assert same(updates, expected)
            assert same(numbers(state.inner_opt_state), numbers(inner))


def with_one_program(opt):
    """The optimizer, compiled once for MultiSteps and for itself: most of the time is this."""
    update = jax.jit(lambda *args, **extra: opt.update(*args, **extra), static_argnames=FUNCTIONS)
    return optax.GradientTransformationExtraArgs(opt.init, update)


# optax warns of the names that it will drop.
DEPRECATED = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@DEPRECATED
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_an_optimizer_sees_the_mean_of_its_window(name, dtype):
    """The wrapper is traced, and run as it is called outside of jit."""
    opt = optax.with_extra_args_support(made(name, MAKERS[name]))
    assert_sees_the_mean(name, with_one_program(opt), dtype, lambda step: step)


STATES = ["adam", "lookahead", "multi_transform", "sam", "schedule_free", "sgd"]
"""States of every form; a deep run compiles the wrapper of all optimizers."""


@DEPRECATED
@pytest.mark.parametrize(
    ("name", "dtype"), covering(sorted(MAKERS) if DEEP else STATES, list(DTYPES.values()))
)
def test_it_sees_the_mean_where_the_wrapper_is_compiled(name, dtype):
    opt = optax.with_extra_args_support(made(name, MAKERS[name]))
    assert_sees_the_mean(name, opt, dtype, jax.jit)


def test_one_microbatch_is_not_the_window():
    """The negative control: an optimizer that saw the last microbatch alone would be told apart."""
    params, pair = dyadic(100, jnp.float32), [dyadic(i, jnp.float32) for i in range(K)]
    multi, opt = ja.MultiSteps(optax.sgd(0.1), K), optax.sgd(0.1)
    state = multi.init(params)
    for grads in pair:
        updates, state = multi.update(grads, state, params)
    last, _ = opt.update(pair[-1], opt.init(params), params)
    assert not same(updates, last)


def test_a_state_that_grows_is_refused():
    multi, params = ja.MultiSteps(optax.monitor({"norm": norm}), 1), dyadic(100, jnp.float32)
    refused(lambda: jax.jit(multi.update)(params, multi.init(params), params), "state", "init")


def dtypes(tree):
    return jax.tree.map(lambda x: x.dtype, tree)


def is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def in_dtype(x, like):
    return x if is_key(x) else x.astype(like.dtype)


def numbers(tree):
    """Keys as the numbers in them."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)
