"""Losses in which examples meet, one family of primitives each, and the verdict of their mean."""

import jax
import jax.numpy as jnp
from jax import lax

from tests.audit.cases import (
    W,
    backwards,
    centred_gradient,
    columns,
    each_with_each,
    gram,
    key_of_the_size,
    of_jax,
    summed_by_steps,
    through_a_reference,
    unsolved,
    wide,
)

MEETING = {
    # f(h, b): verdict of the mean of it
    "sort over examples": (lambda h, b: jnp.sort(h, axis=0) * b["x"], "COUPLED"),
    "argsort over examples": (lambda h, b: h * jnp.argsort(b["x"], axis=0), "COUPLED"),
    "top_k of examples": (lambda h, b: lax.top_k(h.T, 2)[0], "COUPLED"),
    "cumsum over examples": (lambda h, b: jnp.cumsum(h, axis=0), "COUPLED"),
    "cumprod over examples": (lambda h, b: jnp.cumprod(h, axis=0), "COUPLED"),
    "cummax over examples": (lambda h, b: lax.cummax(h, axis=0), "COUPLED"),
    "cumlogsumexp over examples": (lambda h, b: lax.cumlogsumexp(h, axis=0), "COUPLED"),
    "argmin over examples": (lambda h, b: h * (1.0 + jnp.argmin(b["x"], axis=0))[None], "COUPLED"),
    "argmax over all": (lambda h, b: h * (1.0 + jnp.argmax(b["x"])), "COUPLED"),
    "median": (lambda h, b: h * jnp.median(h), "COUPLED"),
    "quantile": (lambda h, b: h * jnp.quantile(b["x"], 0.4), "COUPLED"),
    "unique": (lambda h, b: h * jnp.unique(b["x"], size=4).sum(), "COUPLED"),
    "bincount": (lambda h, b: h * jnp.bincount(b["y"], length=3)[None], "COUPLED"),
    "roll over examples": (lambda h, b: h * jnp.roll(b["x"], 1, 0), "COUPLED"),
    "flip over examples": (lambda h, b: h * jnp.flip(b["x"], 0), "COUPLED"),
    "rev over examples": (lambda h, b: h * lax.rev(b["x"], (0,)), "COUPLED"),
    "diff over examples": (lambda h, b: jnp.diff(h, axis=0), "COUPLED"),
    "reduce over examples": (
        lambda h, b: lax.reduce(h, 1.0, lambda a, c: a * c + 0.0, (0,)),
        "COUPLED",
    ),
    "prod over examples": (lambda h, b: jnp.prod(h, axis=0), "COUPLED"),
    "any over examples": (lambda h, b: jnp.where(jnp.any(b["mask"] == 0), h, 0.5 * h), "COUPLED"),
    "where of a statistic": (lambda h, b: jnp.where(b["mask"].sum() > 5.0, h, 0.5 * h), "COUPLED"),
    "associative_scan over examples": (
        lambda h, b: lax.associative_scan(jnp.multiply, h),
        "UNKNOWN",
    ),
    "convolution over examples": (
        lambda h, b: lax.conv_general_dilated(h.T[:, None], jnp.ones((1, 1, 3)), (1,), "SAME"),
        "UNKNOWN",
    ),
    "fft over examples": (lambda h, b: jnp.abs(jnp.fft.fft(h, axis=0)), "COUPLED"),
    "softmax over examples": (lambda h, b: jax.nn.softmax(h, axis=0) * b["x"], "COUPLED"),
    "logsumexp of all": (lambda h, b: jax.nn.logsumexp(h), "COUPLED"),
    "standardized": (lambda h, b: jax.nn.standardize(h, axis=0) * b["x"], "COUPLED"),
    "det of a gram matrix": (lambda h, b: jnp.linalg.det(gram(h)), "COUPLED"),
    "solve with a gram matrix": (lambda h, b: jnp.linalg.solve(gram(h), jnp.ones(3)), "COUPLED"),
    "unknowns of one triangular system": (
        lambda h, b: lax.linalg.triangular_solve(
            jnp.tri(len(h), dtype=h.dtype), h * h, left_side=True, lower=True
        ),
        "COUPLED",
    ),
    "unknowns of one triangular system, from the right": (
        lambda h, b: lax.linalg.triangular_solve(
            jnp.tri(len(h), dtype=h.dtype), (h * h).T, lower=True
        ),
        "COUPLED",
    ),
    "a triangular matrix of examples": (
        lambda h, b: lax.linalg.triangular_solve(
            columns(h), columns(h), left_side=True, lower=True, unit_diagonal=True
        ),
        "COUPLED",
    ),
    "a triangular matrix of the batch's size": (
        lambda h, b: lax.linalg.triangular_solve(
            jnp.ones((len(h), len(h)), h.dtype),
            columns(h),
            left_side=True,
            lower=True,
            unit_diagonal=True,
        ),
        "COUPLED",
    ),
    "inv of a gram matrix": (lambda h, b: jnp.linalg.inv(gram(h)), "COUPLED"),
    "cholesky of a gram matrix": (lambda h, b: jnp.linalg.cholesky(gram(h)), "COUPLED"),
    "qr of a gram matrix": (lambda h, b: jnp.linalg.qr(gram(h))[1], "COUPLED"),
    "svd of the batch": (lambda h, b: jnp.linalg.svd(h, compute_uv=False), "COUPLED"),
    "least squares": (lambda h, b: h * jnp.linalg.lstsq(b["x"], b["mask"])[0][None], "COUPLED"),
    "covariance": (lambda h, b: jnp.cov(h.T), "COUPLED"),
    "correlation": (lambda h, b: jnp.corrcoef(h.T), "COUPLED"),
    "einsum of pairs": (lambda h, b: jnp.einsum("bi,ci->bc", h, b["x"]) ** 2, "COUPLED"),
    "segment_sum": (lambda h, b: jax.ops.segment_sum(h, b["y"], 3) ** 2, "COUPLED"),
    "scatter max of a table": (
        lambda h, b: h * jnp.zeros(3).at[b["y"]].max(h[:, 0])[None],
        "UNKNOWN",
    ),
    "scatter min of a table": (
        lambda h, b: h * jnp.zeros(3).at[b["y"]].min(h[:, 0])[None],
        "UNKNOWN",
    ),
    "dynamic_slice of examples": (lambda h, b: lax.dynamic_slice(h, (1, 0), (2, 3)), "COUPLED"),
    "dynamic_update_slice of examples": (
        lambda h, b: lax.dynamic_update_slice(h, jnp.zeros((1, 3)), (0, 0)),
        "UNKNOWN",
    ),
    "a window of examples at each place": (
        lambda h, b: jax.vmap(lambda i: lax.dynamic_slice(h, (i, 0), (2, 3)))(jnp.arange(len(h))),
        "COUPLED",
    ),
    "unstacked examples": (lambda h, b: sum(jnp.unstack(h)), "UNKNOWN"),
    "scan over examples": (
        lambda h, b: lax.scan(lambda s, r: (0.9 * s + r, s * r), jnp.zeros(3), h)[1],
        "COUPLED",
    ),
    "each with each, in loops": (lambda h, b: each_with_each(h, lambda h: len(h) ** 2), "UNKNOWN"),
    "each with each, mapped": (
        lambda h, b: lax.map(lambda r: lax.map(lambda q: jnp.abs(r - q), h), h),
        "UNKNOWN",
    ),
    "each with each, by steps": (
        lambda h, b: (
            summed_by_steps(
                h, lambda i: summed_by_steps(h, lambda j: jnp.sum(jnp.abs(h[i] - h[j])))
            )
            / len(h) ** 2
        ),
        "UNKNOWN",
    ),
    "a loop from behind": (lambda h, b: backwards(h), "COUPLED"),
    "steps over half of the batch": (
        lambda h, b: h * summed_by_steps(h, lambda i: jnp.sin(1.0 * i), len(h) // 2) / len(h),
        "POSITION",
    ),
    "a state for each example's step": (
        lambda h, b: lax.fori_loop(0, len(h), lambda i, s: jnp.sin(s), h),
        "MIS_SCALED",
    ),
    "a total at each example's step": (
        lambda h, b: lax.fori_loop(0, len(h), lambda i, s: 0.9 * s, h.mean(0)),
        "MIS_SCALED",
    ),
    "while of all": (
        lambda h, b: h * lax.while_loop(lambda s: s < jnp.sum(b["x"] ** 2), lambda s: s + 1.0, 0.0),
        "UNKNOWN",
    ),
    "cond of all": (lambda h, b: lax.cond(b["mask"].sum() > 5.0, jnp.sin, jnp.cos, h), "COUPLED"),
    "cond of the size": (lambda h, b: lax.cond(len(h) > 5, jnp.sin, jnp.cos, h), "MIS_SCALED"),
    "switch of all": (
        lambda h, b: lax.switch(jnp.sum(b["y"]) // 4, [jnp.sin, jnp.cos, jnp.tanh], h),
        "COUPLED",
    ),
    "gradient of the batch": (
        lambda h, b: jax.grad(lambda h: jnp.mean(h**2))(h) ** 2,
        "MIS_SCALED",
    ),
    "integer quotient by the size": (
        lambda h, b: h * jnp.sum(lax.div(7 * b["y"], jnp.full_like(b["y"], len(h)))),
        "COUPLED",
    ),
    "integer quotient of the size": (
        lambda h, b: h * lax.div(jnp.asarray(15), jnp.asarray(len(h))),
        "MIS_SCALED",
    ),
    "nearly the size": (lambda h, b: h * len(h) / (len(h) + 1e-6), "MIS_SCALED"),
    # -- along another axis of the batch's size
    "cumsum of copies": (lambda h, b: jnp.cumsum(wide(h), 1), "POSITION"),
    "product of copies": (lambda h, b: jnp.prod(wide(h), 1), "COUPLED"),
    "padded copies": (
        lambda h, b: jnp.pad(wide(h), ((0, 0), (1, 0), (0, 0)))[:, : len(h)],
        "POSITION",
    ),
    "window of copies": (
        lambda h, b: lax.reduce_window(wide(h), 0.0, lax.add, (1, len(h), 1), (1, 1, 1), "VALID"),
        "POSITION",
    ),
    "convolved copies": (
        lambda h, b: lax.conv_general_dilated(
            wide(h[:, :1])[..., 0][:, None], jnp.ones((1, 1, len(h))), (1,), "VALID"
        ),
        "UNKNOWN",
    ),
    "singular values of copies": (
        lambda h, b: jnp.linalg.svd(
            jnp.broadcast_to(h[:, :1, None], (len(h),) * 3), compute_uv=False
        )[:, 0],
        "POSITION",
    ),
    "merged copies": (lambda h, b: wide(h).reshape(len(h), -1)[:, : len(h)], "UNKNOWN"),
    "a written copy": (lambda h, b: wide(h).at[:, 0].set(0.0), "UNKNOWN"),
    "an updated copy": (
        lambda h, b: lax.dynamic_update_slice(wide(h), jnp.zeros((len(h), 1, 3)), (0, 0, 0)),
        "POSITION",
    ),
    "a table that an index leaves": (
        lambda h, b: h * jnp.ones(len(h)).at[3 * b["y"]].get(mode="fill", fill_value=0.0)[:, None],
        "UNKNOWN",
    ),
    "a total's padded copies": (
        lambda h, b: jnp.pad(jnp.tile(h.mean(0), (len(h), 1)), ((1, 0), (0, 0)))[: len(h)],
        "POSITION",
    ),
    "a written copy of a total": (
        lambda h, b: jnp.broadcast_to(h.mean(0), (len(h), 3)).at[0].set(0.0),
        "POSITION",
    ),
    "copies of a total and zeros": (
        lambda h, b: jnp.concatenate(
            [jnp.broadcast_to(h.mean(0), (len(h), 3)), jnp.zeros((len(h), 3))]
        )[len(h) - 2 : 2 * len(h) - 2].mean(),
        "COUPLED",
    ),
    "a weight at each example": (
        lambda h, b: h.mean(0).at[jnp.zeros(len(h), int)].add(h.mean()),
        "POSITION",
    ),
    # -- derivatives of the user's own
    "custom_vjp": (
        lambda h, b: (
            of_jax((lambda h: (jnp.tanh(h), None), lambda _, g: (g - g.mean(0, keepdims=True),)))(h)
            ** 2
        ),
        "COUPLED",
    ),
    "custom_jvp": (
        lambda h, b: (
            of_jax(
                (lambda p, t: (jnp.tanh(p[0]), t[0] - t[0].mean(0, keepdims=True)),),
                given_by="defjvp",
            )(h)
            ** 2
        ),
        "COUPLED",
    ),
    "defjvps": (
        lambda h, b: (
            of_jax((lambda t, _, h: t - t.mean(0, keepdims=True),), given_by="defjvps")(h) ** 2
        ),
        "COUPLED",
    ),
    "custom_gradient": (lambda h, b: centred_gradient(h) ** 2, "COUPLED"),
    "a system that its solver does not solve": (
        lambda h, b: b["x"] * unsolved(h, b["x"]),
        "COUPLED",
    ),
    "the transpose's own solver": (
        lambda h, b: (
            lax.custom_linear_solve(
                lambda x: 2.0 * x,
                h,
                lambda _, x: x / 2.0,
                lambda _, x: x - x.mean(0, keepdims=True),
            )
            ** 2
        ),
        "COUPLED",
    ),
    # -- state, callbacks, kernels
    "an unknown function of the size": (
        lambda h, b: (
            h
            * jax.custom_derivatives.linear_call(
                lambda _, x: len(h) * x, lambda _, x: len(h) * x, (), W
            )[None]
        ),
        "MIS_SCALED",
    ),
    "a reference": (lambda h, b: through_a_reference(h), "UNKNOWN"),
    # -- random numbers
    "a mask of all": (
        lambda h, b: h * jax.random.bernoulli(jax.random.key(0), 0.5, h.shape),
        "MEAN",
    ),
    "a key of the size": (lambda h, b: key_of_the_size(h), "MEAN"),
    "keys split by the size": (
        lambda h, b: (
            h * jax.vmap(jax.random.normal)(jax.random.split(jax.random.key(1), len(h)))[:, None]
        ),
        "MEAN",
    ),
    "as many numbers as examples": (
        lambda h, b: (
            h * jax.vmap(lambda k: jax.random.normal(k, (len(h),)).mean())(b["keys"])[:, None]
        ),
        "UNKNOWN",
    ),
    "permuted": (
        lambda h, b: h * b["x"][jax.random.permutation(jax.random.key(2), len(h))],
        "COUPLED",
    ),
}
