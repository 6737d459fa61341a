"""Losses that keep the examples apart, of one family of primitives each."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import io_callback
from jax.scipy import special

from tests.support.helpers import data

NETWORKS = """
relu relu6 sigmoid softplus silu gelu elu selu celu leaky_relu hard_tanh hard_sigmoid hard_swish
mish squareplus log_sigmoid soft_sign standardize softmax log_softmax
"""
W = data(3) / 2 + 0.8
SHARED = 4.0 * jnp.eye(3) + jnp.tri(3, dtype=float)


def matrices(h):
    """One well-conditioned matrix an example."""
    return h[:, :, None] * h[:, None, :] + 2.0 * jnp.eye(3)[None]


def gram(h):
    return jnp.einsum("bi,bj->ij", h, h) + jnp.eye(3)


def wide(h):
    """Rows repeated along a second axis of the batch's size."""
    return jnp.broadcast_to(h[:, None], (len(h), *h.shape))


def columns(h):
    """A square matrix with a column for each example."""
    return jnp.broadcast_to(h[None, :, 0], (len(h), len(h)))


def positive(h):
    return 0.5 + jnp.abs(h)


def inside(h):
    return 0.9 * jnp.tanh(h)


@jax.custom_gradient
def centred_gradient(h):
    return jnp.sin(h), lambda g: g - g.mean(0, keepdims=True)


def of_jax(rule, *, given_by="defvjp"):
    """A function of JAX's own with a derivative rule of the user's."""
    function = jax.custom_vjp(jnp.tanh) if given_by == "defvjp" else jax.custom_jvp(jnp.tanh)
    getattr(function, given_by)(*rule)
    return function


def unsolved(h, x):
    """The identity, with the gradient of a system in which examples meet."""
    return lax.custom_linear_solve(
        lambda y: y - (y * h).mean(0), x, lambda _, y: 1.0 * y, symmetric=True
    )


def through_a_reference(h):
    ref = jax.new_ref(jnp.zeros(()))
    ref[...] = jnp.max(h)
    return h * ref[...]


def key_of_the_size(h):
    with jax.ensure_compile_time_eval():
        key = jax.random.key(len(h))
    return h * jax.random.normal(key, (3,))[None]


def summed_by_steps(h, step, length=None):
    """The sum of ``step(i)`` over the steps of a loop."""
    return lax.fori_loop(0, length or len(h), lambda i, s: s + step(i), 0.0)


def backwards(h):
    """A loop that reads one example by its counter, and another from behind."""
    step = lambda c, row: ((c[0] + 1, c[1] + jnp.sum(row * h[c[0]])), None)
    return lax.scan(step, (0, 0.0), h, reverse=True)[0][1] / len(h)


def each_with_each(h, last):
    over = lambda r: lax.scan(lambda t, q: (t + jnp.sum(jnp.abs(r - q)), None), 0.0, h)[0]
    return lax.scan(lambda s, r: (s + over(r), None), 0.0, h)[0] / last(h)


def places_as_keys(h):
    own = lax.axis_index("microbatch") * len(h) + jnp.arange(len(h), dtype=jnp.int32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), own)
    return h * jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)


APART = {
    # -- functions of each entry
    "lgamma": lambda h, b: special.gammaln(positive(h)),
    "digamma": lambda h, b: special.digamma(positive(h)),
    "erf": lambda h, b: special.erf(h) + special.erfc(h),
    "erf_inv": lambda h, b: special.erfinv(inside(h)),
    "bessel": lambda h, b: special.i0e(h) + special.i1(h),
    "betainc": lambda h, b: special.betainc(2.0, 3.0, positive(inside(h)) / 2),
    "igamma": lambda h, b: special.gammainc(2.0, positive(h)) + special.gammaincc(2.0, positive(h)),
    "zeta": lambda h, b: lax.stop_gradient(special.zeta(2.0 + positive(h), 1.0)) * h,
    "polygamma": lambda h, b: special.polygamma(1, positive(h)),
    "xlogy": lambda h, b: special.xlogy(positive(h), positive(h)),
    "log_ndtr": lambda h, b: special.log_ndtr(h),
    "expi": lambda h, b: special.expi(positive(h)),
    "sinc": lambda h, b: jnp.sinc(h),
    "population_count": lambda h, b: h * lax.population_count(b["y"])[:, None],
    "bits": lambda h, b: h * ((b["y"] << 2 | 5) ^ 3 & ~b["y"])[:, None],
    "integers": lambda h, b: h * (b["y"] // 2 + b["y"] % 2)[:, None],
    "upper halves of products": lambda h, b: (
        h * lax.mulhi(b["y"] << 40, jnp.full_like(b["y"], 1 << 25))[:, None]
    ),
    "complex": lambda h, b: jnp.abs(jnp.exp(1j * h) + lax.complex(h, b["x"])),
    "real part": lambda h, b: jnp.real((h + 1j * b["x"]) ** 2),
    "hypot": lambda h, b: jnp.hypot(h, 1.0),
    "nan_to_num": lambda h, b: jnp.nan_to_num(h),
    "cbrt": lambda h, b: jnp.cbrt(h),
    "float_power": lambda h, b: jnp.float_power(positive(h), 1.3),
    "logaddexp": lambda h, b: jnp.logaddexp(h, b["x"]),
    "arcs": lambda h, b: (
        jnp.arcsin(inside(h))
        + jnp.arccos(inside(h))
        + jnp.arctan(h)
        + jnp.arcsinh(h)
        + jnp.arctanh(inside(h))
        + jnp.arccosh(1 + positive(h))
    ),
    "angles": lambda h, b: (
        jnp.tan(inside(h)) + jnp.sinh(h) + jnp.cosh(h) + jnp.exp2(h) + jnp.log2(positive(h))
    ),
    "rounding": lambda h, b: h * (jnp.round(h) + jnp.ceil(h) + jnp.floor(h) + jnp.trunc(h)),
    "fmod": lambda h, b: jnp.fmod(h, 0.7) + h % 0.3,
    "nextafter": lambda h, b: h + jnp.nextafter(lax.stop_gradient(h), 1.0),
    "frexp": lambda h, b: h * jnp.ldexp(h, 2),
    "reduce_precision": lambda h, b: lax.reduce_precision(h, 8, 10),
    "barrier": lambda h, b: lax.optimization_barrier(h),
    "stop_gradient": lambda h, b: h * lax.stop_gradient(h),
    "clamp": lambda h, b: lax.clamp(-0.5, h, 0.5),
    # -- neural networks
    **{
        name: lambda h, b, name=name: getattr(jax.nn, name)(h) * b["x"] for name in NETWORKS.split()
    },
    "glu": lambda h, b: jax.nn.glu(jnp.concatenate([h, b["x"]], 1)),
    "one_hot": lambda h, b: h * jax.nn.one_hot(b["y"], 3),
    "attention": lambda h, b: jax.nn.dot_product_attention(
        *[h[:, :, None, None] * b["x"][:, None, None, :]] * 3
    ),
    "causal attention": lambda h, b: jax.nn.dot_product_attention(
        *[h[:, :, None, None] * b["x"][:, None, None, :]] * 3, is_causal=True
    ),
    "convolution": lambda h, b: lax.conv_general_dilated(
        h[:, None], jnp.ones((2, 1, 2)), (1,), "SAME"
    ),
    "max pool": lambda h, b: lax.reduce_window(h, -jnp.inf, lax.max, (1, 2), (1, 1), "VALID"),
    # -- linear algebra of one matrix per example
    "solve": lambda h, b: jnp.linalg.solve(matrices(h), b["x"][..., None]),
    "cholesky": lambda h, b: jnp.linalg.cholesky(matrices(h)),
    "qr": lambda h, b: jnp.linalg.qr(matrices(h))[1],
    "svd": lambda h, b: jnp.linalg.svd(matrices(h), compute_uv=False),
    "det": lambda h, b: jnp.linalg.det(matrices(h)),
    "slogdet": lambda h, b: jnp.linalg.slogdet(matrices(h))[1],
    "inv": lambda h, b: jnp.linalg.inv(matrices(h)),
    "eigh": lambda h, b: jnp.linalg.eigvalsh(matrices(h)),
    "norm": lambda h, b: jnp.linalg.norm(matrices(h), axis=(1, 2)),
    "pinv": lambda h, b: jnp.linalg.pinv(matrices(h)),
    "expm": lambda h, b: jax.vmap(jax.scipy.linalg.expm)(matrices(h) / 9),
    "an axis of one before the examples": lambda h, b: h.T.reshape(3, 1, -1)[:, 0].T,
    "right sides of a shared system": lambda h, b: jnp.linalg.solve(SHARED, h.T),
    "columns of a triangular system": lambda h, b: jax.scipy.linalg.solve_triangular(
        SHARED, h.T, lower=True
    ),
    "rows of a triangular system": lambda h, b: lax.linalg.triangular_solve(SHARED, h),
    "right sides of a tridiagonal system": lambda h, b: lax.linalg.tridiagonal_solve(
        jnp.asarray([0.0, 1, 1]), jnp.full(3, 4.0), jnp.asarray([1.0, 1, 0]), h.T
    ),
    "matrix_power": lambda h, b: jnp.linalg.matrix_power(matrices(h), 3),
    "einsum": lambda h, b: jnp.einsum("bi,bj,bk,jk->bi", h, h, b["x"], jnp.ones((3, 3))),
    "trace": lambda h, b: jnp.trace(matrices(h), axis1=1, axis2=2),
    "fft": lambda h, b: jnp.abs(jnp.fft.fft(h)),
    "irfft": lambda h, b: jnp.fft.irfft(jnp.fft.rfft(h, axis=1), n=3, axis=1),
    "triu": lambda h, b: jnp.triu(matrices(h)),
    "cross": lambda h, b: jnp.cross(h, b["x"]),
    # -- along the features
    "sort": lambda h, b: jnp.sort(h, axis=1),
    "argsort": lambda h, b: h * jnp.argsort(h, axis=1),
    "top_k": lambda h, b: lax.top_k(h, 2)[0],
    "cumsum": lambda h, b: jnp.cumsum(h, 1),
    "cumprod": lambda h, b: jnp.cumprod(h, 1),
    "cummax": lambda h, b: lax.cummax(h, axis=1),
    "cummin": lambda h, b: lax.cummin(h, axis=1, reverse=True),
    "cumlogsumexp": lambda h, b: lax.cumlogsumexp(h, axis=1),
    "argmin": lambda h, b: h * jnp.argmin(h, 1, keepdims=True),
    "median": lambda h, b: jnp.median(h, axis=1),
    "quantile": lambda h, b: jnp.quantile(h, 0.3, axis=1),
    "any": lambda h, b: jnp.where(jnp.any(h > 0.5, axis=1, keepdims=True), h, 0.5 * h),
    "all": lambda h, b: h * jnp.all(h > -0.5, axis=1, keepdims=True),
    "roll": lambda h, b: jnp.roll(h, 1, 1),
    "flip": lambda h, b: jnp.flip(h, 1),
    "rev": lambda h, b: lax.rev(h, (1,)),
    "diff": lambda h, b: jnp.diff(h, axis=1),
    "reduce": lambda h, b: lax.reduce(h, 1.0, lambda a, c: a * c + 0.0, (1,)),
    "pad": lambda h, b: jnp.pad(h, ((0, 0), (1, 1)), mode="reflect"),
    "interp": lambda h, b: jnp.interp(h, jnp.arange(3.0), jnp.ones(3)),
    "searchsorted": lambda h, b: h * jnp.searchsorted(jnp.linspace(-1.0, 1.0, 5), h),
    "associative_scan": lambda h, b: lax.associative_scan(jnp.multiply, h, axis=1),
    "unstack": lambda h, b: sum(jnp.unstack(h, axis=1)),
    "meshgrid": lambda h, b: h * jnp.tri(3)[0],
    "polyval": lambda h, b: jnp.polyval(jnp.ones(3), h),
    # -- indices
    "take": lambda h, b: h + jnp.take(data(3, 3), b["y"], axis=0),
    "take_along_axis": lambda h, b: jnp.take_along_axis(h, b["y"][:, None], 1),
    "scatter": lambda h, b: jax.vmap(lambda r, y: r.at[y].set(0.0))(h, b["y"]),
    "scatter min": lambda h, b: h.at[jnp.arange(len(h)), b["y"]].min(0.3),
    "scatter max": lambda h, b: jax.vmap(lambda r, y: r.at[y].max(0.2))(h, b["y"]),
    "scatter mul": lambda h, b: h.at[:, 1].multiply(3.0),
    "dynamic_slice": lambda h, b: lax.dynamic_slice(h, (0, 1), (len(h), 2)),
    "dynamic_update_slice": lambda h, b: lax.dynamic_update_slice(h, b["x"][:, :2], (0, 1)),
    "slice at data": lambda h, b: jax.vmap(lambda r, y: lax.dynamic_slice(r, (y,), (1,)))(
        h, b["y"]
    ),
    # -- control flow
    "checkpoint": lambda h, b: jax.checkpoint(jnp.sin)(h),
    "cond of each": lambda h, b: jax.vmap(lambda r: lax.cond(r[0] > 0, jnp.sin, jnp.cos, r))(h),
    "switch of each": lambda h, b: jax.vmap(
        lambda r, y: lax.switch(y, [jnp.sin, jnp.cos, jnp.tanh], r)
    )(h, b["y"]),
    "while of each": lambda h, b: (
        h
        * jax.vmap(
            lambda r: lax.while_loop(
                lambda s: s[0] < 5.0, lambda s: (s[0] + positive(r[0]), s[1] + 1), (0.0, 0)
            )[1]
        )(lax.stop_gradient(h))[:, None]
    ),
    "fori_loop": lambda h, b: lax.fori_loop(0, 3, lambda i, s: jnp.sin(s) + i * h, h),
    "scan": lambda h, b: lax.scan(lambda s, c: (s * c, s + c), h[:, 0], h.T)[1].T,
    "scan with a counter": lambda h, b: lax.fori_loop(
        0, len(h), lambda i, out: out.at[i].set(jnp.sin(h[i])), jnp.zeros_like(h)
    ),
    "map": lambda h, b: lax.map(jnp.sin, h),
    "map of batches": lambda h, b: lax.map(jnp.sin, h, batch_size=2),
    "gradient inside": lambda h, b: jax.vmap(jax.grad(lambda r: jnp.sum(jnp.tanh(r) ** 2)))(h),
    "hessian inside": lambda h, b: jax.vmap(jax.hessian(lambda r: jnp.prod(r)))(h),
    "jvp inside": lambda h, b: jax.jvp(jnp.tanh, (h,), (b["x"],))[1],
    "pool's gradient": lambda h, b: (
        jax.grad(
            lambda h: jnp.sum(lax.reduce_window(h, -jnp.inf, lax.max, (1, 2), (1, 1), "VALID"))
        )(lax.stop_gradient(h))
        * h
    ),
    "linearize": lambda h, b: jax.linearize(jnp.tanh, h)[1](b["x"]),
    "custom_vmap": lambda h, b: (
        h * jax.custom_batching.sequential_vmap(jnp.sin)(lax.stop_gradient(h))
    ),
    "custom_linear_solve": lambda h, b: lax.custom_linear_solve(
        lambda x: 2.0 * x, h, lambda _, x: x / 2.0, symmetric=True
    ),
    "debug.print": lambda h, b: [jax.debug.print("{}", jnp.max(h)), h][1],
    "debug.callback": lambda h, b: [jax.debug.callback(lambda x: None, h), h][1],
    "silent io_callback": lambda h, b: [io_callback(lambda x: None, None, lax.stop_gradient(h)), h][
        1
    ],
    # -- random numbers
    "a shared mask": lambda h, b: h * jax.random.bernoulli(jax.random.key(0), 0.5, (3,))[None],
    "shared weights": lambda h, b: h @ jax.random.orthogonal(jax.random.key(0), 3),
    **{
        f"random.{name}": lambda h, b, f=f: h * jax.vmap(lambda key: f(key))(b["keys"])[:, None]
        for name, f in {
            "normal": jax.random.normal,
            "uniform": jax.random.uniform,
            "exponential": jax.random.exponential,
            "gamma": lambda k: jax.random.gamma(k, 2.0),
            "categorical": lambda k: jax.random.categorical(k, jnp.ones(3)),
            "permutation": lambda k: jax.random.permutation(k, 3)[0],
            "randint": lambda k: jax.random.randint(k, (), 0, 9),
            "truncated": lambda k: jax.random.truncated_normal(k, -1.0, 1.0),
            "beta": lambda k: jax.random.beta(k, 2.0, 2.0),
            "poisson": lambda k: jax.random.poisson(k, 2.0),
            "dirichlet": lambda k: jax.random.dirichlet(k, jnp.ones(3))[0],
            "choice": lambda k: jax.random.choice(k, 3),
            "split": lambda k: jax.random.normal(jax.random.split(k)[0]),
        }.items()
    },
}
