"""Bottleneck adapters: a small network with a way around it, put into a frozen model.

    y = h + s · ( W_up f(W_down h + b) + b_up ),      W_down: [m, d],  W_up: [d, m],  m much smaller than d

Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv:1902.00751, section 2.1, figure 2 (s = 1).
He et al. 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv:2110.04366, add the scale s.

            h  [..., d]
            ├─────────────┐
       ┌────┴────┐        │
       │ W_down  │ [m, d] │      random at the start
       └────┬────┘        │
            f             │      the activation, on [..., m]: without it, the two matrices would be one of rank m
       ┌────┴────┐        │
       │  W_up   │ [d, m] │      zero at the start, so that y is h exactly
       └────┬────┘        │
            · s           │
            + ────────────┘
            y  [..., d]

A worked number: d = 2048, m = 64 has 2·64·2048 + 2048 + 64 = 264,256 parameters (2md + d + m). Because f stands between
them, no weight of the model can take the place of the two matrices: an adapter cannot be merged, as LoRA can.

Where in the model they are put is in `pefttools.placements`.
"""
from __future__ import annotations

import math
import numbers
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"), "silu": F.silu,
    "tanh": torch.tanh, "sigmoid": torch.sigmoid, "leaky_relu": F.leaky_relu, "identity": lambda z: z}
INITS = ("zero", "houlsby")
NORMS = (False, "before", "after")


# ------------------------------------------------------------------------------------------------ pure functions

def bottleneck_update(h: Tensor, W_down: Tensor, b_down: Tensor | None, W_up: Tensor, b_up: Tensor | None,
                      activation: str = "relu", scale: float | Tensor = 1.0) -> Tensor:
    """s · (W_up f(W_down h + b) + b_up): what the adapter adds to h.

    h [..., d], W_down [m, d], b_down [m], W_up [d, m], b_up [d] → [..., d] in the dtype of the weights. Raises
    ValueError naming the tensor whose shape does not fit, or for an activation that does not exist.
    """
    f = activation_function(activation)
    if W_down.dim() != 2:
        raise ValueError(f"W_down must be [m, d]; got shape {list(W_down.shape)}.")
    m, d = W_down.shape
    if W_up.shape != (d, m):
        raise ValueError(f"W_up must be [d={d}, m={m}], the shape of W_down turned round; got {list(W_up.shape)}.")
    for name, bias, size in (("b_down", b_down, m), ("b_up", b_up, d)):
        if bias is not None and bias.shape != (size,):
            raise ValueError(f"{name} must be [{size}]; got shape {list(bias.shape)}.")
    if h.dim() == 0 or h.shape[-1] != d:
        raise ValueError(f"h must be [..., d={d}], as wide as W_down {list(W_down.shape)}; got {list(h.shape)}.")
    return _scaled(F.linear(f(F.linear(h.to(W_down.dtype), W_down, b_down)), W_up, b_up), scale)


def bottleneck_forward(h: Tensor, W_down: Tensor, b_down: Tensor | None, W_up: Tensor, b_up: Tensor | None,
                       activation: str = "relu", scale: float | Tensor = 1.0) -> Tensor:
    """h + s · (W_up f(W_down h + b) + b_up), in the dtype of h. Shapes and errors as in `bottleneck_update`."""
    return (h + bottleneck_update(h, W_down, b_down, W_up, b_up, activation, scale)).to(h.dtype)


def bottleneck_size(d: int, m: int) -> int:
    """2md + d + m: the parameters of one adapter. Houlsby's placement has two in each layer of the model."""
    return 2 * m * d + d + m


def bottleneck_init(d: int, m: int, init: str = "zero", generator: torch.Generator | None = None,
                    dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(W_down [m, d], W_up [d, m]) at the start of training; the biases start at zero.

    "zero": W_down Kaiming-uniform (±1/√d), W_up zero, as in He et al.: the start is the identity to the last bit.
    "houlsby": both normal with σ = 0.01, cut off at two σ (section 3.6): near the identity, and not exactly it.
    """
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(map(repr, INITS))}; got {init!r}.")
    W_down, W_up = torch.empty(m, d, dtype=dtype), torch.zeros(d, m, dtype=dtype)
    if init == "zero":
        nn.init.kaiming_uniform_(W_down, a=math.sqrt(5), generator=generator)
    else:
        for weight in (W_down, W_up):
            nn.init.trunc_normal_(weight, std=0.01, a=-0.02, b=0.02, generator=generator)
    return W_down, W_up


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """f by its name. Raises ValueError with the names that exist."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {name!r}.")
    return ACTIVATIONS[name]


def _scaled(update: Tensor, scale: float | Tensor) -> Tensor:
    return update if isinstance(scale, numbers.Real) and scale == 1 else update * scale


# ------------------------------------------------------------------------------------------------ the module

class BottleneckAdapter(nn.Module):
    """h [..., d_model] → h + s · (W_up f(W_down h + b) + b_up), with parameters down, up, and what is asked for beside.

    `scale`: a number, or "learned": one trained number that starts at 1. `layer_norm`: "before" (the adapter reads
    LN(h), as Bapna & Firat have it) or "after" (its update passes through LN, as in HyperFormer). `dropout` acts on the
    m numbers in the middle. `generator` draws the start. Raises ValueError for settings that make no sense.
    """

    def __init__(self, d_model: int, bottleneck: int, activation: str = "relu", scale: float | str = 1.0,
                 dropout: float = 0.0, layer_norm: bool | str = False, init: str = "zero",
                 generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32,
                 device: torch.device | str | None = None) -> None:
        super().__init__()
        check_settings(bottleneck, activation, scale, dropout, layer_norm, init)
        whole("d_model", d_model)
        W_down, W_up = (w.to(device) for w in bottleneck_init(d_model, bottleneck, init, generator, dtype))
        self.d_model, self.activation, self.layer_norm = d_model, activation, layer_norm
        self.down, self.up = _linear_of(W_down), _linear_of(W_up)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        if layer_norm:
            self.norm = nn.LayerNorm(d_model, dtype=dtype, device=device)
        learned = scale == "learned"
        self.scale = nn.Parameter(torch.ones((), dtype=dtype, device=device)) if learned else float(scale)

    def update(self, h: Tensor) -> Tensor:
        """What is added to h, in the dtype of the adapter's own weights (float32 beside a model of 16 bits)."""
        if h.dim() == 0 or h.shape[-1] != self.d_model:
            raise ValueError(f"h must be [..., d_model={self.d_model}]; got {list(h.shape)}.")
        h = h.to(self.down.weight.dtype)
        z = self.down(self.norm(h) if self.layer_norm == "before" else h)                      # [..., m]
        u = self.up(self.dropout(ACTIVATIONS[self.activation](z)))                             # [..., d]
        return _scaled(self.norm(u) if self.layer_norm == "after" else u, self.scale)

    def forward(self, h: Tensor) -> Tensor:
        return (h + self.update(h)).to(h.dtype)

    def extra_repr(self) -> str:
        return f"activation={self.activation}, layer_norm={self.layer_norm}"


def _linear_of(weight: Tensor) -> nn.Linear:
    """An nn.Linear with this weight and a bias of zeros; made on the meta device, so it draws no random numbers."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(weight.new_zeros(len(weight)))
    return linear


def whole(name: str, value: int) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number, 1 or more; got {value!r}.")


def check_settings(bottleneck: int, activation: str, scale: float | str, dropout: float, layer_norm: bool | str,
                   init: str) -> None:
    """Raise ValueError that names the argument, what was given, and what would do."""
    whole("bottleneck", bottleneck)
    activation_function(activation)
    number = isinstance(scale, numbers.Real) and not isinstance(scale, bool)
    if scale != "learned" and not (number and math.isfinite(scale) and scale != 0):
        raise ValueError(f"scale must be a finite number other than 0, or \"learned\"; got {scale!r}.")
    if not isinstance(dropout, numbers.Real) or not 0 <= dropout < 1:
        raise ValueError(f"dropout must be a probability in [0, 1); got {dropout!r}. Try dropout=0.1, or 0.")
    if layer_norm not in NORMS:
        raise ValueError(f"layer_norm must be one of {', '.join(map(repr, NORMS))}; got {layer_norm!r}.")
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(map(repr, INITS))}; got {init!r}.")
