"""The oracle is right: its three ways against closed forms in numpy, its training against AdamW
written out."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from torch_ref import accumulate, mlp, toy, train

SIZES = [(7,), (3, 3, 1), (1,) * 7, (2, 5)]


def test_the_toy_prints_the_numbers_of_the_seed():
    rows = toy.run(np.array([4.0, 2.0], np.float32), batches=2, learning_rate=0.01)
    expected = np.array([[-16, 1], [-20, 1], [-20, 1.2]], np.float32)
    assert np.array_equal(np.squeeze(rows), expected)


@pytest.mark.parametrize("sizes", SIZES)
def test_the_exact_loop_is_a_weighted_mean_for_any_partition(sizes):
    w, x, y, weight = linear_problem()
    value, grads = accumulate.exact_loop(
        linear_loss, {"w": w}, {"x": x, "y": y, "weight": weight}, sizes=sizes
    )
    error = x @ w - y
    assert value == pytest.approx(np.average(error**2, weights=weight), rel=1e-14)
    expected = np.average(2 * error[:, None] * x, axis=0, weights=weight)
    assert normwise(grads["w"], expected) <= 1e-14


@pytest.mark.parametrize("sizes", SIZES)
def test_the_naive_loop_is_the_mean_of_microbatch_means(sizes):
    w, x, y, weight = linear_problem()
    value, grads = accumulate.naive_loop(
        linear_loss, {"w": w}, {"x": x, "y": y, "weight": weight}, sizes=sizes
    )
    parts = np.split(np.arange(7), np.cumsum(sizes)[:-1])
    error = x @ w - y
    means = [
        np.average(2 * error[part, None] * x[part], axis=0, weights=weight[part]) for part in parts
    ]
    assert normwise(grads["w"], np.mean(means, axis=0)) <= 1e-14
    assert value == pytest.approx(
        np.mean([np.average(error[p] ** 2, weights=weight[p]) for p in parts]), rel=1e-14
    )
    exact = accumulate.full_batch(linear_loss, {"w": w}, {"x": x, "y": y, "weight": weight})[1]["w"]
    assert (normwise(grads["w"], exact) > 1e-2) == (len(sizes) > 1)


@pytest.mark.parametrize("sizes", SIZES)
def test_every_term_has_its_own_denominator(sizes):
    """One term's weight depends on the parameter: the derivative of T / W has both parts."""

    def fun(weights, batch):
        scores = batch["x"] @ weights["w"]
        gate = torch.sigmoid(scores)
        return {
            "error": ((batch["weight"] * (scores - batch["y"]) ** 2).sum(), batch["weight"].sum()),
            "gated": ((gate * batch["y"]).sum(), gate.sum()),
        }

    w, x, y, weight = linear_problem()
    batch = {"x": x, "y": y, "weight": weight}
    leaf = torch.tensor(w, requires_grad=True)
    terms = fun({"w": leaf}, accumulate.as_tensors(batch))
    whole = terms["error"][0] / terms["error"][1] + terms["gated"][0] / terms["gated"][1]
    whole.backward()
    value, grads = accumulate.exact_loop(fun, {"w": w}, batch, sizes=sizes)
    assert value == pytest.approx(whole.item(), rel=1e-14)
    assert normwise(grads["w"], leaf.grad.numpy()) <= 1e-13


def test_microbatches_of_zero_weight_and_a_batch_of_zero_weight():
    w, x, y, weight = linear_problem()
    weight[:3] = 0
    batch = {"x": x, "y": y, "weight": weight}
    value, grads = accumulate.exact_loop(linear_loss, {"w": w}, batch, sizes=(3, 4))
    expected_value, expected = accumulate.full_batch(linear_loss, {"w": w}, batch)
    assert value == pytest.approx(expected_value, rel=1e-14)
    assert normwise(grads["w"], expected["w"]) <= 1e-14
    value, grads = accumulate.exact_loop(
        linear_loss, {"w": w}, {**batch, "weight": 0 * weight}, sizes=(3, 4)
    )
    assert value == 0
    assert not grads["w"].any()


def test_a_partition_must_add_up_to_the_batch():
    w, x, y, weight = linear_problem()
    with pytest.raises(
        ValueError, match=r"\(3, 3\) add up to 6 examples, but the batch holds \{'x': 7"
    ):
        accumulate.exact_loop(
            linear_loss, {"w": w}, {"x": x, "y": y, "weight": weight}, sizes=(3, 3)
        )


def test_the_mlp_is_the_same_function_in_numpy():
    weights = mlp.weights((3, 5, 2), seed=0)
    rng = np.random.default_rng(1)
    batch = {"x": rng.normal(size=(7, 3)), "y": rng.normal(size=(7, 2)), "weight": rng.random(7)}
    hidden = np.tanh(batch["x"] @ weights["w0"] + weights["b0"])
    error = np.sum((hidden @ weights["w1"] + weights["b1"] - batch["y"]) ** 2, axis=-1)
    value, grads = accumulate.exact_loop(mlp.loss, weights, batch, sizes=(3, 3, 1))
    assert value == pytest.approx(np.average(error, weights=batch["weight"]), rel=1e-14)
    assert set(grads) == set(weights)


@pytest.mark.parametrize(
    ("way", "clips_each"), [("full batch", False), ("exact", False), ("naive", True)]
)
def test_training_is_adamw_written_out(way, clips_each):
    w, x, y, weight = linear_problem()
    batches = [{"x": x + i, "y": y, "weight": weight} for i in range(3)]
    rates, options = [0.1, 0.05, 0.2], {"weight_decay": 0.3, "max_norm": 0.5, "eps": 1e-6}
    got = train.train(
        linear_loss, {"w": w}, batches, way=way, sizes=(2, 5), learning_rates=rates, **options
    )
    m, v = np.zeros_like(w), np.zeros_like(w)
    expected = w
    for step, (batch, rate, leaves) in enumerate(zip(batches, rates, got, strict=False), start=1):
        assert normwise(leaves["w"].detach().numpy(), expected) <= 1e-13
        parts = [slice(0, 2), slice(2, 7)] if clips_each else [slice(0, 7)]
        grads = [
            clipped(mean_gradient(expected, {k: leaf[part] for k, leaf in batch.items()}), 0.5)
            for part in parts
        ]
        grad = clipped(np.mean(grads, axis=0), 0.5)
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        update = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-6)
        expected = expected - rate * (update + 0.3 * expected)
    assert normwise(next(got)["w"].detach().numpy(), expected) <= 1e-13


def test_the_oracle_imports_nothing_of_what_it_judges():
    code = (
        "import sys, torch_ref.bert, torch_ref.mlp, torch_ref.toy, torch_ref.train\n"
        "sys.exit(any(name in sys.modules for name in ('jax', 'flax', 'optax', 'jaxaccum')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def linear_problem():
    rng = np.random.default_rng(0)
    return rng.normal(size=3), rng.normal(size=(7, 3)), rng.normal(size=7), rng.random(7) + 0.1


def linear_loss(weights, batch):
    error = batch["x"] @ weights["w"] - batch["y"]
    return (batch["weight"] * error**2).sum(), batch["weight"].sum()


def mean_gradient(w, batch):
    error = batch["x"] @ w - batch["y"]
    return np.average(2 * error[:, None] * batch["x"], axis=0, weights=batch["weight"])


def clipped(grad, limit):
    return grad * min(1.0, limit / np.linalg.norm(grad))


def normwise(a, b) -> float:
    return np.max(np.abs(a - b)) / np.max(np.abs(b))
