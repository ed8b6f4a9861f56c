"""Prompt tuning: P trained vectors in front of the embedded words. The model is frozen; the input is what learns.

    [p₁ … p_P ; e(x₁) … e(x_T)]  →  the frozen model,        p: [P, d] trained, e(x): [T, d] the embedding of the words

Lester, Al-Rfou & Constant 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv:2104.08691, § 2.

         p₁    p₂    p₃    the   cat   sat
        [···] [···] [···] [···] [···] [···]     [P + T, d]
        └─── trained ───┘ └─── looked up ───┘
              the frozen model, all of it
          –     –     –    cat   sat    .       nothing is asked of the first P outputs: labels −100

A hard prompt has to be made of words, that is of rows of the embedding matrix; a soft one may be anything in between,
and is found by gradient descent. A worked number: P = 20 on Llama-3.2-1B (d = 2048) trains 20 · 2048 = 40,960
numbers, 0.003 % of 1,235,814,400. The output has P positions more than the input: logits[:, −T:] are the words' own.

Where to start matters (section 3.2 and figure 3b of the paper): `init="random"` (peft's default: N(0, 1), far larger
than word embeddings are), "vocab" (the embeddings of random words), "text" (of a given text, repeated to length P),
"zero". As peft, `PromptTuningInit` in peft/tuners/prompt_tuning. Encoder–decoders get the prompt in front of the
encoder's input. peft trains twice P vectors there (`num_transformer_submodules=2`) and uses the first P.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pefttools.virtual import VirtualTokens
from pefttools.virtual_inputs import cache_length, check_follows, shift_positions, widen, widen_mask, words_of
from pefttools.virtual_config import VirtualConfig, place, tiled

INITS = ("random", "vocab", "text", "zero")


# ------------------------------------------------------------------------------------------------ pure functions

def soft_prompt(embeds: Tensor, prompt: Tensor) -> Tensor:
    """[p ; e(x)]: embeds [B, T, d], prompt [P, d] → [B, P + T, d], in the dtype of embeds."""
    if prompt.dim() != 2 or embeds.dim() != 3 or prompt.shape[1] != embeds.shape[2]:
        raise ValueError(f"embeds must be [B, T, d] and prompt [P, d]; got {list(embeds.shape)} and "
                         f"{list(prompt.shape)}.")
    return torch.cat([prompt.to(embeds).expand(len(embeds), -1, -1), embeds], dim=1)


def prompt_init(words: Tensor, length: int, init: str = "random", ids: Sequence[int] = (),
                generator: torch.Generator | None = None) -> Tensor:
    """The prompt [P, d] at the start, float32. words [V, d]: the embedding matrix; ids: of the text, for "text"."""
    if init == "random":
        return torch.randn(length, words.shape[1], generator=generator)
    if init == "zero":
        return torch.zeros(length, words.shape[1])
    picked = torch.tensor(tiled(ids, length)) if init == "text" else \
        torch.randint(len(words), (length,), generator=generator)
    return words.detach()[picked.to(words.device)].float()


# ------------------------------------------------------------------------------------------------ the modules

class PromptTuning(nn.Module):
    """P trained vectors: forward() → [P, d]. Its one parameter is peft's `embedding.weight`."""

    def __init__(self, prompt: Tensor, length: int | None = None) -> None:
        super().__init__()
        self.length = length or len(prompt)            # P; for encoder–decoders peft's `prompt` has 2 P rows
        self.embedding = nn.Embedding.from_pretrained(prompt, freeze=False)

    def forward(self) -> Tensor:
        return self.embedding.weight[:self.length]

    def to_save(self) -> Tensor:
        return self.embedding.weight.detach()

    def fold(self) -> None:
        """Nothing to do: these are the vectors themselves."""


class PromptTokens(VirtualTokens):
    """Puts the prompt in front of the embedded words (of the encoder, where there is one)."""

    def __init__(self, model: nn.Module, count_padding: bool = False) -> None:
        super().__init__(model)
        self.count_padding = count_padding

    def hooks(self, model: nn.Module) -> dict[nn.Module, Callable]:
        if getattr(model.config, "is_encoder_decoder", False):
            # not before the model itself: generate() calls the encoder by itself, once
            return {model.get_encoder(): self.before_words, model.get_decoder(): self.before_cross_attention}
        return {model: self.before_words}

    def before_words(self, module: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of forward with the prompt in them; at later steps of generate() it is in the cache."""
        held, P, given = cache_length(inputs.get("past_key_values")), self.length, words_of(inputs)
        if given is None:
            return inputs
        first, T = held == 0, given.shape[1]
        check_follows(inputs, held, P)
        inputs["attention_mask"] = widen_mask(inputs.get("attention_mask"), held + T + P * first, P, first)
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = None if self.count_padding else shift_positions(inputs["position_ids"], P, first)
        if not first:
            return inputs
        embeds = given if given.dim() == 3 else module.get_input_embeddings()(given)
        inputs["input_ids"], inputs["inputs_embeds"] = None, soft_prompt(embeds, self.tokens())
        for key, fill in (("labels", -100), ("token_type_ids", 0)):
            if isinstance(old := inputs.get(key), Tensor) and old.dim() == 2 and old.shape[1] == T:
                inputs[key] = widen(old, P, fill)      # labels of whole rows ([B]) stay
        return inputs

    def before_cross_attention(self, decoder: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        if (states := inputs.get("encoder_hidden_states")) is not None:
            inputs["encoder_attention_mask"] = widen_mask(inputs.get("encoder_attention_mask"), states.shape[1],
                                                          self.length)
        return inputs


# ------------------------------------------------------------------------------------------------ the configuration

@dataclass
class PromptTuningConfig(VirtualConfig):
    """init: see the module's docstring. text: for init="text", with `tokenizer`; or token ids, without one.

    count_padding: as peft, see pefttools.virtual.
    """

    init: str = "random"
    text: str | Sequence[int] | None = None
    tokenizer: Any = field(default=None, repr=False, compare=False)
    count_padding: bool = False

    peft_type = "PROMPT_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}; got {self.init!r}.")
        self.check_text()

    def frame(self, model: nn.Module) -> VirtualTokens:
        return PromptTokens(model, self.count_padding)

    def encoder(self, model: nn.Module, generator: torch.Generator | None = None) -> PromptTuning:
        self.describe(model)
        words = model.get_input_embeddings().weight
        rows = self.length * self.submodules(model)
        return place(PromptTuning(prompt_init(words, rows, self.init, self.ids(), generator), self.length), model)

    def to_peft(self) -> dict[str, Any]:
        return super().to_peft() | {"prompt_tuning_init": "RANDOM"}    # how it began matters no more

    @classmethod
    def from_peft(cls, fields: dict[str, Any]) -> PromptTuningConfig:
        return cls._from_peft(fields)
