"""The options of the transformations: one list of them, with one meaning, one default and one
message."""

import inspect

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxaccum as ja
import jaxaccum.nnx
from jaxaccum._transforms.options import GradientOptions, LoopOptions
from jaxaccum.testing import collectives
from tests.support.helpers import EXACT, data, normwise, refused

TAKERS = {
    "value_and_grad": (ja.value_and_grad, GradientOptions),
    "grad": (ja.grad, GradientOptions),
    "nnx.value_and_grad": (ja.nnx.value_and_grad, GradientOptions),
    "nnx.grad": (ja.nnx.grad, GradientOptions),
    "microbatch": (ja.microbatch, LoopOptions),
}
OWN = {"example_streams"}
"""Options of one transformation alone."""


def listed(function):
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def drift(function, options):
    """The options in which a signature and the typed dictionary differ."""
    return set(listed(function)) ^ options.__optional_keys__


@pytest.mark.parametrize("name", TAKERS)
def test_a_signature_lists_the_options_of_the_typed_dictionary(name):
    function, options = TAKERS[name]
    assert drift(function, options) <= OWN
    other = LoopOptions if options is GradientOptions else GradientOptions
    assert drift(function, other) >= {"accumulator", "gather"}


@pytest.mark.parametrize("name", [*TAKERS, "plan"])
def test_an_option_has_one_type_and_one_default_everywhere(name):
    function = ja.plan if name == "plan" else TAKERS[name][0]
    of_all, own = listed(ja.value_and_grad), listed(function)
    for option in set(of_all) & set(own) & GradientOptions.__optional_keys__:
        assert own[option].default == of_all[option].default, option
        assert str(own[option].annotation) == str(of_all[option].annotation), option


def test_plan_and_audit_take_what_they_share():
    """They spell their options out: what else is passed by keyword belongs to the loss."""
    assert GradientOptions.__optional_keys__ - set(listed(ja.plan)) == {"audit"}
    assert {"in_axes", "axis_name", "num_microbatches"} <= set(listed(ja.audit))


@pytest.mark.parametrize("name", TAKERS)
def test_a_misspelt_option_is_refused_at_once(name):
    refused(lambda: TAKERS[name][0](jnp.sum, num_microbatch=2), "num_microbatch", error=TypeError)


@pytest.mark.parametrize("name", ["grad", "nnx.value_and_grad", "nnx.grad"])
def test_the_refusal_says_which_option_is_meant(name):
    take = TAKERS[name][0]
    says = f"jaxaccum.{name} has no option", "'num_microbatches'"
    refused(lambda: take(jnp.sum, num_microbatch=2), *says, error=TypeError)
    refused(lambda: take(jnp.sum, zebra=2), "it has accumulator, audit", error=TypeError)


# -- gather, through nnx ---------------------------------------------------------------------------

N, WIDTH = 4, 64
MESH = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))


def laid_out():
    """A model whose kernel is divided as the batch is."""
    model = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    kernel, x = model.kernel.get_value(), data(64, WIDTH, seed=1)
    model.kernel.set_value(jax.device_put(kernel, NamedSharding(MESH, P("data", None))))
    return model, jax.device_put(x, NamedSharding(MESH, P("data"))), kernel, x


def loss(model, x):
    return jnp.mean(jnp.tanh(model(x)) ** 2)


@pytest.mark.optimized
@pytest.mark.parametrize(("gather", "gathers"), [("each", N), ("once", 1)])
def test_nnx_gathers_parameters_when_it_is_told_to(gather, gathers):
    model, rows, kernel, x = laid_out()
    graphdef, state = nnx.split(model)

    def step(state, rows):
        whole = ja.nnx.value_and_grad(loss, num_microbatches=N, gather=gather)
        return whole(nnx.merge(graphdef, state), rows)

    program = jax.jit(step).lower(state, rows).compile()
    value, grads = program(state, rows)
    expected = jax.value_and_grad(lambda w: jnp.mean(jnp.tanh(x @ w) ** 2))(kernel)
    assert normwise((value, grads["kernel"].get_value()), expected) < EXACT
    found = [c for c in collectives(program) if c.kind == "all-gather"]
    assert sum(c.times * c.bytes for c in found) == gathers * kernel.nbytes


def test_nnx_refuses_another_word_for_it():
    model, rows, _, _ = laid_out()
    step = ja.nnx.grad(loss, num_microbatches=N, gather="never")
    refused(lambda: step(model, rows), "gather")
