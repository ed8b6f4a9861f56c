"""The places that a bottleneck adapter can have: at the end of a sublayer, beside it, or around a layer.

    AfterLayer      y = W x,  then  y + δ(y)            sequential (Houlsby, Pfeiffer): W ends the sublayer
    BesideLayer     y = FFN(x) + δ(x)                   parallel (He et al.): fed by what the feed-forward is given
    ResidualLayer   y = norm(W a + (x + δ(x)))          the same where BERT adds x inside the module
    TappedLayer     y = W a + δ(x)                      the same where x is to be had at another module (OPT's fc1)
    BlockLayer      h + δ(h), then layer(…), then y + δ(y)      before or after a whole layer (input, output, Bapna)

where δ(h) = s · (W_up f(W_down h + b) + b_up) is `BottleneckAdapter.update` of `pefttools.adapters`.

Several adapters: side by side y + Σ w_i δ_i(y), or stacked, one after the other: y ← y + w_i δ_i(y). State-dict keys:
base_layer.…, bottleneck.<adapter name>.down.weight [m, d], .down.bias [m], .up.weight [d, m], .up.bias [d].
"""
from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pefttools.adapters import BottleneckAdapter
from pefttools.layer import AdapterLayer


def combined_update(h: Tensor, adapters: Iterable[tuple[BottleneckAdapter, float]],
                    stacked: bool = False) -> Tensor | None:
    """Σ w_i δ_i(h), or with `stacked` Σ w_i δ_i(h_i), h_1 = h, h_{i+1} = h_i + w_i δ_i(h_i). None for no adapters."""
    total = None
    for adapter, weight in adapters:
        update = adapter.update(h if total is None or not stacked else h + total)
        update = update if weight == 1 else update * weight
        total = update if total is None else total + update
    return total


class BottleneckLayer(AdapterLayer):
    """What all places share: the named adapters of one module, and what they add to a tensor."""

    holds = ("bottleneck",)
    can_stack = True
    kind = ""

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        for attribute in self.holds:
            setattr(self, attribute, nn.ModuleDict())
        self.rows: list[str | None] | None = None          # set by pefttools.compose.routed
        self.train(base.training)

    def __getattr__(self, name: str) -> Any:
        # What a model looks up in its layer (T5: wo.weight) is the wrapped layer's.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def add(self, name: str, config: Any, generator: torch.Generator | None = None) -> None:
        site = config.site(self.base_layer)
        if site.kind != self.kind:
            raise ValueError(f"placement={config.placement!r}: the adapters before this one act {self.kind} this "
                             f"module, and {name!r} would act {site.kind} it. Use one placement for all.")
        self._add(self.bottleneck, name, config, site.d_model, generator)

    def _add(self, held: nn.ModuleDict, name: str, config: Any, d_model: int, generator: Any) -> None:
        like = next((p for p in self.base_layer.parameters() if p.is_floating_point()), torch.empty(0))
        dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else torch.float32
        device = next(self.base_layer.parameters(), like).device
        held[name] = config.adapter(d_model, generator, dtype, device).train(self.training)

    @property
    def acts(self) -> bool:
        return self.enabled and not self.merged and bool(self.active or self.rows)

    def add_to(self, y: Tensor, h: Tensor, held: nn.ModuleDict | None = None) -> Tensor:
        """y plus what the active adapters make of h, in the dtype of y."""
        held = self.bottleneck if held is None else held
        if self.rows is not None:
            return _by_row(y, h, held, self.rows)
        update = combined_update(h, ((held[n], w) for n, w in self.active.items() if n in held), self.stacked)
        return y if update is None else (y + update).to(y.dtype)


def _by_row(y: Tensor, h: Tensor, held: nn.ModuleDict, rows: list[str | None]) -> Tensor:
    """Row i of the batch through the adapter rows[i]. OPT flattens [B, T, d] to [B·T, d], rows in order."""
    if len(h) % len(rows):
        raise ValueError(f"routed: {len(rows)} adapters for a batch of {len(h)} rows; name one for each row.")
    by_row = h.reshape(len(rows), h.shape[:-1].numel() // len(rows), h.shape[-1])
    update = torch.zeros_like(by_row)
    for name in dict.fromkeys(rows):
        if name in held:
            at = torch.tensor([i for i, row in enumerate(rows) if row == name], device=h.device)
            piece = held[name].update(by_row[at])
            update = update.to(piece.dtype).index_put((at,), piece)
    return (y + update.reshape(h.shape)).to(y.dtype)


class AfterLayer(BottleneckLayer):
    """The last projection of a sublayer, and an adapter on its output, before the residual sum."""

    kind = "after"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        return self.add_to(y, y) if self.acts else y


class BesideLayer(BottleneckLayer):
    """A feed-forward, and an adapter that reads the same input; both outputs are added."""

    kind = "beside"

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        return self.add_to(y, x) if self.acts else y


class ResidualLayer(BottleneckLayer):
    """BERT's output, called with (activations, x): it adds x inside, so the adapter's update rides on x."""

    kind = "residual"

    def forward(self, activations: Tensor, x: Tensor) -> Tensor:
        return self.base_layer(activations, self.add_to(x, x) if self.acts else x)


class TappedLayer(BottleneckLayer):
    """The last projection of a feed-forward, and an adapter that reads what `source`, its first one, was given."""

    kind = "tapped"

    def __init__(self, base: nn.Module, source: nn.Module) -> None:
        super().__init__(base)
        self._given: dict[int, Tensor] = {}      # by thread: a model may serve several requests at once
        self._tap = source.register_forward_pre_hook(self._take)

    def _take(self, source: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self.acts:
            self._given[threading.get_ident()] = args[0]

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if not self.acts:
            return y
        given = self._given.pop(threading.get_ident(), None)
        if given is None:
            raise RuntimeError("the adapter beside this feed-forward reads what its first projection is given, and "
                               "that was not called before this one. Call the model, or its layer, as a whole.")
        return self.add_to(y, given)

    def restore_base(self) -> None:
        self._tap.remove()


class BlockLayer(BottleneckLayer):
    """A whole layer of the model, with an adapter on what goes in, on what comes out, or both.

    The adapter behind it is a hook on the layer itself, so that it is in what `output_hidden_states` records.
    """

    holds = ("before", "after")
    kind = "block"

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self._inside: set[int] = set()           # threads that came in through this wrapper: the hook is for them
        self._hook = base.register_forward_hook(self._behind, prepend=True)

    def add(self, name: str, config: Any, generator: torch.Generator | None = None) -> None:
        site = config.site(self.base_layer)
        if site.kind != self.kind:
            raise ValueError(f"placement={config.placement!r} has none around a layer; use one placement for all.")
        for where in site.where:
            self._add(getattr(self, where), name, config, site.d_model, generator)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.acts and len(self.before):
            if args:
                args = (self.add_to(args[0], args[0], self.before), *args[1:])
            else:
                h = kwargs["hidden_states"]
                kwargs["hidden_states"] = self.add_to(h, h, self.before)
        self._inside.add(threading.get_ident())
        try:
            return self.base_layer(*args, **kwargs)
        finally:
            self._inside.discard(threading.get_ident())

    def _behind(self, base: nn.Module, args: Any, output: Any) -> Any:
        if not (self.acts and len(self.after) and threading.get_ident() in self._inside):
            return output
        if isinstance(output, tuple):                        # T5: (hidden states, position biases)
            return (self.add_to(output[0], output[0], self.after), *output[1:])
        return self.add_to(output, output, self.after)

    def restore_base(self) -> None:
        self._hook.remove()
