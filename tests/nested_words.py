"""The words of the nested programs: lines of Python with holes, and what may fill them.

A hole's letter is its kind: `m` a matrix (3, 3), `v` a vector (3,), `s` a stack of two matrices, `q` two vectors,
`t` a table (5, 3), `z` a complex matrix, `k` activations (rows, 3), `i` an integer, `r` an integer for each row.
Results are bounded (`tanh`, small factors), so that gradients are well conditioned however deep loops are nested.
"""

from __future__ import annotations

SCOPE = {
    "m": ('p["a"]', 'p["b"]', 'p["c"]'),
    "v": ('p["v"]', 'p["u"]'),
    "s": ('p["S"]', 'p["R"]'),
    "q": ('p["B"]', 'p["D"]'),
    "t": ('p["T"]',),
    "z": ('p["z"]',),
    "e": ('p["e"]', 'p["f"]'),
    "k": ("h", 'batch["x"]'),
    "r": ('batch["ids"]',),
}
"""What the top of a program may read; `e` are matrices of lower precision, which are cast where they are read."""

COMPUTED = {
    "m": (
        "0.5 * {m}", "{m}.T", "jnp.tanh({m})", "{m} + {v}[:, None] * {v}[None]", "{m} @ {m}", "jnp.hypot({m}, {m})",
        "jnp.where({v}[:, None] > 0, {m}, {m})", "jnp.kron({m}, {m})[::4, ::4]", "{m} * {m}",
        'jnp.einsum("ij,kj->ik", {m}, {m})', "jnp.linalg.inv(2.0 * jnp.eye(3) + 0.3 * jnp.tanh({m}))",
        "jnp.linalg.cholesky(jnp.eye(3) + {m} @ {m}.T)", "{m}.reshape(9)[::-1].reshape(3, 3)", "{s}[0]", "{s}[{i} % 2]",
        "lax.dynamic_slice({s}, (1, 0, 0), (1, 3, 3))[0]", "jnp.concatenate([{m}[1:], {m}[:1]])",
        "{m}.at[0].add({v})", "{m}[jnp.array([2, 0, 0])]", "{t}[:3]", "{s}.mean(0)", "jnp.stack([{v}, {v}, {v}])",
        "{z}.real", "(0.5 * {z} @ {z}).imag", "{e}.astype(float)", "({e}.astype(float) @ {m})",
        "jnp.eye(3)", "jnp.full((3, 3), 0.2)", "lax.optimization_barrier({m})", "{m} / (1.0 + jnp.linalg.norm({m}))",
    ),
    "v": (
        "0.5 * {v}", "{v}[::-1]", "{m}[0]", "{m}.sum(0)", "jnp.diagonal({m})", "{m} @ {v}", "{q}[1]", "{t}[2]",
        "{v} * {v}", "jnp.where({v} > 0, {v}, {v})", "jnp.linalg.solve(3.0 * jnp.eye(3) + jnp.tanh({m}), {v})",
        "jnp.ones(3)", "jnp.tanh({m}[:, {i} % 3])",
    ),
    "s": (
        "0.5 * {s}", "jnp.tanh({s})", "{s}[::-1]", "{s}.transpose(0, 2, 1)", "{s} + {m}[None]", "jnp.stack([{m}, {m}])",
        'jnp.einsum("lij,ljk->lik", {s}, {s})', "jnp.broadcast_to({m}, (2, 3, 3))", "jnp.hypot({s}, {s})",
        "{s} + {q}[:, None] * {q}[:, :, None]", "jnp.full((2, 3, 3), 0.2)",
    ),
    "q": ("0.5 * {q}", "{m}[:2]", "{s}[:, 0]", "{s}.mean(1)", "jnp.stack([{v}, {v}])", "{q} * {q}", "{t}[3:]"),
    "k": ("0.5 * {k}", "jnp.tanh({k} @ {m})", "{t}[{r}]", "{k} * {v}[None]", "{k} * {k}"),
    "i": ("1", "2", "jnp.int32({v}[0] > 0)", "jnp.argmax({v})", "jnp.arange(3)[2]"),
    "r": ("{r} % 3", "4 - {r}"),
}  # fmt: skip
"""Expressions computed from others, and constants, by the kind of the result."""

CONDITIONS = ("{v}[0] > 0", "jnp.sum({m}) > 0", "{i} % 2 == 0", "jnp.bool_(True)", "{v}[0] < {v}[1]")

_SOLVE = "lax.custom_linear_solve({matvec}, h.T, {solve}, {transposed}).T"
_LINEAR = "A = 2.0 * jnp.eye(3) + 0.3 * jnp.tanh({m})\n"

LEAVES = {
    "product": "h = jnp.tanh(h @ {m})",
    "two_products": "h = jnp.tanh(h @ {m}) @ jnp.tanh({m})",
    "residual": "h = 0.5 * h + jnp.tanh(h @ {m} + {v}[None])",
    "einsum": 'h = jnp.tanh(jnp.einsum("ni,ij,kj->nk", h, {m}, {m}))',
    "scaled": "h = h * jnp.tanh({v})[None] + {v}[None]",
    "gather": "h = 0.5 * h + {t}[{r}]",
    "take_along": "h = 0.5 * h + jnp.take_along_axis({t}, {r}[:, None], axis=0)",
    "one_hot": "h = 0.5 * h + jax.nn.one_hot({r}, 5, dtype=float) @ {t}",
    "slices": "h = jnp.tanh(h[:, :2] @ {m}[:2] + h[:, 1:] @ {m}[1:])",
    "reshape": "h = jnp.tanh((h @ {m}).reshape(-1, 3, 1)).reshape(-1, 3)",
    "transpose": "h = jnp.tanh(({m} @ h.T).T + {k})",
    "tied": "h = jnp.tanh(h @ {m}) @ {m}.T / 3.0",
    "other": "h = 0.7 * h + 0.3 * {k}",
    "integer": "h = h * (1.0 + 0.1 * jnp.float64({i}))",
    "rows": "h = h * (1.0 + 0.1 * {r}.astype(float))[:, None]",
    "chosen": "h = jnp.where({k} > 0, jnp.tanh(h @ {m}), 0.3 * h @ {m})",
    "solve": "h = jnp.linalg.solve(2.0 * jnp.eye(3) + 0.3 * jnp.tanh({m}), h.T).T",
    "qr": "h = h @ jnp.linalg.qr(2.0 * jnp.eye(3) + 0.3 * jnp.tanh({m}))[0]",
    "eigh": "h = h @ (jnp.linalg.eigh(jnp.diag(jnp.arange(3.0)) + 0.1 * jnp.tanh({m} + {m}.T))[1] ** 2)",
    "low_precision": "h = jnp.tanh(h @ {e}.astype(float)) + (h @ {e}.astype(float)) / 9.0",
    "complex": "h = jnp.tanh((lax.complex(h, {k}) @ {z}).real)",
    "vmap_of_operand": "h = jax.vmap(lambda r, w: jnp.tanh(r @ w @ {m}), in_axes=(0, None))(h, {m})",
    "inner_gradient": "h = 0.5 * h + jax.vmap(jax.grad(lambda r: jnp.sum(jnp.tanh(r @ {m}) * {v})))(h)",
    "inner_jvp": "h = jax.jvp(lambda w: jnp.tanh(h @ w), ({m},), ({m},))[1]",
    "while": (
        "h = h + 0.1 * lax.stop_gradient(lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, jnp.tanh(c[1] @ c[2]), "
        "c[2]), (0, lax.stop_gradient(h), lax.stop_gradient({m})))[1])\nh = jnp.tanh(h @ {m})"
    ),
    "linear_solve": _LINEAR + _SOLVE.join(["h = ", ""]).format(
        matvec="lambda x: A @ x", solve="lambda _, y: jnp.linalg.solve(A, y)",
        transposed="lambda _, y: jnp.linalg.solve(A.T, y)",
    ),
    "sliced_solve": _LINEAR + _SOLVE.join(["h = ", ""]).format(
        matvec="lambda x: A[:, :1] @ x[:1] + A[:, 1:] @ x[1:]", solve="lambda _, y: jnp.linalg.solve(A, y)",
        transposed="lambda _, y: jnp.linalg.solve(A.T, y)",
    ),
    "symmetric_solve": "A = 2.0 * jnp.eye(3) + 0.1 * jnp.tanh({m} + {m}.T)\n" + (
        "h = lax.custom_linear_solve(lambda x: A @ x, h.T, lambda _, y: jnp.linalg.solve(A, y), symmetric=True).T"
    ),
    "root": (
        "A = {m}\n"
        "h = lax.custom_root(lambda x: x + 0.5 * jnp.tanh(x) - jnp.tanh(h @ A + {v}[None]), h, "
        "lambda f, x: lax.fori_loop(0, 50, lambda _, x: x - 0.7 * f(x), x), lambda g, y: y / g(jnp.ones_like(y)))"
    ),
    "cumsum": "h = jnp.tanh(jnp.cumsum(h @ {m}, axis=1) + lax.cumlogsumexp({v})[None])",
    "scatter": "h = jnp.tanh(h.at[:, jnp.array([0, 2])].add((h @ {m})[:, :2])) + {k}.at[:, 0].set({v}[1])",
    "convolution": "h = jnp.tanh(jax.vmap(lambda r: jnp.convolve(r, {v}, mode='same'))(h) + {v}[None])",
    "softmax": "h = h + jax.nn.softmax(h @ {m}, axis=1) @ {m}",
    "associative": "h = lax.associative_scan(jnp.matmul, jnp.stack([{m}, {m}]) / 2.0)[1][None, 0] + jnp.tanh(h @ {m})",
    "update_slice": "h = jnp.tanh(h @ lax.dynamic_update_slice({m}, {m}[:2], (1, 0)))",
    "pytree": 'h = jax.jit(lambda w, h: jnp.tanh(h @ w["x"][0] + h @ w["y"]))({"x": [{m}, {v}], "y": {m}}, h)',
}  # fmt: skip
"""Steps of one line or two."""

COLLECTIVES = {
    "centered": "h = h - pmean(h.mean(0))[None]",
    "normalized": "h = h / jnp.sqrt(1.0 + pmean((h**2).mean(0)))[None]",
    "summed": "h = 0.5 * h + psum(jnp.tanh(h @ {m}).sum(0))[None] / 6.0",
    "moment": "h = jnp.tanh(h @ ({m} + psum(h.T @ h) / 6.0))",
    "contrast": "g = gather(h)\nh = 0.5 * h + jnp.tanh(h @ {m} @ g.T) @ g / 6.0",
    "largest": "h = h - 0.5 * pmax(h.max(0))[None] * jnp.tanh({v})[None]",
    "two_statistics": "h = (h - pmean(h.mean(0))[None]) * jnp.tanh({v} + pmean(jnp.abs(h @ {m}).mean(0)))[None]",
}
"""Steps over the axis of microbatches, each true of the whole batch as well."""

_SQUARE = "(jnp.tanh(h) - 0.1) ** 2"
_WEIGHTED = f'Mean(jnp.sum(batch["weight"][:, None] * {_SQUARE}), 3.0 * jnp.sum(batch["weight"]))'
LOSSES = (
    f"jnp.mean({_SQUARE})",
    _WEIGHTED,
    f"Sum(jnp.sum({_SQUARE}))",
    f'{{"first": {_WEIGHTED}, "second": jnp.mean(jnp.tanh(h @ %s))}}' % "{m}",
    f'{{"first": Sum(jnp.sum({_SQUARE})), "second": {_WEIGHTED}}}',
    "Mean(jnp.sum(jax.nn.sigmoid(h @ {m}) * h), jnp.sum(jax.nn.sigmoid(h @ {m})))",
)
"""What a program returns: a mean, a Mean, a Sum, a dict of terms, and a ratio whose two parts are differentiated."""

PATHS = (
    (), (), (), (),
    ("scan", "jit", "scan"), ("scan", "jit"), ("scan", "checkpoint"), ("scan", "custom_vjp"), ("scan", "scan"),
    ("jit", "scan"), ("scan",), ("map",), ("checkpoint", "scan"), ("scan", "cond"), ("scan", "custom_jvp"), ("jit",),
    ("cond",), ("switch",),
)  # fmt: skip
"""Which steps come first at each depth: common forms are drawn often, and the rest anyhow."""
