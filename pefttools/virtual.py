"""Virtual tokens: the frame that prompt tuning, P-tuning and prefix tuning share.

These methods change no layer. They put P positions that no word stands for in front of the input, and train those.

    model(input_ids [B, T])                                P              T
         │                                         ┌──────────────┬─────────────┐
    forward pre-hook ── VirtualTokens ──►          │   trained    │  the words  │
         │                                         └──────────────┴─────────────┘
         │                        attention_mask     1   1  …   1    as given
         │                        position_ids       0   1  … P−1    as given + P
    the same model, unchanged     labels           −100 −100 … −100  as given

Prompt tuning makes them *inputs* (P embeddings, pefttools.prompt), prefix tuning makes them *keys and values* of every
layer, as if the model had read them before (a cache that is P long, pefttools.prefix). Either way the model object
stays the same and so do `model(**inputs)` and `model.generate(…)`: what changes is what goes into `forward`. While
generating, the virtual tokens go in once, at the first step, and are in the cache from then on.

`VirtualTokens` is the module `model.prompt_encoder`, {adapter name: encoder}, as in peft (peft/peft_model.py), where an
encoder is a module whose forward() gives [P, width]. One thing is done otherwise than in peft 0.21.2: where a batch is
padded on the left, peft ignores position_ids in prompt tuning, so that the padding stands *between* the prompt and a
row's words and moves them apart; what a row generates then depends on its neighbours. Here it does not, unless
`count_padding=True` asks for peft's way. (Prefix tuning shifts position_ids in both.)
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pefttools.virtual_inputs import by_name

ATTRIBUTE = "prompt_encoder"  # peft's name for it


# ------------------------------------------------------------------------------------------------ the module

class VirtualTokens(nn.ModuleDict):
    """{adapter name: encoder}, and what puts the active one's tokens into the model. Subclasses write `hooks`.

    Several active adapters: side by side their tokens are added up with their weights (all of one length); stacked,
    they stand one after the other, in the order given. `config` makes an encoder by `config.encoder(model, generator)`.
    """

    can_stack = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = (model,)           # in a tuple, so that the model is not taken for a part of this module
        self._handles: list[Any] = []
        self.active: dict[str, float] = {}
        self.enabled, self.merged, self.stacked = True, False, False

    def hooks(self, model: nn.Module) -> dict[nn.Module, Callable[[nn.Module, dict], dict]]:
        """{module: what to do with the arguments of its forward}: a subclass says."""
        raise NotImplementedError

    # ---- into the model, and out
    def install(self, config: Any, generator: torch.Generator | None = None, name: str = "default") -> VirtualTokens:
        """Add the first adapter, active, and stand before the model's forward. ValueError if something does already."""
        model = self._model[0]
        if hasattr(model, ATTRIBUTE):
            raise ValueError(f"this {type(model).__name__} has a {ATTRIBUTE!r} already: detach it first.")
        self.add(name, config, generator)
        self.active = {name: 1.0}
        self.train(model.training)
        setattr(model, ATTRIBUTE, self)
        for module, change in self.hooks(model).items():
            self._handles.append(module.register_forward_pre_hook(_Before(self, change), with_kwargs=True))
        return self

    def uninstall(self) -> None:
        """Leave the model as it was: no hook, no submodule."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if getattr(self._model[0], ATTRIBUTE, None) is self:
            delattr(self._model[0], ATTRIBUTE)

    def add(self, name: str, config: Any, generator: torch.Generator | None = None) -> None:
        """A further adapter, which does not act yet. Raises ValueError for a name that is taken."""
        if name in self or hasattr(self, name):
            raise ValueError(f"there is an adapter or an attribute called {name!r} already; choose another name.")
        enabled, self.enabled = self.enabled, False        # an encoder may run the model to start from its activations
        try:
            self[name] = config.encoder(self._model[0], generator).train(self.training)
        finally:
            self.enabled = enabled

    def remove(self, name: str) -> None:
        """Forget an adapter."""
        if name in self:
            del self[name]
        self.active.pop(name, None)

    def check_active(self, weights: dict[str, float], stacked: bool) -> None:
        """Raise ValueError unless these adapters can act together."""
        lengths = {name: self[name].length for name in weights}
        if not stacked and len(set(lengths.values())) > 1:
            raise ValueError(f"virtual tokens side by side are added up, so they must be of one length; got {lengths}. "
                             f"With stacked=True they stand one after the other.")

    # ---- what the adapters say
    @property
    def names(self) -> list[str]:
        return list(self.keys())

    @property
    def length(self) -> int:
        """P: how many positions the active adapters take."""
        lengths = [self[name].length for name in self.active]
        return sum(lengths) if self.stacked else max(lengths, default=0)

    def tokens(self) -> Tensor:
        """[P, width] of the active adapters together."""
        parts = [self[name]() if weight == 1.0 else self[name]() * weight for name, weight in self.active.items()]
        return parts[0] if len(parts) == 1 else torch.cat(parts) if self.stacked else torch.stack(parts).sum(0)

    def adapter_parameters(self, name: str | None = None) -> dict[str, nn.Parameter]:
        """What is trained, of all adapters or of one, by its name in this module ("default.embedding.weight")."""
        return {key: parameter for key, parameter in self.named_parameters()
                if name is None or key.split(".", 1)[0] == name}

    # ---- merging and files
    def merge(self) -> None:
        raise TypeError("virtual tokens are input, not weights: there is nothing to merge them into. Keep them.")

    def unmerge(self) -> None:
        """Nothing is ever merged."""

    @torch.no_grad()
    def file_tensors(self, name: str) -> dict[str, Tensor]:
        """{"prompt_embeddings": [P, width]}: what the encoder says, not the encoder, as in peft's file."""
        return {"prompt_embeddings": self[name].to_save()}

    @torch.no_grad()
    def read_file_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Take the values of a file. An encoder that computes its tokens is folded: the file has the tokens alone."""
        self[name].fold()
        self[name].embedding.weight.copy_(tensors["prompt_embeddings"])


class _Before:
    """The hook. A class and not a closure, so that a model with virtual tokens can be copied and pickled."""

    def __init__(self, frame: VirtualTokens, change: Callable[[nn.Module, dict], dict]) -> None:
        self.frame, self.change = frame, change

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        if not self.frame.enabled or not self.frame.active:
            return None
        return (), self.change(module, by_name(module, args, kwargs))
