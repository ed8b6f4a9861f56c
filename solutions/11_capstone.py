# ---
# title: Llama-3.2-1B on a T4
# minutes: 150
# needs: [03_finetune, 05_qlora, 09_vram]
# gpu: true
# ---
# %% [markdown]
# This is the last chapter, and it is a piece of work rather than a lesson: fine-tune a real model on a real card, with
# every method of this course on one task, and write a report that somebody can rely on. On Colab's T4 the model is
# Llama-3.2-1B. Without a GPU it is the bundled Llama, in the same cells, and everything takes minutes.
#
# **After this chapter you can**
#
# - say what a given card can compute in, and set up a session that may end at any moment;
# - cut a data set of unknown quality down to rows worth training on, and say what you left out;
# - plan the memory of a run before anything is loaded, and hold the plan against the measurement;
# - fine-tune by QLoRA, save what `peft` loads, and hand it in;
# - compare methods in one table, with intervals, and write down what it does and does not show.
#
# **What you hand in:** this notebook, and one zip with the adapter that you train in it.
#
# *Time on a T4:* about 15 minutes for the first fine-tune and half an hour for the table; you can leave it alone.
# (Those are computed, not measured: no T4 was at hand when this was written.) The exercises take longer than the card.

# %%
import json
import logging
import os
import shutil
import textwrap
import warnings

import torch
from IPython.display import Markdown, display

from pefttools import lab
from pefttools.grading import check
from pefttools.lab import capstone, python_codes
from pefttools.lab.capstone import METHODS, MiB, attempt
from pefttools.lab.colab import hand_in, place, run_folder
from pefttools.vram import estimate
from pefttools.vram.gpus import GPUS
from pefttools.vram.units import gb, gib
from pefttools.widgets import capstone as pictures
from pefttools.widgets import finetune as pictures_of_03
from pefttools.widgets.base import show

logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)     # it complains about extras that we do not need
warnings.filterwarnings("ignore")
quick = os.environ.get("PEFTTOOLS_QUICK") == "1"                 # the test suite: same code, fewer steps

# Two settings that are yours:
BASE = "auto"          # "auto": Llama-3.2-1B where there is a GPU, else "tiny"; or name one, any model of the hub
IN_DRIVE = None        # True: mount Google Drive and keep checkpoints there (Colab asks you); None: if it is mounted

# %% [markdown]
# ## The way

# %%
show(pictures_of_03.seven_steps([
    ("1 place", "which card,\nwhich numbers"),
    ("2 data", "25,000 rows,\nsome of them good"),
    ("3 plan", "bytes, before\nanything runs"),
    ("4 QLoRA", "the adapter that\nyou hand in"),
    ("5 all methods", "one task,\none table"),
    ("6 check", "planned against\nmeasured"),
    ("7 report", "what it shows,\nwhat it does not")]),
    alt="Seven boxes in a chain: place, data, plan, QLoRA, all methods, check, report. Under each, what it is about: "
        "which card and which numbers; 25,000 rows, some of them good; bytes, before anything runs; the adapter that you "
        "hand in; one task and one table; planned against measured; what it shows and what it does not.")

# %% [markdown]
# *In orange, where the figures of your report come from: step 5 measures, step 6 holds the plan against it.*
#
# # Step 1 · Where are you?

# %%
here = place()
print(here)
RUNS = run_folder("capstone", drive=IN_DRIVE)

# %% [markdown]
# **Sessions end.** Colab takes the machine back after some idle time, or after some hours, or when somebody else
# needs it, and says nothing. So everything below goes into the folder named above: checkpoints while it trains, each
# row of the table when it is done. Run all cells again, and what is finished is read, what was cut off goes on. That
# helps only if the folder survives: on Colab set `IN_DRIVE = True`.
#
# **A T4 is from 2018** (compute capability 7.5). Two things follow. Its tensor cores know float16 and not bfloat16,
# which came with 8.0. And FlashAttention needs 8.0, so attention runs in the older memory-efficient kernel or in
# plain matrix products; PyTorch's `sdpa` chooses among what there is.
#
# There is a trap. `torch.cuda.is_bf16_supported()` says `True` on a T4: it counts emulation, which is slow.
# `torch.cuda.is_bf16_supported(including_emulation=False)` says what the hardware does.

# %% [markdown] exercise="pick-precision"
# Write `pick_precision(gpu, capability, claims_bf16)`, which returns `"bfloat16"`, `"float16"` or `"float32"`.
#
# | argument | what it is |
# |---|---|
# | `gpu` | the card's name, `""` without a GPU |
# | `capability` | `(major, minor)`, such as `(7, 5)` |
# | `claims_bf16` | what `torch.cuda.is_bf16_supported()` says |
#
# bfloat16 from compute capability 8.0 on, float16 on older cards, float32 without a GPU.
#
# *Why it matters:* the wrong choice either crashes, or runs several times more slowly without a word.

# %% exercise="pick-precision"
def pick_precision(gpu, capability, claims_bf16):
    """The name of the dtype to compute in on this card."""
    ### BEGIN SOLUTION
    if not gpu:
        return "float32"
    return "bfloat16" if capability >= (8, 0) else "float16"
    ### END SOLUTION

# %% check="pick-precision"
check("pick-precision", pick_precision)

# %% [markdown] hint="pick-precision" level="nudge"
# Three cases. One of the three arguments is of no use at all.

# %% [markdown] hint="pick-precision" level="code"
# First `if not gpu: return ...`. Then compare tuples: `capability >= (8, 0)`.

# %%
claims = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
chosen = attempt(pick_precision, here.gpu, here.capability, claims, otherwise=str(here.dtype).removeprefix("torch."))
print(f"here: {chosen}")
for name, capability in (("T4", (7, 5)), ("A100", (8, 0)), ("", (0, 0))):
    print(f"{name or 'no GPU':>8}: {attempt(pick_precision, name, capability, True, otherwise='?')}")

# %% question="capstone-q-scaler"

# %% question="capstone-q-no-deps"

# %% [markdown]
# ### The base
#
# Llama-3.2-1B is **gated**: Meta wants its licence accepted before the hub gives it out. The order here is: the gated
# repository, with your token (on Colab: the key symbol at the left, a secret called `HF_TOKEN`); an ungated mirror of
# the same weights, for which the same licence holds; the bundled model. What was taken, and why the others were not, is
# printed. Both repositories are asked for at a fixed commit (`pefttools.lab.base.REVISIONS`).

# %%
name = BASE if BASE != "auto" else "llama-3.2-1b" if here.gpu else "tiny"
settings = {} if name == "tiny" else {"dtype": here.dtype, "attn_implementation": here.attention}


def load():
    """A fresh base: every method changes the one that it gets."""
    return lab.load_base(name, quiet=True, **settings)


base = load()
print(base)
scale = capstone.scale_of(base)
large = base.model.config.hidden_size >= capstone.LARGE_WIDTH
print(f"{scale.examples} rows in each step; {scale.first} steps for the first fine-tune, {scale.steps} for each row of "
      "the table")

# %% [markdown]
# # Step 2 · Data
#
# `flytech/python-codes-25k` is the set that source 000 fine-tunes on: short wishes, and Python that fulfils them.
# Nobody says who or what wrote it. So it is checked on loading: are the four columns there, are they texts? Then
# comes what only you can decide: which rows do you want the model to learn from?

# %%
codes = python_codes.load(scale.rows + scale.look if large else 2000, max_chars=python_codes.MAX_CHARS, quiet=True)
print(textwrap.fill(str(codes), 95, break_on_hyphens=False))
print("digest of these rows, for the report:", codes.record()["sha256"])
print("\none row:\n" + codes.rows[0]["text"])

# %% [markdown]
# **The sources say: load it like this.** Slide 000 takes one file by its address, from the branch `main`. Three
# remarks. A branch moves, a commit does not, so we name one. The repository holds its rows twice, as `.json` and as
# `.jsonl`; who asks `load_dataset` for the repository, without a file, gets every row twice. And `text` joins the
# columns with spaces; we train on what we will ask for, with line ends, so `text` is written anew.
#
# (If the hub was not reachable, the lines above say so, and the rows are the bundled ones: clean by construction, so
# nothing was left out.)

# %% question="capstone-q-pinned"

# %% [markdown] exercise="keep-rows"
# Write `keep_rows(rows, max_chars)`: the numbers (positions in the list) of the rows to keep, in rising order.
#
# A row is a dict with the texts `instruction`, `input` and `output`. It stays if
#
# 1. the three texts together have at most `max_chars` characters;
# 2. its program **is Python**: `ast.parse` takes it. The program is what stands between a line "```` ```python ````"
#    and the next "```` ``` ````"; where there is no such fence, all of `output`;
# 3. no row before it that stays has the same instruction, input and output.
#
# *Why it matters:* in the real set, a row whose program begins `input('Enter a task or type 'done' to finish: ')` is
# among the first. A model learns that, too.

# %% exercise="keep-rows"
def keep_rows(rows, max_chars):
    """Numbers of the rows that are short enough, are Python, and are no repetition."""
    ### BEGIN SOLUTION
    import ast

    kept, seen = [], set()
    for number, row in enumerate(rows):
        parts = row["instruction"], row["input"], row["output"]
        program = row["output"]
        if "```python" in program:
            program = program.split("```python", 1)[1].split("```", 1)[0]
        try:
            ast.parse(program)
        except (SyntaxError, ValueError):
            continue
        if sum(map(len, parts)) <= max_chars and parts not in seen:
            seen.add(parts)
            kept.append(number)
    return kept
    ### END SOLUTION

# %% check="keep-rows"
check("keep-rows", keep_rows)

# %% [markdown] hint="keep-rows" level="nudge"
# Go through the rows with `enumerate`. Three conditions, each a reason to `continue`; at the end, remember and append.

# %% [markdown] hint="keep-rows" level="shape"
# A set remembers what was seen; a tuple of the three texts can be put into it. `text.split("```python", 1)[1]` is what
# stands behind the first fence, and `.split("```", 1)[0]` cuts at the next one.

# %% [markdown] hint="keep-rows" level="code"
# ```python
# for number, row in enumerate(rows):
#     parts = row["instruction"], row["input"], row["output"]
#     ...                                   # the program
#     try:
#         ast.parse(program)
#     except (SyntaxError, ValueError):
#         continue
#     if ... <= max_chars and parts not in seen:
#         ...
# ```

# %% [markdown]
# The loader did the same (`python_codes.sensible`, which also drops rows with next to no program). Here is a handful
# with one fault each, through both:

# %%
good = codes.rows[0]
handful = [good, dict(good), {**good, "output": "```python\nprint('press 'q' to stop')\n```"},
           {**good, "output": "```python\n" + "x = 1\n" * 500 + "```"}, codes.rows[1]]
kept, left_out = python_codes.sensible(handful)
reasons = ", ".join(f"{n} {why}" for why, n in left_out.items())
print(f"the loader keeps {len(kept)} of {len(handful)}; left out: {reasons}")
print(f"yours: {attempt(keep_rows, handful, python_codes.MAX_CHARS, otherwise='-')}")

# %% [markdown]
# Now the rows for training and for looking. A large base learns from the hub's rows. The bundled model is too small for
# that set, so it learns from the bundled one, which was made for it (and is looked at on held-out *wordings*, chapter
# 03).

# %%
if large and codes.revision:
    train_rows, look_rows = codes.rows[scale.look:], codes.rows[:scale.look]
else:
    train_rows = [dict(row) for row in lab.load_data("train").select(range(scale.rows))]
    look_rows = [dict(row) for row in lab.load_data("held_out").shuffle(seed=0).select(range(scale.look))]
texts = lab.base_texts(scale.texts)
print(f"{len(train_rows):,} rows to train on, {len(look_rows)} to look at, {len(texts)} texts of another kind (for "
      "forgetting)")

# %% [markdown]
# # Step 3 · Plan it
#
# ### By hand
#
# Llama-3.2-1B, QLoRA on all linear layers with $r = 8$, 4 rows of 512 tokens, on a T4. Chapter 09's terms, with a
# pencil:
#
# | term | reckoning | bytes |
# |---|---|---|
# | codes and scales of 973,078,528 linear weights | $\cdot\, 4.127 / 8$ | 0.50 GB |
# | embedding and norms, 262,735,872 numbers | $\cdot\, 2$ | 0.53 GB |
# | $A$, $B$, gradients, two moments: 5,636,096 numbers | $\cdot\, 16$ | 0.09 GB |
# | logits and their loss: 2048 tokens, 128,256 words | $\cdot\, 12$ | 3.15 GB |
# | what the layers keep | 16 layers · 2048 tokens · some 0.18 MB | 6 GB |
#
# The model, one billion parameters, is a tenth of it. In code:

# %%
numbers = 8 * 16 * (2 * (2048 + 2048) + 2 * (2048 + 512) + 3 * (2048 + 8192))
pencil = {"codes and scales": 973_078_528 * 4.127 / 8, "embedding and norms": 262_735_872 * 2,
          "what trains": 16 * numbers, "logits": 2048 * 128_256 * 12}
for term, n_bytes in pencil.items():
    print(f"{term:>22}: {gb(n_bytes, 2)}")
t4_job = dict(batch=4, seq=512, r=8, targets="all-linear", dtype="float16", gpu="t4", keep_outputs=False)
by_formula = {again: estimate("llama-3.2-1b", "qlora", checkpointing=again, **t4_job) for again in (False, True)}
kept_by_layers = by_formula[False].terms["activations"]
print(f"{'what the layers keep':>22}: {gb(kept_by_layers, 2)}, {kept_by_layers / (16 * 2048) / 1e6:.2f} MB a token and "
      f"layer; with checkpointing {gb(by_formula[True].terms['activations'], 2)}")
weights = pencil["codes and scales"] + pencil["embedding and norms"]
print(f"the model itself is {weights / (sum(pencil.values()) + kept_by_layers):.0%} of all that")
print(f"formula, all together: {gib(by_formula[False].total, 2)}, with checkpointing {gib(by_formula[True].total, 2)}")
print(f"a T4 has {gib(GPUS['t4'].usable, 2)}, and a CUDA context comes out of it")

# %% [markdown] exercise="plan-it"
# Write `plan_it(methods, examples, room, predict)`, which plans a run of every method.
#
# | argument | what it is |
# |---|---|
# | `methods` | a list of names |
# | `examples` | rows wanted in one optimizer step, a power of two |
# | `room` | bytes that there are |
# | `predict` | a function: `predict(method, batch, checkpointing)` → bytes at the peak of a step |
# | *returns* | `{method: {"batch", "accumulate", "checkpointing", "bytes"}}`, or `{method: None}` where nothing fits |
#
# A choice **fits** if its prediction, times 1.05, is at most `room`. First try without checkpointing: all examples at
# once, then half of them, a quarter … down to 1; take the first that fits. Only if none does, the same with
# checkpointing. `batch · accumulate` is `examples`. `bytes` is the prediction itself, without the margin: you will
# hold it against the measurement.
#
# *Why it matters:* out of memory after 40 minutes costs 40 minutes, and on Colab perhaps the session.

# %% exercise="plan-it"
def plan_it(methods, examples, room, predict):
    """For every method the batch, the accumulation, whether to checkpoint, and the bytes predicted; or None."""
    ### BEGIN SOLUTION
    found = {}
    for method in methods:
        found[method] = None
        for checkpointing in (False, True):
            batch = examples
            while batch >= 1 and predict(method, batch, checkpointing) * 1.05 > room:
                batch //= 2
            if batch >= 1:
                found[method] = {"batch": batch, "accumulate": examples // batch, "checkpointing": checkpointing,
                                 "bytes": predict(method, batch, checkpointing)}
                break
    return found
    ### END SOLUTION

# %% check="plan-it"
check("plan-it", plan_it)

# %% [markdown] hint="plan-it" level="nudge"
# Three loops inside each other: methods, checkpointing (no, yes), batches (from large to small). Leave the inner two as
# soon as something fits.

# %% [markdown] hint="plan-it" level="shape"
# Begin each method with `found[method] = None`. A batch that is halved goes 8, 4, 2, 1 and then 0: stop there.

# %% [markdown] hint="plan-it" level="code"
# ```python
# for checkpointing in (False, True):
#     batch = examples
#     while batch >= 1 and predict(...) * 1.05 > room:
#         batch //= 2
#     if batch >= 1:
#         found[method] = {...}
#         break
# ```

# %% [markdown]
# First the plan for Llama-3.2-1B on a T4. That needs no T4: it is arithmetic. **Predict:** which methods need
# checkpointing, and does full fine-tuning fit?

# %%
from pefttools.lab.capstone_plan import plan_it as by_the_library
from pefttools.lab.colab import Place


def plan_table(plan):
    lines = ["| method | rows × passes | checkpointing | planned |", "|---|---|---|---|"]
    for method, choice in plan.items():
        if choice is None:
            lines.append(f"| {method} | does not fit | | |")
        else:
            again = "yes" if choice["checkpointing"] else "no"
            lines.append(f"| {method} | {choice['batch']} × {choice['accumulate']} | {again} | "
                         f"{choice['bytes'] / MiB:,.0f} MiB |")
    display(Markdown("\n".join(lines)))


t4 = Place(True, "T4", (7, 5), GPUS["t4"].usable)
on_t4 = capstone.predictor("llama-3.2-1b", capstone.LARGE.max_length, capstone.LARGE, t4)
t4_plan = attempt(plan_it, METHODS, capstone.LARGE.examples, capstone.room_of(t4, 0), on_t4, otherwise=by_the_library)
plan_table(t4_plan)

# %% [markdown]
# Now for what is here. The longest rows decide, so the plan is made for them. Without a GPU nothing would be too
# large, and so we pretend: the bundled model gets a "card" of 190 MiB.

# %%
longest = capstone.longest(train_rows, base.tokenizer, scale)
tokens = len(longest[0]["input_ids"])
room = capstone.room_of(here, pretend=190 * MiB)
predict = capstone.predictor(base.model, tokens, scale, here)
methods = METHODS if not quick else ("qlora", "prefix", "full")
plan = attempt(plan_it, methods, scale.examples, room, predict, otherwise=by_the_library)
print(f"{base.name}: longest row {tokens} tokens, room {gib(room, 2)}")
plan_table(plan)

# %% question="capstone-q-first-step"

# %% [markdown]
# # Step 4 · QLoRA first
#
# Before it is trained, ask the model for a program:

# %%
small = lab.load_base("tiny")
question = lab.load_data("held_out")[1]
asked = lab.prompt_of(question)


def answer(model, tokenizer, most=60):
    return lab.generate(model, tokenizer, asked, max_new_tokens=most)


print(asked, end="")
before = answer(small.model, small.tokenizer)
print("‹" + before + "›")
if large:
    print(f"\n{base.name}:\n‹{answer(base.model, base.tokenizer)}›")

# %% [markdown] exercise="run-it"
# Write `my_run(base, rows, folder, steps, lr, choice)`: fine-tune `base` by QLoRA on all linear layers with **rank 8
# and α = 16**, and save the adapter into `folder`. Use `run_method` of `pefttools.lab.finetune`, which chapters 03
# and 05 have taken apart: it quantizes, attaches, plans, trains with checkpoints, and saves peft's files.
#
# | argument | what it is |
# |---|---|
# | `base` | a loaded base; `run_method` takes it as `base=` |
# | `rows` | the rows, for `data=` |
# | `folder` | for `out=`: checkpoints while it runs, the adapter at the end. Called again, the same run goes on |
# | `steps`, `lr` | optimizer steps and peak learning rate |
# | `choice` | of your plan: a dict with `"batch"`, `"accumulate"`, `"checkpointing"` (and `"bytes"`) |
# | *returns* | what `run_method` returns |
#
# The first positional argument of `run_method` is the method's name. Rank, α and targets are `r=`, `alpha=`,
# `targets="all-linear"`. `progress=False` keeps the progress bar out of the notebook that you hand in.
#
# **What is judged** is not the function but the **files**: the cell after it runs your function on the *bundled*
# model, for everybody, with a GPU or without. The grader loads the adapter onto that model, writes fresh rows and
# takes the loss on them: it has to be at most 0.6 nats (the base has about 2.5). It cannot run Llama-3.2-1B; an
# adapter of that, if you trained one, is handed in beside, and its structure is checked.
#
# *Why it matters:* this is the line that you will write at work.

# %% exercise="run-it"
def my_run(base, rows, folder, steps, lr, choice):
    """QLoRA on all linear layers, r = 8, α = 16, saved in folder; returns run_method's Result."""
    ### BEGIN SOLUTION
    from pefttools.lab.finetune import run_method

    return run_method("qlora", base=base, data=rows, out=folder, steps=steps, lr=lr,
                      r=8, alpha=16, targets="all-linear", batch=choice["batch"], accumulate=choice["accumulate"],
                      checkpointing=choice["checkpointing"], progress=False)
    ### END SOLUTION

# %%
bundled_rows = [dict(row) for row in lab.load_data("train").select(range(2000))]
small_choice = {"batch": 8, "accumulate": 1, "checkpointing": False}
mine = attempt(my_run, small, bundled_rows, RUNS / "hand_in", capstone.HAND_IN, 1e-2, small_choice)

# %% check="run-it"
check("run-it", RUNS / "hand_in")

# %% [markdown] hint="run-it" level="nudge"
# One call. Go through the table of arguments, and hand each of them on under the name that `run_method` has for it.

# %% [markdown] hint="run-it" level="shape"
# `base=base, data=rows, out=folder, steps=steps, lr=lr`, then rank, α and targets, then three entries of `choice`.

# %% [markdown] hint="run-it" level="code"
# `return run_method("qlora", base=base, data=rows, out=folder, ..., batch=choice["batch"], accumulate=...,
# checkpointing=...)`

# %% [markdown]
# What did it learn? The same question once more, the loss on held-out wordings, and programs that are run against their
# tests (pass@1, chapters 03 and 10):

# %%
look = lab.load_data("held_out").shuffle(seed=0).select(range(16 if quick else 64))
if mine is None:
    print("my_run is not written yet: nothing was trained.")
else:
    show(mine.history.plot("QLoRA on the bundled model"),
         alt=f"Training loss of QLoRA over {len(mine.history.loss)} steps: it falls from {mine.history.loss[0]:.2f} to "
             f"{mine.history.smooth()[-1]:.2f} nats per target token.")
    print("before ‹" + before.strip() + "›\n\nafter  ‹" + answer(mine.model, mine.tokenizer).strip() + "›\n")
    nats, counts = zip(*lab.row_losses(mine.model, mine.tokenizer, look))
    untouched = lab.held_out_loss(lab.load_base("tiny").model, mine.tokenizer, look)
    print(f"held-out loss {lab.bootstrap(nats, counts)}; of the base {untouched:.2f}")
    print(lab.evaluate(mine.model, mine.tokenizer, look, n=4 if quick else 32))
    print(mine.memory())

# %% [markdown]
# ### The same files in `peft`
#
# What was saved are the two files that `peft` knows. So `peft` loads them: onto the base in 32 bits, as the grader
# does. Then the logits of its model and of ours on that base have to agree.

# %%
import peft

from pefttools.checkpoint import load_adapter

peft_gap = None
if mine is not None:
    folder = RUNS / "hand_in"
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        print(f"{file:<28}{(folder / file).stat().st_size / 1e6:8.3f} MB")
    ids = small.tokenizer(asked, return_tensors="pt")["input_ids"]
    theirs = peft.PeftModel.from_pretrained(lab.load_base("tiny", device="cpu").model, folder).eval()
    ours = load_adapter(lab.load_base("tiny", device="cpu").model, folder).eval()
    with torch.no_grad():
        plain = lab.load_base("tiny", device="cpu").model(ids).logits
        by_peft, by_us = theirs(ids).logits, ours(ids).logits
        four_bits = mine.model(ids.to(mine.model.device)).logits.cpu()
    peft_gap = (by_peft - by_us).abs().max().item()
    print(f"logits: peft and ours differ by {peft_gap:.2g} at the most; the adapter moves them by up to "
          f"{(by_us - plain).abs().max():.1f}")
    print("on the base in 4 bits, where it was trained, they are off from these by up to "
          f"{(four_bits - by_us).abs().max():.2f}")
    assert peft_gap <= 1e-4 * by_us.abs().max()

# %% [markdown]
# **Where does it live?** In peft, `PeftModel.from_pretrained` (peft_model.py) reads the configuration, puts the
# layers in (`inject_adapter_in_model`) and then the tensors (`set_peft_model_state_dict` in
# `utils/save_and_load.py`). Find there how it takes an adapter for a quantized base: nothing about quantization is in
# the two files.

# %% question="capstone-q-merged"

# %% [markdown]
# ### And now the real one
#
# With a GPU, the same function on Llama-3.2-1B. With `progress=False` in it nothing is said until it is done; for this
# one run you may prefer `progress=True`, whose bar tells the time that is left. If the session ends, run all again: it
# goes on from the last checkpoint.

# %% tags=["gpu"]
if not large:
    print("No GPU, or no Llama: the bundled model's adapter above is the one that you hand in.")
else:
    run = RUNS / "llama_1b"
    big = attempt(my_run, load(), train_rows, run, scale.first, scale.lr, plan["qlora"])
    if big is not None:
        print(big.memory())
        print("after ‹" + answer(big.model, big.tokenizer, 120).strip() + "›")
        for kind in ("config.json", "model.safetensors"):
            shutil.copyfile(run / f"adapter_{kind}", RUNS / "hand_in" / f"llama_1b_{kind}")
        del big

# %% [markdown]
# # Step 5 · All methods, one task, one table
#
# The same base, rows, order, and number of steps for all. What differs is what trains. **Predict** before you run it:
# which method has the smallest peak of memory? Source 004 says "very low" for prompt tuning, "high" for full
# fine-tuning.

# %%
my_guess = None         # a method's name

# %%
task = capstone.Task(load, train_rows, look_rows, texts, scale, RUNS)
table = capstone.run_all(task, plan)
shown = capstone.markdown(table)
for joined in (" × ", " (", " to "):                     # so that no cell of the table is broken there
    shown = shown.replace(joined, joined.replace(" ", "\u00a0"))
display(Markdown(shown))
smallest = min((row for row in table if "missing" not in row), key=lambda row: row["measured"])
print(f"smallest peak: {smallest['method']}" + (f" (you said {my_guess})" if my_guess else ""))

# %% [markdown]
# *Loss: held-out rows, nats per target token, with a 95 % interval over rows. Forgetting: how much the loss on texts
# of the base's own kind has risen. Tokens/s: prompts and answers, without padding. Memory: the peak of one step on
# the longest rows, by torch's counters on a GPU, else by counting every tensor. The learning rates are customary ones
# or those of earlier chapters, one seed, few steps: this table says what a first try gives.*

# %%
show(pictures.curves_figure(table, base.name), alt="Training losses. " + "; ".join(
    f"{row['method']} {row['curve'][0]:.2f} to {row['curve'][-1]:.2f}" for row in table if "missing" not in row) + ".")

# %% [markdown]
# *Same rows in the same order: where the curves part, it is the method, its rate, and what it can change at all.*
#
# # Step 6 · Planned against measured

# %%
show(pictures.planned_figure(table, room, base.name), alt=pictures.planned_alt(table))
off = max((abs(row["planned"] / row["measured"] - 1) for row in table if "missing" not in row))
print(f"largest difference: {off:.1%}")

# %% [markdown]
# *The plan was made before a single tensor was there. A method that stands far to the left may stand there because it
# was given fewer rows at a time: look at the column "rows".*
#
# How would the methods compare with the *same* batch? The plan's function knows:

# %%
same = {method: predict(method, scale.examples, False) for method in METHODS}
display(Markdown("\n".join([
    "| method | " + " | ".join(same) + " |", "|---|" + "---|" * len(same),
    f"| MiB, {scale.examples} rows | " + " | ".join(f"{n / MiB:,.0f}" for n in same.values()) + " |"])))

# %% [markdown]
# ## Who is beaten by nobody?
#
# Two numbers for each method, memory and loss, and less is better in both. A method is **beaten** if another is not
# worse in either number and better in at least one. What no one beats is the **Pareto front**: the only methods worth
# choosing, if these two numbers are all that counts.

# %% [markdown] exercise="pareto-front"
# Write `pareto_front(points)`: `points` is a list of `(name, memory, loss)`; return the names of those that no other
# beats, in the order given. Two points with the same two numbers do not beat each other.
#
# *Why it matters:* it says what a table of two columns can say without inventing a price for memory.

# %% exercise="pareto-front"
def pareto_front(points):
    """Names of the (name, memory, loss) that no other point beats; less is better in both."""
    ### BEGIN SOLUTION
    names = []
    for name, memory, loss in points:
        if not any(m <= memory and q <= loss and (m < memory or q < loss) for _, m, q in points):
            names.append(name)
    return names
    ### END SOLUTION

# %% check="pareto-front"
check("pareto-front", pareto_front)

# %% [markdown] hint="pareto-front" level="nudge"
# For every point ask of every other: is it not worse in both, and better in one? Keep the point if the answer is
# never yes.

# %% [markdown] hint="pareto-front" level="code"
# `not any(m <= memory and q <= loss and (...) for _, m, q in points)`

# %%
points = list(capstone.points(table))
print("on the front:", attempt(pareto_front, points, otherwise=pictures.on_front(table, "memory", "loss")))

# %% [markdown]
# **Questions to try** with the drop-downs: who is on the front of memory and forgetting? Does speed change the
# picture? Are the trainable parameters a good guess at the memory?

# %%
explorer = pictures.pareto_explorer(table, base.name)

# %% [markdown]
# *Bold names are on the front, the dashed line joins them; grey lines are 95 % intervals. Where two intervals
# overlap, the front may be another with other rows.*
#
# # The sources say … we measured …
#
# 001 (its section 6) and 004 have tables of these methods, in words. Which of the words hold on this base? (In the
# cell's tests "low" and "high" are taken relative to the methods in the table, at the same batch.)

# %%
by = {row["method"]: row for row in table if "missing" not in row}
losses = {method: row["loss"] for method, row in by.items()}
lost = {method: row["forgetting"] for method, row in by.items()}
named = {"adapter": "bottleneck"}                        # the memory model's name for it
one_b = {method: estimate("llama-3.2-1b", named.get(method, method), 1, 128, r=8,
                          targets="all-linear" if "lora" in method or "dora" in method else None) for method in METHODS}
billion = one_b["full"].parameters
percent = {method: 100 * memory.trainable / billion for method, memory in one_b.items()}
slides = estimate("llama-3.2-1b", "lora", 4, 512, r=8, targets=("q_proj", "v_proj"), dtype="float16", gpu="t4")
mib = {method: f"{n / MiB:,.0f}" for method, n in same.items()}


def holds(good, words=("✓", "✗")):
    return words[0] if good else words[1]


rows = [
    ("source", "it says", "we found", ""), ("---",) * 4,
    ("000", "its fine-tune: r = 8 on q and v",
     f"{slides.trainable:,} of {billion:,} parameters train; 4 rows of 512 tokens in float16 take {gib(slides.total)}: "
     "it fits on a T4 even without 8 bits", holds(slides.device < GPUS["t4"].usable)),
    ("000", "padding to 512, one epoch",
     f"its set has 24,813 rows on the hub: {24_813 * 512 / 1e6:.1f} million tokens; the rows that we keep have at most "
     f"{python_codes.MAX_CHARS:,} characters, so most of these tokens would be padding", "a waste"),
    ("004", "prompt tuning trains < 0.1 %", f"Llama-3.2-1B, 20 tokens: {percent['prompt']:.4f} %",
     holds(percent["prompt"] < 0.1)),
    ("004", "prefix tuning trains 1–2 %",
     f"Llama-3.2-1B, 20 positions: {percent['prefix']:.3f} % (grouped queries make the keys narrow)",
     holds(1 <= percent["prefix"] <= 2)),
    ("004", "adapters train 1–5 %", f"Llama-3.2-1B, width 64, one a layer: {percent['adapter']:.2f} %",
     holds(1 <= percent["adapter"] <= 5)),
    ("004", "LoRA trains 0.1–1 %", f"Llama-3.2-1B, r = 8 on all linear layers: {percent['lora']:.2f} %",
     holds(0.1 <= percent["lora"] <= 1)),
    ("004", "memory: prompt tuning very low, LoRA low",
     f"same batch, {base.name}: {mib['prompt']} and {mib['lora']} MiB; all methods within a factor of "
     f"{max(same.values()) / min(same.values()):.1f}",
     holds(same["prompt"] < 0.6 * same["lora"], ("✓", "✗: activations and logits rule"))),
    ("001", "memory: QLoRA low, LoRA medium, full very high",
     f"same batch: {mib['qlora']}, {mib['lora']}, {mib['full']} MiB",
     holds(same["qlora"] < same["lora"] < same["full"], ("order ✓", "not this order"))),
    ("001", "full fine-tuning: memory very high",
     f"weights, gradients and two moments of Llama-3.2-1B in float32 are {gb(16 * billion)}; a T4 has "
     f"{gb(GPUS['t4'].usable)}", holds(16 * billion > GPUS["t4"].usable)),
]
if {"prompt", "lora"} <= set(by):
    rows.append(("004", "performance: prompt moderate to low, LoRA high",
                 f"held-out loss after {scale.steps} steps: {losses['prompt']['value']:.2f} and "
                 f"{losses['lora']['value']:.2f}",
                 holds(losses["lora"]["high"] < losses["prompt"]["low"], ("✓ here", "not shown here"))))
if "full" in by and len(by) > 1:
    others = {method: change for method, change in lost.items() if method != "full"}
    rows.append(("004", "PEFT preserves generalization: no full weight drift",
                 f"forgetting: full {lost['full']['value']:+.2f}; "
                 + ", ".join(f"{method} {change['value']:+.2f}" for method, change in others.items()),
                 holds(lost["full"]["low"] > max(change["high"] for change in others.values()),
                       ("✓ here", "not for all methods here"))))
if {"qlora", "lora"} <= set(by):
    apart = losses["qlora"]["low"] > losses["lora"]["high"] or losses["lora"]["low"] > losses["qlora"]["high"]
    rows.append(("000", "QLoRA: no performance loss",
                 f"loss {losses['qlora']['value']:.3f}, and LoRA's {losses['lora']['value']:.3f}",
                 holds(not apart, ("not told apart here", "they differ here"))))
display(Markdown("\n".join("| " + " | ".join(row) + " |" for row in rows)))

# %% [markdown]
# # Step 7 · Report it
#
# Somebody will decide by your table. So say what you did, what came out, and how far it can be trusted. The notebook
# prints the table as text, for you to take:

# %%
print(capstone.markdown(table))
record = {"base": base.name, "why": base.why, "place": str(here), "data": codes.record()["sha256"],
          "revision": codes.revision, "torch": torch.__version__, "steps": scale.steps}
print("\nrun's record:", json.dumps(record, indent=1))
packed = hand_in(RUNS / "hand_in")

# %% [markdown] exercise="report-it"
# Fill in `report`, a dict:
#
# | key | what it is | judged |
# |---|---|---|
# | `"table"` | the table above, pasted as text (of *your* run, on whatever base; all seven methods, and full fine-tuning if it fits) | its columns, numbers, and whether they agree with each other |
# | `"off"` | a list: methods whose planned MiB differ by more than 10 % from the measured (share of the measured); may be empty | against your table |
# | `"front"` | a list: the Pareto front of measured MiB and loss | against your table |
# | `"choose"` | a function of `room` (MiB): the method with the lowest loss among those whose measured MiB fit | asked about several rooms |
# | `"text"` | your report, at least 120 words | by a person, with the rubric below |
#
# **Rubric for the text** (ten points that a person gives by hand, 2 for each line; instructors: in formgrader this
# cell waits under "manual grading"):
#
# 1. *Set-up*: base, data with revision, steps, batch, place. Could somebody repeat it?
# 2. *Plan*: what was planned, what was measured, and for the largest difference a reason.
# 3. *Result*: a recommendation for a stated purpose, from the table, with its interval.
# 4. *Cost*: what the recommended method costs in memory, time and forgetting, beside the next best.
# 5. *Limits*: what this table does not show (seeds, rates, steps, other tasks), and what you would run next.
#
# *Why it matters:* a fine-tune nobody can judge is a rumour.

# %% exercise="report-it"
### BEGIN SOLUTION a dict with table, off, front, choose, text
report = {
    "table": """
| method | trainable | rows | planned MiB | measured MiB | tokens/s | loss | forgetting |
|---|---|---|---|---|---|---|---|
| qlora | 448,512 | 8 × 1 | 160.9 | 160.3 | 112 | 0.517 (0.461 to 0.575) | +0.538 (+0.432 to +0.652) |
| lora | 448,512 | 8 × 1 | 175.5 | 175.0 | 171 | 0.507 (0.455 to 0.562) | +0.565 (+0.462 to +0.685) |
| dora | 463,104 | 4 × 2 | 128.1 | 127.9 | 63 | 0.450 (0.408 to 0.491) | +0.462 (+0.395 to +0.526) |
| adapter | 50,784 | 8 × 1 | 136.7 | 136.1 | 186 | 0.732 (0.679 to 0.785) | +0.213 (+0.184 to +0.248) |
| ia3 | 5,760 | 8 × 1 | 162.8 | 162.2 | 236 | 0.854 (0.797 to 0.912) | +0.501 (+0.446 to +0.542) |
| prefix | 24,576 | 8 × 1 | 150.9 | 144.2 | 155 | 0.835 (0.779 to 0.893) | +0.158 (+0.130 to +0.184) |
| prompt | 4,096 | 8 × 1 | 161.2 | 156.6 | 192 | 1.385 (1.315 to 1.452) | +0.034 (+0.029 to +0.039) |
| full | 5,475,584 | 4 × 2 | 163.9 | 163.6 | 95 | 0.415 (0.369 to 0.459) | +0.539 (+0.475 to +0.589) |
""",
    "off": [],
    "front": ["dora", "full"],
    "choose": lambda room: min((loss, method) for method, (mib, loss) in {
        "qlora": (160.3, 0.517), "lora": (175.0, 0.507), "dora": (127.9, 0.450), "adapter": (136.1, 0.732),
        "ia3": (162.2, 0.854), "prefix": (144.2, 0.835), "prompt": (156.6, 1.385), "full": (163.6, 0.415)
    }.items() if mib <= room)[1],
    "text": """
Set-up. The bundled Llama of 5.5 million parameters; 2,000 rows of the bundled training data, which lie in the
package and need no revision; 40 steps of 8 rows for every method, in the same order, one seed, the learning rates
of run_method. A CPU, two threads, on a machine that was busy with other work.

Plan. Planned for a room of 190 MiB; DoRA and full fine-tuning therefore got 4 rows at a time, which is why DoRA
stands leftmost. Six methods were measured within a MiB of their plan. The two with virtual positions need less than
planned (prefix 150.9 and 144.2 MiB, prompt 161.2 and 156.6): the formula counts what a GPU's attention kernel keeps
of them.

Result. On held-out wordings full fine-tuning has the lowest loss, 0.415 (0.369 to 0.459) nats a token, and DoRA
0.450 (0.408 to 0.491): the intervals overlap. LoRA has 0.507 (0.455 to 0.562) and QLoRA 0.517 (0.461 to 0.575);
these two cannot be told apart. For a model that is to do this task and nothing else I recommend DoRA: nearly the
loss of full fine-tuning, in 127.9 instead of 163.6 MiB, and a file of 2 MB instead of 22.

Cost. DoRA forgets +0.462 nats on the base's own kind of text; full fine-tuning +0.539 and LoRA +0.565 are no
better. Whoever needs the base's old ability takes the adapter (0.732 (0.679 to 0.785); forgetting +0.213). Half the
rows at a time cost DoRA time in every step.

Limits. One seed, 40 steps, no rate was swept: this is a ranking of first tries, and the intervals are over rows
only. Tokens per second were taken on a busy machine and are no speeds. Next: three seeds for DoRA, LoRA and full
fine-tuning at equal batches, then their rates.
""",
}
### END SOLUTION

# %% check="report-it"
check("report-it", report)

# %% [markdown] hint="report-it" level="nudge"
# Paste the table between three quotes. For `off` and `front` you may go by hand, it is a short table; your
# `pareto_front` does the second for you.

# %% [markdown] hint="report-it" level="shape"
# `choose` may be a small dict of your numbers and one `min` over the methods that fit, with their loss as the key.

# %% [markdown] hint="report-it" level="code"
# ```python
# loss = {"qlora": (155.0, 0.71), ...}                      # measured MiB, loss
# "choose": lambda room: min((m for m in loss if loss[m][0] <= room), key=...)
# ```

# %% [markdown]
# ## Summary
#
# | step | what to get right | what goes wrong silently |
# |---|---|---|
# | 1 place | float16 on a T4, by capability, not by claim; a folder that survives | emulated bfloat16; checkpoints that die with the session |
# | 2 data | a pinned revision, a checked schema, filters that are counted | every row twice; programs that are no Python |
# | 3 plan | the longest rows, a margin, accumulation for what the batch lacks | a plan for short rows |
# | 4 run | the adapter is two files; load them elsewhere before you believe in them | an adapter that loads and does nothing |
# | 5 table | same rows, order and steps; intervals | comparing a tuned method with one that is not |
# | 6 check | planned against measured, for every method | numbers that nobody predicted, so nobody can be wrong |
# | 7 report | limits, next to the result | a ranking from one seed |
#
# **To read.** Dettmers and others, *QLoRA* (2023), section 4: how to compare fine-tunes fairly. Hu and others, *LoRA*
# (2021), table 1: latency. The documentation of `torch.amp.GradScaler`. `pefttools/lab/capstone.py`,
# `pefttools/lab/python_codes.py` and `pefttools/lab/colab.py`: what this notebook used.
#
# **Hand in** this notebook and the zip named above. That was the course. What next? Take a task of your own, fifty
# rows of it, and go through the seven steps once more.
