"""What passes between the judge and the sandbox: JSON for the tree, safetensors for the tensors, nothing else.

    magic  JSON length   JSON                                            safetensors
    PTW1   4 bytes       {"d": [["output", {"T": 0}], ["r", 8]]}          "0": float32 [4, 3]

The bytes come from a process that a student's code lives in, so `from_bytes` treats them as hostile: sizes and counts
are looked at before anything is allocated for them, every node must be one that `to_bytes` writes, and nothing is ever
unpickled, imported or called. What comes out has exactly the types of `pefttools.grading.plain`.

    JSON                         stands for              JSON                       stands for
    null true 3 0.5 "text" […]   themselves              {"T": 0}                   tensor 0 of the safetensors part
    {"t": […]}                   a tuple                 {"C": 0}                   the same, complex (stored as pairs)
    {"d": [[key, value], …]}     a dict                  {"N": "a function"}        NotPlain
    {"f": "nan"}                 nan, inf, -inf          {"R": {…}}                 Raised
    {"b": "aGk="}                bytes                   {"O": [data, raised, "…"]} Outcome
    {"e": 1}                     ... (Ellipsis)
"""

from __future__ import annotations

import base64
import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from pefttools.grading.plain import MAX_DEPTH, MAX_ELEMENTS, MAX_LEAVES, NotPlain
from pefttools.grading.probe import Outcome, Raised

MAGIC = b"PTW1"
DTYPES = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
          torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64}
COMPLEX = {torch.complex64: torch.float32, torch.complex128: torch.float64}
TEXT = {"type": 80, "message": 600, "place": 400, "line": 2_000, "unwritten": 80}  # characters of what was raised


class WireError(ValueError):
    """Bytes that `to_bytes` did not write, or more of them than allowed; the message says what is wrong with them."""


@dataclass(frozen=True)
class Bounds:
    """How much is read. An exercise's answers are some kilobytes."""

    total: int = 2**28       # bytes of the blob
    tree: int = 2**22        # bytes of the JSON
    leaves: int = MAX_LEAVES
    tensors: int = 10_000


# ------------------------------------------------------------------------------------------------ writing

def to_bytes(data: Any) -> bytes:
    """Plain data (see the table above) as bytes. Raises WireError for anything else."""
    tensors: dict[str, torch.Tensor] = {}
    tree = json.dumps(_node(data, tensors, 0), ensure_ascii=False, allow_nan=False).encode("utf-8", "surrogatepass")
    return MAGIC + len(tree).to_bytes(4, "big") + tree + (save(tensors) if tensors else b"")


def _node(value: Any, tensors: dict[str, torch.Tensor], depth: int) -> Any:
    kind = type(value)
    if depth > MAX_DEPTH + 4:
        raise WireError(f"nested more than {MAX_DEPTH} deep")
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"f": repr(value)}
    if value is ...:
        return {"e": 1}
    if kind is bytes:
        return {"b": base64.b64encode(value).decode("ascii")}
    if kind is list:
        return [_node(item, tensors, depth + 1) for item in value]
    if kind is tuple:
        return {"t": [_node(item, tensors, depth + 1) for item in value]}
    if kind is dict:
        return {"d": [[key, _node(item, tensors, depth + 1)] for key, item in value.items()]}
    if kind in (torch.Tensor, torch.nn.Parameter):
        return _tensor_node(value.detach(), tensors)
    if kind is NotPlain:
        return {"N": value.name}
    if kind is Raised:
        return {"R": value.to_dict()}
    if kind is Outcome:
        return {"O": [_node(value.data, tensors, depth + 1), _node(value.raised, tensors, depth + 1), value.printed]}
    raise WireError(f"cannot be sent: {kind.__name__}")


def _tensor_node(tensor: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    name = len(tensors)
    stored = torch.view_as_real(tensor) if tensor.dtype in COMPLEX else tensor
    if stored.dtype not in DTYPES:
        raise WireError(f"cannot be sent: a tensor of {tensor.dtype}")
    # safetensors refuses tensors that share memory
    tensors[str(name)] = stored.cpu().clone(memory_format=torch.contiguous_format)
    return {"C" if tensor.dtype in COMPLEX else "T": name}


# ------------------------------------------------------------------------------------------------ reading

def from_bytes(blob: bytes, bounds: Bounds = Bounds()) -> Any:
    """The data that these bytes hold. Raises WireError for whatever `to_bytes` would not have written."""
    if len(blob) > bounds.total:
        raise WireError(f"{len(blob)} bytes; the limit is {bounds.total}")
    if blob[:4] != MAGIC or len(blob) < 8:
        raise WireError("does not begin as an answer does")
    length = int.from_bytes(blob[4:8], "big")
    tree, rest = blob[8:8 + length], blob[8 + length:]
    if len(tree) != length:
        raise WireError("cut off")
    if length > bounds.tree:
        raise WireError(f"{length} bytes of JSON; the limit is {bounds.tree}")
    # Counted before parsing: a megabyte of brackets would become a hundred of empty lists.
    if sum(tree.count(mark) for mark in (b"[", b"{", b",")) > 4 * bounds.leaves:
        raise WireError(f"more than {bounds.leaves} entries")
    try:
        parsed = json.loads(tree.decode("utf-8", "surrogatepass"), parse_constant=_no_constant)
    except RecursionError:
        raise WireError("nested too deeply") from None
    except ValueError as error:  # JSON, UTF-8, and whole numbers of more than 4300 digits
        raise WireError(f"not JSON: {str(error)[:100]}") from None
    reader = _Reader(_tensors(rest, bounds), bounds.leaves)
    data = reader.value(parsed, 0)
    if reader.unused:
        raise WireError(f"{len(reader.unused)} tensors that nothing refers to")
    return data


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} stands bare")


def _tensors(blob: bytes, bounds: Bounds) -> dict[str, torch.Tensor]:
    if not blob:
        return {}
    header = int.from_bytes(blob[:8], "little")
    if header > bounds.tree:
        raise WireError(f"{header} bytes of tensor names; the limit is {bounds.tree}")
    try:
        found = load(blob)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise WireError(f"tensors that cannot be read: {str(error)[:100]}") from None
    if len(found) > bounds.tensors:
        raise WireError(f"{len(found)} tensors; the limit is {bounds.tensors}")
    for tensor in found.values():
        if tensor.dtype not in DTYPES or tensor.numel() > 2 * MAX_ELEMENTS or tensor.dim() > 64:
            raise WireError(f"a tensor of {tensor.dtype} with {tensor.dim()} dimensions and {tensor.numel()} elements")
    return found


class _Reader:
    """Walks the parsed JSON once; each tensor may be referred to once."""

    def __init__(self, tensors: dict[str, torch.Tensor], leaves: int) -> None:
        self.unused, self.room = tensors, leaves

    def value(self, node: Any, depth: int) -> Any:
        self.room -= 1
        if self.room < 0 or depth > MAX_DEPTH + 4:
            raise WireError("too many entries, or nested too deeply")
        if node is None or type(node) in (bool, int, float, str):
            return node
        if type(node) is list:
            return [self.value(item, depth + 1) for item in node]
        if type(node) is not dict or len(node) != 1:
            raise WireError("a node that no answer has")
        (mark, inner), = node.items()
        read = {"t": self._tuple, "d": self._dict, "f": self._float, "b": self._bytes, "e": self._ellipsis,
                "T": self._tensor, "C": self._complex, "N": self._not_plain, "R": self._raised, "O": self._outcome}
        if mark not in read:
            raise WireError(f"a node {mark[:20]!r}, which no answer has")
        return read[mark](inner, depth)

    def _tuple(self, inner: Any, depth: int) -> tuple:
        return tuple(self.value(item, depth + 1) for item in _is(inner, list))

    def _dict(self, inner: Any, depth: int) -> dict:
        found: dict = {}
        for pair in _is(inner, list):
            if type(pair) is not list or len(pair) != 2 or type(pair[0]) not in (str, int, bool) or pair[0] in found:
                raise WireError("a dict with an entry that no answer has")
            found[pair[0]] = self.value(pair[1], depth + 1)
        return found

    def _float(self, inner: Any, depth: int) -> float:
        if inner not in ("nan", "inf", "-inf"):
            raise WireError("a number that is none")
        return float(inner)

    def _bytes(self, inner: Any, depth: int) -> bytes:
        try:
            return base64.b64decode(_is(inner, str), validate=True)
        except ValueError:
            raise WireError("bytes that are not base64") from None

    def _ellipsis(self, inner: Any, depth: int) -> Any:
        return ...

    def _tensor(self, inner: Any, depth: int) -> torch.Tensor:
        tensor = self.unused.pop(str(_is(inner, int)), None)
        if tensor is None:
            raise WireError("a tensor that is missing, or referred to twice")
        return tensor

    def _complex(self, inner: Any, depth: int) -> torch.Tensor:
        pairs = self._tensor(inner, depth)
        if pairs.dtype not in COMPLEX.values() or pairs.dim() == 0 or pairs.shape[-1] != 2:
            raise WireError("a complex tensor that is none")
        return torch.view_as_complex(pairs)

    def _not_plain(self, inner: Any, depth: int) -> NotPlain:
        return NotPlain(_is(inner, str)[:200])

    def _raised(self, inner: Any, depth: int) -> Raised:
        if type(inner) is not dict or inner.keys() != TEXT.keys() or type(inner["type"]) is not str \
                or type(inner["message"]) is not str:
            raise WireError("an exception that is none")
        for name, text in inner.items():
            if text is not None and type(text) is not str:
                raise WireError("an exception that is none")
        return Raised(**{name: text if text is None else text[: TEXT[name]] for name, text in inner.items()})

    def _outcome(self, inner: Any, depth: int) -> Outcome:
        if type(inner) is not list or len(inner) != 3:
            raise WireError("an outcome that is none")
        data, raised, printed = (self.value(item, depth + 1) for item in inner)
        if not (raised is None or type(raised) is Raised) or type(printed) is not str:
            raise WireError("an outcome that is none")
        return Outcome(data, raised, printed[:4_000])


def _is(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise WireError(f"{kind.__name__} expected")
    return value
