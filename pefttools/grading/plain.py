"""Plain data: the only thing that passes between a student's work and the judge.

Exact built-in types only. A subclass of `dict`, `float` or `torch.Tensor` can answer every question with a lie
(`__eq__`, `__torch_function__`, `__array__`), so it becomes a `NotPlain` that carries nothing but its type's name.
"""

from __future__ import annotations

import collections
import sys
import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

MAX_ELEMENTS = 2**24  # of one tensor: 64 MiB in float32, a thousand times what an exercise needs
MAX_LEAVES = 100_000  # of one result
MAX_DEPTH = 16  # also ends a list that contains itself

SCALARS = (bool, int, float, str, bytes, type(None), type(...))


@dataclass(frozen=True)
class NotPlain:
    """Stands where something was that is not plain data. `name` is a phrase such as "an object of class `Liar`"."""

    name: str


def _among(kind: type, kinds: Iterable[type]) -> bool:
    """Whether a type is one of these, by identity: `in` would ask a metaclass that calls itself equal to everything."""
    return any(kind is other for other in kinds)


def plain(value: Any) -> Any:
    """A copy of `value` in exact plain types; what is not plain becomes `NotPlain` where it stood.

    Tensors are detached, copied and brought to the CPU. numpy arrays become tensors, numpy scalars numbers,
    `torch.Size` a tuple, dtypes and devices their names. Sparse, meta, nested, quantized and very large tensors are not
    plain.
    """
    return _plain(value, 0, [MAX_LEAVES])


def _plain(value: Any, depth: int, room: list[int]) -> Any:
    kind = type(value)
    room[0] -= 1
    if room[0] < 0:
        return NotPlain(f"more than {MAX_LEAVES} entries")
    if _among(kind, SCALARS) or kind is NotPlain and type(value.name) is str:
        return value
    if _among(kind, (torch.Tensor, torch.nn.Parameter)):
        return _plain_tensor(value)
    if depth >= MAX_DEPTH:
        return NotPlain(f"something nested more than {MAX_DEPTH} deep")
    if _among(kind, (list, tuple, torch.Size)):
        if len(value) > room[0]:
            return NotPlain(f"a {'list' if kind is list else 'tuple'} of {len(value)}, far more than is needed")
        items = [_plain(item, depth + 1, room) for item in value]
        return items if kind is list else tuple(items)
    if _among(kind, (dict, collections.OrderedDict)):
        if dict.__len__(value) > room[0]:
            return NotPlain(f"a dict of {dict.__len__(value)} entries, far more than is needed")
        for key in dict.keys(value):
            if not _among(type(key), (str, int, bool)):
                return NotPlain(f"a dict with a key that is {type_name(key)}")
        return {key: _plain(item, depth + 1, room) for key, item in dict.items(value)}
    if _among(kind, (torch.dtype, torch.device)):
        return str(value)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        if kind is numpy.ndarray:
            return _plain_array(value, numpy)
        if _among(kind, numpy.sctypeDict.values()):
            item = value.item()
            return item if _among(type(item), SCALARS) else NotPlain(type_name(value))
    return NotPlain(type_name(value))


def _plain_tensor(value: torch.Tensor) -> Any:
    # Called through the class: an attribute set on the tensor itself would otherwise stand in for the method.
    tensor = torch.Tensor.detach(value)
    if tensor.device.type == "meta":
        return NotPlain("a tensor on the meta device, which has no values")
    if tensor.layout is not torch.strided:
        return NotPlain(f"a sparse tensor ({str(tensor.layout).removeprefix('torch.')})")
    if tensor.is_nested or tensor.is_quantized:
        return NotPlain("a nested tensor" if tensor.is_nested else "a quantized tensor")
    if tensor.numel() > MAX_ELEMENTS:
        return NotPlain(f"a tensor of shape {tuple(tensor.shape)}, far larger than anything this exercise needs")
    try:
        return tensor.cpu().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    except Exception as error:
        return NotPlain(f"a tensor whose values cannot be read ({type(error).__name__})")


def _plain_array(value: Any, numpy: types.ModuleType) -> Any:
    if value.dtype.kind not in "biufc":
        return NotPlain(f"a numpy array of {value.dtype}")
    if value.size > MAX_ELEMENTS:
        return NotPlain(f"a numpy array of shape {value.shape}, far larger than anything this exercise needs")
    try:
        native = numpy.array(value, dtype=value.dtype.newbyteorder("="), order="C", copy=True)
        return torch.from_numpy(native)
    except (TypeError, ValueError):
        return NotPlain(f"a numpy array of {value.dtype}")


def type_name(value: Any) -> str:
    """A phrase for the type of anything at all; never runs code of the object or of its class."""
    kind = type(value)
    if _among(kind, (types.FunctionType, types.MethodType, types.BuiltinFunctionType)):
        return "a function"
    if issubclass(kind, type):
        return "a class"
    if kind is types.GeneratorType:
        return "a generator"
    # Read through `type` itself: a metaclass may answer for its classes.
    name = type.__dict__["__name__"].__get__(kind)[:60]
    if any(base is torch.Tensor for base in type.__dict__["__mro__"].__get__(kind)):
        return f"a tensor of the subclass `{name}`"
    if any(base is torch.nn.Module for base in type.__dict__["__mro__"].__get__(kind)):
        return f"a module (`{name}`)"
    if type.__dict__["__module__"].__get__(kind) == "builtins":
        return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    return f"an object of class `{name}`"
