"""Convolutions of any kind in the loop: the batch's numbers, on CPU in the layout that is fast,
elsewhere as they are.

The oracle is the same convolution outside of every loop, in float32 and float64.
"""

import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import jaxaccum as ja
from jaxaccum._jaxpr import convolutions
from tests.support.helpers import normwise

ROUNDING = 2**8 * float(jnp.finfo(jnp.float32).eps)
"""Normwise, in float32: sums of some hundred products, in another order."""
SPACE = "HWD"


@st.composite
def kinds(draw):
    """A convolution's options, the shapes of its operands without their layouts, and these."""
    n = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    depthwise = draw(st.booleans())
    c = groups if depthwise else groups * draw(st.integers(1, 2))
    o = groups * draw(st.integers(1, 2))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(n))
    size, window = each(5, 6), each(1, 3)
    options = {
        "window_strides": each(1, 2),
        "padding": draw(st.sampled_from(["SAME", "VALID", [(1, 2)] * n])),
        "rhs_dilation": each(1, 2) if draw(st.booleans()) else (1,) * n,
        "feature_group_count": groups,
    }
    if not isinstance(options["padding"], str):
        options["lhs_dilation"] = each(1, 2)
    layouts = [draw(st.permutations([*letters, *SPACE[:n]])) for letters in ("NC", "IO", "NC")]
    return (
        options,
        {"N": 4, "C": c, "I": c // groups, "O": o},
        size,
        window,
        tuple(map("".join, layouts)),
    )


def operands(kind, dtype):
    """The rows of a batch with a batch axis in front, 2 of a batch each, and a kernel."""
    _, sizes, size, window, (rows, kernel, _) = kind
    rng = np.random.default_rng(0)
    shape = lambda letters, space: [sizes.get(x) or space[SPACE.index(x)] for x in letters]
    x = rng.normal(size=(3, *shape(rows, size)))
    w = rng.normal(size=shape(kernel, window))
    return jnp.asarray(w, dtype), jnp.asarray(x, dtype)


def loss_of(kind):
    options, _, _, _, layouts = kind

    def loss(w, x):
        each = lambda x: lax.conv_general_dilated(x, w, dimension_numbers=layouts, **options)
        return jnp.mean(jnp.sin(each(x[0])))  # one batch a row

    return loss


def reference(loss, w, x):
    """One row after the other, no loop: XLA sees each convolution at the top."""
    mean = lambda w, x: sum(loss(w, x[i : i + 1]) for i in range(len(x))) / len(x)
    return jax.jit(jax.value_and_grad(mean, (0, 1)))(w, x)


@hypothesis.settings(
    max_examples=hypothesis.settings.default.max_examples // 4
)  # each is compiled twice
@given(kinds())
def test_any_convolution_and_both_of_its_gradients(kind):
    w, x = operands(kind, jnp.float32)
    step = ja.value_and_grad(loss_of(kind), argnums=(0, 1), microbatch_size=1, audit=None)
    actual = jax.jit(step)(w, x)
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), (w, x))
    assert normwise(actual, reference(loss_of(kind), *wide)) < ROUNDING


def network(w, x):
    """Two layers with a stride and groups between them, in the layout of PyTorch, whose gradients
    have three others."""
    numbers = ("NCHW", "OIHW", "NCHW")
    h = jax.nn.relu(lax.conv_general_dilated(x, w["a"], (1, 1), "SAME", dimension_numbers=numbers))
    h = lax.conv_general_dilated(
        h, w["b"], (2, 2), "SAME", dimension_numbers=numbers, feature_group_count=4
    )
    return jnp.mean(h**2)


def normal(*shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


W = {"a": normal(8, 3, 3, 3, seed=0), "b": normal(8, 2, 3, 3, seed=1)}
X = normal(8, 3, 16, 16, seed=2)
FAST = re.compile(r"dim_labels=b(\d*)f_\1io->b\1f")


def convolutions_of(text):
    return re.findall(r"dim_labels=\S+", text)


@pytest.mark.optimized
@pytest.mark.parametrize("n", [2, 4])
def test_on_cpu_every_convolution_in_the_loop_has_the_fast_layout(n, monkeypatch):
    step = lambda: (
        jax.jit(ja.value_and_grad(network, num_microbatches=n, audit=None)).lower(W, X).compile()
    )
    found = convolutions_of(step().as_text())
    assert len(found) >= 4
    assert all(map(FAST.match, found))
    assert "conditional" not in step().as_text()
    monkeypatch.setattr("jaxaccum._loop.loop.has_convolutions", lambda jaxpr: False)
    assert not all(
        map(FAST.match, convolutions_of(step().as_text()))
    )  # what XLA makes of them by itself


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_on_other_devices_the_program_is_what_it_was(platform, monkeypatch):
    """The same convolutions and transposes are handed to XLA."""

    def operations():
        step = jax.jit(ja.value_and_grad(network, num_microbatches=4, audit=None))
        text = step.trace(W, X).lower(lowering_platforms=(platform,)).as_text()
        names = r"stablehlo\.(?:convolution|transpose|case)"
        return sorted(re.findall(names + r"[^\n]*?(?:dim_numbers = \S+|dims = \S+|$)", text))

    ours = operations()
    monkeypatch.setattr("jaxaccum._loop.loop.has_convolutions", lambda jaxpr: False)
    assert len(ours) >= 4
    shape = lambda found: [re.sub(r"%\S+", "", line) for line in found]
    assert sorted(shape(ours)) == sorted(shape(operations()))


def test_what_has_no_fast_kernel_stays_as_it_is():
    has = lambda fun, *args: convolutions.has_convolutions(jax.make_jaxpr(fun)(*args).jaxpr)
    assert has(network, W, X)
    assert has(lambda w, x: lax.map(lambda x: network(w, x[None]), x), W, X)  # at any depth
    assert not has(network, *jax.tree.map(lambda x: x.astype(jnp.float64), (W, X)))
    assert not has(lambda w, x: jnp.mean(x @ w), jnp.ones((3, 2)), jnp.ones((4, 3)))


def test_jax_differentiates_the_loop_with_its_convolutions():
    """Reverse over reverse, and forward over reverse, of a convolution that is a choice by
    platform."""
    step = ja.grad(network, num_microbatches=4, audit=None)
    square = lambda grad: lambda w: sum(jnp.sum(g**2) for g in jax.tree.leaves(grad(w, X)))
    plain = square(jax.grad(network))
    assert normwise(jax.jit(jax.grad(square(step)))(W), jax.grad(plain)(W)) < ROUNDING
    tangent = lambda f: jax.jvp(f, (W,), (jax.tree.map(jnp.ones_like, W),))[1]
    assert normwise(tangent(square(step)), tangent(plain)) < ROUNDING


def test_one_model_for_each_of_several_seeds():
    """Under `vmap`: the batch of models becomes groups, which JAX writes its own way."""
    models = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), W)
    ours = jax.vmap(ja.value_and_grad(network, num_microbatches=4, audit=None), (0, None))
    assert (
        normwise(
            jax.jit(ours)(models, X), jax.vmap(jax.value_and_grad(network), (0, None))(models, X)
        )
        < ROUNDING
    )
