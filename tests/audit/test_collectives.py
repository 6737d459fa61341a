"""What the audit says of collectives over the loop's axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxaccum
from jaxaccum import Sum
from tests.audit.test_audit import BATCH, W


def normalized(w, x):
    z = x * w[None]
    mean = lax.pmean(jnp.mean(z, 0), "microbatch")
    var = lax.pmean(jnp.mean(z**2, 0), "microbatch") - mean**2
    return jnp.mean(jnp.tanh((z - mean[None]) / jnp.sqrt(var + 1e-3)[None]))


def contrastive(w, x):
    z = jnp.tanh(x * w[None])
    every = lax.all_gather(z, "microbatch", tiled=True)
    own = lax.axis_index("microbatch") * len(x) + jnp.arange(len(x), dtype=jnp.int32)
    logits = z @ every.T
    picked = jnp.take_along_axis(logits, own[:, None], axis=1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - picked)


COLLECTIVES = {
    "batch norm": (normalized, True),
    "contrastive": (contrastive, True),
    "untiled": (
        lambda w, x: jnp.mean(
            x * lax.all_gather(x * w[None], "microbatch").reshape(-1, 3).mean(0)[None]
        ),
        True,
    ),
    "summed": (
        lambda w, x: jnp.mean(x * lax.all_gather(x * w[None], "microbatch").mean((0, 1))[None]),
        True,
    ),
    "total": (lambda w, x: Sum(jnp.sum(x * w[None]) / lax.psum(jnp.sum(x**2), "microbatch")), True),
    "maximum": (lambda w, x: jnp.mean(x * w[None]) * lax.pmax(jnp.max(x), "microbatch"), True),
    "rows": (lambda w, x: jnp.mean(lax.psum(x * w[None], "microbatch")), False),
    "a root": (
        lambda w, x: jnp.mean(x * w[None]) * lax.psum(jnp.sqrt(jnp.sum(x**2)), "microbatch"),
        False,
    ),
    "shift": (lambda w, x: jnp.mean(lax.ppermute(x * w[None], "microbatch", [(0, 0)])), False),
    "and a sum": (lambda w, x: jnp.sum(x * w[None]) - lax.pmean(jnp.mean(x), "microbatch"), False),
}


def around(x):
    """Each microbatch has what its neighbour had."""
    count = lax.axis_size("microbatch")
    return lax.ppermute(x, "microbatch", [(i, (i + 1) % count) for i in range(count)])


def test_what_every_microbatch_has_alike_may_go_around():
    """A parameter is the same everywhere; of rows nobody knows whom they meet."""
    assert jaxaccum.audit(lambda w, x: jnp.mean(x * around(w)[None]), W, BATCH["x"]).exact
    report = jaxaccum.audit(lambda w, x: jnp.mean(around(x * w[None]) * x), W, BATCH["x"])
    assert (report.verdict, report.exact, report.causes[0].kind) == ("UNKNOWN", False, "unknown")


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_collective_is_coupled_and_exact_where_it_makes_the_batchs_own_statistic(name):
    loss, exact = COLLECTIVES[name]
    if name == "and a sum":
        assert not jaxaccum.audit(loss, W, BATCH["x"]).exact
        return
    report = jaxaccum.audit(loss, W, BATCH["x"])
    assert (report.verdict, report.exact) == ("COUPLED", exact)
    assert any(finding.origin.file == __file__ for finding in report.findings)


def test_declared_statistics_equal_the_batchs_by_vmap_over_microbatches():
    """The oracle: microbatches as devices, every collective by JAX's own vmap."""
    x = BATCH["x"]
    for name, (loss, exact) in COLLECTIVES.items():
        if name in ("shift", "and a sum"):
            continue
        plain = lambda *args, loss=loss: (
            loss(*args).x if isinstance(loss(*args), Sum) else loss(*args)
        )
        combine = jnp.sum if name == "total" else jnp.mean
        spread = jax.jit(jax.vmap(lambda x, f=plain: f(W, x), axis_name="microbatch"))
        values = [combine(spread(x.reshape(n, 8 // n, 3))) for n in (1, 4)]
        assert np.isclose(*values, rtol=1e-9) == exact, name


def test_unequal_microbatches_refuse_a_collective():
    report = jaxaccum.audit(normalized, W, BATCH["x"], num_microbatches=3)
    assert (report.verdict, report.exact) == ("COUPLED", False)
