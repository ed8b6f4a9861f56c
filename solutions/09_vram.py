# ---
# title: Memory, and designing a configuration
# minutes: 100
# needs: [00_start, 02_lora, 03_finetune]
# ---
# %% [markdown]
# "CUDA out of memory" is how most first fine-tunes end, and the usual cure is to change settings at random until it
# stops. There is a better one. What a training step needs can be computed before it is run, term by term, to a few
# percent; and it can be *simulated*, to the byte. After this chapter you choose settings because you know what each of
# them costs.
#
# **After this chapter you can**
#
# - name everything that a training step puts on a GPU, say what each term grows with, and compute it by hand;
# - tell a GB from a GiB, and what is on the box of a card from what your tensors get;
# - predict a step's peak and see the prediction come true on your own machine;
# - say what checkpointing, accumulation, 8-bit and paged optimizers, 4-bit weights and several GPUs save, in numbers;
# - design a configuration for a given model, card and number of tasks.

# %%
import gc
import inspect
import logging
import os
import threading
import time
import warnings

import torch
from IPython.display import Markdown, display

from pefttools import inject, lab
from pefttools.bench.layer_memory import METHODS as MEASURED_METHODS
from pefttools.bench.layer_memory import kib_per_token_and_layer
from pefttools.bench.memory import Trace
from pefttools.grading import check
from pefttools.lora import LoRAConfig
from pefttools.vram import estimate, measure, plan, simulate
from pefttools.vram.gpus import GPUS
from pefttools.vram.presets import config_of, parameters_of_preset
from pefttools.vram.units import both, gb, gib, mib
from pefttools.widgets import start as pictures_of_00
from pefttools.widgets import vram as widgets
from pefttools.widgets import vram_pictures as pictures
from pefttools.widgets.base import show

warnings.filterwarnings("ignore")
os.environ["TRANSFORMERS_VERBOSITY"] = "error"   # transformers talks a lot; here we want to read our own lines
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
GiB, GB = 2**30, 10**9
quick = lab.steps(2, 1) == 1            # the test suite's short way through: same code, fewer of the long runs
print("ready: torch", torch.__version__, "on", torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU")


def table(*rows):
    """Rows of text as a Markdown table; the first one is the heading."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    display(Markdown("\n".join("| " + " | ".join(map(str, row)) + " |" for row in lines)))

# %% [markdown]
# ## Predict first
#
# Llama-3.2-1B has 1.24 billion parameters: 2.5 GB in 16 bits. You train LoRA on it, which learns about one percent of
# that, on 2 rows of 512 tokens. **How many GiB will the step need at its peak?** Write your guess (a number) and run
# both cells.

# %%
my_guess = None

# %%
one_step = simulate("llama-3.2-1b", "lora", batch=2, seq=512, r=16, targets="all-linear")
print(pictures_of_00.compare_guess(my_guess, one_step.total / GiB, "GiB"))
print(f"weights {gib(one_step.terms['weights'])}, of {gib(one_step.total)} at the peak")

# %% [markdown]
# More than half of it is not weights. Here is the whole step, allocation by allocation:

# %%
show(widgets.timeline_figure(one_step, "Llama-3.2-1B, LoRA on all linear layers, 2 × 512 tokens"),
     alt=widgets.timeline_alt(one_step, "Llama-3.2-1B with LoRA on all linear layers, 2 rows of 512 tokens"))

# %% [markdown]
# *Weights are there all the time. The forward pass puts layer upon layer on top, the loss adds a tower that lasts for
# a moment, and the backward pass takes it all down again. The peak is one moment, and what is there at that moment is
# what counts.*
#
# No GPU was needed for this picture. `simulate` runs the real training step of the real model class (transformers'
# `LlamaForCausalLM`, our LoRA, PyTorch's autograd, AdamW) on tensors that have a shape and no memory, and follows each
# allocation. This chapter takes the picture apart: one term after the other, each with a picture, a formula and an
# exercise. Then you put them together again, and let the formula and the simulator check each other.

# %% [markdown]
# # The card: what is on the box, and what you get
#
# ### GB and GiB
#
# | unit | bytes | who counts in it |
# |---|---|---|
# | 1 GB | $10^9$ = 1,000,000,000 | papers, disks, the box of a GPU (but see below), this course's sources |
# | 1 GiB | $2^{30}$ = 1,073,741,824 | torch (it prints "GiB"), `nvidia-smi` (in MiB = $2^{20}$), most tables of measurements |
#
# They differ by 7 %. Memory chips come in powers of two, so the "16 GB" of a T4 are 16 *GiB* of chips. You do not get
# them all:

# %%
some = ["t4", "l4", "rtx-3090", "rtx-4090", "a100-40", "l40s", "a100-80"]
cards = {GPUS[name].name: GPUS[name] for name in some}
show(pictures.card_picture({name: int(card.sold.split()[0]) * GiB for name, card in cards.items()},
                           {name: card.usable for name, card in cards.items()},
                           {name: card.context for name, card in cards.items()}),
     alt="For each GPU a bar: what is left for tensors, CUDA's context, and what error correction, driver and firmware take. "
         + "; ".join(f"{name}, sold as {card.sold}: {card.free_for_torch / GiB:.1f} GiB for tensors"
                     for name, card in cards.items()))
t4 = GPUS["t4"]
print(f"A T4: torch reports {both(t4.usable, 2)}; for tensors about {both(t4.free_for_torch, 2)}")

# %% [markdown]
# *Cards that keep their error correction in the same chips (T4, L4, L40S) lose a sixteenth to it, and the driver takes
# its share from all. Then CUDA itself, the **context**, takes a few hundred MiB before your first tensor. No counter
# of torch shows that one; `nvidia-smi` does.*
#
# And one more cut: torch's allocator takes memory from the driver in large **segments**, hands it out in **blocks** of
# multiples of 512 bytes, and cannot always use a hole again. What it holds (**reserved**) is a little more than what
# is in use (**allocated**):

# %%
print(f"the step above: allocated {gib(one_step.total, 2)}, reserved {gib(one_step.reserved, 2)}, with the context "
      f"{gib(one_step.device, 2)}")

# %% question="vram-q-units"

# %% [markdown]
# # Term 1 · Weights
#
# 16-bit weights cost 2 bytes each, float32 ones 4. What do 4-bit weights cost? Not half a byte:

# %%
show(pictures.block_picture(),
     alt="A block of 64 weights, in bits: 1024 in 16 bits; in NF4 256 for the codes and 32 for one scale, 4.5 bits a weight; "
         "with double quantization 256 for the codes, 8 for the scale and an eighth of a bit for the scale of scales, "
         "4.127 bits a weight.")

# %% [markdown]
# *A code of 4 bits says which of 16 levels a weight is nearest to. It means nothing without the scale of its block
# (absmax), a float32 for 64 weights. Double quantization writes the scales in 8 bits, with a float32 scale for each
# 256 of them.*
#
# So with $n_\ell$ weights in the linear layers of the blocks, and $n_o$ others (embedding, head, norms):
#
# $$\text{NF4:}\quad n_\ell \cdot \tfrac18\left(4 + \tfrac{32}{64}\right) + 2\,n_o \qquad\qquad
# \text{NF4 + DQ:}\quad n_\ell \cdot \tfrac18\left(4 + \tfrac{8}{64} + \tfrac{32}{64 \cdot 256}\right) + 2\,n_o$$
#
# Only linear layers inside the blocks are quantized. Embedding, head and norms stay in 16 bits, and where the head is
# **tied** to the embedding (Llama-3.2-1B and 3B) that matrix is there once.

# %% [markdown] exercise="weight-bytes"
# Write `weight_bytes(linear, other, kind)`: `linear` weights in the blocks' linear layers, `other` elsewhere, `kind`
# one of `"float32"`, `"bfloat16"`, `"nf4"`, `"nf4-dq"`. For the first two all weights have that type; for the other
# two `other` has 16 bits. Return bytes. (`linear` is always a multiple of 64 · 256, so nothing has to be rounded.)
#
# *Why it matters:* this is the part of the bill that is due before anything has happened.

# %% exercise="weight-bytes"
def weight_bytes(linear, other, kind):
    """Bytes of a model with `linear` weights in its blocks' linear layers and `other` ones elsewhere."""
    ### BEGIN SOLUTION
    if kind == "float32":
        return 4 * (linear + other)
    bits = {"bfloat16": 16, "nf4": 4 + 32 / 64, "nf4-dq": 4 + 8 / 64 + 32 / (64 * 256)}[kind]
    return linear * bits / 8 + 2 * other
    ### END SOLUTION

# %% check="weight-bytes"
check("weight-bytes", weight_bytes)

# %% [markdown] hint="weight-bytes" level="nudge"
# How many bits does one weight in a linear layer cost, in each of the four kinds, scales included?

# %% [markdown] hint="weight-bytes" level="shape"
# 32, 16, 4 + 32/64, and 4 + 8/64 + 32/(64·256) bits. Eight bits make a byte. The others cost 4 bytes in float32 and 2
# otherwise.

# %% [markdown] hint="weight-bytes" level="code"
# `bits = {"bfloat16": 16, "nf4": …, "nf4-dq": …}[kind]` and `return linear * bits / 8 + 2 * other`, after an `if` for
# float32.

# %% [markdown]
# ### The sources say: 70B is 140 GB, 35 GB in 4 bits
#
# On the shapes of real models (published configurations, counted on the meta device):

# %%
from pefttools.vram.presets import meta_model


def split(name):
    """(weights in the linear layers of the blocks, all others), tied ones once."""
    model = meta_model(config_of(name))
    linear = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and p.dim() == 2)
    return linear, sum(p.numel() for p in model.parameters()) - linear


BITS = {"bfloat16": 16, "nf4": 4.5, "nf4-dq": 4 + 8 / 64 + 32 / (64 * 256)}
sizes = {}
rows = [["model", "parameters", "of them not quantized", "bfloat16", "half a byte each", "NF4", "NF4 + DQ"]]
for name in ("llama-3.2-1b", "llama-2-7b", "llama-3.1-8b", "llama-2-13b", "llama-65b", "llama-2-70b"):
    linear, other = split(name)
    sizes[name] = {kind: linear * bits / 8 + 2 * other for kind, bits in BITS.items()}
    rows.append([name, f"{linear + other:,}", f"{other / (linear + other):.1%}", gb(sizes[name]["bfloat16"]),
                 gb((linear + other) / 2), gb(sizes[name]["nf4"]), gb(sizes[name]["nf4-dq"])])
table(*rows)

# %%
short = {name: 1 - sum(split(name)) / 2 / sizes[name]["nf4-dq"] for name in ("llama-3.2-1b", "llama-2-70b")}
display(Markdown(f"“Half a byte” is {short['llama-3.2-1b']:.0%} too little for the 1B model, whose embedding is a fifth of it, and "
                 f"{short['llama-2-70b']:.0%} too little for 70B, double quantization included."))

# %% [markdown]
# So the 24 GB card that source 001 fine-tunes a 70B model on is too small for its *weights*, and by a lot.

# %% question="vram-q-dequantize"

# %% [markdown]
# # Term 2 · What trains
#
# A frozen number is only there. A number that trains brings company: its gradient, and what the optimizer remembers of
# it.

# %%
recipes = {
    "adapter in float32, AdamW": {"weight": 4, "gradient": 4, "moments": 8},
    "full, mixed precision": {"weight": 2, "float32 master weight": 4, "gradient": 2, "moments": 8},
    "full, 16-bit weights, float32 moments (001)": {"weight": 2, "gradient": 2, "moments": 8},
    "full, everything in bfloat16": {"weight": 2, "gradient": 2, "moments": 4},
    "adapter in float32, 8-bit AdamW": {"weight": 4, "gradient": 4, "moments": 2 * (1 + 4 / 256)},
    "adapter in float32, plain SGD": {"weight": 4, "gradient": 4},
}
show(pictures.trained_picture(recipes),
     alt="Bytes for each number that trains: " + "; ".join(f"{name}: {sum(parts.values()):.4g}" for name, parts in recipes.items()))

# %% [markdown]
# *AdamW's two moments (running means of the gradient and of its square) are the largest share. "12 bytes per
# parameter" and "16 bytes per parameter" are both right, for different recipes: say which one you count.*
#
# PyTorch's AdamW makes its moments in the dtype of the parameter. bitsandbytes' 8-bit AdamW keeps each in one byte,
# with a float32 scale for every block of 256, but leaves tensors of fewer than 4,096 numbers in float32. Adafactor
# does not keep the second moment of a matrix at all, only its row means and its column means; of a vector, which has no
# rows and columns, it keeps it whole. What Adafactor keeps is float32, whatever the parameter is. Plain SGD remembers
# nothing.

# %% [markdown] exercise="optimizer-bytes"
# Write `optimizer_bytes(shapes, dtype_bytes, optimizer)`: the bytes of *state* that the optimizer keeps for trained
# tensors of these shapes (a list of tuples, one or two numbers each). `dtype_bytes` is the size of one number of the
# parameters (2 or 4). `optimizer` is `"adamw"`, `"adamw_8bit"`, `"adafactor"` or `"sgd"`, as described above.
#
# Neither weights nor gradients count here: only what the optimizer remembers.
#
# *Why it matters:* for a full fine-tune this is the largest term, and the one you can shrink without touching the
# model.

# %% exercise="optimizer-bytes"
def optimizer_bytes(shapes, dtype_bytes, optimizer):
    """Bytes of optimizer state for trained tensors of these shapes."""
    ### BEGIN SOLUTION
    total = 0
    for shape in shapes:
        n = 1
        for size in shape:
            n *= size
        if optimizer == "adamw":
            total += 2 * n * dtype_bytes
        elif optimizer == "adamw_8bit":
            blocks = -(-n // 256)                             # rounded up
            total += 2 * 4 * n if n < 4096 else 2 * (n + 4 * blocks)
        elif optimizer == "adafactor":
            total += 4 * (sum(shape) if len(shape) == 2 else n)
    return total
    ### END SOLUTION

# %% check="optimizer-bytes"
check("optimizer-bytes", optimizer_bytes)

# %% [markdown] hint="optimizer-bytes" level="nudge"
# Decide tensor by tensor: each has its own moments, its own blocks, and is small or not for itself.

# %% [markdown] hint="optimizer-bytes" level="shape"
# For n numbers in a tensor: AdamW 2·n·dtype_bytes. In 8 bits: 2·(n + 4·blocks), blocks = n/256 rounded up, if n ≥
# 4096; else 2·4·n. Adafactor of [rows, columns]: 4·(rows + columns); of [n]: 4·n. SGD: 0.

# %% [markdown] hint="optimizer-bytes" level="code"
# `-(-n // 256)` rounds up. `math.prod(shape)` is n. The loop: `for shape in shapes:` with an `if`/`elif` per
# optimizer, adding to `total`.

# %% [markdown]
# Do real optimizers agree? We let four of them take one step on LoRA's parameters of the bundled model and count the
# bytes of their state:

# %%
from transformers.optimization import Adafactor

try:
    from bitsandbytes.optim import AdamW8bit
except ImportError:
    AdamW8bit = None

model = lab.load_base("tiny").model
inject.attach(model, LoRAConfig(r=16, target_modules="all-linear"))
adapter = list(inject.trainable(model).values())


def by_rule(name):
    """The sum for our adapter, by the rules above."""
    rule = {"adamw": lambda p: 2 * p.numel() * 4, "sgd": lambda p: 0, "adafactor": lambda p: 4 * sum(p.shape),
            "adamw_8bit": lambda p: 8 * p.numel() if p.numel() < 4096 else 2 * (p.numel() + 4 * -(-p.numel() // 256))}[name]
    return sum(rule(p) for p in adapter)


made = {"adamw": torch.optim.AdamW, "adamw_8bit": AdamW8bit, "adafactor": Adafactor, "sgd": torch.optim.SGD}
rows = [["optimizer", "state by the rule", "counted", "of it scalars and tables"]]
for name, kind in made.items():
    if kind is None:
        continue
    for p in adapter:
        p.grad = torch.ones_like(p)
    settings = {} if name == "adafactor" else {"lr": 0.0}
    optimizer = kind(adapter, **settings)
    kept = [p.detach().clone() for p in adapter]
    optimizer.step()
    seen = {}
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                seen[value.untyped_storage().data_ptr()] = (key, value.nbytes)
    small = sum(n for key, n in seen.values() if n <= 8 or key.startswith("qmap"))
    whole = sum(n for _, n in seen.values())
    rows.append([name, f"{by_rule(name):,}", f"{whole:,}", f"{small:,}"])
    for p, before in zip(adapter, kept):
        p.data.copy_(before)
        p.grad = None
table(*rows)

# %% [markdown]
# Beside what the rule counts there is a step counter for each tensor, and for 8 bits two tables of 256 levels.
#
# # Term 3 · What the layers keep
#
# The backward pass goes through the layers in reverse, and at each of them needs what the forward pass computed there:
# a product $ab$ needs $b$ for the gradient of $a$. So the forward pass *keeps*. For one decoder layer of a Llama, one
# token, with the fused attention that transformers uses by default (`sdpa`):

# %%
llama_1b = {"h": 2048, "q": 2048, "k": 512, "m": 8192}
show(pictures.layer_picture(llama_1b, "Llama-3.2-1B"),
     alt="Twelve bars, one for each tensor that a layer keeps for a token: "
         + "; ".join(f"{tensor} {times}{letter} = {times * llama_1b[letter] / 1024:g} KiB" for tensor, times, letter, _ in pictures.KEPT))

# %% [markdown]
# *Blue is kept whatever trains: the gradient has to pass through every nonlinear part on its way down. Orange is kept
# only if a linear layer there learns something, for its gradient needs its input. Yellow only if the norms' own
# weights train.*
#
# The letters are widths: $h$ of the model (`hidden_size`), $q$ of all queries together (heads · head width), $k$ of
# all keys (key/value heads · head width; the values are as wide), $m$ of the feed-forward part (`intermediate_size`).
# RMSNorm computes in float32 and keeps its input so: hence 4 bytes there, 2 elsewhere. Add the rows up:
#
# | what trains in the layers | bytes for each token and layer |
# |---|---|
# | everything (`"all"`) | $16h + 4q + 4k + 8m$ |
# | LoRA on all linear layers (`"lora"`) | $12h + 4q + 4k + 8m$ |
# | nothing, e.g. a soft prompt in front (`"none"`) | $8h + 4q + 4k + 6m$ |
# | any of them, with gradient checkpointing | $2h$: the layer's input, from which the rest is computed again |
#
# (LoRA keeps $Ax$ as well, $4r$ bytes for each adapted layer. That is little, and left out.)
#
# **By hand,** for Llama-3.2-1B: $16 \cdot 2048 + 4 \cdot 2048 + 4 \cdot 512 + 8 \cdot 8192 = 108{,}544$ bytes, 106
# KiB. Times 16 layers: 1.7 MB *for each token*.

# %% [markdown] exercise="activation-bytes"
# Write `activation_bytes(layer, layers, tokens, trained, checkpointing)`: the bytes that all layers together keep when
# the forward pass is done.
#
# | argument | what it is |
# |---|---|
# | `layer` | a dict with the widths `"h"`, `"q"`, `"k"`, `"m"` |
# | `layers`, `tokens` | how many decoder layers; how many tokens go through (rows · length) |
# | `trained` | `"all"`, `"lora"` (on all linear layers) or `"none"` |
# | `checkpointing` | `True` or `False` |
#
# *Why it matters:* this is the term that LoRA hardly shrinks, and the reason for most surprises.

# %% exercise="activation-bytes"
def activation_bytes(layer, layers, tokens, trained, checkpointing):
    """Bytes that `layers` decoder layers keep for `tokens` tokens until the backward pass."""
    ### BEGIN SOLUTION
    if checkpointing:
        return tokens * layers * 2 * layer["h"]
    times_h, times_m = {"all": (16, 8), "lora": (12, 8), "none": (8, 6)}[trained]
    one = times_h * layer["h"] + 4 * layer["q"] + 4 * layer["k"] + times_m * layer["m"]
    return tokens * layers * one
    ### END SOLUTION

# %% check="activation-bytes"
check("activation-bytes", activation_bytes)

# %% [markdown] hint="activation-bytes" level="nudge"
# The table above has one row for each case. Everything is proportional to tokens · layers.

# %% [markdown] hint="activation-bytes" level="shape"
# Only the factors of h and m change: (16, 8), (12, 8), (8, 6); q and k always have 4. With checkpointing it is 2h,
# whatever trains.

# %% [markdown] hint="activation-bytes" level="code"
# `times_h, times_m = {"all": (16, 8), "lora": (12, 8), "none": (8, 6)}[trained]`, then one sum, times `tokens *
# layers`.

# %% [markdown]
# ### Against production: what does `peft` keep?
#
# **Predict:** LoRA trains one percent of the parameters. Does a layer with LoRA on all its linear layers keep less
# than a layer in full fine-tuning? And does it matter who wrote the LoRA?
#
# We measure it. `kib_per_token_and_layer` runs real layers forward, small ones here, and counts the bytes that stay
# allocated for the backward pass. Beside it, the table's formula:

# %%
shape = dict(hidden_size=256, intermediate_size=1024, head_dim=8)
h, q, k, m, H = 256, 256, 64, 1024, 32
formula = {"full fine-tuning": 16 * h + 4 * q + 4 * k + 8 * m, "LoRA, ours": 12 * h + 4 * q + 4 * k + 8 * m}
kept_by = {name: 1024 * kib_per_token_and_layer(MEASURED_METHODS[name], **shape)
           for name in ("full fine-tuning", "LoRA, peft", "LoRA, ours")}
table(["one layer", "bytes a token, measured", "by the table", "of full fine-tuning"],
      *[[name, f"{n:,.0f}", f"{formula[name]:,}" if name in formula else "–", f"{n / kept_by['full fine-tuning']:.0%}"]
        for name, n in kept_by.items()])
rest = kept_by["full fine-tuning"] - formula["full fine-tuning"]
rest_lora = kept_by["LoRA, ours"] - formula["LoRA, ours"] - rest
print(f"left over: {rest:.0f} bytes = 4 for each of {H} heads (the softmax's sum) and 4 for each norm;\n"
      f"with LoRA {rest_lora:.0f} more = 4 · r · 7 layers, r = 16")

# %% [markdown]
# `peft` keeps *more with LoRA than full fine-tuning keeps*. Here is why, in its source: each adapted layer turns its
# input into the adapter's dtype, float32, and autograd keeps that copy, for every layer anew.

# %%
import peft.tuners.lora.layer as peft_source
from peft.tuners import tuners_utils

lines, first = inspect.getsourcelines(peft_source.Linear.forward)
for i, line in enumerate(lines):
    if "_cast_input_dtype" in line or "lora_B(lora_A(" in line:
        print(f"{peft_source.__name__.replace('.', '/')}.py:{first + i}:  {line.strip()}")
cast = next(c for c in (peft_source.LoraLayer, tuners_utils.BaseTunerLayer) if hasattr(c, "_cast_input_dtype"))
source, first = inspect.getsourcelines(cast._cast_input_dtype)
print(f"{inspect.getmodule(cast._cast_input_dtype).__name__.replace('.', '/')}.py:{first + len(source) - 1}:  {source[-1].strip()}")

# %% [markdown]
# Our LoRA casts the small matrices A and B to the input's dtype instead of the large input to theirs, and keeps the
# input that is there anyway. This is one of the few places where a page of code beats the production library, and it
# is not a rounding trick: the gradient of A and B is float32 in both.

# %% question="vram-q-lora-more"

# %% [markdown]
# ### Fused and eager attention, and checkpointing
#
# Written out ("eager"), attention makes a matrix of $T \times T$ weights for each head, and keeps it. Fused attention
# ("sdpa", flash attention) keeps only queries, keys, values and output, and computes the weights again. The difference
# grows with the square of the length:

# %%
seqs = [512, 1024, 2048, 3072, 4096]
ways = {"eager": dict(attention="eager"), "fused (sdpa)": {}, "fused, checkpointing": dict(checkpointing=True)}
growth = {way: [estimate("llama-3.2-1b", "lora", 1, T, targets="all-linear", **settings).device / GiB for T in seqs]
          for way, settings in ways.items()}
show(pictures.growth_figure(seqs, growth, {GPUS[c].name: GPUS[c].usable / GiB for c in ("t4", "rtx-3090", "a100-40")},
                            "tokens of one row (Llama-3.2-1B, LoRA on all linear layers)"),
     alt="GiB over the length of one row. At 4096 tokens: " + ", ".join(f"{way} {values[-1]:.1f}" for way, values in growth.items()))

# %% [markdown]
# *Eager attention bends upwards, the others are straight lines. Checkpointing takes away most of what the layers keep;
# what is left of the slope is the next term.*
#
# # Term 4 · Logits
#
# The head turns each token's $h$ numbers into one for every word of the vocabulary. Llama 3 has 128,256 words: 63 times
# wider than the model. To scale, for one token:

# %%
show(pictures.logits_picture(2048, 128_256, 16),
     alt="For one token: input of one layer 4 KiB, inputs of all 16 layers 64 KiB, logits in 16 bits 250 KiB, logits with the "
         "loss and its gradients 1,754 KiB.")

# %% [markdown]
# *Nothing else in the model is as wide. With checkpointing, the logits and what the loss makes of them are most of what
# depends on the tokens.*
#
# At the worst moment, when the backward pass has just begun, these tensors of size tokens × vocabulary are alive:
#
# | tensor | bytes each | why it is there |
# |---|---|---|
# | the logits | 2 (or 4 in float32) | only if somebody still holds them: `out = model(…)`, and `out.logits` lives as long as `out` |
# | their log-probabilities | 4 | the loss is computed in float32, and its backward pass needs these |
# | gradient with respect to them | 4 | the first step of the backward pass |
# | gradient with respect to the logits' float32 copy | 4 | the second step, while the first is still there; only then it becomes 16 bits |
#
# (In between, in the forward pass, there is a float32 copy of the logits too. It is gone by then.)

# %% [markdown] exercise="logits-bytes"
# Write `logits_bytes(vocab, tokens, dtype_bytes, holds_logits)`: the bytes at that moment. `dtype_bytes` is the size
# of one number of the model's output (2 or 4), `holds_logits` whether somebody still holds the logits.
#
# *Why it matters:* most calculators leave this term out. On a small model with a large vocabulary it is the largest.

# %% exercise="logits-bytes"
def logits_bytes(vocab, tokens, dtype_bytes, holds_logits):
    """Bytes of logits and loss at their worst moment."""
    ### BEGIN SOLUTION
    each = 3 * 4 + (dtype_bytes if holds_logits else 0)
    return vocab * tokens * each
    ### END SOLUTION

# %% check="logits-bytes"
check("logits-bytes", logits_bytes)

# %% [markdown] hint="logits-bytes" level="nudge"
# How many tensors of this size are there at that moment, and how many bytes does one number have in each?

# %% [markdown] hint="logits-bytes" level="shape"
# Three float32 tensors always; the logits in the model's dtype if they are held. All have vocab · tokens numbers.

# %% [markdown] hint="logits-bytes" level="code"
# `each = 12 + (dtype_bytes if holds_logits else 0)`

# %% [markdown]
# Is it so? On the bundled model, with nothing but the logits able to count (no layer keeps anything, because the input
# of the head is where the graph begins):

# %%
class HeadOnly(torch.nn.Module):
    """The bundled model's head and loss, from hidden states that require a gradient."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, hidden, labels):
        logits = self.model.lm_head(hidden)
        loss = self.model.loss_function(logits=logits, labels=labels, vocab_size=self.model.config.vocab_size)
        return logits, loss


plain_model = lab.load_base("tiny").model.requires_grad_(False)
V, T = plain_model.config.vocab_size, 256
labels = torch.randint(3, V, (1, T), generator=torch.Generator().manual_seed(0))
rows = [["model in", "logits held", "bytes for each token and word, measured", "by the table"]]
for dtype in (torch.bfloat16, torch.float32):
    head = HeadOnly(plain_model.to(dtype))
    for holds in (True, False):
        hidden = torch.zeros(1, T, 256, dtype=dtype).requires_grad_()
        with Trace() as trace:
            logits, loss = head(hidden, labels)
            if not holds:
                del logits
            trace.peak = trace.live
            loss.backward()
        rows.append([str(dtype).removeprefix("torch."), "yes" if holds else "no", f"{trace.peak / (V * T):.2f}",
                     12 + (dtype.itemsize if holds else 0)])
table(*rows)

# %% [markdown]
# (The little that is beyond are gradients of width 256.) Note the practical side: `loss = model(**batch).loss`, in one
# line, lets the logits go and saves a seventh of this term. `out = model(**batch)` keeps them until the step is over.
#
# Fused losses (Liger's, Unsloth's, and torch's own chunked ones) go further: they compute head and loss for a few
# hundred tokens at a time and never have all logits at once.

# %% question="vram-q-checkpointed"

# %% [markdown]
# # By hand: one configuration, three ways
#
# **Llama-3.2-1B, QLoRA with $r = 16$ on all linear layers, checkpointing, 4 rows of 512 tokens.** With a pencil:

# %%
linear, other = split("llama-3.2-1b")
layers, tokens, r = 16, 4 * 512, 16
lora_numbers = r * layers * (2 * (2048 + 2048) + 2 * (2048 + 512) + 3 * (2048 + 8192))
by_hand = {
    "weights: codes and scales": linear * BITS["nf4-dq"] / 8,
    "weights that stay in 16 bits": 2 * other,
    "A and B in float32": 4 * lora_numbers,
    "AdamW's moments": 8 * lora_numbers,
    "inputs of the layers": tokens * layers * 2 * 2048,
    "logits and loss": tokens * 128_256 * 14,
}
at_the_loss = sum(by_hand.values())
rows = [["term", "reckoning", "bytes", "GiB"]]
how = [f"{linear:,} · 4.127/8", f"{other:,} · 2", f"{lora_numbers:,} · 4", f"{lora_numbers:,} · 8",
       f"{tokens:,} · {layers} · 2 · 2048", f"{tokens:,} · 128,256 · 14"]
for (term, n), reckoning in zip(by_hand.items(), how):
    rows.append([term, reckoning, f"{n:,.0f}", f"{n / GiB:.2f}"])
rows.append(["**together, when the loss goes backward**", "", f"**{at_the_loss:,.0f}**", f"**{at_the_loss / GiB:.2f}**"])
table(*rows)
one_layer = tokens * (12 * 2048 + 4 * 2048 + 4 * 512 + 8 * 8192)
print("The other candidate for the peak, a layer that runs again when the logits are gone:\n"
      f"{gib(one_layer, 2)} instead of {gib(by_hand['logits and loss'], 2)}")

# %% [markdown]
# Where are the gradients? At this moment there are none: they come layer by layer as the backward pass goes on, while
# the logits and what the layers keep go away. That is why they are in few peaks, and why "weights + gradients +
# optimizer + activations" is a sum that never happens.
#
# Now the library's two ways to know it. The **formula** has all terms of the pencil and some small ones; the
# **simulator** has no formula at all.

# %%
job = dict(batch=4, seq=512, r=16, targets="all-linear", checkpointing=True)
closed = estimate("llama-3.2-1b", "qlora", **job)
simulated = simulate("llama-3.2-1b", "qlora", **job)
rows = [["term", "formula", "simulator"]]
for term in closed.terms:
    rows.append([widgets.SAYS[term], gib(closed.terms[term], 3), gib(simulated.terms[term], 3)])
rows += [["**allocated at the peak**", f"**{gib(closed.total, 3)}**", f"**{gib(simulated.total, 3)}**"],
         ["reserved", gib(closed.reserved, 3), gib(simulated.reserved, 3)],
         ["with CUDA's context", gib(closed.device, 3), gib(simulated.device, 3)],
         ["peak at", closed.peak_at, simulated.peak_at]]
table(*rows)
pencil_gap = at_the_loss / simulated.total - 1
print(f"the pencil is {pencil_gap:+.1%} off the simulator, the formula {closed.total / simulated.total - 1:+.1%}")

# %% [markdown]
# # The peak is a moment
#
# **Predict:** for that model with LoRA, 4 rows of 512 tokens, at which moment is the peak without checkpointing, and
# with it? And in full fine-tuning with AdamW? Choose between *loss*, *backward*, *optimizer step*.

# %%
steps_to_show = {"LoRA": ("lora", dict(targets="all-linear")),
                 "QLoRA, checkpointing": ("qlora", dict(targets="all-linear", checkpointing=True)),
                 "full fine-tuning": ("full", {})}
timelines = {name: simulated if name == "QLoRA, checkpointing" else simulate("llama-3.2-1b", method, 4, 512, **settings)
             for name, (method, settings) in steps_to_show.items()}
viewer = widgets.timeline_viewer(timelines)
for name, memory in timelines.items():
    print(f"{name:>22}: {gib(memory.total, 2)}, {widgets.moment_of(memory)}")

# %% [markdown]
# *Choose another configuration above the picture. Look at three things: how high the tower of the loss stands above
# the rest; where orange, yellow and purple (what trains) are thick and where they are a line; and, with checkpointing,
# the small saw teeth in the backward pass, each of them one layer that runs again.*
#
# # On your machine: a prediction comes true
#
# You need not believe any of this. The bundled model trains on a CPU, and below autograd PyTorch's allocations are the
# same there. `Trace` counts every tensor of a *real* step; the simulator has seen none of it. It computes for CUDA, so
# we take away the workspace of cuBLAS, which a CPU does not have, and what was there before the step (weights,
# adapter, optimizer).

# %%
B, T = lab.steps(8, 2), 256
real = lab.load_base("tiny").model.to(torch.bfloat16)
inject.attach(real, LoRAConfig(r=16, target_modules="all-linear")).train()
trained = [p for p in real.parameters() if p.requires_grad]
ids = torch.randint(3, 4096, (B, T), generator=torch.Generator().manual_seed(0))


def one_real_step(optimizer):
    """A training step as Trainer does it."""
    optimizer.zero_grad(set_to_none=True)
    out = real(input_ids=ids, labels=ids, use_cache=False)
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()


def beyond(memory, *terms):
    """Bytes at the peak without these terms."""
    return memory.total - sum(memory.terms[term] for term in terms)


checked = {}
rows = [["real step", "predicted by simulation", "counted in the real step", "difference"]]
for checkpointing in (False, True):
    predicted = simulate("tiny", "lora", B, T, r=16, targets="all-linear", checkpointing=checkpointing)
    expected = beyond(predicted, "weights", "adapter", "optimizer", "temporary")
    if checkpointing:
        real.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    one_real_step(optimizer)                                 # the optimizer's state is made here
    optimizer.zero_grad(set_to_none=True)
    gc.collect()
    with Trace() as trace:
        one_real_step(optimizer)
    checked[checkpointing] = trace.peak / expected - 1
    rows.append([f"LoRA, {B} × {T}{', checkpointing' if checkpointing else ''}", f"{expected:,} bytes", f"{trace.peak:,} bytes",
                 f"{checked[checkpointing]:+.3%}"])
real.gradient_checkpointing_disable()
table(*rows)

# %% [markdown]
# Two programs that share no counting code, one that ran and one that did not. And the operating system? It sees more:
# buffers inside the kernels, threads, pages that are never given back. The resident memory of this very process,
# sampled every millisecond during a step:

# %%
import psutil


def resident(step):
    """How much this process' memory grew at most during `step`, in bytes, and seconds."""
    process, running, highest = psutil.Process(), True, 0

    def watch():
        nonlocal highest
        while running:
            highest = max(highest, process.memory_info().rss)
            time.sleep(0.001)

    gc.collect()
    before, watcher = process.memory_info().rss, threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    try:
        step()
    finally:
        running = False
        watcher.join()
    return highest - before, time.perf_counter() - began


ids = torch.randint(3, 4096, (4 * B, T), generator=torch.Generator().manual_seed(1))      # four times as many tokens
predicted = simulate("tiny", "lora", 4 * B, T, r=16, targets="all-linear")
grown, seconds = resident(lambda: one_real_step(optimizer))
expected = beyond(predicted, "weights", "adapter", "optimizer", "temporary")
print(f"tensors should need {mib(expected)}; the process grew by {mib(grown)} in a step of {seconds:.1f} s "
      f"({grown / expected - 1:+.0%})")

# %% [markdown]
# Expect this last figure to be off by some tens of percent, up or down, and to differ from run to run: the process may
# hold memory from earlier cells that it uses again, and the kernels have buffers of their own. That is the difference
# between a count and a thermometer. On a GPU the counters of torch are a count.
#
# ### On a GPU
#
# `measure` reads torch's own counters around a piece of code. The next cell does so for a real Llama of 1B shapes, if
# this machine has a GPU; if not, it says so.

# %% tags=["gpu"]
from pefttools.vram.measurement import gpu_missing

if gpu_missing():
    print(gpu_missing())
else:
    dtype = "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"
    config = config_of("llama-3.2-1b")
    from transformers import AutoModelForCausalLM

    with torch.device("cuda"):
        on_gpu = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    inject.attach(on_gpu, LoRAConfig(r=16, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([p for p in on_gpu.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(3, 1000, (2, 512), device="cuda")
    for _ in range(2):
        with measure("chapter 09") as measured:
            optimizer.zero_grad(set_to_none=True)
            out = on_gpu(input_ids=ids, labels=ids, use_cache=False)
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(on_gpu.parameters(), 1.0)
            optimizer.step()
    predicted = simulate("llama-3.2-1b", "lora", 2, 512, targets="all-linear", dtype=dtype)
    print(f"measured {gib(measured.peak_allocated, 2)}, simulated {gib(predicted.total, 2)}")
    del on_gpu, optimizer, out

# %% [markdown]
# # Savings that cost nothing but time
#
# Checkpointing and accumulation change *when* things are computed, not what. So the bundled model must learn the same
# with them. **Predict:** do the loss curves lie on each other? And with the 8-bit optimizer?
#
# Three runs of the same fine-tune (chapter 03's: from plain language to Python), the same 16 rows in each step: all at
# once; with checkpointing and 4 rows at a time; and all at once with AdamW's moments in 8 bits.

# %%
from pefttools.lab.training import loss_sum

question = lab.load_data("held_out")[1]
n_steps = lab.steps(16, 2)
fresh = lab.load_base("tiny")
rows_of_steps = [lab.encode(row, fresh.tokenizer) for row in lab.load_data("train").shuffle(seed=0).select(range(16 * n_steps))]


def answer(base):
    return repr(lab.generate(base.model.eval(), base.tokenizer, lab.prompt_of(question), max_new_tokens=48))


def fine_tune(at_once, optimizer=torch.optim.AdamW, checkpointing=False):
    """(base, losses, bytes at the peak of the second step beyond what is there before it, seconds)"""
    base = lab.load_base("tiny")
    model = inject.attach(base.model, LoRAConfig(r=16, alpha=32, target_modules="all-linear"), seed=0).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    adapter = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer(adapter, lr=3e-3)

    def one_step(rows):
        pieces = [lab.collate(rows[i:i + at_once], base.tokenizer.pad_token_id) for i in range(0, 16, at_once)]
        targets, total = sum(int((piece["labels"][:, 1:] != -100).sum()) for piece in pieces), 0.0
        for piece in pieces:
            loss = loss_sum(model, piece) / targets
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(adapter, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    losses, peak, began = [], 0, time.perf_counter()
    for step in range(n_steps):
        rows = rows_of_steps[16 * step:16 * step + 16]
        if step == 1:
            with Trace() as trace:
                losses.append(one_step(rows))
            peak = trace.peak
        else:
            losses.append(one_step(rows))
    model.gradient_checkpointing_disable()
    return base, losses, peak, time.perf_counter() - began


print("asked: ", lab.prompt_of(question).strip())
print("before:", answer(fresh))
runs = {"16 rows at once": fine_tune(16), "4 rows at a time, checkpointing": fine_tune(4, checkpointing=True)}
if AdamW8bit is not None:
    runs["16 rows at once, 8-bit AdamW"] = fine_tune(16, AdamW8bit)
print(f"after {n_steps} steps:", answer(runs["4 rows at a time, checkpointing"][0]))

# %%
losses = {name: run[1] for name, run in runs.items()}
plain, thrifty = (runs[name] for name in ("16 rows at once", "4 rows at a time, checkpointing"))
curve_gap = max(abs(a - b) for a, b in zip(plain[1], thrifty[1]))
show(pictures_of_00.two_losses(losses),
     alt="Training losses of " + "; ".join(f"{name}: {loss[0]:.2f} → {loss[-1]:.2f}" for name, loss in losses.items())
         + ". The first two lie on each other.")
for name, (_, _, peak, seconds) in runs.items():
    print(f"{name:>32}: {mib(peak):>10} at the peak of a step, {seconds:.0f} s in all")
print(f"plain and thrifty: losses differ by at most {curve_gap:.1e}, and the peak is {plain[2] / thrifty[2]:.1f} times smaller")
if AdamW8bit is not None:
    eight = max(abs(a - b) for a, b in zip(plain[1], losses["16 rows at once, 8-bit AdamW"]))
    print(f"plain and 8-bit AdamW: losses differ by up to {eight:.1e}")

# %% [markdown]
# *Checkpointing and accumulation give the same curve, to rounding: they are free but for time. The 8-bit moments give
# another, very near one: that saving rounds something, and is not of the same kind.*

# %% question="vram-q-accumulate"

# %% [markdown]
# # Every saving in numbers
#
# Llama-3.1-8B, 4 rows of 1024 tokens, by the formula (several GPUs by the simulator). Each row of the table changes
# *one* thing about the first:

# %%
start = dict(batch=4, seq=1024, r=16, targets="all-linear")
full_start = dict(batch=4, seq=1024)
changes = [
    ("LoRA, nothing saved", "lora", {}), ("… by checkpointing", "lora", dict(checkpointing=True)),
    ("… by accumulation: 1 row, 4 passes", "lora", dict(batch=1, accumulate=4)),
    ("… by 4-bit weights (QLoRA)", "qlora", {}), ("… by 8-bit AdamW", "lora", dict(optimizer="adamw_8bit")),
    ("… by all of these", "qlora", dict(batch=1, accumulate=4, checkpointing=True, optimizer="adamw_8bit")),
    ("full fine-tuning in bfloat16", "full", {}), ("… by 8-bit AdamW", "full", dict(optimizer="adamw_8bit")),
    ("… by paged AdamW", "full", dict(optimizer="paged_adamw")), ("… by Adafactor", "full", dict(optimizer="adafactor")),
    ("… by 4 GPUs (FSDP), on each", "full", dict(gpus=4)), ("… by 8 GPUs (FSDP), on each", "full", dict(gpus=8)),
]
found, rows = {}, [["in GiB", "allocated at the peak", "saved", "weights", "optimizer", "layers keep", "logits"]]
for name, method, change in changes:
    settings = (full_start if method == "full" else start) | change
    know = simulate if settings.get("gpus", 1) > 1 else estimate          # the formula is for one GPU
    memory = found[method if not change else name, method] = know("llama-3.1-8b", method, **settings)
    reference = found["full" if method == "full" else "lora", "full" if method == "full" else "lora"]
    held = memory.terms
    rows.append([name, f"**{memory.total / GiB:.1f}**", f"{1 - memory.total / reference.total:.0%}" if memory is not reference else "",
                 *(f"{n / GiB:.1f}" for n in (held["weights"] + held["constants"], held["optimizer"], held["activations"],
                                              held["logits"]))])
table(*rows)
print("peak at:", " / ".join(sorted({widgets.moment_of(memory) for memory in found.values()})))

# %% [markdown]
# - **8-bit AdamW** saves next to nothing with LoRA: the adapter's moments are small. In full fine-tuning they are the
#   largest term, and it saves half of it.
# - **Paged** moments live in memory that the driver moves between GPU and host when the GPU is full. They can be
#   evicted, so they need not fit; the price is time at every spike.
# - **FSDP** gives each of $N$ GPUs $1/N$ of weights, gradients and optimizer state, and each gathers a whole layer for
#   as long as it runs. Activations and logits are each GPU's own, and do not shrink.
# - **Checkpointing** and **accumulation** shrink what grows with the tokens; **quantization** what grows with the
#   parameters. Look which of the two you have too much of.
#
# ## Try it: what fits where?
#
# **Questions to try.** Which is the largest model that a T4 trains with 1 row of 1024 tokens? With QLoRA on the 1B
# model, what does the rank cost, and what the batch? What does `eager` do at 4096 tokens? Where does full fine-tuning
# of 7B begin to fit?

# %%
explorer = widgets.explorer()

# %% [markdown]
# *Dashed lines are what torch reports of a card; the bar has to stay left of one, context included. (`pefttools vram
# llama-3.1-8b --method qlora --batch 4 --seq 2048 --gpu t4` says the same in a terminal.)*

# %% [markdown] exercise="fits"
# Write the arithmetic of "does it fit?" once and for all.
#
# | argument | what it is |
# |---|---|
# | `parts` | a list of `(amount, unit)`, the terms at the peak; the unit is `"B"`, `"MiB"`, `"GB"` or `"GiB"` |
# | `card_mib` | what torch reports of the card, in MiB |
# | `context_mib` | CUDA's context, in MiB; it comes out of the card |
# | `margin` | what the allocator reserves beyond what is in use, as a share of it: 0.03 is 3 % |
# | *returns* | `(fits, left)`: `True` or `False`, and the bytes that are left (negative if it does not fit) |
#
# *Why it matters:* tables give you GB, torch gives you GiB, and the difference is as large as an adapter with its whole
# optimizer.

# %% exercise="fits"
def fits(parts, card_mib, context_mib, margin):
    """(does it fit?, bytes left) for parts [(amount, "B" | "MiB" | "GB" | "GiB"), …] on a card of card_mib MiB."""
    ### BEGIN SOLUTION
    size = {"B": 1, "MiB": 2**20, "GB": 10**9, "GiB": 2**30}
    peak = sum(amount * size[unit] for amount, unit in parts)
    left = (card_mib - context_mib) * 2**20 - peak * (1 + margin)
    return left >= 0, left
    ### END SOLUTION

# %% check="fits"
check("fits", fits)

# %% [markdown] hint="fits" level="nudge"
# Turn everything into bytes first, then forget about units. Two things happen to two different numbers: the context is
# taken from the card, the margin is put on the peak.

# %% [markdown] hint="fits" level="shape"
# A dict from unit to bytes makes the sum one line. `left` is one number: (card − context) in bytes, less peak · (1 +
# margin).

# %% [markdown] hint="fits" level="code"
# `size = {"B": 1, "MiB": 2**20, "GB": 10**9, "GiB": 2**30}`, then `peak = sum(amount * size[unit] for amount, unit in
# parts)`; return `left >= 0, left`.

# %% [markdown]
# # Formula, simulator, measurement
#
# Who checks the checker? Other people have measured. PEFT publishes what its comparison runs took on an L40S
# (Llama-3.2-3B, 4 rows of at most 768 tokens, all kinds of methods): `max_memory_reserved`, in GiB.

# %%
import csv
from importlib.resources import files

from accelerate.commands.estimate import estimate_training_usage
from accelerate.utils import calculate_maximum_sizes

from pefttools.vram import peft_runs

text = (files("pefttools.vram") / "published" / "vram_measured.csv").read_text(encoding="utf-8")
published = {row["url_or_path"].rpartition("/")[2]: float(row["peak_gib"]) for row in csv.DictReader(text.splitlines())
             if "MetaMathQA" in row["source"]}
some_rows = {   # PEFT's experiment: the formula's arguments for it
    "lora--llama-3.2-3B-rank64": ("lora", dict(r=64)),
    "lora--llama-3.2-3B-rank32-dora": ("dora", dict(r=32)),
    "ia3--llama-3.2-3B-default": ("ia3", {}),
    "prefixtuning--llama-3.2-3B-tokens50-init_prefix-lr_0.005": ("prefix", {}),
    "prompt_tuning--llama-3.2-3B-lr_0.001": ("prompt", {}),
}
for_accelerate = meta_model(config_of("llama-3.2-3b"), "float32")
usage = estimate_training_usage(calculate_maximum_sizes(for_accelerate)[0], "bfloat16")   # what the command computes
accelerate_says = max(usage.values()) / GiB                                             # … and what it prints

errors = {"simulator": [], "formula": [], "accelerate estimate-memory": []}
rows = [["PEFT's run", "measured", "simulator", "formula", "accelerate"]]
for run_name, (method, settings) in list(some_rows.items())[:1 if quick else None]:
    got = published[run_name + ".json"]
    run = peft_runs.experiment(run_name)
    settings = settings | ({"length": run.config["num_virtual_tokens"]} if "num_virtual_tokens" in run.config else {})
    says = {"simulator": run.simulate().reserved / GiB,
            "formula": estimate(peft_runs.MODEL, method, run.batch, peft_runs.STATED, library="peft", gpu=peft_runs.GPU,
                                **settings).reserved / GiB,
            "accelerate estimate-memory": accelerate_says}
    for who, value in says.items():
        errors[who].append(100 * (value / got - 1))
    rows.append([run_name.partition("--")[2].removeprefix("llama-3.2-3B-") + f" ({method})", f"{got:.2f}",
                 *(f"{value:.2f} ({value / got - 1:+.1%})" for value in says.values())])
table(*rows)
show(pictures.error_figure(errors, limit=30),
     alt="Errors in percent of what was measured. " + "; ".join(f"{who}: " + ", ".join(f"{e:+.1f}" for e in found)
                                                               for who, found in errors.items()))

# %% [markdown]
# *Five of PEFT's rows, of five methods, and nothing fitted to any of them. `accelerate estimate-memory` answers
# another question (a full fine-tune with float32 master weights, one row, no activations) and gives the same figure
# for every method; but it is what people ask.* `python -m pefttools.vram.published` does this for every published row
# that states enough, from PEFT, litgpt, torchtune, LLaMA-Factory and Unsloth, and writes the table in
# `docs/vram_validation.md`.
#
# # The sources' tables, recomputed
#
# Source 001 has three: full fine-tuning of 70B, QLoRA of 70B ("~36 GB, on an RTX 3090 with 24 GB"), and 13B on an RTX
# 4090. First full fine-tuning:

# %%
n70 = parameters_of_preset("llama-2-70b")
n65 = parameters_of_preset("llama-65b")
table(["recipe", "bytes for each parameter", "70 · 10⁹ parameters", f"Llama-2-70B ({n70:,})", "A100 of 80 GB, states alone"],
      *[[name, size, gb(size * 70e9, 0), gb(size * n70, 0), f"{-(-size * n70 // GPUS['a100-80'].free_for_torch):.0f}"]
        for name, size in (("all in bfloat16 (torch's AdamW)", 8), ("001: 16-bit weights, float32 moments", 12),
                           ("mixed precision, float32 master weights", 16))])
print(f"The QLoRA paper's “more than 780 GB” at 65B: 12 · {n65:,} = {gb(12 * n65, 0)}")

# %% [markdown]
# 840 GB is right, for that recipe. Now QLoRA of 70B with $r = 64$ on q, k, v, o (001's table and its problem 3: 1 row
# of 2048 tokens), and 13B (its example 2):

# %%
qkvo = ("q_proj", "k_proj", "v_proj", "o_proj")
seventy = {ckpt: estimate("llama-2-70b", "qlora", 1, 2048, r=64, targets=qkvo, checkpointing=ckpt) for ckpt in (False, True)}
thirteen = {r: estimate("llama-2-13b", "qlora", 1, 512, r=r, targets=qkvo) for r in (16, 256)}
m = seventy[True]
lora_70 = m.trainable
all_linear_70 = estimate("llama-2-70b", "qlora", 1, 2048, r=64, targets="all-linear", checkpointing=True).trainable
base_70 = m.terms["weights"] + m.terms["constants"]
c = config_of("llama-2-70b")
largest = 2 * c.hidden_size * c.intermediate_size
table(["70B, $r$ = 64", "001 says", "computed"],
      ["base in NF4", "35 GB", f"{gb(base_70)} with double quantization, {gb(sizes['llama-2-70b']['nf4'])} without"],
      ["LoRA on q, k, v, o, in 16 bits", "0.17 GB", f"{gb(2 * lora_70, 2)} ({lora_70:,} numbers); on all linear layers "
                                                   f"{gb(2 * all_linear_70, 2)}"],
      ["its optimizer", "0.5 or 0.68 GB", gb(m.terms["optimizer"], 2)],
      ["what 2048 tokens need", "2–3 GB", f"{gb(m.terms['activations'] + m.terms['logits'])} with checkpointing, "
       f"{gb(seventy[False].terms['activations'] + seventy[False].terms['logits'])} without"],
      ["training, in all", "36 GB; 38–39 GB", f"{gb(m.device)} on the device with checkpointing, {gb(seventy[False].device)} without"],
      ["a matrix in 16 bits for a moment", "140 GB “hidden”", f"the largest: {gb(largest, 2)}"])
table(["13B on a 4090", "001 says", "computed"],
      ["base in NF4", "6.5 GB", gb(sizes["llama-2-13b"]["nf4-dq"])],
      ["LoRA parameters, $r$ = 16", "8.4 M · 2", f"{thirteen[16].trainable:,}"],
      ["LoRA parameters, $r$ = 256", "268 M, 0.5 GB", f"{thirteen[256].trainable:,}: {gb(2 * thirteen[256].trainable, 2)} in 16 bits, "
       f"{gb(16 * thirteen[256].trainable)} with gradients and AdamW in float32"],
      ["in all, $r$ = 16, one row of 512", "7.3 GB", gb(thirteen[16].device)],
      ["in all, $r$ = 256", "under 8 GB", gb(thirteen[256].device)])
print(f"A 4090 has {both(GPUS['rtx-4090'].usable)}: both fit. An RTX 3090 has {both(GPUS['rtx-3090'].usable)}: 70B does not, by "
      f"{gb(m.device - GPUS['rtx-3090'].usable)}.")

# %% [markdown]
# Here is the whole question on one page: QLoRA and LoRA, one row of 1024 tokens, checkpointing, adapters of rank 16 on
# all linear layers.

# %%
grid_models = ("llama-3.2-1b", "llama-2-7b", "llama-3.1-8b", "llama-2-13b", "llama-65b", "llama-2-70b")
grid_cards = {"T4": "t4", "RTX 3090": "rtx-3090", "A100 40 GB": "a100-40", "L40S 48 GB": "l40s", "A100 80 GB": "a100-80"}
needs, rooms, row_names = {}, {}, []
for name in grid_models:
    for method in ("lora", "qlora"):
        row = f"{name}, {method}"
        row_names.append(row)
        for column, card in grid_cards.items():
            memory = estimate(name, method, 1, 1024, targets="all-linear", checkpointing=True, gpu=card,
                              dtype="bfloat16" if GPUS[card].bf16 else "float16")
            needs[row, column], rooms[row, column] = memory.device / GiB, GPUS[card].usable / GiB
fitting = {column: [row for row in row_names if needs[row, column] <= rooms[row, column]] for column in grid_cards}
show(pictures.fit_table(row_names, list(grid_cards), needs, rooms),
     alt="A table of GiB needed, by model and card. " + "; ".join(f"{column} takes {', '.join(rows)}" for column, rows in fitting.items()))

# %% [markdown]
# *✓: fits. GiB on the device, context included. A 65B model on one card of 48 GB, the QLoRA paper's claim, fits; on 24
# GB neither 65B nor 70B does.*
#
# # Designing a configuration
#
# Now the other way round. Given are a model, a card, a length, and a number of tasks to be served; wanted is a
# configuration. Some settings change nothing about what is learned and cost only time: batch and accumulation (as long
# as their product is what you want), checkpointing. Others change it a little: 4-bit weights, 8-bit moments. And two
# are about what comes after: how many tasks are to be answered for, and how often one switches between them.
#
# **Several tasks.** Twenty fine-tunes of one model can be twenty models, or one model and twenty adapters:

# %%
from pefttools.vram.serving import serving

for_8b = estimate("llama-3.1-8b", "lora", 1, 1024, r=16, targets="all-linear")
table(["20 tasks of Llama-3.1-8B, r = 16", "on the GPU", "on disk", "moved at a switch"],
      *[[way.way, gb(way.gpu), gb(way.disk), gb(way.switch) if way.switch else "nothing"]
        for way in serving(for_8b.job, for_8b, tasks=20)])

# %% question="vram-q-tasks"

# %% [markdown]
# **The planner.** `plan` goes through all combinations and says which fit, in order, and why each of the others loses.
# For Llama-3.2-1B on a T4 with rows of 1024 tokens, 16 in each step (chapter 11 will train this):

# %%
t4_plan = plan("llama-3.2-1b", "t4", seq=1024, effective_batch=16, methods=("lora", "qlora"), optimizers=("adamw",), r=16,
               targets="all-linear")
print(t4_plan)

# %% [markdown]
# A T4 has no bfloat16 (its tensor cores compute in float16), hence the dtype. And it has no flash attention. PyTorch's
# other fused kernel, the memory-efficient one, does not know grouped queries, so that a Llama 3 on a T4 without
# padding falls back to plain attention, which keeps $T \times T$ weights for every head:

# %%
on = {card: estimate("llama-3.2-1b", "lora", 1, 2048, targets="all-linear", gpu=card, dtype=dtype)
      for card, dtype in (("t4", "float16"), ("l4", "bfloat16"))}
padded = estimate("llama-3.2-1b", "lora", 1, 2048, targets="all-linear", gpu="t4", dtype="float16", padded=True)
print(f"what the layers keep for one row of 2048 tokens: L4 {gib(on['l4'].terms['activations'], 2)}, "
      f"T4 {gib(on['t4'].terms['activations'], 2)}, T4 with a padding mask {gib(padded.terms['activations'], 2)}")

# %% [markdown]
# With a padding mask transformers repeats keys and values for all heads first, and then the memory-efficient kernel
# can be used. Such things are why a simulator beats a formula in one's head: it asks which kernel would run.

# %% [markdown] exercise="design-configuration"
# Now you are the planner. Write `design(model, gpu, job)`, which returns a configuration as a dict:
#
# | key | value |
# |---|---|
# | `"dtype"` | `"bfloat16"` or `"float16"`: what this GPU computes in |
# | `"quantize"` | `True`: the base in NF4 with double quantization; `False`: in 16 bits |
# | `"checkpointing"` | `True` or `False` |
# | `"batch"`, `"accumulate"` | rows in one pass, and passes in one optimizer step |
# | `"r"` | rank of LoRA on all linear layers; A and B, their gradients and AdamW's moments are float32 |
#
# You are given
#
# | | |
# |---|---|
# | `model` | `"layer"` (widths h, q, k, m), `"layers"`, `"vocab"`, `"linear"` and `"other"` (weights, as in `weight_bytes`), `"lora"`: how many numbers A and B have together at rank 1 |
# | `gpu` | `"free"`: bytes for torch, context already taken off; `"bfloat16"`: whether it has it; `"name"` |
# | `job` | `"seq"`: tokens of a row; `"examples"`: rows wanted in one optimizer step, a power of two; `"rank"`: the least rank wanted; `"tasks"` and `"storage"`: the adapters of so many tasks, in 16 bits, must fit into so many bytes |
#
# **What is judged** is the effect. The library's formula computes your design's peak: it has to fit. It has to do what
# was asked for. And it must not pay for a saving that it does not need: if a quarter of the card would have been left
# *without* checkpointing (or without 4 bits, or with twice the batch), that is a waste. Several designs pass.
#
# Your own four functions from above are there to be called. Leave a margin of 10 % for what they do not count.
#
# *Why it matters:* this is what you will do every time from now on, for a model that no table lists.

# %% exercise="design-configuration"
def design(model, gpu, job):
    """A configuration that fits and wastes nothing: dtype, quantize, checkpointing, batch, accumulate, r."""
    ### BEGIN SOLUTION
    r = job["rank"]
    for quantize, checkpointing in ((False, False), (False, True), (True, False), (True, True)):   # from fast to thrifty
        batch = job["examples"]
        while batch >= 1:
            tokens = batch * job["seq"]
            weights = weight_bytes(model["linear"], model["other"], "nf4-dq" if quantize else "bfloat16")
            trained = 16 * r * model["lora"]
            kept = activation_bytes(model["layer"], model["layers"], tokens, "lora", checkpointing)
            again = activation_bytes(model["layer"], 1, tokens, "lora", False) if checkpointing else 0
            logits = logits_bytes(model["vocab"], tokens, 2, True)
            if 1.1 * (weights + trained + kept + max(again, logits)) <= gpu["free"]:
                return {"dtype": "bfloat16" if gpu["bfloat16"] else "float16", "quantize": quantize,
                        "checkpointing": checkpointing, "batch": batch, "accumulate": job["examples"] // batch, "r": r}
            batch //= 2
    ### END SOLUTION

# %% check="design-configuration"
check("design-configuration", design)

# %% [markdown] hint="design-configuration" level="nudge"
# Make a list of choices from the fastest to the thriftiest: nothing saved first, then one saving, then both. For each,
# begin with the largest batch and halve it. Take the first that fits.

# %% [markdown] hint="design-configuration" level="shape"
# The peak is weights + 16 · r · lora + what the layers keep + the larger of two moments: the logits, or (with
# checkpointing) one layer that runs again. The rank asked for always passes: tasks · r · lora · 2 bytes fit into the
# storage for it.

# %% [markdown] hint="design-configuration" level="code"
# ```python
# for quantize, checkpointing in ((False, False), (False, True), (True, False), (True, True)):
#     batch = job["examples"]
#     while batch >= 1:
#         tokens = batch * job["seq"]
#         peak = weight_bytes(...) + 16 * job["rank"] * model["lora"] + activation_bytes(...) + max(...)
#         if 1.1 * peak <= gpu["free"]:
#             return {...}
#         batch //= 2
# ```

# %% [markdown]
# A plan is a promise. So before you start a run, let the simulator check the one that you have chosen (`pefttools
# finetune` does it by itself). For the T4 plan above:

# %%
chosen = t4_plan.best.job
by_formula, by_simulator = estimate(chosen), t4_plan.judge.simulate(chosen)
show(widgets.bars({"formula": by_formula, "simulator": by_simulator}, cards=("t4", "l4")),
     alt=widgets.bars_alt({"formula": by_formula, "simulator": by_simulator}))
print(f"{chosen.method}, batch {chosen.batch}, {chosen.accumulate} passes, checkpointing {chosen.checkpointing}, {chosen.dtype}: "
      f"formula {gib(by_formula.device, 2)}, simulator {gib(by_simulator.device, 2)}, a T4 has {gib(t4.usable, 2)}")

# %% [markdown]
# *Take the two bars as one line of your lab book: if the GPU later says something else, one of your assumptions about
# the run was wrong, and it is worth knowing which.*
#
# # The sources say … we measured …

# %%
def mark(good):
    return "✓" if good else "✗"


device = {name: seventy[flag].device for name, flag in (("with", True), ("without", False))}
rows = [
    ("source", "it says", "we found", ""),
    ("001, section 1", "70B, Adam: 140 + 140 + 560 = 840 GB", f"12 bytes a parameter: {gb(12 * 70e9, 0)}, without float32 master "
     f"weights; with them {gb(16 * 70e9, 0)}; all in bfloat16 {gb(8 * 70e9, 0)}", "✓ for that recipe"),
    ("001, section 1", "“11+ A100 80GB”", f"840 · 10⁹ bytes are {12 * 70e9 / GPUS['a100-80'].free_for_torch:.1f} times what such a "
     "card has for tensors, before any activation", mark(12 * 70e9 / GPUS["a100-80"].free_for_torch <= 12)),
    ("000, 001", "4-bit weights: half a byte; 70B is 35 GB", f"4.5 or 4.127 bits, and not all weights: "
     f"{gb(sizes['llama-2-70b']['nf4'])} or {gb(sizes['llama-2-70b']['nf4-dq'])}", "✗"),
    ("001, section 3", "an RTX 3090 or 4090 “can fine-tune a 70B model”", f"the weights alone are {gib(base_70)}, the cards have "
     f"{gib(GPUS['rtx-3090'].usable)}", mark(base_70 <= GPUS["rtx-3090"].usable)),
    ("000, the abstract", "65B on one 48 GB GPU", f"{gib(needs['llama-65b, qlora', 'L40S 48 GB'] * GiB)} for one row of 1024 tokens with "
     f"checkpointing; an L40S has {gib(GPUS['l40s'].usable)}",
     mark(needs["llama-65b, qlora", "L40S 48 GB"] <= rooms["llama-65b, qlora", "L40S 48 GB"])),
    ("001, section 3", "70B, $r$ = 64: LoRA is 0.17 GB", f"q, k, v, o: {lora_70:,} numbers, {gb(2 * lora_70, 2)} in 16 bits", "✗"),
    ("001, example 2", "13B with $r$ = 16 on 24 GB: 7.3 GB, fits", f"{gb(thirteen[16].device)}, fits",
     mark(thirteen[16].device <= GPUS["rtx-4090"].usable)),
    ("001, example 2", "$r$ = 256 adds “a few hundred MB”", f"{gb(thirteen[256].device - thirteen[16].device)} more: 16 bytes for each of "
     f"{thirteen[256].trainable:,}", mark(thirteen[256].device - thirteen[16].device < GB)),
    ("001, problem 3", "training 70B takes 38–39 GB", f"{gb(device['with'])} with checkpointing, {gb(device['without'])} without", "✗"),
    ("001, problem 3", "fits an A100 of 80 GB", f"{gib(seventy[True].device)} of {gib(GPUS['a100-80'].usable)} with checkpointing, "
     f"{gib(seventy[False].device)} without", mark(seventy[True].device <= GPUS["a100-80"].usable)),
    ("001, problem 3", "dequantized weights take 140 GB, hidden", f"the largest matrix: {gb(largest, 2)}, and the counters see it", "✗"),
    ("000, slide", "the head is a separate matrix", f"tied in Llama-3.2-1B: {gb(2 * 128_256 * 2048, 2)} not spent", "✗"),
    ("peft, issue 1514", "LoRA takes more memory than full fine-tuning", f"a layer keeps {kept_by['LoRA, peft'] / kept_by['full fine-tuning']:.2f} "
     f"times as much with `peft`'s LoRA everywhere, {kept_by['LoRA, ours'] / kept_by['full fine-tuning']:.2f} times "
     f"with ours",
     mark(kept_by["LoRA, peft"] > kept_by["full fine-tuning"])),
]
table(*rows)

# %% [markdown]
# ## Summary
#
# | term | bytes | shrinks by |
# |---|---|---|
# | weights | 2 each; 4.5 or 4.127 bits in the quantized linear layers, 2 bytes elsewhere | 4 bits; sharding |
# | what trains | 16 each (float32 with AdamW); 8 in pure bfloat16 | training less; 8-bit, paged, factored optimizers; sharding |
# | what the layers keep | tokens · layers · $(16h + 4q + 4k + 8m)$, with LoRA $12h$ | checkpointing ($2h$), fewer tokens in a pass |
# | logits and loss | tokens · vocabulary · 14 (12 if nobody holds them) | fewer tokens in a pass, a chunked loss |
# | the card | GiB on the box, less error correction, driver, context, and a margin for the allocator | |
#
# **Words to keep.** *Peak*: the worst moment, not a sum of terms. *Allocated* is in use, *reserved* is what torch took
# from the driver, *context* is CUDA's own. *Checkpointing* computes again, *accumulation* adds up passes, *paging*
# moves the optimizer's state to the host and back.
#
# **Read**
#
# - Korthikanti et al. 2022, [Reducing Activation Recomputation](https://arxiv.org/abs/2205.05198): what a layer keeps,
#   counted as here.
# - Dettmers et al. 2023, [QLoRA](https://arxiv.org/abs/2305.14314): section 3 (double quantization, paged optimizers)
#   and its memory figure.
# - Rajbhandari et al. 2020, [ZeRO](https://arxiv.org/abs/1910.02054): 16 bytes a parameter, and how to share them.
# - Dao et al. 2022, [FlashAttention](https://arxiv.org/abs/2205.14135): why attention need not keep $T \times T$.
# - `pefttools/vram/`: `formula.py`, where each term is a named function, and `simulator.py`, which knows none of them.
#
# **Next.** Chapter 11 puts Llama-3.2-1B on a T4: you will plan its memory with what you have written here, and compare
# with what the GPU says afterwards.
