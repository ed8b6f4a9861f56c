"""Comparing answers with the reference's, leaf by leaf, and naming the mistake. No student code runs here.

`compare` looks at two pieces of plain data; `judge` at what a work gave on all cases (`probe.Outcome`), and gives the
verdict. The complaint shown is the first of: not written yet, raised, missing or extra leaf, type, shape, dtype, value;
gradients only when all else is right, since they follow from it.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from pefttools.grading.exercise import Exercise, ExerciseError
from pefttools.grading.plain import SCALARS, NotPlain, plain
from pefttools.grading.probe import Outcome, Raised, probe_all
from pefttools.grading.verdict import Verdict

STAGES = ("missing", "extra", "type", "shape", "dtype", "value")


@dataclass(frozen=True)
class Difference:
    """One leaf that is not as expected. Everything in it is text, numbers or a dict of them: JSON-able."""

    stage: str                  # one of STAGES
    leaf: str                   # "output", "layers[0]", "gradient of A"
    gradient: bool              # a gradient leaf: compared after all others
    message: str                # whole sentences
    expected: str = ""          # short text of what was expected ...
    got: str = ""               # ... and of what came
    details: dict = field(default_factory=dict)     # values: differing, total, position, max_abs, max_rel, nan

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
    """Every leaf that differs, in the order of `expected`; both are plain already."""
    if type(expected) is NotPlain:
        raise ExerciseError(f"the expected {_leaf(path)} holds {expected.name}: a probe must give plain data for right work")
    if type(expected) is dict:
        if type(got) is not dict:
            yield _type(path, got, "a dict with " + _names(expected))
            return
        for key, value in expected.items():
            if key in got:
                yield from differences(got[key], value, rtol, atol, (*path, key))
            else:
                leaf = _leaf((*path, key))
                yield Difference("missing", leaf, _is_gradient((*path, key)), f"There is no `{leaf}` in the answer. "
                                 f"It has {_names(got)}; it should have {_names(expected)}.", a(value), "nothing")
        for key in got:
            if key not in expected:
                leaf = _leaf((*path, key))
                yield Difference("extra", leaf, _is_gradient((*path, key)), f"There is a `{leaf}` too many in the answer. "
                                 f"It should have {_names(expected)} and nothing else.", "nothing", a(got[key]))
    elif type(expected) in (list, tuple):
        yield from _sequence(got, expected, rtol, atol, path)
    elif type(expected) is torch.Tensor:
        difference = _tensor(got, expected, rtol, atol, path)
        if difference is not None:
            yield difference
    else:
        difference = _scalar(got, expected, rtol, atol, path)
        if difference is not None:
            yield difference


# ── leaves ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _sequence(got: Any, expected: list | tuple, rtol: float, atol: float, path: tuple) -> Iterator[Difference]:
    leaf = _leaf(path)
    if type(got) not in (list, tuple):
        yield _type(path, got, f"a list of {len(expected)}")
        return
    flat = all(type(item) in SCALARS for item in expected)
    if len(got) != len(expected):
        yield Difference("shape", leaf, _is_gradient(path), f"`{leaf}` has {len(got)} entries; expected {len(expected)}.",
                         _list_text(expected), _list_text(got))
        return
    found = [difference for index, (ours, theirs) in enumerate(zip(got, expected))
             for difference in differences(ours, theirs, rtol, atol, (*path, index))]
    values = [difference for difference in found if difference.stage == "value"]
    if not flat or len(values) < len(found) or len(expected) < 2:
        yield from found
    elif values:
        # A list of numbers is one leaf to a reader: the whole of it beside the whole of the other.
        first = next(index for index in range(len(expected)) if values[0].leaf == _leaf((*path, index)))
        yield Difference("value", leaf, _is_gradient(path), f"`{leaf}` has the right length, but {len(values)} of its "
                         f"{len(expected)} entries are wrong. The first is at position {first}: expected "
                         f"{_scalar_text(expected[first])}, got {_scalar_text(got[first])}.",
                         _list_text(expected, first), _list_text(got, first),
                         {"differing": len(values), "total": len(expected), "position": [first]})


def _scalar(got: Any, expected: Any, rtol: float, atol: float, path: tuple) -> Difference | None:
    leaf, kind = _leaf(path), type(expected)
    right_type = type(got) in (int, float) if kind is float else type(got) is kind
    if not right_type:
        return _type(path, got, {bool: "True or False", int: "a whole number", float: "a number", str: "a text",
                                 type(None): "None"}.get(kind, kind.__name__))
    if kind is float:
        if _close(got, expected, rtol, atol):
            return None
    elif got == expected:
        return None
    ours, theirs, hint, details = _scalar_text(got), _scalar_text(expected), "", {}
    if kind in (int, float) and _finite(got) and _finite(expected):
        details = {"max_abs": abs(float(got) - float(expected))}
        if expected and abs(ratio := float(got) / float(expected)) > 1e-6 and _telling(ratio):
            hint = f" Yours is {_ratio_text(ratio)} the expected one."
        if ours == theirs:
            ours, theirs = repr(got), repr(expected)
    if kind is str and max(len(got), len(expected)) > 60:
        at = next((i for i, (x, y) in enumerate(zip(got, expected)) if x != y), min(len(got), len(expected)))
        ours, theirs = (f"{text[max(0, at - 20):at + 40]!r}" for text in (got, expected))
        message = f"`{leaf}` is not the expected text. They part at character {at}: expected …{theirs}…, got …{ours}…"
        return Difference("value", leaf, _is_gradient(path), message, repr(expected)[:1500], repr(got)[:1500], {"position": [at]})
    return Difference("value", leaf, _is_gradient(path), f"`{leaf}`: expected {theirs}, got {ours}.{hint}", theirs, ours, details)


def _tensor(got: Any, expected: torch.Tensor, rtol: float, atol: float, path: tuple) -> Difference | None:
    leaf, gradient = _leaf(path), _is_gradient(path)
    if type(got) is not torch.Tensor:
        return _type(path, got, a(expected))
    ours, theirs = tuple(got.shape), tuple(expected.shape)
    if ours != theirs:
        return Difference("shape", leaf, gradient, f"`{leaf}` has shape {_shape(ours)}; expected {_shape(theirs)}."
                          + _shape_hint(ours, theirs), f"shape {_shape(theirs)}", f"shape {_shape(ours)}")
    if got.dtype != expected.dtype:
        ours, theirs = (str(tensor.dtype).removeprefix("torch.") for tensor in (got, expected))
        return Difference("dtype", leaf, gradient, f"`{leaf}` has the right shape, but its numbers are {ours}; expected {theirs}.",
                          theirs, ours)
    return _values(got, expected, rtol, atol, leaf, gradient)


def _values(got: torch.Tensor, expected: torch.Tensor, rtol: float, atol: float, leaf: str, gradient: bool) -> Difference | None:
    total = expected.numel()
    if total == 0:
        return None
    if expected.dtype.is_floating_point or expected.dtype.is_complex:
        wide = torch.complex128 if expected.dtype.is_complex else torch.float64
        x, y = got.to(wide), expected.to(wide)
        error = (x - y).abs()
        excess = error - (atol + rtol * y.abs())
        same = (x == y) | (x.isnan() & y.isnan())
        # NaN and infinities make NaN errors: these are the worst of all, unless both sides agree in them.
        excess = torch.where(excess.isnan(), math.inf, excess).masked_fill(same, -math.inf)
    else:
        same = got == expected
        x, y = got.to(torch.float64), expected.to(torch.float64)
        error = (x - y).abs()
        excess = error.masked_fill(same, -math.inf)
        excess = torch.where(~same & (excess <= 0), 1.0, excess)      # int64 beyond 2^53 may look equal in float64
    wrong = excess > 0
    differing = int(wrong.sum())
    if differing == 0:
        return None
    worst = _position(int(excess.flatten().argmax()), expected.shape)
    ours, theirs = got[tuple(worst)], expected[tuple(worst)]
    finite = error[wrong & error.isfinite()]
    relative = (error / y.abs())[wrong & error.isfinite() & (y != 0)]
    nan = int((x.isnan() & ~y.isnan()).sum()) if got.dtype.is_floating_point else 0
    details = {"differing": differing, "total": total, "position": worst, "nan": nan,
               "max_abs": float(finite.max()) if finite.numel() else None,
               "max_rel": float(relative.max()) if relative.numel() else None}
    count = "its value is wrong" if total == 1 else f"{differing} of its {total} values are wrong"
    at = f"The worst is at {worst}: expected" if total > 1 else "Expected"
    left, right = _scalar_text(theirs.item()), _scalar_text(ours.item())
    if left == right:
        left, right = repr(theirs.item()), repr(ours.item())
    message = f"`{leaf}` has the right shape {_shape(tuple(got.shape))}, but {count}. {at} {left}, got {right}."
    if details["max_abs"] is not None and total > 1 and expected.dtype.is_floating_point:
        message += f" Largest error: {details['max_abs']:.3g}"
        message += f", relative {details['max_rel']:.3g}." if details["max_rel"] is not None else "."
    message += _value_hint(x, y, nan, wrong, rtol, atol)
    return Difference("value", leaf, gradient, message, tensor_text(expected, worst), tensor_text(got, worst), details)


def _position(index: int, shape: torch.Size) -> list[int]:
    """The indices of the flat `index`. (torch.unravel_index does it too, and imports sympy for it: four seconds.)"""
    position = []
    for size in reversed(shape):
        index, here = divmod(index, size)
        position.insert(0, here)
    return position


def _value_hint(x: torch.Tensor, y: torch.Tensor, nan: int, wrong: torch.Tensor, rtol: float, atol: float) -> str:
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
        if total > 1 and _telling(ratio) and torch.allclose(x, ratio * y, rtol=10 * near, atol=10 * atol):
            return f" Every value of yours is {_ratio_text(ratio)} the expected one."
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


def _type(path: tuple, got: Any, wanted: str) -> Difference:
    leaf, given, hint = _leaf(path), a(got), ""
    if got is ...:
        hint = " It is not written yet."
    elif got is None:
        hint = " A function without `return` gives None."
    elif given == "a function":
        hint = " Are the brackets of a call missing?"
    elif type(got) is torch.Tensor and got.numel() == 1 and "number" in wanted:
        hint = " `.item()` makes a number of a tensor with one value."
    elif type(got) is float and wanted == "a whole number":
        hint = " Whole numbers come from `//`, `int(...)` or `.numel()`."
    return Difference("type", leaf, _is_gradient(path), f"`{leaf}` should be {wanted}; it is {given}.{hint}", wanted, given)


def _close(got: float, expected: float, rtol: float, atol: float) -> bool:
    if got == expected or (got != got and expected != expected):
        return True
    if not _finite(got) or not _finite(expected):
        return False
    return abs(float(got) - expected) <= atol + rtol * abs(expected)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:       # an integer too large for a float
        return False


# ── words ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _leaf(path: tuple) -> str:
    text = ""
    for key in path:
        text += f"[{key}]" if type(key) is int else f" / {key}" if text else str(key)[:120]
    return text or "the result"


def _is_gradient(path: tuple) -> bool:
    return any(type(key) is str and key.lower().startswith("gradient") for key in path)


def _names(keys: dict) -> str:
    if not keys:
        return "no entries"
    shown = ", ".join(f"`{str(key)[:60]}`" for key in list(keys)[:8])
    return shown + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")


def a(value: Any) -> str:
    """A phrase for a piece of plain data, with its article: "a tensor of shape (2, 3)", "the text 'b'"."""
    kind = type(value)
    if kind is NotPlain:
        return value.name
    if kind is torch.Tensor:
        return f"a tensor of shape {_shape(tuple(value.shape))}" if value.dim() else f"a tensor with the one value {_scalar_text(value.item())}"
    if kind is dict:
        return f"a dict with {_names(value)}"
    if kind in (list, tuple):
        return f"a {kind.__name__} of {len(value)}"
    if kind is str:
        return f"the text {_scalar_text(value)}"
    if kind is int:
        return f"the whole number {_scalar_text(value)}"
    if kind is float:
        return f"the number {_scalar_text(value)}"
    return "`...`" if value is ... else _scalar_text(value)


def _scalar_text(value: Any) -> str:
    kind = type(value)
    if kind is float:
        return f"{value:.6g}" if not value.is_integer() or abs(value) >= 1e15 else f"{value:.1f}"
    if kind is int:      # Python refuses to print integers of more than some 4,300 digits
        return str(value) if value.bit_length() <= 256 else f"a whole number of {value.bit_length()} bits"
    if kind in (str, bytes):
        return repr(value) if len(value) <= 80 else f"{value[:80]!r}…"
    return a(value) if kind not in (*SCALARS, complex) else str(value)


def _list_text(values: list | tuple, at: int = 0, width: int = 16) -> str:
    first = max(0, min(at - width // 2, len(values) - width)) if len(values) > 2 * width else 0
    last = first + width if len(values) > 2 * width else len(values)
    inner = ", ".join(_scalar_text(value) for value in values[first:last])
    return "[" + ("…, " if first else "") + inner + (", …" if last < len(values) else "") + "]"


def _shape(shape: tuple) -> str:
    return f"({', '.join(str(size) for size in shape)}{',' if len(shape) == 1 else ''})"


def _shape_hint(got: tuple, expected: tuple) -> str:
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


def _telling(ratio: float) -> bool:
    return math.isfinite(ratio) and abs(ratio) > 1e-6 and abs(ratio - 1) > 1e-3


def _ratio_text(ratio: float) -> str:
    if abs(ratio + 1) < 1e-4:
        return "minus"
    if abs(ratio) < 0.7 and abs(1 / ratio - round(1 / ratio)) < 1e-3 * abs(1 / ratio):
        return f"{'minus ' if ratio < 0 else ''}1/{abs(round(1 / ratio))} of"
    return f"{ratio:.4g} times"


def tensor_text(tensor: torch.Tensor, around: list[int] | tuple[int, ...] = (), rows: int = 6, columns: int = 8) -> str:
    """A tensor as text: whole when it is small, else the part around the position `around`, with … for what is left out."""
    around = list(around) or [0] * tensor.dim()
    if tensor.dim() == 0 or tensor.numel() == 0:
        return _scalar_text(tensor.item()) if tensor.dim() == 0 else f"nothing (shape {_shape(tuple(tensor.shape))})"
    head = ""
    if tensor.dim() > 2:
        index = tuple(around[:-2])
        if tensor.shape[:-2].numel() > 1:
            head = f"[{', '.join(map(str, index))}, :, :]\n"
        tensor, around = tensor[index], around[-2:]
    flat = tensor.dim() == 1
    if flat:
        tensor, around = tensor[None], [0, around[0]]
    spans = []
    for size, at, most in zip(tensor.shape, around, (rows, columns)):
        first = 0 if size <= most else max(0, min(at - most // 2, size - most))
        spans.append((first, min(size, first + most)))
    (top, bottom), (left, right) = spans
    cells = [[_cell(value) for value in row] for row in tensor[top:bottom, left:right].tolist()]
    width = max(len(cell) for row in cells for cell in row)
    before, after = ("… " if left else ""), (" …" if right < tensor.shape[1] else "")
    lines = ["[" + before + "  ".join(cell.rjust(width) for cell in row) + after + "]" for row in cells]
    lines = (["…"] if top else []) + lines + (["…"] if bottom < tensor.shape[0] else [])
    return head + "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if type(value) in (float, complex) else str(value)


def describe_case(case: dict, number: int, total: int) -> str:
    """ "case 2 of 5: x (3, 5), W0 (7, 5), alpha = 16": sizes of tensors, and small values."""
    parts = []
    for key, value in case.items():
        kind = type(value)
        if isinstance(value, torch.Tensor):
            parts.append(f"{key} {_shape(tuple(value.shape))}" if value.dim() else f"{key} = {_scalar_text(value.item())}")
        elif kind in SCALARS:
            text = _scalar_text(value)
            parts.append(f"{key} = {text if len(text) <= 40 else text[:40] + '…'}")
        elif kind in (list, tuple) and len(value) <= 8 and all(type(item) in (bool, int, float) for item in value):
            parts.append(f"{key} = {_list_text(value)}")
        elif kind in (list, tuple, dict):
            parts.append(f"{key}: {kind.__name__} of {len(value)}")
    inputs = ": " + ", ".join(parts[:10]) + (", …" if len(parts) > 10 else "") if parts else ""
    return f"case {number + 1} of {total}{inputs}"


# ── the verdict ───────────────────────────────────────────────────────────────────────────────────────────────────────


def judge(exercise: Exercise, outcomes: list[Outcome], cases: list[dict], seed: int | None = None) -> Verdict:
    """The verdict on what a work gave (`probe_all`) on `cases`, which are those of `exercise.cases(seed)`.

    With a seed, the answers of the reference and of the mistakes are kept for the next work judged on the same seed;
    without one they are computed from `cases` at every call.

    Raises:
        ExerciseError: if the reference fails, that is, the exercise is broken.
    """
    def answers(kind: str, name: str) -> list[Outcome]:
        if seed is not None:
            return list(_answers(exercise, kind, name, seed))
        return probe_all(exercise, _work(exercise, kind, name), cases)

    total = len(cases)
    expected = answers("reference", "")
    for number, outcome in enumerate(expected):
        if outcome.raised is not None:
            raise ExerciseError(f"exercise {exercise.name!r} is broken: its reference raises {outcome.raised.type}: "
                                f"{outcome.raised.message} in {describe_case(cases[number], number, total)}")

    unwritten = next((o.raised for o in outcomes if o.raised is not None and o.raised.unwritten is not None), None)
    if unwritten is not None or any(o.raised is None and _blank(o.data) for o in outcomes):
        other = unwritten.unwritten if unwritten is not None and unwritten.unwritten not in ("", exercise.name) else None
        return not_written(exercise, seed, other)

    found, number = None, 0
    for index in range(total):
        if index >= len(outcomes):
            found, number = Raised("no answer", "the run ended before this case"), index
        elif outcomes[index].raised is not None:
            found, number = outcomes[index].raised, index
        if found is not None:
            break
    if found is None:
        ranked = [(difference.rank, index, order, difference) for index in range(total) for order, difference in enumerate(
            differences(plain(outcomes[index].data), expected[index].data, exercise.rtol, exercise.atol))]
        if not ranked:
            return Verdict.of(exercise, "passed", exercise.praise or _agreement(exercise, total), seed=seed)
        _, number, _, found = min(ranked, key=lambda entry: entry[:3])

    complaint = found.leaf if isinstance(found, Difference) else None
    mistake = _find_mistake(exercise, outcomes, expected, complaint, answers) if len(outcomes) == total else None
    parts = [exercise.mistakes[mistake][1].strip()] if mistake is not None else []
    where = line = None
    if isinstance(found, Raised):
        kind, leaf, wanted, got = "raised", None, None, f"{found.type}: {found.message}"
        where, line = found.place, found.line
        parts.append(_raised_text(exercise, found))
    else:
        kind, leaf, wanted, got = found.stage, found.leaf, found.expected, found.got
        parts.append(found.message)
    if not exercise.reveals:
        wanted, parts = None, (parts[:1] if mistake is not None else [exercise.complaint(got)])
    printed = outcomes[number].printed if number < len(outcomes) else ""
    shown_case = describe_case(cases[number], number, total) if exercise.reveals and total and (total > 1 or cases[0]) else None
    return Verdict.of(exercise, kind, "\n".join(parts), leaf=leaf, expected=wanted, got=got, mistake=mistake, case_number=number,
                      case=shown_case, place=where, line=line, printed=printed, seed=seed)


def not_written(exercise: Exercise, seed: int | None = None, other: str | None = None) -> Verdict:
    """The verdict on a stub; `other` is a further exercise's name, where the stub reached is that one's."""
    message = "Not written yet: replace the stub in the cell above, run it, then run this cell again."
    if other is not None:
        message = f"Not written yet: this calls your work of the exercise `{other}`, which is still a stub. Write that one first."
    return Verdict.of(exercise, "blank", message, seed=seed)


def _blank(data: Any) -> bool:
    """Whether nothing but `...` was given: as the result, or in every leaf of it."""
    if type(data) is dict:
        data = list(data.values())
    if type(data) in (list, tuple):
        return len(data) > 0 and all(_blank(item) for item in data)
    return data is ...


def _agreement(exercise: Exercise, total: int) -> str:
    cases = "one case" if total == 1 else f"{total} cases"
    return f"Equal to the reference on {cases} (to a relative {exercise.rtol:g} where numbers are rounded)."


def _raised_text(exercise: Exercise, raised: Raised) -> str:
    error = f"{raised.type}: {raised.message}" if raised.message else raised.type
    if raised.place is not None:
        return f"Your code raised {error}\nat {raised.place}" + (f":\n    {raised.line}" if raised.line else ".")
    hint = "Compare the names and the order of the arguments with the text of the exercise, and what is to be returned."
    if "NoneType" in raised.message:
        hint = "Something that should have a value is None: a function without `return` gives None."
    return f"The check could not work with it: {error}\n{hint}"


def _work(exercise: Exercise, kind: str, name: str) -> Any:
    return exercise.resolve(exercise.reference if kind == "reference" else exercise.mistakes[name][0])


@functools.lru_cache(maxsize=512)
def _answers(exercise: Exercise, kind: str, name: str, seed: int) -> tuple[Outcome, ...]:
    return tuple(probe_all(exercise, _work(exercise, kind, name), exercise.cases(seed)))


def _find_mistake(exercise: Exercise, outcomes: list[Outcome], expected: list[Outcome], leaf: str | None, answers: Any) -> str | None:
    """The mistake whose answers the work's equal on all cases; else the only one that explains the leaf complained of."""
    partial = []
    rtol, atol = exercise.rtol, exercise.atol
    ours = [Outcome(plain(outcome.data), outcome.raised) for outcome in outcomes]
    for name in exercise.mistakes:
        theirs = answers("mistakes", name)
        if all(_same(x, y, rtol, atol) for x, y in zip(theirs, expected)):
            continue        # the cases do not tell this mistake from right work: nobody can be told that it is theirs
        if all(_same(x, y, rtol, atol) for x, y in zip(ours, theirs)):
            return name
        if leaf is not None and _explains(ours, theirs, expected, leaf, rtol, atol):
            partial.append(name)
    return partial[0] if len(partial) == 1 else None


def _same(ours: Outcome, theirs: Outcome, rtol: float, atol: float) -> bool:
    if ours.raised is not None or theirs.raised is not None:
        return ours.raised is not None and theirs.raised is not None and _same_error(ours.raised, theirs.raised)
    return not _any(ours.data, theirs.data, rtol, atol)


def _any(got: Any, expected: Any, rtol: float, atol: float) -> bool:
    if type(got) is NotPlain and type(expected) is NotPlain:
        return got != expected
    try:
        return next(differences(got, expected, rtol, atol), None) is not None
    except ExerciseError:       # a mistake may give what is not plain; then only the very same matches
        return True


def _same_error(ours: Raised, theirs: Raised) -> bool:
    if ours.type != theirs.type:
        return False
    x, y = (re.sub(r"[0-9]+", "#", raised.message) for raised in (ours, theirs))
    return x == y or difflib.SequenceMatcher(None, x, y).ratio() >= 0.8


def _leaves(data: Any) -> dict[str, Any]:
    """The top-level entries of a result: the leaves by which mistakes are told apart."""
    return {str(key): value for key, value in data.items()} if type(data) is dict else {"": data}


def _explains(ours: list[Outcome], theirs: list[Outcome], expected: list[Outcome], leaf: str, rtol: float, atol: float) -> bool:
    """Whether the work is wrong in the mistake's way, on all cases, in every leaf the mistake touches, `leaf` among them.

    The work may be wrong elsewhere too. Only leaves with tensors or numbers tell: two works that both lack a True need
    not lack it for one reason.
    """
    if any(outcome.raised is not None for outcome in (*ours, *theirs)):
        return False
    cases = [tuple(_leaves(outcome.data) for outcome in case) for case in zip(ours, theirs, expected)]
    if any(x.keys() != right.keys() or y.keys() != right.keys() for x, y, right in cases):
        return False
    touched = {name for _, y, right in cases for name in right if _any(y[name], right[name], rtol, atol)}
    telling = any(type(y[name]) in (torch.Tensor, float, list, tuple) for _, y, _ in cases for name in touched & y.keys())
    about = any(leaf == name or leaf.startswith((f"{name} / ", f"{name}[")) or name == "" for name in touched)
    return telling and about and not any(
        _any(x[name], y[name], rtol, atol) for x, y, _ in cases for name in touched & y.keys())
