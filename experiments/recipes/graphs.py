"""Padded graphs: each microbatch is one; they are stacked, and the loss takes `x[0]`.

Command   python -m experiments.recipes.graphs
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxaccum
from experiments.recipes import _check, _texts

OPT = optax.sgd(0.1)
GRAPHS, NODES, EDGES = 6, 90, 90  # what a microbatch has room for


def graph_of(clause):
    """A clause as a graph: its words with their letters, and an edge from each word to the next."""
    words = clause.lower().split()
    letters = np.array([[float(word.count(chr(97 + i))) for i in range(26)] for word in words])
    return letters, np.arange(len(words) - 1)


def packed(clauses, graphs, nodes, edges):
    """Graphs side by side as one; rows of padding belong to a graph that does not count."""
    made = [graph_of(clause) for clause in clauses]
    sizes = [len(letters) for letters, _ in made]
    starts = np.cumsum([0, *sizes[:-1]])
    senders = np.concatenate(
        [first + start for (_, first), start in zip(made, starts, strict=True)]
    )
    word, owner = np.zeros((nodes, 26)), np.full(nodes, graphs)
    word[: sum(sizes)] = np.concatenate([letters for letters, _ in made])
    owner[: sum(sizes)] = np.repeat(np.arange(len(made)), sizes)
    sender, receiver = np.full(edges, nodes - 1), np.full(edges, nodes - 1)
    sender[: len(senders)], receiver[: len(senders)] = senders, senders + 1
    real = np.arange(graphs) < len(made)
    return jax.tree.map(
        jnp.asarray, {"word": word, "owner": owner, "from": sender, "to": receiver, "real": real}
    )


def errors(params, graph):
    """How far each graph's guess is from its share of words with more than 5 letters."""
    hidden = jnp.tanh(graph["word"] @ params["first"])
    heard = jax.ops.segment_sum(hidden[graph["from"]], graph["to"], len(hidden))
    hidden, count = jnp.tanh((hidden + heard) @ params["second"]), len(graph["real"])
    long = jnp.where(graph["word"].sum(1) > 5, 1.0, 0.0)
    per_graph = lambda x: jax.ops.segment_sum(x, graph["owner"], count + 1)[:count]
    size = jnp.maximum(per_graph(jnp.ones_like(long)), 1.0)
    return ((per_graph(hidden @ params["out"]) - per_graph(long)) / size) ** 2


def plain(params, graph):
    """The training step as anybody would write it."""

    def loss_fn(params, graph):
        error = jnp.where(graph["real"], errors(params, graph), 0.0)
        return jnp.sum(error) / jnp.sum(graph["real"])

    grads = jax.grad(loss_fn)(params, graph)
    updates, _ = OPT.update(grads, OPT.init(params))
    return optax.apply_updates(params, updates)


def accumulated(params, graph):
    """The same step on stacked graphs, one at a time."""

    def loss_fn(params, graph):
        graph = jax.tree.map(lambda x: x[0], graph)
        error = jnp.where(graph["real"], errors(params, graph), 0.0)
        return jaxaccum.Mean(jnp.sum(error), jnp.sum(graph["real"]))

    grads = jaxaccum.grad(loss_fn, microbatch_size=1)(params, graph)
    updates, _ = OPT.update(grads, OPT.init(params))
    return optax.apply_updates(params, updates)


def usual(params, graph):
    """The usual loop: a mean of means, whatever the number of graphs in each."""
    parts = [jax.tree.map(lambda x: x[0], part) for part in _check.parts(graph, 4)]
    return _check.mean([plain(params, part) for part in parts])


def check() -> _check.Errors:
    """One step on 20 graphs: 6, 6, 6 and 2; the full batch is one graph without padding."""
    params = _check.normal(first=(26, 16), second=(16, 16), out=(16,))
    clauses = _texts.clauses()[:20]
    words = sum(len(clause.split()) for clause in clauses)
    groups = [packed(clauses[i : i + GRAPHS], GRAPHS, NODES, EDGES) for i in range(0, 20, GRAPHS)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *groups)
    full = jax.jit(plain)(params, packed(clauses, 20, words, words - 20))
    ours, other = (jax.jit(step)(params, stacked) for step in (accumulated, usual))
    return _check.errors(start=params, full=full, ours=ours, usual=other)


if __name__ == "__main__":
    _check.main(check)
