# ---
# title: Where you are
# minutes: 60
# ---
# %% [markdown]
# You have a language model that somebody else trained for weeks, a task of your own, and one small computer. This
# course is about what to do then. It is called **parameter-efficient fine-tuning**, PEFT for short: leave the big model
# as it is, and train a few numbers beside it.
#
# **After this chapter you can**
#
# - say what PEFT is, and how it differs from feature-based transfer and from full fine-tuning;
# - count what trains in any PyTorch model, and freeze the rest;
# - work out how much memory a training step holds, and ask of any published figure *which recipe it counts*;
# - measure what a fine-tuned model has forgotten, and say what an adapter changes about that;
# - find your way in the course: `check`, hints, questions, and the doctor.
#
# You need Python and a little PyTorch (tensors, `nn.Module`, `backward()`). You do not need a GPU, a network or an
# account.

# %% [markdown]
# ## The first five minutes
#
# A notebook is a row of cells. Click into one and press **Shift+Enter**: it runs, and you move on to the next. Start
# with the cell below. It takes a few seconds, because it loads PyTorch.

# %%
import copy
import inspect
import logging
import sysconfig
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from IPython.display import Markdown, display
from torch import nn

from pefttools.grading import ask, case, check
from pefttools.widgets.base import show
from pefttools.widgets import start as pictures

warnings.simplefilter("ignore", FutureWarning)                # what libraries tell one another, not you
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
print("ready: torch", torch.__version__)

# %% [markdown]
# A **parameter** is one number of the model that training may change. A model has very many of them. PEFT *freezes*
# nearly all (they stay as they are) and *trains* a few.
#
# Here is a real case, from a blog post that this course builds on (source 003). Its author put LoRA, the method of
# chapter 02, on a model of OPT's family, and the library reported:
#
# | trained | all |
# |---|---|
# | 8,388,608 | 6,666,862,592 |
#
# How small is that share? Turn it into percent, and you have done your first exercise.

# %% [markdown] exercise="hello-check"
# Write `trainable_percent(trainable, total)`: two whole numbers in, one number out, the share in percent. For 3 trained
# parameters of 8 it is 37.5.
#
# *Why it matters:* it is the first line that any PEFT library prints, and the first number that a paper's abstract
# quotes.
#
# Replace the line that begins with `raise`, run the cell, then run the one after it.

# %% exercise="hello-check"
def trainable_percent(trainable: int, total: int) -> float:
    """The share of `total` parameters that is trained, in percent: 3 of 8 is 37.5."""
    ### BEGIN SOLUTION
    return 100 * trainable / total
    ### END SOLUTION

# %% check="hello-check"
check("hello-check", trainable_percent)

# %% [markdown] hint="hello-check" level="nudge"
# A share is the part divided by the whole. Percent means "out of a hundred".

# %% [markdown] hint="hello-check" level="shape"
# Numbers in, a number out; nothing has to be rounded. `trainable` goes on top of the fraction.

# %% [markdown] hint="hello-check" level="code"
# `return 100 * ... / ...`

# %% [markdown]
# ### What you just used
#
# - **Green** means done. **Red** says what differs, what was expected beside what came back, and if your answer is that
#   of a known mistake, it names the mistake. Nobody sees how often you try, and trying costs nothing.
# - The first line tells your **points**, the last how far you are in the chapter. When a notebook is handed in, the
#   grading tool runs your code once more, on other inputs, and adds up the points.
# - Not sure what went in? `case("hello-check", 1)` gives you the inputs of the check's first case.
# - Each exercise says how hard it is (●○○ to ●●●), how many minutes it may take, and how many points it gives.
# - **Hints** stand under the check, one above the other: a nudge, the shapes, almost the code. Open one at a time.
# - **Questions** come at the end. Each wrong option is something that people really believe, and the check tells you
#   why it is not so.
#
# What does red look like? Here somebody forgot the hundred:

# %%
from pefttools.grading.check import verdict_on
from pefttools.grading.exercises import exercise

verdict_on(exercise("hello-check"), lambda trainable, total: trainable / total)   # a check that does not count

# %% [markdown]
# ### Is your computer ready?
#
# The doctor looks at what is installed and says, for each thing that is missing, what would help. Nothing in this
# chapter needs a GPU. (In a terminal the same is `pefttools doctor`.)

# %%
from pefttools.doctor import doctor

doctor()

# %% [markdown]
# ## A real, small Llama
#
# The course brings its own model: a Llama, built from the same class of the `transformers` library as Llama-3.2, only
# much smaller, and pretrained on Python source code. It learned one thing: given some text, guess the next **token** (a
# token is a piece of text, often a word or part of one). Writing is guessing again and again.

# %%
from pefttools.lab import answer_of, collate, encode, generate, held_out_loss, load_base, load_data
from pefttools.lab import loss_sum, prompt_of, steps, train

base = load_base("tiny")
model, tokenizer = base
print(base)

# %%
prompt = "import os\n\nclass Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):"
print(prompt + " ⟨from here on the model writes⟩" + generate(model, tokenizer, prompt, max_new_tokens=60))

# %% [markdown]
# It looks like Python. A line may even be what you would have written; then it repeats itself, or drifts off. That is
# what a model of this size can do after pretraining: it knows how code *looks*. Ask it for something, and it has no idea
# that you asked:

# %%
held_out = load_data("held_out")
row = held_out[0]
print(prompt_of(row) + "⟨from here on the model writes⟩")
print(generate(model, tokenizer, prompt_of(row), max_new_tokens=40).strip())
print("\n— what it should have written —\n" + answer_of(row))

# %% [markdown]
# It cannot follow an instruction, because nobody showed it one. The course's data set holds thousands of pairs
# *instruction → Python*. By the end of chapter 03 you will have taught it. First: what are the ways to teach it?

# %% [markdown]
# ## Three ways to use a pretrained model

# %%
show(pictures.three_ways(), alt=pictures.THREE_WAYS_ALT)

# %% [markdown]
# *The three differ in what trains (orange) and in how far down the gradient has to run.*
#
# - **Feature-based transfer.** Run the frozen model once over each text, keep the vector that comes out (the
#   *features*), and train something small on those vectors. Cheap and safe. But the model itself never adapts: if what
#   you need is not in its vectors, you cannot have it, and a model used this way does not learn to *write* anything
#   new.
# - **Full fine-tuning.** Go on training all weights on your data. The strongest tool, and the most expensive: every
#   weight needs company during training (you will count it below), and every task leaves you with a whole model to
#   store. It also has a side effect, **catastrophic forgetting**: weights that move for the new task were good for
#   something before.
# - **PEFT.** Freeze the model as in the first way, let the gradient run through it as in the second, and train only a
#   few new numbers *inside*. It is the subject of the other eleven chapters.
#
# The first way is quickly tried. Can the frozen model tell what family of task an instruction belongs to (strings,
# numbers, files, …)? We keep one vector for each instruction, the mean of the model's last layer over its tokens, and
# train a single linear layer on the vectors. The model runs forward only.
#
# (`steps(full=…, quick=…)` in the code is the course's one switch. It gives the first number, and the second if the
# environment variable `PEFTTOOLS_QUICK` is 1; the course tests itself that way.)

# %%
@torch.no_grad()
def features(rows) -> torch.Tensor:
    """One vector for each row's instruction: the last layer's outputs, averaged over its tokens.  [rows, 256]"""
    out = []
    for first in range(0, len(rows), 64):
        ids = [{"input_ids": encode(r, tokenizer)["input_ids"][:48]} for r in rows[first:first + 64]]
        batch = collate(ids, tokenizer.pad_token_id)
        batch.pop("labels")
        hidden = model.model(**batch).last_hidden_state         # [B, T, 256]
        mask = batch["attention_mask"].unsqueeze(-1)            # [B, T, 1]: 1 for text, 0 for padding
        out.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(out)


train_rows = list(load_data("train").shuffle(seed=0).select(range(steps(full=600, quick=200))))
test_rows = list(held_out.shuffle(seed=0).select(range(steps(full=200, quick=50))))
families = sorted({r["family"] for r in train_rows})
label = {family: i for i, family in enumerate(families)}

x, y = features(train_rows), torch.tensor([label[r["family"]] for r in train_rows])
x_test, y_test = features(test_rows), torch.tensor([label.get(r["family"], -1) for r in test_rows])

torch.manual_seed(0)
classifier = nn.Linear(x.shape[1], len(families))
optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-2)
mean, std = x.mean(0), x.std(0)
for _ in range(200):
    F.cross_entropy(classifier((x - mean) / std), y).backward()
    optimizer.step()
    optimizer.zero_grad()

right = (classifier((x_test - mean) / std).argmax(1) == y_test).float().mean()
most = max((y_test == i).float().mean() for i in range(len(families)))
trained = sum(p.numel() for p in classifier.parameters())
display(Markdown(f"Feature-based transfer: **{right:.0%}** of {len(test_rows)} held-out instructions put into the "
                 f"right one of {len(families)} families, by a layer of {trained:,} trained parameters. "
                 f"Always saying the commonest family would give {most:.0%}."))

# %% [markdown]
# So the vectors do hold something useful, though the model was never told what a family is. But the classifier only
# sorts. To make the model *write* answers, its inside has to change its behaviour.

# %% [markdown]
# ## Count what trains
#
# Everything that follows is bookkeeping about parameters, so let us be able to count them.
#
# By hand first. A linear layer that takes 6 numbers and gives 4 has a weight matrix of 4 × 6 and a bias of 4, so 24 + 4
# = 28 parameters. Freeze the matrix, and 4 of 28 train. PyTorch agrees:

# %%
layer = nn.Linear(6, 4)                       # weight [4, 6], bias [4]
layer.weight.requires_grad_(False)            # freeze the matrix: no gradient will be computed for it
for name, p in layer.named_parameters():
    print(f"{name:8} shape {tuple(p.shape)!s:8} {p.numel():3} numbers   {'trained' if p.requires_grad else 'frozen'}")

# %% [markdown]
# Two things make counting a little harder in a real model:
#
# - **Tied weights.** The bundled Llama, like Llama-3.2-1B, uses one matrix twice: to turn tokens into vectors on the
#   way in, and vectors into scores for tokens on the way out. It is one matrix under two names. It is stored once and
#   trained once.
# - **Buffers.** Some tensors are kept in a model without being parameters: tables of positions, running averages. No
#   optimizer ever sees them.

# %%
print("one matrix under two names:", model.lm_head.weight is model.model.embed_tokens.weight)
print("its shape:", tuple(model.lm_head.weight.shape))
print("buffers:", [name for name, _ in model.named_buffers()])

# %% [markdown] exercise="count-trainable"
# Write `count_parameters(model)` for any `nn.Module`. It returns two whole numbers, `(trainable, total)`: how many
# numbers train, and how many parameters there are in all. A matrix that is used twice counts once; buffers do not
# count.
#
# *Why it matters:* if the first number is not what you expect, something else than you think is being trained. It is
# the cheapest bug detector in this field.

# %% exercise="count-trainable"
def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) parameters of `model`. Tied weights count once, buffers not at all."""
    ### BEGIN SOLUTION
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return trainable, total
    ### END SOLUTION

# %% check="count-trainable"
check("count-trainable", count_parameters)

# %% [markdown] hint="count-trainable" level="nudge"
# `model.parameters()` gives every parameter of a module and of all modules inside it, each one once, even if it has two
# names. Ask each of them two things: how many numbers are you, and do you train?

# %% [markdown] hint="count-trainable" level="shape"
# A parameter `p` of shape `[4, 6]` has `p.numel() == 24`. `p.requires_grad` is True if it trains. You want two sums
# over the same parameters, one of them with a condition.

# %% [markdown] hint="count-trainable" level="code"
# ```python
# total = sum(... for p in model.parameters())
# trainable = sum(... for p in model.parameters() if ...)
# return ..., ...
# ```

# %% [markdown]
# The library has the same function; from here on we use that one, which yours now equals.

# %%
from pefttools.inject import count_parameters as count

trainable, total = count(model)
by_file = sum(t.numel() for t in model.state_dict().values())
display(Markdown(f"The bundled Llama has **{total:,} parameters**. All {trainable:,} would train if we let them. "
                 f"Adding up `state_dict()` instead gives {by_file:,}: the tied matrix is in there under both of its "
                 "names."))

# %% [markdown]
# ## Freeze the rest
#
# In PyTorch a parameter is frozen when its `requires_grad` is False. No gradient is computed for it then, and an
# optimizer leaves it alone. The usual way to work is: switch everything off, then switch on what should train.
#
# Which parameters are meant is said by name. Each has a path through the model:

# %%
for path, p in list(model.named_parameters())[:11]:
    print(f"{path:50} {tuple(p.shape)}")

# %% [markdown]
# One trap waits in the names: people like to look for a word *anywhere* in the path. Then `"norm"` also picks
# `input_layernorm`, and `"proj"` picks every projection there is. The `peft` library compares *whole parts* between the
# dots, and so will you.

# %% [markdown] exercise="freeze"
# Write `freeze_except(model, names)`. After the call, a parameter trains if **one of the parts** of its path, split at
# the dots, is in the list `names`; every other parameter is frozen. Change the model that is handed in; you need not
# return anything. In the small model that the check uses:
#
# | `names` | trains | does not |
# |---|---|---|
# | `["q_proj"]` | `layers.0.attn.q_proj.weight`, `layers.0.attn.q_proj.bias` | `layers.0.attn.v_proj.weight` |
# | `["attn"]` | both of the above, and all else inside any `attn` | `layers.0.up_proj.weight` |
# | `["norm"]` | `norm.weight`, `norm.bias` | `layers.0.prenorm.weight` |
#
# Somebody may have frozen a part before you were called. If it is in `names`, it must train afterwards.
#
# *Why it matters:* every method of this course begins with this step.

# %% exercise="freeze"
def freeze_except(model: nn.Module, names: list[str]) -> None:
    """Freeze `model` in place, except the parameters inside modules whose name is in `names`."""
    ### BEGIN SOLUTION
    for path, p in model.named_parameters():
        parts = path.split(".")
        p.requires_grad = any(part in names for part in parts)
    ### END SOLUTION

# %% check="freeze"
check("freeze", freeze_except)

# %% [markdown] hint="freeze" level="nudge"
# `model.named_parameters()` gives pairs of path and parameter, and a parameter's `requires_grad` may be set to True or
# False. Decide for each path.

# %% [markdown] hint="freeze" level="shape"
# `"layers.0.attn.q_proj.weight".split(".")` is `["layers", "0", "attn", "q_proj", "weight"]`. The question is whether
# any of these five strings is in `names`. The answer, True or False, is the value to set.

# %% [markdown] hint="freeze" level="code"
# ```python
# for path, p in model.named_parameters():
#     p.requires_grad = any(... for part in ...)
# ```

# %% [markdown]
# Try yours on the bundled model, in a new cell (the **+** above). Guess first: the model has 6 layers, and in each a
# value matrix that takes 256 numbers and gives 128.
#
# ```python
# trial = copy.deepcopy(model)
# freeze_except(trial, ["v_proj"])
# count(trial)
# ```

# %% [markdown]
# ## What training costs in memory
#
# While a model trains, a parameter does not come alone. With **Adam**, the optimizer that nearly everybody uses, a
# trained parameter has:
#
# | symbol | what | why it is there |
# |---|---|---|
# | $w$ | the weight | the model itself |
# | $g$ | its gradient | which way to move; from the backward pass until the step |
# | $m$ | Adam's first moment | running mean of the gradient |
# | $v$ | Adam's second moment | running mean of its square |
# | $c$ | master copy | the weight once more in 32 bits, so that small steps are not rounded away |
#
# A number in 32 bits takes 4 **bytes**, one in 16 bits takes 2. Which of these are kept in how many bits is called a
# *recipe*:
#
# | recipe | $w$ | $g$ | $m$ | $v$ | $c$ | a trained parameter | a frozen one |
# |---|---|---|---|---|---|---|---|
# | `"half"` | 2 | 2 | 4 | 4 | – | **12** | 2 |
# | `"mixed"` | 2 | 2 | 4 | 4 | 4 | **16** | 2 |
# | `"float32"` | 4 | 4 | 4 | 4 | – | **16** | 4 |
#
# A frozen parameter only costs its weight: no gradient, no moments, no copy. With $N_t$ trained and $N_f$ frozen
# parameters, and the letters standing for bytes,
#
# $$\text{memory} = w\,(N_t + N_f) + (g + m + v + c)\,N_t .$$
#
# By hand: the layer with 28 parameters, `"mixed"`, everything trained: 16 · 28 = 448 bytes. With its matrix frozen,
# $N_t = 4$ and $N_f = 24$: 2 · 28 + 14 · 4 = 112 bytes.
#
# Training also holds **activations**, what the layers remember of the forward pass for the backward pass. They depend
# on how much text is in a batch, not on who is frozen alone; chapter 09 counts them. Until then we mean the formula
# above.

# %% [markdown] exercise="bytes-per-parameter"
# Write `training_bytes(trainable, frozen, recipe)`. `trainable` and `frozen` are whole numbers, `recipe` is `"half"`,
# `"mixed"` or `"float32"` as in the table. Return a dictionary of bytes with four keys:
#
# | key | what |
# |---|---|
# | `"weights"` | all weights as the model computes with them, trained and frozen |
# | `"gradients"` | gradients |
# | `"optimizer"` | Adam's $m$ and $v$ together |
# | `"master"` | master copies; 0 where the recipe has none |
#
# *Why it matters:* one published figure means 12 bytes, the next 16, and neither says so.

# %% exercise="bytes-per-parameter"
def training_bytes(trainable: int, frozen: int, recipe: str) -> dict[str, int]:
    """Bytes held in a training step with Adam: {"weights": …, "gradients": …, "optimizer": …, "master": …}."""
    ### BEGIN SOLUTION
    width = 4 if recipe == "float32" else 2
    return {
        "weights": width * (trainable + frozen),
        "gradients": width * trainable,
        "optimizer": (4 + 4) * trainable,
        "master": 4 * trainable if recipe == "mixed" else 0,
    }
    ### END SOLUTION

# %% check="bytes-per-parameter"
check("bytes-per-parameter", training_bytes)

# %% [markdown] hint="bytes-per-parameter" level="nudge"
# Read the table's columns downwards. Only one of the four terms is multiplied by all parameters; the other three only
# by the trained ones.

# %% [markdown] hint="bytes-per-parameter" level="shape"
# Weight and gradient are equally wide: 4 bytes in `"float32"`, else 2. Adam's two moments are 4 + 4 bytes in every
# recipe of the table. The master copy is 4 bytes, in `"mixed"` only.

# %% [markdown] hint="bytes-per-parameter" level="code"
# ```python
# width = ... if recipe == "float32" else ...
# return {"weights": width * ..., "gradients": ... * trainable,
#         "optimizer": ... * trainable, "master": ... if recipe == "mixed" else ...}
# ```

# %% [markdown]
# ### Which recipe is a published figure?
#
# Source 001 writes that a model of 70 billion parameters takes 840 GB to fine-tune. The QLoRA paper writes "more than
# 780 GB" for 65 billion. Recompute both, in GB of 10⁹ bytes:

# %%
for billions in (65, 70):
    for recipe, each in (("half", 12), ("mixed", 16)):
        gb = billions * each
        print(f"{billions} billion × {each} bytes = {gb:5,} GB, or {-(-gb // 80)} GPUs of 80 GB   ({recipe})")

# %% [markdown]
# *Both published figures count 12 bytes. With master copies it is a third more.* Neither is wrong; they answer
# different questions, and neither says which.
#
# And these are not the only recipes. Let PyTorch itself make the optimizer, do one step, and count what is really
# there:

# %%
def bytes_held(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer states that exist right now."""
    parameters = list(model.parameters())
    return {"weights": sum(p.nbytes for p in parameters),
            "gradients": sum(p.grad.nbytes for p in parameters if p.grad is not None),
            "optimizer": sum(value.nbytes for state in optimizer.state.values() for value in state.values())}


for dtype in (torch.float32, torch.bfloat16):
    square = nn.Linear(1000, 1000, bias=False, dtype=dtype)
    optimizer = torch.optim.AdamW(square.parameters())
    square(torch.randn(8, 1000, dtype=dtype)).square().sum().backward()
    optimizer.step()
    held = bytes_held(square, optimizer)
    each = {term: n / square.weight.numel() for term, n in held.items()}
    print(f"{str(dtype):14}", " + ".join(f"{n:.3f} {term}" for term, n in each.items()), f"= {sum(each.values()):.3f} "
                                                                                         "bytes")

# %% [markdown]
# *In 32 bits it is the 16 of the table. In bf16, PyTorch's AdamW keeps its moments in bf16 too: 8 bytes, a fourth
# recipe.* So when you read "full fine-tuning needs … GB", ask: weights in how many bits, moments in how many, a master
# copy or not, activations or not?

# %% [markdown]
# ### What goes into which GPU?
#
# Move the sliders: the size of the model, and how many parameters an adapter trains, as a percentage of the model's.
# The figure uses the recipes of 16-bit training. In the last bar the frozen weights take 4 bits each and a little for
# their scales, which is QLoRA (chapters 04 and 05).

# %%
explorer = pictures.memory_explorer()

# %% [markdown]
# *Freezing removes all but the weights; only making the weights themselves smaller goes further.* The bars hold no
# activations, so "could go into" is a hope, not a promise.

# %% [markdown]
# ## The experiment: full fine-tuning against a frozen model
#
# Now both on the bundled model, measured. Two ways:
#
# 1. **full**: every parameter trains;
# 2. **frozen + LoRA**: the model is frozen, and beside each of its matrices sits a pair of narrow trained matrices. How
#    that works is chapter 02; for now, `attach` puts them in.
#
# ### Memory: guess first
#
# LoRA as attached below trains about one twenty-fifth of the model's number of parameters. **How many times less memory
# does its training step hold?** Weights are in 32 bits here. Write your guess in the next cell, then run on.

# %%
my_guess = None   # how many times less? write a number in place of None

# %%
from pefttools.inject import attach, disabled
from pefttools.lora import LoRAConfig

adapter = LoRAConfig(r=8, alpha=16, target_modules="all-linear")
batch = collate([encode(r, tokenizer) for r in train_rows[:4]], tokenizer.pad_token_id)


def one_step(model: nn.Module) -> dict[str, int]:
    """One real training step on a small batch; the bytes held just after it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    loss_sum(model, batch).backward()
    optimizer.step()
    return bytes_held(model, optimizer)


full = copy.deepcopy(model)
lora = attach(copy.deepcopy(model), adapter)
memory = {"full": one_step(full), "frozen + LoRA": one_step(lora)}
counts = {"full": count(full), "frozen + LoRA": count(lora)}

show(pictures.stacked_bytes(memory), alt="Two stacked bars of megabytes. " + "; ".join(
    f"{way}: " + ", ".join(f"{term} {n / 1e6:.1f} MB" for term, n in parts.items()) for way, parts in memory.items()))

# %%
fewer = counts["full"][0] / counts["frozen + LoRA"][0]
less = sum(memory["full"].values()) / sum(memory["frozen + LoRA"].values())
print(pictures.compare_guess(my_guess, less, "times less"))
display(Markdown(
    f"LoRA trains {counts['frozen + LoRA'][0]:,} parameters, **{fewer:.0f} times fewer** than the "
    f"{counts['full'][0]:,} of full fine-tuning. The training step holds **{less:.1f} times less**: the frozen "
    f"weights, {memory['frozen + LoRA']['weights'] / 1e6:.1f} MB, have to be there whoever trains. Full fine-tuning "
    f"holds {sum(memory['full'].values()) / counts['full'][1]:.2f} bytes a parameter, the table's 16."))

# %% [markdown]
# *Trained parameters fall by far more than memory does: what remains is the frozen model.* This gap is why QLoRA
# exists.
#
# Does your own formula say the same? Ask it in a new cell:
#
# ```python
# trained, everything = counts["frozen + LoRA"]
# sum(training_bytes(trained, everything - trained, "float32").values()) / 1e6
# ```

# %% [markdown]
# ### Forgetting: guess first
#
# The model was pretrained on Python source, Python's own standard library among it. We take some files of that library
# from *your* Python and measure the **loss** on them: how surprised the model is by each next token, in *nats* (0 would
# be no surprise; every nat is a factor of e ≈ 2.72 less probability for what really came). They were partly in its
# pretraining, and that is just what we want here: forgetting is about what was once known.

# %%
library = Path(sysconfig.get_paths()["stdlib"])
names = ("argparse bisect calendar cmd configparser csv fractions getopt "
         "heapq queue sched shelve shlex string textwrap tempfile").split()
files = [library / f"{name}.py" for name in names]
old_text = []
for file in files:
    if file.exists():
        ids = tokenizer(file.read_text(encoding="utf-8")[1000:3400], add_special_tokens=False)["input_ids"]
        for first in range(0, min(len(ids), 510) - 254, 255):         # at most two windows of a file
            window = [tokenizer.bos_token_id] + ids[first:first + 255]
            old_text.append({"input_ids": window, "labels": window})  # every token is a target
old_text = old_text[:steps(full=32, quick=8)]
new_task = list(held_out.shuffle(seed=1).select(range(steps(full=160, quick=32))))

before = (held_out_loss(model, tokenizer, new_task), held_out_loss(model, tokenizer, old_text))
display(Markdown(f"Before any training: **{before[0]:.2f}** nats per token on answers to {len(new_task)} held-out "
                 f"instructions, **{before[1]:.2f}** on {len(old_text)} windows of old text."))

# %% [markdown]
# Now both models are trained on the same instructions, in the same order, for the same number of steps. Then we measure
# both losses again: on the new task, and on the old text. **By how many nats will full fine-tuning raise the loss on
# the old text?** The new data is Python, too, so it might be nothing at all.

# %%
my_guess_forgetting = None   # how many nats? write a number in place of None

# %%
full = copy.deepcopy(model)
lora = attach(copy.deepcopy(model), adapter)
many = steps(full=80)
instructions = load_data("train").shuffle(seed=0).select(range(16 * many))     # each of them is seen once

runs = {"full": train(full, instructions, tokenizer, steps=many, lr=1e-3),
        "frozen + LoRA": train(lora, instructions, tokenizer, steps=many, lr=5e-3)}
said = "; ".join(f"{way}: from {run.loss[0]:.2f} to {run.smooth()[-1]:.2f}" for way, run in runs.items())
show(pictures.two_losses({way: run.smooth() for way, run in runs.items()}), alt=f"Training loss over steps. {said}.")

# %% [markdown]
# *Both learn. The learning rates differ because the two ways need different ones (chapter 08 measures it); neither was
# tuned further.*

# %%
results = {"full": (held_out_loss(full, tokenizer, new_task), held_out_loss(full, tokenizer, old_text)),
           "LoRA on": (held_out_loss(lora, tokenizer, new_task), held_out_loss(lora, tokenizer, old_text))}
with disabled(lora):
    results["LoRA off"] = (held_out_loss(lora, tokenizer, new_task), held_out_loss(lora, tokenizer, old_text))

said = "; ".join(f"{way}: new task {new:.2f}, old text {old:.2f}" for way, (new, old) in results.items())
show(pictures.learned_and_forgot(results, before), alt=f"Two bar charts of losses. {said}. Dashed lines show the "
                                                       "losses "
     f"before training: new task {before[0]:.2f}, old text {before[1]:.2f}.")

# %%
rise = {way: old - before[1] for way, (_, old) in results.items()}
print(pictures.compare_guess(my_guess_forgetting, rise["full"], "nats"))
display(Markdown(
    f"| | loss on the new task | loss on old text | change on old text |\n|---|---|---|---|\n"
    f"| before | {before[0]:.2f} | {before[1]:.2f} | |\n"
    + "\n".join(f"| {way} | {new:.2f} | {old:.2f} | {rise[way]:+.2f} |" for way, (new, old) in results.items())
    + f"\n\nWith LoRA off, both losses are exactly those of the beginning: **{results['LoRA off'] == before}**."))

# %% [markdown]
# *Whatever was forgotten with the adapter on comes back when it is taken off; a full fine-tune has no such switch.*
#
# Read the last column with care, because two popular sentences are tested by it.
#
# - *"Full fine-tuning forgets."* The row **full** says how much, after a minute of training on data that is Python as
#   well.
# - *"A frozen model cannot forget."* Look at the row **LoRA on**. The weights did not move, and still the model with
#   its adapter answers differently on old text. What the frozen model gives you is the row **LoRA off**: everything
#   that it was, to the last bit, one switch away.
#
# How far each way forgets depends on the learning rate, the number of steps and the data; this is one run of each, and
# not a contest. (Try `lr=3e-4` for the full one: does it still learn, and what does it forget?) What does *not* depend
# on any of them is that an adapter can be taken off.

# %%
for title, which in (("before", model), ("full", full), ("frozen + LoRA", lora)):
    print(f"— {title} —\n{generate(which, tokenizer, prompt_of(row), max_new_tokens=50).strip()}\n")
print("— asked for —\n" + prompt_of(row))

# %% [markdown]
# One more cost shows only when the training is over: what has to be **stored for each task**.

# %%
whole = sum(p.nbytes for p in full.parameters())
part = sum(p.nbytes for p in lora.parameters() if p.requires_grad)
display(Markdown(f"One more task costs {whole / 1e6:.1f} MB as a full fine-tune (a whole model) and {part / 1e6:.1f} "
                 f"MB as an adapter. Ten tasks: {10 * whole / 1e6:.0f} MB, against {(whole + 10 * part) / 1e6:.0f} MB "
                 f"for one base and ten adapters."))

# %% [markdown]
# ## The map of methods
#
# Where can trained numbers be put into a model that is otherwise frozen? Below is one block of a Llama; a model is a
# stack of such blocks. The letters mark where each method of this course puts its own.

# %%
show(pictures.method_map(), alt=pictures.METHOD_MAP_ALT)

# %% [markdown]
# *Every method is an answer to the same question: where do a few trained numbers have the most effect?*
#
# Hugging Face's library, `peft`, knows many more. Source 003 lists four of them. Do not trust a list in a text (nor one
# in this course): ask the library that is installed.

# %%
import peft

types = sorted(getattr(kind, "value", str(kind)) for kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING)
in_course = {"LORA": "02", "IA3": "06", "PREFIX_TUNING": "07", "PROMPT_TUNING": "07", "P_TUNING": "07",
             "ADAPTION_PROMPT": "07", "ADALORA": "08"}
in_003 = ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "LORA")

print(f"peft {peft.__version__} has {len(types)} types:\n")
shown = [f"{name} ({in_course[name]})" if name in in_course else name for name in types]
for first in range(0, len(shown), 4):
    print("  ".join(f"{name:27}" for name in shown[first:first + 4]).rstrip())
print("\n(02) means: in chapter 02 of this course")
print("the four of source 003 are among them:", all(name in types for name in in_003))
print("QLORA is a type:", "QLORA" in types)
print("a type has ADAPTER in its name:", any("ADAPTER" in name for name in types))

# %% [markdown]
# QLoRA is no type of its own there: it is LoRA on a model whose weights were loaded in 4 bits. And the bottleneck
# adapters of 2019, which gave adapters their name, live in another library, called `adapters`.

# %% [markdown]
# ## Against production
#
# Do our numbers agree with the tools that people use? First the counts, of the same LoRA on the same model, ours and
# `peft`'s; and the bytes of the weights, ours and `transformers`'. Tolerance: none, they are whole numbers.

# %%
theirs = peft.get_peft_model(load_base("tiny").model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
print("trainable, total   ours:", count(lora), "  peft:", theirs.get_nb_trainable_parameters())
print("equal:", tuple(count(lora)) == tuple(theirs.get_nb_trainable_parameters()))
print("bytes of weights   ours:", memory["full"]["weights"],
      "  transformers:", full.get_memory_footprint(return_buffers=False))

# %% [markdown]
# Then the line at the top of this chapter. That model has 13 GB of weights in 16 bits, which we neither have nor need:
# on PyTorch's *meta* device, tensors have a shape and no content. So we build the model as a shape, put LoRA on it as
# source 003 did, and count.

# %%
from transformers import OPTConfig, OPTForCausalLM

with torch.device("meta"):
    opt = OPTForCausalLM(OPTConfig(hidden_size=4096, num_hidden_layers=32, ffn_dim=16384, num_attention_heads=32,
                                   word_embed_proj_dim=4096))
opt = peft.get_peft_model(opt, peft.LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))
opt_trainable, opt_total = opt.get_nb_trainable_parameters()
opt_percent = 100 * (opt_trainable / opt_total)
print(f"trainable params: {opt_trainable:,} || all params: {opt_total:,} || trainable%: {opt_percent:.4f}")
print("as source 003 prints it:", (opt_trainable, opt_total) == (8_388_608, 6_666_862_592))

# %% [markdown]
# Where does `peft` count? In a method that is much like yours. Here is its source, from the version that is installed:

# %%
print(inspect.getsource(peft.PeftModel.get_nb_trainable_parameters))

# %% [markdown]
# The line that matters is `param.numel()`, added up twice, once under `requires_grad`. The `if`s around it are about
# parameters that hide their size: under DeepSpeed a weight may live on another machine and look empty here, and a 4-bit
# weight packs two numbers into each byte, so that counting entries gives half of the truth. You will pack them yourself
# in chapter 04.

# %% [markdown]
# ## The sources say … we measured …

# %%
four_bit = pictures.recipe_gigabytes(70, 0.1)["frozen in 4 bits + adapter"]
tiny_percent = 100 * (counts["frozen + LoRA"][0] / counts["frozen + LoRA"][1])
rows = [
    ("003", "`peft` has 4 types of methods",
     f"{len(types)} in peft {peft.__version__}; its four are still among them"),
    ("003", "PEFT is “performance efficient” fine-tuning",
     f"**parameter**-efficient: parameters are what it saves ({fewer:.0f} times fewer trained here)"),
    ("003", "LoRA trains 0.13 % of a Llama of 6.6 billion parameters",
     f"the share holds ({opt_percent:.4f} %), but the model is OPT-6.7B, as its own code shows: the same counts to the "
     "last digit"),
    ("001", "840 GB to fine-tune 70 billion parameters, 11 or more GPUs of 80 GB",
     f"holds at 12 bytes a parameter: {12 * 70} GB, {-(-12 * 70 // 80)} GPUs; with master copies {16 * 70:,} GB, "
     f"{-(-16 * 70 // 80)} GPUs"),
    ("QLoRA paper", "more than 780 GB for 65 billion",
     f"{12 * 65} GB at 12 bytes, the same recipe; {16 * 65:,} GB at 16"),
    ("001", "with QLoRA one 24 GB GPU fine-tunes 70 billion parameters",
     f"4-bit weights and a small adapter alone take {four_bit:.1f} GB (chapter 09 counts the rest)"),
    ("000", "freezing the weights avoids catastrophic forgetting",
     f"with the adapter **on**, the loss on old text changed by {rise['LoRA on']:+.2f} nats (full fine-tuning: "
     f"{rise['full']:+.2f})"),
    ("003", "the adapted model has perfect memory of previous tasks",
     f"with the adapter **off**, yes: changed by {rise['LoRA off']:+.2f} nats"),
    ("004", "full fine-tuning stores a whole model for each task, PEFT a small part",
     f"holds: {whole / 1e6:.1f} MB against {part / 1e6:.1f} MB a task here"),
    ("002", "PEFT trains a few percent or less",
     f"holds: {tiny_percent:.1f} % of our very small model, {opt_percent:.2f} % of OPT-6.7B"),
]
lines = ["| source | says | we found |", "|---|---|---|", *(" | ".join(["", *row, ""]).strip() for row in rows)]
display(Markdown("\n".join(lines)))


# %% [markdown]
# ## Questions
#
# Write the letter of your answer in each answer cell and run the check below it. Every option is explained when you
# choose it. If you prefer to click, `ask` shows a question with buttons; it is for practice, and only the letter in the
# cell counts:

# %%
ask("start-q-feature")

# %% question="start-q-feature"

# %% question="start-q-frozen"

# %% question="start-q-memory"

# %% question="start-q-twelve"

# %% question="start-q-forgetting"

# %% [markdown]
# ## Summary
#
# | | feature-based transfer | full fine-tuning | PEFT |
# |---|---|---|---|
# | trains | something on top | every weight | a few new numbers inside |
# | gradient runs through | the top only | the whole model | the whole model |
# | memory, a model's parameter, 16-bit training | 2 bytes | 12 or 16 bytes | 2 bytes, and 12 or 16 for each new one |
# | kept for each task | the top | a whole model | the new numbers |
# | can the model learn to write something new? | no | yes | yes |
# | the old model afterwards | untouched | overwritten | one switch away |
#
# **Words to keep.** *Parameter*: a number that training may change. *Frozen*: `requires_grad` is False. *Recipe*: what
# is held for each parameter, in how many bits. *Catastrophic forgetting*: getting worse at what you could do, by
# learning something else.
#
# **To read.** Houlsby and others, *Parameter-Efficient Transfer Learning for NLP* (2019), the paper that set out the
# question; its introduction compares the same three ways. Lialin and others, *Scaling Down to Scale Up* (2023), a map
# of many more methods. McCloskey and Cohen, *Catastrophic Interference in Connectionist Networks* (1989), an early and
# clear account of forgetting. Biderman and others, *LoRA Learns Less and Forgets Less* (2024), the experiment of this
# chapter on large models.
#
# **Next.** Chapter 01 asks why a few numbers can be enough: what *rank* is, and how much of a weight's change fits into
# a small one. If you would rather build first, go to chapter 02 and write LoRA.
