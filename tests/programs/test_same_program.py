"""Which programs compute the same, and which do not.

The oracle is how the pairs are made: by the same function in another order, or by another one.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.interpreters import ad

from jaxaccum._jaxpr.equations import constants_first
from jaxaccum._jaxpr.same_program import compute_the_same
from tests.support.helpers import data

X = data(2, 3)


def add(*xs):
    return functools.reduce(ad.add_jaxvals, xs)  # as JAX adds cotangents


def shown(x, *values):
    for value in values:
        jax.debug.print("{}", value)
    return x


def called(f, x):
    return jax.pure_callback(f, jax.typeof(x), x)


def twice(f):
    return lambda z: np.asarray(f(z)) * 2


@dataclasses.dataclass(frozen=True)
class Adder:
    number: float

    def add(self, z):
        return z + self.number


def with_number(n):
    def f(z):
        return z + f.number

    f.number = n
    return f


def with_default(n):
    return lambda z, number=n: z + number


def with_keyword(n):
    def f(z, *, number=n):
        return z + number

    return f


class Trainer:
    """It holds a function that holds it, and it is never equal to another one."""

    def __init__(self):
        self.hooks = [self.hook]

    def hook(self, z):
        return z


class Ambiguous:
    """It has no hash, and comparing it gives an array."""

    __hash__ = None

    def __eq__(self, other):
        return np.zeros(2)


@dataclasses.dataclass(eq=False)
class Hidden:
    """Its state is no field."""

    def __post_init__(self):
        self.number = next(NUMBERS)

    def __call__(self, z):
        return z + self.number


NUMBERS = itertools.count()


def unbound(z):
    """A function that closes over a variable without a value."""

    def f(z):
        return z if True else later

    if z is None:
        later = 1
    return f


def counts_itself(n):
    def f(z):
        return z if n == 0 else f(z) * n

    return f


def kernel(block, out):
    out[...] = block[...]


def by_kernel(index):
    def f(x):
        row = pl.BlockSpec((1, 3), index)
        options = {"grid": (2,), "in_specs": [row], "out_specs": row, "interpret": True}
        return pl.pallas_call(kernel, jax.ShapeDtypeStruct(x.shape, x.dtype), **options)(x)

    return f


def cosine_first(x):
    b = jnp.cos(x)
    return jnp.sin(x) * b


TABLE, OTHER_TABLE = data(2, 3, seed=1), data(2, 3, seed=2)
TRAINER, AMBIGUOUS = Trainer(), Ambiguous()


def in_other_setting(f):
    def g(x):
        with jax.threefry_partitionable(not jax.config.jax_threefry_partitionable):
            return f(x)

    return g


SAME = {
    "order": (lambda x: jnp.sin(x) * jnp.cos(x), cosine_first),
    "the order of cotangents": (
        lambda x: add(add(x, jnp.sin(x)), jnp.cos(x)),
        lambda x: add(x, add(jnp.cos(x), jnp.sin(x))),
    ),
    "a call": (lambda x: jax.jit(jnp.sin)(x), jnp.sin),
    "a checkpoint": (lambda x: jax.checkpoint(jnp.sin)(x), jnp.sin),
    "what is dropped": (lambda x: [jnp.cos(x), jnp.sin(x)][1], jnp.sin),
    "constants": (lambda x: x * np.asarray(TABLE), lambda x: x * np.array(TABLE)),
    "an array of JAX": (lambda x: x * TABLE, lambda x: x * TABLE),
    "two arrays of JAX": (lambda x: x * TABLE, lambda x: x * jnp.array(np.asarray(TABLE))),
    "loops": tuple(lambda x, f=f: lax.map(f, x) for f in (cosine_first, lambda x: cosine_first(x))),
    "branches": tuple(
        lambda x, f=f: lax.cond(x[0, 0] > 0, f, jnp.sin, x) for f in (jnp.cos, lambda x: jnp.cos(x))
    ),
    "prints": (lambda x: shown(x, x, -x), lambda x: shown(x, x, -x)),
    "functions": tuple(lambda x: called(twice(np.sin), x) for _ in range(2)),
    "functions with arguments": tuple(
        lambda x, f=f: called(f, x)
        for f in (functools.partial(np.add, 1.0), functools.partial(np.add, 1.0))
    ),
    "functions that close over themselves": tuple(
        lambda x: called(counts_itself(2), x) for _ in range(2)
    ),
    "functions with an unbound variable": tuple(lambda x: called(unbound(1), x) for _ in range(2)),
    "an object that holds itself": tuple(lambda x, f=TRAINER.hook: called(f, x) for _ in range(2)),
    "an object without a hash": tuple(
        lambda x, f=AMBIGUOUS: called(with_default(f), x) for _ in range(2)
    ),
    "methods": tuple(lambda x, f=f: called(f, x) for f in (Adder(1.0).add, Adder(1.0).add)),
    "kernels": tuple(by_kernel(lambda i: (i, np.int32(0))) for _ in range(2)),
}
OTHER = {
    "a primitive": (jnp.sin, jnp.cos),
    "an operand": (lambda x: x - jnp.sin(x), lambda x: jnp.sin(x) - x),
    "the order of a sum": (lambda x: (x + jnp.sin(x)) + 1.0, lambda x: x + (jnp.sin(x) + 1.0)),
    "how often": (lambda x: add(x, add(x, x)), lambda x: add(x, x)),
    "a parameter": (lambda x: jnp.sum(x, 0), lambda x: jnp.sum(x, 1)),
    "a literal": (lambda x: x * 0.0, lambda x: x * -0.0),
    "a constant": (lambda x: x * np.asarray(TABLE), lambda x: x * np.asarray(OTHER_TABLE)),
    "an array of JAX": (lambda x: x * TABLE, lambda x: x * OTHER_TABLE),
    "which constant": (
        lambda x: x * np.asarray(TABLE) - np.asarray(OTHER_TABLE),
        lambda x: x * np.asarray(OTHER_TABLE) - np.asarray(TABLE),
    ),
    "a loop": tuple(lambda x, f=f: lax.map(f, x) for f in (jnp.sin, jnp.cos)),
    "a precision": tuple(
        lambda x, p=p: jnp.matmul(x, x.T, precision=p) for p in ("highest", "default")
    ),
    "the order of prints": (lambda x: shown(x, x, -x), lambda x: shown(x, -x, x)),
    "a print": (lambda x: shown(x, x), lambda x: x),
    "a function": tuple(lambda x, f=f: called(twice(f), x) for f in (np.sin, np.cos)),
    "a function that closes over itself": tuple(
        lambda x, n=n: called(counts_itself(n), x) for n in (1, 2)
    ),
    "an argument": tuple(
        lambda x, f=f: called(f, x)
        for f in (functools.partial(np.add, 1.0), functools.partial(np.add, 2.0))
    ),
    "a setting": (jnp.sin, in_other_setting(jnp.sin)),
    "a default": tuple(lambda x, n=n: called(with_default(n), x) for n in (1.0, 2.0)),
    "a keyword": tuple(lambda x, n=n: called(with_keyword(n), x) for n in (1.0, 2.0)),
    "an attribute": tuple(lambda x, n=n: called(with_number(n), x) for n in (1.0, 2.0)),
    "the sign of zero": tuple(
        lambda x, n=n: called(with_default(np.float32(n)), x) for n in (0.0, -0.0)
    ),
    "hidden state": tuple(lambda x: called(Hidden(), x) for _ in range(2)),
    "objects without a hash": tuple(
        lambda x: called(with_default(Ambiguous()), x) for _ in range(2)
    ),
    "an object": tuple(lambda x, f=f: called(f, x) for f in (Adder(1.0).add, Adder(2.0).add)),
    "a result": (lambda x: (x, -x), lambda x: (-x, x)),
    "a kernel": (by_kernel(lambda i: (i, np.int32(0))), by_kernel(lambda i: (1 - i, np.int32(0)))),
}


def program(f):
    return constants_first(jax.make_jaxpr(f)(X))


@pytest.mark.parametrize("name", SAME)
def test_programs_that_compute_the_same(name):
    one, other = map(program, SAME[name])
    assert compute_the_same(one, other, one)


@pytest.mark.parametrize("name", OTHER)
def test_programs_that_do_not(name):
    one, other = map(program, OTHER[name])
    assert not compute_the_same(one, other)
    assert not compute_the_same(one, one, other)
    assert compute_the_same(one, one)


def test_other_types_are_other_programs():
    assert not compute_the_same(program(jnp.sin), constants_first(jax.make_jaxpr(jnp.sin)(X[0])))


def test_values_of_an_outer_trace_are_told_by_themselves():
    def outer(x, y):
        same, other = program(lambda z: z * x), program(lambda z: z * y)
        assert compute_the_same(same, program(lambda z: z * x))
        assert not compute_the_same(same, other)
        return x

    jax.jit(outer)(X, X)
