# ---
# title: LoRA's relatives and choosing the rank
# minutes: 100
# needs: [01_rank, 02_lora]
# ---
# %% [markdown]
# LoRA has a family. **rsLoRA** changes one number in it, **DoRA** adds a vector, **LoRA+** changes the optimizer, and
# others choose layers or ranks. Each paper shows that its relative wins. In this chapter you write them all. Then you
# find out what is more work than writing them: seeing whether one is really better.
#
# **After this chapter you can**
#
# - write DoRA's weight, with the norm along the right axis, and show what the well-known wrong one does;
# - say when $\alpha/r$ and when $\alpha/\sqrt r$ keeps a step equally large at every rank, and check it;
# - set up LoRA+ and choose layers by name, equal to peft's;
# - compare methods fairly: a learning rate for each, several seeds, paired differences, error bars;
# - measure with $\varphi$ whether two trainings found the same directions, and tell it from chance;
# - share out a budget of ranks over the layers of a model.

# %%
import copy
import inspect
import logging
import math
import statistics
import warnings

import torch
from IPython.display import Markdown, display
from torch import nn

from pefttools.dora import DoRAConfig, dora_forward
from pefttools.grading import case, check
from pefttools.inject import adapter_layers, attach, count_parameters, detach, trainable
from pefttools.lab import (collate, encoded, generate, held_out_loss, load_base, load_data, loss_sum, prompt_of, steps,
                           train)
from pefttools.lab import flavours as sweep
from pefttools.lora import LoRAConfig
from pefttools.loraplus import loraplus_groups as library_groups
from pefttools.subspace import subspace_table
from pefttools.targets import find_targets
from pefttools.widgets import flavours as pictures
from pefttools.widgets import start as pictures_of_00
from pefttools.widgets.base import show

base = load_base("tiny")
model, tokenizer = base
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
train_rows = encoded(load_data("train"), tokenizer)
held_out = load_data("held_out").shuffle(seed=0).select(range(steps(32, quick=8)))
few = collate(train_rows[:8], tokenizer.pad_token_id)
measured = sweep.results()                        # what a script ran ahead: pefttools/lab/flavours.py
print("ready: torch", torch.__version__)

# %% [markdown]
# ## The family
#
# Everybody here starts from LoRA (chapter 02): $y = W_0x + \Delta W\,x$ with $\Delta W = s\,BA$ and $s = \alpha/r$.
#
# | symbol | what it is | size |
# |---|---|---|
# | $W_0$ | the frozen weight, as torch keeps it | $d_{out} \times d_{in}$ |
# | $A$, $B$ | what LoRA trains; $B$ starts at zero | $r \times d_{in}$, $d_{out} \times r$ |
# | $r$, $\alpha$, $s$ | rank, a constant, and the scale of the update | numbers |
# | $\eta$ | the learning rate | a number |
#
# | relative | what it changes | trained besides |
# |---|---|---|
# | rsLoRA | $s = \alpha/\sqrt r$ | nothing |
# | DoRA | the length of each row of $W_0 + \Delta W$ is learned by itself | $m$: $d_{out}$ numbers |
# | LoRA+ | $B$ learns faster than $A$ | nothing |
# | LoRA with dropout | some inputs of $A$ are dropped while training | nothing |
# | selective layers | only some layers get LoRA | less |
# | AdaLoRA | layers share a budget of ranks | less, in the end |

# %% [markdown]
# # Part 1 · The scale: rsLoRA
#
# What should become of the update's factor when you raise the rank? LoRA divides by $r$. Kalajdzievski (2023) says that
# this is too much, that high ranks then hardly learn, and divides by $\sqrt r$: **rank-stabilized LoRA**.
#
# **By hand:** $\alpha = 16$. At $r = 4$ the factors are $16/4 = 4$ and $16/\sqrt4 = 8$. At $r = 64$ they are
# $16/64 = 0.25$ and $16/\sqrt{64} = 2$.

# %% [markdown] exercise="rslora-scale"
# Write `update_scale(r, alpha, rslora)`: the number in front of $BA$.
#
# *Why it matters:* it is one line, and it decides how far every step goes.

# %% exercise="rslora-scale"
def update_scale(r: int, alpha: float, rslora: bool = False) -> float:
    """LoRA's factor α/r, or rsLoRA's α/√r."""
    ### BEGIN SOLUTION
    return alpha / math.sqrt(r) if rslora else alpha / r
    ### END SOLUTION

# %% check="rslora-scale"
check("rslora-scale", update_scale)

# %% [markdown] hint="rslora-scale" level="nudge"
# Two cases, one `if`. Try it on the numbers of the example by hand.

# %% [markdown] hint="rslora-scale" level="shape"
# Both are `alpha` divided by something. `math.sqrt(r)` is the square root.

# %% [markdown] hint="rslora-scale" level="code"
# `return alpha / ... if rslora else alpha / ...`

# %% [markdown]
# ## Which is right? It depends on the optimizer
#
# Take the first step. $B$ is zero, so only $B$ moves. Let $\delta$ be the gradient at the layer's output, for one input
# $x$.
#
# - **SGD** moves $B$ by $-\eta s\,\delta\,(Ax)^\top$. The output changes by
#   $s\,\Delta B\,Ax = -\eta\,s^2\,\|Ax\|^2\,\delta$. $\|Ax\|^2$ is a sum of $r$ squares, so it grows like $r$. The step
#   has the same size at every rank if $s^2 r$ stays: $s \propto 1/\sqrt r$.
# - **Adam** moves every number of $B$ by $\eta$, whatever the size of its gradient. The output changes by
#   $s\,\eta\,\sum_i |(Ax)_i|$, which grows like $s\,r$. It stays if $s \propto 1/r$.
#
# So each is right for one optimizer's first step. **Predict:** with Adam and $\alpha/\sqrt r$, how many times larger is
# the first step at $r = 128$ than at $r = 8$?

# %%
my_guess = None

# %%
RANKS = (8, 32, 128)


@torch.no_grad()
def logits(m) -> torch.Tensor:
    return m(input_ids=few["input_ids"], attention_mask=few["attention_mask"]).logits


def first_step(optimizer_class, r: int, rslora: bool, seed: int) -> float:
    """How far one step with a tiny rate moves the logits (root mean square). The two scales agree at r = 8."""
    attach(model, LoRAConfig(r=r, alpha=16 / math.sqrt(8) if rslora else 16.0, rslora=rslora, target_modules=LINEAR),
           seed=seed)
    (loss_sum(model, few) / 100).backward()
    optimizer_class(trainable(model).values(), lr=1e-5).step()
    moved = (logits(model) - plain_logits).square().mean().sqrt().item()
    detach(model)
    return moved


plain_logits = logits(model)
first = {}
for optimizer_class in (torch.optim.SGD, torch.optim.Adam):
    for rslora in (False, True):
        sizes = [statistics.mean(first_step(optimizer_class, r, rslora, seed) for seed in range(steps(4, quick=1)))
                 for r in RANKS]
        first[optimizer_class.__name__, rslora] = [size / sizes[0] for size in sizes]
print(pictures_of_00.compare_guess(my_guess, round(first["Adam", True][-1])))
print(f"size of the first step, r = {RANKS[0]} is 1:" + "".join(f"{f'r = {r}':>10}" for r in RANKS))
for (name, rslora), sizes in first.items():
    print(f"{name:>24}, {'α/√r' if rslora else 'α/r':>5}          " + "".join(f"{size:10.2f}" for size in sizes))

# %% [markdown]
# With Adam it is $\alpha/r$ that holds still, and $\alpha/\sqrt r$ that grows (chapter 02 saw the first half of this);
# with SGD it is the other way round, up to the scatter of the random $A$. Adam is what nearly everybody trains LoRA
# with. So at a *fixed* learning rate, raising the rank under rsLoRA is also raising the size of the steps. Whether that
# is good depends on whether the rate was too low or too high. Measured over a short training, at a rate that is low for
# $r = 8$:

# %%
by_rank = {scale: {int(r): [run["end"] for run in runs.values()] for r, runs in columns.items()}
           for scale, columns in measured["rank"].items()}
show(pictures.curves_figure(by_rank, "rank r", title=f"one learning rate ({sweep.RANK_RATE:g}), two "
                                                                      f"scales"),
     alt="Held-out loss against the rank, mean and standard deviation of three seeds. " + "; ".join(
         f"{scale}: " + ", ".join(f"r = {r} {statistics.mean(v):.2f}" for r, v in points.items())
         for scale, points in by_rank.items()) + ".")
low, high = min(by_rank["α/r"]), max(by_rank["α/r"])
gain = {scale: statistics.mean(points[low]) - statistics.mean(points[high]) for scale, points in by_rank.items()}
lr_up = "0.003"
at_lr_up = statistics.mean(measured["rate"]["LoRA"][lr_up][str(seed)]["end"] for seed in sweep.SEEDS)
display(Markdown(f"*From $r$ = {low} to {high} the held-out loss changes by {-gain['α/r']:+.2f} with $\\alpha/r$ and "
                 f"by **{-gain['α/√r']:+.2f}** with $\\alpha/\\sqrt r$ ({sweep.STEPS} steps, {len(sweep.SEEDS)} seeds; "
                 f"bars: standard deviation). Rank alone brings next to nothing here; the larger step brings the rest, "
                 f"and that can be had from the learning rate as well: LoRA of rank {sweep.R} at {lr_up} has "
                 f"{at_lr_up:.2f}, rank {high} with $\\alpha/\\sqrt r$ at {sweep.RANK_RATE:g} has "
                 f"{statistics.mean(by_rank['α/√r'][high]):.2f}.*"))

# %% question="flavours-q-scale"

# %% [markdown]
# # Part 2 · DoRA
#
# A row of $W_0 + \Delta W$ has a direction and a length. LoRA changes both at once. Liu et al. (2024) noticed that full
# fine-tuning often turns a row without changing its length much, or the other way round, and that LoRA rarely does.
# **DoRA** gives the length a parameter of its own:
#
# $$W' = m \odot \frac{W_0 + \Delta W}{\|W_0 + \Delta W\|}$$
#
# Here $m$ has one number for each of the $d_{out}$ rows and starts at $\|W_0\|$, the lengths that the rows have.
# $\|\cdot\|$ takes the Euclidean length of every row, and $\odot$ multiplies row $i$ by $m_i$.

# %%
show(pictures.dora_picture(), alt="Left: a row of the weight as a grey arrow W0, a blue arrow W0 plus delta W in "
     "another direction, and an orange arrow in the same direction as the blue one, as long as m. Right: a 4 by 6 "
     "matrix with one row in orange, which shares one length (dim 1), one column hatched as the wrong axis (dim 0), "
     "and beside it m with one number for each row.")

# %% [markdown]
# *$\Delta W$ only turns the row; $m$ alone says how long it is. Dotted: the length that the row had in $W_0$, where $m$
# starts. Dashed: an $m$ that has learned to be longer.*
#
# **By hand.** One row, $W_0 = (3, 4)$, $B = (2)$, $A = (1, 4)$, $\alpha = r = 1$.
#
# 1. $m$ starts at $\sqrt{9 + 16} = 5$.
# 2. $W_0 + \Delta W = (3, 4) + (2, 8) = (5, 12)$. Its length is $13$.
# 3. $W' = \frac{5}{13}(5, 12)$. For $x = (1, 1)$ DoRA gives $85/13 \approx 6.54$; LoRA gives $17$.
#
# One more detail (section 4.3 of the paper): while training, the norm counts as a constant. No gradient flows through
# it. That saves memory, and costs next to nothing in quality, the authors say.

# %%
W_0, A, B = torch.tensor([[3., 4.]]), torch.tensor([[1., 4.]]), torch.tensor([[2.]])
by_hand = dora_forward(torch.ones(2), W_0, A, B, torch.tensor([5.]), alpha=1).item()
print(f"DoRA: {by_hand:.4f} (85/13 = {85 / 13:.4f});  LoRA: {((W_0 + B @ A) @ torch.ones(2)).item():g}")

# %% [markdown] exercise="dora-column-norm"
# Write `dora_weight(W0, A, B, m, alpha)`.
#
# | argument | shape |
# |---|---|
# | `W0` | `[d_out, d_in]`, frozen |
# | `A`, `B` | `[r, d_in]`, `[d_out, r]` |
# | `m` | `[d_out]` |
# | *returns* | $W'$, `[d_out, d_in]`, with gradients for `A`, `B` and `m`; the norm is a constant |
#
# *Why it matters:* the paper says "column", for it writes $xW$. Much code on the web takes it at its word and is wrong.

# %% exercise="dora-column-norm"
def dora_weight(W0, A, B, m, alpha):
    """m ∘ (W₀ + ΔW)/‖W₀ + ΔW‖: one length for each output.  Returns [d_out, d_in]."""
    ### BEGIN SOLUTION
    V = W0 + alpha / len(A) * B @ A
    norm = V.detach().norm(dim=1, keepdim=True)          # [d_out, 1]
    return m[:, None] * V / norm
    ### END SOLUTION

# %% check="dora-column-norm"
check("dora-column-norm", dora_weight)

# %% [markdown] hint="dora-column-norm" level="nudge"
# Three steps: add, divide each row by its length, multiply each row by its $m$. Which numbers of the weight make *one*
# output? Those share a length.

# %% [markdown] hint="dora-column-norm" level="shape"
# `V.norm(dim=1, keepdim=True)` is `[d_out, 1]`: one length for each row. `m[:, None]` is `[d_out, 1]` too. `.detach()`
# makes a constant.

# %% [markdown] hint="dora-column-norm" level="code"
# ```python
# V = W0 + ...
# norm = V.detach().norm(dim=..., keepdim=True)
# return m[:, None] * V / norm
# ```

# %% [markdown]
# ## The wrong axis, exposed
#
# This is how the best-known teaching code does it: a norm over `dim=0`, one number for each *column*. At the start it
# computes exactly the base model, as it should. Its shapes fit. It trains. Only a comparison with $B \ne 0$ shows that
# it is another method:

# %%
# peft imports it, and it complains about missing extras
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import peft.tuners.lora.dora as dora_source

W = model.model.layers[2].self_attn.k_proj.weight.detach()       # [128, 256]: two heads of 64 read 256 numbers
rng = torch.Generator().manual_seed(0)
A_8, B_8 = torch.randn(8, 256, generator=rng) / 16, torch.randn(128, 8, generator=rng) * 0.1


def wrong_axis(W0, A, B, alpha):
    V = W0 + alpha / len(A) * B @ A
    return W0.norm(dim=0, keepdim=True) * V / V.norm(dim=0, keepdim=True)


def peft_dora(W0, A, B, alpha):
    """The weight by which peft's DoRA layer multiplies, read off with the identity matrix."""
    holder = nn.Sequential(nn.Linear(W0.shape[1], W0.shape[0], bias=False))
    holder[0].weight.data = W0.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(holder, peft.LoraConfig(r=len(A), lora_alpha=alpha, target_modules=["0"],
                                                           use_dora=True))
    layer = made.base_model.model[0]
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = A.clone(), B.clone()
    with torch.no_grad():
        return layer(torch.eye(W0.shape[1])).T


x = torch.randn(64, 256, generator=rng)
wrong = {}
for name, factor in (("B = 0", 0.0), ("B ≠ 0", 1.0)):
    right = peft_dora(W, A_8, factor * B_8, 16)
    lengths = W.norm(dim=1)
    wrong[name] = {key: ((x @ (weight - right).T).abs().max().item()) for key, weight in (
        ("dim=1", dora_forward(torch.eye(256), W, A_8, factor * B_8, lengths, 16).T),
        ("dim=0", wrong_axis(W, A_8, factor * B_8, 16)))}
    print(f"{name}: against peft's outputs (up to {(x @ right.T).abs().max():.1f}), dim=1 is off by "
          f"{wrong[name]['dim=1']:.0e}, dim=0 by {wrong[name]['dim=0']:.2g}")
drift = (wrong_axis(W, A_8, B_8, 16).norm(dim=1) / W.norm(dim=1) - 1).abs().max().item()
kept = (peft_dora(W, A_8, B_8, 16).norm(dim=1) / W.norm(dim=1) - 1).abs().max().item()
print(f"m is untouched, so every row should have kept its length: peft's did, up to {kept:.0e}; with dim=0 one changed "
      f"by {drift:.0%}")
print(f"magnitudes: {W.shape[0]} with dim=1, {W.shape[1]} with dim=0")

# %% [markdown]
# A test at the start, where $B = 0$, passes for both. So test an adapter with $B \ne 0$, always.

# %% question="flavours-q-axis"

# %% question="flavours-q-dora"

# %% [markdown]
# ## On the real model
#
# How many numbers train? $m$ adds $d_{out}$ for each matrix. Then train DoRA on all linear layers of the bundled model.

# %%
SIZES = {}
for name, config in {"LoRA": LoRAConfig(r=8, alpha=16, target_modules=LINEAR),
                     "DoRA": DoRAConfig(r=8, alpha=16, target_modules=LINEAR)}.items():
    attach(model, config, seed=0)
    SIZES[name], total = count_parameters(model)
    detach(model)
print(f"LoRA trains {SIZES['LoRA']:,} numbers, DoRA {SIZES['DoRA']:,}: {SIZES['DoRA'] - SIZES['LoRA']:,} magnitudes "
      f"({SIZES['DoRA'] / SIZES['LoRA'] - 1:.1%} more); the model has {total:,}")

asked = [held_out[i] for i in range(2)]
before = generate(model, tokenizer, [prompt_of(row) for row in asked], max_new_tokens=48)
loss_base = held_out_loss(model, tokenizer, held_out)
attach(model, DoRAConfig(r=8, alpha=16, target_modules=LINEAR), seed=0)
history = train(model, train_rows, tokenizer, steps=steps(60, quick=3), lr=1e-2, batch_size=8, seed=0)
loss_dora = held_out_loss(model, tokenizer, held_out)

# %%
show(history.plot("DoRA on all linear layers"), alt="Training loss of every step in grey and its running mean in blue: "
     "steep at first, then flatter.")
after = generate(model, tokenizer, [prompt_of(row) for row in asked], max_new_tokens=48)
for row, *texts in zip(asked, before, after):
    print("─" * 100 + "\n" + prompt_of(row).strip())
    for label, text in zip(("before", "after"), texts):
        print(f"  [{label}]\n" + "\n".join("    " + line for line in text.strip().splitlines()[:7]))
turned, stretched = [], []
for _, layer in adapter_layers(model):
    W_start, W_end = layer.base_layer.weight.detach(), layer.merged_tensors()["weight"].detach()
    turned.append(torch.nn.functional.cosine_similarity(W_start, W_end,
                                                        dim=1).clamp(max=1).acos().rad2deg().mean().item())
    stretched.append((W_end.norm(dim=1) / W_start.norm(dim=1) - 1).abs().mean().item())
detach(model)
display(Markdown(f"*Held-out loss {loss_base:.2f} before, **{loss_dora:.2f}** after. The rows of the weights have "
                 f"turned by {statistics.mean(turned):.0f}° and changed their length by "
                 f"{statistics.mean(stretched):.1%} on average.*"))

# %% [markdown]
# # Part 3 · LoRA+
#
# $A$ and $B$ do different things, and start differently: $A$ random, $B$ zero. Hayou et al. (2024) show that with one
# learning rate for both, one of them learns too slowly once the model is wide, and give $B$ a higher rate:
#
# $$\eta_B = \lambda\,\eta_A, \qquad \lambda \approx 16 .$$
#
# (Source 002 has a "LoRA++". That name belongs to nothing we could find, and dropout, which it goes with there, has
# nothing to do with LoRA+.) In torch a learning rate belongs to a **parameter group**: an optimizer takes a list of
# dicts like `{"params": [...], "lr": 0.01}`.

# %% [markdown] exercise="loraplus-groups"
# Write `loraplus_groups(named, lr, ratio)`. `named` is a list of `(name, parameter)`, as `model.named_parameters()`
# gives. Return the list of groups.
#
# | parameter | its rate |
# |---|---|
# | frozen (`requires_grad` is False) | in no group |
# | `lora_B`, and DoRA's `lora_magnitude_vector` | `lr * ratio` |
# | `lora_A`, and whatever trains besides, such as a new head | `lr` |
#
# *Why it matters:* what is in no group never learns, and nothing tells you.

# %% exercise="loraplus-groups"
def loraplus_groups(named, lr: float, ratio: float) -> list[dict]:
    """Parameter groups for a torch optimizer: B and m at lr · ratio, everything else that trains at lr."""
    ### BEGIN SOLUTION
    slow, fast = [], []
    for name, parameter in named:
        if parameter.requires_grad:
            (fast if "lora_B" in name or "lora_magnitude_vector" in name else slow).append(parameter)
    return [{"params": slow, "lr": lr}, {"params": fast, "lr": lr * ratio}]
    ### END SOLUTION

# %% check="loraplus-groups"
check("loraplus-groups", loraplus_groups)

# %% [markdown] hint="loraplus-groups" level="nudge"
# Two lists. Go through `named`, skip what is frozen, and put each parameter into one of the two.

# %% [markdown] hint="loraplus-groups" level="shape"
# The name decides: `"lora_B" in name or "lora_magnitude_vector" in name`. Everything else goes to the slow list.

# %% [markdown] hint="loraplus-groups" level="code"
# `return [{"params": slow, "lr": lr}, {"params": fast, "lr": ...}]`

# %% [markdown]
# # Part 4 · Is it better? Learning rates, seeds, error bars
#
# Suppose two methods end with the losses 0.74 and 0.77. Is one better? Two questions come first.
#
# 1. **Was the learning rate fair?** Each method has its own best rate. At one common rate you compare rates, and not
#    methods.
# 2. **Is it more than luck?** Another seed draws another $A$ and another order of the data. Run several, and look at
#    the spread.
#
# If both methods ran with the *same* seeds, what a seed does to both cancels in the difference. With $d_k = b_k - a_k$
# for seed $k = 1 \dots n$, the mean $\bar d$ has the **standard error** $\mathrm{sd}(d)/\sqrt n$, where $\mathrm{sd}$
# divides by $n - 1$.
#
# **By hand:** $a = (2.0, 2.4, 2.2)$, $b = (1.9, 2.2, 2.1)$. The differences are $-0.1, -0.2, -0.1$; their mean is
# $-0.133$. They are $0.033, -0.067, 0.033$ from it, so $\mathrm{sd} = \sqrt{0.00667/2} = 0.058$ and the standard error
# is $0.058/\sqrt3 = 0.033$. The runs of one method are $0.2$ apart, and still the difference is four standard errors.

# %% [markdown] exercise="paired-difference"
# Write `paired_difference(a, b)`: `a[k]` and `b[k]` are the losses of two methods with the same seed. Return
# `(mean of b − a, its standard error)`.
#
# *Why it matters:* without the second number the first one says nothing.

# %% exercise="paired-difference"
def paired_difference(a: list[float], b: list[float]) -> tuple[float, float]:
    """Mean of b − a over seeds, and the standard error of that mean."""
    ### BEGIN SOLUTION
    differences = [after - before for before, after in zip(a, b)]
    return statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    ### END SOLUTION

# %% check="paired-difference"
check("paired-difference", paired_difference)

# %% [markdown] hint="paired-difference" level="nudge"
# First one list of differences, then everything about that one list.

# %% [markdown] hint="paired-difference" level="shape"
# `statistics.mean` and `statistics.stdev` (which divides by $n - 1$).

# %% [markdown] hint="paired-difference" level="code"
# `d = [y - x for x, y in zip(a, b)]`, then `return statistics.mean(d), ... / math.sqrt(len(d))`

# %% [markdown]
# ## The sweep
#
# `pefttools/lab/flavours.py` trained the bundled model with each method at each of five learning rates, three seeds
# each, for a hundred steps, and each method with two more seeds at its best rate. Its results are in the repository.
# (Full fine-tuning and LoRA+ were tried at lower rates than the other two: each has its best inside what was tried.)
# **Predict before you look:** where is LoRA's best learning rate, compared with full fine-tuning's? Three times lower,
# the same, three times or ten times higher?

# %%
by_rate = {name: {float(lr): [runs[str(seed)]["end"] for seed in sweep.SEEDS] for lr, runs in columns.items()}
           for name, columns in measured["rate"].items()}
best = {name: sweep.best(columns) for name, columns in measured["rate"].items()}
show(pictures.curves_figure(by_rate, top=1.5, chosen={name: float(lr) for name, (lr, _) in best.items()},
                            title=f"{sweep.STEPS} steps, {len(sweep.SEEDS)} seeds"),
     alt="Held-out loss against the learning rate, one curve each for full fine-tuning, LoRA, LoRA+ and DoRA, bars for "
     "the seeds. Every curve falls and rises again. Circled: "
     + ", ".join(f"{name} at {float(lr):g}" for name, (lr, _) in best.items()) + ".")
for name, (lr, found) in best.items():
    print(f"{name:>6}: best rate {float(lr):g}, held-out loss {found['mean']:.3f} ± {found['sd']:.3f}  (seeds: "
          + ", ".join(f"{end:.3f}" for end in found["ends"]) + ")")
rate_ratio = float(best["LoRA"][0]) / float(best["full"][0])
display(Markdown(f"*Circled: the best rate of each, chosen on other held-out rows than those shown, so it need not be "
                 f"the lowest point of the curve. (Losses above the frame are drawn as triangles at its edge.) LoRA's "
                 f"is **{rate_ratio:.0f} times** that of full fine-tuning, and LoRA+ needs a lower one than LoRA for "
                 f"$A$, since its $B$ has {sweep.RATIO:.0f} times as much.*"))

# %%
def compared(a: str, b: str, rate_a: str | None = None, rate_b: str | None = None) -> tuple[float, float, int]:
    """Mean of b − a, its standard error, and of how many seeds: at given rates, or each at its best."""
    first, second = (measured["rate"][name][rate or best[name][0]] for name, rate in ((a, rate_a), (b, rate_b)))
    d = torch.tensor([second[seed]["end"] - first[seed]["end"] for seed in first if seed in second])
    return d.mean().item(), (d.std() / len(d) ** 0.5).item(), len(d)


PAIRS = {"DoRA − LoRA, each at its best": compared("LoRA", "DoRA"),
         "LoRA+ − LoRA, each at its best": compared("LoRA", "LoRA+"),
         "full − LoRA, each at its best": compared("LoRA", "full"),
         "LoRA+ − LoRA, both at 0.001": compared("LoRA", "LoRA+", "0.001", "0.001"),
         "full − LoRA, both at 0.001": compared("LoRA", "full", "0.001", "0.001"),
         "full − LoRA, both at 0.01": compared("LoRA", "full", "0.01", "0.01")}
T95 = {3: 4.30, 5: 2.78}         # Student's t for so many seeds: by chance alone |t| stays below it 95 times in 100
for name, (difference, error, seeds) in PAIRS.items():
    print(f"{name:>32}: {difference:+.3f} ± {error:.3f}   ({abs(difference) / error:.1f} standard errors; with {seeds} "
          f"seeds it takes {T95[seeds]})")

# %% [markdown]
# Look at the lines with a *common* rate. At 0.001 full fine-tuning beats LoRA by far; at 0.01 it loses by far. Both
# differences are many standard errors, and neither says anything about the methods: error bars protect you from luck,
# and not from an unfair comparison. The lines "each at its best" are what one may quote. (Five seeds are few. The fewer
# there are, the more standard errors it takes before luck can be ruled out: the numbers at the ends of the lines are
# the 95 % points of Student's $t$ with one degree of freedom less than there are seeds.)
#
# Read even those with care. The rates tried lie a factor of three apart, so a method whose best one lies between two of
# them has not been seen at its best, and seeds do not show that.

# %% question="flavours-q-one-rate"

# %% [markdown]
# ### The re-run, in small
#
# Two methods once more on your machine, with fewer steps and two seeds, at a rate that is low for both. Does it come
# out as in the figure?

# %%
short = steps(10, quick=2)
again = {name: [sweep.run(base, train_rows, None, held_out, name, 1e-3, seed, steps=short)["end"] for seed in (10, 11)]
         for name in ("LoRA", "LoRA+")}
for name, ends in again.items():
    print(f"{name:>6}, rate 0.001, {short} steps: held-out loss " + " and ".join(f"{end:.2f}" for end in ends))
ahead = statistics.mean(again["LoRA"]) - statistics.mean(again["LoRA+"])
print(f"LoRA+ is ahead by {ahead:.2f}, and after {sweep.STEPS} steps by {-PAIRS['LoRA+ − LoRA, both at 0.001'][0]:.2f}")

# %% [markdown]
# ## Batch size
#
# Source 004 says that LoRA does poorly with large batches, compared with full fine-tuning. Tested here with the *same
# rows* in batches of different size, so a larger batch means fewer steps, and the best of three learning rates for each
# (three seeds):

# %%
batch_rows, batch_gap = {}, {}
for size in sweep.BATCHES:
    found = {name: sweep.best(measured["batch"][f"{name}, {size}"]) for name in ("full", "LoRA")}
    for name, (lr, cell) in found.items():
        batch_rows[f"{name}, batches of {size}\n({sweep.BATCH_ROWS // size} steps, lr {float(lr):g})"] = cell["ends"]
    d = torch.tensor(found["LoRA"][1]["ends"]) - torch.tensor(found["full"][1]["ends"])
    batch_gap[size] = (d.mean().item(), (d.std() / len(d) ** 0.5).item())
show(pictures.dots_figure(batch_rows, title=f"{sweep.BATCH_ROWS} rows, once"),
     alt="Held-out loss of full fine-tuning and LoRA, three seeds each: " +
     "; ".join(f"{' '.join(name.split())}: {statistics.mean(v):.2f}" for name, v in batch_rows.items()) + ".")
print("LoRA − full: " + "; ".join(f"batches of {size}: {d:+.2f} ± {e:.2f}" for size, (d, e) in batch_gap.items()))
gap_grows = batch_gap[max(batch_gap)][0] - batch_gap[min(batch_gap)][0]
gap_error = math.hypot(batch_gap[max(batch_gap)][1], batch_gap[min(batch_gap)][1])
display(Markdown(f"*From batches of {min(batch_gap)} to {max(batch_gap)} the gap between LoRA and full fine-tuning "
                 f"changes by {gap_grows:+.2f} ± {gap_error:.2f}. So few steps say little about long trainings: with "
                 f"large batches there are only {sweep.BATCH_ROWS // max(batch_gap)} of them.*"))

# %% [markdown]
# # Part 5 · Which layers, and dropout
#
# Source 002 lists "selective-layer LoRA": only the top $N$ layers (next to the output), or only $q$ and $v$. In every
# library you choose by the modules' **names**, and names have traps.

# %% [markdown] exercise="pick-layers"
# Write `pick_layers(names, kinds, top=None)`.
#
# | argument | |
# |---|---|
# | `names` | names of modules in the model's order, such as `"model.layers.11.self_attn.q_proj"`; some, as `"lm_head"`, are in no layer |
# | `kinds` | which ones, such as `["q_proj", "v_proj"]`: the *whole* last part of the name |
# | `top` | only the last `top` layers, next to the output; `None`: all layers |
# | *returns* | the names chosen, in the model's order |
#
# The layer's number comes after `layers`, and there may be other numbers in a name. How many layers there are, you see
# from the names. What is in no layer is never chosen.
#
# *Why it matters:* a name that fits nothing, or too much, gives no error in most code. It gives another experiment.

# %% exercise="pick-layers"
def pick_layers(names: list[str], kinds: list[str], top: int | None = None) -> list[str]:
    """The modules of these kinds in the `top` layers next to the output (None: in all)."""
    ### BEGIN SOLUTION
    def layer(name):
        parts = name.split(".")
        return int(parts[parts.index("layers") + 1]) if "layers" in parts else -1

    count = 1 + max(layer(name) for name in names)
    first = 0 if top is None else max(0, count - top)
    return [name for name in names if layer(name) >= first and name.split(".")[-1] in kinds]
    ### END SOLUTION

# %% check="pick-layers"
check("pick-layers", pick_layers)

# %% [markdown] hint="pick-layers" level="nudge"
# Write a small function first that gives a name's layer number as a whole number. The rest is one list comprehension
# with two conditions.

# %% [markdown] hint="pick-layers" level="shape"
# `parts = name.split(".")`; the number is `int(parts[parts.index("layers") + 1])`, if "layers" is among the parts. With
# `count` layers the top ones begin at `count - top`.

# %% [markdown] hint="pick-layers" level="code"
# `return [name for name in names if layer(name) >= ... and name.split(".")[-1] in kinds]`

# %% [markdown]
# Where do two layers help most? The script put LoRA on all six layers of the bundled model, and on two with three times
# the rank, so that the number of parameters is the same:

# %%
places = {name: runs[""] for name, runs in measured["layers"].items()}
place_rows = {name: [run["end"] for run in runs.values()] for name, runs in places.items()}
show(pictures.dots_figure(place_rows, title=f"LoRA, equal numbers of parameters, {sweep.STEPS} steps, lr "
                                            f"{sweep.PLACE_RATE:g}"),
     alt="Held-out loss, three seeds each: " + "; ".join(f"{name} {statistics.mean(v):.2f}"
                                                         for name, v in place_rows.items()) + ".")
places_said = ", ".join(f"{name} {statistics.mean(v):.2f} ± {statistics.stdev(v):.2f}"
                        for name, v in place_rows.items())
best_place = min(place_rows, key=lambda name: statistics.mean(place_rows[name]))
display(Markdown(f"*Held-out loss: {places_said}. Best here: **{best_place}**. (One learning rate for all four: read "
                 f"it with what you have just learned.)*"))

with torch.device("meta"):
    from transformers import LlamaConfig, LlamaForCausalLM
    llama_1b = LlamaForCausalLM(LlamaConfig(vocab_size=128_256, hidden_size=2048, intermediate_size=8192,
                                            num_hidden_layers=16,
                                            num_attention_heads=32, num_key_value_heads=8, head_dim=64,
                                            tie_word_embeddings=True))
total_1b = sum(p.numel() for p in llama_1b.parameters())
selective = {}
for name, layers in {"all 16 layers": None, "top 4 layers": [12, 13, 14, 15]}.items():
    chosen = find_targets(llama_1b, LoRAConfig(r=8, target_modules=["q_proj", "v_proj"], layers_to_transform=layers))
    selective[name] = sum(8 * sum(module.weight.shape) for module in chosen.values())
    print(f"Llama-3.2-1B, r = 8, q and v, {name}: {selective[name]:,} numbers, {selective[name] / total_1b:.3%}")

# %% [markdown]
# ## Dropout
#
# LoRA's dropout sits in front of $A$: while training, each input of $A$ is zero with probability $p$, and the others
# are divided by $1 - p$, so that the mean stays. The frozen road sees everything. See it on one layer:

# %%
holder = nn.Sequential(nn.Linear(64, 32))
attach(holder, LoRAConfig(r=4, alpha=8, dropout=0.5, target_modules=["0"]), seed=0)
holder.train()
x = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
torch.manual_seed(0)
with torch.no_grad():
    at_start = (holder(x) - holder[0].base_layer(x)).abs().max().item()
    holder[0].lora_B["default"].weight.normal_(std=0.3)
    noisy = torch.stack([holder(x) for _ in range(4000)])
    quiet = holder.eval()(x)
bias_of_mean = (noisy.mean(0) - quiet).abs().max().item()
print(f"B = 0, in training: {at_start:g} from the base layer")
print(f"B ≠ 0: one forward pass is up to {(noisy[0] - quiet).abs().max():.2f} from that without dropout, the mean of "
      f"4000 up to {bias_of_mean:.2f}")

drop_rows = {f"p = {p}": [run["end"] for run in runs[""].values()] for p, runs in measured["dropout"].items()}
show(pictures.dots_figure(drop_rows, title=f"{sweep.DROPOUT_ROWS} rows for training, {sweep.DROPOUT_STEPS} steps"),
     alt="Held-out loss, three seeds each: " + "; ".join(f"{name} {statistics.mean(v):.2f}"
                                                         for name, v in drop_rows.items()) + ".")
drops = list(measured["dropout"].values())
d = torch.tensor([a["end"] - b["end"] for a, b in zip(drops[-1][""].values(), drops[0][""].values())])
drop_gain = (d.mean().item(), (d.std() / len(d) ** 0.5).item())
display(Markdown(f"*Overfitting on {sweep.DROPOUT_ROWS} rows (another {sweep.DROPOUT_ROWS} for each seed): p = "
                 f"{sweep.DROPOUTS[-1]:g} changes the held-out loss by {drop_gain[0]:+.2f} ± {drop_gain[1]:.2f} "
                 f"against none. The seeds draw other rows here, which is why single runs lie far apart, and why only "
                 f"the paired difference says anything.*"))

# %% question="flavours-q-dropout"

# %% [markdown]
# # Part 6 · Which rank?
#
# ## Do two ranks find the same directions?
#
# Hu et al. (2021) trained the same task with $r = 8$ and $r = 64$ and asked: does the small one find directions that
# the large one finds as well? If only the first few agree, only those matter. They compare the **right-singular
# vectors** of the two $A$: directions of the layer's input, sorted by size (chapter 01).
#
# $$\varphi(A_8, A_{64}, i, j) = \frac{\big\|U_8^{i\,\top}\,U_{64}^{j}\big\|_F^2}{\min(i, j)} \in [0, 1]$$
#
# | symbol | what it is | size |
# |---|---|---|
# | $A_8$, $A_{64}$ | two trained $A$ | $8 \times n$, $64 \times n$ |
# | $n$ | how many numbers the layer reads | one number |
# | $U_8^i$ | the first $i$ right-singular vectors of $A_8$, as columns | $n \times i$ |
# | $\|\cdot\|_F^2$ | the sum of the squares of all entries | one number |
#
# 1 means that one of the two subspaces contains the other, 0 that they are orthogonal. (Source 003 explains this with
# the subspace "spanned by the column vectors". It is the rows of $A$ that span it: $A$ is $r \times n$.)
#
# **By hand:** $n = 3$, one row each, $(1, 0, 0)$ and $(\cos 30°, \sin 30°, 0)$. $\varphi(1, 1) = \cos^2 30° = 3/4$.

# %% [markdown] exercise="subspace-similarity"
# Write `subspace_similarity(A, B, i, j)`: $\varphi$ of `A` `[r_A, n]` and `B` `[r_B, n]` for the first $i$ and $j$
# directions, as a number.
#
# *Why it matters:* it answers "did they learn the same?" where comparing the matrices number by number cannot: two
# trainings may describe the same directions by quite different numbers.

# %% exercise="subspace-similarity"
def subspace_similarity(A, B, i: int, j: int) -> float:
    """φ: how much of the smaller of two spans of right-singular vectors lies in the other."""
    ### BEGIN SOLUTION
    U_A = torch.linalg.svd(A, full_matrices=False).Vh[:i]         # [i, n]
    U_B = torch.linalg.svd(B, full_matrices=False).Vh[:j]         # [j, n]
    return ((U_A @ U_B.T).square().sum() / min(i, j)).item()
    ### END SOLUTION

# %% check="subspace-similarity"
check("subspace-similarity", subspace_similarity)

# %% [markdown] hint="subspace-similarity" level="nudge"
# Take the SVD of each, keep the first right-singular vectors, form all inner products, and add up their squares.

# %% [markdown] hint="subspace-similarity" level="shape"
# `torch.linalg.svd(A, full_matrices=False).Vh` is `[r, n]`; its *rows* are the right-singular vectors. The inner
# products are `[i, j]`.

# %% [markdown] hint="subspace-similarity" level="code"
# ```python
# U_A = torch.linalg.svd(A, full_matrices=False).Vh[:i]
# U_B = ...
# return ((U_A @ U_B.T).square().sum() / ...).item()
# ```

# %% [markdown]
# Two *random* subspaces are not orthogonal. On average they have $\varphi = \max(i, j)/n$: of a random direction, a
# random subspace of 64 in 256 dimensions holds a quarter. Everything below has to be read against that. The next cell
# trains $r = 8$ and twice $r = 64$, with three seeds.

# %%
RATE_8, RATE_64, length = 5e-3, 5e-3, steps(40, quick=2)
found = {}
for label, r, seed in (("r = 8", 8, 1), ("r = 64", 64, 2), ("r = 64, another seed", 64, 3)):
    sweep.put_on(model, "LoRA", seed, r=r, alpha=2 * r)
    start_A = {name: layer.lora_A["default"].weight.detach().clone() for name, layer in adapter_layers(model)}
    sweep.fit(model, train_rows, tokenizer, "LoRA", RATE_8 if r == 8 else RATE_64, seed, length, 4)
    found[label] = {"A": {n: layer.lora_A["default"].weight.detach().clone() for n, layer in adapter_layers(model)},
                    "ΔW": {n: layer.delta().detach() for n, layer in adapter_layers(model)}, "start": start_A,
                    "loss": held_out_loss(model, tokenizer, held_out)}
    detach(model)
    print(f"{label:>22}: held-out loss {found[label]['loss']:.2f} after {length} steps")

# %%
def short_name(name: str) -> str:
    return f"layer {name.split('.')[2]}, {name.split('.')[-1]}"


def all_tables(first, second, what):
    return {short_name(n): subspace_table(found[first][what][n], found[second][what][n], *sizes[first, second])
            for n in reads_256}


reads_256 = [n for n, matrix in found["r = 8"]["A"].items() if matrix.shape[1] == 256]
sizes = {("r = 8", "r = 64"): (8, 64), ("r = 64", "r = 64, another seed"): (64, 64)}
tables = {"r = 8 against r = 64 (A)": all_tables("r = 8", "r = 64", "A"),
          "the same, of ΔW": all_tables("r = 8", "r = 64", "ΔW"),
          "the same, before training": all_tables("r = 8", "r = 64", "start"),
          "two seeds of r = 64 (A)": all_tables("r = 64", "r = 64, another seed", "A"),
          "two seeds of r = 64 (ΔW)": all_tables("r = 64", "r = 64, another seed", "ΔW")}
order = sorted(reads_256, key=lambda n: -tables["two seeds of r = 64 (A)"][short_name(n)][0, 7].item())
tables = {name: {short_name(n): found_[short_name(n)] for n in order} for name, found_ in tables.items()}
explorer = pictures.phi_explorer(tables, 256)

# %% [markdown]
# *Rows: how many directions of the first; columns: of the second. Thin dots: chance.* **To try:** how does it look
# before training? Are two seeds of $r = 64$ more alike than $r = 8$ and $r = 64$? In which matrices? The means over all
# matrices that read 256 numbers:

# %%
def mean_phi(name: str, i: int, j: int) -> float:
    return statistics.mean(table[i - 1][j - 1].item() for table in tables[name].values())


SPOTS = ((1, 1), (1, 8), (1, 64), (8, 64))
print(f"{'':>30}" + "".join(f"{f'φ{spot}':>10}" for spot in SPOTS))
for name in tables:
    print(f"{name:>30}" + "".join(f"{mean_phi(name, *spot):10.2f}" for spot in SPOTS))
print(f"{'chance':>30}" + "".join(f"{pictures.chance(*spot, 256):10.2f}" for spot in SPOTS))
A_name, S_name = "r = 8 against r = 64 (A)", "two seeds of r = 64 (A)"
moved = {label: statistics.mean(((run["A"][n] - run["start"][n]).norm() / run["start"][n].norm()).item()
                                for n in reads_256)
         for label, run in found.items()}
print("how far training has moved A, in parts of its random start: " + ", ".join(f"{label}: {value:.2f}"
                                                                                 for label, value in moved.items()))
display(Markdown(f"*Eight directions against 64: {mean_phi(A_name, 8, 64):.2f}, where chance gives 0.25. The first "
                 f"direction against 64: **{mean_phi(A_name, 1, 64):.2f}**, and two seeds of $r = 64$: "
                 f"**{mean_phi(S_name, 1, 64):.2f}**. So what is shared is in the first directions; over all of them "
                 f"hardly more than chance is left.*"))

# %% [markdown]
# That is the paper's finding in kind: the first directions agree more than chance, the later ones do not. The paper saw
# more agreement (above 0.5 for the first direction of GPT-3's matrices), after far longer training. Here every $A$
# still contains the random numbers that it started from; the line above says how large they are beside what training
# added.

# %% question="flavours-q-chance"

# %% [markdown]
# ## A budget of ranks
#
# Must every matrix have the same rank? AdaLoRA (Zhang et al. 2023) gives all of them together a **budget** and lets the
# matrices compete: an update is kept as an SVD, and the least important singular directions are dropped, wherever they
# are. Its importance comes from weights and gradients during training. The simple version below goes by the singular
# values of the finished $\Delta W$.
#
# **By hand:** two updates with the singular values $(5, 1)$ and $(3, 2)$, and a budget of three. The largest three are
# $5, 3, 2$. So the ranks are 1 and 2.

# %% [markdown] exercise="rank-budget-by-svd"
# Write `share_ranks(deltas, budget)`: `deltas` is a list of matrices $\Delta W$ (of any shapes). Keep the `budget`
# largest singular values of all of them together, and return how many each matrix keeps, as a list of whole numbers. A
# matrix may get 0.
#
# *Why it matters:* no other choice of as many singular directions has a smaller squared error (chapter 01's
# Eckart–Young, for several matrices at once).

# %% exercise="rank-budget-by-svd"
def share_ranks(deltas, budget: int) -> list[int]:
    """How many singular directions each ΔW keeps when all share a budget."""
    ### BEGIN SOLUTION
    every = [(value, i) for i, delta in enumerate(deltas) for value in torch.linalg.svdvals(delta).tolist()]
    kept = [i for _, i in sorted(every, reverse=True)[:budget]]
    return [kept.count(i) for i in range(len(deltas))]
    ### END SOLUTION

# %% check="rank-budget-by-svd"
check("rank-budget-by-svd", share_ranks)

# %% [markdown] hint="rank-budget-by-svd" level="nudge"
# Put the singular values of all matrices into one list, and remember for each where it comes from. Sort, cut, count.

# %% [markdown] hint="rank-budget-by-svd" level="shape"
# `torch.linalg.svdvals(delta)` gives a matrix's singular values. A list of pairs `(value, i)` sorts by the value.

# %% [markdown] hint="rank-budget-by-svd" level="code"
# ```python
# every = [(value, i) for i, delta in enumerate(deltas) for value in ...]
# kept = [i for _, i in sorted(every, reverse=True)[:...]]
# return [kept.count(i) for ...]
# ```

# %% [markdown]
# On the $r = 64$ training above, all 42 matrices. The same number of directions, shared out by size or evenly; then the
# model's loss with each. **Predict:** the squared error is smaller with the budget, for certain. Is the loss?

# %%
deltas = found["r = 64"]["ΔW"]
spectra = {n: torch.linalg.svd(delta, full_matrices=False) for n, delta in deltas.items()}


def by_budget(budget: int) -> dict[str, int]:
    every = torch.cat([s.S for s in spectra.values()])
    least = every.sort(descending=True).values[budget - 1]
    return {n: int((s.S >= least).sum()) for n, s in spectra.items()}


@torch.no_grad()
def loss_with(ranks: dict[str, int]) -> float:
    """Held-out loss of the base model plus the truncated updates, which come off again."""
    for sign in (1, -1):
        for n, (U, S, Vh) in spectra.items():
            k = ranks[n]
            if sign == 1:
                kept_weights[n] = model.get_submodule(n).weight.data
                model.get_submodule(n).weight.data = kept_weights[n] + (U[:, :k] * S[:k]) @ Vh[:k]
            else:
                model.get_submodule(n).weight.data = kept_weights[n]
        if sign == 1:
            loss = held_out_loss(model, tokenizer, held_out)
    return loss


kept_weights, budgets = {}, {}
energy = sum((s.S ** 2).sum() for s in spectra.values())
for each in (1, 2, 4, 8):
    ways = {"budget": by_budget(each * len(spectra)), "even": dict.fromkeys(spectra, each)}
    budgets[each] = {name: (1 - (sum((spectra[n].S[:k] ** 2).sum() for n, k in ranks.items()) / energy).item(),
                            loss_with(ranks))
                     for name, ranks in ways.items()}
    print(f"{each} on average: lost energy {budgets[each]['budget'][0]:.1%} by budget, {budgets[each]['even'][0]:.1%} "
          f"evenly; held-out loss {budgets[each]['budget'][1]:.3f} and {budgets[each]['even'][1]:.3f}")
print(f"all 64: held-out loss {found['r = 64']['loss']:.3f}; base model {loss_base:.3f}")

ranks = by_budget(4 * len(spectra))
show(pictures.budget_figure({kind: [ranks[n] for n in spectra if n.endswith(kind)] for kind in LINEAR},
                            "4 directions each on average, shared by size"),
     alt="A table of ranks, kinds of matrix by layers. Row sums: " + ", ".join(
         f"{kind} {sum(ranks[n] for n in spectra if n.endswith(kind))}" for kind in LINEAR) + ".")
better = [each for each, row in budgets.items() if row["budget"][1] < row["even"][1]]
display(Markdown(f"*Sharing by size lost less energy at every budget, and had the lower loss at {len(better)} of "
                 f"{len(budgets)} budgets. Size is not importance: a large update of a matrix may matter little to the "
                 f"loss, which is why AdaLoRA looks at gradients as well.*"))

# %% [markdown]
# # Against production
#
# The same settings in peft: DoRA, rsLoRA, and layers by number. Same numbers in ours and theirs, with $B \ne 0$. Logits
# and gradients have to agree to $10^{-4}$ of the largest, or the cell stops. Then LoRA+: the same rate for each
# parameter.

# %%
COMMON = {"r": 16, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}
WAYS = {"rsLoRA": (LoRAConfig(r=16, alpha=16, rslora=True, target_modules=COMMON["target_modules"]),
                   {"use_rslora": True}),
        "DoRA": (DoRAConfig(r=16, alpha=16, target_modules=COMMON["target_modules"]), {"use_dora": True}),
        "top 2 layers": (LoRAConfig(r=16, alpha=16, target_modules=COMMON["target_modules"],
                                    layers_to_transform=[4, 5]),
                         {"layers_to_transform": [4, 5]})}
peft_errors = {}
for name, (our_config, their_options) in WAYS.items():
    ours = attach(copy.deepcopy(model), our_config, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**COMMON, **their_options)).eval()
    mine = trainable(ours)
    yours = {key.removeprefix("base_model.model."): p for key, p in theirs.named_parameters() if p.requires_grad}
    assert mine.keys() == yours.keys()                       # even the names are the same
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, p in mine.items():
            p.add_(0.03 * torch.randn(p.shape, generator=rng))
            yours[key].copy_(p)
    a, b = logits(ours), logits(theirs)
    for m in (ours, theirs):
        (loss_sum(m, few) / 100).backward()
    largest = max(p.grad.abs().max().item() for p in mine.values())
    peft_errors[name] = ((a - b).abs().max().item() / a.abs().max().item(),
                         max((mine[key].grad - yours[key].grad).abs().max().item() for key in mine) / largest)
    print(f"{name:>12}: logits differ by {peft_errors[name][0]:.0e} of the largest, gradients by "
          f"{peft_errors[name][1]:.0e}; the adapter moves the logits by up to {(a - plain_logits).abs().max():.1f}")
    assert max(peft_errors[name]) <= 1e-4
    if name == "DoRA":
        from peft.optimizers import create_loraplus_optimizer

        optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        our_rates = {id(p): group["lr"] for group in library_groups(ours, lr=1e-3, ratio=16.0) for p in group["params"]}
        assert all(rates[id(yours[key])] == our_rates[id(mine[key])] for key in mine)
        print(f"{'LoRA+':>12}: the same rate for each of {len(mine)} parameters: {sorted(set(rates.values()))}")

# %% [markdown]
# ### Find the line
#
# The axis of DoRA's norm, rsLoRA's square root, and the line in which AdaLoRA cuts:

# %%
import peft.tuners.adalora.layer as adalora_source
import peft.tuners.lora.layer as layer_source

MARKS = {dora_source: ("torch.linalg.norm(weight, dim=1)", "lora_weight=lora_weight.detach()", "mag_norm_scale - 1"),
         layer_source: ("lora_alpha / math.sqrt(r)",), adalora_source: ("masked_fill_(triplet_ipt[n] <= mask_threshold",
                                                                        )}
for module, marks in MARKS.items():
    lines = inspect.getsource(module).splitlines()
    print(module.__name__.replace(".", "/") + ".py")
    for mark in marks:
        number = next(i for i, line in enumerate(lines, 1) if mark in line)
        print(f"  {number:5}  {lines[number - 1].strip()}")

# %% [markdown]
# | the code says | because |
# |---|---|
# | `# calculate L2 norm of weight matrix, column-wise` | the paper's word, two lines above the `dim=1` that it means |
# | `.detach()` on the update | the norm is a constant in the gradient |
# | `transpose(weight, self.fan_in_fan_out)` | GPT-2 keeps its weights the other way round: there the axis is turned |
# | `mag_norm_scale - 1` | peft adds to the base layer's output, which already has once $W_0x$ |
#
# **Go and look** (nothing to hand in): in `peft/optimizers/loraplus.py`, which parameters get no weight decay? And in
# which group is DoRA's magnitude?

# %% [markdown]
# # The sources say, we measured
#
# The right columns are filled in by the code of this notebook.

# %%
def verdict(good: bool, right: str = "✓", wrong: str = "✗") -> str:
    return right if good else wrong


def beyond_luck(gain: tuple[float, float, int]) -> str:
    """What a difference of losses says about a method, with so many seeds."""
    difference, error, seeds = gain
    return verdict(difference < 0, "✓ here", "✗: worse here") if abs(difference) > T95[
        seeds] * error else "not shown here"


dora_gain, plus_gain = (PAIRS[f"{name} − LoRA, each at its best"] for name in ("DoRA", "LoRA+"))
few_values = statistics.mean(place_rows["top 2"]), statistics.mean(place_rows["bottom 2"])
rows = [
    ("source", "it says", "we measured", ""), ("---",) * 4,
    ("DoRA's paper", "the norm of each column", f"of its $xW$; in torch a row. `dim=0` is off from peft by "
     f"{wrong['B ≠ 0']['dim=0']:.2f}, `dim=1` by {wrong['B ≠ 0']['dim=1']:.0e}; at $B = 0$ neither shows", "translate"),
    ("002", "DoRA: $\\gamma$ is a scalar per row or column, $O(d)$ more",
     f"per row, {SIZES['DoRA'] - SIZES['LoRA']:,} more here, "
     f"{SIZES['DoRA'] / SIZES['LoRA'] - 1:.1%}", "row ✓, column ✗"),
    ("002", "the LoRA update is for only the direction", f"with $m$ untouched, row lengths change by {kept:.0e}", "✓"),
    ("002", "“LoRA++”: dropout and rescaling", "LoRA+ is two learning rates, dropout is an option of LoRA's own, "
                                               "rescaling is rsLoRA: three things", "✗, the name"),
    ("002", "selective layers: often below 0.05 % of the parameters",
     f"Llama-3.2-1B, $r = 8$, q and v: {selective['all 16 layers'] / total_1b:.3%} in all layers, "
     f"{selective['top 4 layers'] / total_1b:.3%} in the top 4", verdict(selective["top 4 layers"] / total_1b < 5e-4)),
    ("002", "the top $N$ layers", f"top 2: {few_values[0]:.2f}, bottom 2: {few_values[1]:.2f}, equal parameters and "
                                  f"rate",
     verdict(few_values[0] < few_values[1], "✓ here", "not here")),
    ("004", "LoRA needs a higher learning rate than full fine-tuning",
     f"best rates {float(best['LoRA'][0]):g} and {float(best['full'][0]):g}: {rate_ratio:.0f} ×",
     verdict(rate_ratio > 1)),
    ("004", "LoRA does poorly on large batches, compared with full",
     f"from {min(batch_gap)} to {max(batch_gap)} the gap changes by {gap_grows:+.2f} ± {gap_error:.2f}, equal rows",
     verdict(gap_grows > T95[len(sweep.SEEDS)] * gap_error, "✓ here", "not shown here")),
    ("rsLoRA's paper", "$\\alpha/r$ stunts high ranks, $\\alpha/\\sqrt r$ does not",
     f"from $r$ = {low} to {high} at one rate the loss changes by {-gain['α/r']:+.2f} and {-gain['α/√r']:+.2f}; the "
     f"first Adam step grows {first['Adam', True][-1]:.1f} × from {RANKS[0]} to {RANKS[-1]} under $\\alpha/\\sqrt r$, "
     f"{first['Adam', False][-1]:.1f} × under $\\alpha/r$", "✓, but it is the step that grows"),
    ("LoRA+'s paper", "better than LoRA at $\\lambda = 16$",
     f"each at its best: {plus_gain[0]:+.3f} ± {plus_gain[1]:.3f}; at one low rate "
     f"{PAIRS['LoRA+ − LoRA, both at 0.001'][0]:+.2f}", beyond_luck(plus_gain)),
    ("DoRA's paper", "better than LoRA", f"each at its best: {dora_gain[0]:+.3f} ± {dora_gain[1]:.3f}",
     beyond_luck(dora_gain)),
    ("003", "the subspace spanned by column vectors", "right-singular vectors of $A$ ($r \\times n$): the span of its "
                                                      "rows", "✗"),
    ("003", "the top directions are shared, the others are mostly noise",
     f"φ(1, 64) = {mean_phi(A_name, 1, 64):.2f}, φ(8, 64) = {mean_phi(A_name, 8, 64):.2f} (both 0.25 by chance); two "
     f"seeds of $r = 64$: {mean_phi(S_name, 1, 64):.2f}, {mean_phi(S_name, 8, 64):.2f}",
     verdict(mean_phi(A_name, 1, 64) > mean_phi(A_name, 8, 64) and mean_phi(S_name, 1, 64) > mean_phi(S_name, 8, 64),
             "✓ in kind", "not here")),
    ("003", "increasing $r$ covers no more meaningful subspace", f"from $r$ = {low} to {high} with $\\alpha/r$ the "
                                                                 f"loss changes by {-gain['α/r']:+.2f}, in "
                                                                 f"{sweep.STEPS} steps",
     verdict(gain["α/r"] < 0.1, "✓ here", "not here")),
]
display(Markdown("\n".join("| " + " | ".join(row) + " |" for row in rows)))

# %% [markdown]
# ## Summary
#
# | | |
# |---|---|
# | rsLoRA | $s = \alpha/\sqrt r$; with Adam its steps grow with the rank |
# | DoRA | $m \odot (W_0 + \Delta W)/\|W_0 + \Delta W\|$, norm of each row (`dim=1`), a constant in the gradient |
# | LoRA+ | $B$ (and DoRA's $m$) at $\lambda$ times the rate of $A$ |
# | dropout | on the input of $A$ alone |
# | layers | by whole names and by numbers; print what was chosen |
# | $\varphi$ | right-singular vectors; read it against $\max(i, j)/n$ |
# | rank budget | the largest singular values of all layers; size is not importance |
# | a comparison | its own learning rate for each, the same seeds for both, a paired difference with its standard error |
#
# **Read**
#
# - Liu et al. 2024, [DoRA](https://arxiv.org/abs/2402.09353): sections 3.2 and 4.3.
# - Kalajdzievski 2023, [rsLoRA](https://arxiv.org/abs/2312.03732). Hayou et al. 2024,
#   [LoRA+](https://arxiv.org/abs/2402.12354): section 4.
# - Hu et al. 2021, [LoRA](https://arxiv.org/abs/2106.09685): section 7.2, figures 3 and 4.
# - Zhang et al. 2023, [AdaLoRA](https://arxiv.org/abs/2303.10512): section 3.
# - `pefttools/dora.py`, `pefttools/loraplus.py`, `pefttools/subspace.py`; in peft `tuners/lora/dora.py` and
#   `optimizers/loraplus.py`.
#
# **Next.** Chapter 09 counts the bytes of all this before anything is loaded, and designs a configuration for a given
# card.
