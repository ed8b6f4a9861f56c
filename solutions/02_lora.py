# ---
# title: LoRA
# minutes: 75
# needs: 00_start
# ---
# %% [markdown]
# A fine-tuned model is the base model plus a change: every weight matrix $W_0$ has become $W_0 + \Delta W$. **LoRA**
# (low-rank adaptation) keeps $W_0$ as it is and learns $\Delta W$ alone, written as the product of two thin matrices.
# You will write all of it in this chapter, and at the end your numbers are those of the library that everybody uses.
#
# **After this chapter you can**
#
# - write LoRA's forward pass and a layer that wraps any `nn.Linear`, and say why it starts out as exactly the base
#   model;
# - count LoRA's parameters for any model, also where the matrices are not square;
# - say what the rank $r$ and the scale $\alpha/r$ do, from pictures and measurements of your own;
# - put LoRA into a real model by the names of its layers, train it, merge it, and take it out again;
# - find the one line of LoRA in PEFT's source, and explain the `if`s around it.

# %%
import copy
import inspect
import math
import random
import time

import torch
import torch.nn.functional as F
from IPython.display import Markdown, display
from torch import nn

from pefttools import inject as adapters
from pefttools.grading import case, check
from pefttools.lora import LoRAConfig, LoRALinear
from pefttools.lora import lora_forward as library_forward
from pefttools.lora import lora_init as library_init
from pefttools.widgets import lora as pictures
from pefttools.widgets import start as pictures_of_00
from pefttools.widgets.base import show

print("ready: torch", torch.__version__)

# %% [markdown]
# ## The picture
#
# A linear layer multiplies its input $x$ by a matrix. LoRA leaves that matrix alone and adds a side road with a narrow
# place in it.

# %%
show(pictures.lora_picture(), alt="Left, a large hatched 6 by 8 block W0, frozen, 48 numbers, times x. Plus alpha over r "
     "times, right, a tall 6 by 2 block B times a wide 2 by 8 block A times x, both trained, 28 numbers. Between A and B "
     "only 2 numbers pass.")

# %% [markdown]
# *Everything that is learned has to pass through $r$ numbers (here 2); that is why so few suffice to describe it.*
#
# In a formula:
#
# $$y = W_0\,x + b + \Delta W\,x, \qquad \Delta W = \frac{\alpha}{r}\,B\,A .$$
#
# | symbol | what it is | size | in training |
# |---|---|---|---|
# | $x$ | the layer's input | $d_{in}$ | |
# | $y$ | its output | $d_{out}$ | |
# | $W_0$, $b$ | the pretrained weight and bias | $d_{out} \times d_{in}$ and $d_{out}$ | frozen |
# | $A$ | reads the input, gives $r$ numbers | $r \times d_{in}$ | trained |
# | $B$ | writes them into the output | $d_{out} \times r$ | trained |
# | $r$ | the **rank**: how many numbers pass between $A$ and $B$ | one number, 1 to 64 or so | chosen |
# | $\alpha$ | with $r$, the **scale** $\alpha/r$ of the update | one number | chosen |
# | $\Delta W$ | the update as one matrix; never built while training | $d_{out} \times d_{in}$, rank at most $r$ | |
#
# The *rank* of a matrix is the number of independent directions in it. $BA$ has at most $r$ of them, however large it
# is.
#
# The bet behind LoRA (Hu et al. 2021) is that the change which fine-tuning needs *has* a low rank, even though the
# matrices themselves do not.

# %% [markdown]
# ## By hand
#
# One of this course's sources (001) has an example small enough for pencil and paper:
#
# $$W_0 = \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix},\quad A = \begin{pmatrix} 0.1 & 0.2 \end{pmatrix},\quad
# B = \begin{pmatrix} 0.3 \\ 0.4 \end{pmatrix},\quad x = \begin{pmatrix} 1 \\ 1 \end{pmatrix},\quad \alpha = 1 .$$
#
# It then says "$r = 2$", takes the scale to be $1/2$ and finds the output $(3.045,\ 7.06)$. **There is an error in
# it.** Look at the sizes, and find it before you read on.
#
# <details><summary>The error</summary>
#
# $A$ is $1 \times 2$. It has **one** row, so one number passes between $A$ and $B$, and $r = 1$. The 2 is $d_{in}$. The
# scale is $\alpha/r = 1/1 = 1$.
#
# </details>
#
# Step by step:
#
# 1. The frozen road: $W_0 x = (1 + 2,\ 3 + 4) = (3, 7)$.
# 2. $A$ reads: $A x = 0.1 + 0.2 = 0.3$. One number.
# 3. $B$ writes: $B \cdot 0.3 = (0.09,\ 0.12)$.
# 4. Scale by $\alpha/r = 1$ and add: $(3.09,\ 7.12)$.
#
# The same in code, with the error beside it:

# %%
W0 = torch.tensor([[1., 2.], [3., 4.]])      # [d_out, d_in]
A = torch.tensor([[0.1, 0.2]])               # [r, d_in], so r = 1
B = torch.tensor([[0.3], [0.4]])             # [d_out, r]
x, alpha = torch.tensor([1., 1.]), 1.0

r_by_hand = A.shape[0]
by_hand = W0 @ x + alpha / r_by_hand * (B @ (A @ x))
as_printed = W0 @ x + alpha / 2 * (B @ (A @ x))
print("r =", r_by_hand, "→", [round(v, 4) for v in by_hand.tolist()], "    with r = 2, as printed →",
      [round(v, 4) for v in as_printed.tolist()])

# %% [markdown]
# PyTorch keeps a weight as `[d_out, d_in]`, and a batch of inputs as rows. So in code the formula turns round: $W_0x$
# becomes `x @ W0.T` (or `F.linear(x, W0)`). Nothing else changes.

# %% [markdown] exercise="lora-forward"
# Write `lora_forward(x, W0, A, B, alpha, bias=None)`.
#
# | argument | shape |
# |---|---|
# | `x` | `[..., d_in]`: a vector, a batch, a batch of sequences |
# | `W0`, `bias` | `[d_out, d_in]`, and `[d_out]` or `None` |
# | `A`, `B` | `[r, d_in]`, `[d_out, r]` |
# | `alpha` | a number |
# | *returns* | `[..., d_out]` |
#
# *Why it matters:* these two or three lines are LoRA. All else in this chapter is about where to put them.

# %% exercise="lora-forward"
def lora_forward(x, W0, A, B, alpha, bias=None):
    """W0 x + b + (alpha/r) B A x, for x [..., d_in].  Returns [..., d_out]."""
    ### BEGIN SOLUTION
    r = A.shape[0]
    frozen = F.linear(x, W0, bias)               # [..., d_out]
    update = (x @ A.T) @ B.T                     # [..., d_in] → [..., r] → [..., d_out]
    return frozen + alpha / r * update
    ### END SOLUTION

# %% check="lora-forward"
check("lora-forward", lora_forward)

# %% [markdown] hint="lora-forward" level="nudge"
# Two roads from `x` to the output, added at the end. Write the frozen road first and look at its shape; then the other
# one, from the right of the formula to the left: $x$ meets $A$, the result meets $B$, the scale comes last.

# %% [markdown] hint="lora-forward" level="shape"
# `F.linear(x, W0, bias)` is `[..., d_out]` and takes care of `bias=None`. `x @ A.T` is `[..., r]`. The number $r$ is a
# dimension of `A`: which one?

# %% [markdown] hint="lora-forward" level="code"
# ```python
# r = A.shape[...]
# return F.linear(x, W0, bias) + ... * (x @ A.T) @ ...
# ```

# %% [markdown]
# (Want to try your function on the very numbers that the check uses? `case("lora-forward", 1)` gives the inputs of its
# first case.)
#
# Why two thin products, and not `x @ (B @ A).T`? The result is the same, the work is not. For one row of $x$:

# %%
d, r = 4096, 8
display(Markdown(f"At $d_{{in}} = d_{{out}} = {d:,}$ and $r = {r}$: through $A$ and then $B$ takes {2 * d * r:,} multiplications. "
                 f"Through $\\Delta W$ it takes {d * d:,}, and building $\\Delta W$ first takes {d * d * r:,} more."))

# %% [markdown]
# ## $BA$ or $AB$? One translation, once and for all
#
# The paper, PEFT and this course write $\Delta W = BA$. Two of our sources (000, 004) write $\Delta W = AB$. Nobody is
# wrong: they give the letters to different factors. What counts is **which factor meets $x$ first**. That one is PEFT's
# `lora_A`.
#
# | the notes say | the layer is | so PEFT's `lora_A` is | and `lora_B` is |
# |---|---|---|---|
# | $\Delta W = BA$ | $y = Wx$ | $A$ | $B$ |
# | $\Delta W = AB$, $A\colon d_{out} \times r$ | $y = Wx$ | their $B$ | their $A$ |
# | $\Delta W = AB$, $A\colon d_{in} \times r$ | $y = xW$ (rows) | their $A$, transposed | their $B$, transposed |
#
# Do not take it on trust:

# %%
rng = torch.Generator().manual_seed(0)
d_in, d_out, r = 5, 3, 2
x = torch.randn(4, d_in, generator=rng)
first = torch.randn(r, d_in, generator=rng)        # meets x first: PEFT's lora_A
second = torch.randn(d_out, r, generator=rng)      # meets x second: PEFT's lora_B
paper = x @ (second @ first).T                     # ΔW = BA, y = Wx for each row

their_A, their_B = second, first                   # ΔW = AB with A [d_out, r], y = Wx
print("row 2 of the table:", torch.equal(x @ (their_A @ their_B).T, paper))
their_A, their_B = first.T, second.T               # ΔW = AB with A [d_in, r], y = xW
print("row 3 of the table:", torch.allclose(x @ (their_A @ their_B), paper, atol=1e-6))

# Source 000 also has, on another slide, ΔW = BA with A [n, r] and B [r, m]. Can that be multiplied?
n, m = 5, 3
try:
    torch.randn(r, m) @ torch.randn(n, r)
except RuntimeError as error:
    print("000's other slide:", error)

# %% question="lora-q-translate"

# %% [markdown]
# ## How many numbers?
#
# $A$ has $r \cdot d_{in}$ numbers, $B$ has $d_{out} \cdot r$.
#
# By hand, for a matrix of $1024 \times 4096$ ($d_{out} \times d_{in}$) and $r = 16$ (source 001, problem 1):
# $16 \cdot 4096 = 65{,}536$ and $1024 \cdot 16 = 16{,}384$.
# Together $81{,}920$. The matrix itself has $4{,}194{,}304$, which is $51.2$ times as many.

# %% [markdown] exercise="count-parameters"
# Write `lora_parameters(shapes, r)`. `shapes` is a list of `(d_out, d_in)`, one pair for each matrix that gets LoRA (a
# matrix that occurs in 16 layers is in the list 16 times). Return how many numbers train, as a whole number.
#
# *Why it matters:* you will want this number before you start a run, and compare it with what the library prints.

# %% exercise="count-parameters"
def lora_parameters(shapes: list[tuple[int, int]], r: int) -> int:
    """Trainable parameters of LoRA of rank r on matrices of these (d_out, d_in)."""
    ### BEGIN SOLUTION
    return sum(r * (d_in + d_out) for d_out, d_in in shapes)
    ### END SOLUTION

# %% check="count-parameters"
check("count-parameters", lora_parameters)

# %% [markdown] hint="count-parameters" level="nudge"
# For a single matrix: how many numbers are in $A$, how many in $B$? Then the same for every matrix of the list.

# %% [markdown] hint="count-parameters" level="shape"
# $A$ is `[r, d_in]`, $B$ is `[d_out, r]`. Check yourself with the example above: `[(1024, 4096)]` and `r = 16` give
# 81,920.

# %% [markdown] hint="count-parameters" level="code"
# `return sum(... for d_out, d_in in shapes)`

# %% [markdown]
# ### Predict
#
# Llama-3.2-1B has 16 layers and a width of 2048. Its $q$ matrix is $2048 \times 2048$. Its $v$ matrix is only
# $512 \times 2048$, because it uses **grouped-query attention**: four heads for queries share one for keys and values, so
# $k$ and $v$ are four times narrower.
#
# How many parameters does LoRA train at $r = 8$ on `q_proj` and `v_proj`, in all 16 layers? Write your guess (or your
# reckoning) instead of `None`, then run both cells.

# %%
my_guess = None

# %%
def attention(layers: int, **sizes: tuple[int, int]) -> nn.Module:
    """The named linear layers of a model, as shapes without numbers (the meta device): enough to count, and free."""
    with torch.device("meta"):
        return nn.ModuleList(nn.ModuleDict({name: nn.Linear(i, o, bias=False) for name, (o, i) in sizes.items()})
                             for _ in range(layers))


def lora_count(model: nn.Module, r: int, targets) -> int:
    """Put LoRA into it for real, and count what trains."""
    return adapters.count_parameters(adapters.attach(model, LoRAConfig(r=r, target_modules=targets)))[0]


llama_1b = {"q_proj": (2048, 2048), "k_proj": (512, 2048), "v_proj": (512, 2048), "o_proj": (2048, 2048)}
llama_qv = lora_count(attention(16, **llama_1b), 8, ["q_proj", "v_proj"])
as_if_square = 2 * 2048 * 8 * 2 * 16
print(pictures_of_00.compare_guess(my_guess, llama_qv))
print(f"counted: {llama_qv:,}")
print(f"taking v for a square matrix (2·d·r each, as in source 002) gives {as_if_square:,}, "
      f"too many by {as_if_square / llama_qv - 1:.0%}")

# %% [markdown]
# Now the figures that our sources print. Each is counted here on the shapes of the real model:

# %%
square_7b = {name: (4096, 4096) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
gpt3 = {name: (12288, 12288) for name in ("q_proj", "v_proj")}

qkvo_7b = lora_count(attention(32, **square_7b), 8, list(square_7b))
problem_1 = lora_count(attention(1, w=(1024, 4096)), 16, ["w"])
ratio_1 = 1024 * 4096 / problem_1
gpt3_one = lora_count(attention(96, **gpt3), 8, ["q_proj"])
gpt3_two = lora_count(attention(96, **gpt3), 4, ["q_proj", "v_proj"])
opt_qv = lora_count(attention(32, **square_7b), 16, ["q_proj", "v_proj"])

from transformers import OPTConfig, OPTForCausalLM

with torch.device("meta"):      # the model that 003's code loads its tokenizer from, as a skeleton
    opt = OPTForCausalLM(OPTConfig(hidden_size=4096, word_embed_proj_dim=4096, ffn_dim=16384, num_hidden_layers=32,
                                   num_attention_heads=32))
opt_total = sum(p.numel() for p in opt.parameters()) + opt_qv

counted = [
    ("source", "model", "LoRA on", "$r$", "it says", "counted"),
    ("---",) * 6,
    ("001, example 1", "7B: 32 layers, $d = 4096$", "q, k, v, o", 8, "8,388,608; about 0.12 %",
     f"**{qkvo_7b:,}**; {qkvo_7b / 7e9:.2%} of 7 billion"),
    ("001, problem 1", "one matrix, 1024 × 4096", "it", 16, "81,920; 51.2 × fewer", f"**{problem_1:,}**; {ratio_1:.1f} ×"),
    ("003", "GPT-3: 96 layers, $d = 12288$", "q", 8, "18M", f"**{gpt3_one:,}**"),
    ("003", "GPT-3", "q, v", 4, "18M", f"**{gpt3_two:,}**"),
    ("003, its output", "OPT-6.7B: 32 layers, $d = 4096$", "q, v", 16, "8,388,608 of 6,666,862,592",
     f"**{opt_qv:,}** of {opt_total:,}; {opt_qv / opt_total:.3%}"),
    ("–", "Llama-3.2-1B", "q, v", 8, "–", f"**{llama_qv:,}**"),
]
display(Markdown("\n".join("| " + " | ".join(map(str, row)) + " |" for row in counted)))
gpt3_all = 96 * 12 * 12288**2 + (50_257 + 2048) * 12288      # matrices of the blocks (4 d² + 8 d²), words, positions
print(f"GPT-3 by its shapes: {gpt3_all / 1e9:.1f} billion, “175B”; 18M is {gpt3_two / 2**20:.0f} · 2²⁰, or {gpt3_two / 1e6:.1f} million")
print(f"in 16 bits, GPT-3's adapter takes {2 * gpt3_two / 2**20:.0f} MiB; 175 billion / {gpt3_two:,} = {175e9 / gpt3_two:,.0f}")

# %% [markdown]
# Two things to take from the table.
#
# - **A budget can be spent in several ways.** For GPT-3, rank 8 on one matrix costs as much as rank 4 on two. The 7B
#   model's rank 8 on four matrices costs as much as OPT's rank 16 on two. Which is better is a question for
#   measurements, below.
# - **The cost grows with the width, a full matrix with its square.** So the saving grows with the model.

# %% question="lora-q-scale"

# %% [markdown]
# ## The start: nothing changes
#
# Before the first training step, the adapted model should *be* the base model. LoRA sees to it by starting with $B = 0$.
#
# **Claim** (source 001, problem 2). If $B = 0$, the layer's output is $W_0x + b$, whatever $A$ is.
#
# **Proof.** $\Delta W\,x = \frac{\alpha}{r} B (A x)$. The product of the zero matrix with any vector is the zero
# vector. So $y = W_0x + b + 0$. ∎
#
# And why may $A$ not be zero as well? Look at the gradients. Write $\delta$ for the gradient of the loss at the layer's
# output. The chain rule gives
#
# $$\frac{\partial L}{\partial B} = \frac{\alpha}{r}\,\delta\,(Ax)^\top, \qquad \frac{\partial L}{\partial A} = \frac{\alpha}{r}\,(B^\top\delta)\,x^\top .$$
#
# Each is multiplied by the *other* factor. With $B = 0$ and $A$ random, $B$ gets a gradient in the first step, $A$ gets
# none yet; after that step $B$ is no longer zero, and both learn. With both at zero, neither ever moves. See it happen:

# %%
def first_step(A, B):
    """Output changed at the start? Size of the gradients of A and B in the first step."""
    rng = torch.Generator().manual_seed(1)
    W0, x, target = (torch.randn(*s, generator=rng) for s in ((6, 8), (16, 8), (16, 6)))
    A, B = A.clone().requires_grad_(), B.clone().requires_grad_()
    y = library_forward(x, W0, A, B, alpha=4)
    F.mse_loss(y, target).backward()
    return (y - x @ W0.T).abs().max().item(), A.grad.norm().item(), B.grad.norm().item()


rng = torch.Generator().manual_seed(2)
A, B = library_init(8, 6, 2, generator=rng)
other_B = torch.randn(6, 2, generator=rng)
starts = {"A random, B zero (LoRA)": (A, B), "A zero, B random": (0 * A, other_B),
          "both zero": (0 * A, B), "both random": (A, other_B)}
print(f"{'start':26}{'change of the output':>22}{'gradient of A':>16}{'gradient of B':>16}")
for name, (a, b) in starts.items():
    change, of_A, of_B = first_step(a, b)
    print(f"{name:26}{change:22.3f}{of_A:16.3f}{of_B:16.3f}")

# %% [markdown]
# How large should $A$ be? The paper draws it from a Gaussian. PEFT (like `loralib`, the paper's own code) does what
# `nn.Linear` does with a new weight, `kaiming_uniform_(A, a=√5)`: each entry uniform between $-1/\sqrt{d_{in}}$ and
# $+1/\sqrt{d_{in}}$. A uniform distribution of that width has the standard deviation $1/\sqrt{3\,d_{in}}$. So $Ax$
# stays about as large as $x$ is, whatever the width of the layer.

# %% [markdown] exercise="lora-init"
# Write `lora_init(d_in, d_out, r, generator)`. Return `(A, B)`: `A` of shape `[r, d_in]`, random with mean 0 and
# standard deviation $1/\sqrt{3\,d_{in}}$ (uniform as in PEFT, or Gaussian as in the paper: both pass), and `B` of shape
# `[d_out, r]`, all zeros.
#
# Draw from `generator` (a `torch.Generator`; most of torch's random functions take `generator=generator`), so that the
# same state gives the same `A` and the next draw gives another.
#
# *Why it matters:* this is what makes it safe to attach an adapter to a model that works.

# %% exercise="lora-init"
def lora_init(d_in: int, d_out: int, r: int, generator: torch.Generator):
    """A [r, d_in] random (mean 0, standard deviation 1/sqrt(3 d_in)), B [d_out, r] zero."""
    ### BEGIN SOLUTION
    A = torch.empty(r, d_in)
    nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
    B = torch.zeros(d_out, r)
    return A, B
    ### END SOLUTION

# %% check="lora-init"
check("lora-init", lora_init)

# %% [markdown] hint="lora-init" level="nudge"
# `B` is one call. For `A`, either take `nn.init.kaiming_uniform_` as PEFT does, or draw standard numbers and shrink
# them.

# %% [markdown] hint="lora-init" level="shape"
# `nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)` fills a tensor of shape `[r, d_in]` with just
# the right spread. Or: `torch.randn(r, d_in, generator=generator)` has standard deviation 1; by what must it be
# divided?

# %% [markdown] hint="lora-init" level="code"
# ```python
# A = torch.empty(..., ...)
# nn.init.kaiming_uniform_(A, a=..., generator=...)
# return A, torch.zeros(..., ...)
# ```

# %% [markdown]
# ### Predict
#
# Now on the real small Llama. We attach LoRA to every linear layer and look at the loss on held-out rows (the mean over
# the answer's tokens; lower is better). What do you expect, compared with the base model's loss,
#
# 1. with LoRA's start, $B = 0$?
# 2. with a random $B$, as you get it from `nn.Linear(r, d_out)` if you forget to set it to zero?
#
# Say it aloud (lower, the same to the last digit, slightly higher, much higher), then run.

# %%
from pefttools.lab import encoded, generate, held_out_loss, load_base, load_data, prompt_of, steps, train

model, tokenizer = load_base("tiny")
held_out = load_data("held_out").shuffle(seed=0).select(range(steps(192, quick=32)))

loss_base = held_out_loss(model, tokenizer, held_out)
adapters.attach(model, LoRAConfig(r=8, alpha=16, target_modules="all-linear"), seed=0)
loss_zero = held_out_loss(model, tokenizer, held_out)

rng = torch.Generator().manual_seed(3)
for _, layer in adapters.adapter_layers(model):
    nn.init.kaiming_uniform_(layer.lora_B["default"].weight, a=math.sqrt(5), generator=rng)   # nn.Linear's own default
loss_random = held_out_loss(model, tokenizer, held_out)
adapters.detach(model)
print(f"base {loss_base:.6f}    LoRA, B = 0: {loss_zero:.6f}    LoRA, B random: {loss_random:.6f}")
print(f"with B = 0: the very same number? {loss_zero == loss_base}    with B random: {loss_random - loss_base:+.2f}    "
      f"after detach: the same again? {held_out_loss(model, tokenizer, held_out) == loss_base}")

# %% [markdown]
# With $B = 0$ it is the same number, not nearly the same. A random $B$ damages the model before it has learned
# anything, and training has to repair that first.

# %% question="lora-q-swapped-start"

# %% [markdown]
# ## Rank and scale
#
# What do $r$ and $\alpha$ do to $\Delta W$? Move them. The picture on the left is $\Delta W$ itself; in the middle are
# its **singular values**, which say how much $\Delta W$ does along each of its directions (as many are above zero as
# its rank); on the right is what it costs.

# %%
pictures.rank_alpha_explorer();

# %% [markdown]
# *$r$ decides how many directions there are and what they cost; $\alpha$ only makes them stronger or weaker.* Three
# things to try:
#
# - Move $\alpha$ alone. The pattern stays, its strength changes.
# - Take $r = 1$. Every row of $\Delta W$ is now the same row, times some number: stripes.
# - Find the $r$ from which on $A$ and $B$ have *more* numbers than the full matrix. (It is where
#   $r = d_{in} d_{out} / (d_{in} + d_{out})$; for a square matrix that is half its width. LoRA is used far below.)
#
# ### Why divide by $r$?
#
# $BA$ is a sum of $r$ terms, one for each direction. Twice as many terms, and a training step changes the output about
# twice as much: you would have to look for a new learning rate for every rank. Dividing by $r$ takes that out. The
# paper sets $\alpha$ once and then leaves it alone.
#
# Is it so? We attach LoRA to the real model at several ranks, always with $\alpha = 16$, take **one** step of Adam with
# the same learning rate, and measure how much the logits (the model's scores for the next token) move.

# %%
from pefttools.lab import collate, loss_sum

few = collate(encoded(held_out.select(range(8)), tokenizer), tokenizer.pad_token_id)


def first_move(scale: float, r: int, optimizer=torch.optim.Adam, lr: float = 1e-3) -> float:
    """Root mean square change of the logits after one step at rank r, with the update scaled by `scale`."""
    adapters.attach(model, LoRAConfig(r=r, alpha=16, target_modules=["q_proj", "v_proj"]), seed=0)
    for _, layer in adapters.adapter_layers(model):
        layer.scaling = scale
    before = model(input_ids=few["input_ids"], attention_mask=few["attention_mask"]).logits.detach()
    (loss_sum(model, few) / (few["labels"] != -100).sum()).backward()
    optimizer(adapters.trainable(model).values(), lr=lr).step()
    after = model(input_ids=few["input_ids"], attention_mask=few["attention_mask"]).logits.detach()
    adapters.detach(model)
    return (after - before).square().mean().sqrt().item()


ranks = (1, 4, 8, 16, 64)
scales = {"α/r (LoRA)": lambda r: 16 / r, "α/√r (rsLoRA)": lambda r: 16 / math.sqrt(r), "α, no division": lambda r: 16}
moves = {name: [first_move(scale(r), r) for r in ranks] for name, scale in scales.items()}
print(f"{'scale':18}" + "".join(f"{f'r = {r}':>10}" for r in ranks))
for name, row in moves.items():
    print(f"{name:18}" + "".join(f"{v:10.4f}" for v in row))
flat, steep = moves["α/r (LoRA)"], moves["α, no division"]
display(Markdown(f"From $r = 4$ to $r = 64$ the step changes by **{flat[-1] / flat[1]:.1f} ×** with $\\alpha/r$, and by "
                 f"**{steep[-1] / steep[1]:.0f} ×** without the division."))

# %% [markdown]
# So, at least at the start, dividing by $r$ does what it is there for. (Later in training the directions no longer all
# pull the same way; then $\alpha/\sqrt{r}$ may be the better divisor. That is rsLoRA, in chapter 08.)
#
# ### Is $\alpha$ just another learning rate?
#
# Source 001 says that $\alpha$ "acts as a learning-rate multiplier". Double it and see how the first step answers. With
# plain gradient descent (SGD) the scale acts twice: once on the gradient of $B$, once more when $B$'s change passes
# through it to the output. Adam makes the size of its step independent of the gradient's size, so one of the two drops
# out.

# %%
adam = [first_move(a / 8, 8) for a in (8, 16)]
sgd = [first_move(a / 8, 8, torch.optim.SGD, lr=1e-2) for a in (8, 16)]
alpha_adam, alpha_sgd = adam[1] / adam[0], sgd[1] / sgd[0]
print(f"twice the α moves the first step {alpha_adam:.2f} × with Adam, {alpha_sgd:.2f} × with SGD")

# %% [markdown]
# So it is true of Adam, which is what nearly everybody uses. With SGD doubling $\alpha$ is like a learning rate four
# times as large.

# %% question="lora-q-rank-and-step"

# %% [markdown]
# ## A layer that wraps another
#
# A model is made of modules, so LoRA should be one: it takes an `nn.Linear` that is there, freezes it, and adds the
# side road. *Wraps*, not *replaces*: the pretrained layer stays inside untouched, and can be taken out again.
#
# One more setting comes with it. **Dropout** sets some entries of its input to zero at random while training, and does
# nothing afterwards, to keep a small adapter from relying on single entries. In LoRA it acts on the way into $A$ only.
# The frozen road always sees all of $x$.

# %% [markdown] exercise="lora-layer"
# Write the class `LoRALayer(base, r, alpha, dropout=0.0)`, an `nn.Module`:
#
# - `base` is an `nn.Linear` with weight `[d_out, d_in]`; freeze all of it;
# - two trainable matrices, $A$ random, $B$ zero, together $r\,(d_{in} + d_{out})$ numbers, and nothing else that
#   trains;
# - `forward(x)`, `[..., d_in] → [..., d_out]`: base output plus the scaled update; dropout on the update's input, in
#   training mode only.
#
# Call the parts what you like. The check looks at what the layer *does*: its output at the start and later, its
# gradients, what trains, how much of it, and whether dropout hits the right road.
#
# *Why it matters:* this is the object that sits in every LoRA-tuned model.

# %% exercise="lora-layer"
class LoRALayer(nn.Module):
    """A frozen nn.Linear plus (alpha/r) B A.  [..., d_in] → [..., d_out]"""

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        ### BEGIN SOLUTION
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.empty(r, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, r))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scale = alpha / r
        self.dropout = nn.Dropout(dropout)
        ### END SOLUTION

    def forward(self, x):
        ### BEGIN SOLUTION
        update = F.linear(F.linear(self.dropout(x), self.A), self.B)
        return self.base(x) + self.scale * update
        ### END SOLUTION

# %% check="lora-layer"
check("lora-layer", LoRALayer)

# %% [markdown] hint="lora-layer" level="nudge"
# In `__init__`: keep `base` and freeze it, make $A$ and $B$ as `nn.Parameter`, remember the scale, make an
# `nn.Dropout`. In `forward`: your `lora_forward`, with the frozen road replaced by a call of the wrapped layer.

# %% [markdown] hint="lora-layer" level="shape"
# `base.in_features` and `base.out_features` are $d_{in}$ and $d_{out}$. `base.requires_grad_(False)` freezes weight and
# bias at once. Tensors that should train and move with the module must be `nn.Parameter` (or live in an `nn.Linear(..., bias=False)`).

# %% [markdown] hint="lora-layer" level="code"
# ```python
# self.base = base.requires_grad_(False)
# self.A = nn.Parameter(torch.empty(r, ...)); nn.init.kaiming_uniform_(self.A, a=5 ** 0.5)
# self.B = nn.Parameter(torch.zeros(..., ...))
# self.scale, self.dropout = ..., nn.Dropout(dropout)
# ...
# return self.base(x) + self.scale * ... self.dropout(x) ...
# ```

# %% [markdown]
# ## Into a model, by name
#
# A transformer has dozens of linear layers, and you choose among them by name: `q_proj`, `v_proj`. The full name of one
# of them is a path:

# %%
print([name for name, module in model.named_modules() if isinstance(module, nn.Linear)][:8], "…")

# %% [markdown]
# A **target** is the end of such a path, in whole parts between the dots: `"v_proj"` means every layer that is called
# `v_proj`, wherever it sits. It does not mean `conv_proj`, though that also *ends in* those letters. A target may have
# several parts, `"self_attn.o_proj"`.

# %% [markdown] exercise="lora-inject"
# Write `inject(model, targets, wrap)`:
#
# - freeze every parameter of `model`;
# - put `wrap(layer)` in the place of every `nn.Linear` whose path is a target or ends in `"." + target` (`wrap` is a
#   function that takes a layer and returns a module, such as `lambda layer: LoRALayer(layer, 8, 16)`; what it adds must
#   be trainable);
# - if no layer matches, raise an error that says so;
# - return a function without arguments, `detach`, that undoes everything: the original layers back in place, and each
#   parameter's `requires_grad` as it was before.
#
# `targets` is a list or tuple of names. Change the model that you are given; make no copy.
#
# *Why it matters:* written this way it serves every method of the later chapters. Only `wrap` changes.

# %% exercise="lora-inject"
def inject(model: nn.Module, targets, wrap):
    """Freeze `model` and wrap the nn.Linear layers that `targets` names. Returns a function that undoes it."""
    ### BEGIN SOLUTION
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)
             and any(name == target or name.endswith("." + target) for target in targets)]
    if not found:
        raise ValueError(f"no nn.Linear is called {targets}; there are "
                         f"{sorted({n.split('.')[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)})}")
    before = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)                          # first freeze, then wrap: what wrap adds must train

    def put(name, module):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)

    for name, module in found:
        put(name, wrap(module))

    def detach():
        for name, module in found:
            put(name, module)
        for p, flag in before:
            p.requires_grad_(flag)

    return detach
    ### END SOLUTION

# %% check="lora-inject"
check("lora-inject", inject)

# %% [markdown] hint="lora-inject" level="nudge"
# Three parts: find, replace, remember. Collect the matches in a list first (`model.named_modules()` gives paths and
# modules), so that you do not change the model while you walk through it. To undo, you need what was there before.

# %% [markdown] hint="lora-inject" level="shape"
# To replace `"layers.0.attn.q_proj"` you set the attribute `q_proj` of the module `layers.0.attn`.
# `name.rpartition(".")` gives the two pieces, `model.get_submodule("layers.0.attn")` the parent (and the model itself
# for `""`). Note each parameter's `requires_grad` before you freeze, and freeze before you wrap.

# %% [markdown] hint="lora-inject" level="code"
# ```python
# found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and any(... for t in targets)]
# flags = [(p, p.requires_grad) for p in model.parameters()]
# model.requires_grad_(False)
# for name, m in found:
#     parent, _, child = name.rpartition(".")
#     setattr(model.get_submodule(parent), child, ...)
# def detach():
#     ...                     # the same loop with m, then the flags
# return detach
# ```

# %% [markdown]
# Once both are green, `detach = inject(model, ["q_proj", "v_proj"], lambda layer: LoRALayer(layer, r=8, alpha=16))`
# puts *your* layer into the Llama. Try it in a cell of your own, and call `detach()` afterwards. From here on we use
# the library's `attach` and `detach`, which do the same and also save adapters as files (chapter 03).

# %% [markdown]
# ## On the real model
#
# Enough preparation. The bundled Llama has seen a lot of Python, and no instruction. Here is what it writes when it is
# asked for something:

# %%
asked = [held_out[i] for i in range(3)]
before = generate(model, tokenizer, [prompt_of(row) for row in asked], max_new_tokens=60)


def side_by_side(*columns: list[str]) -> None:
    """Prompts and what was generated, as plain text."""
    for row, *texts in zip(asked, *columns):
        print("─" * 100 + "\n" + prompt_of(row).strip())
        for label, text in zip(("before", "after"), texts):
            print(f"  [{label}]\n" + "\n".join("    " + line for line in text.strip().splitlines()[:8]))


side_by_side(before)

# %% [markdown]
# Now LoRA on `q_proj` and `v_proj` (the paper's choice), $r = 8$, $\alpha = 16$. Before you run it, write down how many
# parameters train. The model has 6 layers and a width of 256; $v$ has 128 outputs.

# %%
train_rows = encoded(load_data("train"), tokenizer)     # as tokens; chapter 03 is about how
length = steps(full=80, quick=3)
settings = dict(steps=length, lr=3e-3, batch_size=16, seed=0)

places = {"q, v": ["q_proj", "v_proj"],
          "all attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
          "feed-forward": ["gate_proj", "up_proj", "down_proj"]}
runs = {}

adapters.attach(model, LoRAConfig(r=8, alpha=16, target_modules=places["q, v"]), seed=0)
trainable, total = adapters.count_parameters(model)
print(f"{trainable:,} of {total:,} parameters train: {trainable / total:.2%}")
history = train(model, train_rows, tokenizer, **settings)
runs["q, v"] = (trainable, history.smooth(), loss_base, held_out_loss(model, tokenizer, held_out))

# %%
show(history.plot("LoRA on q and v"), alt="Training loss of every step in grey and its running mean in blue: it falls steeply "
     "at first and then more slowly.")
display(Markdown(f"*Held-out loss: {loss_base:.2f} before, **{runs['q, v'][3]:.2f}** after {length} steps that took "
                 f"{history.seconds:.0f} seconds and trained {trainable / total:.2%} of the parameters.*"))

# %%
after = generate(model, tokenizer, [prompt_of(row) for row in asked], max_new_tokens=60)
side_by_side(before, after)

# %% [markdown]
# It now answers in the form that it was shown. Whether an answer is also *right* is another question: chapter 03 runs
# the programs, and trains for longer.

# %% [markdown]
# ## Where to put it
#
# The paper adapts attention's $q$ and $v$. A later source (004) says that one nowadays prefers the feed-forward layers.
# And source 003 reports a fixed budget, spent on one matrix or on two. Let us measure: the same rank, the same data in
# the same order, the same number of steps, three places. Which do you expect to win?

# %%
trained = {}
for name, targets in places.items():
    if name not in runs:
        adapters.detach(model)
        adapters.attach(model, LoRAConfig(r=8, alpha=16, target_modules=targets), seed=0)
        history = train(model, train_rows, tokenizer, **settings)
        runs[name] = (adapters.count_parameters(model)[0], history.smooth(), loss_base,
                      held_out_loss(model, tokenizer, held_out))
    trained[name] = {path: layer.delta() for path, layer in adapters.adapter_layers(model)}

show(pictures.placement_figure(runs), alt="Left: training loss of three placements over the steps. Right: held-out loss against "
     "trainable parameters: " + "; ".join(f"{name} {v[0]:,} parameters, loss {v[3]:.3f}" for name, v in runs.items()) + ".")
best, worst = min(runs, key=lambda n: runs[n][3]), max(runs, key=lambda n: runs[n][3])
display(Markdown(f"*After the same {length} steps, **{best}** is lowest ({runs[best][3]:.3f}) and **{worst}** highest "
                 f"({runs[worst][3]:.3f}); but the feed-forward adapter also has "
                 f"{runs['feed-forward'][0] / runs['q, v'][0]:.1f} times the parameters of q, v.*"))

# %% [markdown]
# Part of the difference is simply the number of parameters: the feed-forward matrices are wider. Is it only that? Give
# attention the higher rank that spends the same budget, and see:

# %%
budget = runs["feed-forward"][0]
per_rank = runs["all attention"][0] // 8
fair_r = round(budget / per_rank)
adapters.detach(model)
adapters.attach(model, LoRAConfig(r=fair_r, alpha=2 * fair_r, target_modules=places["all attention"]), seed=0)
fair_size = adapters.count_parameters(model)[0]
train(model, train_rows, tokenizer, **settings)
fair_loss = held_out_loss(model, tokenizer, held_out)
print(f"all attention at r = {fair_r}: {fair_size:,} parameters, held-out loss {fair_loss:.3f}")
print(f"feed-forward  at r = 8:  {budget:,} parameters, held-out loss {runs['feed-forward'][3]:.3f}")
display(Markdown("So it is **not only** the number: with as many parameters, attention still ends higher."
                 if fair_loss > runs["feed-forward"][3] else
                 "In this run it is the number: with as many parameters, attention ends as low."))

# %% [markdown]
# One model, one seed, a short run: this is a measurement and not a law. *LoRA Without Regret* (listed below) reports
# for larger models that attention alone loses to the feed-forward layers even with as many parameters. A common choice
# today is every linear layer, `target_modules="all-linear"`.
#
# ### What was learned, seen as a matrix
#
# The bet was on rank. $\Delta W$ has at most rank $r$ because we built it so. What about the sum?

# %%
where = "model.layers.3.mlp.up_proj"
W, delta = model.get_submodule(where).weight.detach(), trained["feed-forward"][where]
spectra = {"W₀ (frozen)": W, "ΔW (learned)": delta, "W₀ + ΔW (merged)": W + delta}
ranks_seen = {k: int(torch.linalg.matrix_rank(m)) for k, m in spectra.items()}
show(pictures.spectra_figure({k: [torch.linalg.svdvals(m).tolist()] for k, m in spectra.items()}, r=8),
     alt="Singular values on a logarithmic axis. Those of Delta W fall to nothing after number 8; those of W0 and of the sum lie "
     "together, nearly flat.")
print("rank:", ranks_seen, "    size of ΔW relative to W₀:", f"{delta.norm() / W.norm():.2f}")

# %% [markdown]
# *$\Delta W$ ends after $r$ directions; $W_0 + \Delta W$ has the full rank of $W_0$. Low rank is a property of the
# change, not of the model.*

# %% [markdown]
# ## Merging
#
# When training is over, the side road can be closed: compute $W = W_0 + \frac{\alpha}{r}BA$ once, store it in the place
# of $W_0$, and the layer is a plain linear layer again, as fast as before. To train on or to swap adapters, take
# $\Delta W$ out again: *unmerge*.
#
# It sounds like one line, and it can go wrong in several ways: merged twice, merged without the scale, merged *and* still
# added in the forward.

# %% [markdown] exercise="lora-merge"
# Finish `MergeableLoRA`. Its `__init__` is given: `self.base` is the frozen `nn.Linear`, `self.A` `[r, d_in]` and
# `self.B` `[d_out, r]` are trained, `self.scale` is $\alpha/r$, and `self.merged` says whether $\Delta W$ is in
# `self.base.weight` at the moment.
#
# - `forward(x)`: the same output, merged or not;
# - `merge()`: put $\Delta W$ into `self.base.weight`, which stays frozen; merging twice is merging once;
# - `unmerge()`: take it out again; unmerging twice is unmerging once.
#
# *Why it matters:* a merged model is what gets shipped, and nobody sees a wrong merge from the outside: it just answers
# worse.

# %% exercise="lora-merge"
class MergeableLoRA(nn.Module):
    """A frozen nn.Linear plus (alpha/r) B A that can be folded into its weight."""

    def __init__(self, base: nn.Linear, A, B, alpha: float):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)      # [r, d_in], [d_out, r]
        self.scale = alpha / A.shape[0]
        self.merged = False

    def forward(self, x):
        ### BEGIN SOLUTION
        if self.merged:
            return self.base(x)
        return self.base(x) + self.scale * F.linear(F.linear(x, self.A), self.B)
        ### END SOLUTION

    def merge(self):
        ### BEGIN SOLUTION
        if not self.merged:
            with torch.no_grad():
                self.base.weight += self.scale * self.B @ self.A
            self.merged = True
        ### END SOLUTION

    def unmerge(self):
        ### BEGIN SOLUTION
        if self.merged:
            with torch.no_grad():
                self.base.weight -= self.scale * self.B @ self.A
            self.merged = False
        ### END SOLUTION

# %% check="lora-merge"
check("lora-merge", MergeableLoRA)

# %% [markdown] hint="lora-merge" level="nudge"
# `self.merged` decides everything: in `forward`, whether the update still has to be added; in `merge` and `unmerge`,
# whether there is anything to do. And do not forget to set it.

# %% [markdown] hint="lora-merge" level="shape"
# $\Delta W$ must have the shape of the weight, `[d_out, d_in]`: which order of `self.A` and `self.B` gives that? A
# weight is changed in place under `torch.no_grad()`, so that no history is kept and it stays frozen.

# %% [markdown] hint="lora-merge" level="code"
# ```python
# if not self.merged:
#     with torch.no_grad():
#         self.base.weight += self.scale * ... @ ...
#     self.merged = ...
# ```

# %% [markdown]
# On the whole model, with the adapter that you just trained: do the merged and the unmerged model agree?

# %%
@torch.no_grad()
def logits(m) -> torch.Tensor:
    """[B, T, vocabulary] for a few held-out rows, padding left out."""
    return m(input_ids=few["input_ids"], attention_mask=few["attention_mask"]).logits[few["attention_mask"].bool()]


unmerged = logits(model)
adapters.merge(model)
merged = logits(model)
adapters.merge(model)                                  # a second time: nothing may happen
twice = logits(model)
adapters.unmerge(model)
back = logits(model)

merge_error = ((merged - unmerged).abs().max() / unmerged.abs().max()).item()
print(f"merged − unmerged: at most {(merged - unmerged).abs().max():.1e} where the largest logit is "
      f"{unmerged.abs().max():.1f}: relative {merge_error:.1e}")
print("merged twice = merged once:", torch.equal(merged, twice))
print("unmerged again = before, bit for bit:", torch.equal(back, unmerged))

# %% [markdown]
# The small rest is rounding: 32-bit numbers were added in another order. (The library keeps $W_0$ while merged, so taking
# the adapter out is exact. PEFT subtracts $\Delta W$ again, as you may have done; what that leaves is measured below. Merging
# into a model that is stored in 4 bits is another matter: chapter 05.)

# %% question="lora-q-merged-file"

# %% [markdown]
# ## What it costs in time
#
# Source 001 says that LoRA has no overhead at inference, source 004 that it adds "a small compute overhead". Both are
# right, about different cases: merged and not. Let us measure both.
#
# Timings are noisy, so we do three things. The variants take turns, in a new order each round, so that a slow moment of
# the machine hits all of them alike. We compare the *fast* rounds of each (the 20th percentile), because other programs
# can only slow a run down. And the base model runs twice under two names: how far that **A/A comparison** is from 1 is
# what a difference has to exceed before it means anything.
#
# "Merged" is what one would ship: merged, and the plain layers put back in place (PEFT calls it `merge_and_unload`).

# %%
def take_turns(variants: dict, rounds: int) -> dict[str, list[float]]:
    """Run each function once a round, in random order. Returns the seconds of every round."""
    rng = random.Random(0)
    seconds = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name in rng.sample(list(variants), len(variants)):
            began = time.perf_counter()
            variants[name]()
            if number:                                 # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    return seconds


def forward(m, tokens: int):
    ids = few["input_ids"][:1, :1].repeat(1, tokens)

    @torch.inference_mode()
    def run():
        m(input_ids=ids, use_cache=False)
    return run


def slower(variants: dict, rounds: int) -> dict[str, tuple[float, float, float]]:
    """Each variant's time relative to the first one's: (ratio, low, high)."""
    seconds = take_turns(variants, rounds)
    base = seconds.pop(next(iter(variants)))
    return {name: pictures.slowdown(times, base) for name, times in seconds.items()}


adapters.detach(model)
on_qv = adapters.attach(copy.deepcopy(model), LoRAConfig(r=8, target_modules=places["q, v"]))
on_all = adapters.attach(copy.deepcopy(model), LoRAConfig(r=8, target_modules="all-linear"))
shipped = adapters.merge(copy.deepcopy(on_all))
for name, layer in list(adapters.adapter_layers(shipped)):
    shipped.set_submodule(name, layer.base_layer)

variants = {"base": model, "base again (A/A)": model, "LoRA everywhere, merged": shipped,
            "LoRA on q, v, not merged": on_qv, "LoRA everywhere, not merged": on_all}
rounds = steps(80, quick=10)
latency = {label: slower({name: forward(m, tokens) for name, m in variants.items()}, rounds)
           for label, tokens in {"1 token": 1, "64 tokens": 64}.items()}

# %%
show(pictures.latency_figure(latency), alt="Time of a forward pass relative to the base model. " + "; ".join(
     f"{setting}: " + ", ".join(f"{k} {v[0]:.2f}" for k, v in rows.items()) for setting, rows in latency.items()) + ".")
one, many = ({k: v[0] for k, v in latency[setting].items()} for setting in ("1 token", "64 tokens"))
display(Markdown(f"*For one token: merged {one['LoRA everywhere, merged']:.2f} × the base, not merged "
                 f"{one['LoRA on q, v, not merged']:.2f} × (q, v) and {one['LoRA everywhere, not merged']:.2f} × (everywhere). "
                 f"The base against itself: {one['base again (A/A)']:.2f}. (Bars: uncertainty, from drawing the rounds again; wide "
                 f"ones mean that the machine was busy.)*"))
for width in (256, 4096):
    print(f"multiplications that r = 8 adds to a square layer of width {width}: {2 * 8 / width:.1%}")

# %% [markdown]
# The unmerged side road is two small products per layer. On a model as small as this one they weigh a lot beside matrices
# of 256 × 256; the larger the model, the less. Merged, the layers are plain layers again: there is nothing left to pay
# for, and what is left of a difference is noise.
#
# ### And in training?
#
# Less than 1 % of the parameters train. Is a training step a hundred times faster then? Predict, then run.

# %%
def training_step(m):
    def run():
        loss_sum(m, few).backward()
        m.zero_grad()
    return run


def forward_only():
    with torch.no_grad():
        loss_sum(model, few)


step_ratio = slower({"full": training_step(model), "LoRA on q, v": training_step(on_qv),
                     "LoRA everywhere": training_step(on_all), "forward only": forward_only}, steps(12, quick=2))
step_ratio = {name: ratio for name, (ratio, _, _) in step_ratio.items()}
print("time of a step, full fine-tuning = 1:", {k: round(v, 2) for k, v in step_ratio.items()})

# %% [markdown]
# The forward pass still goes through the whole model, and so does the backward pass on its way down to the first
# adapter. What is saved is the frozen weights' own gradients, and the optimizer's work on them. LoRA saves **memory**
# first (chapters 00 and 09), storage second, and time third.

# %% question="lora-q-speed"

# %% [markdown]
# ## Against production
#
# The library that everybody uses is `peft`. The same configuration there:

# %%
import logging
import warnings

logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)     # peft imports it, and it complains about missing extras
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
theirs.print_trainable_parameters()
peft_A = max(p.abs().max().item() for n, p in theirs.named_parameters() if "lora_A" in n)
peft_B = max(p.abs().max().item() for n, p in theirs.named_parameters() if "lora_B" in n)
print(f"peft's start: largest entry of any A {peft_A:.4f} (1/√256 = {1 / 16:.4f}), of any B {peft_B:g}")

# %% [markdown]
# Now the same $A$ and $B$ in ours and in theirs, with $B \ne 0$ (or there would be nothing to compare). Logits, gradients and
# merged logits have to agree to $10^{-4}$, or the cell stops:

# %%
ours = adapters.attach(copy.deepcopy(model), LoRAConfig(r=8, alpha=16, target_modules=["q_proj", "v_proj"]), seed=5)
rng = torch.Generator().manual_seed(6)
mine = adapters.trainable(ours)
yours = {name.removeprefix("base_model.model."): p for name, p in theirs.named_parameters() if p.requires_grad}
assert mine.keys() == yours.keys()            # even the names are the same
with torch.no_grad():
    for key, p in mine.items():
        p.add_(0.05 * torch.randn(p.shape, generator=rng))
        yours[key].copy_(p)

peft_logits = (logits(ours) - logits(theirs)).abs().max().item()
for m in (ours, theirs):
    (loss_sum(m, few) / 100).backward()
peft_gradients = max((mine[k].grad - yours[k].grad).abs().max().item() for k in mine)
largest = max(p.grad.abs().max().item() for p in mine.values())
changed = (logits(ours) - logits(model)).abs().max().item()
adapters.merge(ours)
theirs.merge_adapter()
peft_merged = (logits(ours) - logits(theirs)).abs().max().item()
print(f"largest difference of logits {peft_logits:.1e} (the adapter moves them by up to {changed:.1f}), "
      f"of gradients {peft_gradients:.1e} (the largest is {largest:.1f}), of merged logits {peft_merged:.1e}")
theirs.unmerge_adapter()
start = {name.replace(".weight", ".base_layer.weight"): p for name, p in model.named_parameters()}
left = max((p - start[name.removeprefix("base_model.model.")]).abs().max().item()
           for name, p in theirs.named_parameters() if "base_layer" in name)
print(f"after peft's merge and unmerge a weight is at most {left:.1e} from what it was; after ours, 0")
assert peft_logits <= 1e-4 and peft_gradients <= 1e-4 * max(1, largest) and peft_merged <= 1e-4

# %% [markdown]
# ### Find the line
#
# PEFT's LoRA layer is a file of more than two thousand lines, because it handles every case that production has. The
# method itself is one line of it. Here is the forward of its `Linear`:

# %%
import peft.tuners.lora.layer as source

forward_source, first_line = inspect.getsourcelines(source.Linear.forward)
found = [i for i, line in enumerate(forward_source) if "lora_B(lora_A(" in line]
for i, line in enumerate(forward_source):
    print(f"{'→' if i in found else ' '} {first_line + i:5}  {line}", end="")
print(f"\npeft {peft.__version__}, {source.__name__.replace('.', '/')}.py, {inspect.getsource(source).count(chr(10)):,} lines")

# %% [markdown]
# The marked line is yours: base output plus $B(A(\text{dropout}(x)))$ times the scale. Around it:
#
# | the code asks | because |
# |---|---|
# | `if self.disable_adapters:` | somebody wants the base model for a moment; if merged, the adapter must come out first |
# | `elif adapter_names is not None:` | one batch, several adapters: each row may ask for its own |
# | `elif self.merged:` | $\Delta W$ is in the weight already; adding it again would count it twice |
# | `for active_adapter in self.active_adapters:` | several adapters may be on at once; their updates add up |
# | `if active_adapter not in lora_A_keys: continue` | an active adapter need not touch this layer |
# | `self._cast_input_dtype(...)` | $A$ and $B$ may be 32-bit beside a 16-bit base |
# | `if active_adapter not in self.lora_variant:` | plain LoRA here; DoRA and other relatives (chapter 08) go their own way |
# | `result.to(torch_result_dtype)` | give back the dtype that the base layer gave |
#
# **Go and look** (nothing to hand in): in the same file, find `reset_lora_parameters`. Which line sets $B$ to zero? And
# `get_delta_weight`: in which order does it multiply?

# %%
answers = ("kaiming_uniform_", "zeros_(self.lora_B[adapter_name].weight)", "weight_B @ weight_A")
for function in (source.LoraLayer.reset_lora_parameters, source.Linear.get_delta_weight):
    lines, first_line = inspect.getsourcelines(function)
    print(f"{function.__qualname__}:")
    for i, line in enumerate(lines):
        if any(answer in line for answer in answers):
            print(f"  {first_line + i:5}  {line.strip()}")

# %% [markdown]
# ## The sources say, we measured
#
# This course is built on five documents. They are good on ideas and loose on details, so each figure that belongs to
# this chapter was computed again above. The right column is filled in by the code of this notebook.

# %%
def verdict(good: bool, right: str = "✓", wrong: str = "✗") -> str:
    return right if good else wrong


again = [rows["base again (A/A)"] for rows in latency.values()]
noisy = any(abs(ratio - 1) > 0.1 for ratio, _, _ in again)
ceiling = max(1.0, *(high for _, _, high in again))               # above this a difference is more than noise
merged_free = not noisy and all(rows["LoRA everywhere, merged"][1] <= ceiling for rows in latency.values())
unmerged_costs = not noisy and all(rows["LoRA everywhere, not merged"][0] > ceiling for rows in latency.values())
places_said = ", ".join(f"{name} {v[3]:.3f}" for name, v in runs.items())

rows = [
    ("source", "it says", "we measured", ""),
    ("---",) * 4,
    ("001, example 3", "$A$ is 1×2, $B$ is 2×1, “$r = 2$”: output (3.045, 7.06)",
     f"$r$ = {r_by_hand}: ({by_hand[0]:.2f}, {by_hand[1]:.2f})", "✗"),
    ("001, example 1", "7B, $r = 8$ on q, k, v, o: 8,388,608, about 0.12 %",
     f"{qkvo_7b:,}, {qkvo_7b / 7e9:.2%}", verdict(qkvo_7b == 8_388_608)),
    ("001, problem 1", "1024 × 4096, $r = 16$: 81,920, 51.2 × fewer",
     f"{problem_1:,}, {ratio_1:.1f} ×", verdict(problem_1 == 81_920)),
    ("001, problem 2", "with $B = 0$ the model is the base model",
     f"held-out loss {loss_zero:.6f} and {loss_base:.6f}", verdict(loss_zero == loss_base)),
    ("003", "GPT-3: 18M is $r = 8$ on one matrix or $r = 4$ on two",
     f"{gpt3_one:,} and {gpt3_two:,}", verdict(gpt3_one == gpt3_two)),
    ("000, the abstract", "10,000 times fewer trainable parameters",
     f"175 billion / {gpt3_two / 1e6:.1f} million = {175e9 / gpt3_two:,.0f} ×", "about"),
    ("003", "a “Llama” with 8,388,608 of 6,666,862,592 trained",
     f"{opt_qv:,} of {opt_total:,} is $r = 16$ on q, v of OPT-6.7B", "the count ✓, the name ✗"),
    ("002", "2·d·r parameters for each adapted weight",
     f"only if square; Llama-3.2-1B, q and v, $r = 8$: {llama_qv:,}, not {as_if_square:,}", "✗ with grouped queries"),
    ("000, 004", "$\\Delta W = AB$, elsewhere $BA$", "both: what meets $x$ first is PEFT's `lora_A`", "translate"),
    ("001, 003", "$A$ is drawn from a Gaussian",
     f"in the paper; PEFT's is uniform, here up to {peft_A:.4f} (1/√256 = {1 / 16:.4f})", "paper ✓, library ✗"),
    ("001", "α acts as a learning-rate multiplier",
     f"twice the α: first step {alpha_adam:.2f} × with Adam, {alpha_sgd:.2f} × with SGD", "Adam ✓, SGD ✗"),
    ("001, 003", "no extra latency",
     f"merged: {one['LoRA everywhere, merged']:.2f} × (1 token), {many['LoRA everywhere, merged']:.2f} × (64 tokens); the base "
     f"against itself {one['base again (A/A)']:.2f}, {many['base again (A/A)']:.2f}",
     verdict(merged_free, "✓ if merged", "too noisy here")),
    ("004", "a small compute overhead at inference",
     f"not merged, everywhere: {one['LoRA everywhere, not merged']:.2f} × and {many['LoRA everywhere, not merged']:.2f} ×",
     verdict(unmerged_costs, "✓ if not merged", "too noisy here")),
    ("000, the abstract", "higher training throughput",
     f"a step takes {step_ratio['LoRA on q, v']:.2f} (q, v) to {step_ratio['LoRA everywhere']:.2f} (everywhere) of a full one",
     verdict(step_ratio["LoRA everywhere"] < 1, "✓", "q, v only")),
    ("004", "first attention, nowadays the feed-forward layers",
     f"held-out loss after {length} steps: {places_said}; attention with as many parameters {fair_loss:.3f}",
     verdict(runs["feed-forward"][3] < min(fair_loss, runs["all attention"][3]), "✓ here", "not here")),
]
display(Markdown("\n".join("| " + " | ".join(row) + " |" for row in rows)))

# %% [markdown]
# ## Summary
#
# | | |
# |---|---|
# | the method | $y = W_0x + b + \frac{\alpha}{r}BAx$, with $A\colon r \times d_{in}$, $B\colon d_{out} \times r$ |
# | trained, frozen | $A$ and $B$ train, $r\,(d_{in} + d_{out})$ numbers per matrix; all else is frozen |
# | start | $A$ random, $B$ zero: exactly the base model, and $B$ can learn at once |
# | scale | $\alpha/r$: a first step moves the model about as far, whatever the rank (measured from 4 to 64) |
# | where | q, v in the paper; all linear layers is a good default today |
# | merged | $W_0 + \frac{\alpha}{r}BA$: no cost at inference, a file as large as the base model |
# | not merged | a small file, can be swapped; costs two thin products per layer |
# | what it saves | memory first, storage, and some time |
#
# **Read**
#
# - Hu et al. 2021, [LoRA](https://arxiv.org/abs/2106.09685): section 4.1 (equation 3 and the start), 4.2 (where, and
#   what it saves), 7.1 (which matrices, for one budget), 7.2 (which rank), table 1 (latency).
# - Kalajdzievski 2023, [rsLoRA](https://arxiv.org/abs/2312.03732): why $\alpha/\sqrt{r}$.
# - Schulman et al. 2025, [LoRA Without Regret](https://thinkingmachines.ai/blog/lora/): where to put it, and which
#   learning rate.
# - `peft/tuners/lora/layer.py`, which you have just opened, and `pefttools/lora.py`, which is short.
#
# **Next.** Chapter 03 does a whole fine-tune: data, masking, training, and programs that are run to see whether they
# are right. It ends with an adapter file that PEFT can load. What happens when $W_0$ itself is stored in 4 bits is the
# subject of chapters 04 and 05.
