"""The words of the judge: leaves, shapes, numbers and tensors as a student reads them."""

from __future__ import annotations

from typing import Any

import torch

from pefttools.grading.plain import SCALARS, NotPlain


def leaf_name(path: tuple) -> str:
    """ "output", "layers[0] / q", or "the result" for the whole of it."""
    text = ""
    for key in path:
        text += f"[{key}]" if type(key) is int else f" / {key}" if text else str(key)[:120]
    return text or "the result"


def is_gradient(path: tuple) -> bool:
    """Whether a leaf is a gradient by its name."""
    return any(type(key) is str and key.lower().startswith("gradient") for key in path)


def names(keys: dict) -> str:
    """The first names of a dict, in code marks."""
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
        if value.dim() == 0:
            return f"a tensor with the one value {scalar_text(value.item())}"
        return f"a tensor of shape {shape_text(tuple(value.shape))}"
    if kind is dict:
        return f"a dict with {names(value)}"
    if kind in (list, tuple):
        return f"a {kind.__name__} of {len(value)}"
    if kind is str:
        return f"the text {scalar_text(value)}"
    if kind is int:
        return f"the whole number {scalar_text(value)}"
    if kind is float:
        return f"the number {scalar_text(value)}"
    return "`...`" if value is ... else scalar_text(value)


def scalar_text(value: Any) -> str:
    """A number or a string, not too long."""
    kind = type(value)
    if kind is float:
        return f"{value:.6g}" if not value.is_integer() or abs(value) >= 1e15 else f"{value:.1f}"
    if kind is int:  # Python refuses to print integers of more than some 4,300 digits
        return str(value) if value.bit_length() <= 256 else f"a whole number of {value.bit_length()} bits"
    if kind in (str, bytes):
        return repr(value) if len(value) <= 80 else f"{value[:80]!r}…"
    return a(value) if kind not in (*SCALARS, complex) else str(value)


def list_text(values: list | tuple, at: int = 0, width: int = 16) -> str:
    """A list, or of a long one the part around position `at`."""
    first = max(0, min(at - width // 2, len(values) - width)) if len(values) > 2 * width else 0
    last = first + width if len(values) > 2 * width else len(values)
    inner = ", ".join(scalar_text(value) for value in values[first:last])
    return "[" + ("…, " if first else "") + inner + (", …" if last < len(values) else "") + "]"


def shape_text(shape: tuple) -> str:
    """A shape as Python writes it."""
    return f"({', '.join(str(size) for size in shape)}{',' if len(shape) == 1 else ''})"


def tensor_text(tensor: torch.Tensor, around: list[int] | tuple[int, ...] = (), rows: int = 6, columns: int = 8) -> str:
    """A tensor as text: whole when it is small, else the part around the position `around`, with … for the rest."""
    around = list(around) or [0] * tensor.dim()
    if tensor.dim() == 0 or tensor.numel() == 0:
        return scalar_text(tensor.item()) if tensor.dim() == 0 else f"nothing (shape {shape_text(tuple(tensor.shape))})"
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
            text = shape_text(tuple(value.shape)) if value.dim() else f"= {scalar_text(value.item())}"
            parts.append(f"{key} {text}")
        elif kind in SCALARS:
            text = scalar_text(value)
            parts.append(f"{key} = {text if len(text) <= 40 else text[:40] + '…'}")
        elif kind in (list, tuple) and len(value) <= 8 and all(type(item) in (bool, int, float) for item in value):
            parts.append(f"{key} = {list_text(value)}")
        elif kind in (list, tuple, dict):
            parts.append(f"{key}: {kind.__name__} of {len(value)}")
    inputs = ": " + ", ".join(parts[:10]) + (", …" if len(parts) > 10 else "") if parts else ""
    return f"case {number + 1} of {total}{inputs}"
