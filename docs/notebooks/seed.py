# %% [markdown]
"""
# Does gradient accumulation give the full batch's gradient?

Gradient accumulation trains with a batch that does not fit: it computes the gradients of
microbatches one after another, adds them, and lets the optimizer step once. For one weight the
sum is strictly the gradient of the whole batch. For BERT it is not, and BatchNorm is said not to
work with it at all. This notebook shows why, and that it need not be so.

It runs as it is on a CPU, a GPU or a TPU, in a minute.
"""

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxaccum

jax.config.update("jax_default_matmul_precision", "highest")  # float32 on every device
ROUNDING = 1000 * float(jnp.finfo(jnp.float32).eps)  # a thousand roundings of float32
RED, BLUE = "#D55E00", "#0072B2"


def apart(actual, expected):
    """The largest difference of two pytrees, over the largest expected entry."""
    gaps = jax.tree.map(lambda a, e: jnp.max(jnp.abs(a - e)), actual, expected)
    sizes = jax.tree.map(lambda e: jnp.max(jnp.abs(e)), expected)
    return float(max(jax.tree.leaves(gaps)) / max(jax.tree.leaves(sizes)))


# %% [markdown]
"""
## One weight: the same bits

The model is ŷ = w·x with w = 1, the data are y = 2·x for x = 4 and x = 2, the loss is the mean of
(y − ŷ)². The first loop is the usual one: it divides each loss by 2 and adds the gradients. The
second is `jaxaccum`, which takes the loss and the number of microbatches. The third is the whole
batch in one pass. All numbers here are small integers over powers of 2, so nothing is rounded.
"""


# %%
def mean_error(w, x):
    """The mean of (y − ŷ)²."""
    return jnp.mean((2 * x - w * x) ** 2)


one_weight, both = jnp.float32(1), jnp.array([4.0, 2.0], jnp.float32)
by_hand = [jnp.float32(0)]
for x in both:
    by_hand.append(by_hand[-1] + jax.grad(mean_error)(one_weight, x) / 2)
gradients = {
    "a loop": by_hand[-1],
    "jaxaccum": jaxaccum.grad(mean_error, num_microbatches=2)(one_weight, both),
    "one batch": jax.grad(mean_error)(one_weight, both),
}
stepped = {name: one_weight - jnp.float32(0.01) * gradient for name, gradient in gradients.items()}
for name in gradients:
    print(f"{name:<10} gradient {gradients[name]:g}, weight {stepped[name]:g}")
bits = np.float32(-20).tobytes()
assert all(np.asarray(gradient).tobytes() == bits for gradient in gradients.values())

figure, panel = plt.subplots(figsize=(5, 3), layout="constrained")
panel.plot(["start", "x = 4", "x = 2"], by_hand, "o-", color=RED, label="a loop")
panel.axhline(gradients["one batch"], color=BLUE, label="one batch, and jaxaccum")
panel.set(xlabel="after", ylabel="accumulated gradient")
panel.legend(frameon=False)

# %% [markdown]
r"""
## A masked mean: another gradient

A language model's loss is a mean over tokens, and texts have different lengths. Here the model is
the smallest one: a table with the scores of the next character, learned from lines of numpy's
documentation. The usual loop averages the microbatches' means:

$$\frac{1}{N} \sum_i \frac{T_i}{W_i} \quad\text{instead of}\quad
\frac{\sum_i T_i}{\sum_i W_i},$$

where $T_i$ is microbatch i's sum over its characters and $W_i$ their number. A character of a
short text then counts more than one of a long text. With `jaxaccum.Mean(total, weight)` the loss
hands over both sums, undivided.
"""

# %%
lines = [line.strip() for line in (np.__doc__ + np.einsum.__doc__).splitlines()]
lines = [line for line in lines if len(line) > 1]  # a character and the one after it
padded = np.zeros((len(lines), 64), np.int32)
for row, line in zip(padded, lines, strict=True):
    row[: len(line)] = [ord(character) % 128 for character in line[:64]]
texts = {"now": padded[:, :-1], "next": padded[:, 1:], "mask": np.float32(padded[:, 1:] > 0)}


def sums(w, batch):
    """The sum of the characters' cross entropies, and their number."""
    log_probs = jax.nn.log_softmax(w[batch["now"]])
    chosen = jnp.take_along_axis(log_probs, batch["next"][..., None], axis=-1)[..., 0]
    return -jnp.sum(chosen * batch["mask"]), jnp.sum(batch["mask"])


def own_mean(w, batch):
    """A mean over the characters at hand."""
    total, weight = sums(w, batch)
    return total / weight


def batch_mean(w, batch):
    """A mean over the characters of the whole batch."""
    total, weight = sums(w, batch)
    return jaxaccum.Mean(total, weight)


def parts(batch, n=4):
    """The n microbatches of a batch."""
    return [jax.tree.map(lambda leaf, i=i: jnp.split(leaf, n)[i], batch) for i in range(n)]


def usual(loss, params, batch, n=4):
    """The mean of the microbatches' gradients."""
    gradient = jax.jit(jax.grad(loss))
    grads = [gradient(params, part) for part in parts(batch, n)]
    return jax.tree.map(lambda *leaves: sum(leaves) / n, *grads)


table = jnp.zeros((128, 128), jnp.float32)
batches = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 8], texts) for i in range(0, 160, 8)]
whole = jax.grad(own_mean)(table, batches[0])
averaged = usual(own_mean, table, batches[0])
ours = jaxaccum.grad(batch_mean, num_microbatches=4)(table, batches[0])
print(f"gradient error: usual {apart(averaged, whole):.2g}, jaxaccum {apart(ours, whole):.1g}")
assert apart(ours, whole) < ROUNDING < apart(averaged, whole) / 10

figure, panel = plt.subplots(figsize=(5, 3), layout="constrained")
index = np.arange(4)
counts = [float(jnp.sum(part["mask"])) for part in parts(batches[0])]
panel.bar(index - 0.2, 1 / (4 * np.array(counts)), width=0.4, color=RED, label="usual: 1 / 4 Wᵢ")
panel.bar(index + 0.2, [1 / sum(counts)] * 4, width=0.4, color=BLUE, label="one batch: 1 / ΣW")
panel.set(xlabel="microbatch", ylabel="what a character counts", xticks=index)
panel.legend(frameon=False)

# %% [markdown]
"""
## Five causes

With dropout, clipping and a schedule, five things set the usual loop apart from the whole batch:

1. **keys**: each microbatch draws its dropout from a key of its own, so that the masks depend on
   the partition. One key per example (`EXAMPLE_KEY`) does not.
2. **weighting**: the mean of means, as above.
3. **clipping** each microbatch's gradient, not the batch's.
4. **schedule**: the learning rate moves with every microbatch, so N times too fast.
5. **rounding**: the same sum in another order.

The loop below has the first four as switches. Each is turned on alone, for 20 steps of Adam; the
fifth is what is left in `jaxaccum`. The picture shows how far the table ends from the one that the
whole batch trains.
"""


# %%
def sums_with_dropout(w, batch, keys):
    """The sums of texts whose scores are dropped, by one key per text."""
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.9, (63, 128)))(keys)
    log_probs = jax.nn.log_softmax(jnp.where(kept, w[batch["now"]], 0))
    chosen = jnp.take_along_axis(log_probs, batch["next"][..., None], axis=-1)[..., 0]
    return -jnp.sum(chosen * batch["mask"]), jnp.sum(batch["mask"])


def tagged(w, batch, keys):
    """The same for jaxaccum."""
    return jaxaccum.Mean(*sums_with_dropout(w, batch, keys))


def clipped(grads):
    """At most of norm 0.1."""
    return grads / jnp.maximum(jnp.linalg.norm(grads) / 0.1, 1)


summed = jax.jit(jax.grad(lambda *args: sums_with_dropout(*args)[0]))
in_axes = (None, 0, jaxaccum.EXAMPLE_KEY)
exact = jax.jit(jaxaccum.grad(tagged, num_microbatches=4, in_axes=in_axes))
rate = optax.cosine_decay_schedule(0.1, 20)
adam = optax.scale_by_adam()


def one_pass(w, batch, key):
    """The whole batch's gradient."""
    return summed(w, batch, jax.random.split(key, 8)) / jnp.sum(batch["mask"])


def loop(causes):
    """A loop over microbatches of two texts, with some of the causes."""

    def gradient(w, batch, key):
        total, keys = 0, jax.random.split(key, 8).reshape(4, 2)
        for i, part in enumerate(parts(batch)):
            own_keys = jax.random.split(jax.random.fold_in(key, i), 2)
            grads = summed(w, part, own_keys if "keys" in causes else keys[i])
            share = jnp.sum(batch["mask"]) / 4
            grads = grads / (jnp.sum(part["mask"]) if "weighting" in causes else share)
            total += clipped(grads) if "clipping" in causes else grads
        return total / 4

    return gradient


def trained(gradient, ticks=1):
    """The table after 20 steps; the schedule advances `ticks` times in each."""
    w, state = table, adam.init(table)
    for step in range(20):
        key = jax.random.fold_in(jax.random.key(0), step)
        grads = clipped(gradient(w, batches[step % len(batches)], key))
        updates, state = adam.update(grads, state)
        w = w - rate(step * ticks) * updates
    return w


reference = trained(one_pass)
ends = {
    "keys": trained(loop({"keys"})),
    "weighting": trained(loop({"weighting"})),
    "clipping": trained(loop({"clipping"})),
    "schedule": trained(loop(set()), ticks=4),
    "all: the usual loop": trained(loop({"keys", "weighting", "clipping"}), ticks=4),
    "none: jaxaccum": trained(exact),
}
differences = {name: apart(end, reference) for name, end in ends.items()}
for name, difference in differences.items():
    print(f"{name:<20} {difference:.1e}")
rounding = differences["none: jaxaccum"]
assert rounding < ROUNDING
assert all(value > 100 * rounding for name, value in differences.items() if "jaxaccum" not in name)

figure, panel = plt.subplots(figsize=(6, 3), layout="constrained")
panel.barh(list(differences), list(differences.values()), color=[RED] * 5 + [BLUE])
panel.set(xscale="log", xlabel="difference from the whole batch after 20 steps")
panel.invert_yaxis()

# %% [markdown]
"""
## BatchNorm: exact

BatchNorm's statistics are those of the batch. The usual loop normalizes each microbatch by its own,
which is another function of the parameters. But a mean over the batch is a sum over microbatches,
and `jaxaccum` runs these under an axis named `"microbatch"`, as `pmap` runs devices. So Flax's own
layer needs one argument, the one that it has for devices: `axis_name="microbatch"`. The network
reads handwritten digits.
"""


# %%
class Network(nn.Module):
    """A hidden layer with BatchNorm."""

    axis_name: str | None

    @nn.compact
    def __call__(self, x):
        """The scores of ten digits."""
        x = nn.Dense(32)(x)
        x = nn.BatchNorm(use_running_average=False, axis_name=self.axis_name)(x)
        return nn.Dense(10)(nn.relu(x))


def digit_loss(axis_name):
    """The mean cross entropy, with statistics over the named axis or over the images at hand."""

    def loss(params, batch):
        network = Network(axis_name)
        scores, _ = network.apply({"params": params}, batch["x"], mutable=["batch_stats"])
        errors = optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"])
        return jnp.mean(errors)

    return loss


images, labels = load_digits(return_X_y=True)
digits = {"x": jnp.float32(images[:32] / 16), "y": jnp.int32(labels[:32])}
params = Network(None).init(jax.random.key(0), digits["x"])["params"]
whole = jax.grad(digit_loss(None))(params, digits)

sizes, errors = [1, 4, 16], {"usual": [], "jaxaccum": []}
for size in sizes:
    own = usual(digit_loss(None), params, digits, 32 // size)
    ours = jaxaccum.grad(digit_loss("microbatch"), microbatch_size=size)(params, digits)
    errors["usual"].append(apart(own, whole))
    errors["jaxaccum"].append(apart(ours, whole))
print({name: [f"{error:.1e}" for error in row] for name, row in errors.items()})
assert max(errors["jaxaccum"]) < ROUNDING < min(errors["usual"]) / 10

figure, panel = plt.subplots(figsize=(5, 3), layout="constrained")
panel.plot(sizes, errors["usual"], "o-", color=RED, label="usual: BatchNorm")
panel.plot(sizes, errors["jaxaccum"], "s-", color=BLUE, label='axis_name="microbatch"')
panel.set(xscale="log", yscale="log", xticks=sizes, xticklabels=sizes)
panel.set(xlabel="microbatch size (batch 32)", ylabel="gradient error")
panel.legend(frameon=False)

# %% [markdown]
"""
## Which loss is mine?

`jaxaccum` reads a loss while it is traced, and warns of one that does not accumulate exactly.
Before any training, `jaxaccum.audit` names the line and says what to write. It finds both losses
that went wrong above:
"""

# %%
for loss, args in (own_mean, (table, batches[0])), (digit_loss(None), (params, digits)):
    report = jaxaccum.audit(loss, *args)
    print(report, end="\n\n")
    assert not report.exact
assert jaxaccum.audit(batch_mean, table, batches[0]).exact
assert jaxaccum.audit(digit_loss("microbatch"), params, digits).exact
