"""Code that asks a tensor for its values, where the tensor has none.

    if not (mask == 0).all(): …        all: True      any: False      another truth: True
    scale = tensor.item()              a number: 1
    torch.bincount(ids, minlength=n)   n of them
    tensor.cpu()                       stays without memory, and counts as the host's, not the GPU's

Models and methods ask such things to choose a path ("is no row padded?", "is any weight infinite?"), and the answers
here are those of an ordinary run. Whether rows are padded is not left to this: see `step.as_on_cuda`.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

aten = torch.ops.aten
_FALSE = "_pefttools_false"                    # an attribute of tensors that answer no


def answer(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The result of an operation that reads values of meta tensors; NotImplemented for every other."""
    rule = _RULES.get(func)
    if rule is None or not any(isinstance(t, Tensor) and t.device.type == "meta" for t in tree_iter((args, kwargs))):
        return NotImplemented
    return rule(func, args, kwargs)


def on_host(tensor: Tensor) -> bool:
    """Whether this meta tensor stands for memory of the host."""
    return getattr(tensor, "_pefttools_host", False)


def _scalar(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    tensor = args[0]
    if tensor.dtype == torch.bool:
        return not getattr(tensor, _FALSE, False)
    return 1.0 if tensor.is_floating_point() else 1


def _no(func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    result = func(*args, **kwargs)
    setattr(result, _FALSE, True)
    return result


def _bincount(func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    length = kwargs.get("minlength", args[2] if len(args) > 2 else 0)
    return args[0].new_empty(max(1, length), dtype=torch.int64)


def _copied(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    device = kwargs.get("device")
    if device is None or torch.device(device).type != "cpu":
        return func(*args, **kwargs)
    result = func(*args, **(kwargs | {"device": torch.device("meta")}))
    result._pefttools_host = True
    return result


def _coalesced(func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    sparse = args[0]
    indices, values = torch.empty_like(sparse._indices()), torch.empty_like(sparse._values())
    return torch.sparse_coo_tensor(indices, values, sparse.shape, is_coalesced=True, check_invariants=False)


def _dense(func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    values = args[0]._values()
    return torch.empty(args[0].shape, dtype=values.dtype, device=values.device)


def _sum(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    if args[0].layout == torch.strided and isinstance(args[1], Tensor) and args[1].layout != torch.strided:
        return torch.empty_like(args[0])
    return NotImplemented


def _masked(func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    dense, mask = args[:2]
    values = torch.empty(mask._values().shape, dtype=dense.dtype, device=dense.device)
    return torch.sparse_coo_tensor(mask._indices(), values, mask.shape, is_coalesced=True, check_invariants=False)


_RULES: dict[Any, Callable[[Any, tuple, dict[str, Any]], Any]] = {
    aten._local_scalar_dense.default: _scalar,
    aten.any.default: _no, aten.any.dim: _no, aten.any.dims: _no,
    aten.bincount.default: _bincount,
    aten._to_copy.default: _copied,
    # sparse matrices have no kernels without memory
    aten._coalesce.default: _coalesced,
    aten._to_dense.default: _dense,
    aten.sparse_mask.default: _masked,
    aten.add.Tensor: _sum,
    aten.equal.default: lambda func, args, kwargs: False,
}


class Answers(TorchDispatchMode):
    """`with Answers():` the same without a ledger: for building a model."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = answer(func, args, kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result
