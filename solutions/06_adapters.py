# ---
# title: Adapters
# minutes: 90
# needs: [00_start, 02_lora]
# ---
# %% [markdown]
# LoRA changes what a weight matrix does. An **adapter** leaves every matrix alone and puts a small network of its own
# *between* the layers: down to a few numbers, through an activation, up again, and added to what was there. It is the
# oldest method of this course (2019), and several of the others can be read as variations of it.
#
# **After this chapter you can**
#
# - write a bottleneck adapter, and say why it has a way around and why it starts near the identity;
# - put it at each of the places that the literature names, count what trains there, and tell the places apart;
# - write IA³, which has no bottleneck at all, and merge it; and say why a bottleneck cannot be merged;
# - predict when adapters slow a model down and when not, from a measurement of your own;
# - serve several tasks from one frozen model, switched per request or per row of a batch;
# - write a hypernetwork that makes adapters out of a task embedding, and judge what a new task costs with it.

# %%
import copy
import inspect
import math
import random
import time
import warnings

import torch
import torch.nn.functional as F
from IPython.display import Markdown, display
from torch import nn

from pefttools.adapters import BottleneckAdapter, bottleneck_size, bottleneck_update
from pefttools.compose import routed
from pefttools.grading import case, check
from pefttools.hyper import hyper_size
from pefttools.hyper_config import HyperConfig, fold
from pefttools.ia3 import IA3Config, IA3Linear
from pefttools.inject import (adapter_layers, adapter_parameters, attach, count_parameters, detach, merge, set_adapter,
                              trainable)
from pefttools.lab import adapter_places as places
from pefttools.lab import (collate, encoded, generate, held_out_loss, load_base, load_data, loss_sum, prompt_of, steps,
                           train)
from pefttools.ln_tuning import LNTuningConfig
from pefttools.lora import LoRAConfig
from pefttools.placements import AdapterConfig
from pefttools.widgets import adapters as pictures
from pefttools.widgets import start as pictures_of_00
from pefttools.widgets.base import show
from pefttools.widgets.lora import slowdown

base = load_base("tiny")
model, tokenizer = base
d = model.config.hidden_size
print("ready: torch", torch.__version__)

# %% [markdown]
# # Part 1 · The bottleneck
#
# ## The picture
#
# Source 000's example: the output of a layer has 2048 numbers. The adapter squeezes them through 64.

# %%
show(pictures.bottleneck_picture(2048, 64), alt="h with 2,048 numbers enters from the left. Through W_down, 64 by "
     "2,048, it becomes 64 numbers, passes relu, and through W_up, 2,048 by 64, becomes 2,048 numbers again. An arc "
     "over all this carries h itself to a plus at the end.")

# %% [markdown]
# *Orange trains. The heights are drawn by square roots; to scale, the waist would hardly be seen.*
#
# $$y = h + W_{up}\, f(W_{down}\, h + b_{down}) + b_{up}$$
#
# | symbol | what it is | size | in training |
# |---|---|---|---|
# | $h$ | what a part of the model gives (attention, or the feed-forward), for one token | $d$, the model's width | |
# | $W_{down}$, $b_{down}$ | to the bottleneck | $m \times d$, and $m$ | trained |
# | $f$ | an activation, here relu: $\max(0, z)$ for each number | | |
# | $W_{up}$, $b_{up}$ | back to the model's width | $d \times m$, and $d$ | trained |
# | $m$ | the **bottleneck**, much smaller than $d$ | one number | chosen |
# | $y$ | what goes on in the place of $h$ | $d$ | |
#
# The update alone, without $h$, will be called $\delta(h)$ in this chapter, so $y = h + \delta(h)$. The other road, on
# which $h$ itself arrives at the plus, is the **way around** (elsewhere: residual or skip connection).
#
# **By hand.** Take $d = 3$ and $m = 1$, with $h = (1, 2, 3)$, $W_{down} = (1\;\; 0\;\; {-1})$, $b_{down} = 3$,
# $W_{up} = (2, 0, 1)^\top$ and $b_{up} = (0, 1, 0)$.
#
# 1. Down: $1 \cdot 1 + 0 \cdot 2 - 1 \cdot 3 + 3 = 1$. One number.
# 2. relu: it is positive, so it stays $1$.
# 3. Up: $(2, 0, 1) \cdot 1 + (0, 1, 0) = (2, 1, 1)$. That is $\delta(h)$.
# 4. The way around: $y = (1, 2, 3) + (2, 1, 1) = (3, 3, 4)$.
#
# With $b_{down} = 0$ step 1 gives $-2$, relu makes it $0$, and only the bias is left: $y = (1, 3, 3)$.

# %%
h = torch.tensor([1., 2., 3.])
W_down, b_down = torch.tensor([[1., 0., -1.]]), torch.tensor([3.])          # [m, d], [m]
W_up, b_up = torch.tensor([[2.], [0.], [1.]]), torch.tensor([0., 1., 0.])   # [d, m], [d]
by_hand = h + bottleneck_update(h, W_down, b_down, W_up, b_up)
closed = h + bottleneck_update(h, W_down, 0 * b_down, W_up, b_up)
print("y =", by_hand.tolist(), "    with b_down = 0:", closed.tolist())

# %% [markdown] exercise="bottleneck"
# Write `bottleneck(h, W_down, b_down, W_up, b_up)`, with relu.
#
# | argument | shape |
# |---|---|
# | `h` | `[..., d]`: a vector, a batch, a batch of sequences |
# | `W_down`, `b_down` | `[m, d]`, `[m]` |
# | `W_up`, `b_up` | `[d, m]`, `[d]` |
# | *returns* | `[..., d]` |
#
# *Why it matters:* this is the whole adapter. What is left is where to put it.

# %% exercise="bottleneck"
def bottleneck(h, W_down, b_down, W_up, b_up):
    """h + W_up relu(W_down h + b_down) + b_up, for h [..., d].  Returns [..., d]."""
    ### BEGIN SOLUTION
    z = torch.relu(F.linear(h, W_down, b_down))      # [..., m]
    return h + F.linear(z, W_up, b_up)               # [..., d]
    ### END SOLUTION

# %% check="bottleneck"
check("bottleneck", bottleneck)

# %% [markdown] hint="bottleneck" level="nudge"
# Four steps, as by hand: down, relu, up, and add $h$.

# %% [markdown] hint="bottleneck" level="shape"
# `F.linear(h, W_down, b_down)` is $W_{down} h + b_{down}$ for every row of `h`: `[..., m]`. The same with `W_up` leads
# back to `[..., d]`.

# %% [markdown] hint="bottleneck" level="code"
# ```python
# z = torch.relu(F.linear(h, ...))
# return ... + F.linear(z, ...)
# ```

# %% [markdown]
# (Red, and you do not see why? `case("bottleneck", 1)` gives the inputs of the check's first case, to try yours on.)
#
# ## The start: near the identity
#
# Before the first step, the model with adapters should be the model without. Houlsby et al. draw both matrices from a
# normal distribution with a standard deviation of 0.01, so $\delta$ is tiny: **near-identity initialisation**. Many
# libraries today start with $W_{up} = 0$, so $\delta$ is exactly zero (and $W_{down}$ random, for the same reason as in
# LoRA: if both were zero, neither would get a gradient).
#
# How near is near enough? And what if somebody forgets the way around, as in source 001, which prints
# $\mathrm{Adapter}(x) = W_{up}\,\sigma(W_{down}\, x)$ and puts it after attention and after the feed-forward? The next
# cell measures the bundled model's held-out loss with untrained adapters, five times: with a standard deviation
# $\sigma$ of 0, 0.01, 0.1 and 0.5, and without the way around. **Predict:** which of the five equal the model without
# adapters, which are worse than guessing? (Guessing among $V$ tokens costs $\ln V$ nats.)

# %%
held_out = load_data("held_out").shuffle(seed=0).select(range(steps(48, quick=12)))
few = collate(encoded(held_out.select(range(6)), tokenizer), tokenizer.pad_token_id)
real = few["attention_mask"].bool()
loss_base = held_out_loss(model, tokenizer, held_out)


@torch.no_grad()
def logits(m) -> torch.Tensor:
    """[places, vocabulary] at the words of a few held-out rows."""
    return m(input_ids=few["input_ids"], attention_mask=few["attention_mask"]).logits[real]


def loss_at_start(spread: float) -> float:
    """Held-out loss with Houlsby adapters whose matrices are drawn with this standard deviation, untrained."""
    attach(model, AdapterConfig("houlsby", bottleneck=16))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in adapter_parameters(model).items():
            if name.endswith("weight"):
                p.copy_(spread * torch.randn(p.shape, generator=rng))
    loss = held_out_loss(model, tokenizer, held_out)
    detach(model)
    return loss


def without_the_way_around() -> float:
    """Source 001's formula with W_up = 0: the update takes the place of what the sublayer gives."""
    hooks = []
    for layer in model.model.layers:
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            adapter = BottleneckAdapter(d, 16)
            hooks.append(module.register_forward_hook(lambda module, args, y, adapter=adapter: adapter.update(y)))
    loss = held_out_loss(model, tokenizer, held_out)
    for hook in hooks:
        hook.remove()
    return loss


at_start = {f"σ = {spread:g}": loss_at_start(spread) for spread in (0, 0.01, 0.1, 0.5)}
at_start["no way around"] = without_the_way_around()
print(f"base model: {loss_base:.4f}; guessing among {model.config.vocab_size:,} tokens: "
      f"{math.log(model.config.vocab_size):.2f}")
for name, loss in at_start.items():
    print(f"{name:>15}: {loss:.4f}  ({loss - loss_base:+.4f})")

# %% [markdown]
# Zero is exactly the base model, 0.01 can hardly be told from it, and larger starts damage it. Without the way around
# what attention and the feed-forward give is erased: what is left is the embedding, the residual stream and the output
# matrix. That is worse than guessing, for it is sure of the wrong thing.

# %% question="adapters-q-start"

# %% [markdown]
# ## Why the activation?
#
# Leave $f$ out (and the biases): $y = h + W_{up} W_{down} h = (I + W_{up}W_{down})\,h$. If $h = Wx$ came out of a
# linear layer, then $y = (W + W_{up}W_{down}W)\,x$. That is a change of $W$ of rank $m$: LoRA, with $A = W_{down}W$,
# and it can be merged. With $f$ in between, no matrix does the same. See both:

# %%
rng = torch.Generator().manual_seed(0)
W, x = torch.randn(8, 6, generator=rng), torch.randn(200, 6, generator=rng)
W_down, W_up = torch.randn(2, 8, generator=rng), torch.randn(8, 2, generator=rng)
merged_W = W + W_up @ W_down @ W                         # what the adapter would be as a matrix
y = x @ W.T
merge_gap = {}
for name in ("identity", "relu"):
    with_adapter = y + bottleneck_update(y, W_down, None, W_up, None, activation=name)
    best = torch.linalg.lstsq(x, with_adapter).solution.T          # the best matrix there is, by least squares
    merge_gap[name] = ((with_adapter - x @ best.T).norm() / with_adapter.norm()).item()
    print(f"f = {name:>8}: the outputs of the best matrix are off by {merge_gap[name]:.1e} of their size")
    if name == "identity":
        print(f"              it is W + W_up W_down W: {torch.allclose(best, merged_W, atol=1e-3)}; rank of the "
              f"change: {torch.linalg.matrix_rank(best - W, rtol=1e-4)}")

# %% question="adapters-q-merge"

# %% [markdown]
# # Part 2 · Where to put it
#
# A layer of a transformer consists of two **sublayers**, attention and feed-forward. Each reads the **stream** through
# a norm and adds its output to it (the *residual sum*). From here on $h$ is the stream, as in most papers; what a
# sublayer gives, $h$ in Part 1, is called $y$. $A(y) = y + \delta(y)$ is the adapter with its way around. Source 002
# has a table of places. Here they are, in one layer of a Llama. **Questions to try:** which placement trains most? What
# does halving $m$ do to Houlsby's count, and what to IA³'s? Which cost nothing when the model is in use?

# %%
explorer = pictures.block_explorer()

# %% [markdown]
# *Orange trains. An A has its way around inside; the parallel one has none, so it is a δ. "More steps" are further
# matrix products that have to wait for one another; multiplications are counted against those of the layers' own
# matrices.*
#
# | placement | where | its paper |
# |---|---|---|
# | **Houlsby** | after attention *and* after the feed-forward, before each residual sum | Houlsby et al. 2019 |
# | **Pfeiffer** | after the feed-forward only | Pfeiffer et al. 2021 |
# | **parallel** | beside the feed-forward: reads what *it* reads, times a scale $s$ (4) | He et al. 2022 |
# | **Bapna** | after the whole layer, residual sum included, with a norm of its own | Bapna & Firat 2019 |
# | **input, output** | one before the first layer, one after the last | – |
# | **IA³** | factors on keys, values and the feed-forward's inner activations | Liu et al. 2022 |
# | **norms** | no adapter: the gains of the model's own norms (Part 4) | Zhao et al. 2023 |
#
# (Pfeiffer et al. found their placement by a search, in BERT, that also moved a residual connection and a norm. What is
# called Pfeiffer here, and in most tables, is the position: the second of Houlsby's two.)
#
# Source 002 says of Bapna's that it stands "after attention only". In the paper (section 3, figure 2) it stands at the
# end of the layer, and it has a layer norm of its own. And 002 has IA³ and a "Pfeiffer vector" in one row: these are
# two methods which have nothing in common but being small.
#
# ## Counting
#
# $W_{down}$ has $m \cdot d$ numbers, $W_{up}$ has $d \cdot m$, the biases have $m$ and $d$. So **one** adapter has
# $2md + d + m$. Source 003 says that this is what is added "per layer". Houlsby et al. have two in a layer.
#
# By hand for source 000's 2048 → 64 → 2048: $2 \cdot 64 \cdot 2048 = 262{,}144$, and $2048 + 64 = 2{,}112$ for the
# biases. Together $264{,}256$.

# %% [markdown] exercise="count-adapters"
# Write `adapter_parameters_of(placement, model, m)`: how many numbers train.
#
# - `placement` is `"houlsby"`, `"pfeiffer"`, `"parallel"`, `"bapna"`, `"input_output"` (one at each end) or `"ia3"`.
# - `model` is a dict: `layers`, `d_model`, `kv_width` (how wide the keys of a layer are, and the values), `ff_width`
#   (how many numbers there are between the feed-forward's matrices).
# - A layer norm, as in Bapna's, has a gain and a shift, $d$ numbers each. IA³ has one number for each feature that it
#   multiplies, and no bottleneck.
#
# *Why it matters:* "adapters" may mean any of these, and their counts lie far apart.

# %% exercise="count-adapters"
def adapter_parameters_of(placement: str, model: dict, m: int) -> int:
    """How many numbers a placement trains, with a bottleneck of m."""
    ### BEGIN SOLUTION
    L, d = model["layers"], model["d_model"]
    one = 2 * m * d + d + m
    if placement == "ia3":
        return L * (2 * model["kv_width"] + model["ff_width"])
    if placement == "bapna":
        one += 2 * d
    return one * {"houlsby": 2 * L, "input_output": 2}.get(placement, L)
    ### END SOLUTION

# %% check="count-adapters"
check("count-adapters", adapter_parameters_of)

# %% [markdown] hint="count-adapters" level="nudge"
# First the size of one adapter. Then, for each placement: how many of them are there in a layer, and in the model?

# %% [markdown] hint="count-adapters" level="shape"
# `one = 2 * m * d + d + m`. Houlsby: two in each layer. Pfeiffer, parallel: one in each. Bapna: one in each, and each
# brings a norm. Input and output: two in all. IA³: vectors for keys, for values (`kv_width` each) and for the inner
# activations (`ff_width`), in each layer.

# %% [markdown] hint="count-adapters" level="code"
# ```python
# if placement == "ia3":
#     return L * (2 * ... + ...)
# if placement == "bapna":
#     one += ...
# return one * {"houlsby": ..., "input_output": ...}.get(placement, L)
# ```

# %% [markdown]
# ### Predict
#
# Source 001 has a model of 7 billion parameters with 32 layers and $d = 4096$. How many numbers train with Houlsby
# adapters of $m = 64$? Write your reckoning instead of `None`. The answer comes from the real model class, with its
# shapes and no numbers in them.

# %%
my_guess = None

# %%
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM


def skeleton(cls, config):
    """The real model class as shapes without numbers (the meta device)."""
    with torch.device("meta"):
        return cls(config)


def size(m) -> int:
    return sum(p.numel() for p in m.parameters())


def counted(m, config) -> int:
    """What the configuration would train in this model: the sizes of its tensors, at every module that it selects."""
    return sum(torch.Size(shape).numel() for module in config.targets(m).values()
               for shape in config.shapes(module).values())


llama_1b = skeleton(LlamaForCausalLM, LlamaConfig(
    vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, tie_word_embeddings=True))
llama_7b = skeleton(LlamaForCausalLM, LlamaConfig())                     # 32 layers, d = 4096
bert_large = skeleton(BertForSequenceClassification, BertConfig(         # Houlsby et al.'s model
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096))

ALL = {"houlsby": AdapterConfig("houlsby", 64), "pfeiffer": AdapterConfig("pfeiffer", 64),
       "parallel": AdapterConfig("parallel", 64),
       "bapna": AdapterConfig("bapna", 64), "input and output": AdapterConfig("input_output", 64), "IA³": IA3Config()}
count_1b = {}
for name, config in ALL.items():
    seen = attach(copy.deepcopy(llama_1b), config) if name == "IA³" else None
    count_1b[name] = sum(p.numel() for p in adapter_parameters(seen).values()) if seen else counted(llama_1b, config)
houlsby_7b = counted(llama_7b, AdapterConfig("houlsby", 64))
bert_count = counted(bert_large, AdapterConfig("houlsby", 64))
bert_norms = counted(bert_large, AdapterConfig("houlsby", 64, train_layer_norms=True))
one_000, total_1b = bottleneck_size(2048, 64), size(llama_1b)
print(pictures_of_00.compare_guess(my_guess, houlsby_7b))
share_1b = {name: n / total_1b for name, n in count_1b.items()}

rows = [("source", "what", "it says", "counted"), ("---",) * 4,
        ("000", "one adapter, 2048 → 64 → 2048", "(two matrices)", f"**{one_000:,}** with its biases"),
        ("001", "7B: $d = 4096$, $r = 64$, $L = 32$, two in a layer", "$4drL$, about 33 M",
         f"**{houlsby_7b:,}**; without biases {4 * 4096 * 64 * 32:,}"),
        ("003", "“per layer $2md + d + m$”", "one adapter",
         f"BERT-large, $m = 64$: two, **{2 * bottleneck_size(1024, 64):,}** in a layer"),
        ("003", "less than 1 % of the model", "–", f"BERT-large, $m = 64$: **{bert_count:,}**, "
                                                   f"{bert_count / size(bert_large):.1%}"),
        ("003", "the layer norms train, too", "–", f"{bert_norms - bert_count:,} more")]
for name, said in {"houlsby": "< 3 %", "pfeiffer": "–", "parallel": "–", "bapna": "fewer", "input and output": "tiny",
                   "IA³": "~0.05 %"}.items():
    rows.append(("002", f"{name}, Llama-3.2-1B" + (", $m = 64$" if name != "IA³" else ""), said,
                 f"**{count_1b[name]:,}**, {share_1b[name]:.3%}"))
display(Markdown("\n".join("| " + " | ".join(row) + " |" for row in rows)))

# %% question="adapters-q-places"

# %% [markdown]
# ## Houlsby's two
#
# In formulas, for a layer that normalises what goes *into* a sublayer (as Llama does; BERT, Houlsby's model, normalises
# after the sum):
#
# $$h \leftarrow h + A_1(\mathrm{attention}(\mathrm{norm}_1(h))), \qquad h \leftarrow h + A_2(\mathrm{feedforward}(\mathrm{norm}_2(h)))$$
#
# $A_1$ and $A_2$ are two adapters with their ways around. The stream $h$ itself is never touched: they stand *before*
# the sums.

# %% [markdown] exercise="houlsby-block"
# Write `houlsby_block(h, attention, feed_forward, norm_1, norm_2, adapter_1, adapter_2)`.
#
# `h` is `[B, T, d]`, and the six others are functions from `[B, T, d]` to `[B, T, d]`. The adapters add their input
# themselves. Returns the stream after the layer.
#
# *Why it matters:* one wrong line here gives another method of the table, and it trains without complaint.

# %% exercise="houlsby-block"
def houlsby_block(h, attention, feed_forward, norm_1, norm_2, adapter_1, adapter_2):
    """One pre-norm transformer layer with Houlsby's two adapters.  h [B, T, d] → [B, T, d]"""
    ### BEGIN SOLUTION
    h = h + adapter_1(attention(norm_1(h)))
    return h + adapter_2(feed_forward(norm_2(h)))
    ### END SOLUTION

# %% check="houlsby-block"
check("houlsby-block", houlsby_block)

# %% [markdown] hint="houlsby-block" level="nudge"
# Write the layer without adapters first: two lines, each `h = h + sublayer(norm(h))`. Then find the place in each line
# where the sublayer's output is, before it is added.

# %% [markdown] hint="houlsby-block" level="shape"
# Everything is `[B, T, d]`. The adapter wraps the sublayer's output: `adapter(sublayer(norm(h)))`.

# %% [markdown] hint="houlsby-block" level="code"
# ```python
# h = h + adapter_1(...)
# return h + ...
# ```

# %% [markdown]
# ## Beside instead of behind
#
# In the placements so far the adapter waits for the sublayer. He et al. 2022 put it beside: it reads the same $x =
# \mathrm{norm}(h)$, and its update is scaled by a number $s$ (they use 4) and added:
#
# $$h \leftarrow h + \mathrm{feedforward}(x) + s \cdot \big(W_{up}\, f(W_{down}\, x + b_{down}) + b_{up}\big)$$
#
# **Careful:** is there a way around inside this adapter? What would it go around?

# %% [markdown] exercise="parallel-adapter"
# Write `parallel_block(h, norm, feed_forward, W_down, b_down, W_up, b_up, s)`: the second half of a layer, with a
# parallel adapter. `norm` and `feed_forward` are functions, the rest as in `bottleneck`; $f$ is relu.
#
# *Why it matters:* LoRA is a road beside, too. In this form the two can be compared part by part, and He et al. do so.

# %% exercise="parallel-adapter"
def parallel_block(h, norm, feed_forward, W_down, b_down, W_up, b_up, s):
    """h + feed_forward(x) + s δ(x) with x = norm(h), for h [..., d]."""
    ### BEGIN SOLUTION
    x = norm(h)
    update = F.linear(torch.relu(F.linear(x, W_down, b_down)), W_up, b_up)
    return h + feed_forward(x) + s * update
    ### END SOLUTION

# %% check="parallel-adapter"
check("parallel-adapter", parallel_block)

# %% [markdown] hint="parallel-adapter" level="nudge"
# Three roads meet at the plus: the stream $h$, the feed-forward, the adapter's update. The last two start from the same
# $x$.

# %% [markdown] hint="parallel-adapter" level="shape"
# `x = norm(h)`. The update is what you wrote in `bottleneck`, without `h +`, of `x`. There is nothing to go around, so
# `x` is not added.

# %% [markdown] hint="parallel-adapter" level="code"
# ```python
# x = norm(h)
# update = F.linear(torch.relu(...), W_up, b_up)
# return h + ... + s * update
# ```

# %% [markdown]
# ## All placements, one argument, one model
#
# The library has them all in one configuration: `AdapterConfig("houlsby", bottleneck=16)`, and the first word chooses.
# Is it right? Here is the bundled Llama written out **by hand**, layer by layer, with $\delta$ at the place that the
# formula says. Every adapter gets random numbers (with zeros there would be nothing to compare), and the logits have to
# agree to $10^{-4}$ of the largest, or the cell stops.

# %%
PLACEMENTS = ("houlsby", "pfeiffer", "parallel", "bapna", "input", "output", "input_output")
plain = copy.deepcopy(model)


def fill(m, spread: float = 0.1, seed: int = 1):
    """Random numbers into every adapter parameter, added to the start."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter_parameters(m).values():
            p.add_(spread * torch.randn(p.shape, generator=rng))
    return m


@torch.no_grad()
def by_hand_logits(ids, placement: str, tensors: dict, scale: float):
    """The base model's layers in a loop; `tensors` has the adapters' numbers under the library's names."""
    def delta(where, z):
        own = {key.removeprefix(where + "."): t for key, t in tensors.items() if key.startswith(where + ".")}
        if "norm.weight" in own:
            z = F.layer_norm(z, z.shape[-1:], own["norm.weight"], own["norm.bias"])
        z = torch.relu(z @ own["down.weight"].T + own["down.bias"])
        return scale * (z @ own["up.weight"].T + own["up.bias"])

    body = plain.model
    h = body.embed_tokens(ids)
    turn = body.rotary_emb(h, torch.arange(ids.shape[1])[None])
    last = len(body.layers) - 1
    for i, layer in enumerate(body.layers):
        at = f"model.layers.{i}"
        if placement in ("input", "input_output") and i == 0:
            h = h + delta(f"{at}.before.default", h)
        y = layer.self_attn(layer.input_layernorm(h), position_embeddings=turn, attention_mask=None)[0]
        if placement == "houlsby":
            y = y + delta(f"{at}.self_attn.o_proj.bottleneck.default", y)
        h = h + y
        x = layer.post_attention_layernorm(h)
        y = layer.mlp(x)
        if placement in ("houlsby", "pfeiffer"):
            y = y + delta(f"{at}.mlp.down_proj.bottleneck.default", y)
        if placement == "parallel":
            y = y + delta(f"{at}.mlp.bottleneck.default", x)
        h = h + y
        if placement == "bapna" or (placement in ("output", "input_output") and i == last):
            h = h + delta(f"{at}.after.default", h)
    return plain.lm_head(body.norm(h))


ids = few["input_ids"][:1, :12]
with torch.no_grad():
    base_logits = plain(input_ids=ids).logits
hand_error = {}
for placement in PLACEMENTS:
    fill(attach(model, AdapterConfig(placement, bottleneck=16)))
    trained, tensors = count_parameters(model)[0], {k: p.detach().clone() for k, p in adapter_parameters(model).items()}
    with torch.no_grad():
        theirs = model(input_ids=ids).logits
    detach(model)
    ours = by_hand_logits(ids, placement, tensors, 4.0 if placement == "parallel" else 1.0)
    hand_error[placement] = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    moved = ((theirs - base_logits).abs().max() / theirs.abs().max()).item()
    print(f"{placement:>13}: {trained:7,} numbers, which move logits by {moved:4.0%} of the largest; by hand against "
          f"library {hand_error[placement]:.0e}")
    assert hand_error[placement] < 1e-4
with torch.no_grad():
    print("after detach, the base model bit for bit:", torch.equal(model(input_ids=ids).logits, base_logits))

# %% [markdown]
# ## IA³: factors instead of networks
#
# IA³ (Liu et al. 2022) multiplies three things in each layer by learned numbers, one for each feature:
#
# $$k \leftarrow l_k \odot (W_k x), \qquad v \leftarrow l_v \odot (W_v x), \qquad
# W_{out}\,\big(l_{ff} \odot f(W_{in}\, x)\big)$$
#
# $\odot$ multiplies number by number. At the start all of $l$ is **one**: the base model. Seen from one linear layer
# $y = Wx + b$ there are two cases. Keys and values are the *output* of a layer; the inner activations are the *input*
# of the feed-forward's last one.
#
# | | the layer gives | merged into $W$ | and into $b$ |
# |---|---|---|---|
# | at the output | $l \odot (Wx + b)$ | row $i$ of $W$ times $l_i$ | $l \odot b$ |
# | at the input | $W (l \odot x) + b$ | column $j$ of $W$ times $l_j$ | as it is |
#
# By hand, at the output: $W = \begin{pmatrix}1 & 2\\ 3 & 4\end{pmatrix}$, $b = (1, 1)$, $l = (2, 0)$, $x = (1, 1)$.
# $Wx + b = (4, 8)$, times $l$: $(8, 0)$. Merged: $W' = \begin{pmatrix}2 & 4\\ 0 & 0\end{pmatrix}$, $b' = (2, 0)$, and
# $W'x + b' = (8, 0)$.

# %% [markdown] exercise="ia3"
# Write the class `IA3Layer(base, at_input)`, an `nn.Module` around an `nn.Linear`:
#
# - `base` is frozen; one vector $l$ trains, of ones at the start, with `in_features` or `out_features` entries;
# - `forward(x)`: as in the table;
# - `merge()`: put $l$ into `base.weight` (and `base.bias`, where it belongs). The output stays what it was. Merging
#   twice is merging once.
#
# *Why it matters:* three short vectors in a layer, and once merged they cost nothing in use. A bottleneck has neither.

# %% exercise="ia3"
class IA3Layer(nn.Module):
    """A frozen nn.Linear whose output, or input, is multiplied by a learned l, number by number."""

    def __init__(self, base: nn.Linear, at_input: bool):
        super().__init__()
        ### BEGIN SOLUTION
        self.base, self.at_input, self.merged = base.requires_grad_(False), at_input, False
        self.l = nn.Parameter(torch.ones(base.in_features if at_input else base.out_features))
        ### END SOLUTION

    def forward(self, x):
        ### BEGIN SOLUTION
        if self.merged:
            return self.base(x)
        return self.base(x * self.l) if self.at_input else self.base(x) * self.l
        ### END SOLUTION

    def merge(self):
        """Fold l into the base layer."""
        ### BEGIN SOLUTION
        if self.merged:
            return
        with torch.no_grad():
            self.base.weight *= self.l if self.at_input else self.l[:, None]
            if not self.at_input and self.base.bias is not None:
                self.base.bias *= self.l
        self.merged = True
        ### END SOLUTION

# %% check="ia3"
check("ia3", IA3Layer)

# %% [markdown] hint="ia3" level="nudge"
# `at_input` decides three things: how long $l$ is, where `forward` multiplies, and along which axis `merge` does. And
# `merge` has to remember that it has been here.

# %% [markdown] hint="ia3" level="shape"
# `base.weight` is `[d_out, d_in]`. `weight * l[:, None]` multiplies rows (the output), `weight * l` columns (the
# input). Change it under `torch.no_grad()`.

# %% [markdown] hint="ia3" level="code"
# ```python
# with torch.no_grad():
#     self.base.weight *= self.l if self.at_input else ...
#     if not self.at_input and self.base.bias is not None:
#         self.base.bias *= ...
# self.merged = ...
# ```

# %% [markdown]
# On the model, by hand again: multiply the rows and columns of a copy's matrices, and compare with the library's IA³,
# not merged and merged. And what does peft take when you do not say which layers? The paper names keys, values and the
# inner activations.

# %%
ia3_model = fill(attach(copy.deepcopy(plain), IA3Config()), spread=0.3)
hand = copy.deepcopy(plain)
with torch.no_grad():
    for key, l in adapter_parameters(ia3_model).items():
        hand.get_submodule(key.removesuffix(".ia3_l.default")).weight.mul_(l)      # l is [d_out, 1] or [1, d_in]
a, b = logits(ia3_model), logits(hand)
c = logits(merge(copy.deepcopy(ia3_model)))
ia3_error = max(((a - other).abs().max() / a.abs().max()).item() for other in (b, c))
print(f"IA³ in the library against a hand-made change of the weights, and merged: at most {ia3_error:.0e} of the "
      f"largest logit")

import logging

# peft imports it, and it complains about missing extras
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as peft_ia3

queries = {family: names for family, names in peft_ia3.items() if any(name in ("q_proj",) for name in names)}
fused = {family: names for family, names in peft_ia3.items() if any(name in ("c_attn", "query_key_value", "in_proj")
                                                                    for name in names)}
print(f"peft {peft.__version__} has defaults for {len(peft_ia3)} families. Queries instead of keys or values in "
      f"{len(queries)}:")
print("   ", "; ".join(f"{family}: {', '.join(names)}" for family, names in queries.items()))
print(f"queries, keys and values together (one fused matrix) in {len(fused)}: {', '.join(fused)}")
bert = IA3Config().targets(skeleton(BertForSequenceClassification, BertConfig(num_hidden_layers=1)))
bert_ia3 = [name.split("layer.0.")[1] for name in bert]
print("in a layer of BERT:", ", ".join(bert_ia3))

# %% [markdown]
# So "IA³" from the library is the paper's for Llama, Mistral and T5, and something else for many others: with OPT it
# rescales queries and keys, and never the values. In BERT the name `output.dense` fits *two* layers, so the input of
# attention's own output layer is rescaled as well. If you want the paper's method, name the layers.
#
# # Part 3 · On the real model: two tasks, one base
#
# Source 001's fourth problem: when would you choose adapters over LoRA in production? Its first answer is many tasks on
# one server, switched per request. Let us build that. The same instruction, two tasks:
#
# - **code**: write the Python function (what the data set asks for);
# - **kind**: say in one word what the task is about: lists, strings, dates, …
#
# Two Houlsby adapters on one frozen model, trained one after the other:

# %%
def of_kind(row):
    """The same request, with its family as the answer."""
    return {"instruction": row["instruction"], "input": row["input"], "output": row["family"]}


train_data = load_data("train").shuffle(seed=0).select(range(steps(1500, quick=64)))
tasks = {"code": list(train_data), "kind": [of_kind(row) for row in train_data]}
tests = {"code": list(held_out), "kind": [of_kind(row) for row in held_out]}
rows_of = {task: encoded(rows, tokenizer) for task, rows in tasks.items()}
asked = [held_out[i] for i in range(3)]
prompts = [prompt_of(row) for row in asked]
before = generate(model, tokenizer, prompts, max_new_tokens=40)

attach(model, AdapterConfig("houlsby", bottleneck=16), seed=0, name="code")
attach(model, AdapterConfig("houlsby", bottleneck=16), seed=1, name="kind")
histories = {}
for task, length in {"code": steps(60, quick=3), "kind": steps(50, quick=3)}.items():
    set_adapter(model, task)
    print(f"{task}: {count_parameters(model)[0]:,} of {count_parameters(model)[1]:,} numbers train")
    histories[task] = train(model, rows_of[task], tokenizer, steps=length, lr=1e-2, batch_size=8, seed=0)
    if task == "code":
        code_then = logits(model)                 # to compare with, when the other task has been trained
set_adapter(model, "code")
memory = torch.equal(logits(model), code_then)
print("has training “kind” changed what “code” computes?", "no, not a bit" if memory else "yes")

# %%
show(histories["code"].plot("the adapter for code"), alt="Training loss of every step in grey and its running mean in "
     "blue: a steep fall in the first ten steps, then a slow one.")
answers = {}
for task in tasks:
    set_adapter(model, task)
    answers[task] = generate(model, tokenizer, prompts, max_new_tokens=60 if task == "code" else 8)
for i, prompt in enumerate(prompts):
    print("─" * 100 + "\n" + prompt.strip())
    for label, text in (("no adapter", before[i]), ("code", answers["code"][i]), ("kind", answers["kind"][i])):
        print(f"  [{label}]\n" + "\n".join("    " + line for line in text.strip().splitlines()[:6]))

# %% [markdown]
# So short a training teaches the form of an answer before it teaches what is right: chapter 03 counts functions that
# work. Here the question is another one: what does each adapter do to the *other* task? **Predict:** is the adapter for
# code better or worse than no adapter when the kind is asked for?

# %%
short = {task: rows[:steps(32, quick=8)] for task, rows in tests.items()}
matrix = {}
for acting in ("code", "kind"):
    set_adapter(model, acting)
    for task in short:
        matrix[acting, task] = held_out_loss(model, tokenizer, short[task])
detached = copy.deepcopy(plain)
for task in short:
    matrix["none", task] = held_out_loss(detached, tokenizer, short[task])
rows = [("adapter", "asked for code", "asked for the kind"), ("---",) * 3]
rows += [(acting, f"{matrix[acting, 'code']:.2f}", f"{matrix[acting, 'kind']:.2f}")
         for acting in ("none", "code", "kind")]
display(Markdown("Held-out loss (nats per answer token):\n\n" + "\n".join("| " + " | ".join(row) + " |"
                                                                          for row in rows)))

# %% [markdown]
# Each adapter is good at its own task, and at the other it is worse than no adapter at all: it was trained to answer in
# another way. So a request that is sent to the wrong adapter is lost. And the base model is untouched, so nothing can
# be forgotten (source 003's "perfect memory"), as long as you know which adapter to switch on.
#
# ## In one batch
#
# On a server, requests of several tasks arrive together, and one wants to answer them in one batch. The frozen matrices
# are the same for all rows; only the small $\delta$ differs from row to row.

# %% [markdown] exercise="switch-tasks"
# Write `switch(h, tasks, adapters)`.
#
# | argument | what it is |
# |---|---|
# | `h` | `[B, T, d]`: what a sublayer gives for $B$ rows |
# | `tasks` | a list of $B$ names, or `None` for a row that wants the base model |
# | `adapters` | a dict: name → `{"W_down": [m, d], "b_down": [m], "W_up": [d, m], "b_up": [d]}` |
# | *returns* | `[B, T, d]`: row $i$ through the adapter `tasks[i]`, in the order of `h` |
#
# *Why it matters:* this is how one model serves a hundred customers.

# %% exercise="switch-tasks"
def switch(h, tasks, adapters):
    """Row i of h [B, T, d] through the adapter that tasks[i] names (None: as it is)."""
    ### BEGIN SOLUTION
    out = h.clone()
    for name in {task for task in tasks if task is not None}:
        mine = [i for i, task in enumerate(tasks) if task == name]
        own = adapters[name]
        z = torch.relu(F.linear(h[mine], own["W_down"], own["b_down"]))
        out[mine] = h[mine] + F.linear(z, own["W_up"], own["b_up"])
    return out
    ### END SOLUTION

# %% check="switch-tasks"
check("switch-tasks", switch)

# %% [markdown] hint="switch-tasks" level="nudge"
# A loop over rows is right. Faster: a loop over the *tasks* that occur, each with all of its rows at once.

# %% [markdown] hint="switch-tasks" level="shape"
# `h[mine]` with a list of row numbers is `[len(mine), T, d]`. Start from a copy of `h`, and write the results back to
# the same rows: `out[mine] = ...`.

# %% [markdown] hint="switch-tasks" level="code"
# ```python
# out = h.clone()
# for name in set(tasks) - {None}:
#     mine = [i for i, task in enumerate(tasks) if task == name]
#     out[mine] = bottleneck(h[mine], **adapters[...])
# return out
# ```

# %% [markdown]
# The library's `routed` does this in every layer. One prompt, three rows, three ways to answer, one forward pass:

# %%
prompt = {"input_ids": [tokenizer.bos_token_id] + tokenizer(prompts[0], add_special_tokens=False)["input_ids"]}
batch = collate([prompt] * 3, tokenizer.pad_token_id)
who = ["kind", None, "code"]
settings = dict(max_new_tokens=40, do_sample=False, temperature=None, top_p=None, top_k=None,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id)
with torch.no_grad(), routed(model, who):
    together = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    texts = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **settings)
alone = []
for name in who:
    if name:
        set_adapter(model, name)
    with torch.no_grad():
        alone.append((model if name else detached)(input_ids=batch["input_ids"][:1]).logits)
route_error = ((together - torch.cat(alone)).abs().max() / together.abs().max()).item()
print(prompts[0])
for name, row in zip(who, texts):
    text = tokenizer.decode(row[batch["input_ids"].shape[1]:], skip_special_tokens=True).strip()
    print(f"[{name}]\n" + "\n".join("    " + line for line in text.splitlines()[:5]))
print(f"three rows in one batch against each alone: {route_error:.0e} of the largest logit apart")

# %% [markdown]
# Is that an argument *against LoRA*, as source 001 has it? LoRA, it says, would have to be merged and unmerged for each
# request, and it counts "when you cannot modify the base model" as a case for adapters. But nobody has to merge. The
# same `routed`, with two LoRA adapters that are kept apart:

# %%
lora_model = attach(copy.deepcopy(plain), LoRAConfig(r=8, target_modules=["q_proj", "v_proj"]), name="code")
attach(lora_model, LoRAConfig(r=8, target_modules=["q_proj", "v_proj"]), name="kind")
fill(lora_model, spread=0.05)
with torch.no_grad():
    with routed(lora_model, who):
        together = lora_model(input_ids=batch["input_ids"]).logits
    alone = []
    for name in who:
        if name:
            set_adapter(lora_model, name)
        alone.append((lora_model if name else detached)(input_ids=batch["input_ids"][:1]).logits)
lora_route = ((together - torch.cat(alone)).abs().max() / together.abs().max()).item()
left = {name: p for name, p in lora_model.named_parameters() if "base_layer" in name}
untouched = all(torch.equal(p, plain.get_parameter(name.replace(".base_layer", ""))) for name, p in left.items())
print(f"LoRA, three rows in one batch against each alone: {lora_route:.0e} apart; the base weights are untouched: "
      f"{untouched}")

# %% question="adapters-q-switch"

# %% [markdown]
# # Part 4 · What is a place worth?
#
# `pefttools/lab/adapter_places.py` trained each placement on the bundled model: $m = 16$, 40 steps, first at two
# learning rates with a seed and held-out rows that only serve to choose one, then with three other seeds. (Two rates
# are few: a method may have its best one outside. Chapter 08 takes five.) **Predict** an order before you look. Source
# 002 calls Houlsby's the best, and input-and-output-only the worst.

# %%
detach(model)
measured = {row["name"]: row for row in places.table()}
main = [row for name, row in measured.items() if "half" not in name]
show(pictures.places_figure(main), alt="Held-out loss against the count of trained numbers, three seeds each with mean "
     "and standard deviation. " + "; ".join(f"{r['name']}: {r['trained']:,} numbers, {r['end']:.3f} ± {r['sd']:.3f}"
                                            for r in main) + ".")
ranked = sorted(main, key=lambda row: row["end"])
display(Markdown(f"*Best: {ranked[0]['name']} ({ranked[0]['end']:.3f} ± {ranked[0]['sd']:.3f}); last: "
                 f"{ranked[-1]['name']} ({ranked[-1]['end']:.3f} ± {ranked[-1]['sd']:.3f}). The base model has "
                 f"{loss_base:.2f} on other held-out rows. Equal $m$ and equal steps, so not equal numbers of "
                 f"parameters: Houlsby's has twice as many adapters as Pfeiffer's.*"))

# %% [markdown]
# Two of these again, in small, on your machine:

# %%
quick_rows = encoded(train_data, tokenizer)
again = {name: [places.run(base, quick_rows, held_out, name, 1e-2, seed, steps=steps(16, quick=2))["end"]
                for seed in (10, 11)]
         for name in ("houlsby", "input and output")}
for name, ends in again.items():
    print(f"{name:>17}: held-out loss {' and '.join(f'{e:.2f}' for e in ends)} after {steps(16, quick=2)} steps, two "
          f"seeds")

# %% [markdown]
# ## The norms, too
#
# Houlsby et al. train the layer norms beside their adapters (source 003 mentions it): in the library
# `AdapterConfig("houlsby", ..., train_layer_norms=True)`. A norm's gain $\gamma$ is one number per feature, so that is
# cheap:

# %%
for config, label in ((AdapterConfig("houlsby", 16), "Houlsby"), (AdapterConfig("houlsby", 16, train_layer_norms=True),
                                                                  "Houlsby and norms"),
                      (LNTuningConfig(), "norms alone")):
    attach(model, config)
    print(f"{label:>18}: {count_parameters(model)[0]:,} numbers")
    detach(model)
with_norms, alone_norms, houlsby_row = measured["houlsby and norms"], measured["norms alone"], measured["houlsby"]
norm_gain = houlsby_row["end"] - with_norms["end"]
norm_noise = (houlsby_row["sd"] ** 2 + with_norms["sd"] ** 2) ** 0.5
print(f"held-out loss: Houlsby {houlsby_row['end']:.3f} ± {houlsby_row['sd']:.3f}, with the norms "
      f"{with_norms['end']:.3f} ± {with_norms['sd']:.3f}, norms alone {alone_norms['end']:.3f} ± "
      f"{alone_norms['sd']:.3f}")
print(f"the norms beside the adapters are worth {norm_gain:+.3f}; the seeds scatter by {norm_noise:.3f}")

# %% [markdown]
# ## Pruning the lower layers
#
# Houlsby et al. (section 3.6) took trained adapters out again, layer by layer, and found that the *lower* ones matter
# least: without those of layers 0 to 4 of BERT-base's twelve, the accuracy on MNLI hardly moved. Source 003 tells it.
# On our model of six layers, **predict:** which adapters can go?
#
# Train Houlsby adapters in all layers, then switch off those of layers $i$ to $j$ and measure:

# %%
attach(model, AdapterConfig("houlsby", bottleneck=16), seed=0)
train(model, rows_of["code"], tokenizer, steps=steps(40, quick=3), lr=1e-2, batch_size=8, seed=0, progress=False)
some = list(held_out.select(range(steps(24, quick=4))))
whole = held_out_loss(model, tokenizer, some)
L = model.config.num_hidden_layers
rise = [[None] * L for _ in range(L)]
for i in range(L):
    for j in range(i, L):
        off = [layer for name, layer in adapter_layers(model) if i <= int(name.split(".")[2]) <= j]
        for layer in off:
            layer.enabled = False
        rise[i][j] = held_out_loss(model, tokenizer, some) - whole
        for layer in off:
            layer.enabled = True
detach(model)
print(f"with all adapters the held-out loss is {whole:.2f}")

# %%
show(pictures.ablation_figure(rise), alt="A triangle of numbers: the rise of the held-out loss without the adapters of "
     "layers i to j. One layer alone, from the lowest to the highest: " + ", ".join(f"{rise[i][i]:+.2f}" for i in range(
         L)) + f". All taken out: {rise[0][L - 1]:+.2f}.")
single = [rise[i][i] for i in range(L)]
least, most = single.index(min(single)), single.index(max(single))
lower_half, upper_half = rise[0][L // 2 - 1], rise[L // 2][L - 1]
display(Markdown(f"*The diagonal is one layer. Of a single layer, the adapters of layer {least} are missed least "
                 f"({min(single):+.2f}) and those of layer {most} most ({max(single):+.2f}). Without the lower half: "
                 f"{lower_half:+.2f}, without the upper half: {upper_half:+.2f}.*"))

# %% [markdown]
# That takes out what was trained to be there. The fairer question is what happens if the lower layers *never had* any:
# `AdapterConfig("houlsby", drop_layers=[0, 1, 2])`. From the script, three seeds, first at the learning rate that was
# chosen for all six layers, then at three times that rate:

# %%
upper, lower = measured["houlsby, upper half"], measured["houlsby, lower half"]
half_gap = lower["end"] - upper["end"]
half_noise = (upper["sd"] ** 2 + lower["sd"] ** 2) ** 0.5
print(f"all six layers {houlsby_row['end']:.3f} ± {houlsby_row['sd']:.3f}; upper three only {upper['end']:.3f} ± "
      f"{upper['sd']:.3f}; lower three only {lower['end']:.3f} ± {lower['sd']:.3f}")
print(f"upper half against lower half: {abs(half_gap):.3f} in favour of the {'upper' if half_gap > 0 else 'lower'}; "
      f"the seeds scatter by {half_noise:.3f}")
hot = {name: [run["end"] for seed, run in places.results()[name]["0.03"].items() if int(seed) in places.SEEDS]
       for name in (upper["name"], lower["name"])}
print("at three times the learning rate (0.03), each seed:",
      "; ".join(f"{name} {', '.join(f'{end:.2f}' for end in ends)}" for name, ends in hot.items()))

# %% [markdown]
# At the first rate it makes no difference which half has the adapters. At the second the upper half gets better, and
# the lower half scatters: one of its three runs went off altogether. (Everything above a lower adapter reads what it
# changes.) So "focus on the upper layers" holds here as advice about robustness rather than about what can be learned.
#
# # Part 5 · What it costs in time
#
# Source 001 says that adapters cost "about 1–3 %". Table 1 of the LoRA paper has GPT-2 Medium at 20 to 30 % for one
# text of 128 tokens, and 2 to 3 % for 32 texts of 512, on a GPU. Its milliseconds, without adapters and with two kinds
# of them:

# %%
TABLE_1 = {"1 × 128": (19.8, 23.9, 25.8), "32 × 512": (1449.4, 1482.0, 1492.2)}       # none, one a layer, Houlsby's
paper_says = {work: [with_them / none - 1 for with_them in those] for work, (none, *those) in TABLE_1.items()}
for work, shares in paper_says.items():
    print(f"LoRA paper, table 1, {work}: adapters cost " + " and ".join(f"{share:.1%}" for share in shares))

# %% [markdown]
# Both sources can be right, because the cost has two parts:
#
# - **multiplications**: $2md$ for each adapter and token, a fixed share of the model's own;
# - **starting operations**: each matrix product, each addition has to be begun, whether it works on one token or on ten
#   thousand. This part does not grow with the work.
#
# So the share should *shrink* as batch × length grows. **Predict** it for one token and for 8 × 64. Merged LoRA leaves
# plain layers behind, and should cost nothing at any size.
#
# As in chapter 02 the variants take turns in random order, and the base model runs twice under two names (**A/A**):
# what differs by less than that band is noise. We count the *processor time* of this process on one thread, which other
# programs on the machine disturb less than the clock on the wall.

# %%
def take_turns(functions: dict, rounds: int) -> dict[str, list[float]]:
    """Run each function once a round, in random order. Returns the processor seconds of every round."""
    order, seconds = random.Random(0), {name: [] for name in functions}
    for number in range(rounds + 1):
        for name in order.sample(list(functions), len(functions)):
            began = time.process_time()
            functions[name]()
            if number:                                 # the first round warms up
                seconds[name].append(time.process_time() - began)
    return seconds


def forward(m, shape):
    ids = torch.full(shape, int(few["input_ids"][0, 1]))

    @torch.inference_mode()
    def run():
        m(input_ids=ids, use_cache=False)
    return run


def without_wrappers(m):
    """Merged, and the plain layers put back in place: what one would ship."""
    merge(m)
    for name, layer in list(adapter_layers(m)):
        m.set_submodule(name, layer.base_layer)
    return m


lora_everywhere = fill(attach(copy.deepcopy(plain), LoRAConfig(r=16, target_modules=["o_proj", "down_proj"])), 0.01)
variants = {"base": plain, "base again (A/A)": plain,
            "Houlsby": attach(copy.deepcopy(plain), AdapterConfig("houlsby", 16)),
            "Pfeiffer": attach(copy.deepcopy(plain), AdapterConfig("pfeiffer", 16)),
            "parallel": attach(copy.deepcopy(plain), AdapterConfig("parallel", 16)),
            "LoRA, not merged": lora_everywhere, "LoRA, merged": without_wrappers(copy.deepcopy(lora_everywhere)),
            "IA³, merged": without_wrappers(copy.deepcopy(ia3_model))}
shapes = {"1 × 1": (1, 1), "1 × 16": (1, 16), "1 × 64": (1, 64), "8 × 64": (8, 64)}
rounds = dict(zip(shapes, (steps(60, quick=4), steps(50, quick=4), steps(30, quick=3), steps(16, quick=2))))
threads = torch.get_num_threads()
torch.set_num_threads(1)
latency = {}
for name, shape in shapes.items():
    seconds = take_turns({label: forward(m, shape) for label, m in variants.items()}, rounds[name])
    latency[name] = {label: slowdown(seconds[label], seconds["base"]) for label in list(variants)[1:]}
torch.set_num_threads(threads)

# %%
show(pictures.latency_lines(latency), alt="Time relative to the base model for growing work. " + "; ".join(
     f"{work}: " + ", ".join(f"{k} {v[0]:.2f}" for k, v in row.items()) for work, row in latency.items()) + ".")
small, large = latency["1 × 1"], latency["8 × 64"]
extra = pictures.facts("houlsby", pictures.MODELS["the bundled model"], 16)["extra"]
aa = max(abs(row["base again (A/A)"][0] - 1) for row in latency.values())
display(Markdown(f"*Houlsby adapters: {small['Houlsby'][0]:.2f} × for one token, {large['Houlsby'][0]:.2f} × for 8 "
                 f"texts of 64. Merged LoRA: {small['LoRA, merged'][0]:.2f} × and {large['LoRA, merged'][0]:.2f} ×. "
                 f"The base model against itself is off by up to {aa:.2f}. By multiplications alone Houlsby's should "
                 f"cost {extra:.1%}; for Llama-3.2-1B with $m = 64$ it is "
                 f"{pictures.facts('houlsby', pictures.MODELS['Llama-3.2-1B'], 64)['extra']:.2%}.*"))

# %% [markdown]
# Two things to take along. LoRA that is *not* merged is no cheaper than adapters: it adds small products, too. And the
# parallel adapter's promise ("keeps the critical path short", source 002) is about hardware that works on both roads at
# once. On one thread, one thing comes after the other, and it costs about what Pfeiffer's costs: compare the lines.

# %% question="adapters-q-latency"

# %% [markdown]
# # Part 6 · A network that writes adapters
#
# Twenty tasks, twenty sets of adapters, and none learns from another. Mahabadi et al. 2021 turn it round (source 003,
# section 4): let **one** network, shared by all tasks, *write* the adapters. Asked for a task, a layer and a position
# in it (after attention or after the feed-forward), it gives the two matrices.
#
# $$a = W_2\,\mathrm{relu}(W_1\,[z_\tau;\, l_i;\, p_j] + b_1) + b_2, \qquad
# W_{down} = G_{down}\, a, \qquad W_{up} = G_{up}\, a$$
#
# | symbol | what it is | size | shared by |
# |---|---|---|---|
# | $z_\tau$ | embedding of task $\tau$ | $e$ | nobody: this *is* the task |
# | $l_i$, $p_j$ | embeddings of layer $i$ and position $j$ | $e$ each | all tasks |
# | $[z; l; p]$ | one after the other | $3e$ | |
# | $W_1$, $b_1$ | the first layer of a small network | hidden × $3e$, and hidden | all |
# | $W_2$, $b_2$ | its second layer | $e$ × hidden, and $e$ | all |
# | $a$ | the **address**: which adapter is asked for | $e$ | |
# | $G_{down}$, $G_{up}$ | write the matrices, row by row | $(m d) \times e$, $(d m) \times e$ | all |
#
# (Source 003 uses $d$ for the bottleneck here and $h$ for the model's width, a page after $m$ and $d$. It also says
# that $W^U, W^D$ are learned "for each layer": that is the paper's first version. The second, HyperFormer++, shares one
# network among all layers, and that is the one above. The paper's network writes biases and a layer norm in the same
# way; so does the library's.)

# %% [markdown] exercise="hyper-adapter"
# Write `hyper_adapter(z, l, p, W_1, b_1, W_2, b_2, G_down, G_up, m)`. The embeddings are `[e]`, `W_1` `[hidden, 3e]`,
# `W_2` `[e, hidden]`, `G_down` `[m·d, e]` and `G_up` `[d·m, e]`. Return `(W_down, W_up)`, of shapes `[m, d]` and
# `[d, m]`, each laid out row by row.
#
# *Why it matters:* networks that write the weights of other networks come back in many places; this is the smallest
# one.

# %% exercise="hyper-adapter"
def hyper_adapter(z, l, p, W_1, b_1, W_2, b_2, G_down, G_up, m):
    """The adapter (W_down [m, d], W_up [d, m]) for a task z, a layer l and a position p."""
    ### BEGIN SOLUTION
    address = torch.cat([z, l, p])                                    # [3e]
    address = W_2 @ torch.relu(W_1 @ address + b_1) + b_2             # [e]
    return (G_down @ address).view(m, -1), (G_up @ address).view(-1, m)
    ### END SOLUTION

# %% check="hyper-adapter"
check("hyper-adapter", hyper_adapter)

# %% [markdown] hint="hyper-adapter" level="nudge"
# First the address, then both matrices from it. The products with $G$ give long vectors; they are matrices once you say
# how many rows they have.

# %% [markdown] hint="hyper-adapter" level="shape"
# `torch.cat([z, l, p])` is `[3e]`, `W_1 @ ...` is `[hidden]`, the address `[e]`. `(G_down @ address)` has $m \cdot d$
# numbers: `.view(m, -1)` makes `[m, d]` of them.

# %% [markdown] hint="hyper-adapter" level="code"
# ```python
# address = W_2 @ torch.relu(W_1 @ torch.cat([...]) + ...) + ...
# return (G_down @ address).view(m, -1), ...
# ```

# %% [markdown]
# On the model: three tasks (lists, strings, numbers; all "write the function", about different things) train one
# network in turn. Then look: the network writes another adapter for every task and layer, and what it writes can be
# **folded** into plain adapters, for use.

# %%
hyper = HyperConfig(bottleneck=16, e=32, hidden=64)
families = {name: encoded(places.of_family(train_data, name), tokenizer) for name in places.KNOWN_TASKS}
for number, name in enumerate(families):
    attach(model, hyper, seed=number, name=name)
one_more = sum(p.numel() for p in adapter_parameters(model).values())
losses = places.train_jointly(model, tokenizer, families, steps(30, quick=3), lr=3e-3)
print(f"training loss: {sum(losses[:3]) / 3:.2f} in the first three steps, {sum(losses[-3:]) / 3:.2f} in the last "
      f"three")

frame = model.hyper_adapters
with torch.no_grad():
    written = {(task, site): frame.generated(site, {task: 1.0})["up.weight"] for task in families for site in (0, 1, 4)}
print("do two tasks get the same matrix in one layer?", torch.equal(written["lists", 0], written["strings", 0]),
      "    one task in two layers?", torch.equal(written["lists", 0], written["lists", 4]))
set_adapter(model, "strings")
as_network = logits(model)
fold(model)
fold_error = ((logits(model) - as_network).abs().max() / as_network.abs().max()).item()
folded_count = sum(p.numel() for p in adapter_parameters(model).values())
detach(model)
print(f"the network, its three tasks included: {one_more:,} numbers; folded for one task: {folded_count:,}; logits "
      f"differ by {fold_error:.0e}")

# %%
t5_hyper = {n: hyper_size(768, 24, 24, n, 64, 128) for n in (1, 8, 100)}
t5_plain = {n: n * 24 * 2 * bottleneck_size(768, 24) for n in t5_hyper}
display(Markdown("T5-base (24 layers, $d = 768$), $m = 24$, $e = 64$:\n\n| tasks | plain Houlsby adapters | one "
                 "hypernetwork |\n|---|---|---|\n" +
                 "\n".join(f"| {n} | {t5_plain[n]:,} | {t5_hyper[n]:,} |" for n in t5_hyper)))
print(f"one more task: {bottleneck_size(768, 24) * 48:,} numbers or "
      f"{hyper_size(768, 24, 24, 9, 64, 128) - t5_hyper[8]}")

# %% [markdown]
# For a single task the network is the larger of the two; with eight it is several times smaller. Source 003: "for each
# new task, the model only requires learning an additional task embedding". It *can* be done with that. Is it
# **enough**? The script trained a network on lists, strings and numbers (60 steps), and then gave it a fourth task,
# sorting. Three seeds, held-out loss on sorting. **Predict:** how near do 32 numbers come to an adapter of its own?

# %%
new = places.new_task()
labels = {"base": "the base model", "as lists": "the network, as if it were lists", "as strings": "… strings",
          "as numbers": "… numbers",
          "mean embedding": "… the mean of the three embeddings",
          "embedding trained": "**a new embedding, trained: 32 numbers**",
          "plain adapter": "a plain adapter of its own, as many steps"}
display(Markdown("| sorting, with | held-out loss |\n|---|---|\n" + "\n".join(
    f"| {label} | {new[name][0]:.2f} ± {new[name][1]:.2f} |" for name, label in labels.items())))
shared_gain = new["base"][0] - new["mean embedding"][0]
own_gain = new["base"][0] - new["plain adapter"][0]
tuned_gain = new["base"][0] - new["embedding trained"][0]
print(f"of what an adapter of its own gains, the network has {shared_gain / own_gain:.0%} before it has seen the task, "
      f"and {tuned_gain / own_gain:.0%} with the embedding trained")

# %% [markdown]
# So both halves of the claim are real, and neither is the whole: the tasks do share (a network that never saw sorting
# already helps with it; presumably with what all tasks have in common, the form of an answer), and 32 numbers add
# little to that, at least with three tasks to learn from. An embedding can only choose among the adapters that the
# network has learned to write.

# %% question="adapters-q-hyper"

# %% [markdown]
# # Against production
#
# Two libraries. **`peft`** has IA³ and layer-norm tuning, and no bottleneck adapter. **`adapters`** (AdapterHub) is the
# home of the bottleneck ones. Does it install beside the transformers of this course?

# %%
from peft import PeftType

bottlenecks = [kind.value for kind in PeftType if "BOTTLENECK" in kind.value or "HOULSBY" in kind.value]
print(f"peft {peft.__version__} has {len(PeftType)} methods; bottleneck adapters among them: {bottlenecks or 'none'}")
try:
    import adapters

    print("adapters", adapters.__version__, "is installed")
except Exception as error:
    print("adapters: not to be had here:", error)
try:
    AdapterConfig("houlby", reduction_factor=16)
except ValueError as error:
    print("source 002's config=\"houlby\":", error)

# %% [markdown]
# (Version 1.3.0 of `adapters` asks for transformers 4.57 and does not import beside version 5. In an environment of its
# own, source 002's lines would read `model.add_adapter("sst2", config=DoubleSeqBnConfig(reduction_factor=16))`:
# Houlsby's placement is called `DoubleSeqBnConfig` there, Pfeiffer's `SeqBnConfig`, the parallel one `ParBnConfig`. The
# reduction factor $d/m$ belongs to the configuration, and "houlby" is misspelt. The class that computes the bottleneck
# there, taken out of that package alone, gives the same numbers as ours: `tests/chapters/test_ch06.py` does that
# wherever the package's files are found.)
#
# So the bottleneck placements were held to hand algebra above. Now the two methods that peft has, with the same numbers
# in ours and theirs: logits, gradients, and logits after merging have to agree to $10^{-5}$ of the largest, or the cell
# stops.

# %%
WAYS = {"IA³": (IA3Config(), peft.IA3Config()), "layer-norm tuning": (LNTuningConfig(), peft.LNTuningConfig())}
peft_errors = {}
for name, (our_config, their_config) in WAYS.items():
    ours = fill(attach(copy.deepcopy(plain), our_config), spread=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(plain), their_config).eval()
    mine = trainable(ours)
    yours = {key.removeprefix("base_model.model."): p for key, p in theirs.named_parameters() if p.requires_grad}
    assert mine.keys() == yours.keys()                            # even the names are the same
    with torch.no_grad():
        for key, p in mine.items():
            yours[key].copy_(p)
    a, b = logits(ours), logits(theirs)
    for m in (ours, theirs):
        (loss_sum(m, few) / 100).backward()
    largest = max(p.grad.abs().max().item() for p in mine.values())
    gradient = max((mine[key].grad - yours[key].grad).abs().max().item() for key in mine) / largest
    merge(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.merge_adapter()
    peft_errors[name] = tuple(((x - y).abs().max() / a.abs().max()).item()
                              for x, y in ((a, b), (logits(ours), logits(theirs)))) + (gradient,)
    print(f"{name:>18}: {len(mine)} tensors; logits differ by {peft_errors[name][0]:.0e} of the largest, merged by "
          f"{peft_errors[name][1]:.0e}, gradients by {gradient:.0e}; the adapter moves logits by up to "
          f"{(a - logits(plain)).abs().max():.1f}")
    assert max(peft_errors[name]) <= 1e-5

# %% [markdown]
# ### Find the line
#
# Your `IA3Layer` in peft. The marked lines are the two cases of the table, at the input and at the output:

# %%
import peft.tuners.ia3.layer as source

forward_source, first_line = inspect.getsourcelines(source.Linear.forward)
marks = ("interm = (x * ia3_scaling)", "result = (result * ia3_scaling)")
found = [i for i, line in enumerate(forward_source) if any(mark in line for mark in marks)]
for i, line in enumerate(forward_source):
    print(f"{'→' if i in found else ' '} {first_line + i:5}  {line}", end="")
print(f"\npeft {peft.__version__}, {source.__name__.replace('.', '/')}.py")

# %% [markdown]
# | the code asks | because |
# |---|---|
# | `if self.disable_adapters:` | somebody wants the base model for a moment |
# | `elif self.merged:` | $l$ is in the weight already |
# | `for active_adapter in self.active_adapters:` | several may be on at once; their factors multiply |
# | `if self.is_feedforward:` | at the input, or at the output: your `at_input` |
# | `.to(previous_dtype)` | $l$ may be 32-bit beside a 16-bit model |
#
# **Go and look** (nothing to hand in): `unmerge` in the same file divides by $l + 10^{-8}$. What happens where training
# has brought an $l_i$ to zero? And what does our library do instead?
#
# <details><summary>Answer</summary>
#
# The row of $W$ was multiplied by zero, so it is gone, and no division brings it back. Our layers keep the original
# weight while they are merged, which costs memory and makes unmerging exact.
#
# </details>

# %%
layer = nn.Linear(3, 2)
kept = layer.weight.detach().clone()
ours = IA3Linear(copy.deepcopy(layer))
ours.add("default")
ours.active = {"default": 1.0}
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)),
                                 peft.IA3Config(target_modules=["0"], feedforward_modules=[]))
with torch.no_grad():
    ours.ia3_l["default"][0] = 0
    next(p for p in theirs.parameters() if p.requires_grad)[0] = 0
ours.merge()
ours.unmerge()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    theirs.merge_adapter()
    theirs.unmerge_adapter()
their_weight = next(p for n, p in theirs.named_parameters() if n.endswith("base_layer.weight"))
lost = {"ours": (ours.base_layer.weight - kept).abs().max().item(), "peft": (their_weight - kept).abs().max().item()}
print("after merge and unmerge with a factor of zero, a weight is off by at most:",
      {name: f"{v:.1e}" for name, v in lost.items()})

# %% [markdown]
# # The sources say, we measured
#
# The right columns are filled in by the code of this notebook.

# %%
def verdict(good: bool, right: str = "✓", wrong: str = "✗") -> str:
    return right if good else wrong


def apart(error: float) -> str:
    return f"{error:.0e}" if error else "0, bit for bit,"


noisy = aa > 0.1
row_of = {row["name"]: row for row in main}
bottleneck_rows = [row_of[n] for n in ("houlsby", "pfeiffer", "parallel", "bapna", "input and output")]
best_place, worst_place = (min(bottleneck_rows, key=lambda r: r["end"]), max(bottleneck_rows, key=lambda r: r["end"]))
rows = [
    ("source", "it says", "we measured", ""),
    ("---",) * 4,
    ("000", "$h^{final} = h + h^{adapter}$, 2048 → 64 → 2048, relu",
     f"one adapter: {one_000:,} numbers with its biases", "✓"),
    ("001", "$\\mathrm{Adapter}(x) = W_{up}\\,\\sigma(W_{down}\\,x)$ after the sublayer",
     f"without the way around the loss starts at {at_start['no way around']:.2f} instead of {loss_base:.2f}",
     "✗: h is missing"),
    ("001", "$2dr + r + d$ each, two in a layer; 33 M for $d = 4096$, $r = 64$, $L = 32$",
     f"{houlsby_7b:,} with biases", verdict(abs(houlsby_7b / 33.5e6 - 1) < 0.02, "✓", "✗")),
    ("003", "$2md + d + m$ added per layer", f"per *adapter*; Houlsby has two: {2 * bottleneck_size(1024, 64):,} in a "
                                             f"layer of BERT-large at "
     "$m = 64$", "✗ by a factor of 2"),
    ("003", "less than 1 % of the parameters", f"BERT-large, $m = 64$: {bert_count / size(bert_large):.1%}; $m = 8$: "
     f"{counted(bert_large, AdapterConfig('houlsby', 8)) / size(bert_large):.2%}", "depends on m"),
    ("004", "adapters train 1–5 %", f"Llama-3.2-1B, $m = 64$: {share_1b['houlsby']:.2%}", "✗ here: depends on m and d"),
    ("003", "near-identity start, σ = 0.01", f"loss {at_start['σ = 0.01'] - loss_base:+.4f}; σ = 0.5: "
                                             f"{at_start['σ = 0.5'] - loss_base:+.2f}",
     verdict(abs(at_start["σ = 0.01"] - loss_base) < 0.02)),
    ("002", "Bapna: after attention only", "in the paper after the whole layer, with a norm of its own "
     f"({count_1b['bapna']:,} in Llama-3.2-1B, $m = 64$; Pfeiffer {count_1b['pfeiffer']:,})", "✗"),
    ("002", "IA³ and a “Pfeiffer vector” are one method", f"Pfeiffer is a bottleneck ({count_1b['pfeiffer']:,}), IA³ "
     f"three vectors a layer ({count_1b['IA³']:,})", "✗"),
    ("002", "IA³: about 0.05 %", f"Llama-3.2-1B: {share_1b['IA³']:.3%}", verdict(share_1b["IA³"] > 3e-4, "✓",
                                                                                 "less, here")),
    ("002", "IA³ merges away at inference", f"merged against not merged: {ia3_error:.0e}", verdict(ia3_error < 1e-5)),
    ("the IA³ paper, against peft", "keys, values, inner activations",
     f"{len(queries)} of peft's {len(peft_ia3)} default families rescale "
     f"queries instead of keys or values, {len(fused)} a fused matrix", "paper ≠ default"),
    ("002", "Houlsby: below 3 %", f"{share_1b['houlsby']:.2%}", verdict(share_1b["houlsby"] < 0.03)),
    ("002", "Houlsby has the best quality", f"of the bottlenecks at $m = 16$, best: {best_place['name']} "
     f"{best_place['end']:.3f} ± {best_place['sd']:.3f}, with the most parameters",
     verdict(best_place["name"] == "houlsby", "✓ here", "not here")),
    ("002", "input/output only has the lowest", f"last of the bottlenecks: {worst_place['name']} "
                                                f"{worst_place['end']:.3f} ± {worst_place['sd']:.3f}",
     verdict(worst_place["name"] == "input and output", "✓ here", "not here")),
    ("002", "parallel keeps the critical path short", f"on one thread: {small['parallel'][0]:.2f} × and "
     f"{large['parallel'][0]:.2f} ×, Pfeiffer {small['Pfeiffer'][0]:.2f} × and {large['Pfeiffer'][0]:.2f} ×",
     "not on a CPU thread"),
    ("002, its code", "`config=\"houlby\", reduction_factor=16`", "misspelt; the factor belongs to the configuration",
     "✗"),
    ("003", "layer norms are trained, too", f"worth {norm_gain:+.3f}, the seeds scatter by {norm_noise:.3f}",
     verdict(norm_gain > norm_noise, "✓ here", "within the noise here")),
    ("003", "adapters of lower layers matter less", f"taken out after training: lower half {lower_half:+.2f}, upper "
     f"half {upper_half:+.2f}; never there: {upper['end']:.3f} (upper only), {lower['end']:.3f} (lower only), scatter "
     f"{half_noise:.3f}",
     verdict(lower_half < upper_half and half_gap > half_noise, "✓ here", "not so clear here")),
    ("001", "adapters cost 1–3 % of time", f"Houlsby {small['Houlsby'][0] - 1:+.0%} for one token, "
     f"{large['Houlsby'][0] - 1:+.0%} for 8 × 64 (A/A up to {aa:.0%})", "too noisy here" if noisy
     else verdict(small["Houlsby"][0] > large["Houlsby"][0], "depends on batch × length", "?")),
    ("001", "adapters cannot be merged", f"the best matrix is off by {merge_gap['relu']:.0%} with relu, "
                                         f"{merge_gap['identity']:.0e} without", "✓"),
    ("001, problem 4", "switching tasks: adapters, because LoRA has to be merged",
     f"rows of several tasks in one batch against each alone: adapters {apart(route_error)} and LoRA "
     f"{apart(lora_route)} apart", "holds against *merged* LoRA only"),
    ("003", "perfect memory of earlier tasks", f"the logits of “code”, before and after “kind” was trained: "
                                               f"{'equal, bit for bit' if memory else 'different'}",
     verdict(memory)),
    ("003", "a new task only needs an embedding", f"32 numbers: {new['embedding trained'][0]:.2f}, an adapter of its "
     f"own: {new['plain adapter'][0]:.2f}, base {new['base'][0]:.2f}", "possible, not as good"),
    ("003", "tasks share through the hypernetwork", f"a task that it never saw: {new['base'][0]:.2f} → "
                                                    f"{new['mean embedding'][0]:.2f}",
     verdict(new["mean embedding"][0] < new["base"][0])),
]
display(Markdown("\n".join("| " + " | ".join(row) + " |" for row in rows)))

# %% [markdown]
# ## Summary
#
# | | bottleneck adapters | IA³ | hypernetwork |
# |---|---|---|---|
# | what trains | $2md + d + m$ for each adapter | one factor for each key, value, inner feature | one network, and $e$ numbers per task |
# | at the start | $W_{up}$ zero (or all near zero): $y = h$ | all ones | what is written last is zero |
# | where | Houlsby 2 in a layer; Pfeiffer, parallel, Bapna 1; input/output 2 in all | 3 places in a layer | Houlsby's places |
# | merged into weights | no: the activation | yes | no; folded into plain adapters |
# | in use | much for one token, little for a large batch | nothing, merged | as adapters, once folded |
# | several tasks in a batch | yes (so can LoRA, not merged) | yes, not merged | that is what it is for |
#
# **Read**
#
# - Houlsby et al. 2019, [Parameter-Efficient Transfer Learning for NLP](https://arxiv.org/abs/1902.00751): section 2.1,
#   figure 2, and 3.6 (pruning, the start).
# - Bapna & Firat 2019, [Simple, Scalable Adaptation](https://arxiv.org/abs/1909.08478): figure 2.
# - Pfeiffer et al. 2021, [AdapterFusion](https://arxiv.org/abs/2005.00247): which of many variants.
# - He et al. 2022, [Towards a Unified View](https://arxiv.org/abs/2110.04366): table 1, adapters, prefixes and LoRA in
#   one formula.
# - Liu et al. 2022, [IA³](https://arxiv.org/abs/2205.05638): section 3.3.
# - Mahabadi et al. 2021, [HyperFormer](https://arxiv.org/abs/2106.04489): section 2.
# - `pefttools/adapters.py`, `pefttools/placements.py`, `pefttools/ia3.py`, `pefttools/hyper.py`;
#   `peft/tuners/ia3/layer.py`.
#
# **Next.** Chapter 07 leaves the layers alone, too, and puts trained positions in front of the text.
