"""P-tuning: the soft prompt is not trained itself, but computed by a small network that is.

    prompt = encoder(E),    E: [P, d] trained,    encoder = an MLP, or a bidirectional LSTM and an MLP, trained too

Liu et al. 2021, "GPT Understands, Too", arXiv:2103.10385, section 3.2 (equation 5 is the LSTM). The vectors of a plain
soft prompt (pefttools.prompt) are independent of each other and, under Adam, move only a little at each step; the
encoder ties them together and lets one step move all of them.

     E  [P, d]                         E  [P, d]
        │ Linear d → h                    │ LSTM d → h, both ways, `layers` deep      [P, 2h]
        │ ReLU                            │ Linear 2h → 2h
        │ Linear h → h                    │ ReLU
        │ ReLU                            │ Linear 2h → d
        │ Linear h → d                    ▼
        ▼                              prompt  [P, d]         kind="LSTM"
     prompt  [P, d]   kind="MLP"

After training the encoder has done its work: what it says is a plain soft prompt, and `fold()` keeps that alone.
peft's file holds it alone, too (`PromptEncoder` in peft/tuners/p_tuning), so an adapter that was loaded is folded: it
generates, and trains on as a plain soft prompt. A worked number: P = 20, d = h = 2048, MLP:
20 · 2048 + 3 · (2048² + 2048) = 12,630,016 numbers are trained and 40,960 saved.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pefttools.prompt import PromptTokens
from pefttools.virtual import VirtualTokens
from pefttools.virtual_config import VirtualConfig, drawing, place

KINDS = ("MLP", "LSTM")


class PTuning(nn.Module):
    """The encoder: forward() → [P, d]. Keys are peft's: embedding.weight [rows, d], lstm_head.…, mlp_head.0.weight, ….

    rows: of E, if more than `length` (peft's encoder–decoders have 2 P and use P). layers, dropout: of the LSTM alone.
    """

    def __init__(self, length: int, d: int, hidden: int, kind: str = "MLP", layers: int = 2, dropout: float = 0.0,
                 rows: int | None = None) -> None:
        super().__init__()
        self.length, self.kind = length, kind
        self.embedding = nn.Embedding(rows or length, d)
        if kind == "LSTM":
            self.lstm_head = nn.LSTM(d, hidden, layers, dropout=dropout, bidirectional=True, batch_first=True)
            self.mlp_head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, d))
        else:
            self.mlp_head = nn.Sequential(nn.Linear(d, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
                                          nn.Linear(hidden, d))

    @property
    def folded(self) -> bool:
        return not hasattr(self, "mlp_head")

    def all_rows(self) -> Tensor:
        """[rows, d]. The LSTM reads the rows as one sequence, those that peft never uses included."""
        E = self.embedding.weight[None]
        if self.folded:
            return E[0]
        return self.mlp_head(self.lstm_head(E)[0] if self.kind == "LSTM" else E)[0]

    def forward(self) -> Tensor:
        return self.all_rows()[:self.length]

    @torch.no_grad()
    def to_save(self) -> Tensor:
        training = self.training
        try:
            return self.eval().all_rows()          # without the LSTM's dropout
        finally:
            self.train(training)

    @torch.no_grad()
    def fold(self) -> None:
        """Keep the prompt and forget the encoder: the same output, from `embedding.weight` alone. Twice is once."""
        if not self.folded:
            self.embedding.weight.copy_(self.to_save())
            for part in ("mlp_head", "lstm_head"):
                if hasattr(self, part):
                    delattr(self, part)


@dataclass
class PTuningConfig(VirtualConfig):
    """kind: "MLP" or "LSTM". hidden: h, the encoder's width; the model's where None. The rest: see `PTuning`."""

    hidden: int | None = None
    kind: str = "MLP"
    layers: int = 2
    dropout: float = 0.0
    count_padding: bool = False

    peft_type = "P_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {self.kind!r}.")
        if self.hidden is not None and self.hidden < 1 or self.layers < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"hidden and layers must be at least 1 and dropout from 0 to below 1; got "
                             f"hidden={self.hidden}, layers={self.layers}, dropout={self.dropout}.")

    def frame(self, model: nn.Module) -> VirtualTokens:
        return PromptTokens(model, self.count_padding)

    def encoder(self, model: nn.Module, generator: torch.Generator | None = None) -> PTuning:
        self.describe(model)
        d = self.token_dim(model)
        with drawing(generator):
            encoder = PTuning(self.length, d, self.hidden or d, self.kind, self.layers, self.dropout,
                              self.length * self.submodules(model))
        return place(encoder, model)

    def to_peft(self) -> dict[str, Any]:
        fields = super().to_peft()
        return fields | {"encoder_reparameterization_type": self.kind, "encoder_num_layers": self.layers,
                         "encoder_hidden_size": self.hidden or fields.get("token_dim"), "encoder_dropout": self.dropout}

    @classmethod
    def from_peft(cls, fields: dict[str, Any]) -> PTuningConfig:
        return cls._from_peft(fields, hidden=fields.get("encoder_hidden_size"),
                              kind=fields.get("encoder_reparameterization_type", "MLP"),
                              layers=fields.get("encoder_num_layers", 2), dropout=fields.get("encoder_dropout", 0.0))
