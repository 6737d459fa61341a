"""Random programs for the audit: steps that keep a batch's shape (n, 3), and steps that mix rows.

Each step is a function of the rows `h` and of a context `c`; `c.n` is the size of the batch that it
sees. Programs are sentences of these words, so that every rule of the audit's table meets every
other.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from tests.audit import devices
from tests.audit.ends import ENDS
from tests.audit.steps import MIXING, STEPS, Context, inside, put_all, put_in

# -- control flow ----------------------------------------------------------------------------------


@put_in(STEPS)
@jax.jit
def _jitted(h, c):
    return jnp.tanh(h @ c.m) + c.x


@put_in(STEPS)
def checkpointed(h, c):
    return jax.checkpoint(lambda h, m: jnp.sin(h @ m))(h, c.m)


@jax.jit
def _over_time(h, w):
    def step(state, column):
        state = jnp.tanh(state * w[0] + column)
        return state, state * column

    last, outs = lax.scan(step, jnp.zeros(h.shape[0]), h.T)
    return outs.T + last[:, None]


@jax.jit
def _loop_over_time(h, w):
    return lax.fori_loop(0, 3, lambda i, s: jnp.tanh(s + w[i]) + 0.1 * h, h)


@jax.jit
def _until(h):
    return jax.vmap(
        lambda row: lax.while_loop(lambda r: jnp.sum(r) < 2.0, lambda r: jnp.abs(r) + 0.7, row)
    )(h)


@jax.jit
def _steps_until(h):
    one = lambda row: lax.while_loop(
        lambda s: s[0] < 3.0, lambda s: (s[0] + 0.5 + row[0] ** 2, s[1] + 1), (0.0, 0)
    )[1]
    return jax.vmap(one)(h)


@jax.jit
def _mapped(h, w):
    return lax.map(lambda row: jnp.tanh(row * w) + row.sum(), h)


@jax.jit
def _refined(h, w):
    """A loop inside each step of a loop over the examples, whose state is one example's."""
    step = lambda row, state: (jnp.tanh(state * w + row), state)
    return lax.map(lambda row: sum(lax.scan(lambda s, _: step(row, s), w, None, 2)[1]), h)


@jax.jit
def _filled(h, w):
    """A table that is filled for each example."""
    fill = lambda row: lambda i, out: out.at[i].set(jnp.sin(row[i] * w[0]))
    return lax.map(lambda row: lax.fori_loop(0, 3, fill(row), jnp.zeros(3)), h)


@jax.jit
def _written(h, w):
    body = lambda i, out: out.at[i].set(jnp.tanh(h[i] * w))
    return lax.fori_loop(0, h.shape[0], body, jnp.zeros_like(h))


@jax.jit
def _branched(h, w):
    by_params = lax.cond(w[0] > 0, jnp.sin, lambda h: 0.5 * h, h)
    return jax.vmap(lambda row: lax.cond(row[0] > 0, jnp.tanh, lambda r: 2.0 * r, row))(by_params)


put_all(
    STEPS,
    over_time=lambda h, c: _over_time(h, c.w),
    loop_over_time=lambda h, c: _loop_over_time(h, c.w),
    until=lambda h, c: lax.stop_gradient(_until(h)) * h,
    mapped=lambda h, c: _mapped(h, c.w),
    refined=lambda h, c: _refined(h, c.w),
    filled=lambda h, c: _filled(h, c.w),
    written=lambda h, c: _written(h, c.w),
    branched=lambda h, c: _branched(h, c.w),
    counted_until=lambda h, c: h * (0.1 * _steps_until(lax.stop_gradient(h)))[:, None],
    batched_alone=lambda h, c: h * jax.custom_batching.sequential_vmap(jnp.sin)(c.x),
)

# -- derivatives of one's own ----------------------------------------------------------------------


def _with_backward(backward):
    function = jax.custom_vjp(lambda h, w: jnp.sin(h) * w[None])
    function.defvjp(lambda h, w: (jnp.sin(h) * w[None], (h, w)), backward)
    return lambda h, c: function(h, c.w)


def _true(res, g):
    h, w = res
    return g * jnp.cos(h) * w[None], jnp.sum(g * jnp.sin(h), 0)


def _clipped(res, g):
    each = jnp.minimum(
        1.0, 0.3 / (1e-9 + jnp.sqrt(jnp.sum(g**2, 1, keepdims=True) * g.shape[0] ** 0))
    )
    return g * jnp.cos(res[0]) * lax.stop_gradient(res[1])[None] + 0.0 * each, jnp.zeros_like(
        res[1]
    )


@jax.custom_jvp
def _own_tangent(h):
    return jnp.tanh(h)


_own_tangent.defjvp(lambda p, t: (jnp.tanh(p[0]), 0.9 * t[0]))


@jax.custom_jvp
def _mixed_tangent(h):
    return jnp.tanh(h)


_mixed_tangent.defjvp(lambda p, t: (jnp.tanh(p[0]), t[0] - t[0].mean(0, keepdims=True)))

put_all(
    STEPS,
    own_backward=_with_backward(_true),
    own_partial_backward=_with_backward(_clipped),
    own_tangent=lambda h, c: _own_tangent(h),
)

# -- random numbers --------------------------------------------------------------------------------

put_all(
    STEPS,
    dropped_by_example=lambda h, c: (
        jnp.where(jax.vmap(lambda k: jax.random.bernoulli(k, 0.5, (3,)))(c.keys), h, 0.0)
    ),
    noisy_weights=lambda h, c: h @ (c.m + 0.1 * jax.random.normal(jax.random.key(3), (3, 3))),
    gamma_by_example=lambda h, c: (
        h * jax.vmap(lambda k: jax.random.gamma(k, 2.0))(c.keys)[:, None] / 2.0
    ),
    raw_keys=lambda h, c: h * jax.vmap(_of_raw_key)(jax.random.key_data(c.keys))[:, None],
    noise_by_example=lambda h, c: (
        h + jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, 1), (3,)))(c.keys)
    ),
)  # fmt: skip


def _bits(shape):
    return lax.rng_bit_generator(jnp.arange(4, dtype=jnp.uint32), shape, jnp.uint32)[1]


def _of_raw_key(data):
    return jax.random.uniform(jax.random.clone(jax.random.wrap_key_data(data)))


# -- examples meet ---------------------------------------------------------------------------------

put_all(
    MIXING,
    centered_over_batch=lambda h, c: h - h.mean(0, keepdims=True),
    normalized_over_batch=lambda h, c: h / jnp.sqrt(1.0 + jnp.mean(h**2)),
    largest_of_batch=lambda h, c: h / (1.0 + jnp.max(jnp.abs(h))),
    softmax_over_batch=lambda h, c: jax.nn.softmax(h, axis=0),
    reversed=lambda h, c: h + h[::-1] * c.x,
    rolled=lambda h, c: h * jnp.roll(c.x, 1, axis=0),
    first=lambda h, c: h + h[:1],
    running_over_batch=lambda h, c: jnp.cumsum(h, axis=0),
    sorted_over_batch=lambda h, c: jnp.sort(h, axis=0) * c.x,
    every_other=lambda h, c: (h @ h.T) @ h / 3.0,
    differences=lambda h, c: jnp.abs(h[:, None] - h[None]).sum(1),
    places=lambda h, c: h * jnp.arange(1.0, c.n + 1.0)[:, None],
    places_by_running=lambda h, c: h * jnp.cumsum(jnp.ones(c.n))[:, None],
    table_of_places=lambda h, c: h + jnp.tanh(jnp.linspace(0.0, 1.0, 8)[: c.n])[:, None],
    scaled_by_size=lambda h, c: h / c.n,
    size_inside=lambda h, c: jnp.tanh(h / c.n),
    size_in_loop=lambda h, c: h * lax.fori_loop(0, c.n, lambda i, s: s + 0.1 * s, 1.0),
    weighted=lambda h, c: h * c.mask[:, None] / c.mask.sum(),
    weighted_guarded=lambda h, c: h * (c.mask / jnp.maximum(c.mask.sum(), 1.0))[:, None],
    chosen_by_size=lambda h, c: jnp.where(c.mask.sum() > 3.0, h, 0.5 * h),
    chosen_scale=lambda h, c: h * jnp.where(c.mask > 0, 1.0 / c.n, 0.0)[:, None],
    groups=lambda h, c: (
        h - h.reshape(2, -1, 3).mean(1, keepdims=True).repeat(c.n // 2, 1).reshape(c.n, 3)
    ),
    histogram=lambda h, c: h * jnp.zeros(3).at[c.y].add(h[:, 0])[None],
    counted=lambda h, c: h * jnp.bincount(c.y, length=3)[None],
    shared_generator=lambda h, c: h * (_bits(h.shape) % 7).astype(h.dtype),
    shared_key=lambda h, c: h * jax.random.bernoulli(jax.random.key(0), 0.5, h.shape),
    split_keys=lambda h, c: (
        h + jax.vmap(jax.random.uniform)(jax.random.split(jax.random.key(1), c.n))[:, None]
    ),
    permuted=lambda h, c: h * c.x[jax.random.permutation(jax.random.key(2), c.n)],
    mixing_backward=_with_backward(
        lambda res, g: (g - g.mean(0, keepdims=True), jnp.sum(g * jnp.sin(res[0]), 0)),
    ),
    scaling_backward=_with_backward(
        lambda res, g: (g * jnp.cos(res[0]), jnp.mean(g * jnp.sin(res[0]), 0)),
    ),
    norm_backward=_with_backward(lambda res, g: (g, jnp.tanh(jnp.sum(g * jnp.sin(res[0]), 0)))),
    mixing_tangent=lambda h, c: _mixed_tangent(h),
    convolved_over_batch=lambda h, c: (
        lax.conv_general_dilated(h.T[:, None], jnp.ones((1, 1, 3)), (1,), "SAME")[:, 0].T
    ),
    pooled_over_batch=lambda h, c: lax.reduce_window(h, 0.0, lax.add, (2, 1), (1, 1), "SAME"),
    fourier_over_batch=lambda h, c: h * jnp.abs(jnp.fft.fft(h, axis=0)),
    branch_of_batch=lambda h, c: lax.cond(h.sum() > 0, lambda h: h, lambda h: 0.5 * h, h),
    transposed_rows=lambda h, c: h.T.reshape(c.n, 3) + h,
    averaged_moving=lambda h, c: h + _moving(h)[None],
    statistic_of_data=lambda h, c: h - c.x.std(),
    products_over_batch=lambda h, c: jnp.cumprod(inside(h), axis=0),
    smallest_of_batch=lambda h, c: h * (1.0 + jnp.argmin(c.x, 0))[None],
    table_of_extremes=lambda h, c: h * jnp.ones(3).at[c.y].min(h[:, 0])[None],
    gram_of_batch=lambda h, c: h @ jnp.linalg.inv(jnp.eye(3) + h.T @ h),
    pairs_in_loops=lambda h, c: (
        lax.map(lambda r: lax.scan(lambda s, q: (s + jnp.abs(r - q), None), 0.0 * r, h)[0], h)
    ),
    refined_in_turn=lambda h, c: (
        lax.scan(lambda s, row: (_twice(s, row, c.w),) * 2, c.w, h)[1]
    ),
    from_behind=lambda h, c: lax.scan(lambda i, row: (i + 1, row * h[i]), 0, h, reverse=True)[1],
    running_copies=lambda h, c: jnp.cumsum(_copies(h, c), 1).mean(1),
    product_of_copies=lambda h, c: jnp.prod(_copies(inside(h), c), 1),
    written_copies=lambda h, c: _copies(h, c).at[:, 0].set(0.0).mean(1),
    windows_of_batch=lambda h, c: (
        jax.vmap(lambda i: lax.dynamic_slice(h, (i, 0), (2, 3)).sum(0))(jnp.arange(c.n))
    ),
    state_for_each=lambda h, c: lax.fori_loop(0, c.n, lambda i, s: jnp.sin(s), h),
    half_the_steps=lambda h, c: (
        h * lax.fori_loop(0, c.n // 2, lambda i, s: s + jnp.sin(1.0 * i), 0.0) / c.n
    ),
    whole_quotient=lambda h, c: h * lax.div(7, jnp.full((), c.n)),
    total_of_weights=lambda h, c: h * jnp.sum(c.w) / jnp.sum(h**2),
)  # fmt: skip


def _copies(h, c):
    return jnp.broadcast_to(h[:, None], (c.n, c.n, 3))


def _twice(state, row, w):
    """Two steps of one example from the state that the last one left."""
    return lax.fori_loop(0, 2, lambda _, s: jnp.tanh(s * w + row), state)


@jax.jit
def _moving(h):
    return lax.scan(lambda s, row: (0.9 * s + row, None), jnp.zeros(3), h)[0]


STEPS.update(devices.APART)
MIXING.update(devices.MIXING)
_WORDS = STEPS | MIXING | devices.DECLARED


def program(steps, end):
    """The loss that applies the steps in turn, and then the end."""

    def loss(params, batch):
        c = Context(params, batch)
        h = c.x @ c.m
        for name in steps:
            h = _WORDS[name](h, c)
        return ENDS[end](h, c)

    return loss
