"""The tensors in which bitsandbytes saves a 4-bit weight, and back.

    weight                                   uint8 [ceil(n/2), 1]     the packed codes (in the file of any dtype that
                                                                      `quant_storage` names; the bytes are the same)
    weight.absmax                            float32 [blocks], or uint8 with double quantization
    weight.quant_map                         float32 [16]             the levels
    weight.nested_absmax                     float32 [ceil(blocks/256)]  ┐ with double quantization
    weight.nested_quant_map                  float32 [256]               ┘
    weight.quant_state.bitsandbytes__nf4     uint8: JSON text with what is not a tensor:
        {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [2048, 2048], "nested_blocksize": 256,
         "nested_dtype": "float32", "nested_offset": 0.0496…}

Source: `QuantState.as_dict(packed=True)` and `Linear4bit._save_to_state_dict` of bitsandbytes 0.50.2. What
`to_tensors` writes is equal to that byte for byte. A checkpoint that transformers saved with `load_in_4bit` has these
tensors; so a model quantized there is read here, and the other way round:

    NF4Tensor.from_state_dict(linear4bit.state_dict())
    Params4bit.from_prequantized(q.packed, {k.removeprefix("weight."): v for k, v in q.state_dict().items()
                                            if k != "weight"}, device="cpu")
"""
from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pefttools.double_quant import NESTED_BLOCK

if TYPE_CHECKING:
    from pefttools.nf4 import NF4Tensor

_KEY = "quant_state.bitsandbytes__"


def to_tensors(q: NF4Tensor, prefix: str = "weight") -> dict[str, Tensor]:
    """bitsandbytes' tensors of q under its keys. Raises ValueError for levels that it does not have."""
    if q.quant_type not in ("nf4", "fp4"):
        raise ValueError(f"bitsandbytes can store nf4 and fp4; this weight is {q.quant_type!r} with levels of its own.")
    tensors = {prefix: q.packed, f"{prefix}.absmax": q.absmax, f"{prefix}.quant_map": q.code}
    rest = {"quant_type": q.quant_type, "blocksize": q.block_size, "dtype": str(q.dtype).removeprefix("torch."),
            "shape": list(q.shape)}
    if q.nested:
        tensors |= {f"{prefix}.nested_absmax": q.nested_absmax, f"{prefix}.nested_quant_map": q.nested_code}
        rest |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": q.offset.item()}
    text = torch.tensor(list(json.dumps(rest).encode()), dtype=torch.uint8)
    return tensors | {f"{prefix}.{_KEY}{q.quant_type}": text}


def from_tensors(tensors: dict[str, Tensor], prefix: str = "weight") -> dict[str, Any]:
    """The fields of an NF4Tensor. Raises KeyError naming the missing key, ValueError for what cannot be read."""
    def take(key: str) -> Tensor:
        if key not in tensors:
            raise KeyError(f"{key} is missing: the tensors under {prefix!r} are not a 4-bit weight of bitsandbytes.")
        return tensors[key].detach()

    states = [key for key in tensors if key.startswith(f"{prefix}.{_KEY}")]
    if len(states) != 1:
        raise KeyError(f"{prefix}.{_KEY}nf4 (or …fp4) must be there once; found {len(states)}: the tensors under "
                       f"{prefix!r} are not a 4-bit weight of bitsandbytes.")
    try:
        rest = json.loads(bytes(tensors[states[0]].tolist()))
        dtype, nested = getattr(torch, rest["dtype"]), f"{prefix}.nested_absmax" in tensors
        found = {"shape": torch.Size(rest["shape"]), "dtype": dtype, "block_size": int(rest["blocksize"]),
                 "quant_type": rest["quant_type"]}
        offset = torch.tensor(rest["nested_offset"], dtype=torch.float32) if nested else None
        readable = dtype.is_floating_point and rest.get("nested_blocksize", NESTED_BLOCK) == NESTED_BLOCK
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{states[0]} cannot be read: {type(error).__name__}: {error}") from error
    if not readable or found["quant_type"] not in ("nf4", "fp4") or found["block_size"] < 1:
        raise ValueError(f"{states[0]} has values that bitsandbytes does not write: {rest}")
    packed = take(prefix)
    found |= {"packed": packed.contiguous().view(torch.uint8).reshape(-1, 1), "absmax": take(f"{prefix}.absmax"),
              "code": take(f"{prefix}.quant_map")}
    if nested:
        found |= {"nested_absmax": take(f"{prefix}.nested_absmax"), "nested_code": take(f"{prefix}.nested_quant_map"),
                  "offset": offset.to(packed.device)}
    return found
