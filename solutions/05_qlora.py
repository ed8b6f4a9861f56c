# ---
# title: QLoRA
# minutes: 90
# needs: [02_lora, 04_nf4]
# ---
# %% [markdown]
# LoRA trains a percent of the parameters, and the other ninety-nine still lie in memory in 16 bits. **QLoRA** stores them
# in four (chapter 04's NF4) and trains the same $A$ and $B$ on top (chapter 02). Each half you have written already. What
# is new is the seam between them: a weight that exists only while it is used, and a gradient that has to pass through it.
#
# **After this chapter you can**
#
# - write QLoRA's forward and backward pass by hand, and say why the frozen weight is needed in both;
# - write a layer that keeps nothing of full size between the two;
# - say which parts of a model stay in 16 bits and why, and count the bytes of what comes out;
# - say what the compute dtype, 8-bit Adam and paged optimizers are for, and how much they save;
# - choose among four ways to ship a QLoRA adapter, from measurements.

# %%
import copy
import inspect
import logging
import statistics
import textwrap
import time
import warnings

import torch
import torch.nn.functional as F
from IPython.display import Markdown, display
from torch import nn

from pefttools import inject as adapters
from pefttools.adamw import adamw
from pefttools.grading import check
from pefttools.lab import collate, encoded, evaluate, generate, held_out_loss, load_base, load_data, loss_sum, prompt_of, steps, train
from pefttools.lab import qlora_runs as ahead
from pefttools.lora import LoRAConfig
from pefttools.nf4 import NF4Tensor, quantize_nf4
from pefttools.qlora import NF4Linear, quantizable, quantize_model
from pefttools.widgets import qlora as pictures
from pefttools.widgets.base import show

logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)   # it complains about extras that we do not need
warnings.filterwarnings("ignore")

original, tokenizer = load_base("tiny")
print(f"ready: the bundled Llama with {sum(p.numel() for p in original.parameters()):,} parameters")

# %% [markdown]
# ## The picture

# %%
show(pictures.roads_picture(), alt="Two diagrams. Forward: x goes over two roads to y; the upper one multiplies by W, which is dequantized from "
     "4-bit codes for a moment, the lower one goes through A and B and the scale. Backward: the gradient g goes back over both roads, and "
     "W is dequantized a second time.")

# %% [markdown]
# *Only $A$ and $B$ (orange) learn. The codes and scales (grey) are all that stays in memory of $W$.*
#
# $$y = \underbrace{\operatorname{dequantize}(q)}_{W}\,x + b + \frac{\alpha}{r}\,B\,A\,x$$
#
# | symbol | what it is | size | stored in |
# |---|---|---|---|
# | $x$, $y$ | input and output of the layer | $d_{in}$, $d_{out}$ | 16 or 32 bits |
# | $q$ | codes and scales of the frozen weight | $d_{out} \times d_{in}$ codes, a scale per 64 | 4.127 bits a weight |
# | $W$ | the weight that $q$ stands for | $d_{out} \times d_{in}$ | nowhere: made when used |
# | $b$ | the layer's bias, if it has one | $d_{out}$ | 16 bits |
# | $A$, $B$ | LoRA's factors, trained | $r \times d_{in}$, $d_{out} \times r$ | 32 bits |
# | $r$, $\alpha$ | rank, and with it the scale $\alpha/r$ | one number each | |
#
# This is equation 5 of the QLoRA paper (Dettmers et al. 2023), which writes $y = xW$ with rows $x$.
#
# ## By hand
#
# Two rows, two columns, one block. The levels of the type are $-1, 0, 0.5, 1$ (four are enough for an example), the block's
# absmax is 4:
#
# $$\text{codes} = \begin{pmatrix} 3 & 1 \\ 0 & 2 \end{pmatrix}
# \;\to\; W = 4 \begin{pmatrix} 1 & 0 \\ -1 & 0.5 \end{pmatrix} = \begin{pmatrix} 4 & 0 \\ -4 & 2 \end{pmatrix},
# \quad A = \begin{pmatrix} 1 & 1 \end{pmatrix},\; B = \begin{pmatrix} 0.5 \\ 0 \end{pmatrix},\; \alpha = 2,\; x = \begin{pmatrix} 1 \\ 2 \end{pmatrix}$$
#
# 1. The frozen road: $Wx = (4,\ -4 + 4) = (4, 0)$.
# 2. $A$ reads $1 + 2 = 3$, $B$ writes $(1.5, 0)$, the scale $\alpha/r = 2/1$ makes it $(3, 0)$.
# 3. Together $(7, 0)$.

# %%
levels, codes, absmax = torch.tensor([-1.0, 0.0, 0.5, 1.0]), torch.tensor([[3, 1], [0, 2]]), 4.0
A, B, alpha, x = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.5], [0.0]]), 2.0, torch.tensor([1.0, 2.0])
W = absmax * levels[codes]
by_hand = W @ x + alpha / 1 * B @ (A @ x)
print("W =", W.tolist(), "   y =", by_hand.tolist())

# %% [markdown]
# From here on a 4-bit weight is an object `q` with `q.shape` $= (d_{out}, d_{in})$ and `q.dequantize(dtype=torch.float32)`, which
# gives $W$. That is chapter 04 in a box; the real one is `pefttools.nf4.NF4Tensor`.

# %% [markdown] exercise="qlora-forward"
# Write `qlora_forward(x, q, A, B, alpha, bias=None)`.
#
# | argument | shape |
# |---|---|
# | `x` | `[..., d_in]` |
# | `q` | a 4-bit weight `[d_out, d_in]`: `q.dequantize()` |
# | `A`, `B` | `[r, d_in]`, `[d_out, r]` |
# | *returns* | `[..., d_out]` |
#
# *Why it matters:* it is the whole method. (And it shows how little of LoRA changes.)

# %% exercise="qlora-forward"
def qlora_forward(x, q, A, B, alpha, bias=None):
    """x dequantize(q)ᵀ + b + (alpha/r) B A x, for x [..., d_in].  Returns [..., d_out]."""
    ### BEGIN SOLUTION
    frozen = F.linear(x, q.dequantize(), bias)
    return frozen + alpha / A.shape[0] * (x @ A.T) @ B.T
    ### END SOLUTION

# %% check="qlora-forward"
check("qlora-forward", qlora_forward)

# %% [markdown] hint="qlora-forward" level="nudge"
# Take your `lora_forward` of chapter 02. One thing in it is different now.

# %% [markdown] hint="qlora-forward" level="shape"
# `q.dequantize()` is `[d_out, d_in]`, as `W0` was. $r$ is `A.shape[0]`.

# %% [markdown] hint="qlora-forward" level="code"
# `return F.linear(x, ..., bias) + ... * (x @ A.T) @ B.T`

# %% [markdown]
# ## What stays in 16 bits
#
# QLoRA does not quantize a *model*. It quantizes its linear layers, and leaves alone:
#
# | part | why |
# |---|---|
# | embedding | a table to look up in: no product, nothing to gain in speed; every error is in all that follows |
# | norms | a few thousand numbers that scale whole channels: nothing to save, much to lose |
# | output head | its errors go straight into the logits; often it *is* the embedding (tied) |
# | biases, $A$ and $B$ | few |
#
# Which part of the bundled model is that? And of Llama-3.2-1B? **Predict** for the latter: NF4 is 3.9 times smaller than 16
# bits. By what factor does the *model* shrink?

# %%
my_guess = None

# %%
from transformers import LlamaConfig, LlamaForCausalLM

with torch.device("meta"):                      # the shapes, without numbers
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                                         num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True))


def nf4_bytes(n: int) -> int:
    """Bytes of n weights in NF4 with double quantization: codes, 8-bit scales, their scales, a mean."""
    blocks = -(-n // 64)
    return -(-n // 2) + blocks + 4 * -(-blocks // 256) + 4


def sizes(model):
    inside = [layer.weight.numel() for layer in quantizable(model).values()]
    rest = sum(p.numel() for p in model.parameters()) - sum(inside)
    return sum(inside), rest, sum(map(nf4_bytes, inside)) + 2 * rest, 2 * (sum(inside) + rest)


sized = {"bundled Llama": sizes(original), "Llama-3.2-1B": sizes(llama)}
print("your guess:", my_guess)
for name, (inside, rest, small, large) in sized.items():
    print(f"{name}: {inside:,} weights quantized, {rest:,} ({rest / (inside + rest):.0%}) not")
    print(f"    {large / 1e6:,.1f} MB in 16 bits → {small / 1e6:,.1f} MB, {large / small:.2f} × smaller; "
          f"{2 * rest / small:.0%} of these bytes are what stayed")

# %% [markdown]
# What stays is a fifth of the parameters and about half of the bytes. In a larger model it is a smaller share (70B: below).

# %% [markdown] exercise="what-stays"
# Write `base_bytes(parts, tied)`: the bytes of a model as QLoRA stores it. `parts` is a list of `(name, kind, n)`: a name, one of
# `"embedding"`, `"norm"`, `"linear"`, and how many numbers it has.
#
# - A linear layer is in NF4 with double quantization: half a byte a weight, one byte per block of 64, four bytes per 256 of these
#   blocks, and four more for the mean. Round each count up.
# - The output head is the linear layer of the name `"lm_head"`: 16 bits. With `tied=True` it is the embedding's own tensor, and
#   takes nothing of its own.
# - All else takes 16 bits.
#
# *Why it matters:* "half a byte a parameter" is wrong by a factor of two for a small model.

# %% exercise="what-stays"
def base_bytes(parts: list[tuple[str, str, int]], tied: bool) -> int:
    """Bytes of a QLoRA base model: 4 bits where QLoRA quantizes, 16 where it does not."""
    ### BEGIN SOLUTION
    total = 0
    for name, kind, n in parts:
        if name == "lm_head":
            total += 0 if tied else 2 * n
        elif kind == "linear":
            blocks = -(-n // 64)
            total += -(-n // 2) + blocks + 4 * -(-blocks // 256) + 4
        else:
            total += 2 * n
    return total
    ### END SOLUTION

# %% check="what-stays"
check("what-stays", base_bytes)

# %% [markdown] hint="what-stays" level="nudge"
# One loop over the parts with three cases. Ask for the head first, since its kind is "linear" as well.

# %% [markdown] hint="what-stays" level="shape"
# For a linear layer: `blocks = math.ceil(n / 64)`, then four terms. Check yourself: 16,384 weights take 8192 + 256 + 4 + 4 bytes.

# %% [markdown] hint="what-stays" level="code"
# ```python
# for name, kind, n in parts:
#     if name == "lm_head":
#         total += 0 if ... else 2 * n
#     elif kind == "linear":
#         blocks = -(-n // 64)
#         total += -(-n // 2) + ... + 4 * ... + 4
#     else:
#         total += ...
# ```

# %% [markdown]
# Is it true that these parts are sensitive? Quantize each kind alone on the bundled model, and look at the logits: how far do they
# move, relative to their size, for how many bytes saved?

# %%
rows_few = load_data("held_out").shuffle(seed=3).select(range(8))


def distance(model, reference):
    """Relative distance of a model's logits on the answers from reference logits."""
    return ((ahead.logits_of(model, tokenizer, rows_few) - reference).norm() / reference.norm()).item()


def nf4_round(w):
    return quantize_nf4(w.detach(), double_quant=True).dequantize() if w.numel() >= 64 else w


base_logits = ahead.logits_of(original, tokenizer, rows_few)
kinds = {"linear layers": list(quantizable(original)), "embedding (= head)": ["model.embed_tokens"],
         "norms": [name for name, m in original.named_modules() if "Norm" in type(m).__name__]}
sensitive = {}
for kind, names in kinds.items():
    shaken = copy.deepcopy(original)
    count = 0
    with torch.no_grad():
        for name in names:
            w = shaken.get_submodule(name).weight
            count += w.numel()
            w.copy_(nf4_round(w))
    sensitive[kind] = (distance(shaken, base_logits), 2 * count - nf4_bytes(count))
    print(f"{kind:20} logits move by {sensitive[kind][0]:.3f}    saves {sensitive[kind][1]:9,} bytes")
small_gain = sensitive["norms"][1] / sensitive["linear layers"][1]
print(f"the norms would save {small_gain:.3%} of what the linear layers save, and move the logits "
      f"{sensitive['norms'][0] / sensitive['linear layers'][0]:.1f} × as far")

# %% [markdown]
# For the norms the table's reason is plain to see. For the embedding it is less so: here it is a trade, some accuracy for some bytes,
# and QLoRA does not make it.

# %% question="qlora-q-stays"

# %% [markdown]
# ## Play: the bytes of a layer
#
# Where do the bytes of *one* layer go while it trains? Move the width, the rank, and the block size.

# %%
pictures.bytes_explorer();

# %% [markdown]
# *Above, three ways to train the same layer; below, a block of its weights, byte by byte.* Things to try:
#
# - From which rank on does QLoRA's **adapter**, with its gradients and moments, take more than its 4-bit weight? (At width 256
#   it happens early.)
# - What does `adam bits = 8` change for `full`, where Adam's moments are the largest part? And for LoRA?
# - Double quantization off: how much of a bar is that?
#
# Guess first; the answers, counted by the function that draws the bars:

# %%
for width in (256, 2048, 8192):
    ways = {way: sum(parts.values()) for way, parts in pictures.layer_bytes(width, width).items()}
    print(f"width {width:5}: full {ways['full'] / 2**20:8.2f} MiB, LoRA {ways['LoRA'] / 2**20:7.2f}, QLoRA {ways['QLoRA'] / 2**20:7.2f};  "
          f"full / QLoRA = {ways['full'] / ways['QLoRA']:.1f}")


def of_adapter(width, r):
    """Bytes of A and B with their gradients and moments, as a share of the 4-bit weight's."""
    parts = pictures.layer_bytes(width, width, r=r)["QLoRA"]
    weight = parts["4-bit codes"] + parts["scales"]
    return (sum(parts.values()) - weight) / weight


for width in (256, 2048):
    outgrown = next(r for r in range(1, width) if of_adapter(width, r) > 1)
    print(f"at width {width} the adapter outgrows its 4-bit weight from r = {outgrown} on")
for way in ("full", "LoRA"):
    wide, narrow = (sum(pictures.layer_bytes(adam_bits=bits)[way].values()) for bits in (32, 8))
    print(f"8-bit Adam takes {1 - narrow / wide:.0%} off the bar of {way}")
single = sum(pictures.layer_bytes(double_quant=False)["QLoRA"].values()) / sum(pictures.layer_bytes()["QLoRA"].values())
print(f"without double quantization QLoRA's bar is {single - 1:.1%} longer")

# %% [markdown]
# ## The backward pass, by hand
#
# Let $g = \partial L/\partial y$, a row for each row of the batch, as in code: $x$ is `[rows, d_in]`, $g$ is `[rows, d_out]`, and
# $y = xW^\top + s\,(xA^\top)B^\top$ with $s = \alpha/r$. The chain rule, road by road:
#
# $$\frac{\partial L}{\partial x} = \underbrace{g\,W}_{\text{frozen road}} + s\,(g\,B)\,A, \qquad
# \frac{\partial L}{\partial A} = s\,(g\,B)^\top x, \qquad \frac{\partial L}{\partial B} = s\,g^\top (x A^\top).$$
#
# What is *not* there: $\partial L/\partial W = g^\top x$, the largest product of a full fine-tune. What *is* there: $W$ itself, in
# $gW$. **Frozen does not mean that no gradient passes through.** It means that none stops there.
#
# In the example from above, with $g = (1, 1)$: $gW = (4 - 4,\ 0 + 2) = (0, 2)$; $gB = 0.5$, so the adapter sends back
# $2 \cdot 0.5 \cdot (1, 1) = (1, 1)$; together $(1, 3)$.

# %%
x_ = x.clone().requires_grad_()
(W @ x_ + alpha * B @ (A @ x_)).backward(torch.ones(2))
print("autograd says:", x_.grad.tolist())

# %% [markdown] exercise="qlora-backward"
# Write `qlora_backward(g, x, q, A, B, alpha)`, without autograd. Return `(dx, dA, dB)`, each of the shape of what it belongs to.
# `g` is `[..., d_out]` and `x` `[..., d_in]` with any number of leading dimensions; $A$ and $B$ are shared by all rows, so their
# gradients are sums over them.
#
# *Why it matters:* this is what decides what has to stay in memory between forward and backward: $x$, $A$, $B$, and $q$.

# %% exercise="qlora-backward"
def qlora_backward(g, x, q, A, B, alpha):
    """(dx, dA, dB) for y = x dequantize(q)ᵀ + (alpha/r) (x Aᵀ) Bᵀ, given g = dL/dy."""
    ### BEGIN SOLUTION
    s = alpha / A.shape[0]
    dx = g @ q.dequantize() + s * (g @ B) @ A
    rows_g, rows_x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    dA = s * (rows_g @ B).T @ rows_x
    dB = s * rows_g.T @ (rows_x @ A.T)
    return dx, dA, dB
    ### END SOLUTION

# %% check="qlora-backward"
check("qlora-backward", qlora_backward)

# %% [markdown] hint="qlora-backward" level="nudge"
# The three formulas above are three lines of code. Only the leading dimensions need care: flatten them for $dA$ and $dB$.

# %% [markdown] hint="qlora-backward" level="shape"
# `g @ W` is `[..., d_in]`: no transpose. `rows_g = g.reshape(-1, g.shape[-1])` is `[rows, d_out]`, so `rows_g @ B` is `[rows, r]`, and
# its transpose times `rows_x` is `[r, d_in]`, the shape of $A$.

# %% [markdown] hint="qlora-backward" level="code"
# ```python
# dx = g @ q.dequantize() + s * (...) @ A
# dA = s * (rows_g @ B).T @ ...
# dB = s * rows_g.T @ (... @ A.T)
# ```

# %% [markdown]
# The library's layer against autograd on the dequantized weight, on a real one: output and the three gradients.

# %%
rng = torch.Generator().manual_seed(0)
real = original.model.layers[2].mlp.up_proj
layer = adapters.attach(nn.Sequential(NF4Linear(real)), LoRAConfig(r=8, alpha=16, target_modules=["0"]))[0]
with torch.no_grad():
    layer.lora_B["default"].weight.normal_(generator=rng)
xs, gs = torch.randn(5, 256, generator=rng), torch.randn(5, real.out_features, generator=rng)
W_real = layer.base_layer.dequantize(torch.float32)
A_, B_ = (p["default"].weight.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
x_auto, x_ours = xs.clone().requires_grad_(), xs.clone().requires_grad_()
y_auto = F.linear(x_auto, W_real) + 2 * (x_auto @ A_.T) @ B_.T
by_autograd = torch.autograd.grad(y_auto, (x_auto, A_, B_), gs)
y_ours = layer(x_ours)
by_layer = torch.autograd.grad(y_ours, (x_ours, layer.lora_A["default"].weight, layer.lora_B["default"].weight), gs)
worst = max(((a - b).norm() / b.norm()).item() for a, b in zip((y_ours, *by_layer), (y_auto, *by_autograd)))
print(f"output and gradients of x, A and B: relative difference {worst:.1e} at the most")
assert worst < 1e-5

# %% question="qlora-q-gradient"

# %% [markdown]
# ## A layer that keeps nothing
#
# `F.linear(x, q.dequantize())` is right, and it does not save memory in training: autograd sees a product with a tensor, and keeps
# that tensor for the backward pass, because the gradient of $x$ needs it. Every layer then holds its $W$ in full from forward to
# backward. Here is what that means on the bundled model: bytes that autograd keeps during one forward pass.

# %%
few = collate(encoded(rows_few.select(range(4)), tokenizer), tokenizer.pad_token_id)


class Naive(nn.Module):
    """The 4-bit weight dequantized in plain sight of autograd."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.inner = layer.weight, [layer]

    def forward(self, x):
        return F.linear(x, self.inner[0].dequantize())


def kept_bytes(model) -> int:
    """Bytes of the weights' size that autograd keeps for the backward pass, parameters apart."""
    own, kept = {p.data_ptr() for p in model.parameters()}, {}
    shapes = {tuple(layer.weight.shape) for layer in quantizable(original).values()}

    def note(t):
        if tuple(t.shape) in shapes | {s[::-1] for s in shapes} and t.data_ptr() not in own and t.is_floating_point():
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = loss_sum(model, few)
    del loss
    return sum(kept.values())


four = quantize_model(copy.deepcopy(original)).requires_grad_(False)
naive = copy.deepcopy(four)
for name, module in list(naive.named_modules()):
    if isinstance(module, NF4Linear):
        naive.set_submodule(name, Naive(module))
kept = {}
for name, m in (("plain F.linear", naive), ("NF4Linear", four)):
    m.model.embed_tokens.weight.requires_grad_(True)      # so that a gradient has to pass through all layers
    kept[name] = kept_bytes(m)
    m.model.embed_tokens.weight.requires_grad_(False)
codes_bytes = sum(m.quantized.nbytes for m in four.modules() if isinstance(m, NF4Linear))
for name, waiting in kept.items():
    print(f"{name:14} {waiting:10,} bytes of dequantized weights wait")
print(f"the 4-bit weights themselves: {codes_bytes:,} bytes")

# %% [markdown] exercise="qlora-layer"
# Write the class `QLoRALayer(q, r, alpha)`, an `nn.Module` without bias:
#
# - `q` is a 4-bit weight, as before; trainable are $A$ (random) and $B$ (zero), $r\,(d_{in} + d_{out})$ numbers, and nothing else;
# - `forward(x)`, `[..., d_in] → [..., d_out]`, with right gradients for $x$, $A$ and $B$;
# - **between forward and backward nothing of $W$'s size is in memory.**
#
# For the last point write a `torch.autograd.Function` for the frozen product (in the place of `FrozenProduct = ...`): a class with
# two static methods. `forward(ctx, x, q)` returns the product and may put `q` on `ctx` (`ctx.q = q`), the object that PyTorch hands
# on to the other method; `backward(ctx, g)` gets the gradient of what forward returned, and returns one gradient for each argument
# of forward, `None` for `q`. It is not called like a layer but by `FrozenProduct.apply(x, q)`. The parameters' names are up to you.
#
# *Why it matters:* without this, a 4-bit model takes more memory in training than a 16-bit one.

# %% exercise="qlora-layer"
### BEGIN SOLUTION
class FrozenProduct(torch.autograd.Function):
    """x dequantize(q)ᵀ, dequantized once more in the backward pass."""

    @staticmethod
    def forward(ctx, x, q):
        ctx.q = q
        return F.linear(x, q.dequantize())

    @staticmethod
    def backward(ctx, g):
        return g @ ctx.q.dequantize(), None
### END SOLUTION


class QLoRALayer(nn.Module):
    """A frozen 4-bit weight plus (alpha/r) B A.  [..., d_in] → [..., d_out]"""

    def __init__(self, q, r: int, alpha: float):
        super().__init__()
        ### BEGIN SOLUTION
        d_out, d_in = q.shape
        self.q, self.scale = q, alpha / r
        self.A = nn.Parameter(torch.empty(r, d_in))
        self.B = nn.Parameter(torch.zeros(d_out, r))
        nn.init.kaiming_uniform_(self.A, a=5 ** 0.5)
        ### END SOLUTION

    def forward(self, x):
        ### BEGIN SOLUTION
        return FrozenProduct.apply(x, self.q) + self.scale * F.linear(F.linear(x, self.A), self.B)
        ### END SOLUTION

# %% check="qlora-layer"
check("qlora-layer", QLoRALayer)

# %% [markdown] hint="qlora-layer" level="nudge"
# Chapter 02's layer, with `self.base(x)` replaced by a call of your Function. In its backward you need one line of
# `qlora_backward`.

# %% [markdown] hint="qlora-layer" level="shape"
# A class with two static methods, `forward(ctx, x, q)` and `backward(ctx, g)`, derived from `torch.autograd.Function`. `backward`
# returns two things: the gradient of `x`, `[..., d_in]`, and `None`.

# %% [markdown] hint="qlora-layer" level="code"
# ```python
# class FrozenProduct(torch.autograd.Function):
#     @staticmethod
#     def forward(ctx, x, q):
#         ctx.q = q
#         return F.linear(x, ...)
#     @staticmethod
#     def backward(ctx, g):
#         return g @ ..., None
# ```

# %% [markdown]
# ### How much does a dequantized weight take, then?
#
# Source 001 says that inference of a 70B model needs "~140 GB of temporary compute, hidden from memory accounting" for the
# dequantized weights, and then takes it back: one layer at a time. It is even less: one *matrix* at a time.

# %%
with torch.device("meta"):
    llama_70b = LlamaForCausalLM(LlamaConfig(vocab_size=32_000, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80,
                                             num_attention_heads=64, num_key_value_heads=8))
largest = max(layer.weight.numel() for layer in quantizable(llama_70b).values())
whole_70b = sizes(llama_70b)
print(f"Llama-2-70B in 4 bits: {whole_70b[2] / 1e9:.1f} GB (16 bits: {whole_70b[3] / 1e9:.0f} GB); its largest matrix in 16 bits: "
      f"{2 * largest / 1e9:.2f} GB")
print(f"of all 16-bit weights that matrix is {2 * largest / whole_70b[3]:.2%}; what stayed in 16 bits takes "
      f"{2 * whole_70b[1] / whole_70b[2]:.0%} of the {whole_70b[2] / 1e9:.1f} GB")

# %% question="qlora-q-temporary"

# %% [markdown]
# ## The compute dtype
#
# Nothing is multiplied in 4 bits. `compute_dtype` says in which dtype the frozen product is done: bfloat16 on a recent GPU, float16
# on a T4 (which has no bfloat16), float32 on a CPU. $A$ and $B$ have a dtype of their own, float32: an optimizer's step on a 16-bit
# number is often smaller than half its last bit, and would be rounded away.
#
# What does it cost in accuracy? The logits of the quantized model, against the same model in float32:

# %%
exact = ahead.logits_of(four, tokenizer, rows_few)
by_dtype = {}
for dtype in (torch.float16, torch.bfloat16):
    for module in four.modules():
        if isinstance(module, NF4Linear):
            module.compute_dtype = dtype
    by_dtype[str(dtype).removeprefix("torch.")] = distance(four, exact)
for module in four.modules():
    if isinstance(module, NF4Linear):
        module.compute_dtype = None
quantized_by = distance(four, base_logits)
print(f"4 bits against 16: {quantized_by:.3f};  compute dtype alone: " + ", ".join(f"{k} {v:.5f}" for k, v in by_dtype.items()))
step_size, weight_ = 1e-4, torch.tensor(0.05)
stepped = weight_.bfloat16() + torch.tensor(step_size).bfloat16()
print(f"in bfloat16, 0.05 is {weight_.bfloat16():.6f} and 0.05 + {step_size} is {stepped:.6f}: nothing was learned")

# %% [markdown] exercise="compute-dtype"
# Write `qlora_in_dtype(x, q, A, B, alpha, compute_dtype)`, as bitsandbytes and PEFT do it together:
#
# - the frozen road in `compute_dtype`: both `x` and the dequantized weight (`q.dequantize(dtype=...)`); its result cast back to the
#   dtype of `x`;
# - the adapter in float32, on `x` as it came in;
# - the sum in the dtype of `x`.
#
# `x`, `A` and `B` are float32 here.
#
# *Why it matters:* the wrong cast costs accuracy and nobody sees it; or it is an error in the middle of a run.

# %% exercise="compute-dtype"
def qlora_in_dtype(x, q, A, B, alpha, compute_dtype):
    """x dequantize(q)ᵀ in compute_dtype, plus (alpha/r) B A x in float32."""
    ### BEGIN SOLUTION
    frozen = F.linear(x.to(compute_dtype), q.dequantize(dtype=compute_dtype)).to(x.dtype)
    return frozen + alpha / A.shape[0] * (x @ A.T) @ B.T
    ### END SOLUTION

# %% check="compute-dtype"
check("compute-dtype", qlora_in_dtype)

# %% [markdown] hint="compute-dtype" level="nudge"
# Three casts are enough: two before the frozen product, one after it. The adapter's road needs none.

# %% [markdown] hint="compute-dtype" level="shape"
# `x.to(compute_dtype)` gives a cast copy; `x` itself stays float32 for the adapter.

# %% [markdown] hint="compute-dtype" level="code"
# ```python
# frozen = F.linear(x.to(...), q.dequantize(dtype=...)).to(x.dtype)
# return frozen + ...
# ```

# %% question="qlora-q-dtype"

# %% [markdown]
# ## A whole model
#
# One function is missing: it walks through a model and puts a quantized layer in the place of each linear one, a layer at a time,
# so that each full weight is freed as its codes are there.

# %% [markdown] exercise="quantize-model"
# Write `quantize(model, make, keep)`:
#
# - freeze every parameter;
# - put `make(layer)` in the place of every `nn.Linear` of the model, at any depth, except
#   - those whose path is a name in `keep`, or ends in `"." + name` (so `"head"` does not mean `"layers.0.mlp_head"`),
#   - those whose weight is the very tensor of an `nn.Embedding` (tied).
#
# Change the model that you are given. What you return does not matter.
#
# *Why it matters:* `BitsAndBytesConfig` does this for you. When a fine-tune goes wrong, what was quantized is the first thing to look
# at.

# %% exercise="quantize-model"
def quantize(model: nn.Module, make, keep: list[str]):
    """Freeze `model` and replace its linear layers by make(layer), besides those in `keep` and tied ones."""
    ### BEGIN SOLUTION
    model.requires_grad_(False)
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)
             and not any(name == key or name.endswith("." + key) for key in keep)
             and not any(m.weight is table for table in tables)]
    for name, module in found:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(module))
    ### END SOLUTION

# %% check="quantize-model"
check("quantize-model", quantize)

# %% [markdown] hint="quantize-model" level="nudge"
# Chapter 02's `inject`, turned round: everything but, instead of only. Collect first, then replace.

# %% [markdown] hint="quantize-model" level="shape"
# `tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]`, and then `any(layer.weight is t for t in tables)`.
# To replace: `name.rpartition(".")`, `model.get_submodule(parent)`, `setattr`.

# %% [markdown] hint="quantize-model" level="code"
# ```python
# model.requires_grad_(False)
# found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and not any(... for k in keep) and not ...]
# for name, m in found:
#     parent, _, child = name.rpartition(".")
#     setattr(..., child, make(m))
# ```

# %% [markdown]
# ## The optimizer: 8 bits, and pages
#
# Adam keeps two moments for each trained parameter: 8 bytes in float32. **8-bit Adam** keeps them in 8 bits, in blocks of 256 with a
# scale each (chapter 04's absmax with another codebook). **Paged** optimizers leave them in memory that the GPU's driver moves to the
# host when the GPU is full, page by page, and back: for the *spikes* of a long batch, not for every step. There is no paging on a CPU.
#
# How much is there to save? Measured from the optimizer's own state after a step:

# %%
def state_bytes(optimizer) -> int:
    return sum(t.numel() * t.element_size() for state in optimizer.state.values() for key, t in state.items()
               if isinstance(t, torch.Tensor) and t.numel() > 1 and not key.startswith("qmap"))   # the codebook is shared


def after_a_step(model, bits):
    """Bytes of the optimizer's state once it has taken a step with the gradients that are there."""
    optimizer = adamw(model, lr=1e-4, bits=bits)
    optimizer.step()
    return state_bytes(optimizer)


moments, trained = {}, {}
for way in ("full", "QLoRA"):
    model = ahead.prepared(original, way, 0)
    (loss_sum(model, few) / 100).backward()
    trained[way] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for bits in (32, 8):
        moments[way, bits] = after_a_step(model, bits)
for way in ("full", "QLoRA"):
    print(f"{way:6} trains {trained[way]:9,}: moments {moments[way, 32]:11,} bytes in 32 bits, {moments[way, 8]:11,} in 8 "
          f"({moments[way, 8] / trained[way]:.2f} a parameter)")
print(f"the 4-bit weights of this model take {codes_bytes:,} bytes")
try:
    adamw(model, lr=1e-4, paged=True)
except ValueError as error:
    print(textwrap.fill(f"paged here: {error}", 95))

# %% question="qlora-q-adam"

# %% [markdown]
# ## On the real model
#
# QLoRA on all linear layers of the bundled Llama, $r = 16$: a minute. Before and after, it answers the same prompts.

# %%
held_out = load_data("held_out")
scored = held_out.shuffle(seed=0).select(range(steps(64, quick=12)))
asked = [held_out[i] for i in range(2)]
train_rows = encoded(load_data("train"), tokenizer)
length = steps(80, quick=3)

tuned = ahead.prepared(original, "QLoRA", seed=0)
written = {"before": generate(tuned, tokenizer, [prompt_of(row) for row in asked], max_new_tokens=steps(60, quick=12))}
loss_before = held_out_loss(tuned, tokenizer, scored)
history = train(tuned, train_rows, tokenizer, steps=length, lr=ahead.RATES["QLoRA"], batch_size=8, seed=0)
loss_after = held_out_loss(tuned, tokenizer, scored)
written["after"] = generate(tuned, tokenizer, [prompt_of(row) for row in asked], max_new_tokens=steps(60, quick=12))
show(history.plot("QLoRA, r = 16"), alt="Training loss of every step in grey and its running mean in blue: it falls steeply at first and then "
     "more slowly.")
display(Markdown(f"*Held-out loss {loss_before:.2f} → **{loss_after:.3f}** after {length} steps. The base's linear "
                 "layers stayed in 4 bits all the while.*"))

# %%
for i, row in enumerate(asked):
    print("─" * 100 + "\n" + prompt_of(row).strip())
    for when, texts in written.items():
        print(f"  [{when}]\n" + "\n".join("    " + line for line in texts[i].strip().splitlines()[:8]))

# %% [markdown]
# ### Against LoRA, and against training everything
#
# "No performance loss", says source 000. One run on one seed cannot tell, so `pefttools/lab/qlora_runs.py` trained each way several
# times ahead: same steps, same rows in the same order within a seed. **Predict** the order of full, LoRA and QLoRA, and how far apart
# they are beside the spread between seeds.

# %%
table = ahead.table()
seeds = len(table["full"]["loss"])
show(pictures.runs_figure(table), alt="Held-out loss and pass@1 for full fine-tuning, LoRA and QLoRA, a mark per seed. " + "; ".join(
     f"{way}: loss {statistics.mean(v['loss']):.3f}, pass@1 {statistics.mean(v['pass']):.0%}" for way, v in table.items()) + ".")
print(f"{seeds} seeds, {ahead.STEPS} steps of {ahead.BATCH} rows, {ahead.ANSWERS} answers run against tests")
print("learning rates: " + ", ".join(f"{way} {lr}" for way, lr in ahead.RATES.items()) + "\n")
for way, found in table.items():
    (loss, loss_sd), (passed, pass_sd) = ahead.spread(found["loss"]), ahead.spread(found["pass"])
    print(f"{way:6} held-out loss {loss:.4f} ± {loss_sd:.4f}    pass@1 {passed:.1%} ± {pass_sd:.1%}")
behind = [q - l for q, l in zip(table["QLoRA"]["loss"], table["LoRA"]["loss"])]
behind_pass = [q - l for q, l in zip(table["QLoRA"]["pass"], table["LoRA"]["pass"])]
print(f"\nQLoRA − LoRA, seed by seed: loss {', '.join(f'{d:+.4f}' for d in behind)};  pass@1 {', '.join(f'{d:+.1%}' for d in behind_pass)}")
always_higher = all(d > 0 for d in behind)


def mean_and_error(differences):
    """Mean of the seeds' differences and its standard error."""
    return statistics.mean(differences), statistics.stdev(differences) / len(differences) ** 0.5


(more, more_error), (gained, gained_error) = mean_and_error(behind), mean_and_error(behind_pass)
once_in = 2 ** seeds                       # how often as many seeds all fall on one given side by chance
order = f"above LoRA's **in every seed** (by chance once in {once_in})" if always_higher else "not always above LoRA's"
told = "too small to tell from none" if abs(gained) <= 2 * gained_error else "more than two of its standard errors"
display(Markdown(
    f"*A mark is a seed, a bar the mean ± standard deviation.* QLoRA's loss is {order}, by {more:.4f} ± "
    f"{more_error:.4f} on average ({more / statistics.mean(table['LoRA']['loss']):.0%}); the difference in pass@1, "
    f"{gained:+.1%} ± {gained_error:.1%}, is {told}. (After these ± stands the standard error over seeds. Learning "
    "rates were not swept for each way: full fine-tuning's is a customary one. And this is a small model.)"))

# %% [markdown]
# The same in small, here and now: two seeds, few steps. Does the order hold already?

# %%
short, small = steps(15, quick=2), {way: [] for way in ahead.RATES}
seconds = {}
for seed in (0, 1)[:steps(2, quick=1)]:
    for way, lr in ahead.RATES.items():
        model = ahead.prepared(original, way, seed)
        began = time.process_time()
        train(model, train_rows, tokenizer, steps=short, lr=lr, batch_size=8, seed=seed, progress=False)
        seconds.setdefault(way, []).append(time.process_time() - began)
        small[way].append(held_out_loss(model, tokenizer, scored))
print(f"after {short} steps: " + ", ".join(f"{way} " + "/".join(f"{v:.3f}" for v in losses) for way, losses in small.items()))
cost = {way: min(took) / min(seconds["LoRA"]) for way, took in seconds.items()}
print("processor time of a run, LoRA = 1 (short runs, so roughly): "
      + ", ".join(f"{way} {ratio:.2f}" for way, ratio in cost.items()))

# %% [markdown]
# If LoRA and QLoRA come out in another order here than above: two seeds and so few steps cannot tell them apart, which is what the
# error bars are for.
#
# Dequantizing every weight twice a step is work that LoRA does not have. Source 000 calls QLoRA "fast due to reduced memory
# bandwidth"; that can be so where a fused kernel reads 4-bit weights for a *single token*. A training step, with many rows per
# weight, is not limited by reading weights.

# %% [markdown]
# ## Merging
#
# An adapter on a 4-bit base can be shipped in four ways:
#
# | way | what is stored | what is rounded |
# |---|---|---|
# | kept apart | codes, and a small file | nothing |
# | into dequantized 16 bits | $\operatorname{dequantize}(q) + \Delta W$ in 16 bits | once, to 16 bits |
# | into the original 16 bits | $W_0 + \Delta W$, with $W_0$ from before it was quantized | to 16 bits; but it is *another base* than was trained on |
# | into 4 bits again | $\operatorname{quantize}(\operatorname{dequantize}(q) + \Delta W)$ | to sixteen levels, $\Delta W$ included |
#
# Source 001 has no cost for merging QLoRA. See the last row: a step between two levels is large, and $\Delta W$ is small.

# %% [markdown] exercise="merge-dequantized"
# Write `merge_dequantized(q, A, B, alpha, dtype)`: the merged weight `[d_out, d_in]` in `dtype`, summed in float32 and rounded
# **once**.
#
# *Why it matters:* it is the merge that stays closest to what was trained; the obvious one-liner in 16 bits rounds three times.

# %% exercise="merge-dequantized"
def merge_dequantized(q, A, B, alpha, dtype):
    """dequantize(q) + (alpha/r) B A, summed in float32, given in dtype."""
    ### BEGIN SOLUTION
    delta = alpha / A.shape[0] * B @ A
    return (q.dequantize(dtype=torch.float32) + delta).to(dtype)
    ### END SOLUTION

# %% check="merge-dequantized"
check("merge-dequantized", merge_dequantized)

# %% [markdown] hint="merge-dequantized" level="nudge"
# Both parts in float32, one sum, one cast.

# %% [markdown] hint="merge-dequantized" level="shape"
# $BA$ is `B @ A`: `[d_out, r] @ [r, d_in]`. Where does the scale belong?

# %% [markdown] hint="merge-dequantized" level="code"
# `return (q.dequantize(dtype=torch.float32) + ... * B @ A).to(...)`

# %% [markdown]
# First on one matrix of the model that you just trained: how large is $\Delta W$ beside a step between levels, and how much of it
# survives if the sum is put back into 4 bits?

# %%
lora = dict(adapters.adapter_layers(tuned))["model.layers.3.mlp.up_proj"]
frozen_W, delta = lora.base_layer.dequantize(torch.float32), lora.delta()
again = quantize_nf4(frozen_W + delta, double_quant=True).dequantize()
blocks = frozen_W.view(-1, 64)
typical_step = (blocks.abs().amax(1) * 2 / 15).mean().item()
unchanged = (quantize_nf4(frozen_W).packed == quantize_nf4(frozen_W + delta).packed).float().mean().item()
lost = ((again - frozen_W - delta).norm() / delta.norm()).item()
print(f"mean |ΔW| {delta.abs().mean():.4f}, mean step between levels {typical_step:.4f}")
print(f"put back into 4 bits: {unchanged:.0%} of the bytes, two codes each, do not change;")
print(f"the norm of the rounding error is {lost:.2f} of the norm of ΔW")

# %% [markdown]
# Now the whole model. **Predict** the order of the four ways, by the logits and by pass@1.

# %%
here = {}
apart = ahead.logits_of(tuned, tokenizer, rows_few)
for way in ahead.SHIPPED:
    model = ahead.ship(tuned, original, way)
    here[way] = (distance(model, apart), held_out_loss(model, tokenizer, scored), evaluate(model, tokenizer, held_out, n=steps(20, quick=3)).pass_at_1)
    print(f"{way:26} logits {here[way][0]:.4f} away    held-out loss {here[way][1]:.3f}    pass@1 {here[way][2]:.0%}")
print("(so few answers, after so short a training, do not tell the ways apart by pass@1)")

# %%
shipped = ahead.shipped()
show(pictures.shipped_figure(shipped), alt="Four ways to ship, a mark per seed. " + "; ".join(
     f"{way}: logits {statistics.mean(v['logits']):.3f} away, loss {statistics.mean(v['loss']):.3f}, pass@1 {statistics.mean(v['pass']):.0%}"
     for way, v in shipped.items()) + ".")
for way, found in shipped.items():
    print(f"{way:26} logits {statistics.mean(found['logits']):.4f}    loss {ahead.spread(found['loss'])[0]:.4f} ± {ahead.spread(found['loss'])[1]:.4f}    "
          f"pass@1 {ahead.spread(found['pass'])[0]:.1%} ± {ahead.spread(found['pass'])[1]:.1%}")
worse = {way: [a - b for a, b in zip(shipped[way]["loss"], shipped["kept apart"]["loss"])] for way in ahead.SHIPPED[1:]}
for way, values in worse.items():
    print(f"loss against kept apart, seed by seed, {way}: " + ", ".join(f"{v:+.4f}" for v in values))
one_seed = (0.55 * 0.45 / ahead.ANSWERS) ** 0.5
print(f"pass@1 of {ahead.ANSWERS} answers is known to ± {one_seed:.1%} in one seed: the loss tells these ways apart sooner")

# %% [markdown]
# *From the runs made ahead; a mark is a seed, a bar the mean ± standard deviation.* Into the **dequantized** weights in
# 16 bits hardly anything changes. Into 4 bits again, the logits move further than they did when the base model was
# quantized in the first place. And the original 16-bit weights are no refuge: they are more exact, and not what the
# adapter has learned to sit on.

# %% question="qlora-q-merge"

# %% [markdown]
# ## Against production
#
# The same with `transformers`, `bitsandbytes` and `peft`: the model loaded in 4 bits, LoRA attached. We give both the same $A$ and $B$
# ($B \ne 0$) and compare logits and gradients, to $10^{-4}$, or the cell stops.

# %%
import peft
from transformers import BitsAndBytesConfig

config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
theirs = load_base("tiny", quantization_config=config, quiet=True).model          # make_safe is called inside: see below
same_layers = {n for n, m in theirs.named_modules() if type(m).__name__ == "Linear4bit"} == set(quantizable(original))
theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")).eval()
ours = ahead.prepared(original, "QLoRA", 0).eval()
mine = adapters.trainable(ours)
yours = {name.removeprefix("base_model.model."): p for name, p in theirs.named_parameters() if p.requires_grad}
assert mine.keys() == yours.keys() and same_layers
rng = torch.Generator().manual_seed(6)
with torch.no_grad():
    for key, p in mine.items():
        p.add_(0.02 * torch.randn(p.shape, generator=rng))
        yours[key].copy_(p)
their_logits = ahead.logits_of(theirs, tokenizer, rows_few)
peft_logits = distance(ours, their_logits)
for m in (ours, theirs):
    m.train()
    (loss_sum(m, few) / 100).backward()
peft_gradients = max(((mine[k].grad - yours[k].grad).norm() / yours[k].grad.norm()).item() for k in mine)
print(f"the same {len(quantizable(original))} layers quantized: {same_layers}")
print(f"relative difference of the logits {peft_logits:.2g}, of the gradients {peft_gradients:.2g} at the most")
assert peft_logits < 1e-4 and peft_gradients < 1e-4

# %% [markdown]
# ### Three silent faults, on CPUs
#
# bitsandbytes is right on GPUs. On some CPUs it is not, and it does not say so. `find_faults()` measures on *your* processor:

# %%
from pefttools.bnb import find_faults

faults = find_faults()
print(f"after one forward in eval mode, training has no gradients: {faults.gradients_lost}   (an evaluation before training is enough)")
print(f"eval computes in bfloat16 whatever compute_dtype says:    {faults.eval_in_bf16}   (difference {faults.eval_difference:.1e}, should be 0)")
print(f"widths that are no multiple of 64 dequantize wrongly:     {faults.widths_wrong}   (error {faults.width_error:.2f}, should be 0.09)")

# %% [markdown]
# All three depend on the processor (AVX-512, and its bfloat16 extension). The course's `load_base` calls `pefttools.bnb.make_safe(model)`,
# which keeps every layer off the faulty paths; in code of your own, call it right after loading. The causes, in bitsandbytes' source, are
# in `docs/upstream/bitsandbytes_cpu.md`.
#
# ### Find the line
#
# bitsandbytes' product is a `torch.autograd.Function`, like yours. Here are the lines of it that you have written yourself, and
# below, PEFT's merge.

# %%
import bitsandbytes.autograd._functions as source
import peft.tuners.lora.bnb as peft_source

wanted = ("ctx.tensors = (None, B)", "grad_A = torch.matmul(grad_output")
merge_wanted = ("output = dequantize_bnb_weight(", "w_data = output + lora_data", "bnb.nn.Params4bit(w_data")
for function, words in ((source.MatMul4Bit, wanted), (peft_source.Linear4bit.merge, merge_wanted)):
    lines, first = inspect.getsourcelines(function)
    print(function.__qualname__)
    for i, line in enumerate(lines):
        if any(word in line for word in words):
            print(f"  {first + i:5}  {line.strip()}")

# %% [markdown]
# | the code does | because |
# |---|---|
# | `ctx.tensors = (None, B)` | of the two factors only $B$, the *packed* weight, is kept; $x$ (their `A`) is not needed, since $W$ has no gradient |
# | `grad_A = torch.matmul(grad_output, F.dequantize_4bit(...))` | $gW$, with $W$ dequantized a second time |
# | `bnb.nn.Params4bit(w_data...)` | PEFT's `merge()` on a 4-bit layer rounds the sum **to 4 bits again**, with a warning. It is the last row of the table above |
#
# **Go and look** (nothing to hand in): in PEFT's documentation, find `dequantize()`. It turns a quantized model into a 16-bit one; merge
# after it, and you have the second row.

# %% [markdown]
# ## The sources say, we measured

# %%
def verdict(good: bool, right: str = "✓", wrong: str = "✗") -> str:
    return right if good else wrong


mean = {way: {key: statistics.mean(v) for key, v in found.items()} for way, found in shipped.items()}
rows = [
    ("source", "it says", "we measured", ""),
    ("---",) * 4,
    ("001, problem 3", "dequantized weights need ~140 GB of temporary memory, hidden from the accounting",
     f"one matrix at a time: {2 * largest / 1e9:.2f} GB of {whole_70b[3] / 1e9:.0f}; in training {kept['NF4Linear']:,} bytes wait", "✗"),
    ("001, problem 3", "merged for inference: 0 GB, at no cost",
     f"into 4 bits again: logits {mean['into 4 bits again']['logits']:.3f} away, loss {mean['kept apart']['loss']:.4f} → "
     f"{mean['into 4 bits again']['loss']:.4f}; into dequantized 16 bits {mean['into dequantized 16 bits']['logits']:.3f} away, and the file is "
     f"as large as the 16-bit model", "✗"),
    ("000", "4 × less memory than FP16", f"of Llama-3.2-1B's weights {sized['Llama-3.2-1B'][3] / sized['Llama-3.2-1B'][2]:.2f} × "
     f"(70B: {whole_70b[3] / whole_70b[2]:.2f} ×): embedding and scales", "✗"),
    ("001", "70B in NF4: 35 GB", f"{whole_70b[2] / 1e9:.1f} GB with scales, embedding and head", "✗"),
    ("000", "no performance loss with NF4",
     f"QLoRA − LoRA over {seeds} seeds: loss {more:+.4f} ± {more_error:.4f}, pass@1 {gained:+.1%} ± {gained_error:.1%}",
     verdict(more <= 2 * more_error, "too small to tell", "a small loss here")),
    ("000, the abstract", "gradients pass through a frozen, 4-bit model", f"equal to autograd on dequantized weights to {worst:.0e}", "✓"),
    ("000", "frozen weights: saves computation",
     f"no gradient of W: a run takes {cost['QLoRA'] / cost['full']:.2f} × the time of full fine-tuning here; and "
     f"{cost['QLoRA']:.2f} × LoRA's, with W dequantized twice",
     verdict(cost["QLoRA"] < cost["full"], "✓ against full", "✗ here")),
    ("000", "dequantization happens per group, during the product", "per matrix on this CPU and in bitsandbytes' backward; fused in some GPU kernels",
     "partly"),
    ("000", "$A \\in R^{n×r}$, $B \\in R^{r×m}$ with $\\Delta W = BA$", "these do not multiply: $B$ is $d_{out}×r$, $A$ is $r×d_{in}$ (chapter 02)", "✗"),
    ("000, the abstract", "paged optimizers manage memory spikes", f"of LoRA's moments there are {moments['QLoRA', 32]:,} bytes here (8 bits: "
     f"{moments['QLoRA', 8]:,}); no pages on a CPU", "not measurable here"),
]
display(Markdown("\n".join("| " + " | ".join(row) + " |" for row in rows)))

# %% [markdown]
# ## Summary
#
# | | |
# |---|---|
# | the method | $y = \operatorname{dequantize}(q)\,x + b + \frac{\alpha}{r}BAx$; $q$ frozen in NF4, $A$ and $B$ trained |
# | backward | $gW + \frac{\alpha}{r}(gB)A$ for $x$: $W$ is dequantized a second time and never kept |
# | stays in 16 bits | embedding, norms, output head |
# | dtypes | stored in 4 bits, multiplied in the compute dtype, adapted in float32 |
# | saves | the weights' memory: about a quarter of 16 bits, less what stays; not time |
# | merging | into dequantized weights in 16 bits, or not at all; into 4 bits again costs more than quantizing did |
#
# **Read**
#
# - Dettmers et al. 2023, [QLoRA](https://arxiv.org/abs/2305.14314): section 3 (equations 5 and 6, paged optimizers), table 3 and 4
#   (against 16 bits), appendix on memory.
# - Dettmers et al. 2021, [8-bit optimizers](https://arxiv.org/abs/2110.02861).
# - `pefttools/nf4_linear.py` and `pefttools/qlora.py`, which are what you have written; `bitsandbytes/autograd/_functions.py`.
#
# **Next.** Chapter 06 puts new layers *between* the old ones: adapters.
