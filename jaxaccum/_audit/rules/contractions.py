"""Products that sum: matrix products, convolutions, Fourier transforms and linear algebra."""

from __future__ import annotations

from collections.abc import Sequence

from jaxaccum._audit.lattice import FaultKind, Kind, Layout, Value, fixed, rows, statistic, total
from jaxaccum._audit.registry import RULES, rule
from jaxaccum._audit.rules.elementwise import combine, layout_of, origin_of, same_layout
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
    for i, (one, factor) in enumerate((ins, ins[::-1])):
        if factor.fixed:
            return _dot_fixed(walk, op, one, factor, side=i)
    layout = next(
        (
            out
            for i, v in enumerate(ins)
            if v.rows
            for out in [_laid_out(op, v, i)]
            if isinstance(out, Layout)
        ),
        None,
    )
    return walk.couple(op, [v for v in ins if v.summary], layout=layout)


def _dot_fixed(walk: Walk, op: Op, x: Value, factor: Value, *, side: int) -> Value:
    """Linear in x."""
    contracted = op.params["dimension_numbers"][0][side]
    if x.kind is Kind.STATISTIC:
        return combine(walk, op, [x, factor])
    others = [a for a in contracted if x.layout is None or a not in x.layout.axes]
    x = x.scaled(factor.scale * walk.growth(op.shapes(side), others)).but()
    if x.layout is None:
        return x
    out = _laid_out(op, x, side)
    if isinstance(out, Layout):
        return rows(out, terms=x.terms, origin=x.origin)
    return _summed(walk, op, x, complete=out)


def _summed(walk: Walk, op: Op, x: Value, *, complete: bool) -> Value:
    if not complete:
        return statistic(x.origin or walk.site(op))
    for term in x.terms:
        walk.sites.setdefault(term, walk.site(op))
    return total(walk.site(op), x.terms)


def _dot_rows(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """Rows with rows: of the same example where their axes meet, else every example with every
    other."""
    x, y = ins
    (cx, cy), (bx, by) = op.params["dimension_numbers"]
    assert x.layout is not None
    assert y.layout is not None
    pairs = set(zip([*cx, *bx], [*cy, *by], strict=True))
    meet = set(zip(x.layout.axes, y.layout.axes, strict=False)) <= pairs
    alike = x.layout.at() == y.layout.at() and len(x.layout.axes) == len(y.layout.axes)
    if not (meet and alike):
        outs = [
            out for out in (_laid_out(op, x, 0), _laid_out(op, y, 1)) if isinstance(out, Layout)
        ]
        note = "examples are compared with each other, and a microbatch holds only some of them"
        return walk.couple(
            op, ins, kind=FaultKind.PAIRWISE, note=note, layout=outs[0] if outs else None
        )
    growth = walk.growth(op.shapes(), [a for a in cx if a not in x.layout.axes])
    terms = frozenset(s.times(t.scale * growth) for s in x.terms for t in y.terms)
    product = rows(x.layout, terms=terms, origin=origin_of(ins))
    out = _laid_out(op, x, 0)
    if isinstance(out, Layout):
        return rows(out, terms=terms, origin=product.origin)
    return _summed(walk, op, product, complete=out)


def _laid_out(op: Op, x: Value, side: int) -> Layout | bool:
    """Where the rows of an operand lie in the product; where they are summed, whether all of them
    are."""
    contracted = op.params["dimension_numbers"][0][side]
    assert x.layout is not None
    if summed := set(contracted) & set(x.layout.axes):
        return len(summed) == len(x.layout.axes) and not x.layout.looped
    return x.layout.at(*(_dot_axis(op, a, side) for a in x.layout.axes))


def _dot_axis(op: Op, axis: int, side: int) -> int:
    """The axis of the product that an axis of an operand becomes: batched ones, then the left's,
    then the right's."""
    contracted, batched = (dims[side] for dims in op.params["dimension_numbers"])
    if axis in batched:
        return list(batched).index(axis)
    free = [a for a in range(len(op.shapes(side)[0])) if a not in contracted and a not in batched]
    left = len(op.shapes(0)[0]) - len(op.params["dimension_numbers"][0][0]) - len(batched)
    return len(batched) + (left if side else 0) + free.index(axis)


@rule("conv_general_dilated", scales=True)
def convolution(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """Images with kernels: rows where the images are and the kernels are not."""
    x, kernel = ins
    numbers = op.params["dimension_numbers"]
    if all(v.fixed for v in ins):
        return combine(walk, op, ins)
    alone = kernel.fixed and not varying(op.shapes(1)) and op.params["batch_group_count"] == 1
    if not alone or x.kind is Kind.STATISTIC:
        return RULES["*"].apply(walk, op, ins)
    if x.layout is None:
        return x.scaled(kernel.scale).but() if not varying(op.shapes()) else combine(walk, op, ins)
    if x.layout.axes == (numbers.lhs_spec[0],):
        return rows(
            x.layout.at(numbers.out_spec[0]), terms=x.scaled(kernel.scale).terms, origin=x.origin
        )
    if not x.layout.axes:
        return rows(x.layout, terms=x.scaled(kernel.scale).terms, origin=x.origin)
    return RULES["*"].apply(walk, op, ins)


@rule("fft")
def fourier(walk: Walk, op: Op, ins: list[Value]) -> Value:
    """Linear, along the last axes."""
    (x,) = ins
    first = len(op.shapes()[0]) - len(op.params["fft_lengths"])
    if x.layout is not None and any(a >= first for a in x.layout.axes):
        return walk.couple(
            op, ins, note="a Fourier transform along the batch axis", layout=x.layout
        )
    grows = any(a >= first for a in varying(op.shapes())) or x.kind is Kind.STATISTIC
    return combine(walk, op, ins) if grows else x.but()


@rule("""
    cholesky triangular_solve lu qr householder_product svd eigh eig schur hessenberg tridiagonal
    tridiagonal_solve lu_pivots_to_permutation cholesky_update
""")
def linear_algebra(walk: Walk, op: Op, ins: list[Value]) -> Value | list[Value]:
    """Functions of matrices, one for each entry of the leading axes."""
    layout = layout_of(ins)
    matrix = 1 if op.name in ("lu_pivots_to_permutation", "tridiagonal_solve") else 2
    if layout is None or any(v.summary for v in ins) or not same_layout(ins):
        return combine(walk, op, ins)
    if any(a >= len(op.shapes()[0]) - matrix for a in layout.axes):
        return walk.couple(op, ins, note=f"{op.name} of a matrix of examples", layout=None)
    return combine(walk, op, ins)


def batched_alike(ins: Sequence[Value]) -> bool:
    """Whether all rows lie alike and nothing sums over them."""
    return same_layout(list(ins)) and not any(v.summary for v in ins)
