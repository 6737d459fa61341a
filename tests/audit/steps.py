"""Words of random programs that keep examples apart: by entry, along the features, by indices."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.scipy import special

STEPS: dict[str, Any] = {}
MIXING: dict[str, Any] = {}


@dataclasses.dataclass(frozen=True)
class Context:
    """The parameters and the batch of one call."""

    params: Any
    batch: Any

    @property
    def n(self):
        return self.batch["x"].shape[0]

    def __getattr__(self, name):
        return self.params[name] if name in ("w", "m") else self.batch[name]


jax.tree_util.register_dataclass(Context, ["params", "batch"], [])


def put_in(table):
    return lambda function: table.setdefault(function.__name__.strip("_"), function)


def put_all(table, **functions):
    table.update(functions)


def both(a, b, weight):
    """Two views of the batch, one after the other."""
    return jnp.concatenate([a, b]) * weight


def inside(h):
    """Between -1 and 1, where inverse functions are defined."""
    return 0.9 * jnp.tanh(h)


def any_low(h):
    return jnp.any((h != 0.0) & (h < -1.0), 1, keepdims=True)


# -- entry by entry --------------------------------------------------------------------------------

put_all(
    STEPS,
    tanh=lambda h, c: jnp.tanh(h),
    sine=lambda h, c: jnp.sin(h) + 0.5 * jnp.cos(2.0 * h),
    bump=lambda h, c: jnp.exp(-jnp.square(h)),
    root=lambda h, c: jnp.sqrt(1.0 + h**2) + lax.rsqrt(2.0 + jnp.abs(h)),
    relu=lambda h, c: jax.nn.relu(h) + 0.1 * jax.nn.gelu(h),
    softplus=lambda h, c: jnp.log1p(jnp.exp(-jnp.abs(h))) + jax.nn.sigmoid(h),
    power=lambda h, c: (1.0 + jnp.abs(h)) ** 1.5 / 4.0 + h**3 / 9.0,
    clip=lambda h, c: jnp.clip(h, -0.7, 0.9) + jnp.minimum(h, 1.0),
    arctan=lambda h, c: jnp.arctan2(h, 1.5) + lax.erf(h),
    minus=lambda h, c: -h - 0.3,
    scaled=lambda h, c: h * c.w[None] + c.w[None],
    divided=lambda h, c: h / (1.0 + c.w[None] ** 2) + 1.0 / (2.0 + h**2),
    other=lambda h, c: h * c.x + 0.5 * (h - c.x),
    quotient=lambda h, c: h / (1.5 + c.x**2),
    chosen=lambda h, c: jnp.where(c.mask[:, None] > 0, h, 0.2 * c.x),
    chosen_by_itself=lambda h, c: jnp.where(h > 0, h, 0.2),
    stopped=lambda h, c: h * lax.stop_gradient(jnp.tanh(h)) + c.w[None] * lax.stop_gradient(h),
    narrowed=lambda h, c: (
        h + 0.1 * h.astype(jnp.int32).astype(h.dtype) + jnp.sign(h) * jnp.floor(h)
    ),
    complexed=lambda h, c: jnp.real(lax.complex(h, h**2) * lax.complex(c.x, h)),
    ones=lambda h, c: h + jnp.ones((c.n, 1)) * jnp.zeros((c.n, 3)) + jnp.full_like(h, 0.3),
)

put_all(
    STEPS,
    arcs=lambda h, c: (
        jnp.arcsin(inside(h)) + jnp.arccos(inside(h)) + jnp.arctan(h) + jnp.arctanh(inside(h))
    ),
    hyperbolic=lambda h, c: (
        jnp.sinh(inside(h)) + jnp.cosh(inside(h)) + jnp.arcsinh(h) + jnp.arccosh(1.1 + h**2)
    ),
    tangent=lambda h, c: (
        jnp.tan(inside(h)) + jnp.exp2(-jnp.abs(h)) + jnp.expm1(-jnp.abs(h)) + jnp.cbrt(2.0 + h**2)
    ),
    rounded=lambda h, c: (
        h + 0.1 * (lax.round(h) + jnp.ceil(h) + lax.rem(h, 0.7)) + lax.clamp(-0.5, h, 0.5)
    ),
    gammas=lambda h, c: (
        special.gammaln(1.0 + h**2) + special.digamma(1.0 + h**2)
        + special.polygamma(1, 1.0 + c.x**2)
    ),
    incomplete=lambda h, c: (
        h * special.gammainc(2.0, 0.1 + c.x**2) + special.gammaincc(2.0, 0.1 + c.x**2)
    ),
    incomplete_in_both=lambda h, c: h + 0.1 * lax.igamma(1.5 + jnp.tanh(c.x), 0.5 + c.x**2),
    beta=lambda h, c: (
        h + special.betainc(2.0, 3.0, 0.5 + inside(c.x) / 3.0)
        + h * special.zeta(2.0 + c.x**2, 1.0)
    ),
    bessel=lambda h, c: special.i0e(h) + special.i1e(h) + special.erfinv(inside(h)) + lax.erfc(h),
    bits=lambda h, c: (
        h * (0.2 * lax.population_count((c.y << 2 | 1) ^ 3)[:, None]) + 0.1 * lax.clz(c.y)[:, None]
    ),
    shifted=lambda h, c: (
        h + 0.1 * ((c.y + 8) >> 1)[:, None] + 0.2 * (~c.y & 3)[:, None] * (c.y % 2)[:, None]
    ),
    gathered_bits=lambda h, c: (
        h * (1.0 + jnp.bitwise_xor.reduce(c.y[:, None] + jnp.arange(3)[None], axis=1))[:, None]
    ),
    narrowed_floats=lambda h, c: lax.optimization_barrier(lax.reduce_precision(h, 11, 50)),
    conjugated=lambda h, c: jnp.imag(jnp.conj(lax.complex(h, c.x)) * lax.complex(c.x, 0.5 * h)),
    updated_factor=lambda h, c: (
        h @ lax.linalg.cholesky_update(2.0 * jnp.eye(3), lax.stop_gradient(c.w))
    ),
    named=lambda h, c: checkpoint_name(h, "h") + jnp.copy(h),
    chosen_by_all=lambda h, c: (
        jnp.where(jnp.all(h > -0.5, 1, keepdims=True) & (h <= 2.0) | any_low(h), h, 0.4 * h)
    ),
    next_float=lambda h, c: h + lax.stop_gradient(lax.nextafter(lax.stop_gradient(h), c.x)),
)  # fmt: skip


# -- along the features ----------------------------------------------------------------------------

put_all(
    STEPS,
    product=lambda h, c: h @ c.m,
    centered=lambda h, c: (h - h.mean(1, keepdims=True)) / jnp.sqrt(1.0 + h.var(1, keepdims=True)),
    softmax=lambda h, c: jax.nn.softmax(h, axis=1) + jax.nn.logsumexp(h, axis=1, keepdims=True),
    largest=lambda h, c: (
        h - h.max(1, keepdims=True) + h.min(1, keepdims=True) * h.prod(1, keepdims=True) / 9.0
    ),
    sorted=lambda h, c: jnp.sort(h, axis=1),
    running=lambda h, c: jnp.cumsum(h, axis=1) / 2.0 + lax.cummax(h, axis=1),
    top=lambda h, c: h + lax.top_k(h, 2)[0].sum(1, keepdims=True),
    onehot=lambda h, c: h * jax.nn.one_hot(jnp.argmax(h, 1), 3) + h,
    turned=lambda h, c: jnp.tanh(h.T).T[:, ::-1] + jnp.roll(h, 1, axis=1),
    padded=lambda h, c: (
        jnp.pad(h, ((0, 0), (1, 2)))[:, 1:4] + jnp.concatenate([h[:, 1:], h[:, :1]], 1)
    ),
    stacked=lambda h, c: jnp.stack([h, c.x, h * c.x], 1).sum(1) / 2.0,
    split=lambda h, c: jnp.concatenate(jnp.split(h, 3, axis=1)[::-1], 1),
    flat=lambda h, c: jnp.tanh(h.reshape(-1)).reshape(c.n, 3),
    flat_turned=lambda h, c: jnp.tanh(h.T.reshape(-1)).reshape(3, c.n).T,
    outer=lambda h, c: jnp.einsum("bi,bj,j->bi", h, c.x, c.w),
    gram=lambda h, c: (h[:, :, None] * c.x[:, None, :]).reshape(c.n, 9).reshape(c.n, 3, 3).sum(2),
    two_views=lambda h, c: jnp.tanh(jnp.concatenate([h, c.x], 0) @ c.m)[: c.n] * 0.5,
    tiled=lambda h, c: (
        jnp.tile(h, (2, 1))[c.n :] + jnp.repeat(h, 2, axis=0).reshape(c.n, 2, 3).sum(1) / 3.0
    ),
    ghosts=lambda h, c: jnp.tanh(h.reshape(-1, 1, 3)).reshape(c.n, 3),
    real_or_fake=lambda h, c: (
        both(h, c.x, both(jnp.ones((c.n, 1)), jnp.zeros((c.n, 1)), 1.0))[: c.n]
    ),
    fourier=lambda h, c: jnp.abs(jnp.fft.rfft(h, axis=1)).sum(1, keepdims=True) * h / 4.0,
    pooled=lambda h, c: h + lax.reduce_window(h, -jnp.inf, lax.max, (1, 2), (1, 1), "SAME"),
    averaged=lambda h, c: lax.reduce_window(h, 0.0, lax.add, (1, 3), (1, 1), "SAME") / 3.0,
    pooled_low=lambda h, c: h + lax.reduce_window(h, jnp.inf, lax.min, (1, 2), (1, 1), "SAME"),
    windowed=lambda h, c: (
        h + lax.reduce_window(c.x, 1.0, lambda a, b: a * b + 0.0, (1, 2), (1, 1), "SAME")
    ),
    searched=lambda h, c: h * (1.0 + jnp.searchsorted(jnp.asarray([-1.0, 0.0, 1.0]), c.x)) / 3.0,
    nearly_top=lambda h, c: jax.device_put(h) + lax.approx_max_k(c.x, 2)[0].sum(1, keepdims=True),
    reduced=lambda h, c: h + lax.reduce(jnp.tanh(h), 1.0, lambda a, b: a * b + 0.0, (1,))[:, None],
    running_products=lambda h, c: (
        jnp.cumprod(inside(h), axis=1) + lax.cummin(h, axis=1) + lax.cumlogsumexp(h, axis=1)
    ),
    smallest=lambda h, c: h * (1.0 + jnp.argmin(h, 1))[:, None] / 2.0,
    apart=lambda h, c: jnp.stack(jnp.unstack(h, axis=1)[::-1], 1),
    expanded=lambda h, c: jnp.squeeze(lax.expand_dims(h, (1,)) * c.m[None, :1], 1),
    slope_of_pool=lambda h, c: h * jax.grad(lambda x: jnp.sum(_pooled(x)))(c.x) + 0.5 * h,
    slope=lambda h, c: h + jax.vmap(jax.grad(lambda r: jnp.sum(jnp.tanh(r) ** 2)))(h),
)  # fmt: skip


@put_in(STEPS)
def convolved(h, c):
    kernel = c.m[:, :2].reshape(2, 1, 3)
    return lax.conv_general_dilated(h[:, None, :], kernel, (1,), "SAME").sum(1)


@put_in(STEPS)
def convolved_by_vmap(h, c):
    one = lambda row: lax.conv_general_dilated(
        row[None, None, :], c.m[:1].reshape(1, 1, 3), (1,), "SAME"
    )[0, 0]
    return jax.vmap(one)(h)


@put_in(STEPS)
def solved(h, c):
    matrices = jnp.einsum("bi,bj->bij", h, h) + 2.0 * jnp.eye(3)[None]
    return jnp.linalg.solve(matrices, (c.x * c.w[None])[..., None])[..., 0]


@put_in(STEPS)
def decomposed(h, c):
    matrices = _matrices(h)
    q, r = jnp.linalg.qr(matrices)
    return h + 0.1 * (r @ q).sum(2) + 0.1 * jnp.linalg.svd(matrices, compute_uv=False)


@put_in(STEPS)
def decomposed_as_constants(h, c):
    """Decompositions without a derivative."""
    matrices = lax.stop_gradient(_matrices(h))
    triangle, _ = lax.linalg.schur(matrices)
    reflectors, lengths = lax.linalg.hessenberg(matrices)
    main, beside = lax.linalg.tridiagonal(matrices)[1:3]
    values = jnp.sort(jnp.real(jnp.linalg.eigvals(matrices)), axis=-1)
    order = lax.linalg.lu_pivots_to_permutation(lax.linalg.lu(matrices)[1], 3)
    turned = lax.linalg.householder_product(reflectors[:, :, :2], lengths)
    weights = triangle[..., 0] + turned[..., 0] + main + beside[:, :1] + values + order
    return h * (1.0 + jnp.tanh(weights))


@put_in(STEPS)
def measured(h, c):
    matrices = _matrices(h)
    return h * jnp.log(jnp.linalg.det(matrices))[:, None] / 3.0 + 0.1 * jnp.linalg.eigvalsh(
        matrices
    )


@put_in(STEPS)
def inverted(h, c):
    diagonals = jnp.ones_like(h), 3.0 + h**2, jnp.ones_like(h)
    return (
        jnp.linalg.inv(_matrices(h)).sum(2)
        + lax.linalg.tridiagonal_solve(*diagonals, c.x[..., None])[..., 0]
    )


def _matrices(h):
    """One matrix per example, whose eigenvalues are apart."""
    h = jnp.tanh(h)
    return jnp.einsum("bi,bj->bij", h, h) / 3.0 + jnp.diag(jnp.asarray([1.0, 3.0, 6.0]))[None]


def _pooled(x):
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2), (1, 1), "VALID")


@put_in(STEPS)
def factored(h, c):
    matrices = jnp.einsum("bi,bj->bij", h, h) + 2.0 * jnp.eye(3)[None]
    return jnp.linalg.cholesky(matrices).sum(2) - 1.0


# -- indices ---------------------------------------------------------------------------------------

put_all(
    STEPS,
    embedded=lambda h, c: h + c.m[c.y],
    picked=lambda h, c: h * jnp.take_along_axis(h, c.y[:, None], 1),
    picked_by_place=lambda h, c: h + h[jnp.arange(c.n), c.y][:, None],
    columns=lambda h, c: h[:, jnp.asarray([2, 0, 1])] + h[:, 1][:, None],
    put=lambda h, c: h.at[jnp.arange(c.n), c.y].set(0.5 * c.w[0]),
    added=lambda h, c: jnp.zeros_like(h).at[jnp.arange(c.n), c.y].add(h[:, 0]) + h,
    put_column=lambda h, c: h.at[:, 1].set(c.x[:, 0]).at[:, 0].multiply(2.0),
    spread=lambda h, c: h + jnp.zeros((c.n, 3)).at[:, jnp.asarray([0, 2])].add(h[:, :2]),
    sliced=lambda h, c: h + lax.dynamic_slice(h, (0, jnp.argmax(c.w)), (c.n, 1)),
    updated=lambda h, c: lax.dynamic_update_slice(h, c.x[:, :1], (0, 1)),
    extremes_put=lambda h, c: (
        h.at[:, 0].min(0.3).at[:, 1].max(-0.2) - jnp.zeros_like(h).at[:, 2].subtract(h[:, 0])
    ),
    extremes_put_by_vmap=lambda h, c: jax.vmap(lambda row, y: row.at[y].min(0.1))(h, c.y),
    scattered_by_vmap=lambda h, c: jax.vmap(lambda row, y: row.at[y].add(c.w[0]))(h, c.y),
)
