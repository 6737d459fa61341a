"""Bugs that made the news, in the peers themselves: optax, Accelerate and the Trainer of
transformers.

Each test asserts the peer's wrong number, so that it fails, and can go, on the day the peer is
right.
"""

import contextlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxaccum as ja
from tests.support.helpers import EXACT, normwise

MICROBATCH = optax.microbatching.microbatch
MEAN = optax.microbatching.AccumulationType.MEAN

TOKENS = np.array([[22.0] * 8, [4.0] + [0.0] * 7])
MASK = np.array([[1.0] * 8, [1.0] + [0.0] * 7])
"""Nine tokens, of mean 20: eight of 22 in one microbatch, one of 4 in the other. The mean of means
is 13."""


def linear(w, x):
    return jnp.mean(w * x)


def gradient(x, **options):
    return float(ja.grad(linear, **options)(0.0, jnp.asarray(x)))


@contextlib.contextmanager
def as_peers_run():
    """Warnings are warnings and dtypes promote, as users of the peers have it."""
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("ignore")
        yield


# -- optax -----------------------------------------------------------------------------------------


def steps(multi, gradients):
    """What `multi` adds to a parameter, one number per microbatch, and its state after all of them.

    The parameter has two equal entries: a product of a scalar with 0 or 1 is compiled to a choice,
    and hides NaN.
    """
    gradients = jnp.stack([jnp.asarray(gradients)] * 2, axis=1)
    w, updates = jnp.zeros_like(gradients[0]), []
    state = multi.init(w)
    with as_peers_run():
        for g in gradients:
            update, state = multi.update(g, state, w)
            updates.append(update[0])
    return np.array(updates), state


def test_token_mean():
    """optax.microbatching, HF #24725, trl #2175, levanter #842: the mean of means."""
    peer = lambda w, batch: jnp.sum(w * batch[0] * batch[1]) / jnp.sum(batch[1])
    ours = lambda w, batch: ja.Mean(jnp.sum(w * batch[0] * batch[1]), jnp.sum(batch[1]))
    batch = (jnp.asarray(TOKENS), jnp.asarray(MASK))
    with as_peers_run():
        wrong = MICROBATCH(
            jax.value_and_grad(peer), argnums=1, microbatch_size=1, accumulator=MEAN
        )(1.0, batch)
    assert [float(x) for x in wrong] == [13, 13]
    mean = np.average(TOKENS, weights=MASK)
    assert mean == 20
    assert normwise(ja.value_and_grad(ours, num_microbatches=2)(1.0, batch), (mean, mean)) < EXACT


def test_mean_with_an_early_stop():
    """optax.microbatching divides by all microbatches, also by those that it did not run."""
    x, mask = jnp.ones(4), jnp.arange(4) < 2
    with as_peers_run():
        wrong = MICROBATCH(
            jnp.mean, argnums=0, microbatch_size=1, accumulator=MEAN, num_real_microbatches=2
        )(x)
    assert float(wrong) == 0.5
    fun = lambda batch, count: ja.Mean(jnp.sum(batch[0] * batch[1]), jnp.sum(batch[1]))
    ours = ja.microbatch(fun, in_axes=(0, None), microbatch_size=1, num_examples_argnum=1)
    assert float(ours((x, mask.astype(x.dtype)), 2)) == 1


def test_one_nan_poisons_every_later_window():
    """optax.MultiSteps empties its sum by a multiplication with 0, also a sum that is NaN."""
    batches = np.ones((4, 2))
    batches[0, 1] = np.nan
    updates, _ = steps(optax.MultiSteps(optax.sgd(1.0), 2), batches.reshape(-1))
    assert updates[0] == 0
    assert np.isnan(updates[1:]).all()
    grads = [gradient(x, num_microbatches=2) for x in batches]
    assert np.isnan(grads[0])
    assert grads[1:] == [1, 1, 1]


def test_the_optimizer_runs_once_a_batch():
    """optax.MultiSteps runs it at every microbatch, and multiplies what it returns by 0 or 1."""
    runs = []

    def update(updates, state, params=None):
        jax.debug.callback(lambda: runs.append(1))
        return updates, state

    opt, x = optax.GradientTransformation(lambda params: (), update), np.arange(4.0)
    steps(optax.MultiSteps(opt, 4), x)
    jax.effects_barrier()
    assert len(runs) == 4
    runs.clear()
    opt.update(gradient(x, num_microbatches=4), opt.init(0.0))
    jax.effects_barrier()
    assert len(runs) == 1


def test_a_window_that_is_not_full_changes_no_parameter():
    """optax.MultiSteps: 0 · NaN reaches the parameters before the window ends."""
    updates, state = steps(optax.MultiSteps(optax.sgd(1.0), 4), np.array([np.nan]))
    assert int(state.gradient_step) == 0
    assert np.isnan(updates).all()


def test_extra_arguments_reach_the_optimizer():
    """optax.MultiSteps in a chain drops them; outside of the optimizer there is nothing to drop."""
    polyak, w = optax.polyak_sgd(), jnp.float64(1)
    multi = optax.chain(optax.MultiSteps(polyak, 1).gradient_transformation())
    with as_peers_run(), pytest.raises(TypeError, match="'value'"):
        multi.update(w, multi.init(w), w, value=jnp.float64(0.5))
    value, grad = ja.value_and_grad(lambda w, x: jnp.mean((w * x) ** 2), num_microbatches=2)(
        w, jnp.ones(2)
    )
    with as_peers_run():
        update, _ = optax.chain(polyak).update(grad, optax.chain(polyak).init(w), w, value=value)
    assert float(update) == -0.5  # value / grad² · grad


def test_has_updated_is_wrong_after_a_skip():
    """optax.MultiSteps reads it off two counters, which a skipped microbatch leaves as they
    were."""
    multi = optax.MultiSteps(optax.sgd(1.0), 2, should_skip_update_fn=optax.skip_not_finite)
    updates, state = steps(multi, np.array([1.0, 1.0, np.nan]))
    assert updates.tolist() == [0, -1, 0]
    assert bool(multi.has_updated(state))


def test_float64_is_accumulated_in_float64():
    """optax.MultiSteps keeps its sum in float32: of two equal gradients the first loses its last
    bits."""
    x = np.full(2, 1 + 2.0**-30)
    updates, _ = steps(optax.MultiSteps(optax.sgd(1.0), 2), x)
    assert -updates[-1] - 1 == 2.0**-31
    assert gradient(x, num_microbatches=2) == x[0]


def test_complex_gradients_keep_their_imaginary_part():
    """optax.MultiSteps casts its sum to float32 between microbatches."""
    updates, _ = steps(optax.MultiSteps(optax.sgd(1.0), 2), np.full(2, 1 + 2j))
    assert -updates[-1] == 1 + 1j
    ours = ja.grad(lambda z, x: jnp.mean(jnp.real(z * x)), num_microbatches=2)(
        jnp.complex128(0), jnp.full(2, 1 + 2j)
    )
    assert complex(ours) == 1 + 2j


# -- torch -----------------------------------------------------------------------------------------


def weight(torch):
    """A model of one weight, 0, and an optimizer that subtracts the gradient."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    return model, torch.optim.SGD(model.parameters(), lr=1.0)


def test_a_tail_is_divided_by_its_own_number():
    """Accelerate 1.15, Lightning #19987: three microbatches of a window of four count 3/4."""
    torch, accelerate = pytest.importorskip("torch"), pytest.importorskip("accelerate")
    x = np.array([4.0, 8.0, 12.0])
    with as_peers_run():
        accelerator = accelerate.Accelerator(gradient_accumulation_steps=4, cpu=True)
        model, opt = weight(torch)
        rows = torch.utils.data.DataLoader(
            torch.tensor(x, dtype=torch.float32)[:, None], batch_size=1
        )
        model, opt, rows = accelerator.prepare(model, opt, rows)
        for row in rows:
            with accelerator.accumulate(model):
                accelerator.backward(model(row).mean())
                opt.step()
                opt.zero_grad()
    assert gradient(x, microbatch_size=1) == np.mean(x) == 8
    assert -model.weight.item() == 3 / 4 * np.mean(x)


def train(batches, path, *, num_microbatches, max_steps):
    """The parameter after each step of transformers' Trainer, from 0, at a learning rate of 1."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Model(torch.nn.Module):
        """The mean over the microbatch's own tokens."""

        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(()))

        def forward(self, x, mask):
            return {"loss": (self.w * x * mask).sum() / mask.sum()}

    class Seen(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model, **rest):
            seen.append(model.w.item())

    seen, model = [], Model()
    with as_peers_run():
        args = transformers.TrainingArguments(
            output_dir=path, use_cpu=True, disable_tqdm=True, report_to=[], save_strategy="no",
            logging_strategy="no",
            per_device_train_batch_size=1, gradient_accumulation_steps=num_microbatches,
            max_steps=max_steps,
            learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0,
            remove_unused_columns=False,
        )  # fmt: skip
        opt = torch.optim.SGD(model.parameters(), lr=1.0)
        transformers.Trainer(
            model, args, train_dataset=batches(torch), optimizers=(opt, None), callbacks=[Seen()]
        ).train()
    return seen


def examples(torch, x, mask):
    float32 = lambda rows: torch.tensor(rows, dtype=torch.float32)
    return [{"x": float32(a), "mask": float32(b)} for a, b in zip(x, mask, strict=True)]


def test_token_mean_in_the_trainer(tmp_path):
    """HF #24725, for a model that does not divide by the number of items: 13 for 20."""
    seen = train(
        lambda torch: examples(torch, TOKENS, MASK), tmp_path, num_microbatches=2, max_steps=1
    )
    assert seen == [-13]


def test_a_tail_stays_in_its_epoch(tmp_path):
    """HF Trainer, length-less data: the third microbatch makes no step, and is added to the next
    epoch's first two."""
    x = np.array([[2.0], [4.0], [100.0]])

    def stream(torch):
        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                return iter(examples(torch, x, np.ones_like(x)))

        return Stream()

    first, second = train(stream, tmp_path, num_microbatches=2, max_steps=2)
    window, tail = float(np.mean(x[:2])), float(x[2, 0])
    assert -first == window
    assert first - second == tail + window
    assert [gradient(batch, num_microbatches=len(batch)) for batch in (x[:2, 0], x[2:, 0])] == [
        window,
        tail,
    ]
