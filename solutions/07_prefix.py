# ---
# title: Prefix and prompt tuning
# minutes: 90
# needs: [00_start, 02_lora]
# ---
# %% [markdown]
# LoRA changes weights. The methods of this chapter change **nothing in the model**: they put a few extra positions in
# front of the text, positions that no word stands for, and train those. One model can then serve a hundred tasks, even
# within one batch, and each task is a small table of numbers.
#
# **After this chapter you can**
#
# - write prompt tuning, and attention with a prefix, also for grouped-query attention, and say who sees whom;
# - count what trains for any model, and see why three of our sources print three different shares;
# - explain why a prefix has keys and values and no queries, and what it costs while the model is in use;
# - train a prefix through an MLP and fold the MLP away; write LLaMA-Adapter's gate, and say why it starts at zero;
# - choose a start for virtual tokens from measurements, and recognise the start that wastes nearly all of them.

# %%
import copy
import inspect
import math
import statistics
import warnings

import torch
import torch.nn.functional as F
from IPython.display import Markdown, display
from torch import nn

from pefttools.grading import case, check
from pefttools.inject import adapter_parameters, attach, count_parameters, detach, trainable
from pefttools.lab import (collate, encoded, generate, held_out_loss, load_base, load_data, loss_sum, prompt_of,
                           steps, train)
from pefttools.lab import virtual_starts as starts
from pefttools.llama_adapter import LlamaAdapterConfig
from pefttools.prefix import PrefixTuningConfig, prefix_count, split_prefix
from pefttools.prefix import prefix_attention as library_attention
from pefttools.prompt import PromptTuningConfig
from pefttools.ptuning import PTuningConfig
from pefttools.widgets import prefix as pictures
from pefttools.widgets import start as pictures_of_00
from pefttools.widgets.base import show
from pefttools.widgets.lora import slowdown

base = load_base("tiny")
model, tokenizer = base
print("ready: torch", torch.__version__)

# %% [markdown]
# ## The picture
#
# A **virtual token** is a position in front of the text that holds trained numbers instead of a word. There are three
# places to put those numbers:

# %%
show(pictures.where_picture(), alt="Three panels, layers upwards, positions to the right. Prompt tuning: three trained "
     "cells beside the embedded words, below all layers; above them everything is computed. Prefix tuning: trained "
     "keys and values at three positions in each of four layers. LLaMA-Adapter: three trained cells in the top two "
     "layers only, with a gate g between them and the words.")

# %% [markdown]
# *Orange trains, hatched is looked up, white is computed by the frozen model. Prompt tuning trains the input once;
# prefix tuning gives every layer its own virtual tokens; LLaMA-Adapter does so in the top layers, behind a gate $g$.*
#
# # Part 1 · Prompt tuning
#
# You know **prompts**: words in front of a question that change the answer. Words are rows of the embedding matrix. So
# a prompt made of words can only be made of *those* vectors. A **soft prompt** (Lester et al. 2021) may be any
# vectors, and is found by gradient descent:
#
# $$[\,p_1, \dots, p_P;\; e(x_1), \dots, e(x_T)\,] \;\to\; \text{the frozen model}$$
#
# | symbol | what it is | size | in training |
# |---|---|---|---|
# | $x_1 \dots x_T$ | the text, $T$ tokens | $T$ numbers | |
# | $e(x_t)$ | the embedding of a token | $d$, the model's width | frozen |
# | $p_1 \dots p_P$ | the soft prompt | $P \times d$ | trained |
# | $P$ | how many virtual tokens, 10 to 100 or so | one number | chosen |
#
# The input is now $P + T$ positions long. Two other tensors have to follow: the **attention mask** (1 where there is
# something to look at) and the **labels** (what should be predicted at each place, −100 for "nothing").

# %% [markdown] exercise="soft-prompt"
# Write `soft_prompt(embeds, attention_mask, labels, prompt)`.
#
# | argument | shape |
# |---|---|
# | `embeds` | `[B, T, d]`: the embedded words of $B$ rows |
# | `attention_mask`, `labels` | `[B, T]`, whole numbers |
# | `prompt` | `[P, d]`: one prompt, the same for every row |
# | *returns* | `(embeds, attention_mask, labels)`: `[B, P + T, d]`, `[B, P + T]`, `[B, P + T]` |
#
# The virtual tokens come first. Every word may look at them. Nothing is to be predicted at their places.
#
# *Why it matters:* this is all of prompt tuning. The rest is `loss.backward()`.

# %% exercise="soft-prompt"
def soft_prompt(embeds, attention_mask, labels, prompt):
    """P virtual tokens in front: returns (embeds [B, P + T, d], attention_mask [B, P + T], labels [B, P + T])."""
    ### BEGIN SOLUTION
    B, P = len(embeds), len(prompt)
    embeds = torch.cat([prompt.expand(B, -1, -1), embeds], dim=1)
    attention_mask = torch.cat([attention_mask.new_ones(B, P), attention_mask], dim=1)
    labels = torch.cat([labels.new_full((B, P), -100), labels], dim=1)
    return embeds, attention_mask, labels
    ### END SOLUTION

# %% check="soft-prompt"
check("soft-prompt", soft_prompt)

# %% [markdown] hint="soft-prompt" level="nudge"
# Three times the same move: make a block that is `P` wide, and join it in front along the positions (`dim=1`). Only
# what is in the block differs.

# %% [markdown] hint="soft-prompt" level="shape"
# `prompt.expand(B, -1, -1)` is `[B, P, d]`. `attention_mask.new_ones(B, P)` and `labels.new_full((B, P), ...)` make
# blocks of the right dtype.

# %% [markdown] hint="soft-prompt" level="code"
# ```python
# embeds = torch.cat([prompt.expand(B, -1, -1), embeds], dim=1)
# attention_mask = torch.cat([attention_mask.new_ones(B, P), ...], dim=...)
# labels = torch.cat([labels.new_full((B, P), ...), ...], dim=...)
# ```

# %% [markdown]
# Is a soft prompt really "like a prompt"? Take one that consists of the embeddings of real words. Then the model
# should do *exactly* what it does with those words in front. The library's `PromptTuningConfig(init="text")` starts
# like that:

# %%
held_out = load_data("held_out").shuffle(seed=0).select(range(steps(64, quick=16)))
few = collate(encoded(held_out.select(range(8)), tokenizer), tokenizer.pad_token_id)
real = few["attention_mask"].bool()
text_ids = tokenizer(starts.TEXT)["input_ids"]


@torch.no_grad()
def logits(m, tail: int = few["input_ids"].shape[1]) -> torch.Tensor:
    """[places, vocabulary] at the words of a few held-out rows; what stands in front of them is left out."""
    return m(input_ids=few["input_ids"], attention_mask=few["attention_mask"]).logits[:, -tail:][real]


with torch.no_grad():
    front = torch.tensor([text_ids]).expand(8, -1)
    as_words = model(input_ids=torch.cat([front, few["input_ids"]], 1),
                     attention_mask=torch.cat([torch.ones_like(front), few["attention_mask"]], 1)
                     ).logits[:, len(text_ids):][real]
plain_logits = logits(model)
attach(model, PromptTuningConfig(len(text_ids), init="text", text=starts.TEXT, tokenizer=tokenizer))
as_soft_prompt = logits(model)
detach(model)
print(f"the words as a soft prompt, against the words in front: at most {(as_soft_prompt - as_words).abs().max():.0e} "
      f"apart")
print(f"against no prompt at all: {(as_soft_prompt - plain_logits).abs().max():.1f}")

# %% question="prefix-q-labels"

# %% [markdown]
# # Part 2 · Prefix tuning
#
# A soft prompt acts through all the layers above it, but it is trained at the bottom only. **Prefix tuning** (Li &
# Liang 2021) gives each layer virtual tokens of its own. What do words take from the positions before them? In
# attention, each position offers a **key** (what it can be found by) and a **value** (what is then taken), and asks
# with a **query**. So a virtual token in a layer is a key and a value:
#
# $$o_t = \mathrm{softmax}\!\left(\frac{q_t\,[P_k;\,K_{\le t}]^\top}{\sqrt{d_h}}\right)[P_v;\,V_{\le t}]$$
#
# | symbol | what it is | size, per head | |
# |---|---|---|---|
# | $q_t$ | the query of word $t$ | $d_h$, the width of a head | computed |
# | $K_{\le t}$, $V_{\le t}$ | keys and values of the words up to $t$ | $t \times d_h$ each | computed |
# | $P_k$, $P_v$ | keys and values of the prefix | $P \times d_h$ each | **trained** |
# | $[P_k; K_{\le t}]$ | one below the other | $(P + t) \times d_h$ | |
# | $o_t$ | what the head gives word $t$ | $d_h$ | computed |
#
# Source 000 writes the same as $\mathrm{Attention}(Q, [P_K; K], [P_V; V])$. Who sees whom:

# %%
show(pictures.mask_picture(), alt="A grid of four queries by seven keys. The three columns of the prefix are orange, "
     "and every query may look at all of them. The four columns of the words are a triangle: each query looks at its "
     "own word and those before it.")

# %% [markdown]
# *The prefix stands before every word, so every word sees all of it. The causal triangle begins after it.*
#
# **By hand.** One head with $d_h = 4$, one word, one virtual token. The query is $q = (2, 0, 0, 0)$, the word's key is
# zero and its value is $8$ in every place. The prefix has the key $(\ln 3, 0, 0, 0)$ and the value $0$.
#
# 1. Scores, divided by $\sqrt{4} = 2$: prefix $2 \ln 3 / 2 = \ln 3$, word $0$.
# 2. Softmax: $e^{\ln 3} = 3$ and $e^0 = 1$, so the weights are $3/4$ and $1/4$.
# 3. Output: $\frac34 \cdot 0 + \frac14 \cdot 8 = 2$ in every place.
#
# Without the prefix it were 8. The word's own value has lost three quarters of its weight.

# %%
q = torch.tensor([2., 0, 0, 0]).view(1, 1, 1, 4)               # [B, H, T, d_h]
k, v = torch.zeros(1, 1, 1, 4), torch.full((1, 1, 1, 4), 8.)
P_k, P_v = torch.tensor([math.log(3), 0, 0, 0]).view(1, 1, 4), torch.zeros(1, 1, 4)     # [P, H, d_h]
by_hand = library_attention(q, k, v, P_k, P_v)
print("with the prefix:", by_hand.flatten().tolist(), "   without:",
      library_attention(q, k, v, P_k[:0], P_v[:0]).flatten().tolist())

# %% [markdown] exercise="prefix-attention"
# Write `prefix_attention(q, k, v, prefix_k, prefix_v)`.
#
# | argument | shape |
# |---|---|
# | `q`, `k`, `v` | `[B, H, T, d_h]`: $B$ rows, $H$ heads, $T$ words |
# | `prefix_k`, `prefix_v` | `[P, H, d_h]`, the same for every row |
# | *returns* | `[B, H, T, d_h]` |
#
# Every word sees the whole prefix, itself, and the words before it. The scale is $1/\sqrt{d_h}$.
#
# *Why it matters:* this is what happens in every layer. If the mask is wrong, training still "works", with a prefix
# that only the last words see.

# %% exercise="prefix-attention"
def prefix_attention(q, k, v, prefix_k, prefix_v):
    """Causal attention with P more keys and values in front.  q, k, v [B, H, T, d_h], prefix [P, H, d_h] → as q."""
    ### BEGIN SOLUTION
    B, H, T, d_h = q.shape
    P = len(prefix_k)
    K = torch.cat([prefix_k.transpose(0, 1).expand(B, -1, -1, -1), k], dim=2)      # [B, H, P + T, d_h]
    V = torch.cat([prefix_v.transpose(0, 1).expand(B, -1, -1, -1), v], dim=2)
    scores = q @ K.mT / math.sqrt(d_h)                                             # [B, H, T, P + T]
    hidden = F.pad(torch.ones(T, T, dtype=torch.bool).triu(1), (P, 0))             # False over the prefix
    return scores.masked_fill(hidden, -math.inf).softmax(dim=-1) @ V
    ### END SOLUTION

# %% check="prefix-attention"
check("prefix-attention", prefix_attention)

# %% [markdown] hint="prefix-attention" level="nudge"
# Plain causal attention, with longer keys and values. First bring the prefix into the shape `[B, H, P, d_h]`, then
# join; then think about the mask, which is `[T, P + T]` now and not square.

# %% [markdown] hint="prefix-attention" level="shape"
# `prefix_k.transpose(0, 1)` is `[H, P, d_h]`, and `.expand(B, -1, -1, -1)` gives each row one. Scores are
# `[B, H, T, P + T]`. `torch.ones(T, T, dtype=torch.bool).triu(1)` is True where a word must not look; the first `P`
# columns of the whole mask are False (`F.pad(..., (P, 0))` puts them there).

# %% [markdown] hint="prefix-attention" level="code"
# ```python
# K = torch.cat([prefix_k.transpose(0, 1).expand(B, -1, -1, -1), k], dim=2)
# V = ...
# scores = q @ K.mT / ...
# return scores.masked_fill(F.pad(..., (P, 0)), -math.inf).softmax(dim=...) @ V
# ```

# %% [markdown]
# (Red, and you do not see why? `case("prefix-attention", 1)` gives the inputs of the check's first case, to try your
# function on.)
#
# ## Why $K$ and $V$, and not $Q$?
#
# Source 001 says that a prefix changes what the words attend *to*, and not what they look *for*. That is right, and
# there is an even shorter answer. **Predict:** you add $P$ random queries, so that the virtual tokens ask as well. How
# much do the outputs at the *words* change? A lot, a little, or not at all?

# %%
rng = torch.Generator().manual_seed(0)
B, H, T, P, d_h = 2, 3, 5, 4, 8
q, k, v = (torch.randn(B, H, T, d_h, generator=rng) for _ in range(3))
P_q, P_k, P_v = (torch.randn(P, H, d_h, generator=rng) for _ in range(3))

Q, K, V = (torch.cat([p.transpose(0, 1).expand(B, -1, -1, -1), t], 2) for p, t in ((P_q, q), (P_k, k), (P_v, v)))
whole = F.scaled_dot_product_attention(Q, K, V, is_causal=True)       # [B, H, P + T, d_h]
difference = (whole[:, :, P:] - library_attention(q, k, v, P_k, P_v)).abs().max().item()
extra_queries = P
print(f"outputs: {whole.shape[2]} positions instead of {T}; at the {T} words they differ by {difference:.0e}")

# %% [markdown]
# Not at all. A query makes one output, its own. In a prefix nobody reads those outputs, because the next layer has
# virtual tokens of its own. So queries would be trained for nothing.

# %% question="prefix-q-why-not-q"

# %% [markdown]
# ## What the prefix gets, the words lose
#
# Prefix and words share one softmax. Let $\lambda_t$ be what the prefix gets of it: the sum of word $t$'s weights on
# the $P$ virtual tokens. Then the output falls apart into two (He et al. 2022):
#
# $$o_t = (1 - \lambda_t)\cdot\text{attention to the words alone} \;+\;
# \lambda_t\cdot\text{attention to the prefix alone}$$
#
# In the example by hand $\lambda = 3/4$: $\frac14 \cdot 8 + \frac34 \cdot 0 = 2$.

# %% [markdown] exercise="prefix-share"
# Write `prefix_share(q, k, prefix_k)`: $\lambda$ for every word and head. Shapes as above; returns `[B, H, T]`.
#
# *Why it matters:* one number says how far a prefix has taken over a head. You will look at it in the trained model.

# %% exercise="prefix-share"
def prefix_share(q, k, prefix_k):
    """λ: what the prefix gets of each word's attention.  q, k [B, H, T, d_h], prefix_k [P, H, d_h] → [B, H, T]"""
    ### BEGIN SOLUTION
    B, H, T, d_h = q.shape
    P = len(prefix_k)
    K = torch.cat([prefix_k.transpose(0, 1).expand(B, -1, -1, -1), k], dim=2)
    hidden = F.pad(torch.ones(T, T, dtype=torch.bool).triu(1), (P, 0))
    weights = (q @ K.mT / math.sqrt(d_h)).masked_fill(hidden, -math.inf).softmax(dim=-1)
    return weights[..., :P].sum(dim=-1)
    ### END SOLUTION

# %% check="prefix-share"
check("prefix-share", prefix_share)

# %% [markdown] hint="prefix-share" level="nudge"
# The weights are what you had in `prefix_attention` just before the product with the values. No values are needed
# here.

# %% [markdown] hint="prefix-share" level="shape"
# The weights are `[B, H, T, P + T]`; the first `P` columns are the prefix's. Add them up along the last dimension.

# %% [markdown] hint="prefix-share" level="code"
# `return weights[..., :P].sum(dim=-1)`

# %%
def share_of(q, k, P_k):
    """λ by the library's attention: values that are 1 on the prefix and 0 on the words."""
    ones = torch.ones_like(P_k)
    return library_attention(q, k, torch.zeros_like(k), P_k, ones)[..., 0]


lam = share_of(q, k, P_k)[..., None]
words_alone = F.scaled_dot_product_attention(q, k, v, is_causal=True)
prefix_alone = F.scaled_dot_product_attention(q, *(p.transpose(0, 1).expand(B, -1, -1, -1) for p in (P_k, P_v)))
mixture_error = ((1 - lam) * words_alone + lam * prefix_alone - library_attention(q, k, v, P_k, P_v)).abs().max().item()
print(f"mixture against attention with a prefix: at most {mixture_error:.0e} apart; λ here from {lam.min():.2f} to "
      f"{lam.max():.2f}")

# %% [markdown]
# Two things follow. Even a prefix of zeros is not "nothing": its keys have score 0, which is a score like any other, so
# it takes weight from the words. And a prefix never changes how words weigh *each other*: the ratio of two words'
# weights is the same with and without it. (That is the limit which source 001 puts as "it can only influence the model
# through attention patterns".)
#
# # Part 3 · Grouped queries, and counting
#
# In Llama 3 several query heads share one head of keys and values: $H$ heads ask, only $H_{kv}$ answer. The prefix
# consists of keys and values, so it has $H_{kv}$ heads, and each serves $H / H_{kv}$ *neighbouring* query heads: with
# $H = 4$ and $H_{kv} = 2$, key head 0 serves queries 0 and 1, key head 1 serves 2 and 3.
#
# A prefix is stored as one table, `[P, L · 2 · H_kv · d_h]`, a row for each virtual token ($L$ is the number of
# layers). The columns go layer by layer; within a layer first all keys, then all values; within those head by head:
#
# | layer 0, keys: head 0, head 1, … | layer 0, values: head 0, … | layer 1, keys | layer 1, values | … |
# |---|---|---|---|---|

# %% [markdown] exercise="prefix-for-gqa"
# Write `prefix_for_gqa(flat, layer, layers, heads, kv_heads, batch)`: take one layer's prefix out of the table, ready
# for attention with $H$ query heads.
#
# | argument | |
# |---|---|
# | `flat` | `[P, layers · 2 · kv_heads · d_h]`; $d_h$ follows from it |
# | `layer`, `layers` | which one (from 0), of how many |
# | `heads`, `kv_heads` | $H$ and $H_{kv}$; $H$ is a multiple of $H_{kv}$ |
# | `batch` | $B$ |
# | *returns* | `(K, V)`, each `[B, H, P, d_h]` |
#
# *Why it matters:* this is the layout of peft's files. A prefix with its heads in the wrong order has all the right
# shapes.

# %% exercise="prefix-for-gqa"
def prefix_for_gqa(flat, layer, layers, heads, kv_heads, batch):
    """One layer's keys and values out of the stored table, each [B, H, P, d_h]."""
    ### BEGIN SOLUTION
    P, width = flat.shape
    d_h = width // (layers * 2 * kv_heads)
    pair = flat.view(P, layers, 2, kv_heads, d_h)[:, layer]                # [P, 2, H_kv, d_h]
    K, V = (pair[:, i].transpose(0, 1) for i in (0, 1))                    # [H_kv, P, d_h]
    return tuple(t.repeat_interleave(heads // kv_heads, dim=0).expand(batch, -1, -1, -1) for t in (K, V))
    ### END SOLUTION

# %% check="prefix-for-gqa"
check("prefix-for-gqa", prefix_for_gqa)

# %% [markdown] hint="prefix-for-gqa" level="nudge"
# Three steps: give the columns their meaning (`view` with five axes), pick the layer, then bring the heads to the
# front and repeat them.

# %% [markdown] hint="prefix-for-gqa" level="shape"
# `flat.view(P, layers, 2, kv_heads, d_h)[:, layer]` is `[P, 2, kv_heads, d_h]`. Its two halves, transposed, are
# `[kv_heads, P, d_h]`. `repeat_interleave(n, dim=0)` gives 0, 0, 1, 1; `repeat` would give 0, 1, 0, 1.

# %% [markdown] hint="prefix-for-gqa" level="code"
# ```python
# d_h = flat.shape[1] // (layers * 2 * kv_heads)
# pair = flat.view(len(flat), layers, 2, kv_heads, d_h)[:, ...]
# K, V = (pair[:, i].transpose(0, 1).repeat_interleave(..., dim=0) for i in (0, 1))
# return K.expand(batch, -1, -1, -1), ...
# ```

# %% [markdown]
# ## How many numbers?
#
# - **Prompt tuning:** $P \cdot d$.
# - **Prefix tuning:** $P \cdot L \cdot 2 \cdot H_{kv} \cdot d_h$.
# - **Prefix tuning through an MLP** (part 5): the prefix is then what a small network says, and what trains is the
#   network *and its input*. The input is $P$ vectors as wide as one layer's keys, $H_{kv} d_h$; the first linear layer
#   has $h$ outputs (`hidden`), the second one $L \cdot 2 \cdot H_{kv} d_h$, both with a bias.
#
# **By hand** (source 001, problem 5): $P = 20$, $d = 4096$, $L = 40$, ordinary attention, so that $H_{kv} d_h = d$.
# Each layer has $20 \cdot 4096 = 81{,}920$ numbers for keys and as many for values. Forty layers: $6{,}553{,}600$.

# %% [markdown] exercise="count-virtual-parameters"
# Write `virtual_parameters(method, P, model, hidden=None)`. `method` is `"prompt"` or `"prefix"`; `model` is a dict
# with `layers`, `d_model`, `heads`, `kv_heads`, `head_dim`; with `hidden` (only for `"prefix"`) the prefix comes out of
# an MLP with that many hidden units. Return how many numbers **train**, as a whole number.
#
# *Why it matters:* three of our sources give three shares for this method, and after this you can say why.

# %% exercise="count-virtual-parameters"
def virtual_parameters(method: str, P: int, model: dict, hidden: int | None = None) -> int:
    """Trainable numbers of prompt tuning, prefix tuning, and prefix tuning through an MLP of width `hidden`."""
    ### BEGIN SOLUTION
    if method == "prompt":
        return P * model["d_model"]
    keys = model["kv_heads"] * model["head_dim"]
    out = model["layers"] * 2 * keys
    if hidden is None:
        return P * out
    return P * keys + (keys + 1) * hidden + (hidden + 1) * out
    ### END SOLUTION

# %% check="count-virtual-parameters"
check("count-virtual-parameters", virtual_parameters)

# %% [markdown] hint="count-virtual-parameters" level="nudge"
# Write down each trained tensor with its shape, and add up. `heads` is not needed for any of them.

# %% [markdown] hint="count-virtual-parameters" level="shape"
# With `keys = kv_heads * head_dim` and `out = layers * 2 * keys`: the prefix is `[P, out]`. The MLP's input is
# `[P, keys]`, its layers are `nn.Linear(keys, hidden)` and `nn.Linear(hidden, out)`, each with a bias.

# %% [markdown] hint="count-virtual-parameters" level="code"
# `return P * keys + (keys + 1) * hidden + (... + 1) * out`

# %% [markdown]
# ### Predict
#
# Llama-3.2-1B has $L = 16$, $d = 2048$, 32 query heads and 8 heads for keys and values, $d_h = 64$. How many numbers
# are a prefix of $P = 20$? Write your reckoning instead of `None`.

# %%
my_guess = None

# %%
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


def skeleton(cls, config):
    """The real model class as shapes without numbers (the meta device)."""
    with torch.device("meta"):
        return cls(config)


llama_1b = skeleton(LlamaForCausalLM, LlamaConfig(
    vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, tie_word_embeddings=True))
llama_13b = skeleton(LlamaForCausalLM, LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
                                                   num_attention_heads=40, vocab_size=32_000))
gpt2_medium = skeleton(GPT2LMHeadModel, GPT2Config(n_layer=24, n_embd=1024, n_head=16))


def size(m) -> int:
    return sum(p.numel() for p in m.parameters())


def counted(m, config) -> int:
    """Attach it for real, on a copy without numbers, and count what trains."""
    with torch.device("meta"):
        return sum(p.numel() for p in config.encoder(m).parameters())


prefix_1b = counted(llama_1b, PrefixTuningConfig(20))
mlp_1b = counted(llama_1b, PrefixTuningConfig(20, projection=True))
prompt_1b = counted(llama_1b, PromptTuningConfig(20, init="zero"))
as_if_d_model = 2 * 20 * 2048 * 16
medium = counted(gpt2_medium, PrefixTuningConfig(10))
problem_5 = prefix_count(20, 40, 1, 4096)
real_13b = counted(llama_13b, PrefixTuningConfig(20))
adapter_7b = 30 * 10 * 4096
print(pictures_of_00.compare_guess(my_guess, prefix_1b))

total_1b = size(llama_1b)
rows = [("source", "model", "it says", "counted"), ("---",) * 4,
        ("001, problem 5", "$P = 20$, $d = 4096$, $L = 40$, 13 billion", "6,553,600; 0.05 %",
         f"**{problem_5:,}**; {problem_5 / 13e9:.2%}"),
        ("–", "the same for the real 13B, whose width is 5120", "–",
         f"**{real_13b:,}**; {real_13b / size(llama_13b):.2%}"),
        ("001, section 5", "GPT-2 Medium, $P = 10$", "about 490 K", f"**{medium:,}**"),
        ("003", "LLaMA-Adapter, 7B: 10 tokens, 30 layers, width 4096", "1.2 M", f"**{adapter_7b:,}**"),
        ("000", "Llama-3.2-1B, $P = 20$", "$P_K$ of shape (20, 2048)",
         f"(20, {prefix_1b // 16 // 2 // 20}): **{prefix_1b:,}**, not {as_if_d_model:,}"),
        ("004", "prefix tuning of Llama-3.2-1B, $P = 20$", "1–2 %", f"{prefix_1b / total_1b:.3%}"),
        ("004", "the same through an MLP", "1–2 %", f"**{mlp_1b:,}**; {mlp_1b / total_1b:.2%}, while training"),
        ("004", "prompt tuning, $P = 20$", "below 0.1 %", f"**{prompt_1b:,}**; {prompt_1b / total_1b:.4%}")]
display(Markdown("\n".join("| " + " | ".join(row) + " |" for row in rows)))
length_for_1 = math.ceil(0.01 * total_1b / (prefix_1b / 20))
print(f"for 1 % of Llama-3.2-1B a prefix would have to be {length_for_1} tokens long")

# %% [markdown]
# So the share depends on three things that a source should state: the length, whether the keys are as wide as the
# model (they are not, with grouped queries), and whether the MLP is counted.

# %% question="prefix-q-gqa"

# %% [markdown]
# # Part 4 · On the real model
#
# How does a prefix get into a model whose code knows nothing of it? A model that generates keeps the keys and values of
# what it has read, its **cache**. A prefix is a cache that is $P$ positions long before the first word is read. So the
# library fills a cache and hands it over; no module is replaced.
#
# This suggests a start. Let the model read a real text, and take *its* keys and values as the prefix. Then the prefix
# does exactly what the text in front does:

# %%
attach(model, PrefixTuningConfig(len(text_ids), init="text", text=starts.TEXT, tokenizer=tokenizer))
as_prefix = logits(model)
detach(model)
text_error = (as_prefix - as_words).abs().max().item()
print(f"{starts.TEXT!r}: {len(text_ids)} tokens")
print(f"as a prefix, against the words in front: at most {text_error:.0e} apart")

# %% [markdown]
# Now train: 20 virtual tokens, started from the first 20 tokens of that text. How many numbers is that for the bundled
# model (6 layers, 2 heads of 64 for keys and values)? Work it out before you run the cell.

# %%
train_rows = encoded(load_data("train"), tokenizer)
length = steps(full=60, quick=3)
loss_base = held_out_loss(model, tokenizer, held_out)
asked = [held_out[i] for i in range(3)]
before = generate(model, tokenizer, [prompt_of(row) for row in asked], max_new_tokens=60)
story = held_out[3]["text"]

attach(model, PrefixTuningConfig(20), seed=0)
map_random, words = pictures.attention_of(model, tokenizer, story)
detach(model)
attach(model, PrefixTuningConfig(20, init="text", text=starts.TEXT, tokenizer=tokenizer), seed=0)
map_before, _ = pictures.attention_of(model, tokenizer, story)
loss_start = held_out_loss(model, tokenizer, held_out)
trained, total = count_parameters(model)
print(f"{trained:,} numbers train beside {total - trained:,} frozen ones: {trained / total:.2%}")
history = train(model, train_rows, tokenizer, steps=length, lr=0.3, batch_size=8, seed=0)
loss_prefix = held_out_loss(model, tokenizer, held_out)

# %%
show(history.plot("prefix tuning from a text"), alt="Training loss of every step in grey and its running mean in blue: "
     "it falls steeply at first and then more slowly.")
after = generate(model, tokenizer, [prompt_of(row) for row in asked], max_new_tokens=60)
for row, *texts in zip(asked, before, after):
    print("─" * 100 + "\n" + prompt_of(row).strip())
    for label, text in zip(("before", "after"), texts):
        print(f"  [{label}]\n" + "\n".join("    " + line for line in text.strip().splitlines()[:8]))
display(Markdown(f"*Held-out loss: {loss_base:.2f} for the base model, {loss_start:.2f} with the untrained prefix, "
                 f"**{loss_prefix:.2f}** after {length} steps.*"))

# %% [markdown]
# ## Look inside
#
# How much of its attention does a word give to the prefix? Each row is a word, each column something it looks at; the
# virtual tokens stand left of the orange line. The bars on the right are $\lambda$. **Questions to try:** is there a
# head that looks at hardly anything else? Does training move attention *to* the prefix or away from it? And how does an
# untrained random prefix compare?

# %%
map_after, _ = pictures.attention_of(model, tokenizer, story)
maps = {"after training": map_after, "before (from a text)": map_before, "random, untrained": map_random}
keep = min(len(words), 24)
P = map_after.shape[-1] - map_after.shape[-2]
maps = {name: m[:, :, :keep, :P + keep] for name, m in maps.items()}
explorer = pictures.attention_explorer(maps, words[:keep])

# %% [markdown]
# *Left of the line is what the prefix gets; the words share what is left. (It begins with the head that gives the
# prefix most.)* All heads at a glance:

# %%
by_head = {name: pictures.shares(m) for name, m in maps.items()}
mean_share = {name: statistics.mean(v for row in rows_ for v in row) for name, rows_ in by_head.items()}
show(pictures.share_figure(by_head), alt="Three tables of numbers, layers by heads: mean share of the prefix. Means: " +
     ", ".join(f"{name} {value:.2f}" for name, value in mean_share.items()) + ".")
upper = {name: statistics.mean(v for row in rows_[2:] for v in row) for name, rows_ in by_head.items()}
display(Markdown(f"*Mean share of the prefix: {mean_share['before (from a text)']:.0%} before training, "
                 f"{mean_share['after training']:.0%} after. An untrained random prefix gets "
                 f"{mean_share['random, untrained']:.0%}, and above layer 2 only {upper['random, untrained']:.1%}: "
                 f"hardly a query finds its keys. So it does little harm at the start, and little can be learned from "
                 f"it either.*"))

# %%
prefix_trained = copy.deepcopy(adapter_parameters(model))
detach(model)
print("after detach the model is the base model again:", held_out_loss(model, tokenizer, held_out) == loss_base)

# %% [markdown]
# # Part 5 · The start
#
# Li & Liang write that a prefix trained directly is unstable, so they train it through an MLP; and that with little
# data it helps to start from real words. peft has a comparison of methods of its own (MetaMathQA on Llama-3.2-3B,
# `method_comparison/MetaMathQA/results` in its repository; **their** numbers, not measured here). Each run is a file
# there, and some were run and published more than once. What we have read of them lies in ours, each with the commit
# that it is from. The last column is what is quoted of it elsewhere; 0.186, 0.057 and 0.343 are from publications that
# we do not have.

# %%
import csv
import json
from importlib.resources import files

PUBLISHED = files("pefttools.vram") / "published"
theirs = json.loads((PUBLISHED / "peft_accuracy.json").read_text(encoding="utf-8"))
setting, accuracy = {}, {}
for run in theirs["runs"]:
    setting[run["run"]] = run
    accuracy.setdefault(run["run"], []).append(run["accuracy"])
with (PUBLISHED / "vram_measured.csv").open(encoding="utf-8") as lines:
    for row in csv.DictReader(lines):                            # of two of the runs one more publication
        run = row["url_or_path"].rpartition("/")[2].removesuffix(".json").replace("--", "/")
        if run in accuracy:
            accuracy[run].append(float(row["notes"].rpartition("test acc=")[2]))

DEFAULT_PREFIX, ZERO_PREFIX, TEXT_PREFIX, DEFAULT_PROMPT, RATE_PROMPT, WORDS_PROMPT, LORA, FULL = accuracy
QUOTED = {DEFAULT_PREFIX: "0.186", TEXT_PREFIX: "0.416", ZERO_PREFIX: "0.358", DEFAULT_PROMPT: "0.057",
          WORDS_PROMPT: "0.343"}
lines = ["| run | tokens | starts from | learning rate | test accuracy | quoted |", "|---|---|---|---|---|---|"]
for run, found in accuracy.items():
    its = setting[run]
    lines.append(f"| {run} | {its['virtual_tokens'] or ''} | {its['start']} | {its['lr']:g} | "
                 f"{', '.join(f'{value:.3f}' for value in found)} | {QUOTED.get(run, '')} |")
display(Markdown("\n".join(lines)))
mean_of = {run: statistics.mean(found) for run, found in accuracy.items()}
again_apart = max(max(found) - min(found) for found in accuracy.values())
from_quoted = max(abs(float(said) - mean_of[run]) for run, said in QUOTED.items())
rate_share = (mean_of[RATE_PROMPT] - mean_of[DEFAULT_PROMPT]) / (mean_of[WORDS_PROMPT] - mean_of[DEFAULT_PROMPT])
luck = 1.96 * (0.4 * 0.6 / theirs["questions"]) ** 0.5
climbs = {"prefix": (DEFAULT_PREFIX, TEXT_PREFIX), "soft prompt": (DEFAULT_PROMPT, WORDS_PROMPT)}
for name, (worst, best) in climbs.items():
    print(f"{name}: {mean_of[best] - mean_of[worst]:+.3f} from the default to the best, from there to LoRA "
          f"{mean_of[LORA] - mean_of[best]:+.3f}, to full fine-tuning {mean_of[FULL] - mean_of[best]:+.3f}")
print(f"the same run, published again: up to {again_apart:.3f} apart; quoted: up to {from_quoted:.3f} from these")
print(f"an accuracy of 0.4 on {theirs['questions']:,} questions is known to ± {luck:.3f}")
print(f"of the soft prompt's gain {rate_share:.0%} is there with the learning rate alone, still from random numbers")

# %% [markdown]
# From the default to the best is further, for prefixes and for soft prompts, than from there to LoRA or to full
# fine-tuning. So how one starts and tunes matters more there than which of these methods one takes.
#
# Does the *start* make the difference? The default prefix has 200 tokens and a learning rate of 0.001, the one from a
# text has 50 and 0.005: three things have changed at once. The default soft prompt was trained at 0.0001, the best one
# at 0.001, and more than half of that gain is the rate's, as the last line above says. (Nor did the best one start
# from a text, as one may read of it, but from words drawn out of the vocabulary.) To know what a start does, change the
# start alone. And look at how far a run is from its own repetition before you trust a third digit.
#
# So at our scale `pefttools/lab/virtual_starts.py` trained each of several starts for 60 steps: first at several
# learning rates with a seed and held-out rows that only serve to choose one, then with three other seeds at the rate
# chosen. Its results are in the repository; here they are.

# %%
measured = {row["name"]: row for row in starts.table()}
groups = {"prompt tuning": [row for name, row in measured.items() if name.startswith(("prompt", "P-tuning"))],
          "prefix tuning": [row for name, row in measured.items() if name.startswith("prefix")]}
show(pictures.starts_figure(groups), alt="Held-out loss of each start, three seeds, mean and standard deviation. " +
     "; ".join(f"{name} {row['end']:.2f} ± {row['sd']:.2f}" for name, row in measured.items() if "gate" not in name)
     + ".")

# %% [markdown]
# *Small circles are seeds, the diamond is their mean, the bar their standard deviation. After tuning the learning rate,
# a prefix from a text and one from random numbers end at about the same place; one from zero does not.*
#
# And at a lower learning rate, which is what you have before you have tuned anything? The choosing seed alone, held-out
# loss (in nats, natural-log units, per token) after the same 60 steps:

# %%
found = starts.results()
for family in ("prompt", "prefix"):
    names = [name for name in found if name.startswith(family + ",")]
    rates = sorted({float(lr) for name in names for lr in found[name]})
    print(f"{'learning rate':>20}" + "".join(f"{lr:>9g}" for lr in rates))
    for name in names:
        ends = [found[name].get(f"{lr:g}", {}).get(str(starts.CHOOSE), {}).get("end") for lr in rates]
        print(f"{name:>20}" + "".join(f"{end:9.2f}" if end else f"{'–':>9}" for end in ends))
    print()


def gap(family: str, lr: str) -> float:
    """Held-out loss from random numbers minus that from a text, at one learning rate."""
    return (found[f"{family}, random"][lr][str(starts.CHOOSE)]["end"]
            - found[f"{family}, text"][lr][str(starts.CHOOSE)]["end"])


low, high = f"{starts.RATES['prefix'][0]:g}", f"{measured['prefix, random']['lr']:g}"
display(Markdown(f"*Prefix: a text is better than random numbers by **{gap('prefix', low):.2f}** nats at the learning "
                 f"rate {low}, and by **{gap('prefix', high):.2f}** at {high}, the best one for random numbers. A good "
                 f"start is worth most to whoever has not tuned the learning rate.*"))

# %% [markdown]
# ## The start that wastes the prefix
#
# One row of the figure should surprise you: **zero** is a start as good as any other for LoRA's $B$, and poor here.
# **Predict:** you start a prefix of 20 virtual tokens at zero and train it. How many *different* virtual tokens will
# you have at the end?

# %%
def rank_of_prefix(init: str, n: int) -> tuple[int, float]:
    """Train a few steps; how many independent rows has the prefix, and how far is the farthest row from the first?"""
    attach(model, PrefixTuningConfig(20, init=init), seed=0)
    train(model, train_rows, tokenizer, steps=n, lr=0.3, batch_size=8, seed=0, progress=False)
    flat = next(iter(adapter_parameters(model).values())).detach().clone()
    detach(model)
    return int(torch.linalg.matrix_rank(flat, rtol=1e-3)), ((flat - flat[0]).norm(dim=1).max() / flat[0].norm()).item()


alike = {init: rank_of_prefix(init, steps(6, quick=2)) for init in ("zero", "random")}
for init, (rank, spread) in alike.items():
    print(f"from {init:>6}: rank of the 20 rows {rank:2}; the farthest row differs from the first by {spread:.1e} of "
          f"its size")

# %% [markdown]
# One. Twenty equal virtual tokens get equal attention, so they get equal gradients, and stay equal for ever: it is one
# virtual token, counted twenty times. (LoRA's zero $B$ has no such trouble, because $A$ is random: somebody has to
# break the symmetry.)
#
# In peft's benchmark, by the way, a prefix from zero does *better* than the default random one (the table at the
# beginning of this part). But it was trained at five times the learning rate, 0.005. Look at our own table again: zero
# is behind random numbers up to a rate of 1, and at 3, which is too high for both, it is ahead. And the difference
# between one rate and the next is often larger than that between two starts.
#
# ### The re-run, in small
#
# Two of those rows once more, on your machine, with fewer steps and two seeds:

# %%
short = steps(16, quick=2)
few_rows = held_out.select(range(steps(32, quick=8)))
again = {name: [starts.run(base, train_rows, few_rows, name, 0.03, seed, steps=short)["end"] for seed in (10, 11)]
         for name in ("prompt, random", "prompt, text")}
for name, ends in again.items():
    print(f"{name}: held-out loss {' and '.join(f'{e:.2f}' for e in ends)} after {short} steps")
apart = statistics.mean(again["prompt, random"]) - statistics.mean(again["prompt, text"])
print(f"the text is ahead by {apart:.2f}")

# %% [markdown]
# ## Through an MLP, and folded away
#
# The paper's other remedy (section 4.3) is a **reparametrisation**. The prefix is not the parameter. A small network
# computes it:
#
# $$\text{prefix} = \tanh(E\,W_1^\top + b_1)\,W_2^\top + b_2, \qquad E\colon P \times H_{kv}d_h$$
#
# | symbol | size |
# |---|---|
# | $E$ | $P \times H_{kv} d_h$: one vector for each virtual token |
# | $W_1$, $b_1$ | $h \times H_{kv} d_h$, and $h$ |
# | $W_2$, $b_2$ | $(L \cdot 2 \cdot H_{kv} d_h) \times h$, and as many |
#
# The numbers of different layers now hang together, and one step of the optimizer moves all of them. When training is
# over, $E$ and the MLP are constants, and so is what they give. **Fold:** compute it once, keep it as the prefix,
# throw the rest away.

# %% [markdown] exercise="reparametrise"
# Write the class `ReparametrisedPrefix(E, W1, b1, W2, b2)`, an `nn.Module`:
#
# - all five tensors train; they are `[P, n]`, `[hidden, n]`, `[hidden]`, `[width, hidden]` and `[width]`, with
#   $n = H_{kv}d_h$ and `width` $= L \cdot 2 \cdot H_{kv}d_h$ in the table above (the check uses others);
# - `forward()` takes no argument and gives the prefix, `[P, width]`;
# - `fold()`: from then on the prefix itself is the **one** parameter, it still trains, and $E$ and the MLP are no
#   longer in the module (nor in its `state_dict`). The output stays what it was. Folding twice is folding once.
#
# *Why it matters:* this is why an adapter that trained millions of numbers can be a file of a few hundred thousand.

# %% exercise="reparametrise"
class ReparametrisedPrefix(nn.Module):
    """prefix = tanh(E W1ᵀ + b1) W2ᵀ + b2, and after fold() a plain parameter."""

    def __init__(self, E, W1, b1, W2, b2):
        super().__init__()
        ### BEGIN SOLUTION
        self.prefix = None
        self.mlp = nn.ParameterDict({"E": E, "W1": W1, "b1": b1, "W2": W2, "b2": b2})
        ### END SOLUTION

    def forward(self):
        """The prefix, [P, width]."""
        ### BEGIN SOLUTION
        if self.prefix is not None:
            return self.prefix
        hidden = torch.tanh(F.linear(self.mlp["E"], self.mlp["W1"], self.mlp["b1"]))
        return F.linear(hidden, self.mlp["W2"], self.mlp["b2"])
        ### END SOLUTION

    def fold(self):
        """Keep what the MLP says, forget the MLP."""
        ### BEGIN SOLUTION
        if self.prefix is None:
            self.prefix = nn.Parameter(self.forward().detach().clone())
            del self.mlp
        ### END SOLUTION

# %% check="reparametrise"
check("reparametrise", ReparametrisedPrefix)

# %% [markdown] hint="reparametrise" level="nudge"
# `fold` has three steps: compute, keep, delete, in this order. And it needs to know whether it has been done before.

# %% [markdown] hint="reparametrise" level="shape"
# `nn.Parameter(E)` makes a tensor train. `F.linear(x, W, b)` is `x @ W.T + b`. What you keep must be a new
# `nn.Parameter` of a tensor without history (`.detach()`); `del self.W1` takes a parameter out of the module.

# %% [markdown] hint="reparametrise" level="code"
# ```python
# def fold(self):
#     if not self.folded:
#         self.E = nn.Parameter(self.forward().detach())
#         self.folded = True
#         del self.W1, ...
# ```
# and `forward` returns `self.E` when folded.

# %% [markdown]
# On the real model, with the library's: train briefly through the MLP, fold, and compare.

# %%
attach(model, PrefixTuningConfig(20, projection=True), seed=0)
trained_mlp = count_parameters(model)[0]
train(model, train_rows, tokenizer, steps=steps(3, quick=1), lr=3e-3, batch_size=8, seed=0, progress=False)
unfolded = logits(model)
model.prompt_encoder["default"].fold()
fold_error = (logits(model) - unfolded).abs().max().item()
folded_count = count_parameters(model)[0]
detach(model)
print(f"trained {trained_mlp:,} numbers, folded into {folded_count:,}: {trained_mlp / folded_count:.1f} times fewer; "
      f"logits differ by {fold_error:.0e}")
mlp_row, plain_row = measured["prefix through an MLP"], measured["prefix, random"]
print(f"after 60 steps (run ahead, 3 seeds, the best learning rate of each): through the MLP {mlp_row['end']:.2f} ± "
      f"{mlp_row['sd']:.2f}, directly {plain_row['end']:.2f} ± {plain_row['sd']:.2f}")
print("by learning rate (the choosing seed):")
for name in ("prefix through an MLP", "prefix, random"):
    print(f"{name:>24}  " + "   ".join(f"{float(lr):g}: {runs[str(starts.CHOOSE)]['end']:.2f}"
                                       for lr, runs in found[name].items()))

# %% [markdown]
# So at our scale the MLP is not ahead, once each has its own learning rate. What it buys is robustness: through the MLP
# an ordinary learning rate such as 0.01 works, while the plain prefix wants one thirty times as high, which nobody
# would try first.
#
# ### P-tuning
#
# **P-tuning** (Liu et al. 2021) is the same idea for prompt tuning: the soft prompt is what a small network says, an
# MLP with ReLUs or an LSTM, and that is folded too.

# %%
attach(model, PTuningConfig(20), seed=0)
ptuning_count = count_parameters(model)[0]
model.prompt_encoder["default"].fold()
ptuning_folded = count_parameters(model)[0]
detach(model)
row, plain_row = measured["P-tuning (MLP)"], measured["prompt, random"]
print(f"P-tuning trains {ptuning_count:,} numbers; folded they are {ptuning_folded:,} = 20 · 256")
print(f"after 60 steps, the best learning rate of each: P-tuning {row['end']:.2f} ± {row['sd']:.2f}, a plain soft "
      f"prompt from random numbers {plain_row['end']:.2f} ± {plain_row['sd']:.2f}, from a text "
      f"{measured['prompt, text']['end']:.2f}")

# %% question="prefix-q-file"

# %% [markdown]
# # Part 6 · A gate that starts at zero
#
# LoRA starts as exactly the base model. A random prefix does not: it takes a part $\lambda$ of the attention, small as
# it may be, and puts noise in its place. **LLaMA-Adapter** (Zhang et al. 2023) gives the prefix a softmax of its own,
# and a *gate* before what comes out of it:
#
# $$o_t = \underbrace{\mathrm{softmax}\!\left(\frac{q_t K_{\le t}^\top}{\sqrt{d_h}}\right)V_{\le t}}_{\text{the words, as before}} \;+\; g\cdot\underbrace{\mathrm{softmax}\!\left(\frac{q_t P_k^\top}{\sqrt{d_h}}\right)P_v}_{\text{the prefix, apart}}$$
#
# with a trained number $g$ that starts at 0. **Two softmaxes**: what the prefix gets is not taken from the words. And
# its weights always add up to 1, whether it has anything to say or not: so it needs the gate. (In LLaMA-Adapter $P_k$
# and $P_v$ come from one trained vector per virtual token, sent through the layer's own frozen $W_k$ and $W_v$. The
# authors' code has a $g$ for each head and multiplies by $\tanh g$; peft has one $g$ for a layer, without the tanh.)

# %% [markdown] exercise="zero-init-gate"
# Write `gated_attention(q, k, v, prefix_k, prefix_v, gate)`. Shapes as in `prefix_attention`; `gate` is `[H]`, one
# number for each head, and multiplies as it is (no tanh). The words' part is causal.
#
# *Why it matters:* the check also looks at gate = 0. There the output has to be the base model's, and the gate has to
# get a gradient all the same.

# %% exercise="zero-init-gate"
def gated_attention(q, k, v, prefix_k, prefix_v, gate):
    """Causal attention to the words, plus gate times attention to the prefix.  gate [H] → [B, H, T, d_h]"""
    ### BEGIN SOLUTION
    T, d_h = q.shape[2:]
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    words = (q @ k.mT / math.sqrt(d_h)).masked_fill(hidden, -math.inf).softmax(dim=-1) @ v
    P_k, P_v = prefix_k.transpose(0, 1), prefix_v.transpose(0, 1)                  # [H, P, d_h]
    prefix = (q @ P_k.mT / math.sqrt(d_h)).softmax(dim=-1) @ P_v                   # [B, H, T, d_h]
    return words + gate[:, None, None] * prefix
    ### END SOLUTION

# %% check="zero-init-gate"
check("zero-init-gate", gated_attention)

# %% [markdown] hint="zero-init-gate" level="nudge"
# Two attentions, each with a softmax of its own; write them one after the other and add them up. The prefix's needs no
# mask.

# %% [markdown] hint="zero-init-gate" level="shape"
# `prefix_k.transpose(0, 1)` is `[H, P, d_h]`, which broadcasts over the batch: `q @ P_k.mT` is `[B, H, T, P]`. The gate
# has to stand at the heads: `gate[:, None, None]` is `[H, 1, 1]`.

# %% [markdown] hint="zero-init-gate" level="code"
# ```python
# words = (q @ k.mT / math.sqrt(d_h)).masked_fill(..., -math.inf).softmax(dim=-1) @ v
# prefix = (q @ ... / math.sqrt(d_h)).softmax(dim=-1) @ ...
# return words + ... * prefix
# ```

# %% [markdown]
# ### Predict
#
# We put LLaMA-Adapter into all six layers of the bundled model, with 10 random virtual tokens in each. What is the loss
# before training, with the gate at 0? And with the gate stuck at 1, that is, without a gate? And who gets a gradient in
# the first step?

# %%
gate_start = {}
for name, way in (("gate 0", "zero"), ("no gate", "none")):
    attach(model, LlamaAdapterConfig(10, layers=6), seed=0)
    starts.set_gates(model, way)
    gate_start[name] = held_out_loss(model, tokenizer, few_rows)
    (loss_sum(model, few) / (few["labels"] != -100).sum()).backward()
    for kind in ("gate", "prompt"):
        grads = [p.grad for n, p in adapter_parameters(model).items() if f"adaption_{kind}" in n and p.grad is not None]
        largest = f"{max(g.abs().max().item() for g in grads):.1e}" if grads else "none (it does not train)"
        print(f"{name:>8}: largest gradient of the {kind}: {largest}")
    detach(model)
loss_few = held_out_loss(model, tokenizer, few_rows)
print(f"held-out loss: base {loss_few:.4f}, gate 0 {gate_start['gate 0']:.4f}, no gate {gate_start['no gate']:.4f}")

# %% [markdown]
# With the gate at 0 it is the base model to the last digit, and in the first step only the gate learns, as $B$ does in
# LoRA. Without it the model starts out badly damaged. Does training make up for that? Three seeds each, run ahead, each
# at the learning rate that was best for *it*:

# %%
gate_curves = {name: starts.curves(name) for name in ("gate from 0", "gate from 1", "no gate")}
show(pictures.curves_figure(gate_curves, title="LLaMA-Adapter: the gate's start"),
     alt="Training loss over 60 steps, mean of "
     "three seeds with bands. " + "; ".join(f"{name} ends at a held-out loss of {measured[name]['end']:.2f}"
                                            for name in gate_curves))
for name in gate_curves:
    row = measured[name]
    print(f"{name:>12} (learning rate {row['lr']:g}): held-out loss {row['start']:.2f} → {row['end']:.2f} ± "
          f"{row['sd']:.2f}")
late, never = (measured[name]["end"] - measured["gate from 0"]["end"] for name in ("gate from 1", "no gate"))
display(Markdown(f"*After 60 steps the gate that started at 1 is still **{late:.2f}** nats behind the one that started "
                 f"at 0, and the method without a gate **{never:.2f}**. What is lost at the start is not made up for "
                 f"in a short run. (Line: mean of three seeds; band: lowest to highest.)*"))

# %%
gate_again = {name: starts.run(base, train_rows, few_rows, name, 0.03, 10, steps=short)["end"]
              for name in ("gate from 0", "no gate")}
print(f"in small, here, {short} steps:", {name: round(end, 2) for name, end in gate_again.items()})

# %% question="prefix-q-gate"

# %% [markdown]
# # Part 7 · What it costs while the model is in use
#
# Source 001 says "none" in its table and "always some overhead" two lines below. A prefix cannot be merged: it is
# input, and no weight does what it does. So there is something to pay. For each row of a batch the cache holds $P$ more
# positions, and each word looks at $P$ more columns. A soft prompt costs more: its $P$ positions run through the whole
# model, once per text.

# %%
def cache_bytes(m, ids) -> int:
    with torch.no_grad():
        cache = m(input_ids=ids, use_cache=True).past_key_values
    return sum(t.nelement() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


ids = few["input_ids"][:4, :1].repeat(1, 64)
variants = {}
for name, config in {"base": None, "base again (A/A)": None, "prefix, P = 20": PrefixTuningConfig(20),
                     "soft prompt, P = 20": PromptTuningConfig(20)}.items():
    variants[name] = model if config is None else attach(copy.deepcopy(model), config)
cache_size = {name: cache_bytes(m, ids) for name, m in variants.items()}
more = cache_size["prefix, P = 20"] - cache_size["base"]
assert cache_size["soft prompt, P = 20"] == cache_size["prefix, P = 20"]
print(f"cache of 4 rows × 64 tokens: {cache_size['base']:,} bytes; with either kind of 20 virtual tokens {more:,} more")
per_row_1b = 20 * 16 * 2 * (8 * 64) * 2             # P · L · keys and values · H_kv d_h · bytes of a number
print(f"Llama-3.2-1B in 16 bits, P = 20: {per_row_1b:,} bytes for each row of the batch")

# %%
import random
import time


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


@torch.inference_mode()
def forward(m):
    m(input_ids=ids)


threads = torch.get_num_threads()
torch.set_num_threads(1)                               # processor time of one thread: other programs disturb it less
times = take_turns({name: lambda m=m: forward(m) for name, m in variants.items()}, steps(30, quick=4))
torch.set_num_threads(threads)
cost = {name: slowdown(times[name], times["base"]) for name in list(times)[1:]}
for name, (ratio, low, high) in cost.items():
    print(f"{name:>20}: {ratio:.2f} × the base model's time (from {low:.2f} to {high:.2f})")

# %% [markdown]
# What one gets for it: **several tasks in one batch** (source 004). Each row of the cache may hold another prefix. Here
# are two rows, one with the prefix that you trained and one with a random one, against each of them alone:

# %%
from transformers import DynamicCache

flat_a = next(iter(prefix_trained.values())).detach()
flat_b = torch.randn(flat_a.shape, generator=torch.Generator().manual_seed(1))
sizes = (model.config.num_hidden_layers, model.config.num_key_value_heads, model.config.head_dim)


@torch.no_grad()
def with_prefixes(ids, *flats):
    """Row i of ids [B, T] reads with prefix i: one forward pass, one batch."""
    cache, P = DynamicCache(config=model.config), len(flats[0])
    for layer, pairs in enumerate(zip(*(split_prefix(flat, *sizes) for flat in flats))):
        # [B, H_kv, P, d_h]
        keys, values = (torch.stack([pair[i].transpose(0, 1) for pair in pairs]) for i in (0, 1))
        cache.update(keys, values, layer)
    places = torch.arange(P, P + ids.shape[1]).expand(len(ids), -1)
    return model(input_ids=ids, past_key_values=cache, position_ids=places).logits


pair = few["input_ids"][:2, :20]
together = with_prefixes(pair, flat_a, flat_b)
alone = torch.cat([with_prefixes(pair[:1], flat_a), with_prefixes(pair[1:], flat_b)])
batch_error = (together - alone).abs().max().item()
swapped = (with_prefixes(pair, flat_b, flat_a) - alone).abs().max().item()
print(f"two tasks in one batch, against each alone: at most {batch_error:.0e} apart (with the prefixes swapped: "
      f"{swapped:.0f})")

# %% question="prefix-q-cost"

# %% [markdown]
# # Against production
#
# The same in `peft`: prompt tuning, prefix tuning (with and without the MLP) and LLaMA-Adapter, which it calls
# *adaption prompt*. The same numbers in ours and theirs, then logits, gradients and greedy generation. Logits and
# gradients have to agree to $10^{-5}$ of the largest, or the cell stops.

# %%
import logging

# peft imports it, and it complains about missing extras
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

WAYS = {
    "prompt tuning": (PromptTuningConfig(12), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=12)),
    "prefix tuning": (PrefixTuningConfig(12), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=12)),
    "prefix tuning, MLP": (PrefixTuningConfig(12, projection=True, hidden=32),
                           peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=12, prefix_projection=True,
                                                   encoder_hidden_size=32)),
    "LLaMA-Adapter": (LlamaAdapterConfig(12, layers=4),
                      peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=12, adapter_layers=4)),
}
peft_errors = {}
for name, (our_config, their_config) in WAYS.items():
    ours = attach(copy.deepcopy(model), our_config, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(model), their_config).eval()
    rng = torch.Generator().manual_seed(2)
    mine, yours = list(trainable(ours).items()), [p for p in theirs.parameters() if p.requires_grad]
    assert [p.shape for _, p in mine] == [p.shape for p in yours]
    with torch.no_grad():
        for (key, p), other in zip(mine, yours):
            p.add_(0.3 * torch.randn(p.shape, generator=rng))        # gates and all: nothing stays at zero
            other.copy_(p)
    a, b = logits(ours), logits(theirs)
    for m in (ours, theirs):
        (loss_sum(m, few) / 100).backward()
    largest = max(p.grad.abs().max().item() for _, p in mine)
    gradient = max((p.grad - other.grad).abs().max().item() for (_, p), other in zip(mine, yours)) / largest
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        texts = [m.generate(input_ids=few["input_ids"][:1, :10], attention_mask=few["attention_mask"][:1, :10],
                            max_new_tokens=12,
                            do_sample=False, pad_token_id=tokenizer.pad_token_id) for m in (ours, theirs)]
    peft_errors[name] = ((a - b).abs().max().item() / a.abs().max().item(), gradient)
    print(f"{name:>18}: logits differ by {peft_errors[name][0]:.0e} of the largest, gradients by {gradient:.0e}; "
          f"the same text: {torch.equal(*texts)}; the adapter moves the logits by up to "
          f"{(a - plain_logits).abs().max():.1f}")
    assert max(peft_errors[name]) <= 1e-5 and torch.equal(*texts)

# %% [markdown]
# ### Find the line
#
# The step from the stored table to keys and values, your `prefix_for_gqa`, is in peft's `PeftModel.get_prompt`. (It
# does not repeat the heads: the model's attention does that, after the cache.)

# %%
from peft.peft_model import PeftModel

lines, first_line = inspect.getsourcelines(PeftModel.get_prompt)
marks = ("past_key_values.view(", "permute([2, 0, 3, 1, 4])", "DynamicCache(past_key_values)",
         "torch.cat([past_key_values",
         "prompts.repeat(batch_size", "embedding.weight.repeat(batch_size", "peft_config.num_layers * 2")
print(f"peft {peft.__version__}, peft/peft_model.py, get_prompt: {len(lines)} lines, of which:")
for number, line in enumerate(lines):
    if any(mark in line for mark in marks):
        print(f"  {first_line + number:5}  {line.rstrip()}")

# %% [markdown]
# | the code asks | because |
# |---|---|
# | `if peft_config.inference_mode:` | the file holds the folded prefix: take the table as it is, no MLP |
# | `num_transformer_submodules == 2` | an encoder–decoder: the prefix is doubled, and each layer takes its part |
# | `num_kv_shared_layers` | some models let several layers share one cache: only the first of them gets a prefix |
# | `transformers_lt_4_56` | older versions of transformers made a cache in another way |
# | `map_cache_to_layer_device_map` | layers on several GPUs: each layer's prefix has to be where the layer is |
#
# **Go and look** (nothing to hand in): `peft/tuners/prefix_tuning/model.py`. Which line is the `tanh`? What does
# `init_weights="zero"` set to zero when there is an MLP, and why is that not the trap of part 5?
#
# <details><summary>Answer</summary>
#
# Only the MLP's last layer. Its input $E$ is random, so the hidden vectors of the virtual tokens differ, and after the
# first step on $W_2$ the virtual tokens differ too. The prefix starts at zero and does not stay one token.
#
# </details>
#
# One difference is worth knowing. With a **batch padded on the left**, peft (0.21.2) ignores positions in prompt
# tuning, so the padding stands between the prompt and the words, and what a row generates depends on its neighbours.
# Ours shifts the positions instead. See it:

# %%
def last_logits(m, pad: int):
    """The logits after a short text that has `pad` padding tokens on its left."""
    text = few["input_ids"][:1, :10]
    ids = torch.cat([torch.full((1, pad), tokenizer.pad_token_id), text], 1)
    mask = torch.cat([torch.zeros(1, pad, dtype=torch.long), torch.ones_like(text)], 1)
    places = (mask.cumsum(1) - 1).clamp(min=0)                       # as generate() computes them
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return m(input_ids=ids, attention_mask=mask, position_ids=places).logits[0, -1]


ours = attach(copy.deepcopy(model), PromptTuningConfig(12), seed=1)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    theirs = peft.get_peft_model(copy.deepcopy(model), WAYS["prompt tuning"][1]).eval()
left = {name: (last_logits(m, 6) - last_logits(m, 0)).abs().max().item()
        for name, m in (("ours", ours), ("peft", theirs))}
print("six padding tokens on the left change the last logits by:", {name: f"{value:.0e}"
                                                                    for name, value in left.items()})

# %% [markdown]
# # The sources say, we measured
#
# The right columns are filled in by the code of this notebook.

# %%
def verdict(good: bool, right: str = "✓", wrong: str = "✗") -> str:
    return right if good else wrong


W = model.model.layers[0].self_attn
reach = int(torch.linalg.matrix_rank(torch.cat([W.k_proj.weight, W.v_proj.weight]).detach()))
noisy = abs(cost["base again (A/A)"][0] - 1) > 0.1
zero_row, random_row, text_row = (measured[f"prefix, {s}"] for s in ("zero", "random", "text"))
best_prefix, best_prompt = (min((row for name, row in measured.items() if name.startswith(kind + ",")),
                                key=lambda row: row["end"])
                            for kind in ("prefix", "prompt"))
rows = [
    ("source", "it says", "we measured", ""),
    ("---",) * 4,
    ("000", "$\\mathrm{Attention}(Q, [P_K; K], [P_V; V])$; the rest is unchanged",
     f"our layer against peft's: {peft_errors['prefix tuning'][0]:.0e}", "✓"),
    ("000", "$P_K, P_V$ have the shape (length, d_model)",
     f"(length, kv-heads · head_dim): for Llama-3.2-1B {prefix_1b // 640} columns, not 2048", "✗ with grouped queries"),
    ("001, problem 5", "6,553,600 numbers, 0.05 %", f"{problem_5:,}, {problem_5 / 13e9:.2%}; the real 13B is 5120 "
                                                    f"wide: {real_13b:,}",
     "✓, of another model"),
    ("001", "GPT-2 Medium, $p = 10$: about 490 K", f"{medium:,}", verdict(medium == 491_520)),
    ("004", "prefix tuning trains 1–2 %",
     f"Llama-3.2-1B, $P = 20$: {prefix_1b / total_1b:.3%}; with the MLP {mlp_1b / total_1b:.2%}; 1 % would be $P$ = "
     f"{length_for_1}",
     "depends on length, heads, MLP"),
    ("004", "prompt tuning trains below 0.1 %", f"{prompt_1b / total_1b:.4%}", verdict(prompt_1b / total_1b < 1e-3)),
    ("004", "prefix tuning performs better than prompt tuning",
     f"held-out loss of the best start, 20 virtual tokens: {best_prefix['end']:.2f} and {best_prompt['end']:.2f}; but "
     f"{trained:,} numbers against {20 * model.config.hidden_size:,}", verdict(best_prefix["end"] < best_prompt["end"],
                                                                               "✓ here", "not here")),
    ("004", "prompt tuning of small models is unstable, prefix tuning stable",
     f"standard deviation over {random_row['seeds']} seeds, from random numbers: prompt "
     f"{measured['prompt, random']['sd']:.3f}, prefix {random_row['sd']:.3f}",
     verdict(measured["prompt, random"]["sd"] > 2 * random_row["sd"], "✓ here", "not here")),
    ("001", "keys and values, not queries", f"{extra_queries} more queries change the words' outputs by "
                                            f"{difference:.0e}", verdict(difference < 1e-5)),
    ("001, its table", "inference overhead of prefix and prompt tuning: none",
     f"{more:,} more bytes of cache (4 rows, $P = 20$); time × {cost['prefix, P = 20'][0]:.2f} and "
     f"{cost['soft prompt, P = 20'][0]:.2f} (base against itself "
     f"{cost['base again (A/A)'][0]:.2f}{': too noisy a machine for times' if noisy else ''})", "✗"),
    ("001, below the table", "they cannot be merged and always add some overhead", "the same measurement", "✓"),
    ("003", "parameters are prepended to the hidden states of all layers",
     f"to keys and values. One hidden state of {model.config.hidden_size} numbers gives a key and a value through "
     f"$W_k$, $W_v$ (rank {reach} here); LLaMA-Adapter does it so", "not quite"),
    ("003", "optimising the prefix directly is unstable",
     f"at the chosen rate, 3 seeds: {random_row['end']:.2f} ± {random_row['sd']:.2f} directly, {mlp_row['end']:.2f} ± "
     f"{mlp_row['sd']:.2f} through an MLP", verdict(mlp_row["end"] < random_row["end"], "✓ here", "not here")),
    ("003", "LLaMA-Adapter: 1.2 M for the 7B", f"30 layers · 10 tokens · 4096 = {adapter_7b:,} (and the gates)", "✓"),
    ("003", "the adaption prompt is concatenated as a prefix", "its softmax is apart from the words'; else gate 0 were "
                                                               "not the base model",
     "half of it"),
    ("003", "the gate avoids noise early in training",
     f"loss before training {gate_start['gate 0']:.2f} with it, {gate_start['no gate']:.2f} without; after 60 steps "
     f"{measured['gate from 0']['end']:.2f} and {measured['no gate']['end']:.2f}",
     verdict(measured["gate from 0"]["end"] < measured["no gate"]["end"])),
    ("004", "task-specific prefixes allow batches across tasks", f"two tasks in a batch: {batch_error:.0e} from each "
                                                                 f"alone", "✓"),
    ("peft's benchmark (theirs)", "started from a text and tuned: prefix 0.186 → 0.416, prompt 0.057 → 0.343",
     f"their files, as we have them: prefix {mean_of[DEFAULT_PREFIX]:.3f} → {mean_of[TEXT_PREFIX]:.3f}, prompt "
     f"{mean_of[DEFAULT_PROMPT]:.3f} → {mean_of[WORDS_PROMPT]:.3f} (from words, not a text; rate alone "
     f"{mean_of[RATE_PROMPT]:.3f}). Our scale, held-out loss, rate chosen for each: prefix random "
     f"{random_row['end']:.2f}, text {text_row['end']:.2f}; prompt random {measured['prompt, random']['end']:.2f}, "
     f"text {measured['prompt, text']['end']:.2f}",
     verdict(text_row["end"] < random_row["end"] and measured["prompt, text"]["end"] < measured["prompt, random"][
         "end"], "✓ here, too",
             "in part")),
]
display(Markdown("\n".join("| " + " | ".join(row) + " |" for row in rows)))

# %% [markdown]
# ## Summary
#
# | | prompt tuning | prefix tuning | LLaMA-Adapter |
# |---|---|---|---|
# | what trains | $P$ input vectors, $P d$ | keys and values in every layer, $P L \cdot 2 H_{kv} d_h$ | $P$ vectors and a gate in the top layers |
# | who sees it | every word | every word, one softmax with the words | every word, a softmax of its own, times $g$ |
# | at the start | random, words, or a text | random, zero (do not), or a text's keys and values | the base model exactly: $g = 0$ |
# | meant to help | P-tuning: a network, folded | an MLP, folded | the gate |
# | did it, here? | no; a text as the start did | with an ordinary learning rate | yes, a lot |
# | in use | $P$ more positions through the model | $P$ more positions in the cache | a second, small attention |
# | merged into weights | no | no | no |
# | several tasks in one batch | yes | yes | not as it is |
#
# **Read**
#
# - Li & Liang 2021, [Prefix-Tuning](https://arxiv.org/abs/2101.00190): section 4 (method and MLP), 7.4 (the start).
# - Lester et al. 2021, [The Power of Scale for Parameter-Efficient Prompt Tuning](https://arxiv.org/abs/2104.08691):
#   figure 3.
# - Liu et al. 2021, [GPT Understands, Too](https://arxiv.org/abs/2103.10385): P-tuning.
# - He et al. 2022, [Towards a Unified View](https://arxiv.org/abs/2110.04366): the mixture with $\lambda$, and what
#   prefixes have in common with adapters.
# - Zhang et al. 2023, [LLaMA-Adapter](https://arxiv.org/abs/2303.16199): section 3.2, the gate.
# - `pefttools/prefix.py` and `pefttools/llama_adapter.py`, and `get_prompt` in `peft/peft_model.py`.
#
# **Next.** Chapter 08 goes back to LoRA: what DoRA, rsLoRA and LoRA+ change, and how to choose a rank.
