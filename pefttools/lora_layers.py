"""LoRA on an embedding: a look-up table plus a trained update of rank r.

    y = E[i] + (α/r) · B A[:, i],      E: [num, d],  A: [r, num],  B: [d, r]

Seen as a linear layer, an embedding multiplies Eᵀ [d, num] by a one-hot vector, so ΔEᵀ = (α/r)·B·A as in Hu et al. 2021
(arXiv:2106.09685, equation 3); A meets the one-hot vector first, which takes out its column i.

        i  (a token)
      ╱             ╲
    E[i]         A[:, i]   [r]     zero at the start, and B normal: the other way round than in a linear layer
      │             │
      │          B · A[:, i]  [d]
      ╲            ╱ · α/r
        ─── + ───
            y  [d]

peft's layer is `Embedding` in peft/tuners/lora/layer.py; names and starts are its. (GPT-2's Conv1D is a linear layer
whose weight is stored as [d_in, d_out]: `LoRALinear` takes it as it is.)

A worked number: 128,256 words of width 2,048 (Llama-3.2-1B) are 262,668,288 numbers. At r = 8, A has 8·128,256 and B
2,048·8, together 1,042,432, of which a batch touches B and the columns of A of its own words.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pefttools.layer import AdapterLayer
from pefttools.lora_config import LoRAConfig, check_rank_fits


def lora_embedding_forward(ids: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """weight[ids] + scale · A[:, ids]ᵀ Bᵀ as weight's dtype: ids [...], weight [num, d], A [r, num], B [d, r]."""
    return (weight[ids] + F.embedding(ids, A.T) @ B.T * scale).to(weight.dtype)


class LoRAEmbedding(AdapterLayer):
    """A given nn.Embedding, frozen, plus the update: ids [...] → [..., d].

    State-dict keys are peft's: `base_layer.weight`, `lora_embedding_A.default` [r, num], `lora_embedding_B.default`
    [d, r], float32 beside a weight of 16 bits or fewer. `dropout` does not act on an embedding (nor does it in peft).
    An embedding that multiplies its output by `embed_scale` (Gemma) multiplies the update too. Raises TypeError unless
    `base` is an nn.Embedding, ValueError for an r, alpha or dropout that makes no sense, or an init that a table of
    words cannot start from.
    """

    holds = ("lora_embedding_A", "lora_embedding_B")

    def __init__(self, base: nn.Embedding, r: int, alpha: float, dropout: float = 0.0, rslora: bool = False,
                 generator: torch.Generator | None = None, init: str | bool = True, name: str = "default") -> None:
        if not isinstance(base, nn.Embedding):
            raise TypeError(f"base must be an nn.Embedding; got {type(base).__name__}.")
        config = LoRAConfig(r, alpha, dropout, rslora, init=init)
        _check(config, base)
        super().__init__(base)
        self.settings: dict[str, LoRAConfig] = {}
        self.scaling: dict[str, float] = {}
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()
        self.train(base.training)
        self.add(name, config, generator)
        self.active = {name: 1.0}

    def add(self, name: str, config: LoRAConfig, generator: torch.Generator | None = None) -> None:
        """A zero, B normal with standard deviation 1 (with init=False both normal), as in peft. It does not act yet."""
        _check(config, self.base_layer)
        num, d = self.base_layer.weight.shape
        A = torch.zeros(config.r, num)
        if config.init is False:
            A.normal_(generator=generator)
        self.put(name, config, A, torch.empty(d, config.r).normal_(generator=generator))

    def put(self, name: str, config: LoRAConfig, A: Tensor, B: Tensor) -> None:
        """A new adapter of these values. They go to the weight's device; in float64 beside float64, else float32."""
        weight = self.base_layer.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.lora_embedding_A[name], self.lora_embedding_B[name] = \
            (nn.Parameter(t.to(weight.device, dtype).contiguous()) for t in (A, B))
        self.settings[name], self.scaling[name] = config, config.scaling

    def remove(self, name: str) -> None:
        super().remove(name)
        self.settings.pop(name, None)
        self.scaling.pop(name, None)

    def forward(self, ids: Tensor) -> Tensor:
        base = self.base_layer
        result = total = base(ids)                                                                    # [..., d]
        if self.merged or not self.enabled:
            return result
        for name, share in self.active.items():
            A, B = self.lora_embedding_A[name], self.lora_embedding_B[name]
            # padding_idx: the row of the padding word gets no gradient
            columns = F.embedding(ids, A.T, base.padding_idx, base.max_norm, base.norm_type, base.scale_grad_by_freq,
                                  base.sparse)                                                        # [..., r]
            update = columns @ B.T * (share * self.scaling[name])
            if (scale := getattr(base, "embed_scale", None)) is not None:
                update = update * torch.as_tensor(scale, device=update.device).to(base.weight.dtype).to(update.dtype)
            total = total + update
        return total.to(result.dtype)

    @torch.no_grad()
    def delta(self, name: str | None = None) -> Tensor:
        """ΔE [num, d] of one adapter, or of those that act with their weights, in the dtype of A and B."""
        shares = self.active if name is None else {name: 1.0}
        return sum((self.lora_embedding_B[name] @ self.lora_embedding_A[name]).T * (share * self.scaling[name])
                   for name, share in shares.items())

    def merged_tensors(self) -> dict[str, Tensor]:
        return {"weight": self.base_layer.weight + self.delta()}

    def extra_repr(self) -> str:
        of = ", ".join(f"{name}: r={config.r}, alpha={config.alpha}" for name, config in self.settings.items())
        return f"{of}, merged={self.merged}"


def _check(config: LoRAConfig, base: nn.Embedding) -> None:
    check_rank_fits(config.r, base.num_embeddings, base.embedding_dim)
    if isinstance(config.init, str) and config.init != "gaussian":       # "gaussian" is about A, which is zero here
        raise ValueError(f"init={config.init!r} is a start for linear layers; for an embedding take True or False, or "
                         f"leave {type(base).__name__} out of target_modules.")
