"""Which einsum equations are products of matrices, however their letters are ordered.

PyTorch's and ONNX's einsum share the notation; what becomes of one is each graph's own affair.
"""

from typing import NamedTuple


class MatrixProduct(NamedTuple):
    """``left`` and ``right`` to ``result``, letters each; every letter is one of ``batch`` (as ``result`` orders it, in all three),
    ``row`` (left and result), ``column`` (right and result) or ``summed`` (left and right)."""

    left: str
    right: str
    result: str
    batch: str
    row: str
    column: str
    summed: str


def matrix_product(equation: str) -> MatrixProduct | None:
    """The equation taken apart; None unless it has two operands, one letter each to sum over, for rows and for columns, no letter
    twice in a term, and no ellipsis."""
    operands, _, result = equation.replace(" ", "").partition("->")
    left, _, right = operands.partition(",")
    terms = (left, right, result)
    if not all(term.isalpha() and len(set(term)) == len(term) for term in terms):
        return None
    batch = "".join(letter for letter in result if letter in left and letter in right)
    row, column, summed = (
        "".join(letter for letter in one if letter in first and letter not in second)
        for one, first, second in ((left, result, right), (right, result, left), (left, right, result))
    )
    complete = set(left) == set(batch + row + summed) and set(right) == set(batch + column + summed)
    if not complete or set(result) != set(batch + row + column) or not len(row) == len(column) == len(summed) == 1:
        return None
    return MatrixProduct(*terms, batch, row, column, summed)
