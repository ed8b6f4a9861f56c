"""What the configurations of prompt tuning, P-tuning and prefix tuning share: length, file fields, the model's sizes.

    PromptTuningConfig(length=20)  ── attach ──►  .install(model)  ──►  model.prompt_encoder, a VirtualTokens
                                                        │
                    model_fields = {"token_dim": 2048, "num_layers": 16, …}, as peft's adapter_config.json has it
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pefttools.virtual import VirtualTokens


def dimensions(config: Any) -> dict[str, Any]:
    """What peft writes into adapter_config.json about a transformers model, from its config; and head_dim, kv_heads.

    kv_heads · head_dim is the width of one layer's keys: with grouped-query attention less than hidden_size.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads, hidden = text.num_attention_heads, text.hidden_size
    head_dim = getattr(text, "head_dim", None) or getattr(text, "d_kv", None) or hidden // heads
    layers = next(n for name in ("num_decoder_layers", "decoder_layers", "num_hidden_layers")
                  if (n := getattr(text, name, None)))
    return {"hidden_size": hidden, "num_layers": layers, "num_attention_heads": heads, "head_dim": head_dim,
            "kv_heads": getattr(text, "num_key_value_heads", None) or heads}


def task_type(model: nn.Module) -> str:
    """peft's task_type that wraps this model so that the virtual tokens act (with none, peft leaves them out)."""
    if getattr(model.config, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if model.can_generate() else "FEATURE_EXTRACTION"


@contextmanager
def drawing(generator: torch.Generator | None) -> Iterator[None]:
    """torch modules draw their first weights from the global generator: inside, from a seed that `generator` draws."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2 ** 62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def tiled(ids: Sequence[int], length: int) -> list[int]:
    """The first `length` of ids, ids, ids, …: what a text of another length becomes. ValueError without any."""
    if len(ids) == 0:
        raise ValueError("init=\"text\": the text has no tokens.")
    return (list(ids) * math.ceil(length / len(ids)))[:length]


def place(encoder: nn.Module, model: nn.Module) -> nn.Module:
    """On the model's device; float64 beside a float64 model, otherwise float32, as in peft."""
    words = model.get_input_embeddings().weight
    return encoder.to(words.device, torch.float64 if words.dtype == torch.float64 else torch.float32)


@dataclass
class VirtualConfig:
    """What prompt tuning, P-tuning and prefix tuning have in common; `model_fields` is filled in by `install`.

    length: P. num_transformer_submodules: 1, or 2 for an encoder–decoder as peft has it; None is peft's choice.
    """

    length: int = 20
    num_transformer_submodules: int | None = None
    model_fields: dict[str, Any] = field(default_factory=dict, repr=False, compare=False, kw_only=True)

    peft_type = ""
    # of adapter_config.json: how the training began, and what the shapes in the file say as well
    without_effect = ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
                      "init_weights", "token_dim", "num_layers", "num_attention_heads", "encoder_hidden_size",
                      "encoder_num_layers", "encoder_dropout", "encoder_reparameterization_type")

    def __post_init__(self) -> None:
        if not isinstance(self.length, int) or isinstance(self.length, bool) or self.length < 1:
            raise ValueError(f"length must be a whole number of virtual tokens, 1 or more; got {self.length!r}.")
        if self.num_transformer_submodules not in (None, 1, 2):
            raise ValueError(f"num_transformer_submodules must be 1, 2 or None; got "
                             f"{self.num_transformer_submodules!r}.")

    def check_text(self) -> None:
        if (self.init == "text") != (self.text is not None):
            raise ValueError(f"init=\"text\" and text go together: {type(self).__name__}(init=\"text\", text=\"Write a "
                             f"program\", tokenizer=base.tokenizer); got init={self.init!r}, text={self.text!r}.")

    def ids(self) -> Sequence[int]:
        """The tokens of `text`; none without one."""
        if self.text is None or not isinstance(self.text, str):
            return self.text or ()
        if self.tokenizer is None:
            raise ValueError("text needs tokenizer=… (that of the model), or must be a list of token ids.")
        return self.tokenizer(self.text)["input_ids"]

    def submodules(self, model: nn.Module) -> int:
        two = getattr(model.config, "is_encoder_decoder", False)
        if self.num_transformer_submodules == 2 and not two:
            raise ValueError(f"num_transformer_submodules=2 is for encoder–decoder models; {type(model).__name__} is "
                             f"none.")
        return self.num_transformer_submodules or 1 + two

    def token_dim(self, model: nn.Module) -> int:
        """Width of a virtual token: that of the model's word embeddings."""
        return model.get_input_embeddings().weight.shape[1]

    def shapes(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """What the file holds."""
        return {"prompt_embeddings": (self.length * self.submodules(model), self.token_dim(model))}

    def frame(self, model: nn.Module) -> VirtualTokens:
        """The module that puts the tokens into this model."""
        raise NotImplementedError

    def encoder(self, model: nn.Module, generator: torch.Generator | None = None) -> nn.Module:
        """A new adapter's parameters: a module with forward() → [P, width], .length, .to_save() and .fold()."""
        raise NotImplementedError

    def install(self, model: nn.Module, generator: torch.Generator | None = None,
                name: str = "default") -> VirtualTokens:
        """Put a first adapter into the model. TypeError unless it is a model of transformers, whole."""
        if not all(hasattr(model, part) for part in ("config", "get_input_embeddings", "can_generate")):
            raise TypeError(f"virtual tokens go into a model of transformers, such as AutoModelForCausalLM gives; got "
                            f"{type(model).__name__}.")
        return self.frame(model).install(self, generator, name)

    def describe(self, model: nn.Module) -> None:
        """Note what peft's file says about the model. Called when an encoder is made for it."""
        about = dimensions(model.config)
        self.model_fields = {"token_dim": self.token_dim(model), "num_layers": about["num_layers"],
                             "num_attention_heads": about["num_attention_heads"], "task_type": task_type(model),
                             "num_transformer_submodules": self.submodules(model)}

    def to_peft(self) -> dict[str, Any]:
        return {"num_transformer_submodules": self.num_transformer_submodules} | self.model_fields | {
            "peft_type": self.peft_type, "num_virtual_tokens": self.length}

    @classmethod
    def _from_peft(cls, fields: dict[str, Any], **settings: Any) -> Any:
        config = cls(fields["num_virtual_tokens"], fields.get("num_transformer_submodules"), **settings)
        names = ("token_dim", "num_layers", "num_attention_heads", "task_type", "num_transformer_submodules")
        config.model_fields = {name: fields[name] for name in names if fields.get(name) is not None}
        return config
