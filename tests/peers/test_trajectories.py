"""Several optimizer steps: parameters and optimizer state in optax are those in torch.optim.

Where the two define a rule differently, the difference is written out here and mapped:

* clipping: `torch.nn.utils.clip_grad_norm_` divides by norm + 1e-6, optax by the norm;
* weight decay in SGD is a term of the gradient in torch, a link of the chain in optax;
* a schedule is read before the step in optax, and advanced after it in torch: the same rate at the
  same step;
* `optax.linear_schedule` computes in float32, so the warmup is written out;
* running variance: torch's is unbiased, n / (n − 1) times Flax's.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from hypothesis import given
from hypothesis import strategies as st

import jaxaccum
from jaxaccum.testing import (
    Layer,
    build_model,
    linen_model,
    model_batches,
    normwise,
)
from jaxaccum.testing.language import CLASSES, LENGTH, block
from tests.support.examples import part_of_the_examples
from tests.support.helpers import INEXACT
from tests.support.nnx_builder import nnx_model
from tests.support.tagged_losses import Loss, loss_fun
from torch_ref import losses as torch_losses
from torch_ref import models as torch_models

WIDTH = 4
SIZE = 5
STEPS = 4
RATE = 0.05
HEAD = Layer("dense", "head", size=CLASSES)
LAYERS = (*block("feed_forward", 0, WIDTH), HEAD)
LOSS = Loss(("token_cross_entropy", "z"), class_weights=(1, 0.5, 2, 1, 4), label_smoothing=0.125)

# name: the optax optimizer at a learning rate, the torch one of parameters, and its state's name
# for optax's fields
OPTIMIZERS = {
    "sgd": (optax.sgd, lambda p: torch.optim.SGD(p, RATE), {}),
    "sgd with weight decay": (
        lambda rate: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(rate)),
        lambda p: torch.optim.SGD(p, RATE, weight_decay=0.1),
        {},
    ),
    "momentum": (
        lambda rate: optax.sgd(rate, momentum=0.9),
        lambda p: torch.optim.SGD(p, RATE, momentum=0.9),
        {"trace": "momentum_buffer"},
    ),
    "nesterov": (
        lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, RATE, momentum=0.9, nesterov=True),
        {"trace": "momentum_buffer"},
    ),
    "adam": (
        optax.adam,
        lambda p: torch.optim.Adam(p, RATE),
        {"mu": "exp_avg", "nu": "exp_avg_sq", "count": "step"},
    ),
    "adamw": (
        lambda rate: optax.adamw(rate, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, RATE, weight_decay=0.1),
        {"mu": "exp_avg", "nu": "exp_avg_sq", "count": "step"},
    ),
}

SCHEDULES = {
    "constant": (RATE, None),
    "cosine": (
        optax.cosine_decay_schedule(RATE, STEPS),
        lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS),
    ),
    "warmup": (
        lambda count: jnp.minimum(RATE, RATE / 4 * (1 + count).astype(jnp.float64)),
        lambda opt: torch.optim.lr_scheduler.LinearLR(opt, start_factor=0.25, total_iters=3),
    ),
}


@functools.cache
def accumulated(microbatch_size):
    fun = loss_fun(linen_model(LAYERS), LOSS)
    return jax.jit(
        jaxaccum.value_and_grad(fun, in_axes=(None, None, 0), microbatch_size=microbatch_size)
    )


@functools.cache
def optimizer(name, schedule, clip):
    made = OPTIMIZERS[name][0](SCHEDULES[schedule][0])
    return optax.chain(optax.clip_by_global_norm(clip), made) if clip else made


def train(model, batches, microbatch_size, opt):
    params, opt_state = jax.tree.map(jnp.asarray, model.weights), opt.init(model.weights)
    for batch in batches:
        _, grads = accumulated(microbatch_size)(params, model.state, batch)
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = opt.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
    return params, opt_state


def train_in_torch(model, batches, name, *, schedule, clip):
    built = torch_models.build(model)
    opt = OPTIMIZERS[name][1](built.parameters())
    advance = SCHEDULES[schedule][1]
    scheduler = advance(opt) if advance else None
    for batch in batches:
        opt.zero_grad()
        tensors = {key: torch_models.tensor(entry) for key, entry in batch.items()}
        torch_losses.full_batch(LOSS, built(tensors), tensors).backward()
        if clip:
            clip_as_optax(built, clip)
        opt.step()
        if scheduler:
            scheduler.step()
    return built, opt


def clip_as_optax(built, clip):
    """torch's own clipping, without the 1e-6 in its denominator."""
    norm = torch.nn.utils.clip_grad_norm_(built.parameters(), clip)
    if norm + 1e-6 > clip:
        for parameter in built.parameters():
            parameter.grad *= min(1.0, clip / norm) * (norm + 1e-6) / clip


@part_of_the_examples(2)
@given(st.data())
def test_trajectories_are_those_of_torch(data):
    name = data.draw(st.sampled_from(sorted(OPTIMIZERS)))
    schedule = data.draw(st.sampled_from(sorted(SCHEDULES)))
    clip = data.draw(st.sampled_from([None, 0.1, 100.0]))
    model = build_model(LAYERS, WIDTH, seed=data.draw(st.integers(0, 2**16)))
    batches = [data.draw(model_batches(WIDTH, sizes=(SIZE,))) for _ in range(STEPS)]
    opt = optimizer(name, schedule, clip)
    params, opt_state = train(model, batches, data.draw(st.sampled_from([1, 2, 5])), opt)
    built, torch_opt = train_in_torch(model, batches, name, schedule=schedule, clip=clip)
    assert normwise(params, torch_models.read(built, lambda parameter: parameter.data)) <= 1e-10
    for field, torch_field in OPTIMIZERS[name][2].items():
        for _, found in optax.tree.get_all_with_path(opt_state, field):
            assert_state(found, built, torch_opt, torch_field)


def assert_state(found, built, torch_opt, field):
    if field == "step":
        assert {int(torch_opt.state[parameter]["step"]) for parameter in built.parameters()} == {
            int(found)
        }
        return
    assert (
        normwise(
            found, torch_models.read(built, lambda parameter: torch_opt.state[parameter][field])
        )
        <= 1e-10
    )


NORMED = (Layer("dense", "dense", size=WIDTH), Layer("batch_norm", "norm", choice="train"), HEAD)


def with_unbiased_variance(apply):
    """A model whose running variance moves as torch's: by n / (n − 1) of the variance of n
    entries."""

    def unbiased(weights, state, batch):
        outputs, new = apply(weights, state, batch)
        entries = batch["features"].shape[0] * LENGTH
        old, var = state["norm"]["var"], new["norm"]["var"]
        moved = (var - 0.9 * old) * (entries / (entries - 1))
        return outputs, {"norm": {"mean": new["norm"]["mean"], "var": 0.9 * old + moved}}

    return unbiased


@functools.cache
def carried(builder, microbatch_size):
    apply = linen_model(NORMED) if builder == "linen" else nnx_model(NORMED, WIDTH)
    fun = loss_fun(with_unbiased_variance(apply), LOSS, has_aux=True)
    in_axes = (None, jaxaccum.CARRY, 0)
    return jax.jit(
        jaxaccum.value_and_grad(fun, has_aux=True, in_axes=in_axes, microbatch_size=microbatch_size)
    )


@INEXACT
@part_of_the_examples(2)
@given(st.data())
def test_carried_running_statistics_are_those_of_a_naive_torch_loop(data):
    builder = data.draw(st.sampled_from(["linen", "nnx"]))
    size = data.draw(st.sampled_from([1, 2, 5]))
    model = build_model(NORMED, WIDTH, seed=data.draw(st.integers(0, 2**16)))
    batch = data.draw(model_batches(WIDTH, sizes=(SIZE,)))
    microbatches = [rows for _, rows in jaxaccum.partition(None, batch, microbatch_size=size)]
    (value, state), grads = carried(builder, size)(model.weights, model.state, batch)

    built = torch_models.build(model)
    expected = torch_losses.over_totals(built, LOSS, microbatches)
    assert normwise(state, torch_models.running(built)) <= 1e-12
    assert math.isclose(value, expected[0], rel_tol=1e-12)
    assert normwise(grads, expected[1]) <= 1e-11


def test_the_order_of_microbatches_matters_to_a_carried_state():
    """A negative control: the statistics of one pass, or of the last microbatch alone, are
    others."""
    model = build_model(NORMED, WIDTH, seed=0)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(SIZE, LENGTH, WIDTH))
    built = torch_models.build(model)
    for rows in (features[:2], features[2:4], features[4:]):
        built({"features": torch_models.tensor(rows)})
    one_pass = torch_models.build(model)
    one_pass({"features": torch_models.tensor(features)})
    assert normwise(torch_models.running(one_pass), torch_models.running(built)) > 1e-3
