"""Chapter 01, rank and low-rank structure: eight exercises and six questions.

Probes send values: the rows of a matrix as exact fractions, a rank as a number, the product of two factors and not the
factors themselves (which are not unique). Matrices are made from known singular values, placed so that every wrong
tolerance counts another number of them. Imports torch and the standard library only.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from pefttools.grading.exercise import Exercise
from pefttools.grading.leaves import randn
from pefttools.grading.question import Question

CHAPTER = "01_rank"
TITLE = "Rank and low-rank structure"
HIDES = ("pefttools.rank", "pefttools.elimination", "pefttools.subspace", "pefttools.intrinsic", "peft")


def whole(rng: torch.Generator, low: int, high: int, *shape: int) -> list:
    """Whole numbers from low to high, both included, as nested lists."""
    return torch.randint(low, high + 1, shape, generator=rng).tolist()


def nonzero(rng: torch.Generator, low: int, high: int) -> int:
    return whole(rng, low, high, 1)[0] * (1 if torch.rand((), generator=rng) < 0.5 else -1)


def spectral(rng: torch.Generator, m: int, n: int, values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
    """A random m×n matrix with these singular values, made in float64 and rounded once."""
    k = len(values)
    U, V = (torch.linalg.qr(randn(rng, size, k, dtype=torch.float64)).Q for size in (m, n))
    return ((U * torch.tensor(values, dtype=torch.float64)) @ V.T).to(dtype)


# ================================================================================================ row-operation

def fractions(A: list[list[int]]) -> list[list[Fraction]]:
    return [[Fraction(x) for x in row] for row in A]


def written(x: Any) -> str:
    """An entry as on paper: "3", "-1/2"; what is not exact says so."""
    if isinstance(x, Tensor) and x.numel() == 1:
        x = x.item()
    if isinstance(x, (int, Fraction)) and not isinstance(x, bool):
        return str(x)
    return f"{x:.6g} (a float, not exact)" if isinstance(x, float) else f"{x!r:.40} (no number)"


def as_rows(matrix: Any) -> dict[str, Any]:
    """{"R1": ["1", "-1/2"], …} of nested lists; rows are counted from 1, as on paper."""
    if hasattr(matrix, "tolist"):
        matrix = matrix.tolist()
    if matrix is None:
        raise TypeError("nothing came back: return the matrix")
    if not isinstance(matrix, (list, tuple)) or not all(isinstance(row, (list, tuple)) for row in matrix):
        raise TypeError(f"the answer should be a matrix, a list of rows; it is a {type(matrix).__name__} that holds no rows")
    return {"number of rows": len(matrix)} | {f"R{i}": [written(x) for x in row] for i, row in enumerate(matrix, 1)}


def operation_inputs(rng: torch.Generator) -> list[dict]:
    def case(m: int, n: int, target: int, source: int, column: int) -> dict:
        A = whole(rng, -6, 6, m, n)
        A[source][column], A[target][column] = 7 * nonzero(rng, 1, 1), nonzero(rng, 2, 6)   # a fraction, at least 2/7
        free = next(j for j in range(n) if j != column)
        A[source][free] = 5                                   # so that it shows which row is subtracted, and from which
        return {"A": A, "target": target, "source": source, "column": column}

    return [case(2, 3, 1, 0, 0), case(3, 3, 2, 1, 1), case(4, 3, 1, 3, 2), case(3, 5, 0, 2, 3)]


def operation_probe(work: Callable, case: dict) -> dict[str, Any]:
    A = fractions(case["A"])
    B = work(A, case["target"], case["source"], case["column"])
    return {**as_rows(B), "A is left as it was": A == fractions(case["A"])}


def operation_reference(A, target, source, column):
    factor = A[target][column] / A[source][column]
    B = [list(row) for row in A]
    B[target] = [a - factor * b for a, b in zip(A[target], A[source])]
    return B


def operation_with(factor: Callable, combine=lambda a, f, b: a - f * b, swapped: bool = False) -> Callable:
    """The operation with another factor f(t, s) of the two entries, or another way to combine."""
    def work(A, target, source, column):
        if swapped:
            target, source = source, target
        f = factor(A[target][column], A[source][column])
        return [[combine(a, f, b) for a, b in zip(row, A[source])] if i == target else list(row)
                for i, row in enumerate(A)]
    return work


def operation_floats(A, target, source, column):
    return [[float(x) for x in row] for row in operation_reference(A, target, source, column)]


def operation_one_entry(A, target, source, column):
    B = [list(row) for row in A]
    B[target][column] = Fraction(0)
    return B


def operation_row_only(A, target, source, column):
    return operation_reference(A, target, source, column)[target]


def operation_in_place(A, target, source, column):
    A[target] = operation_reference(A, target, source, column)[target]
    return A


def operation_nothing_returned(A, target, source, column):
    A[target] = operation_reference(A, target, source, column)[target]


def operation_every_row(A, target, source, column):
    return [list(row) if i == source else [a - row[column] / A[source][column] * b for a, b in zip(row, A[source])]
            for i, row in enumerate(A)]


def operation_elementary(A, target, source, column):
    """As a product E·A, E the unit matrix with one more entry."""
    m = len(A)
    E = [[Fraction(int(i == j)) for j in range(m)] for i in range(m)]
    E[target][source] -= A[target][column] / A[source][column]
    return [[sum(E[i][k] * A[k][j] for k in range(m)) for j in range(len(A[0]))] for i in range(m)]


def operation_loop(A, target, source, column):
    import copy
    B = copy.deepcopy(A)
    for j in range(len(A[0])):
        B[target][j] = (A[target][j] * A[source][column] - A[source][j] * A[target][column]) / A[source][column]
    return B


ROW_OPERATION = Exercise(
    name="row-operation", chapter=CHAPTER, title="One row operation", points=2, minutes=5, difficulty=1,
    inputs=operation_inputs, probe=operation_probe, reference=operation_reference,
    mistakes={
        "whole-number division": (operation_with(lambda t, s: t // s),
            "You divide with //, which rounds down to a whole number, so the entry does not become zero. With "
            "Fractions, / is exact."),
        "factor upside down": (operation_with(lambda t, s: s / t),
            "Your factor is upside down: A[source][column] / A[target][column]. To clear the target's entry t with the "
            "source's s, subtract t/s times the source."),
        "added": (operation_with(lambda t, s: t / s, lambda a, f, b: a + f * b),
            "You add the multiple where it has to be subtracted: t + (t/s)·s is 2t, not 0."),
        "no factor": (operation_with(lambda t, s: 1),
            "You subtract the source row itself. It has to be multiplied by t/s first, or the entry becomes t − s."),
        "target's entry alone": (operation_with(lambda t, s: t),
            "Your factor is t, the target's own entry. That clears it only if the source's entry is 1; in general the "
            "factor is t divided by the source's entry."),
        "rows exchanged": (operation_with(lambda t, s: t / s, swapped=True),
            "You changed the row `source` with the help of `target`. It is the other way round: `target` changes, "
            "`source` stays as it is."),
        "minus the target": (operation_with(lambda t, s: t / s, lambda a, f, b: f * b - a),
            "The entry is zero and the rest of the row has the wrong sign: this is (t/s)·source − target. Take the "
            "multiple of the source away from the target."),
        "one entry": (operation_one_entry,
            "You set the one entry to zero and leave the rest of the row alone. Then the rows no longer span what they "
            "spanned: subtract along the whole row."),
        "every row": (operation_every_row,
            "You cleared the column in every other row. Asked for is one operation, on the row `target`; doing all "
            "rows is the next exercise."),
        "the row alone": (operation_row_only,
            "You return the new row. Return the whole matrix, with that row in its place."),
        "in place": (operation_in_place,
            "The numbers are right, and the matrix you were given has changed as well. Copy the rows first: "
            "[list(row) for row in A]."),
        "nothing returned": (operation_nothing_returned,
            "Nothing is returned (and the matrix you were given has changed). Build a new matrix and return it."),
        "floats": (operation_floats,
            "These are floats, and 1/3 is no float: the entry might come out as 1e-17 instead of 0. Keep the "
            "Fractions that you were given."),
    },
    alternatives={"as a product with an elementary matrix": operation_elementary, "loop over columns": operation_loop,
                  "comprehension": operation_with(lambda t, s: t / s)},
    accepts="function", hides=HIDES)


# ================================================================================================ row-echelon

def echelon_inputs(rng: torch.Generator) -> list[dict]:
    def product(m: int, k: int, n: int) -> list[list[int]]:
        B, C = whole(rng, -3, 3, m, k), whole(rng, -3, 3, k, n)
        for i in range(k):      # a lower triangle with 1s above an upper one: rank k, and no pivot comes out as 1
            B[i] = [1 if j == i else B[i][j] if j < i else 0 for j in range(k)]
            C[i] = [0 if j < i else 2 + i if j == i else C[i][j] for j in range(n)]
        return [[sum(b * c for b, c in zip(row, column)) for column in zip(*C)] for row in B]

    gap = product(3, 3, 4)
    gap = [[0, row[0], 2 * row[0], *row[1:]] for row in gap]         # a zero column, and one without a pivot
    first = product(4, 4, 4)
    first[0] = [0, 0, 3, first[0][3]]                                # the first pivot is not in the first row
    late = [[2, 4, nonzero(rng, 1, 5), 1], [1, 2, 0, nonzero(rng, 1, 5)]]   # wide: pivots in columns 0 and 2
    return [{"A": [[1, 2, 3], [2, 4, 6], [1, 1, 1]]}, {"A": product(3, 3, 4)}, {"A": product(4, 2, 5)}, {"A": first},
            {"A": gap}, {"A": product(5, 3, 3)}, {"A": late}, {"A": [[0, 0], [0, 0], [0, 0]]}]


def echelon_probe(work: Callable, case: dict) -> dict[str, Any]:
    A = fractions(case["A"])
    R = work(A)
    return {**as_rows(R), "A is left as it was": A == fractions(case["A"])}


def echelon_reference(A):
    from pefttools.elimination import row_echelon

    return [list(row) for row in row_echelon(A, reduced=True).matrix]


def make_echelon(*, swaps=True, normalises=True, above=True, steady_row=True, last=None, divide=lambda a, b: a / b,
                 keeps_zero_rows=True, whole_rows=True, in_place=False, number=None) -> Callable:
    """Gauss–Jordan with a switch for each thing that can go wrong; with all of them as they stand it is right."""
    def work(A):
        R = A if in_place else [list(row) for row in A]
        if number is not None:
            R = [[number(x) for x in row] for row in R]
        m, n, top = len(R), len(R[0]), 0
        for column in range(n if last is None else last(m, n)):
            if top >= m:
                break
            found = [i for i in range(top, m) if R[i][column] != 0]
            if not swaps:
                found = [i for i in found if i == top]
            if not found:
                top += not steady_row
                continue
            R[top], R[found[0]] = R[found[0]], R[top]
            pivot = R[top][column]
            if normalises:
                R[top] = [divide(x, pivot) for x in R[top]]
            for i in range(0 if above else top + 1, m):
                if i != top and R[i][column] != 0:
                    factor = divide(R[i][column], R[top][column])
                    R[i] = [a - factor * b if whole_rows or j == column else a
                            for j, (a, b) in enumerate(zip(R[i], R[top]))]
            top += 1
        return R if keeps_zero_rows else [row for row in R if any(row)]
    return work


def echelon_no_look(A):
    """Divides by A[i][i] without looking for a pivot."""
    R = [list(row) for row in A]
    for i in range(min(len(R), len(R[0]))):
        R[i] = [x / R[i][i] for x in R[i]]
        for k in range(len(R)):
            if k != i:
                R[k] = [a - R[k][i] * b for a, b in zip(R[k], R[i])]
    return R


def echelon_columns(A):
    R = make_echelon()([list(column) for column in zip(*A)])
    return [list(column) for column in zip(*R)]


def echelon_rank(A):
    return sum(any(row) for row in make_echelon()(A))


def echelon_one_column(A):
    return make_echelon(last=lambda m, n: 1)(A)


def echelon_back(A):
    """Downwards to the echelon form first, then upwards from the last pivot."""
    R = make_echelon(normalises=False, above=False)(A)
    for i in reversed(range(len(R))):
        column = next((j for j, x in enumerate(R[i]) if x), None)
        if column is None:
            continue
        R[i] = [x / R[i][column] for x in R[i]]
        for k in range(i):
            R[k] = [a - R[k][column] * b for a, b in zip(R[k], R[i])]
    return R


def echelon_basis(A):
    """One row after the other into a basis whose members have 1 at their pivots and 0 at all others'."""
    basis: dict[int, list] = {}
    for row in A:
        row = list(row)
        for column, member in basis.items():
            row = [a - row[column] * b for a, b in zip(row, member)]
        pivot = next((j for j, x in enumerate(row) if x), None)
        if pivot is None:
            continue
        row = [x / row[pivot] for x in row]
        for column, member in list(basis.items()):
            basis[column] = [a - member[pivot] * b for a, b in zip(member, row)]
        basis[pivot] = row
    rows = [basis[column] for column in sorted(basis)]
    # with another row first, an earlier column may have become a pivot too late: once more, until nothing changes
    done = make_echelon()(rows) if rows else []
    return done + [[Fraction(0)] * len(A[0]) for _ in range(len(A) - len(done))]


def echelon_recursive(A):
    """Clear one column, then the rest of the matrix by itself, then above."""
    rows, n = [list(row) for row in A], len(A[0])

    def solve(rows, column):
        if column == n or not rows:
            return rows
        found = next((row for row in rows if row[column]), None)
        if found is None:
            return solve(rows, column + 1)
        pivot = [x / found[column] for x in found]
        rest = solve([[a - row[column] * b for a, b in zip(row, pivot)] for row in rows if row is not found], column + 1)
        for row in rest:
            lead = next((j for j, x in enumerate(row) if x), None)
            if lead is not None:
                pivot = [a - pivot[lead] * b for a, b in zip(pivot, row)]
        return [pivot, *rest]
    return solve(rows, 0)


ROW_ECHELON = Exercise(
    name="row-echelon", chapter=CHAPTER, title="Reduced row echelon form", points=4, minutes=20, difficulty=2,
    inputs=echelon_inputs, probe=echelon_probe, reference=echelon_reference,
    mistakes={
        "no exchange": (make_echelon(swaps=False),
            "Where the entry at the pivot's place is 0, you pass to the next column. Look further down first: if a row "
            "below has something there, exchange the two rows."),
        "no pivot looked for": (echelon_no_look,
            "You divide by the entry on the diagonal without looking whether it is 0. Look down the column for a row "
            "that is not zero there, exchange, and if there is none go on with the next column."),
        "row moves with the column": (make_echelon(steady_row=False),
            "When a column has no pivot, you go on to the next row as well. The row stays: it is still waiting for a "
            "pivot, in a column further right."),
        "stops at the square": (make_echelon(last=lambda m, n: min(m, n)),
            "You stop after min(m, n) columns. In a wide matrix the pivots may lie further right: go through all n "
            "columns, and stop when the rows are used up."),
        "first column only": (echelon_one_column,
            "Only the first column has been cleared. The same has to happen in each further column, with the next "
            "row."),
        "pivots not 1": (make_echelon(normalises=False),
            "The zeros are where they should be, and the pivots are not 1. In the reduced form each pivot row is divided "
            "by its pivot."),
        "only below": (make_echelon(above=False),
            "This is an echelon form with 1s at the pivots, and not yet the reduced one: a pivot also clears the rows "
            "above it."),
        "echelon only": (make_echelon(above=False, normalises=False),
            "This is an echelon form, and it shows the rank. There are many of those for one matrix; the reduced form "
            "is the one where each pivot is 1 and alone in its column."),
        "whole-number division": (make_echelon(divide=lambda a, b: a // b),
            "You divide with //, which rounds down. With Fractions, / is exact."),
        "floats": (make_echelon(number=float),
            "The result is in floats. Where Fractions give 0, floats may give 1e-17, and the rank comes out too high. "
            "Keep the Fractions that you were given."),
        "zero rows dropped": (make_echelon(keeps_zero_rows=False),
            "The zero rows at the bottom are missing. The form has as many rows as the matrix; the zero ones are what "
            "its rank lacks to m."),
        "one entry at a time": (make_echelon(whole_rows=False),
            "You put zeros below and above the pivot, and leave the rest of those rows as it was. Subtract the "
            "multiple of the pivot's row along the whole row."),
        "columns": (echelon_columns,
            "You eliminated with columns instead of rows. The rank is the same; the form asked for is that of the "
            "rows."),
        "the rank": (echelon_rank,
            "You return the rank. Return the matrix; the rank is then the number of its rows that are not all zero."),
        "in place": (make_echelon(in_place=True),
            "The form is right, and the matrix you were given is gone. Copy it first: [list(row) for row in A]."),
    },
    alternatives={"Gauss–Jordan": make_echelon(), "down, then back up": echelon_back,
                  "one row after the other": echelon_basis, "recursive": echelon_recursive},
    accepts="function", hides=HIDES)


# ================================================================================================ rank-budget

def budget_inputs(rng: torch.Generator) -> list[dict]:
    m, n = (int(torch.randint(low, high, (), generator=rng)) for low, high in ((40, 90), (100, 300)))
    k = int(torch.randint(3, 20, (), generator=rng))
    return [{"m": 512, "n": 1024, "budget": 76_800},                        # exactly 50
            {"m": m, "n": n, "budget": k * (m + n)},                        # exactly k
            {"m": n, "n": m, "budget": (k + 1) * (m + n) - 1},              # one short of k + 1
            {"m": m, "n": n, "budget": k * (m + n) + (m + n) // 4},
            {"m": m, "n": n, "budget": 10 * m * n},                         # more than enough: min(m, n)
            {"m": m, "n": n, "budget": m + n - 1}]                          # not even one


def budget_probe(work: Callable, case: dict) -> dict[str, Any]:
    pair = work(case["m"], case["n"], case["budget"])
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
        raise TypeError(f"rank_budget should return two numbers (return k, saved); it returned a {type(pair).__name__}")
    k, saved = (int(x) if isinstance(x, float) and x.is_integer() else x for x in pair)
    return {"k": k, "saved": saved}


def budget_with(rank=lambda m, n, b: min(b // (m + n), m, n), saved=lambda m, n, k: m * n - k * (m + n)) -> Callable:
    def work(m, n, budget):
        k = rank(m, n, budget)
        return k, saved(m, n, k)
    return work


def budget_search(m, n, budget):
    k = 0
    while k < min(m, n) and torch.empty(m, k + 1).numel() + torch.empty(k + 1, n).numel() <= budget:
        k += 1
    return k, m * n - m * k - k * n


def budget_all(m, n, budget):
    k = max(k for k in range(min(m, n) + 1) if k * m + k * n <= budget)
    return [k, m * n - (m + n) * k]


RANK_BUDGET = Exercise(
    name="rank-budget", chapter=CHAPTER, title="What a rank costs and saves", points=2, minutes=5, difficulty=1,
    inputs=budget_inputs, probe=budget_probe, reference=budget_with(),
    mistakes={
        "product": (budget_with(rank=lambda m, n, b: min(b // (m * n), m, n)),
            "You divide the budget by m·n. A factor of rank k adds m + n numbers (a column of B and a row of A), not "
            "m·n."),
        "rounded up": (budget_with(rank=lambda m, n, b: min(-(-b // (m + n)), m, n)),
            "Your rank is rounded up, so it costs more than the budget. Take the largest k that still fits."),
        "rounded to nearest": (budget_with(rank=lambda m, n, b: min(round(b / (m + n)), m, n)),
            "You round to the nearest whole number; upwards that is over the budget. Round down."),
        "strictly less": (budget_with(rank=lambda m, n, b: max(0, min((b - 1) // (m + n), m, n))),
            "A budget that is met exactly is met. Your k stays below it: use ≤, not <."),
        "no limit": (budget_with(rank=lambda m, n, b: b // (m + n)),
            "With a large budget your k grows past min(m, n). No m × n matrix has a rank above that, so more columns "
            "would be wasted."),
        "larger side": (budget_with(rank=lambda m, n, b: min(b // (m + n), max(m, n))),
            "You limit k by the larger side. The rank of an m × n matrix is at most the smaller one, min(m, n)."),
        "one at least": (budget_with(rank=lambda m, n, b: max(1, min(b // (m + n), m, n))),
            "Where not even rank 1 fits you return 1, which is over the budget. The answer there is 0."),
        "one factor": (budget_with(rank=lambda m, n, b: min(b // m, m, n), saved=lambda m, n, k: m * n - k * m),
            "You count B (m × k) and forget A (k × n): each rank costs m + n numbers."),
        "spent": (budget_with(saved=lambda m, n, k: k * (m + n)),
            "Your second number is what the factors cost. Asked for is what they save: m·n − k·(m + n)."),
        "never negative": (budget_with(saved=lambda m, n, k: max(0, m * n - k * (m + n))),
            "You cut the saving off at 0. At full rank the two factors have more numbers than the matrix, and the "
            "saving is honestly negative."),
        "against the budget": (lambda m, n, b: (min(b // (m + n), m, n), m * n - b),
            "Your saving is m·n minus the budget. The budget is seldom spent to the last number: count what the factors of "
            "rank k really have, k·(m + n)."),
        "left of the budget": (lambda m, n, b: (min(b // (m + n), m, n), b - min(b // (m + n), m, n) * (m + n)),
            "Your second number is what is left of the budget. Asked for is the saving against the full matrix: m·n − "
            "k·(m + n)."),
        "free choices counted": (budget_with(saved=lambda m, n, k: m * n - k * (m + n - k)),
            "You count k·(m + n − k) numbers: that is how many a matrix of rank k can be described by at the least. The "
            "two factors store k·(m + n), and train all of them."),
        "square": (budget_with(rank=lambda m, n, b: min(b // (2 * m), m, n), saved=lambda m, n, k: m * n - 2 * m * k),
            "2·m·k holds for square matrices only. B is m × k and A is k × n, together k·(m + n)."),
        "share": (budget_with(saved=lambda m, n, k: 1 - k * (m + n) / (m * n)),
            "Your second number is the share that is saved. Return the number of parameters: m·n − k·(m + n)."),
        "exchanged": (lambda m, n, b: budget_with()(m, n, b)[::-1],
            "You return the saving first. The order is (k, saved)."),
    },
    alternatives={"counts up": budget_search, "tries all": budget_all},
    accepts="function", hides=HIDES)


# ================================================================================================ matrix-rank

def rank_inputs(rng: torch.Generator) -> list[dict]:
    def case(m: int, n: int, k: int, dtype: torch.dtype, size: float = 1.0) -> dict:
        """k singular values that count; three that do not: two between min(m, n)·ε and max(m, n)·ε, one below both."""
        eps = torch.finfo(dtype).eps
        few, many = min(m, n), max(m, n)
        values = torch.linspace(1, 0.3, k - 2).tolist() + [0.002, 4 * many * eps] + [(few * many) ** 0.5 * eps] * 2 + [3 * eps]
        return {"A": spectral(rng, m, n, [size * v for v in values], dtype), "tol": None}

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=rng))

    product = randn(rng, 12, k := pick(3, 8)) @ randn(rng, k, 9)
    given = sorted((0.5 + torch.rand(6, generator=rng)).tolist(), reverse=True)
    cut = pick(2, 5)
    return [{"A": product, "tol": None},
            case(8, 400, pick(3, 6), torch.float32, 1e-6),
            case(300, 8, pick(3, 6), torch.float32, 50.0),
            case(8, 500, pick(3, 6), torch.float64),
            {"A": spectral(rng, 10, 7, [100 * v for v in given]), "tol": 50 * (given[cut] + given[cut + 1])},
            {"A": torch.zeros(4, 6), "tol": None},
            {"A": torch.diag(torch.tensor([4.0, *given[:pick(1, 4)], 2.0**-40])), "tol": 0.0}]     # 0 is a tolerance too


def rank_probe(work: Callable, case: dict) -> dict[str, Any]:
    found = work(case["A"].clone()) if case["tol"] is None else work(case["A"].clone(), case["tol"])
    if isinstance(found, Tensor) and found.numel() == 1:
        found = found.item()
    return {"rank": int(found) if isinstance(found, float) and found.is_integer() else found}


def rank_with(default=lambda S, A: S.max() * max(A.shape) * torch.finfo(A.dtype).eps, given=lambda S, tol: tol,
              count=lambda S, t: (S > t).sum()) -> Callable:
    """Count singular values, with another default tolerance, another use of the one given, or another count."""
    def work(A, tol=None):
        S = torch.linalg.svdvals(A)
        return int(count(S, default(S, A) if tol is None else given(S, tol)))
    return work


def rank_or_default(A, tol=None):
    S = torch.linalg.svdvals(A)
    tol = tol or S.max() * max(A.shape) * torch.finfo(A.dtype).eps
    return int((S > tol).sum())


def rank_rows(A, tol=None):
    return int((A.norm(dim=1) > (0 if tol is None else tol)).sum())


def rank_eigen(A, tol=None):
    S = torch.linalg.eigvalsh(A @ A.T if A.shape[0] < A.shape[1] else A.T @ A).clamp(min=0).sqrt()
    tol = S.max() * max(A.shape) * torch.finfo(A.dtype).eps if tol is None else tol
    return int((S > tol).sum())


def rank_entropy(A, tol=None):
    p = torch.linalg.svdvals(A)
    p = p / p.sum().clamp(min=1e-30)
    return int(torch.special.entr(p).sum().exp().round())


def rank_torch(A, tol=None):
    return torch.linalg.matrix_rank(A) if tol is None else torch.linalg.matrix_rank(A, atol=tol, rtol=0.0)


def rank_numpy(A, tol=None):
    import numpy

    return int(numpy.linalg.matrix_rank(A.numpy(), tol=tol))


def rank_full_svd(A, tol=None):
    _, S, _ = torch.linalg.svd(A, full_matrices=True)
    if tol is None:
        tol = S[0].item() * max(A.shape[0], A.shape[1]) * torch.finfo(A.dtype).eps
    return sum(1 for s in S.tolist() if s > tol)


MATRIX_RANK = Exercise(
    name="matrix-rank", chapter=CHAPTER, title="Numerical rank", points=3, minutes=10, difficulty=2,
    inputs=rank_inputs, probe=rank_probe, reference="pefttools.rank:matrix_rank",
    mistakes={
        "not exactly zero": (rank_with(default=lambda S, A: 0.0),
            "You count every singular value that is not exactly 0. Rounding makes zeros into 1e-7 or so, and nearly "
            "every matrix then has full rank. Count those above the tolerance."),
        "not zero, tol ignored": (rank_with(default=lambda S, A: 0.0, given=lambda S, t: 0.0),
            "You count every singular value that is not exactly 0, whatever tol says. Count those above the tolerance."),
        "all": (rank_with(count=lambda S, t: len(S)),
            "This is min(m, n), the number of singular values. The rank is how many of them are above the tolerance."),
        "at least": (rank_with(count=lambda S, t: (S >= t).sum()),
            "You count with ≥. For the zero matrix the tolerance is 0 and every singular value is ≥ 0; its rank is 0. "
            "Count with >."),
        "fixed tolerance": (rank_with(default=lambda S, A: 1e-6),
            "Your tolerance is a fixed number, so the rank changes when the matrix is multiplied by 1000. It has to grow "
            "with the largest singular value."),
        "no largest value": (rank_with(default=lambda S, A: max(A.shape) * torch.finfo(A.dtype).eps),
            "S.max() is missing from your tolerance, so the rank changes when the matrix is multiplied by a number. It "
            "is S.max() · max(m, n) · ε."),
        "no size": (rank_with(default=lambda S, A: S.max() * torch.finfo(A.dtype).eps),
            "max(m, n) is missing from your tolerance. Rounding errors add up along a row, so a larger matrix needs a "
            "larger tolerance: S.max() · max(m, n) · ε."),
        "smaller side": (rank_with(default=lambda S, A: S.max() * min(A.shape) * torch.finfo(A.dtype).eps),
            "You take min(m, n) where numpy takes max(m, n)."),
        "number of rows": (rank_with(default=lambda S, A: S.max() * A.shape[0] * torch.finfo(A.dtype).eps),
            "You take the number of rows, len(A), where numpy takes the larger of rows and columns: max(A.shape)."),
        "number of entries": (rank_with(default=lambda S, A: S.max() * A.numel() * torch.finfo(A.dtype).eps),
            "Your tolerance grows with m·n. numpy's grows with max(m, n), and small but true directions are lost with "
            "yours."),
        "float32's ε": (rank_with(default=lambda S, A: S.max() * max(A.shape) * torch.finfo(torch.float32).eps),
            "Your ε is that of float32 for every matrix. In float64 it is 2e-16: torch.finfo(A.dtype).eps."),
        "float64's ε": (rank_with(default=lambda S, A: S.max() * max(A.shape) * torch.finfo(torch.float64).eps),
            "Your ε is that of float64 for every matrix. The rounding of a float32 matrix is 1e-7, far above that "
            "tolerance: torch.finfo(A.dtype).eps."),
        "one percent": (rank_with(default=lambda S, A: 0.01 * S.max()),
            "You leave out everything below one percent of the largest. That is a choice one may make about what "
            "matters; the rank leaves out only what rounding could have made."),
        "tol relative": (rank_with(given=lambda S, tol: tol * S.max()),
            "You multiply the given tol by S.max(). A tol that is given counts as it is; the default alone is relative."),
        "tol or the default": (rank_or_default,
            "Where tol is 0 you take the default: `if not tol` and `tol or …` hold for 0 as well as for None. Ask whether "
            "tol is None."),
        "tol ignored": (rank_with(given=lambda S, tol: S.max() * 1e-4),
            "The argument tol has no effect. Where it is given, count the singular values above it."),
        "rows that are not zero": (rank_rows,
            "You count rows of the matrix itself. That is the rank after elimination only; three equal rows have rank "
            "1. Take the singular values."),
        "roots of eigenvalues": (rank_eigen,
            "You take the roots of the eigenvalues of AᵀA (or AAᵀ). On paper these are the singular values; in the "
            "computer the squaring loses everything below √ε, and small true directions drown. Use "
            "torch.linalg.svdvals."),
        "below": (rank_with(count=lambda S, t: (S <= t).sum()),
            "You count the singular values that are too small. The rank is the number of those above the tolerance."),
        "effective rank": (rank_entropy,
            "This is the effective rank, rounded, which the next section is about. The rank counts the singular values "
            "above a tolerance."),
    },
    alternatives={"torch.linalg.matrix_rank": rank_torch, "numpy.linalg.matrix_rank": rank_numpy,
                  "a count in Python": rank_full_svd},
    accepts="function", hides=HIDES)


# ================================================================================================ low-rank-approx

def low_inputs(rng: torch.Generator) -> list[dict]:
    def case(m: int, n: int, k: int, fall: float) -> dict:
        values = [3 * fall**i for i in range(min(m, n))]
        return {"W": spectral(rng, m, n, values), "k": k}

    return [case(6, 9, 2, 0.7), case(12, 5, 3, 0.6), case(8, 8, 1, 0.8), case(20, 30, 7, 0.85)]


def low_probe(work: Callable, case: dict) -> dict[str, Any]:
    W = case["W"].clone()
    pair = work(W, case["k"])
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(t, Tensor) for t in pair)):
        if isinstance(pair, (tuple, list)):
            raise TypeError(f"there are {len(pair)} things in what low_rank returned; two tensors are asked for, B and A")
        kind = "one tensor" if isinstance(pair, Tensor) else f"a {type(pair).__name__}"
        raise TypeError(f"low_rank should return two tensors, B and A (return B, A); it returned {kind}")
    B, A = (t.detach() for t in pair)
    leaves = {"shape of B": list(B.shape), "shape of A": list(A.shape)}
    if B.dim() == A.dim() == 2 and B.shape[1] == A.shape[0]:
        leaves["B @ A"] = B @ A
    return {**leaves, "W is left as it was": torch.equal(W, case["W"])}


def low_with(pick=lambda S, k: slice(0, k), left=lambda S: S.sqrt(), right=lambda S: S.sqrt()) -> Callable:
    """B = U_k·left(S), A = right(S)·Vᵀ_k: right where left·right = S."""
    def work(W, k):
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        part = pick(S, k)
        return U[:, part] * left(S[part]), right(S[part])[:, None] * Vh[part]
    return work


def low_one(S):
    return torch.ones_like(S)


def low_v_not_transposed(W, k):
    U, S, V = torch.svd(W)
    return U[:, :k] * S[:k], V[:, :k]


def low_vh_columns(W, k):
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :k] * S[:k], Vh[:, :k].T


def low_vh_as_v(W, k):
    U, S, V = torch.linalg.svd(W)
    return U[:, :k] * S[:k], V[:, :k].T


def low_rows_of_u(W, k):
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:k].T * S[:k], Vh[:k]


def low_first_columns(W, k):
    B = W[:, :k].clone()
    return B, torch.linalg.lstsq(B, W).solution


def low_corner(W, k):
    B, A = torch.zeros(W.shape[0], k), torch.zeros(k, W.shape[1])
    B[:k, :k], A[:k] = torch.eye(k), W[:k]
    return B, A


def low_random(W, k):
    Q = torch.linalg.qr(W @ torch.randn(W.shape[1], k, generator=torch.Generator().manual_seed(0))).Q
    return Q, Q.T @ W


def low_product(W, k):
    B, A = low_with()(W, k)
    return B @ A


def low_three(W, k):
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :k], S[:k], Vh[:k]


def low_exchanged(W, k):
    return low_with()(W, k)[::-1]


def low_transposed(W, k):
    B, A = low_with()(W, k)
    return A.T, B.T


def low_all(W, k):
    return low_with(pick=lambda S, k: slice(None))(W, k)


def low_eigen(W, k):
    """The k main eigenvectors of WᵀW, and W seen along them."""
    V = torch.linalg.eigh(W.double().T @ W.double()).eigenvectors[:, -k:]
    return (W.double() @ V).float(), V.T.float()


def low_alternating(W, k):
    """Least squares for one factor at a time, until nothing moves."""
    W, A = W.double(), torch.randn(k, W.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for _ in range(60):
        B = torch.linalg.lstsq(A.T, W.T).solution.T
        A = torch.linalg.lstsq(torch.linalg.qr(B).Q, W).solution
        A = torch.linalg.qr(A.T).Q.T
    return (W @ A.T).float(), A.float()


LOW_RANK_APPROX = Exercise(
    name="low-rank-approx", chapter=CHAPTER, title="The nearest matrix of rank k", points=3, minutes=10, difficulty=2,
    inputs=low_inputs, probe=low_probe, reference="pefttools.rank:low_rank",
    mistakes={
        "no singular values": (low_with(left=low_one, right=low_one),
            "The singular values are missing: this is U_k V_kᵀ, where every direction is equally strong. Multiply by S "
            "once, in B or in A or half and half."),
        "twice": (low_with(left=lambda S: S, right=lambda S: S),
            "The singular values are in both factors, so the product has their squares. Put S into one of the two, or "
            "√S into each."),
        "root in one factor": (low_with(right=low_one),
            "Only √S is in the product: it is in one factor and missing from the other. √S in both, or S in one."),
        "the smallest": (low_with(pick=lambda S, k: slice(len(S) - k, None)),
            "You kept the k smallest singular values. torch.linalg.svd gives them in falling order: the first k "
            "matter most."),
        "without the first": (low_with(pick=lambda S, k: slice(1, k + 1)),
            "You kept numbers 2 to k + 1 and left out the largest. Python counts from 0: S[:k]."),
        "one too few": (low_with(pick=lambda S, k: slice(0, k - 1)),
            "You kept k − 1 directions. S[:k] has k entries."),
        "one too many": (low_with(pick=lambda S, k: slice(0, k + 1)),
            "You kept k + 1 directions. S[:k] has k entries."),
        "all of them": (low_all,
            "This is the whole matrix again, min(m, n) directions. Keep k of them."),
        "V not transposed": (low_v_not_transposed,
            "A should be k × n and is n × k: torch.svd gives V, and what multiplies from the right is Vᵀ. "
            "(torch.linalg.svd gives Vᵀ itself.)"),
        "columns of Vᵀ": (low_vh_columns,
            "You took columns of Vh. It is Vᵀ already: the right-singular vectors are its rows, Vh[:k]."),
        "Vᵀ taken for V": (low_vh_as_v,
            "You transpose the first k columns of what torch.linalg.svd gives third. That is Vᵀ already, not V: take its "
            "first k rows, Vh[:k], as they are."),
        "rows of U": (low_rows_of_u,
            "You took rows of U. The left-singular vectors are its columns: U[:, :k]."),
        "first columns": (low_first_columns,
            "This is the best that can be built from the first k columns of W. The nearest matrix of rank k may use any "
            "directions: those of the SVD."),
        "first rows": (low_corner,
            "This keeps the first k rows of W and puts zeros into the rest. It has rank k, and is far from the nearest "
            "such matrix: take the directions of the SVD."),
        "random directions": (low_random,
            "This projects W onto k random combinations of its columns. It comes near the best and is not it: without "
            "further rounds it mixes in weaker directions. Take the SVD."),
        "product": (low_product,
            "You return the product, which has m·n numbers again. Return the two factors, B and A: that is what "
            "saves."),
        "three parts": (low_three,
            "You return U, S and Vᵀ. Multiply S into one of the others and return two factors, B and A."),
        "exchanged": (low_exchanged,
            "You return A before B. The order is (B, A), as in the product B @ A."),
        "transposed": (low_transposed,
            "You return Aᵀ and Bᵀ, whose product is the transpose. B is m × k and A is k × n."),
    },
    alternatives={"S in B": low_with(left=lambda S: S, right=low_one), "S in A": low_with(left=low_one, right=lambda S: S),
                  "eigenvectors of WᵀW": low_eigen, "alternating least squares": low_alternating},
    rtol=1e-3, atol=1e-3, accepts="function", hides=HIDES)


# ================================================================================================ effective-rank

def effective_inputs(rng: torch.Generator) -> list[dict]:
    a, b = (0.5 + 3 * torch.rand(2, generator=rng)).tolist()
    fall = [0.9**i for i in range(12)]
    return [{"A": torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0]))},
            {"A": torch.diag(torch.tensor([a, 0.0, b]))},                # a zero: 0·ln 0 must count as 0
            {"A": randn(rng, 9, 14)},
            {"A": spectral(rng, 30, 12, [50 * v for v in fall])},
            {"A": randn(rng, 10, 2) @ randn(rng, 2, 8)}]


def effective_probe(work: Callable, case: dict) -> dict[str, Any]:
    found = work(case["A"].clone())
    if isinstance(found, Tensor) and found.numel() == 1:
        found = found.item()
    return {"effective rank": float(found) if type(found) is int else found}


def effective_with(weight=lambda S: S / S.sum(), score=lambda p: torch.special.entr(p).sum().exp()) -> Callable:
    def work(A):
        return score(weight(torch.linalg.svdvals(A))).item()
    return work


def effective_bits(A):
    p = torch.linalg.svdvals(A)
    p = p[p > 0] / p.sum()
    return 2 ** float(-(p * p.log2()).sum())


def effective_product(A):
    p = torch.linalg.svdvals(A.double())
    p = p / p.sum()
    return math.prod(x ** -x for x in p.tolist() if x > 0)


def effective_categorical(A):
    S = torch.linalg.svdvals(A)
    return torch.distributions.Categorical(probs=S).entropy().exp()


EFFECTIVE_RANK = Exercise(
    name="effective-rank", chapter=CHAPTER, title="Effective rank", points=2, minutes=8, difficulty=2,
    inputs=effective_inputs, probe=effective_probe, reference="pefttools.rank:effective_rank",
    mistakes={
        "entropy alone": (effective_with(score=lambda p: torch.special.entr(p).sum()),
            "This is the entropy itself. Its exponential is a number of directions: ln 4 becomes 4."),
        "not normalised": (effective_with(weight=lambda S: S),
            "The singular values are not divided by their sum. Entropy is that of shares which add up to 1."),
        "squares": (effective_with(weight=lambda S: S.square() / S.square().sum()),
            "You take the shares of the squares, σ²/Σσ². That is used too (as the share of the energy); the definition "
            "here takes σ/Σσ."),
        "divided by the largest": (effective_with(weight=lambda S: S / S.max()),
            "You divide by the largest singular value. Shares add up to 1: divide by the sum."),
        "NaN for zeros": (effective_with(score=lambda p: (-(p * p.log()).sum()).exp()),
            "For a matrix with a singular value of exactly 0 you get NaN: 0·ln 0 is 0·(−∞) to the computer. By "
            "convention it counts as 0: leave zeros out, or use torch.special.entr."),
        "sign": (effective_with(score=lambda p: torch.exp(torch.xlogy(p, p).sum())),
            "The sign is lost: this is exp(+Σ p ln p), a number below 1. The entropy is −Σ p ln p."),
        "bits and exp": (effective_with(score=lambda p: (torch.special.entr(p).sum() / math.log(2)).exp()),
            "You take the entropy in bits (log₂) and then exp. Either ln and exp, or log₂ and 2 to the power."),
        "stable rank": (effective_with(weight=lambda S: S / S.max(), score=lambda p: p.square().sum()),
            "This is the stable rank, Σσ²/σ₁². It is another measure of the same thing; asked for is the exponential of "
            "the entropy."),
        "participation": (effective_with(score=lambda p: 1 / p.square().sum()),
            "This is 1/Σp², the participation ratio. It is a relative (of order 2); asked for is exp(−Σ p ln p)."),
        "count": (effective_with(weight=lambda S: S / S.max(), score=lambda p: (p > 1e-5).sum()),
            "This is the rank: each direction counts as 1, however weak. The effective rank weighs them."),
        "sum over the largest": (effective_with(score=lambda p: p.sum() / p.max()),
            "This is Σσ/σ₁. It also lies between 1 and the rank; asked for is the exponential of the entropy."),
        "mean entropy": (effective_with(score=lambda p: torch.special.entr(p).mean().exp()),
            "You take the mean of −p ln p. Entropy is the sum: the shares p do the averaging already."),
    },
    alternatives={"in bits": effective_bits, "as a product of powers": effective_product,
                  "torch's entropy of shares": effective_categorical},
    rtol=1e-3, atol=1e-4, accepts="function", hides=HIDES)


# ================================================================================================ intrinsic-dimension

def subspace_inputs(rng: torch.Generator) -> list[dict]:
    def case(D: int, d: int, steps: int, lr: float) -> dict:
        return {"X": randn(rng, 20, D) / D**0.5, "y": randn(rng, 20), "theta0": randn(rng, D),
                "P": torch.linalg.qr(randn(rng, D, d)).Q.contiguous(), "steps": steps, "lr": lr}

    return [case(6, 2, 1, 0.5), case(15, 4, 6, 2.0), case(40, 10, 12, 4.0), case(12, 1, 5, 3.0)]


def subspace_probe(work: Callable, case: dict) -> dict[str, Any]:
    X, y = case["X"], case["y"]
    theta0, P = case["theta0"].clone(), case["P"].clone()

    def loss(theta):
        return (torch.tanh(X @ theta) - y).square().mean()

    v = work(loss, theta0, P, case["steps"], case["lr"])
    if not isinstance(v, Tensor):
        raise TypeError(f"train_in_subspace should return the vector v as a tensor; it returned a {type(v).__name__}")
    return {"v": v.detach(), "theta0 is left as it was": torch.equal(theta0.detach(), case["theta0"]),
            "P is left as it was": torch.equal(P.detach(), case["P"])}


def make_subspace(start=torch.zeros, sign=-1, extra=0, zeroes=True, theta=lambda t, P, v: t + P @ v, out=None,
                  step=None) -> Callable:
    """Gradient descent on v, with a switch for each thing that can go wrong."""
    def work(loss, theta0, P, steps, lr):
        v, kept = start(P.shape[1]), torch.zeros(P.shape[1])
        for _ in range(steps + extra):
            v.requires_grad_()
            g, = torch.autograd.grad(loss(theta(theta0, P, v)), v)
            kept = g if zeroes else kept + g
            v = (v + sign * (step(kept) if step else kept) * lr).detach()
        return v if out is None else out(theta0, P, v)
    return work


def subspace_trains_theta(loss, theta0, P, steps, lr):
    theta = theta0.clone()
    for _ in range(steps):
        theta = theta.detach().requires_grad_()
        g, = torch.autograd.grad(loss(theta), theta)
        theta = theta - lr * g
    return P.T @ (theta - theta0).detach()


def subspace_trains_p(loss, theta0, P, steps, lr):
    v = torch.zeros(P.shape[1])
    for _ in range(steps):
        v.requires_grad_()
        P.requires_grad_()
        gv, gp = torch.autograd.grad(loss(theta0 + P @ v), (v, P))
        v = (v - lr * gv).detach()
        with torch.no_grad():
            P -= lr * gp
    return v


def subspace_stale(loss, theta0, P, steps, lr):
    theta = theta0.clone().requires_grad_()
    g, = torch.autograd.grad(loss(theta), theta)
    return -lr * steps * (P.T @ g)


def subspace_moves_theta0(loss, theta0, P, steps, lr):
    v = torch.zeros(P.shape[1])
    for _ in range(steps):
        v.requires_grad_()
        theta = theta0 + P @ v
        g, = torch.autograd.grad(loss(theta), v)
        v = (v - lr * g).detach()
        theta0 += P @ v
    return v


def subspace_no_grad(loss, theta0, P, steps, lr):
    v = torch.zeros(P.shape[1])
    for _ in range(steps):
        loss(theta0 + P @ v).backward()
        v -= lr * v.grad
    return v


def subspace_theta_once(loss, theta0, P, steps, lr):
    v = torch.zeros(P.shape[1], requires_grad=True)
    theta = theta0 + P @ v
    for _ in range(steps):
        loss(theta).backward()
        with torch.no_grad():
            v -= lr * v.grad
        v.grad = None
    return v.detach()


def subspace_not_a_leaf(loss, theta0, P, steps, lr):
    v = torch.zeros(P.shape[1], requires_grad=True)
    for _ in range(steps):
        loss(theta0 + P @ v).backward()
        v = v - lr * v.grad
    return v


def subspace_shapes(loss, theta0, P, steps, lr):
    v = torch.zeros(P.shape[1], requires_grad=True)
    loss(theta0 + P.T @ v)
    return v


def subspace_adam(loss, theta0, P, steps, lr):
    v = torch.zeros(P.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([v], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(theta0 + P @ v).backward()
        optimizer.step()
    return v


def subspace_sgd(loss, theta0, P, steps, lr):
    v = torch.nn.Parameter(torch.zeros(P.shape[1]))
    optimizer = torch.optim.SGD([v], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(theta0 + P @ v).backward()
        optimizer.step()
    return v.detach()


def subspace_projected(loss, theta0, P, steps, lr):
    """Moves θ along the gradient's part within the subspace, and reads v off at the end."""
    theta = theta0.clone()
    for _ in range(steps):
        theta.requires_grad_()
        g, = torch.autograd.grad(loss(theta), theta)
        theta = (theta - lr * P @ (P.T @ g)).detach()
    return P.T @ (theta - theta0)


def subspace_chain_rule(loss, theta0, P, steps, lr):
    """The gradient of v as Pᵀ times the gradient of θ."""
    v = torch.zeros(P.shape[1])
    for _ in range(steps):
        theta = (theta0 + P @ v).requires_grad_()
        loss(theta).backward()
        v = v - lr * P.T @ theta.grad
    return v


INTRINSIC_DIMENSION = Exercise(
    name="intrinsic-dimension", chapter=CHAPTER, title="Train in a random subspace", points=4, minutes=15, difficulty=3,
    inputs=subspace_inputs, probe=subspace_probe, reference=subspace_sgd,
    mistakes={
        "trains θ": (subspace_trains_theta,
            "You trained all D parameters and looked at the result through Pᵀ. In the subspace only v moves: θ is θ₀ + P "
            "v at every step, and the gradient is that of v."),
        "starts at random": (make_subspace(start=lambda d: torch.randn(d, generator=torch.Generator().manual_seed(0))),
            "v starts at random numbers, so training begins at another model than θ₀. Start at zero: then θ = θ₀."),
        "starts at one": (make_subspace(start=torch.ones),
            "v starts at ones, so training begins at another model than θ₀. Start at zero: then θ = θ₀."),
        "uphill": (make_subspace(sign=1),
            "You add the gradient, and the loss grows. Descent subtracts lr · gradient."),
        "adds up gradients": (make_subspace(zeroes=False),
            "The gradients of earlier steps are still in v.grad: backward() adds to what is there. Set it to None (or "
            "zero) before each step."),
        "one step too few": (make_subspace(extra=-1),
            "You take one step too few: `steps` steps are `steps` changes of v."),
        "one step too many": (make_subspace(extra=1),
            "You take one step too many: `steps` steps are `steps` changes of v."),
        "θ₀ forgotten": (make_subspace(theta=lambda t, P, v: P @ v),
            "The model is P v, without θ₀: you train a random model and not the pretrained one. θ = θ₀ + P v."),
        "θ₀ subtracted": (make_subspace(theta=lambda t, P, v: t - P @ v),
            "You subtract P v from θ₀. It trains as well, with v of the opposite sign; the definition is θ = θ₀ + P v."),
        "gradient at the start": (subspace_stale,
            "Every step uses the gradient at θ₀. Build θ = θ₀ + P v anew in each step, and take the gradient there."),
        "θ₀ moves": (subspace_moves_theta0,
            "θ₀ changes from step to step and P v is added again and again. θ₀ stays; only v accumulates."),
        "P trains": (subspace_trains_p,
            "P is changed too. It is drawn once and then fixed: d numbers train, not D·d."),
        "normalised steps": (make_subspace(step=torch.sign),
            "Your steps have the gradient's sign and not its size. Plain gradient descent: v ← v − lr · gradient."),
        "Adam": (subspace_adam,
            "This is Adam. The exercise asks for plain gradient descent, so that there is one right answer: "
            "torch.optim.SGD, or the one line by hand."),
        "returns θ": (make_subspace(out=lambda t, P, v: t + P @ v),
            "You return θ. Return v, the d numbers that were trained: with P and θ₀ they are the whole model."),
        "returns P v": (make_subspace(out=lambda t, P, v: P @ v),
            "You return P v, which has D numbers again. Return v."),
        "no gradient asked for": (subspace_no_grad,
            "v does not ask for a gradient. Make it with requires_grad=True (and change it under torch.no_grad())."),
        "θ built once": (subspace_theta_once,
            "θ is built once, before the loop. It does not follow v by itself, and PyTorch lets one go back through it only "
            "once. Write θ = θ₀ + P v inside the loop."),
        "not a leaf": (subspace_not_a_leaf,
            "After the first step v is the result of a computation, and backward() puts no .grad into such a tensor: it is "
            "None. Change v in place under torch.no_grad(), or write v = (v - lr * g).detach().requires_grad_()."),
        "shapes do not meet": (subspace_shapes,
            "Two shapes do not meet. P is [D, d] and v is [d]: the product is P @ v, [D]."),
    },
    alternatives={"by hand": make_subspace(), "projected gradients of θ": subspace_projected,
                  "chain rule": subspace_chain_rule},
    rtol=1e-3, atol=1e-5, accepts="function", hides=HIDES)


# ================================================================================================ d90

def d90_inputs(rng: torch.Generator) -> list[dict]:
    def case(shape: list[tuple[int, float]], before: float, full: float, noise: float = 0.02, seeds: int = 3) -> dict:
        """shape: (d, share of the way). Seeds lie around their mean by ±noise of the way."""
        runs = []
        for d, share in shape:
            around = torch.linspace(-noise, noise, seeds)[torch.randperm(seeds, generator=rng)].tolist()
            runs += [[d, before + (share + shift) * (full - before)] for shift in around]
        order = torch.randperm(len(runs), generator=rng).tolist()
        order.sort(key=lambda i: i // seeds != len(shape) - 2)          # the last but one d first, the rest in no order
        return {"runs": [runs[i] for i in order], "before": before, "full": full}

    u = torch.rand(8, generator=rng).tolist()
    sizes = [int(10 ** (1 + i + u[i] * 0.8)) for i in range(5)]
    full = 0.4 + 0.3 * u[5]
    steady = [0.03 + 0.02 * u[6], 0.11, 0.91, 0.95, 1.02]               # the last a little better than `full`
    return [case(list(zip(sizes, [0.2, 0.5, 0.92, 0.96, 0.98])), 2.5, 0.1, seeds=1, noise=0.0),   # a tenth of before: 94 %
            case(list(zip(sizes, steady)), 2.5, full, seeds=1, noise=0.0),
            case(list(zip(sizes, steady)), 3.0, full),
            case(list(zip(sizes, [0.3, 0.6, 0.89, 0.95, 0.99])), 2.6 + u[7], full, noise=0.05),    # one seed gets there
            case(list(zip(sizes, [0.3, 0.6, 0.91, 0.95, 0.99])), 2.6 + u[7], full, noise=0.05),    # one seed does not
            case(list(zip(sizes[:3], [0.1, 0.4, 0.7])), 2.5, full)]                                # nobody does


def d90_probe(work: Callable, case: dict) -> dict[str, Any]:
    found = work([tuple(run) for run in case["runs"]], case["before"], case["full"])
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    return {"d90": found}


def d90_reference(runs, before, full):
    from pefttools.intrinsic import d90

    return d90(runs, full, before)


def make_d90(reached=lambda loss, before, full: (before - loss) / (before - full) >= 0.9, pool=lambda s: sum(s) / len(s),
             choose=min, none=None) -> Callable:
    def work(runs, before, full):
        by_d: dict[int, list[float]] = {}
        for d, loss in runs:
            by_d.setdefault(d, []).append(loss)
        good = [d for d, losses in by_d.items() if reached(pool(losses), before, full)]
        return choose(good) if good else none
    return work


def d90_first(runs, before, full):
    """The first in the order given."""
    return next((d for d, loss in runs if loss <= before - 0.9 * (before - full)), None)


def d90_best(runs, before, full):
    return min(runs, key=lambda run: run[1])[0]


def d90_index(runs, before, full):
    sizes = sorted({d for d, _ in runs})
    found = make_d90()(runs, before, full)
    return None if found is None else sizes.index(found)


def d90_loss(runs, before, full):
    return before - 0.9 * (before - full)


def d90_sorted(runs, before, full):
    target = full + 0.1 * (before - full)
    for d in sorted({d for d, _ in runs}):
        losses = torch.tensor([loss for size, loss in runs if size == d])
        if losses.mean() <= target + 1e-9:
            return d


def d90_library(runs, before, full):
    """Share of the way, one line per d."""
    groups = {d: [loss for size, loss in runs if size == d] for d, _ in runs}
    return min((d for d, s in groups.items() if before - math.fsum(s) / len(s) >= 0.9 * (before - full)), default=None)


D90 = Exercise(
    name="d90", chapter=CHAPTER, title="Read off the intrinsic dimension", points=2, minutes=8, difficulty=2,
    inputs=d90_inputs, probe=d90_probe, reference=d90_reference,
    mistakes={
        "ninety percent of the loss": (make_d90(lambda loss, before, full: loss <= full / 0.9),
            "You ask for a loss within 90 % of the full one, as one does with an accuracy. A loss does not start at "
            "zero: 90 % of the way from `before` down to `full`."),
        "nine tenths of before": (make_d90(lambda loss, before, full: loss <= 0.9 * before),
            "You ask for a loss 10 % below the untouched model's. Asked for is 90 % of the way to what full fine-tuning "
            "reaches."),
        "a tenth of before": (make_d90(lambda loss, before, full: loss <= 0.1 * before),
            "You ask for a loss of a tenth of `before`, as if full fine-tuning reached zero. The way ends at `full`."),
        "ten percent of the way": (make_d90(lambda loss, before, full: (before - loss) / (before - full) >= 0.1),
            "You ask for 10 % of the way instead of 90 %: the target is full + 0.1 · (before − full)."),
        "any better than before": (make_d90(lambda loss, before, full: loss < before),
            "You take any improvement. Asked for is 90 % of the way."),
        "as good as full": (make_d90(lambda loss, before, full: loss <= full),
            "You ask for all of the way. d₉₀ is where 90 % of it is reached."),
        "nine tenths of full": (make_d90(lambda loss, before, full: loss <= 0.9 * full),
            "You ask for a loss of 0.9 · full, which is better than full fine-tuning itself. 90 % of the *way* from `before` "
            "down to `full` is asked for."),
        "best seed": (make_d90(pool=min),
            "You take the best seed of each d. One lucky subspace is no measurement: average the seeds."),
        "worst seed": (make_d90(pool=max),
            "You take the worst seed of each d. Average the seeds."),
        "first in the list": (d90_first,
            "You take the first run in the list that gets there. The list is in no order, and a d counts by the mean of "
            "its seeds."),
        "largest": (make_d90(choose=max),
            "You return the largest d that gets there. The smallest is the intrinsic dimension."),
        "best loss": (d90_best,
            "You return the d with the lowest loss, wherever 90 % lies. The smallest d that reaches 90 % of the way is "
            "asked for."),
        "position": (d90_index,
            "You return the position in the list of sizes. Return d itself."),
        "the target": (d90_loss,
            "You return the loss that has to be reached. Return the smallest d whose mean loss is at or below it."),
        "zero for none": (make_d90(none=0),
            "Where no d gets there you return 0, which looks like an answer. Return None."),
        "fails where none": (lambda runs, before, full: min(d for d in {d for d, _ in runs} if (
                before - sum(s := [x for e, x in runs if e == d]) / len(s)) >= 0.9 * (before - full)),
            "Where no d gets there, min() has nothing to choose from and raises. Return None then: min(…, "
            "default=None)."),
    },
    alternatives={"share of the way": make_d90(), "sorted": d90_sorted, "one line": d90_library},
    accepts="function", hides=HIDES)


EXERCISES: list[Exercise] = [ROW_OPERATION, ROW_ECHELON, MATRIX_RANK, LOW_RANK_APPROX, RANK_BUDGET, EFFECTIVE_RANK,
                             INTRINSIC_DIMENSION, D90]


# ================================================================================================ questions

QUESTIONS: list[Question] = [
    Question(
        name="rank-q-gradient", chapter=CHAPTER, points=1, right="c",
        text="A weight $W$ of $100 \\times 64$ has rank 10. You train it as it is, all 6,400 entries, with one step of "
             "gradient descent on a batch of 256 inputs. What is its rank afterwards?",
        options={
            "a": ("10: the other 90 outputs repeat what these ten say, and so do their gradients.",
                  "This is what source 000 says, and the chapter measured otherwise. The gradient is δxᵀ, summed over "
                  "the batch: δ comes from the targets and x from the data, and neither knows that W has rank 10."),
            "b": ("11: one step adds one direction.",
                  "One *example* adds one direction, δxᵀ. A batch of 256 adds up to 256 of them at once."),
            "c": ("64, or as many as the inputs and the errors span.",
                  "Right: the gradient is a sum of 256 matrices δxᵀ, whose rank is limited by the sizes alone. To keep "
                  "the rank at 10 one has to train B and A instead, as LoRA does."),
            "d": ("100: gradients are full rank.",
                  "As high as it can be, yes; but a 100 × 64 matrix has rank 64 at most."),
        }),
    Question(
        name="rank-q-tolerance", chapter=CHAPTER, points=1, right="a",
        text="You multiply a random $512 \\times 16$ matrix by a random $16 \\times 512$ one in float32, and none of the 512 "
             "singular values of the product comes out as exactly 0. What is its numerical rank (numpy's rule)?",
        options={
            "a": ("16: the other 496 are as large as rounding makes them, below the tolerance.",
                  "Right. Each of them is some 1e-7 of the largest or less, and S.max() · max(m, n) · ε is 6e-5 of it."),
            "b": ("512: none of the singular values is 0.",
                  "In exact arithmetic 496 would be. Entries are rounded to 24 bits, and that noise has full rank; a "
                  "rank in floating point is always a rank up to a tolerance."),
            "c": ("That depends on how large the entries are.",
                  "It would with a fixed tolerance such as 1e-6. numpy's tolerance grows with the largest singular "
                  "value, so multiplying the matrix by 1000 changes nothing."),
            "d": ("Somewhere between: about half of the noise is above the tolerance.",
                  "The factor max(m, n) leaves room: rounding noise of such a product stays well below the tolerance. "
                  "The chapter shows how far."),
        }),
    Question(
        name="rank-q-eckart", chapter=CHAPTER, points=1, right="d",
        text="A matrix has the singular values 12, 4, 3, 0. How far from it, in the Frobenius norm, is the nearest matrix "
             "of rank 1?",
        options={
            "a": ("12", "That is the size of what is kept. The distance is made of what is left out: 4 and 3."),
            "b": ("4", "That is the distance in the spectral norm, where the largest left-out value alone counts. The "
                       "Frobenius norm adds the squares of all of them."),
            "c": ("7", "Squares add up, not the values: √(4² + 3²)."),
            "d": ("5", "Right: √(4² + 3² + 0²)."),
        }),
    Question(
        name="rank-q-which", chapter=CHAPTER, points=1, right="b",
        text="The 512 × 1024 matrix of source 000 is to be stored as a product of $512 \\times 50$ and $50 \\times 1024$. For "
             "which matrix does that go well?",
        options={
            "a": ("For any of this size: 76,800 numbers always suffice.",
                  "76,800 numbers cannot hold what 524,288 independent ones say. For a random matrix most of it is "
                  "lost; the chapter measured how much."),
            "b": ("For one whose singular values after number 50 are small beside the others.",
                  "Right: what is lost is exactly √(σ₅₁² + σ₅₂² + …), no more and no less."),
            "c": ("For a pretrained weight, since pretrained models are over-parametrised.",
                  "Their spectra fall slowly: cut the bundled model's weights and it no longer works. It is the *change* "
                  "made by fine-tuning that can be cut."),
            "d": ("For one with many zeros.",
                  "The unit matrix is nearly all zeros, and all its singular values are 1: no rank may be left out."),
        }),
    Question(
        name="rank-q-not-rank", chapter=CHAPTER, points=1, right="d",
        text="A model is trained in a random subspace with $d = 200$ (`θ₀ + P v`). What is the **rank** of the change of one "
             "of its 256 × 256 matrices?",
        options={
            "a": ("200: the dimension of the subspace.",
                  "d counts directions in the space of *all parameters*. Each such direction is a whole matrix of "
                  "random entries here, and such a matrix has full rank by itself."),
            "b": ("At most 200, and far less in each matrix, since d is shared among all of them.",
                  "Sharing does not lower the rank. One single direction, d = 1, already changes every entry of every "
                  "matrix."),
            "c": ("1: v is a vector.",
                  "P v is a vector with one entry for each parameter; seen as a matrix, its entries have random signs."),
            "d": ("256: P v puts random signs everywhere.",
                  "Right: a small intrinsic dimension does not mean a low rank. LoRA's bet is inspired by the one and "
                  "is a bet on the other, and it was to be tested by itself."),
        }),
    Question(
        name="rank-q-d90", chapter=CHAPTER, points=1, right="a",
        text="On a model of 5 million parameters you measure $d_{90} = 10{,}000$. What does that say?",
        options={
            "a": ("Moving within 10,000 random directions suffices for 90 % of what full fine-tuning gains.",
                  "Right. The directions were drawn before anybody looked at the data, so there must be good models "
                  "nearly everywhere around the start."),
            "b": ("10,000 of the parameters matter; the others could stay frozen.",
                  "All parameters move, each listening to one of the d coordinates. It is the movement that has few "
                  "degrees of freedom."),
            "c": ("The other directions have gradients near zero.",
                  "The random directions know nothing of the gradient. If only special directions mattered, random "
                  "ones would not do."),
            "d": ("LoRA will need 10,000 parameters.",
                  "LoRA chooses other directions, and adapts them while it trains. The two numbers are of the same "
                  "kind and need not be equal; the chapter compares them."),
        }),
]
