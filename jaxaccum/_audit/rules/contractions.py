"""Products that sum: matrix products, convolutions, Fourier transforms and linear algebra."""

from __future__ import annotations

from jaxaccum._audit.lattice import FaultKind, Kind, Layout, Value, fixed, origin_of, rows
from jaxaccum._audit.registry import RULES, rule
from jaxaccum._audit.rules.elementwise import combine
from jaxaccum._audit.rules.operands import (
    all_fixed,
    any_summary,
    axes_except,
    layout_of,
    products,
    relocated,
    same_layout,
    summaries_among,
    summed,
    without_examples,
)
from jaxaccum._audit.walk import Op, Walk, varying


@rule("dot_general", uniform=True, scales=True)
def dot_general(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """A product summed over the contracted axes."""
    x, y = ins
    (contracted, _), _ = op.params["dimension_numbers"]
    if x.fixed and y.fixed:
        return fixed(x.scale * y.scale * walk.growth(op.shapes(), contracted))
    if x.rows and y.rows:
        return _dot_rows(walk, op, ins)
    if y.fixed:
        return _dot_fixed(walk, op, x, y, side=0)
    if x.fixed:
        return _dot_fixed(walk, op, y, x, side=1)
    return walk.couple(op, summaries_among(ins), layout=_laid_out(op, ins))


def _dot_fixed(walk: Walk, op: Op, x: Value, factor: Value, *, side: int) -> Value:
    """Linear in x."""
    contracted = op.params["dimension_numbers"][0][side]
    if x.kind is Kind.STATISTIC:
        return combine(walk, op, [x, factor])
    growth = walk.growth(op.shapes(side), without_examples(contracted, x))
    x = x.scaled(factor.scale * growth).but()
    return x if x.layout is None else _product(walk, op, x, side)


def _product(walk: Walk, op: Op, x: Value, side: int) -> Value:
    """Rows of an operand in the product: summed, where their axes are contracted."""
    layout = _laid_out_alone(op, x, side)
    if layout is None:
        return summed(walk, op, x, op.params["dimension_numbers"][0][side])
    return rows(layout, terms=x.terms, origin=x.origin)


def _dot_rows(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """Rows with rows: of the same example where their axes meet, else all with all others."""
    x, y = ins
    (cx, cy), (bx, by) = op.params["dimension_numbers"]
    assert x.layout is not None
    partner = dict(zip([*cx, *bx], [*cy, *by], strict=True))
    if y.layout != relocated(x.layout, lambda axis: partner.get(axis, -1)):
        note = "examples are compared with each other, and a microbatch holds only some of them"
        layout = _laid_out(op, ins)
        return walk.couple(op, ins, kind=FaultKind.PAIRWISE, note=note, layout=layout)
    growth = walk.growth(op.shapes(), without_examples(cx, x))
    terms = products(x.scaled(growth).terms, y.terms)
    return _product(walk, op, rows(x.layout, terms=terms, origin=origin_of(ins)), 0)


def _laid_out(op: Op, ins: list[Value]) -> Layout | None:
    """Where the rows of an operand lie in the product: those of the first that keeps them."""
    x, y = ins
    return _laid_out_alone(op, x, 0) or _laid_out_alone(op, y, 1)


def _laid_out_alone(op: Op, x: Value, side: int) -> Layout | None:
    """Where the rows of one operand lie in the product; None where they are summed."""
    contracted = op.params["dimension_numbers"][0][side]
    if not x.rows or x.layout is None or set(contracted) & set(x.layout.axes):
        return None
    return relocated(x.layout, lambda axis: _dot_axis(op, axis, side))


def _dot_axis(op: Op, axis: int, side: int) -> int:
    """The axis of the product that an operand's becomes: batched, then the left's, the right's."""
    contracted, batched = op.params["dimension_numbers"]
    if axis in batched[side]:
        return list(batched[side]).index(axis)
    gone = {*contracted[side], *batched[side]}
    free = axes_except(range(len(op.shapes(side)[0])), gone)
    before = len(op.shapes(0)[0]) - len(contracted[0]) if side else len(batched[side])
    return before + free.index(axis)


@rule("conv_general_dilated", scales=True)
def convolution(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """Images with kernels: rows where the images are and the kernels are not."""
    x, kernel = ins
    numbers = op.params["dimension_numbers"]
    if all_fixed(ins):
        return combine(walk, op, ins)
    alone = kernel.fixed and not varying(op.shapes(1)) and op.params["batch_group_count"] == 1
    if not alone or x.kind is Kind.STATISTIC:
        return RULES["*"].apply(walk, op, ins)
    scaled = x.scaled(kernel.scale)
    if x.layout is None:
        return combine(walk, op, ins) if varying(op.shapes()) else scaled.but()
    if x.layout.axes == (numbers.lhs_spec[0],):
        return rows(x.layout.at(numbers.out_spec[0]), terms=scaled.terms, origin=x.origin)
    if not x.layout.axes:
        return rows(x.layout, terms=scaled.terms, origin=x.origin)
    return RULES["*"].apply(walk, op, ins)


@rule("fft")
def fourier(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """Linear, along the last axes."""
    (x,) = ins
    ndim = len(op.shapes()[0])
    transformed = set(range(ndim - len(op.params["fft_lengths"]), ndim))
    if x.layout is not None and transformed & set(x.layout.axes):
        note = "a Fourier transform along the batch axis"
        return walk.couple(op, ins, note=note, layout=x.layout)
    if x.kind is Kind.STATISTIC or transformed & set(varying(op.shapes())):
        return combine(walk, op, ins)
    return x.but()


@rule("""
    cholesky triangular_solve lu qr householder_product svd eigh eig schur hessenberg tridiagonal
    tridiagonal_solve lu_pivots_to_permutation cholesky_update
""")
def linear_algebra(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """Functions of matrices, one for each entry of the leading axes, or for each column."""
    layout = layout_of(ins)
    of_vectors = op.name in ("lu_pivots_to_permutation", "tridiagonal_solve")
    batched = len(op.shapes()[0]) - (1 if of_vectors else 2)
    if layout is None or any_summary(ins) or not same_layout(ins):
        return combine(walk, op, ins)
    if max(layout.axes, default=-1) >= batched and not _right_sides_alone(op):
        return walk.couple(op, ins, note=f"{op.name} of a matrix of examples")
    return combine(walk, op, ins)


def _right_sides_alone(op: Op) -> bool:
    """Whether examples can only be right-hand sides, each for itself, since no matrix grows."""
    return op.name in ("triangular_solve", "tridiagonal_solve") and not varying(op.shapes())
