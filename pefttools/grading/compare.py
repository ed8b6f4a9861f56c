"""Comparing two pieces of plain data, leaf by leaf, and saying in sentences how they differ.

The order of complaints is: missing or extra leaf, type, shape, dtype, value; gradients only when all else is right,
since they follow from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from pefttools.grading.exercise import ExerciseError
from pefttools.grading.hints import ratio_text, shape_hint, telling_ratio, value_hint
from pefttools.grading.plain import SCALARS, NotPlain, plain
from pefttools.grading.words import a, is_gradient, leaf_name, list_text, names, scalar_text, shape_text, tensor_text

STAGES = ("missing", "extra", "type", "shape", "dtype", "value")
TYPES = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", type(None): "None"}


@dataclass(frozen=True)
class Difference:
    """One leaf that is not as expected. Everything in it is text, numbers or a dict of them: JSON-able."""

    stage: str      # one of STAGES
    leaf: str       # "output", "layers[0]", "gradient of A"
    gradient: bool  # a gradient leaf: compared after all others
    message: str    # whole sentences
    expected: str   # short text of what was expected ...
    got: str        # ... and of what came
    details: dict = field(default_factory=dict)  # of values: differing, total, position, max_abs, max_rel, nan

    @property
    def rank(self) -> tuple[bool, int]:
        """Smaller is complained about first."""
        return self.gradient, STAGES.index(self.stage)

    def to_dict(self) -> dict:
        """As plain JSON-able data."""
        return asdict(self)


def compare(got: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-6) -> Difference | None:
    """The first thing to say about `got` beside `expected`, or None when they agree.

    Both are nested dicts, lists and tuples of tensors, numbers, strings, booleans and None (lists and tuples count as
    the same). Floating-point leaves agree when |got − expected| ≤ atol + rtol·|expected|; NaN agrees with NaN, an
    infinity with itself; all else must be equal.
    """
    found = list(differences(plain(got), plain(expected), rtol, atol))
    return min(found, key=lambda difference: difference.rank) if found else None


def differences(got: Any, expected: Any, rtol: float, atol: float, path: tuple = ()) -> Iterator[Difference]:
    """Every leaf that differs, in the order of `expected`; both are plain already.

    Raises:
        ExerciseError: if `expected` holds what is not plain data.
    """
    kind = type(expected)
    if kind is NotPlain:
        raise ExerciseError(f"the expected {leaf_name(path)} holds {expected.name}: right work must give plain data")
    if kind is dict:
        yield from _dict(got, expected, rtol, atol, path)
    elif kind in (list, tuple):
        yield from _sequence(got, expected, rtol, atol, path)
    elif kind is torch.Tensor:
        yield from _tensor(got, expected, rtol, atol, path)
    else:
        yield from _scalar(got, expected, rtol, atol, path)


def _differ(stage: str, path: tuple, message: str, expected: str, got: str, **details: Any) -> Difference:
    """`message` says `{leaf}` where the leaf's name goes."""
    leaf = leaf_name(path)
    return Difference(stage, leaf, is_gradient(path), message.replace("{leaf}", f"`{leaf}`"), expected, got, details)


def _dict(got: Any, expected: dict, rtol: float, atol: float, path: tuple) -> Iterator[Difference]:
    if type(got) is not dict:
        yield _type(path, got, f"a dict with {names(expected)}")
        return
    for key, value in expected.items():
        if key in got:
            yield from differences(got[key], value, rtol, atol, (*path, key))
        else:
            message = f"There is no {{leaf}} in the answer. It has {names(got)}; it should have {names(expected)}."
            yield _differ("missing", (*path, key), message, a(value), "nothing")
    for key, value in got.items():
        if key not in expected:
            message = f"There is a {{leaf}} too many in the answer. It should have {names(expected)} and nothing else."
            yield _differ("extra", (*path, key), message, "nothing", a(value))


def _sequence(got: Any, expected: list | tuple, rtol: float, atol: float, path: tuple) -> Iterator[Difference]:
    total = len(expected)
    if type(got) not in (list, tuple):
        yield _type(path, got, f"a list of {total}")
        return
    if len(got) != total:
        message = f"{{leaf}} has {len(got)} {'entry' if len(got) == 1 else 'entries'}; expected {total}."
        yield _differ("shape", path, message, list_text(expected), list_text(got))
        return
    found = [(index, difference) for index, (ours, theirs) in enumerate(zip(got, expected))
             for difference in differences(ours, theirs, rtol, atol, (*path, index))]
    flat = all(type(item) in SCALARS for item in expected)
    if not flat or total < 2 or any(difference.stage != "value" for _, difference in found):
        yield from (difference for _, difference in found)
    elif found:
        # A list of numbers is one leaf to a reader: the whole of it beside the whole of the other.
        first = found[0][0]
        message = (f"{{leaf}} has the right length, but {len(found)} of its {total} entries {_is(len(found))} wrong. "
                   f"The first is at position {first}: expected {scalar_text(expected[first])}, "
                   f"got {scalar_text(got[first])}.")
        yield _differ("value", path, message, list_text(expected, first), list_text(got, first),
                      differing=len(found), total=total, position=[first])


def _scalar(got: Any, expected: Any, rtol: float, atol: float, path: tuple) -> Iterator[Difference]:
    kind = type(expected)
    if not (type(got) in (int, float) if kind is float else type(got) is kind):
        yield _type(path, got, TYPES.get(kind, kind.__name__))
    elif got == expected or (kind is float and _close(got, expected, rtol, atol)):
        return
    elif kind is str and max(len(got), len(expected)) > 60:
        at = next((i for i, (x, y) in enumerate(zip(got, expected)) if x != y), min(len(got), len(expected)))
        ours, theirs = (f"…{text[max(0, at - 20):at + 40]!r}…" for text in (got, expected))
        message = f"{{leaf}} is not the expected text. They part at character {at}: expected {theirs}, got {ours}"
        yield _differ("value", path, message, repr(expected)[:1500], repr(got)[:1500], position=[at])
    else:
        ours, theirs, hint, details = scalar_text(got), scalar_text(expected), "", {}
        if kind in (int, float) and _finite(got) and _finite(expected):
            details = {"max_abs": abs(float(got) - float(expected))}
            if expected and telling_ratio(ratio := float(got) / float(expected)):
                hint = f" Yours is {ratio_text(ratio)} the expected one."
            if ours == theirs:
                ours, theirs = repr(got), repr(expected)
        yield _differ("value", path, f"{{leaf}}: expected {theirs}, got {ours}.{hint}", theirs, ours, **details)


def _tensor(got: Any, expected: torch.Tensor, rtol: float, atol: float, path: tuple) -> Iterator[Difference]:
    if type(got) is not torch.Tensor:
        yield _type(path, got, a(expected))
    elif got.shape != expected.shape:
        ours, theirs = shape_text(tuple(got.shape)), shape_text(tuple(expected.shape))
        hint = shape_hint(tuple(got.shape), tuple(expected.shape))
        message = f"{{leaf}} has shape {ours}; expected {theirs}.{hint}"
        yield _differ("shape", path, message, f"shape {theirs}", f"shape {ours}")
    elif got.dtype != expected.dtype:
        ours, theirs = (str(tensor.dtype).removeprefix("torch.") for tensor in (got, expected))
        message = f"{{leaf}} has the right shape, but its numbers are {ours}; expected {theirs}."
        yield _differ("dtype", path, message, theirs, ours)
    elif not torch.equal(got, expected):
        yield from _values(got, expected, rtol, atol, path)


def _values(got: torch.Tensor, expected: torch.Tensor, rtol: float, atol: float, path: tuple) -> Iterator[Difference]:
    """Tensors of one shape and dtype."""
    rounded = expected.dtype.is_floating_point or expected.dtype.is_complex
    wide = torch.complex128 if expected.dtype.is_complex else torch.float64
    x, y = got.to(wide), expected.to(wide)
    error = (x - y).abs()
    if rounded:
        same = (x == y) | (x.isnan() & y.isnan())
        # NaN and infinities make errors of NaN: the worst of all, unless both sides agree in them.
        excess = (error - (atol + rtol * y.abs())).nan_to_num(math.inf, math.inf, -math.inf)
    else:
        same = got == expected
        excess = error.clamp(min=1)      # int64 numbers beyond 2^53 may look equal in float64
    wrong = (excess > 0) & ~same
    differing, total = int(wrong.sum()), expected.numel()
    if differing == 0:
        return
    worst = _position(int(excess.masked_fill(~wrong, -math.inf).flatten().argmax()), expected.shape)
    ours, theirs = got[tuple(worst)].item(), expected[tuple(worst)].item()
    finite = wrong & error.isfinite()
    absolute, relative = error[finite], (error / y.abs())[finite & (y != 0)]
    largest = [float(errors.max()) if errors.numel() else None for errors in (absolute, relative)]
    nan = int((x.isnan() & ~y.isnan()).sum())

    count = f"{differing} of its {total} values {_is(differing)} wrong" if total > 1 else "its value is wrong"
    left, right = scalar_text(theirs), scalar_text(ours)
    if left == right:
        left, right = repr(theirs), repr(ours)
    message = (f"{{leaf}} has the right shape {shape_text(tuple(got.shape))}, but {count}. "
               f"{f'The worst is at {worst}: expected' if total > 1 else 'Expected'} {left}, got {right}.")
    if rounded and total > 1 and largest[0] is not None:
        message += f" Largest error: {largest[0]:.3g}"
        message += f", relative {largest[1]:.3g}." if largest[1] is not None else "."
    message += value_hint(x, y, nan, wrong, rtol, atol)
    yield _differ("value", path, message, tensor_text(expected, worst), tensor_text(got, worst), differing=differing,
                  total=total, position=worst, nan=nan, max_abs=largest[0], max_rel=largest[1])


def _position(index: int, shape: torch.Size) -> list[int]:
    """The indices of the flat `index`. (torch.unravel_index does it too, and imports sympy for it: four seconds.)"""
    position = []
    for size in reversed(shape):
        index, here = divmod(index, size)
        position.insert(0, here)
    return position


def _type(path: tuple, got: Any, wanted: str) -> Difference:
    given, hint = a(got), ""
    if got is ...:
        hint = " It is not written yet."
    elif got is None:
        hint = " A function without `return` gives None."
    elif given == "a function":
        hint = " Are the brackets of a call missing?"
    elif type(got) is torch.Tensor and got.numel() == 1 and "number" in wanted:
        hint = " `.item()` makes a number of a tensor with one value."
    elif type(got) is float and wanted == TYPES[int]:
        hint = " Whole numbers come from `//`, `int(...)` or `.numel()`."
    return _differ("type", path, f"{{leaf}} should be {wanted}; it is {given}.{hint}", wanted, given)


def _is(count: int) -> str:
    return "is" if count == 1 else "are"


def _close(got: float, expected: float, rtol: float, atol: float) -> bool:
    if got != got and expected != expected:      # both NaN
        return True
    if not _finite(got) or not _finite(expected):
        return False
    return abs(float(got) - expected) <= atol + rtol * abs(expected)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:       # an integer too large for a float
        return False
