"""What P positions in front of the words do to a model's inputs: masks, positions, labels, and a cache that goes on.

    attention_mask [B, T]  →  [B, P + T]   ones in front           position_ids   as given + P
    labels, types  [B, T]  →  [B, P + T]   −100, 0 in front

Pure functions; `pefttools.virtual` applies them.
"""
from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

GOING_ON = "generate() cannot go on from a cache that it gave back: it would take the virtual tokens in it for words."


def widen_mask(mask: Tensor | None, total: int, P: int, whole: bool = True) -> Tensor | None:
    """[B, total − P] → [B, total], with ones in front: virtual tokens are always seen. With `whole`, [B, total] stays.

    No mask stays no mask. Raises ValueError for any other width, and for a mask that is not [B, positions].
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        got = f"one of shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"virtual tokens need a plain attention_mask [B, positions], which they widen; got {got}. "
                         f"Leave the 4-dimensional mask to the model.")
    if mask.shape[1] == total and whole:
        return mask
    if mask.shape[1] != total - P:
        also = f", or those and the {P} virtual ones: {total}." if whole else f". {GOING_ON}"
        raise ValueError(f"attention_mask is {list(mask.shape)}: it must cover the {total - P} positions of the text "
                         f"(those in the cache too){also}")
    return torch.cat([mask.new_ones(len(mask), P), mask], dim=1)


def widen(tensor: Tensor, P: int, fill: int) -> Tensor:
    """[B, T] → [B, P + T] with `fill` in front: −100 for labels (no target), 0 for token types."""
    return torch.cat([tensor.new_full((len(tensor), P), fill), tensor], dim=1)


def shift_positions(positions: Tensor, P: int, insert: bool) -> Tensor:
    """position_ids [..., T] → + P, since P positions come first; with `insert` those are put in front: [..., P + T]."""
    if not insert:
        return positions + P
    first = torch.arange(P, dtype=positions.dtype, device=positions.device)
    return torch.cat([first.expand(*positions.shape[:-1], P), positions + P], dim=-1)


def words_of(inputs: dict[str, Any]) -> Tensor | None:
    """input_ids or inputs_embeds, whichever is given; None where none or both are, which the model itself refuses."""
    given = [inputs[key] for key in ("input_ids", "inputs_embeds") if inputs.get(key) is not None]
    return given[0] if len(given) == 1 else None


def check_follows(inputs: dict[str, Any], held: int, P: int) -> None:
    """ValueError unless words that come with a cache of `held` positions go on where its text ends.

    Without a mask only position_ids tell; for positions of one's own, a mask says that they are meant.
    """
    positions = inputs.get("position_ids")
    if not held or inputs.get("attention_mask") is not None or positions is None or positions.dim() != 2:
        return
    if positions.numel() and (first := int(positions[0, 0])) != held - P:
        raise ValueError(f"position_ids begin at {first}, and the text in the cache ends before {held - P}. {GOING_ON} "
                         f"For positions of your own, pass attention_mask as well.")


def cache_length(cache: Any) -> int:
    """How many positions a cache of transformers holds; None is an empty one. ValueError for a static cache."""
    if cache is None:
        return 0
    if getattr(cache, "is_compileable", False):
        raise ValueError(f"virtual tokens need a cache that grows, such as DynamicCache; got a {type(cache).__name__} "
                         f"of fixed length, which has no room for them. Leave out cache_implementation=\"static\".")
    return cache.get_seq_length()


def by_name(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of module.forward(*args, **kwargs) by their names."""
    return dict(inspect.signature(module.forward).bind_partial(*args).arguments) | kwargs if args else dict(kwargs)
