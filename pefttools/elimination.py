"""Row elimination with every step kept: the way to find a rank by hand.

Three operations change a matrix without changing which rows it can combine: exchange two rows, multiply a row by a
number other than 0, subtract a multiple of one row from another. With them everything below each row's first non-zero
entry (its *pivot*) becomes 0. The rows that are left are independent, and there are rank(A) of them.

    ⎡1 2 3⎤   R2 ← R2 − 2·R1   ⎡1  2  3⎤               ⎡1  2  3⎤  ◄ pivot in column 0
    ⎢2 4 6⎥   R3 ← R3 − R1     ⎢0  0  0⎥    R2 ↔ R3    ⎢0 −1 −2⎥  ◄ pivot in column 1
    ⎣1 1 1⎦   ────────────►    ⎣0 −1 −2⎦   ────────►   ⎣0  0  0⎦     two pivots: the rank is 2

In the reduced form every pivot is 1 and stands alone in its column; each matrix has exactly one. Above: [1 0 −1],
[0 1 2], [0 0 0]. Golub & Van Loan, Matrix Computations, §3.2 (elimination) and §3.4 (pivoting).
"""
from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

Number = Fraction | float
Matrix = tuple[tuple[Number, ...], ...]


@dataclass(frozen=True)
class Step:
    """One row operation, rows counted from 1 as on paper, and the matrix [m][n] after it."""

    operation: str                 # "R2 ← R2 − 3·R1", "R1 ↔ R2", "R3 ← R3 / 5"
    matrix: Matrix

    def __str__(self) -> str:
        cells = [[_show(x) for x in row] for row in self.matrix]
        widths = [max(map(len, column)) for column in zip(*cells)]
        rows = ("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in cells)
        return "\n".join([self.operation, *(f"  [ {row} ]" for row in rows)])


@dataclass(frozen=True)
class Echelon:
    """What `row_echelon` returns; `print(it)` shows the whole way."""

    steps: tuple[Step, ...]        # the first is A itself, with the operation "A"
    pivots: tuple[int, ...]        # the pivots' columns, counted from 0; row i has the i-th
    tolerance: Number              # an entry no larger than this counted as 0 (0 in exact arithmetic)

    @property
    def matrix(self) -> Matrix:
        """The echelon form [m][n]."""
        return self.steps[-1].matrix

    @property
    def rank(self) -> int:
        """How many rows are not all zero."""
        return len(self.pivots)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.steps), f"rank {self.rank}"])


def row_echelon(A: Any, reduced: bool = False, tol: float | None = None) -> Echelon:
    """Bring A [m, n] into (reduced) row echelon form, and keep every step.

    A is nested lists, a torch tensor or a numpy array. Whole numbers and Fractions are calculated with exactly, and
    rows change places only where a pivot is 0. If any entry is a float, all are: then the largest entry of the column
    becomes the pivot (partial pivoting, which keeps every factor ≤ 1), the arithmetic is float64, and a pivot of at
    most `tol` counts as 0; by default tol = max|A| · max(m, n) · ε, with ε of A's dtype (float32's for 16-bit ones,
    float64's for lists). Such a rank can be wrong for a badly scaled matrix; `pefttools.rank.matrix_rank` is the
    sound one. `tol` with exact entries raises ValueError, as do NaN, infinity, rows of unequal length and anything
    that is not a matrix; entries that are not real numbers raise TypeError. Steps share their unchanged rows: m·n
    steps cost about m·n·(m + n) numbers of memory, so keep m and n below a few hundred.
    """
    rows, epsilon = _read(A)
    m, n, exact = len(rows), len(rows[0]), epsilon == 0
    if exact and tol is not None:
        raise ValueError(f"tol is for floats, and A has whole numbers or Fractions only, where 0 is 0; "
                         f"got tol={tol!r}. Leave it out, or pass A as floats.")
    if tol is not None and not (isinstance(tol, numbers.Real) and tol >= 0 and math.isfinite(tol)):
        raise ValueError(f"tol must be a finite number ≥ 0; got {tol!r}.")
    limit = max(abs(x) for row in rows for x in row) * (max(m, n) * epsilon) if tol is None else tol
    zero = Fraction(0) if exact else 0.0                 # added to a result, it turns the float −0.0 into 0.0

    steps, pivots = [Step("A", tuple(rows))], []

    def record(operation: str) -> None:
        steps.append(Step(operation, tuple(rows)))

    def subtract(target: int, source: int, column: int) -> None:
        factor = rows[target][column] / rows[source][column]
        new = [a - factor * b for a, b in zip(rows[target], rows[source])]
        new[column] = zero                               # exactly: in floats the subtraction may leave a crumb
        rows[target] = tuple(new)
        sign, times = ("−", _times(factor)) if factor > 0 else ("+", _times(-factor))
        record(f"R{target + 1} ← R{target + 1} {sign} {times}R{source + 1}")

    for column in range(n):
        top = len(pivots)                                # the row that waits for a pivot
        below = [i for i in range(top, m) if abs(rows[i][column]) > limit]
        if not below:
            if any(rows[i][column] for i in range(top, m)):
                rows[top:] = [(*row[:column], zero, *row[column + 1:]) for row in rows[top:]]
                record(f"column {column + 1}: what is left from R{top + 1} down is within the tolerance; it becomes 0")
            continue
        chosen = below[0] if exact else max(below, key=lambda i: abs(rows[i][column]))
        if chosen != top:
            rows[top], rows[chosen] = rows[chosen], rows[top]
            record(f"R{top + 1} ↔ R{chosen + 1}")
        pivots.append(column)
        for i in range(top + 1, m):
            if rows[i][column]:
                subtract(i, top, column)

    if reduced:
        for i, column in reversed(list(enumerate(pivots))):
            if (pivot := rows[i][column]) != 1:
                rows[i] = tuple(x / pivot + zero for x in rows[i])
                divisor = _show(pivot)
                record(f"R{i + 1} ← R{i + 1} / {f'({divisor})' if '/' in divisor else divisor}")
            for above in range(i - 1, -1, -1):
                if rows[above][column]:
                    subtract(above, i, column)
    return Echelon(tuple(steps), tuple(pivots), limit)


def _read(A: Any) -> tuple[list[tuple[Number, ...]], float]:
    """(rows, ε): Fractions and 0 if every entry is exact, otherwise floats and the ε of their dtype."""
    epsilon = torch.finfo(torch.float64).eps
    if hasattr(A, "__array__"):                          # a torch tensor or a numpy array
        A = A if isinstance(A, torch.Tensor) else torch.as_tensor(A.copy())      # a copy: no negative strides
        if A.dtype.is_floating_point:
            epsilon = torch.finfo(A.dtype if A.element_size() >= 4 else torch.float32).eps
        A = A.tolist()
    if not isinstance(A, Sequence) or isinstance(A, str) or not A or not all(
            isinstance(row, Sequence) and not isinstance(row, str) and len(row) for row in A):
        raise ValueError(f"A must be a matrix with at least one row and one column, such as [[1, 2], [3, 4]]; "
                         f"got {reprlib.repr(A)}.")
    if len(lengths := {len(row) for row in A}) > 1:
        raise ValueError(f"A's rows must be equally long; got lengths {sorted(lengths)}.")
    for i, row in enumerate(A):
        for j, x in enumerate(row):
            if isinstance(x, Sequence) and not isinstance(x, str):
                raise ValueError(f"A must have two dimensions; its entry [{i}][{j}] is itself a list: {x!r}.")
            if not isinstance(x, numbers.Real):
                raise TypeError(f"A's entries must be whole numbers, Fractions or floats; A[{i}][{j}] is {x!r}.")
            if not math.isfinite(x):
                raise ValueError(f"A must be finite; A[{i}][{j}] is {x!r}.")
    if all(isinstance(x, numbers.Rational) for row in A for x in row):
        # int(): a numpy integer inside a Fraction would overflow
        return [tuple(Fraction(int(x.numerator), int(x.denominator)) for x in row) for row in A], 0
    return [tuple(float(x) + 0.0 for x in row) for row in A], epsilon


def _times(factor: Number) -> str:
    """1 → "", 3 → "3·", 1/2 → "1/2·"."""
    return "" if factor == 1 else f"{_show(factor)}·"


def _show(x: Number) -> str:
    """A minus sign as on paper; floats to six digits."""
    return (str(x) if isinstance(x, Fraction) else f"{x:.6g}").replace("-", "−")
