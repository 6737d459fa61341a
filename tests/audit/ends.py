"""How a random program for the audit ends: one number, or tagged ones, of the rows `h` and the
context `c`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxaccum import Mean, Sum


def _added_up(h):
    return jax.jit(lambda h: lax.scan(lambda s, row: (s + jnp.sum(row), None), 0.0, h)[0])(h)


ENDS: dict[str, Any] = {
    "mean": lambda h, c: jnp.mean(h),
    "mean_by_hand": lambda h, c: jnp.sum(h) / (3.0 * c.n),
    "mean_of_squares": lambda h, c: jnp.mean(h**2) + jnp.sum(c.w**2),
    "mean_in_steps": lambda h, c: h.sum(1).mean(0) - 0.1 * jnp.dot(jnp.ones(c.n) / c.n, h[:, 0]),
    "mean_of_a_loop": lambda h, c: _added_up(h) / c.n,
    "mean_by_dot": lambda h, c: jnp.vdot(h, c.x) / c.n,
    "total": lambda h, c: Sum(jnp.sum(h)),
    "total_in_a_loop": lambda h, c: Sum(_added_up(h)),
    "total_untagged": lambda h, c: jnp.sum(h),
    "total_and_penalty": lambda h, c: Sum(jnp.sum(h) + jnp.sum(c.w**2)),
    "ratio": lambda h, c: Mean(jnp.sum(h * c.mask[:, None]), jnp.sum(c.mask)),
    "ratio_by_size": lambda h, c: Mean(jnp.sum(h), h.size),
    "ratio_of_parameters": lambda h, c: Mean(jnp.sum(h), jnp.sum(jnp.exp(0.1 * h))),
    "ratio_guarded": lambda h, c: Mean(jnp.sum(h), jnp.sum(c.mask) + 0.5),
    "ratio_chosen": lambda h, c: (
        Mean(jnp.sum(jnp.where(c.mask[:, None] > 0, h, 0.0)), jnp.sum(c.mask > 0))
    ),
    "ratio_of_means": lambda h, c: Mean(jnp.mean(h), 1.0),
    "ratio_untagged": lambda h, c: jnp.sum(h * c.mask[:, None]) / jnp.sum(c.mask),
    "ratio_where": lambda h, c: (
        jnp.where(c.mask.sum() > 0, jnp.sum(h * c.mask[:, None]) / c.mask.sum(), 0.0)
    ),
    "terms": lambda h, c: (
        {"a": jnp.mean(h), "b": Sum(jnp.sum(h**2)), "c": Mean(h[:, 0] @ c.mask, jnp.sum(c.mask))}
    ),
    "mean_and_sum": lambda h, c: jnp.mean(h) + jnp.sum(h**2),
    "unbiased": lambda h, c: jnp.sum(h) / (c.n - 0.5),
    "root_of_mean": lambda h, c: jnp.sqrt(1.0 + jnp.mean(h**2)),
    "extreme": lambda h, c: jnp.mean(h) * jnp.max(c.x),
    "logsumexp": lambda h, c: jax.nn.logsumexp(h),
    "histogram_mean": lambda h, c: jnp.sum(jnp.zeros(3).at[c.y].add(h[:, 0]) * c.w) / c.n,
    "mean_and_place": lambda h, c: jnp.mean(h) + h[0, 0],
    "variance": lambda h, c: jnp.mean(h**2) - jnp.mean(h) ** 2,
}  # fmt: skip
