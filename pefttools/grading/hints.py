"""What is striking about a wrong answer: a constant factor, a transpose, one wrong row. A sentence, or nothing.

Each hint is checked before it is given: "2 times the expected one" holds for every value, or is not said.
"""

from __future__ import annotations

import math

import torch


def shape_hint(got: tuple, expected: tuple) -> str:
    """What is striking about a wrong shape, where something is."""
    if len(got) == len(expected) >= 2 and got[:-2] == expected[:-2] and got[-2:] == expected[:-3:-1]:
        return " Rows and columns are the other way round: a transpose too many or too few."
    if [size for size in got if size != 1] == [size for size in expected if size != 1]:
        return " They differ only in dimensions of size 1."
    if math.prod(got) == math.prod(expected):
        return " The number of values is right, their arrangement is not."
    if len(got) != len(expected):
        return f" It should have {len(expected)} dimension{'' if len(expected) == 1 else 's'}, not {len(got)}."
    wrong = [i for i, (x, y) in enumerate(zip(got, expected)) if x != y]
    return f" Only dimension {wrong[0]} is wrong." if len(wrong) == 1 and len(expected) > 1 else ""


def value_hint(x: torch.Tensor, y: torch.Tensor, nan: int, wrong: torch.Tensor, rtol: float, atol: float) -> str:
    """What is striking about wrong values, where something is."""
    total = y.numel()
    if nan:
        return f" {'All' if nan == total else nan} of yours {'is' if nan == 1 else 'are'} NaN (not a number)."
    if x.dtype.is_complex or not bool(x.isfinite().all() and y.isfinite().all()):
        return ""
    if not x.any():
        return " Yours is zero everywhere." if total > 1 else ""
    near = max(rtol, 1e-5)
    big = y.abs() > max(atol, 1e-3 * float(y.abs().max()))
    if int(big.sum()) >= min(2, total):
        ratio = float((x[big] / y[big]).median())
        if total > 1 and telling_ratio(ratio) and torch.allclose(x, ratio * y, rtol=10 * near, atol=10 * atol):
            return f" Every value of yours is {ratio_text(ratio)} the expected one."
    if total > 2 and x.dim() >= 2 and x.shape[-1] == x.shape[-2] and torch.allclose(x.mT, y, rtol=rtol, atol=atol):
        return " Transposed, yours would be right."
    shift = float((x - y).median())
    if total > 2 and torch.allclose(x - shift, y, rtol=near, atol=max(atol, 1e-5 * abs(shift))):
        return f" Every value of yours is the expected one {'plus' if shift > 0 else 'minus'} {abs(shift):.4g}."
    if x.dim() >= 2 and 0 < int(wrong.sum()) < total:
        rows = wrong.flatten(1).any(1).nonzero().flatten().tolist()
        if len(rows) == 1 and wrong.shape[0] > 1:
            return f" Only index {rows[0]} of the first dimension is wrong."
        columns = wrong.flatten(0, -2).any(0).nonzero().flatten().tolist()
        if len(columns) == 1 and wrong.shape[-1] > 1:
            return f" Only index {columns[0]} of the last dimension is wrong."
    return ""


def telling_ratio(ratio: float) -> bool:
    """Whether it is worth saying that one number is this many times another."""
    return math.isfinite(ratio) and abs(ratio) > 1e-6 and abs(ratio - 1) > 1e-3


def ratio_text(ratio: float) -> str:
    """ "2 times", "1/8 of" or "minus", to be followed by "the expected one"."""
    if abs(ratio + 1) < 1e-4:
        return "minus"
    if abs(ratio) < 0.7 and abs(1 / ratio - round(1 / ratio)) < 1e-3 * abs(1 / ratio):
        return f"{'minus ' if ratio < 0 else ''}1/{abs(round(1 / ratio))} of"
    return f"{ratio:.4g} times"
