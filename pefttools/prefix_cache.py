"""How a prefix gets into the model: as the first P positions of its cache.

    forward(input_ids [B, T], past_key_values=None or empty)
        →  past_key_values: for each layer  keys, values  [B, H_kv, P, d_h], the same P for every row
           attention_mask   [B, P + T]      position_ids  + P

transformers' attention appends the words' keys and values to those and sees no difference to a text it has read before.

Gradient checkpointing needs one thing more. A checkpointed layer runs twice, and would append twice, so transformers
takes the cache away from it (peft therefore refuses; where checkpointing comes on later, its forward fails on shapes).
Here attention itself is handed the prefix again, in a form that nothing is appended to.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pefttools.virtual import VirtualTokens
from pefttools.virtual_inputs import cache_length, check_follows, shift_positions, widen_mask, words_of


class PrefixTokens(VirtualTokens):
    """Fills the cache with the prefix before the model reads its first word."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._again: ReadOnly | None = None       # the prefix of the last forward with checkpointing

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_again": None}   # part of a graph of autograd, which cannot be copied

    def hooks(self, model: nn.Module) -> dict[nn.Module, Callable]:
        if getattr(model.config, "is_encoder_decoder", False):
            return {model.get_decoder(): self.before_words}
        return {model: self.before_words} | {module: self.before_attention for module in model.modules()
                                             if hasattr(module, "layer_idx") and _takes_a_cache(module)}

    def before_words(self, module: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of forward with a cache that holds the prefix; at later steps of generate() it does already."""
        cache, P, config = inputs.get("past_key_values"), self.length, self._model[0].config
        if getattr(cache, "of_one_forward", False):
            cache = None
        held, given = cache_length(cache), words_of(inputs)
        if given is None:
            return inputs
        if held and not getattr(cache, "has_prefix", False):
            raise ValueError(f"past_key_values holds {held} positions without this prefix, which has to come first. "
                             f"Begin with an empty cache, or go on under `with disabled(model)`.")
        if held == 0:
            inputs["past_key_values"] = cache = _empty_cache(config) if cache is None else cache
            self.fill(cache, given)
            # models hand out the cache they were given; generate(use_cache=False) hands it in again, with all the words
            use_cache = inputs.get("use_cache")
            cache.has_prefix = True
            cache.of_one_forward = not (getattr(config, "use_cache", True) if use_cache is None else use_cache)
        if module.training and _checkpointed(module):
            if held or getattr(config, "is_encoder_decoder", False) or not self._model[0].can_generate():
                raise ValueError("prefix tuning with gradient checkpointing works for decoders that read a text from "
                                 "its beginning. Call model.gradient_checkpointing_disable(), or model.eval() where "
                                 "nothing is trained.")
            self._again, inputs["use_cache"], cache.of_one_forward = ReadOnly(cache), False, True
        check_follows(inputs, held, P)
        inputs["attention_mask"] = widen_mask(inputs.get("attention_mask"), (held or P) + given.shape[1], P, held == 0)
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = shift_positions(inputs["position_ids"], P, insert=False)
        return inputs

    def before_attention(self, attention: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inside a checkpointed layer, which has lost its cache: the prefix once more, also when it runs again."""
        if self._again is not None and attention.training and inputs.get("past_key_values") is None:
            inputs["past_key_values"] = self._again
        return inputs

    def fill(self, cache: Any, given: Tensor) -> None:
        """Put the prefix into an empty cache, once for each row of `given`."""
        flat = self.tokens().to(given.device, self._model[0].dtype)
        cache = getattr(cache, "self_attention_cache", cache)
        for i, pair in enumerate(self[next(iter(self.active))].keys_and_values(flat)):
            cache.update(*(t.transpose(0, 1).expand(len(given), -1, -1, -1) for t in pair), i)   # [B, H_kv, P, d_h]


class ReadOnly:
    """What attention needs of a cache, its `update`, with nothing kept: running twice is running once."""

    def __init__(self, cache: Any) -> None:
        self.pairs = [(layer.keys[:1], layer.values[:1]) for layer in cache.layers]

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return tuple(torch.cat([prefix.expand(len(new), -1, -1, -1), new], dim=2)
                     for prefix, new in zip(self.pairs[layer], (keys, values)))


def _takes_a_cache(module: nn.Module) -> bool:
    return "past_key_values" in inspect.signature(module.forward).parameters


def _checkpointed(module: nn.Module) -> bool:
    """Whether layers of this module are checkpointed. ValueError where gradients could not reach the prefix."""
    layers = [part for part in module.modules() if getattr(part, "gradient_checkpointing", False)]
    for part in layers:
        if getattr(getattr(part, "_gradient_checkpointing_func", None), "keywords", {}).get("use_reentrant"):
            raise ValueError("with use_reentrant=True no gradient reaches the prefix. Call model."
                             "gradient_checkpointing_enable(gradient_checkpointing_kwargs={\"use_reentrant\": False}).")
    return bool(layers)


def _empty_cache(config: Any) -> Any:
    from transformers import DynamicCache, EncoderDecoderCache

    if getattr(config, "is_encoder_decoder", False):
        return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    return DynamicCache(config=config)
