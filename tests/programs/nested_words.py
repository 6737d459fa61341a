"""The words of nested programs: lines of Python with holes, and what may fill the holes.

A hole's letter is its kind: `m` a matrix (3, 3), `v` a vector (3,), `s` a stack of two matrices,
`q` two vectors, `t` a table (5, 3), `z` a complex matrix, `e` a matrix of lower precision, which is
cast where it is read, `k` activations (rows, 3), `i` an integer, `r` an integer for each row.
`CONSTANT` is an array of the module, which compiled functions close over. Results are bounded
(`tanh`, small factors): gradients are well conditioned in nested loops as well.
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
"""What the top of a program may read."""

_MATRICES = (
    "0.5 * {m}",
    "{m}.T",
    "jnp.tanh({m})",
    "{m} * {m}",
    "{m} @ {m}",
    "{m} + {v}[:, None] * {v}[None]",
    "{m} / (1.0 + jnp.linalg.norm({m}))",
    "jnp.hypot({m}, {m})",
    "jnp.kron({m}, {m})[::4, ::4]",
    "jnp.where({v}[:, None] > 0, {m}, {m})",
    'jnp.einsum("ij,kj->ik", {m}, {m})',
    "jnp.linalg.inv(2.0 * jnp.eye(3) + 0.3 * jnp.tanh({m}))",
    "jnp.linalg.cholesky((lambda w: jnp.eye(3) + w @ w.T)({m}))",
    "jnp.concatenate([{m}[1:], {m}[:1]])",
    "jnp.stack([{v}, {v}, {v}])",
    "{m}.reshape(9)[::-1].reshape(3, 3)",
    "{m}[jnp.array([2, 0, 0])]",
    "{m}.at[0].add({v})",
    "lax.dynamic_slice({s}, (1, 0, 0), (1, 3, 3))[0]",
    "{s}[0]",
    "{s}[{i} % 2]",
    "{s}.mean(0)",
    "{t}[:3]",
    "{z}.real",
    "(0.5 * {z} * {z}).imag",
    "{e}.astype(float)",
    "({e}.astype(float) @ {m})",
    "lax.optimization_barrier({m})",
    "jnp.eye(3)",
    "jnp.full((3, 3), 0.2)",
    "CONSTANT",
)
_VECTORS = (
    "0.5 * {v}",
    "{v}[::-1]",
    "{v} * {v}",
    "{m} @ {v}",
    "{m}[0]",
    "{m}.sum(0)",
    "{q}[1]",
    "{t}[2]",
    "jnp.diagonal({m})",
    "jnp.tanh({m}[:, {i} % 3])",
    "jnp.where({v} > 0, {v}, {v})",
    "jnp.linalg.solve(3.0 * jnp.eye(3) + jnp.tanh({m}), {v})",
    "jnp.ones(3)",
    "CONSTANT[1]",
)
_STACKS = (
    "0.5 * {s}",
    "{s}[::-1]",
    "{s}.transpose(0, 2, 1)",
    "{s} + {m}[None]",
    "{s} + {q}[:, None] * {q}[:, :, None]",
    "jnp.tanh({s})",
    "jnp.hypot({s}, {s})",
    "jnp.stack([{m}, {m}])",
    "jnp.broadcast_to({m}, (2, 3, 3))",
    'jnp.einsum("lij,ljk->lik", {s}, {s})',
    "jnp.full((2, 3, 3), 0.2)",
)
_PAIRS = (
    "0.5 * {q}",
    "{q} * {q}",
    "{m}[:2]",
    "{s}[:, 0]",
    "{s}.mean(1)",
    "{t}[3:]",
    "jnp.stack([{v}, {v}])",
)
_ACTIVATIONS = ("0.5 * {k}", "{k} * {k}", "{k} * {v}[None]", "jnp.tanh({k} @ {m})", "{t}[{r}]")
_INTEGERS = ("1", "2", "jnp.int32({v}[0] > 0)", "jnp.argmax({v})", "jnp.arange(3)[2]")

COMPUTED = {
    "m": _MATRICES,
    "v": _VECTORS,
    "s": _STACKS,
    "q": _PAIRS,
    "k": _ACTIVATIONS,
    "i": _INTEGERS,
    "r": ("{r} % 3", "4 - {r}"),
}
"""Expressions computed from others, and constants, by the kind of the result."""

CONDITIONS = (
    "{v}[0] > 0",
    "{v}[0] < {v}[1]",
    "jnp.sum({m}) > 0",
    "{i} % 2 == 0",
    "jnp.bool_(True)",
)

_WELL_CONDITIONED = "A = 2.0 * jnp.eye(3) + 0.3 * jnp.tanh({m})\n"
_SOLVERS = "lambda _, y: jnp.linalg.solve(A, y), lambda _, y: jnp.linalg.solve(A.T, y)"
_SYMMETRIC = "(lambda w: jnp.diag(jnp.arange(3.0)) + 0.1 * jnp.tanh(w + w.T))({m})"

LEAVES = {
    "product": "h = jnp.tanh(h @ {m})",
    "two_products": "h = jnp.tanh(h @ {m}) @ jnp.tanh({m})",
    "tied": "h = jnp.tanh(h @ {m}) @ {m}.T / 3.0",
    "residual": "h = 0.5 * h + jnp.tanh(h @ {m} + {v}[None])",
    "scaled": "h = h * jnp.tanh({v})[None] + {v}[None]",
    "other": "h = 0.7 * h + 0.3 * {k}",
    "integer": "h = h * (1.0 + 0.1 * jnp.float64({i}))",
    "rows": "h = h * (1.0 + 0.1 * {r}.astype(float))[:, None]",
    "chosen": "h = jnp.where({k} > 0, jnp.tanh(h @ {m}), 0.3 * h @ {m})",
    "einsum": 'h = jnp.tanh(jnp.einsum("ni,ij,kj->nk", h, {m}, {m}))',
    "transpose": "h = jnp.tanh(({m} @ h.T).T + {k})",
    "reshape": "h = jnp.tanh((h @ {m}).reshape(-1, 3, 1)).reshape(-1, 3)",
    "slices": "h = jnp.tanh(h[:, :2] @ {m}[:2] + h[:, 1:] @ {m}[1:])",
    # Not `{m}[:2]` itself: inside of two loops XLA for CPU then overwrites what it still reads, and
    # jitted JAX gives a wrong value (jax 0.10.2 and 0.12).
    "update_slice": "h = jnp.tanh(h @ lax.dynamic_update_slice({m}, ({m} @ {m})[:2], (1, 0)))",
    "scatter": "h = jnp.tanh(h.at[:, jnp.array([0, 2])].add((h @ {m})[:, :2])) + {k}",
    "cumsum": "h = jnp.tanh(jnp.cumsum(h @ {m}, axis=1) + lax.cumlogsumexp({v})[None])",
    "convolution": (
        'convolve = lambda r: jnp.convolve(r, {v}, mode="same")\n'
        "h = jnp.tanh(jax.vmap(convolve)(h) + {v}[None])"
    ),
    "softmax": "h = h + jax.nn.softmax(h @ {m}, axis=1) @ {m}",
    "gather": "h = 0.5 * h + {t}[{r}]",
    "take_along": "h = 0.5 * h + jnp.take_along_axis({t}, {r}[:, None], axis=0)",
    "one_hot": "h = 0.5 * h + jax.nn.one_hot({r}, 5, dtype=float) @ {t}",
    "low_precision": "h = jnp.tanh(h @ {e}.astype(float)) + (h @ {e}.astype(float)) / 9.0",
    # Not `@`: JAX itself cannot save a complex product under a policy of `checkpoint`.
    "complex": "h = jnp.tanh((lax.complex(h, {k})[:, :, None] * {z}[None]).sum(1).real)",
    "solve": "h = jnp.linalg.solve(2.0 * jnp.eye(3) + 0.3 * jnp.tanh({m}), h.T).T",
    "qr": "h = h @ jnp.linalg.qr(2.0 * jnp.eye(3) + 0.3 * jnp.tanh({m}))[0]",
    "eigh": f"h = h @ (jnp.linalg.eigh({_SYMMETRIC})[1] ** 2)",
    "linear_solve": (
        f"{_WELL_CONDITIONED}h = lax.custom_linear_solve(lambda x: A @ x, h.T, {_SOLVERS}).T"
    ),
    "sliced_solve": (
        f"{_WELL_CONDITIONED}matvec = lambda x: A[:, :1] @ x[:1] + A[:, 1:] @ x[1:]\n"
        f"h = lax.custom_linear_solve(matvec, h.T, {_SOLVERS}).T"
    ),
    "symmetric_solve": (
        f"A = 2.0 * jnp.eye(3) + {_SYMMETRIC}\nsolve = lambda _, y: jnp.linalg.solve(A, y)\n"
        "h = lax.custom_linear_solve(lambda x: A @ x, h.T, solve, symmetric=True).T"
    ),
    "root": (
        "A = {m}\n"
        "equation = lambda x: x + 0.5 * jnp.tanh(x) - jnp.tanh(h @ A + {v}[None])\n"
        "solve = lambda f, x: lax.fori_loop(0, 50, lambda _, x: x - 0.7 * f(x), x)\n"
        "h = lax.custom_root(equation, h, solve, lambda g, y: y / g(jnp.ones_like(y)))"
    ),
    "while": (
        "turn = lambda c: (c[0] + 1, jnp.tanh(c[1] @ c[2]), c[2])\n"
        "state = (0, *lax.stop_gradient((h, {m})))\n"
        "h = jnp.tanh(h @ {m}) + 0.1 * lax.while_loop(lambda c: c[0] < 2, turn, state)[1]"
    ),
    "associative": (
        "A = lax.associative_scan(jnp.matmul, jnp.stack([{m}, {m}]) / 2.0)[1]\n"
        "h = A[None, 0] + jnp.tanh(h @ {m})"
    ),
    "vmap_of_operand": (
        "layer = lambda r, w: jnp.tanh(r @ w @ {m})\nh = jax.vmap(layer, in_axes=(0, None))(h, {m})"
    ),
    "inner_gradient": (
        "slope = jax.grad(lambda r: jnp.sum(jnp.tanh(r @ {m}) * {v}))\n"
        "h = 0.5 * h + jax.vmap(slope)(h)"
    ),
    "inner_jvp": "h = jax.jvp(lambda w: jnp.tanh(h @ w), ({m},), ({m},))[1]",
    "pytree": (
        'layer = lambda w, h: jnp.tanh(h @ w["x"][0] + h @ w["y"] + w["x"][1][None])\n'
        'h = jax.jit(layer)({"x": [{m}, {v}], "y": {m}}, h)'
    ),
}
"""Steps without steps inside."""

COLLECTIVES = {
    "centered": "h = h - pmean(h.mean(0))[None]",
    "normalized": "h = h / jnp.sqrt(1.0 + pmean((h**2).mean(0)))[None]",
    "summed": "h = 0.5 * h + psum(jnp.tanh(h @ {m}).sum(0))[None] / 6.0",
    "moment": "h = jnp.tanh(h @ ({m} + psum(h.T @ h) / 6.0))",
    "contrast": "g = gather(h)\nh = 0.5 * h + jnp.tanh(h @ {m} @ g.T) @ g / 6.0",
    "largest": "h = h - 0.5 * pmax(h.max(0))[None] * jnp.tanh({v})[None]",
    "two_statistics": (
        "scale = jnp.tanh({v} + pmean(jnp.abs(h @ {m}).mean(0)))[None]\n"
        "h = (h - pmean(h.mean(0))[None]) * scale"
    ),
}
"""Steps over the axis of microbatches, true of six whole rows as well."""

_SQUARE = "(jnp.tanh(h) - 0.1) ** 2"
_WEIGHT = 'batch["weight"]'
_WEIGHTED = f"Mean(jnp.sum({_WEIGHT}[:, None] * {_SQUARE}), 3.0 * jnp.sum({_WEIGHT}))"
LOSSES = (
    f"jnp.mean({_SQUARE})",
    _WEIGHTED,
    f"Sum(jnp.sum({_SQUARE}))",
    f'{{"first": {_WEIGHTED}, "second": jnp.mean(jnp.tanh(h @ {{m}}))}}',
    f'{{"first": Sum(jnp.sum({_SQUARE})), "second": {_WEIGHTED}}}',
    "Mean(jnp.sum(jax.nn.sigmoid(h @ {m}) * h), jnp.sum(jax.nn.sigmoid(h @ {m})))",
)
"""What a program returns: a mean, a `Mean`, a `Sum`, a dict of terms, or a ratio of two sums that
both have a gradient."""

PATHS = (
    *[()] * 4,
    ("scan", "jit", "scan"),
    ("scan", "jit"),
    ("scan", "checkpoint"),
    ("scan", "custom_vjp"),
    ("scan", "custom_jvp"),
    ("scan", "cond"),
    ("scan", "scan"),
    ("scan",),
    ("jit", "scan"),
    ("checkpoint", "scan"),
    ("map",),
    ("jit",),
    ("cond",),
    ("switch",),
)
"""The kinds of a program's first steps, outermost first, so that common forms are drawn often."""
