"""The ways to the gradient of a batch that `bench` compares, and a training step of each.

Each way is a function of a case and a number of microbatches. Where the weights of microbatches are
unequal, the ways that leave the division to the user are written as a careful user writes them:
each microbatch's total is divided by the weight of the whole batch. The usual loop,
`optax.MultiSteps` and Accelerate average the microbatches' means.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import jaxaccum
from experiments import contrastive
from experiments._bench_cases import Batch, Case, Params, bytes_of

Gradient = Callable[[Params, Batch], tuple[jax.Array, Params]]
OPTIMIZER = optax.adamw(1e-3)
FIRST_MOMENT = 0.1  # AdamW's first moment after one step, over the gradient


# -- gradients -------------------------------------------------------------------------------------


def with_jaxaccum(case: Case, n: int, **options: Any) -> Gradient:
    """The library, with the loss as its README writes it."""

    def weighted(params: Params, rows: Batch) -> Any:
        return jaxaccum.Mean(*case.terms(params, rows))

    loss = case.loop_loss or (weighted if case.weighted else case.mean)
    return jaxaccum.value_and_grad(loss, num_microbatches=n, **options)


def with_unrolled_jaxaccum(case: Case, n: int) -> Gradient:
    """The same without a loop."""
    return with_jaxaccum(case, n, unroll=True)


def with_full_batch(case: Case, n: int) -> Gradient:
    """One pass over the whole batch, at its memory."""
    del n
    return jax.value_and_grad(case.mean)


def with_scan(case: Case, n: int) -> Gradient:
    """The scan that everyone writes: a tree of gradients per microbatch, added to the carry."""

    def gradient(params: Params, batch: Batch) -> tuple[jax.Array, Params]:
        own = jax.value_and_grad(share_of(case, batch, n))

        def add(sums: Any, rows: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, own(params, rows)), None

        return lax.scan(add, zeros(params), cut(batch, n))[0]

    return gradient


def with_usual_scan(case: Case, n: int) -> Gradient:
    """The same scan, each microbatch divided by its own weight."""

    def gradient(params: Params, batch: Batch) -> tuple[jax.Array, Params]:
        def add(sums: Any, rows: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, jax.value_and_grad(case.mean)(params, rows)), None

        sums, _ = lax.scan(add, zeros(params), cut(batch, n))
        return jax.tree.map(lambda leaf: leaf / n, sums)

    return gradient


def with_refs(case: Case, n: int) -> Gradient:
    """The recipe of JAX's documentation: the backward pass adds to references. (docs.jax.dev,
    "Autodiff with refs".)"""

    def gradient(params: Params, batch: Batch) -> tuple[jax.Array, Params]:
        share = share_of(case, batch, n)
        refs = jax.tree.map(lambda leaf: jax.new_ref(jnp.zeros_like(leaf)), params)

        def add(value: jax.Array, rows: Batch) -> tuple[jax.Array, None]:
            own, pull = jax.vjp(lambda params: share(params, rows), params)
            pull.with_refs(refs)(jnp.ones_like(own))  # pyright: ignore[reportFunctionMemberAccess]
            return value + own, None

        value, _ = lax.scan(add, zeros(params)[0], cut(batch, n))
        return value, jax.tree.map(jax.freeze, refs)

    return gradient


def with_unrolled(case: Case, n: int) -> Gradient:
    """A Python loop inside of one compiled step."""

    def gradient(params: Params, batch: Batch) -> tuple[jax.Array, Params]:
        own = jax.value_and_grad(share_of(case, batch, n))
        sums = zeros(params)
        for i in range(n):
            rows = jax.tree.map(lambda leaf, i=i: leaf[i], cut(batch, n))
            sums = jax.tree.map(jnp.add, sums, own(params, rows))
        return sums

    return gradient


def with_checkpoint(case: Case, n: int) -> Gradient:
    """The gradient of a scan whose body is computed again in the backward pass."""

    def gradient(params: Params, batch: Batch) -> tuple[jax.Array, Params]:
        share = jax.checkpoint(share_of(case, batch, n))

        def whole(params: Params) -> jax.Array:
            add = lambda value, rows: (value + share(params, rows), None)
            return lax.scan(add, zeros(params)[0], cut(batch, n))[0]

        return jax.value_and_grad(whole)(params)

    return gradient


def with_optax(case: Case, n: int) -> Gradient:
    """`optax.microbatching.microbatch` of the gradient function, its output summed."""

    def gradient(params: Params, batch: Batch) -> tuple[jax.Array, Params]:
        own = jax.value_and_grad(share_of(case, batch, n))
        add = optax.microbatching.AccumulationType.SUM
        size = len(jax.tree.leaves(batch)[0]) // n
        with jax.numpy_dtype_promotion("standard"):
            return optax.microbatching.microbatch(own, 1, size, add)(params, batch)

    return gradient


def with_grad_cache(case: Case, n: int) -> Gradient:
    """Two passes by hand: the gradient of all features, kept; then that of the towers, microbatch
    by microbatch."""

    def gradient(params: Params, batch: Batch) -> tuple[jax.Array, Params]:
        parts = cut(batch, n)
        features = lax.map(lambda part: contrastive.embed(params, part), parts)
        of_all = jax.value_and_grad(contrastive.of_features, argnums=(0, 1, 2))
        value, (scale, *cotangents) = of_all(
            params["scale"], *(z.reshape(-1, z.shape[-1]) for z in features)
        )

        def add(sums: Params, x: Any) -> tuple[Params, None]:
            part, own = x
            _, pull = jax.vjp(
                lambda towers: contrastive.embed({"towers": towers}, part), params["towers"]
            )
            return jax.tree.map(jnp.add, sums, pull(tuple(own))[0]), None

        sums = jax.tree.map(jnp.zeros_like, params["towers"])
        towers, _ = lax.scan(add, sums, (parts, cut(cotangents, n)))
        return value, {"towers": towers, "scale": scale}

    return gradient


def share_of(case: Case, batch: Batch, n: int) -> Callable[[Params, Batch], jax.Array]:
    """A microbatch's part of the batch's mean: its total over the weight of the whole batch."""
    if not case.weighted:
        return lambda params, rows: case.mean(params, rows) / n

    def share(params: Params, rows: Batch) -> jax.Array:
        total, _ = case.terms(params, rows)
        return total / jnp.sum(batch["weight"]).astype(total.dtype)

    return share


def cut(batch: Batch, n: int) -> Batch:
    """Every array as n microbatches along a new leading axis."""
    return jax.tree.map(lambda leaf: leaf.reshape(n, -1, *leaf.shape[1:]), batch)


def zeros(params: Params) -> tuple[jax.Array, Params]:
    """The sums before the first microbatch: of the loss and of the gradients."""
    return jnp.zeros((), jax.tree.leaves(params)[0].dtype), jax.tree.map(jnp.zeros_like, params)


# -- training steps --------------------------------------------------------------------------------


@dataclasses.dataclass
class Way:
    """A training step: `run` makes one; the rest was measured when it was compiled, or is read off
    its first step."""

    run: Callable[[], None]
    gradient: Callable[[], Params]  # after the first step
    memory: (
        int | None
    )  # bytes beyond parameters, AdamW's state and the batch; None where nobody tells
    trace: float | None = None  # seconds
    compile: float | None = None


def compiled_step(gradient: Gradient, case: Case) -> Way:
    """One compiled program per optimizer step, its state donated."""

    def step(state: Any, batch: Batch) -> tuple[Any, jax.Array]:
        params, opt_state = state
        value, grads = gradient(params, batch)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes on its own
            updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), value

    state, batch = own_state(OPTIMIZER, case), jax.tree.map(jnp.asarray, case.batch)
    program, trace, compile_ = compiled(step, state, batch)
    held = [state]

    def run() -> None:
        held[0], value = program(held[0], batch)
        jax.block_until_ready((held[0], value))

    return Way(run, lambda: gradient_in(held[0][1]), temporary(program), trace, compile_)


def host_loop(multi_steps: Callable[..., Any], case: Case, n: int) -> Way:
    """One call per microbatch, of a step whose optimizer accumulates by itself."""
    optimizer = multi_steps(OPTIMIZER, every_k_schedule=n)

    def step(state: Any, rows: Batch) -> tuple[Any, jax.Array]:
        params, opt_state = state
        value, grads = jax.value_and_grad(case.mean)(params, rows)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), value

    state = own_state(optimizer, case)
    parts = list(microbatches(case.batch, n))
    program, trace, compile_ = compiled(step, state, parts[0])
    held = [state]

    def run() -> None:
        values = []
        for rows in parts:
            held[0], value = program(held[0], rows)
            values.append(value)
        jax.block_until_ready((held[0], values))

    sums = bytes_of(state[1]) - bytes_of(jax.eval_shape(OPTIMIZER.init, case.params))
    return Way(
        run,
        lambda: gradient_in(held[0][1].inner_opt_state),
        temporary(program) + sums,
        trace,
        compile_,
    )


def own_state(optimizer: Any, case: Case) -> Any:
    """Parameters and the optimizer's state, in buffers that may be donated."""
    params = jax.tree.map(jnp.array, case.params)
    return params, jax.jit(optimizer.init)(params)


def microbatches(batch: Batch, n: int) -> Iterator[Batch]:
    """The rows of each microbatch."""
    parts = cut(batch, n)
    for i in range(n):
        yield jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i]), parts)


def compiled(step: Callable[..., Any], *args: Any) -> tuple[Any, float, float]:
    """The program, and the seconds that tracing and compiling took, with nothing known from
    before."""
    jax.clear_caches()
    start = time.perf_counter()
    traced = jax.jit(step, donate_argnums=0).trace(*args)
    between = time.perf_counter()
    program = traced.lower().compile()
    return program, between - start, time.perf_counter() - between


def temporary(program: Any) -> int:
    """What a compiled program needs beyond its arguments and results, which share their bytes."""
    analysis = program.memory_analysis()
    assert analysis is not None, "this backend does not report its memory"
    return analysis.temp_size_in_bytes


def gradient_in(opt_state: Any) -> Params:
    """The gradient of the first step, as AdamW kept it: of the very program that is timed."""
    return jax.tree.map(lambda leaf: np.asarray(leaf) / np.float32(FIRST_MOMENT), opt_state[0].mu)


UNROLLED = "jaxaccum, unroll=True"
OURS, FULL, SCAN, REFS, USUAL = "jaxaccum", "full batch", "lax.scan", "references", "usual scan"
GRADIENTS: dict[str, Callable[[Case, int], Gradient]] = {
    OURS: with_jaxaccum,
    UNROLLED: with_unrolled_jaxaccum,
    FULL: with_full_batch,
    SCAN: with_scan,
    REFS: with_refs,
    "unrolled": with_unrolled,
    "checkpointed scan": with_checkpoint,
    "optax.microbatching": with_optax,
    USUAL: with_usual_scan,
    "GradCache": with_grad_cache,
}
ALL_OURS = (OURS, UNROLLED)
HOST_LOOPS: dict[str, Callable[..., Any]] = {
    "optax.MultiSteps": optax.MultiSteps,
    "jaxaccum.MultiSteps": jaxaccum.MultiSteps,
}


def names(case: Case) -> list[str]:
    """The ways that apply to a case. Loops change a coupled loss: of these the usual scan alone, to
    be seen."""
    if case.coupled:
        return [OURS, FULL, "GradCache", USUAL]
    others = {"GradCache"} if case.weighted else {"GradCache", USUAL}
    return [name for name in (*GRADIENTS, *HOST_LOOPS) if name not in others]


def made(name: str, case: Case, n: int) -> Way:
    """A way, compiled."""
    if name in HOST_LOOPS:
        return host_loop(HOST_LOOPS[name], case, n)
    return compiled_step(GRADIENTS[name](case, n), case)
