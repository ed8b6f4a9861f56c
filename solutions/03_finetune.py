# ---
# title: A fine-tune end to end
# minutes: 90
# needs: [00_start, 02_lora]
# ---
# %% [markdown]
# In chapter 02 you wrote LoRA. Here it goes to work: from a file of rows to a model that does something it could not
# do before, and to two small files that you can send to somebody. Most fine-tunes that fail, fail on the way there,
# in places that print no error: a token that is trained on and should not be, or one that should be and is not.
#
# **After this chapter you can**
#
# - turn rows of instruction data into ids, labels and batches, and say of *every* token whether the loss is taken
#   there, and why;
# - load a base model in 8 bits, prepare it as `peft` does today, and say what gradient checkpointing saves and what
#   it costs;
# - write one optimizer step with accumulation, clipping and a schedule, such that small batches add up to exactly one
#   large one;
# - fine-tune the bundled Llama from plain language to Python, measure it by *running* what it writes, and say where
#   it still fails;
# - save an adapter in the two files that `peft` loads anywhere.

# %%
import inspect
import json
import logging
import math
import tempfile
import textwrap
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from IPython.display import Markdown, display

from pefttools import lab
from pefttools.grading import check
from pefttools.inject import attach, count_parameters, detach
from pefttools.lab import (answer_of, collate, encode, evaluate, generate, held_out_loss, load_base, load_data,
                           prompt_of, train)
from pefttools.lora import LoRAConfig
from pefttools.widgets import finetune as pictures
from pefttools.widgets.base import show

# %%
import datasets                                      # the large libraries take seconds to import
import transformers

transformers.utils.logging.set_verbosity_error()     # they talk a lot; here we want to read our own lines
transformers.utils.logging.disable_progress_bar()
datasets.disable_progress_bars()
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")

base = load_base("tiny")
model, tokenizer = base
scratch = Path(tempfile.mkdtemp())      # files of this chapter; nothing of yours is touched
print(base)

# %% [markdown]
# ## Before: it continues, it does not answer
#
# The base model has read Python code and nothing else. It was never asked for anything. So ask it:

# %%
held_out = load_data("held_out")
row = held_out[1]
print(prompt_of(row), end="")
print("‹" + generate(model, tokenizer, prompt_of(row), max_new_tokens=60) + "›")

# %% [markdown]
# What stands between ‹ and › is the model's. It *continues* the text, as it was trained to. We want it to write a
# program that does what the text says, and then to stop.
#
# The way there has seven steps. They are those of the slides of source 000, and this chapter goes through them one by
# one. What each step makes stands under it.

# %%
show(pictures.seven_steps([
    ("1 data", "rows of text:\ninstruction → output"),
    ("2 tokens", "ids, labels,\nbatches"),
    ("3 model", "frozen base,\nperhaps in 8 bits"),
    ("4 LoRA", "a few trainable\nnumbers"),
    ("5 settings", "rate, schedule,\nbatch, clipping"),
    ("6 training", "adapter weights\nthat fit the data"),
    ("7 saving", "two files,\n< 2 MB here")]),
    alt="Seven boxes in a chain: data, tokens, model, LoRA, settings, training, saving. Under each, what it makes: "
        "rows of text; ids, labels and batches; a frozen base, perhaps in 8 bits; a few trainable numbers; rate, "
        "schedule, batch and clipping; adapter weights that fit the data; two files.")

# %% [markdown]
# *Steps 5 and 6, in orange, are where the numbers move. Steps 1 and 2 decide what they move towards, and that is
# where most of this chapter's errors live.*
#
# # Step 1 · Data
#
# An **instruction data set** is a table. Ours has the columns of `flytech/python-codes-25k`, the set that source 000
# fine-tunes on: `instruction` (what is wanted), `input` (material to work on, often empty), `output` (the answer, a
# fenced block of Python) and `text` (the three joined). Ours has more: the `kind` of task, its `family`, and `tests`,
# lines of Python that a right answer survives.

# %%
train_data = load_data("train")
print(train_data, "\n")
for name, value in train_data[5].items():
    print(f"{name:>12}  {value!r}")

# %% [markdown]
# `datasets.Dataset` is what the Hugging Face library `datasets` calls such a table. It keeps the rows in a file that
# is mapped into memory, so it also works where the table is larger than your RAM.
#
# ### The sources say: split it like this
#
# Slide 000 loads a JSON file and splits off a tenth for evaluation. We write our rows to such a file, and run the
# slide's line as it is printed there. **Guess first: what happens?**

# %%
path = scratch / "python.json"
train_data.to_json(path)
dataset = datasets.load_dataset("json", data_files=str(path), cache_dir=str(scratch / "cache"))
print(dataset, "\n")
for line in (
    # as printed; then with a name that exists; then right
    "train_dataset, eval_dataset = tokenized_datasets.train_test_split(test_size=0.1).values()",
    "train_dataset, eval_dataset = dataset.train_test_split(test_size=0.1).values()",
    'train_dataset, eval_dataset = dataset["train"].train_test_split(test_size=0.1).values()',
):
    print(">>>", line)
    try:
        exec(line)
        print(f"    works: {len(train_dataset):,} and {len(eval_dataset):,} rows\n")
    except Exception as error:
        print(f"    {type(error).__name__}: {error}\n")

# %% [markdown]
# Two slips in one line. The name is used one step before it is defined. And `load_dataset` gives a `DatasetDict`, a
# dictionary of tables, here with the one entry `"train"`: only a table can be split.
#
# There is a third trap, and it raises nothing. Our rows come from templates, as most instruction sets do, in part. A
# *random* tenth then holds rows whose siblings, with another number or name in them, stay in the training set. A good
# score on it says that the model knows these wordings. So we keep three sets apart, from easy to hard:
#
# | set | wordings | constants | kinds of task |
# |---|---|---|---|
# | `random_tenth` | those of training | new | those of training |
# | `held_out` | **new** | **new** | those of training |
# | `new_kinds` | new | new | **new** |

# %%
split = train_data.train_test_split(test_size=0.1, seed=0)
train_rows, random_tenth = split["train"], split["test"]
new_kinds = load_data("new_kinds")
sets = {"train_rows": train_rows, "random_tenth": random_tenth, "held_out": held_out, "new_kinds": new_kinds}
for name, data in sets.items():
    print(f"{name:>13}: {len(data):>6,} rows, {len(set(data['kind'])):>3} kinds of task")

# %% [markdown] exercise="format-example"
# Every row has to become two texts: the **prompt**, which the model is given, and the **answer**, which it has to
# write. The rule of our `text` column: instruction, line end, then the input and a line end *if there is an input*,
# then the output. The prompt is everything before the output.
#
# `row` is a dict with the texts `instruction`, `input`, `output` and `text`. Return `(prompt, answer)`, such that
# `prompt + answer == row["text"]`, to the last character.
#
# *Why it matters:* in training and in use the prompt has to be built in the same way. A prompt that differs by one
# line end is another prompt.
# %% exercise="format-example"
def format_example(row):
    """(prompt, answer) of a row: two strings; prompt + answer is row["text"]."""
    ### BEGIN SOLUTION
    prompt = row["instruction"] + "\n"
    if row["input"]:
        prompt += row["input"] + "\n"
    return prompt, row["output"]
    ### END SOLUTION
# %% check="format-example"
check("format-example", format_example)
# %% [markdown] hint="format-example" level="nudge"
# The answer is a column as it stands. Only the prompt has to be put together, and it always ends with a line end.
# %% [markdown] hint="format-example" level="code"
# Start with `prompt = row["instruction"] + "\n"`. Then, `if row["input"]:`, add the input and another `"\n"`.
# %% [markdown]
# `lab.prompt_of(row)` and `lab.answer_of(row)` do what yours does now. They hold for every row we have:

# %%
print(all(prompt_of(r) + answer_of(r) == r["text"] for data in (train_data, held_out, new_kinds) for r in data))

# %% [markdown]
# # Step 2 · Tokens, labels, batches
#
# ### A picture first
#
# The model reads whole numbers, the **ids** of tokens. Beside them stands a second row of numbers, the **labels**: at
# each place the id that the model *should have predicted there*, or −100 for "do not count this place". Here is one
# very short row:

# %%
tiny_row = {"instruction": "Double x.", "input": "", "output": "2 * x", "text": "Double x.\n2 * x"}
one = encode(tiny_row, tokenizer)
kinds = pictures.kinds_of(one["input_ids"], one["labels"], [1] * len(one["input_ids"]), tokenizer.eos_token_id)
show(pictures.two_rows(pictures.pieces_of(one["input_ids"], tokenizer), one["input_ids"], one["labels"], kinds),
     alt="Three lines of boxes: tokens, input_ids and labels of the row “Double x.”, “2 * x”. Begin-of-text and the "
         "prompt's tokens are hatched and have label −100; the answer's tokens and end-of-text have their own id as "
         "label.")

# %% [markdown]
# *The prompt is read and not counted. The answer is counted, and so is the end-of-text token after it: stopping is
# part of the answer. (A dot stands for a space, ↵ for a line end.)*
#
# ### The formula
#
# Let $x_1, \dots, x_T$ be the ids of a row of $T$ tokens, and $M$ the set of places whose label is not −100, the
# **targets**. With $N = |M|$ targets and $p(x_t \mid x_{<t})$ the probability that the model gives to token $x_t$
# after reading those before it, the loss is
#
# $$L \;=\; -\frac{1}{N} \sum_{t \in M} \ln p(x_t \mid x_{<t})$$
#
# the mean of $-\ln p$ over the targets, in **nats** (natural-log units). Places outside $M$ have no part in it. They
# still matter: they are in $x_{<t}$.
#
# **By hand.** A row of five tokens, begin-of-text, one of the prompt, two of the answer, end-of-text. The model gives
# the last four the probabilities 1/16, 1/2, 1/4 and 1. With the prompt masked, the targets are the last three:
#
# $$L = \tfrac13(\ln 2 + \ln 4 + \ln 1) = \ln 2 \approx 0.693$$
#
# With the prompt counted as well, a fourth term $\ln 16$ comes in and $L = \tfrac14(\ln 16 + \ln 2 + \ln 4 + \ln 1) =
# \tfrac74 \ln 2 \approx 1.213$: the largest part of the loss would be about guessing the *question*. The same in
# code:

# %%
p = torch.tensor([1 / 16, 1 / 2, 1 / 4, 1.0])       # probability of the right token at places 2, 3, 4, 5
logits = torch.stack([p, 1 - p], -1).log()           # two "words": word 0 is always the right one
print(f"{F.cross_entropy(logits, torch.tensor([-100, 0, 0, 0])):.3f}   with the prompt masked")
print(f"{F.cross_entropy(logits, torch.tensor([0, 0, 0, 0])):.3f}   with the prompt counted")

# %% [markdown]
# `F.cross_entropy` ignores targets of −100 by default; that is where this number comes from.
#
# And who shifts? The model's output at place $t$ is its prediction of place $t+1$. transformers' models take labels
# that run *parallel* to the ids and shift them inside. Here is the function that does it, from the library as
# installed:

# %%
from transformers.loss.loss_utils import ForCausalLMLoss

print("".join(inspect.getsource(ForCausalLMLoss).splitlines(keepends=True)[12:17]))

# %% [markdown] exercise="mask-labels"
# Now write it. You get the ids of the prompt and of the answer, without special tokens. Return `(input_ids, labels)`,
# two lists of the same length:
#
# - **ids**: begin-of-text, the prompt, the answer, end-of-text;
# - **labels**: −100 for begin-of-text and for the prompt; the id itself for the answer *and for end-of-text*;
# - **too long?** If that makes more than `max_length` tokens, drop tokens from the *beginning of the prompt*.
#   Begin-of-text, the answer and end-of-text always stay. (You may take it that they fit.)
#
# *Why it matters:* nothing in training complains when this is wrong. The loss goes down all the same, about the wrong
# thing.
# %% exercise="mask-labels"
def mask_labels(prompt_ids, answer_ids, bos_id, eos_id, max_length):
    """P prompt ids and A answer ids (lists) → (input_ids, labels): two lists of min(P + A + 2, max_length) numbers."""
    ### BEGIN SOLUTION
    answer = answer_ids + [eos_id]
    room = max_length - 1 - len(answer)                                  # what is left for the prompt
    prompt = [bos_id] + prompt_ids[max(0, len(prompt_ids) - room):]
    return prompt + answer, [-100] * len(prompt) + answer
    ### END SOLUTION
# %% check="mask-labels"
check("mask-labels", mask_labels)
# %% [markdown] hint="mask-labels" level="nudge"
# Build two pieces, what is masked and what is a target, before you build the lists. End-of-text belongs to one of
# them.
# %% [markdown] hint="mask-labels" level="shape"
# The masked piece has `1 + len(kept_prompt)` tokens, the other `len(answer_ids) + 1`. Labels: `[-100] * (1 +
# len(kept_prompt))`, then the second piece once more.
# %% [markdown] hint="mask-labels" level="code"
# `room = max_length - 2 - len(answer_ids)` tokens are left for the prompt; its last `room` tokens are
# `prompt_ids[max(0, len(prompt_ids) - room):]`. (`prompt_ids[-room:]` goes wrong for `room == 0`: −0 is 0, and you
# get all of it.)

# %% [markdown]
# `lab.encode(row, tokenizer)` does the same from a row of text. Look at some rows. **Questions to try:** where does
# the orange begin? What is the last token? Set *pad to* to 512 and switch *labels* to the slide's way: what is a
# target now?

# %%
viewer = pictures.mask_viewer([r for r in held_out.select(range(12))], tokenizer)

# %% [markdown]
# *The rule is one of places: hatched up to the end of the prompt, orange from there to end-of-text, dashed behind
# it.*

# %% question="finetune-q-shift"

# %% [markdown]
# ## Rows of different length in one batch
#
# A batch is a rectangle: $B$ rows of $T$ tokens. Rows shorter than the longest are filled up with a **pad** token.
# Padding has to be invisible in two places: the **attention mask** is 1 for real tokens and 0 for padding, and the
# labels there are −100.

# %% [markdown] exercise="collate"
# `rows` is a list of dicts with the lists `input_ids` and `labels`. Return a dict of three int64 tensors of shape
# $[B, T]$, where $T$ is the length of the longest row: `input_ids` (padded on the right with `pad_id`),
# `attention_mask` and `labels`.
#
# The check also uses `pad_id == eos_id`, as slide 000 does. The true end-of-text must stay a target then.
#
# *Why it matters:* this function sees every token that is ever trained on.
# %% exercise="collate"
def collate_rows(rows, pad_id):
    """rows: B dicts with lists input_ids and labels → {"input_ids", "attention_mask", "labels"}, each [B, T] int64."""
    ### BEGIN SOLUTION
    T = max(len(row["input_ids"]) for row in rows)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        n = len(row["input_ids"])
        batch["input_ids"].append(row["input_ids"] + [pad_id] * (T - n))
        batch["attention_mask"].append([1] * n + [0] * (T - n))
        batch["labels"].append(row["labels"] + [-100] * (T - n))
    return {name: torch.tensor(lists) for name, lists in batch.items()}
    ### END SOLUTION
# %% check="collate"
check("collate", collate_rows)
# %% [markdown] hint="collate" level="nudge"
# You know how long each row is. That alone tells where padding begins; there is no need to look at any id.
# %% [markdown] hint="collate" level="shape"
# For a row of `n` tokens, `T - n` entries are appended to each of the three lists: `pad_id`, `0` and `-100`.
# `torch.tensor` of a list of `B` lists of length `T` has shape `[B, T]` and, for whole numbers, dtype int64.
# %% [markdown] hint="collate" level="code"
# ```python
# batch["attention_mask"].append([1] * n + [0] * (T - n))
# ```
# and the same pattern for the other two.

# %% [markdown]
# ## The sources say … we measured: padding to 512
#
# Slide 000 sets `pad_token = eos_token`, pads each row to 512 tokens and takes `labels = input_ids.copy()`. Nothing
# is masked. The rows are much shorter than 512.
#
# **Predict**, before you run the cell: over which share of all targets would the loss then be about *padding*? About
# a tenth, about half, or nearly nine tenths?

# %%
lengths = [(sum(x == -100 for x in e["labels"]), sum(x != -100 for x in e["labels"]))
           for e in (encode(r, tokenizer) for r in train_rows.select(range(500)))]
prompt_tokens, answer_tokens = (sum(column) for column in zip(*lengths))
slots = 512 * len(lengths)
share = {"prompt": prompt_tokens / slots, "answer": answer_tokens / slots}
share["padding"] = 1 - sum(share.values())
print(f"{len(lengths)} rows, {(prompt_tokens + answer_tokens) / len(lengths):.0f} tokens each on average")
print("targets the slide's way:  " + ", ".join(f"{name} {100 * s:.1f} %" for name, s in share.items()))

show(pictures.padding_bars(lengths[:16], fixed=512, batch_size=4),
     alt=f"Sixteen rows as horizontal bars: prompt hatched, answer orange, padding dashed. Padded to 512, padding is "
         f"{100 * share['padding']:.0f} % of the area; padded to the longest of each batch of four, little of it is.")

# %% [markdown]
# *Padded to a fixed length, nearly all of the rectangle is padding: it costs time, and with copied labels it is most
# of what the loss is about.*
#
# How much of the *loss* is that? One forward pass of the base model over eight rows, the loss of each place put in
# its drawer:

# %%
def as_on_the_slide(row, length=512):
    """Ids padded with end-of-text to `length`, labels a copy of them."""
    ids = encode(row, tokenizer)["input_ids"]
    ids = ids + [tokenizer.eos_token_id] * (length - len(ids))
    return {"input_ids": ids, "labels": list(ids)}


few = [r for r in train_rows.select(range(lab.steps(8, 4)))]
with torch.no_grad():
    batch = collate([as_on_the_slide(r) for r in few], tokenizer.pad_token_id)
    logits = model(batch["input_ids"]).logits[:, :-1]
    nats = F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")      # [rows, 511]
drawers = Counter()
for losses, row in zip(nats, few):
    e = encode(row, tokenizer)
    n, masked = len(e["input_ids"]), sum(x == -100 for x in e["labels"])
    drawers["prompt"] += losses[:masked - 1].sum().item()
    drawers["answer"] += losses[masked - 1:n - 1].sum().item()
    drawers["padding"] += losses[n - 1:].sum().item()
loss_share = {name: value / nats.sum().item() for name, value in drawers.items()}
targets_of_answers = sum(sum(x != -100 for x in encode(r, tokenizer)["labels"]) for r in few)
print("share of the loss:  " + ", ".join(f"{name} {100 * s:.1f} %" for name, s in loss_share.items()))
print(f"loss as the slide's Trainer would print it: {nats.mean():.2f} nats; of the answers alone: "
      f"{drawers['answer'] / targets_of_answers:.2f}")

# %% [markdown]
# That is before training. Padding is easy to learn: after end-of-text comes end-of-text. So let us train the slide's
# way for a few steps, and look at the loss that it would print beside the loss of the answers:

# %%
CONFIG = LoRAConfig(r=16, alpha=32, target_modules=(
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))

attach(model, CONFIG, seed=0)
slide_rows = [as_on_the_slide(r) for r in train_rows.select(range(64))]
slide_history = train(model, slide_rows, tokenizer, steps=lab.steps(16), lr=5e-3, batch_size=4, progress=False)
slide_answers = held_out_loss(model, tokenizer, train_rows.select(range(64, 64 + lab.steps(64, 8))))
detach(model)
print(f"after {len(slide_history.loss)} steps: {slide_history.loss[-1]:.2f} nats printed, "
      f"{slide_answers:.2f} nats per token of an answer")

# %% [markdown]
# A loss that looks like success, and is nearly all padding.
#
# ## The token that must stay a target
#
# So padding must not count. The usual repair is to set every label *equal to the pad id* to −100. That is also
# what a collator of transformers does, the one that many tutorials use for language models. Read it:

# %%
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq

source = inspect.getsource(DataCollatorForLanguageModeling.torch_call)
print(source[source.index("            labels = "):source.index("        return batch")])

# %% [markdown]
# By value, not by place. With `pad_token = eos_token` the end-of-text of each *answer* has the pad id as well.
# **Predict:** what will a model do that is trained this way?
#
# We train two adapters for a few seconds each, on the same batches. In one, end-of-text is a target; in the other its
# label is −100, as that line would make it. Then both answer the same prompts, and we count how often the model stops
# by itself.

# %%
def without_end(encoded):
    """What ignoring labels by value does to an encoded row where pad = eos."""
    return {**encoded, "labels": [-100 if x == tokenizer.eos_token_id else x for x in encoded["labels"]]}


@torch.no_grad()
def ends_by_itself(prompts, max_new_tokens=64):
    """How many answers hold end-of-text within `max_new_tokens` tokens, and the first answer, all tokens shown."""
    texts = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
    rows = [{"input_ids": [tokenizer.bos_token_id, *text]} for text in texts]
    batch = collate(rows, tokenizer.pad_token_id, side="left")         # to go on from the last token, pad on the left
    out = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=False,
                         max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id,
                         eos_token_id=tokenizer.eos_token_id)[:, batch["input_ids"].shape[1]:]
    shown = tokenizer.decode(out[0][out[0] != tokenizer.pad_token_id])
    return int((out == tokenizer.eos_token_id).any(1).sum()), shown


right_rows = [encode(r, tokenizer) for r in train_rows.select(range(1000))]
ask_these = [prompt_of(r) for r in held_out.select(range(lab.steps(24, 4)))]
stopped = {}
two_ways = {"end-of-text is a target": right_rows, "end-of-text is −100": [without_end(e) for e in right_rows]}
for name, rows in two_ways.items():
    attach(model, CONFIG, seed=0)
    short_run = train(model, rows, tokenizer, steps=lab.steps(50), lr=5e-3, batch_size=8, progress=False)
    stopped[name], example = ends_by_itself(ask_these)
    detach(model)
    print(f"{name}: loss {short_run.smooth()[-1]:.2f}, {stopped[name]} of {len(ask_these)} answers end by themselves. "
          "The first one:\n" + textwrap.indent(example, "    ") + "\n")

# %% [markdown]
# Both have learned about the same Python. Only one has learned when it is done; the other goes on after its answer
# until the limit stops it, at your expense. The cure is what you wrote: decide by place, not by value, what padding
# is. (A pad token of its own helps as well. Llama 3's vocabulary reserves `<|finetune_right_pad_id|>` for it, and so
# does ours.)

# %% question="finetune-q-eos"

# %% [markdown]
# ### Against production: the collators
#
# transformers has a collator that pads labels by place: `DataCollatorForSeq2Seq` (its name comes from translation
# models). It should give what `lab.collate` and your `collate` give. And the popular one, given the same rows and pad
# = eos?

# %%
five = [encode(r, tokenizer) for r in train_rows.select(range(5))]
ours = collate(five, tokenizer.pad_token_id)
theirs = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)([dict(e) for e in five])
collators_equal = all(torch.equal(ours[k], theirs[k]) for k in ours)
print("DataCollatorForSeq2Seq = lab.collate:", collators_equal)

from pefttools.lab.base import TINY, tokenizer_of

slide_tokenizer = tokenizer_of(TINY, local_files_only=True)      # a copy, so that ours keeps its pad token
slide_tokenizer.pad_token = slide_tokenizer.eos_token
popular = DataCollatorForLanguageModeling(slide_tokenizer, mlm=False)([{"input_ids": e["input_ids"]} for e in five])
for name, b in {"lab.collate": ours, "DataCollatorForLanguageModeling, pad = eos": popular}.items():
    real = b["attention_mask"].bool()
    end = b["input_ids"] == tokenizer.eos_token_id
    ends = (b["labels"] == tokenizer.eos_token_id) & end
    print(f"{name}: {(b['labels'] != -100).sum()} targets, of them {ends.sum()} of {len(five)} end-of-text; "
          f"prompts {'masked' if (b['labels'][:, :2] == -100).all() else 'not masked'}")

# %% [markdown]
# In TRL, the library that many instruction tunes are written with, the same idea goes by the name of *completion-only
# loss*: the prompt gets −100, the completion does not. (TRL is not among this course's packages, so nothing about it
# is measured here.)
#
# # Step 3 · The model
#
# ### The sources say: a separate head
#
# Slide 000 prints the architecture of Llama-3.2-1B: an embedding of 128,256 × 2,048, and at the end `lm_head:
# Linear(in_features=2048, out_features=128256)`. **Predict:** how many parameters does the head add to the model?
#
# You do not need the 2.5 GB of weights to find out. On PyTorch's *meta device* a tensor has a shape and no memory, so
# we can build the real model class with the real configuration, and count:

# %%
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

shape = dict(vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
             num_key_value_heads=8, head_dim=64)
counted = {}
for tied in (True, False):
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=tied))
    counted[tied] = sum(p.numel() for p in llama.parameters())
    print(f"tied = {tied!s:>5}: {counted[tied]:>13,} parameters; head and embedding are one tensor: "
          f"{llama.lm_head.weight is llama.model.embed_tokens.weight}")
print(f"difference: {counted[False] - counted[True]:,} = 128,256 · 2,048")

# %% [markdown]
# Llama-3.2-1B is **tied**: the head *is* the embedding, used a second time. `print(model)` shows two modules and does
# not show that they share one weight. The head adds nothing. Our bundled model is tied as well.
#
# ### The sources say: `load_in_8bit=True`
#
# Slide 000 and source 003 load the base in **int8**: each weight as one signed byte, times a scale for each row.
# Slide 000 gives that as an argument of `from_pretrained`. Run it:

# %%
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

try:
    AutoModelForCausalLM.from_pretrained(TINY, load_in_8bit=True)
except Exception as error:
    removed = f"{type(error).__name__}: {error}"
    print(removed)

# %% [markdown]
# The argument is gone. The loader passes it on to the model's constructor, which has never heard of it. How to
# quantize is now said by an object. bitsandbytes runs on a CPU too, so we can try it here. (This is int8. The 4-bit
# layers have faults on the CPU that chapter 04 deals with; we checked that a gradient still arrives after an
# evaluation here, and you will see it below.)

# %%
small = load_base("tiny", dtype=torch.float16, quantization_config=BitsAndBytesConfig(load_in_8bit=True)).model


def by_kind(m):
    """Where the numbers are: {what: (type, how many, trainable?)}."""
    out = {}
    for name, p in m.named_parameters():
        what = "norms" if "norm" in name else "embedding = head" if "embed" in name else "matrices of the blocks"
        kind, n, grad = out.get(what, (str(p.dtype).removeprefix("torch."), 0, p.requires_grad))
        out[what] = (kind, n + p.numel(), grad)
    return out


def megabytes(m):
    return sum(p.numel() * p.element_size() for p in m.parameters()) / 1e6


def print_kinds(m):
    for what, (kind, n, grad) in by_kind(m).items():
        print(f"    {what:<24}{kind:>8}{n:>11,}   {'trainable' if grad else 'frozen'}")
    print(f"    {megabytes(m):.1f} MB of weights\n")


print("loaded in 8 bits:")
print_kinds(small)

# %% [markdown]
# Only the matrices inside the blocks are quantized. Embedding, head and norms are not: they are few, or they are
# looked up rather than multiplied, and they are the sensitive ones.
#
# ### Source 003's recipe, and today's
#
# Source 003 prepares the 8-bit model by hand: freeze everything, cast the small parameters and the head to a wider
# type, switch gradient checkpointing on. `peft` has this as one function. Here are the lines of it that matter, from
# the installed version:

# %%
import peft

lines = inspect.getsource(peft.prepare_model_for_kbit_training).splitlines()
for wanted in ("param.requires_grad = False", "# cast all non INT8", "param.dtype == torch.float16",
               "param.data = param.data.to(torch.float32)", "no need for this hack",
               "model.enable_input_require_grads()", "model.gradient_checkpointing_enable("):
    print("\n".join(f"{n + 1:>4} {line}" for n, line in enumerate(lines) if wanted in line))

# %%
peft.prepare_model_for_kbit_training(small)
print("prepared:")
print_kinds(small)
print(f"for Llama-3.2-1B the cast of embedding = head alone costs {128_256 * 2048 * 2 / 1e9:.2f} GB")

# %% [markdown]
# Everything is frozen. What was 16 bits wide is 32 bits wide now: norms, embedding and head. 003 says in prose that
# it casts "to FP16", and its code casts to float32; the code is what today's function does. The reason it gives is
# stability: sums over many numbers, in a norm and in the loss, are done in more digits. Nothing of it is trained.
# Where the vocabulary is large it is not cheap, as the last line says.
#
# One line deserves a second look. `enable_input_require_grads` makes the *output of the embedding* require a
# gradient, though no embedding is trained. The library's own comment calls it a hack: the older, "reentrant" kind of
# checkpointing passes no gradient through a block none of whose inputs asks for one. (The function's docstring says
# that it makes the "output embedding layer require grads". It does not, as the list above shows.)

# %%
with torch.no_grad():
    probe = collate(five, tokenizer.pad_token_id)
    full, eight = (m(probe["input_ids"], attention_mask=probe["attention_mask"]).logits for m in (model, small.eval()))
real = probe["attention_mask"].bool()
same = (full.argmax(-1) == eight.argmax(-1))[real].float().mean()
loss_full, loss_eight = (held_out_loss(m, tokenizer, held_out.select(range(lab.steps(64, 8)))) for m in (model, small))
print(f"likeliest next token the same at {100 * same:.1f} % of the places; held-out loss {loss_full:.4f} in float32, "
      f"{loss_eight:.4f} in int8")

adapted = peft.get_peft_model(small, peft.LoraConfig(      # slide 000's configuration
    r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], lora_dropout=0.05, bias="none", task_type="CAUSAL_LM"))
history = train(adapted, train_rows.select(range(200)), tokenizer, steps=lab.steps(6), lr=5e-3, batch_size=8,
                progress=False)
adapted.train()
adapted(**collate(five, tokenizer.pad_token_id)).loss.backward()
grads = [p.grad is not None and bool(p.grad.any()) for p in adapted.parameters() if p.requires_grad]
print(f"{len(history.loss)} steps: loss {history.loss[0]:.2f} → {history.loss[-1]:.2f}; "
      f"after an eval() pass {sum(grads)} of {len(grads)} adapter tensors get a gradient")
adapted.print_trainable_parameters()

# %% [markdown]
# ### Which model was that?
#
# Source 003 trains "6B parameter Llama" and reports 8,388,608 trainable of 6,666,862,592 parameters. Take the first
# from the second, and compare with what the model classes count:

# %%
with torch.device("meta"):
    opt = OPTForCausalLM(OPTConfig(hidden_size=4096, word_embed_proj_dim=4096, ffn_dim=16384, num_hidden_layers=32,
                                   num_attention_heads=32, vocab_size=50272, max_position_embeddings=2048))
    llama_7b = LlamaForCausalLM(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                                            num_attention_heads=32, vocab_size=32000))
opt_size, llama_size = (sum(p.numel() for p in m.parameters()) for m in (opt, llama_7b))
lora_size = 32 * 2 * 16 * (4096 + 4096)          # 32 layers, q and v, r = 16, A and B
lora_percent = 100 * lora_size / (lora_size + opt_size)
print(f"003's base model:  {6_666_862_592 - 8_388_608:,}")
print(f"OPT-6.7B:          {opt_size:,}\nLlama, \"7B\":       {llama_size:,}")
print(f"LoRA with r = 16 on q and v: {lora_size:,}, which is {lora_percent:.4f} % of the whole")

# %% [markdown]
# It was OPT-6.7B (003's tokenizer line says `facebook/opt-6.7b`). Counting takes a second and saves arguments.
#
# ## Gradient checkpointing: what does it save?
#
# For the backward pass, autograd keeps what the forward pass computed: inputs of each operation, layer after layer.
# **Gradient checkpointing** keeps only the input of each *block*, and computes the rest again when the backward pass
# comes by.
#
# **Predict** three things before you run the cell: does the loss change? Do the gradients? By what factor does the
# memory shrink?
#
# PyTorch tells us what it keeps: `saved_tensors_hooks` calls a function with every tensor that is put away. We add up
# their bytes, each piece of memory once, weights left out, on a batch of 8 × 192 tokens.

# %%
def kept_bytes(m, ids):
    """Bytes kept for backward in MiB by place, the loss, the gradient's norm, and seconds for forward and backward."""
    weights = {p.untyped_storage().data_ptr() for p in m.parameters()}
    kept = {}

    def put_away(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            place = "logits and loss" if t.shape[-1:] == (m.config.vocab_size,) else "blocks"
            kept[storage.data_ptr()] = (place, storage.nbytes(), t)      # holding t: its address is not used again
        return t

    began = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(put_away, lambda t: t):
        loss = m(input_ids=ids, labels=ids).loss
    loss.backward()
    seconds = time.perf_counter() - began
    norm = math.sqrt(sum(p.grad.pow(2).sum().item() for p in m.parameters() if p.grad is not None))
    m.zero_grad()
    sizes = Counter()
    for place, n, _ in kept.values():
        sizes[place] += n / 2**20
    return {"blocks": sizes["blocks"], "logits and loss": sizes["logits and loss"]}, loss.item(), norm, seconds


attach(model, CONFIG, seed=0).train()
ids = torch.randint(3, 4096, (8, 192), generator=torch.Generator().manual_seed(0))
kept_bytes(model, ids)                                              # once to warm up
off = kept_bytes(model, ids)
model.gradient_checkpointing_enable({"use_reentrant": False})       # in transformers 6: activation_checkpointing_enable
on = kept_bytes(model, ids)
model.gradient_checkpointing_disable()
detach(model).eval()
print(f"loss {off[1]:.6f} → {on[1]:.6f}; norm of the gradient {off[2]:.6f} → {on[2]:.6f}; time × {on[3] / off[3]:.2f}")
show(pictures.memory_bars({"without": off[0], "with checkpointing": on[0]}),
     alt=f"Two stacked bars of kept memory. Without checkpointing {sum(off[0].values()):.0f} MiB, nearly all in the "
         f"blocks; with it {sum(on[0].values()):.0f} MiB, most of it logits and loss.")

# %%
block_factor = off[0]["blocks"] / on[0]["blocks"]
print(f"the blocks keep {block_factor:.1f} times less; all together "
      f"{sum(off[0].values()) / sum(on[0].values()):.1f} times less")

# %% [markdown]
# *Loss and gradients are the same to the last printed digit: nothing is approximated. The blocks keep a small part of
# what they kept. What is left is mostly the logits, one number for each token and each word of the vocabulary, which
# checkpointing does not touch.*

# %% question="finetune-q-checkpointing"

# %% question="finetune-q-int8"

# %% [markdown]
# # Step 4 · The LoRA configuration
#
# From chapter 02 you know what these numbers mean: $r$ is the rank of the update, $\alpha$ its scale ($\alpha/r$ is
# what multiplies $BA$), and `target_modules` says which layers get one. Slide 000 takes $r=8$, $\alpha=32$ on
# `q_proj` and `v_proj`. We have a very small model and a new kind of task for it, so we give it more room: all seven
# matrices of each block, $r=16$, $\alpha=32$.

# %%
slide_config = LoRAConfig(r=8, alpha=32, target_modules=("q_proj", "v_proj"))
for name, config in {"slide 000": slide_config, "this chapter": CONFIG}.items():
    trained, total = count_parameters(attach(model, config))
    detach(model)
    print(f"{name:>13}: {trained:>8,} of {total:,} parameters train, {100 * trained / total:.2f} %")

# %% [markdown]
# (The share is larger than the fraction of a percent you read about, because the model is small: an update's size
# grows with the *width* of the matrix, the matrix with its square.)
#
# # Steps 5 and 6 · Training
#
# One **optimizer step** changes the weights once. The gradient behind it should come from a batch large enough not to
# be noise. Where memory is too small for that batch, it is cut into **micro-batches**: forward and backward for each,
# gradients add up (that is what `backward` does when nobody zeroes them), and one step at the end. This is **gradient
# accumulation**. It should give *exactly* what the large batch gives.
#
# Does it? **By hand:** two micro-batches, one with 10 targets and a mean loss of 3.0, one with 90 and a mean loss of
# 1.0. The mean of the means is 2.0. The mean over all 100 targets is $(10 \cdot 3.0 + 90 \cdot 1.0)/100 = 1.2$. These
# are different losses with different gradients. Here is what one token weighs in each:

# %%
show(pictures.token_weights([10, 90]),
     alt="Two bar charts over 100 target tokens. With the mean of means, each of the 10 tokens of micro-batch 1 "
         "weighs 5 %, each of the 90 of micro-batch 2 weighs 0.56 %. With the sum over tokens divided by all "
         "tokens, every token weighs 1 %.")

# %% [markdown]
# *With the mean of means, a token counts more because its batch was short. Dividing the sum by all targets of the
# step makes every token equal, wherever the cuts fall.*
#
# So, with $K$ micro-batches, $M_k$ the targets of the $k$-th and $N = \sum_k |M_k|$ the targets of the whole step:
#
# $$L = \sum_{k=1}^{K} \frac{1}{N} \sum_{t \in M_k} -\ln p(x_t \mid x_{<t})$$
#
# Each summand over $k$ is what you call `backward()` on. The rest of a step, in order: **clip** (if the norm of the
# whole gradient, all parameters together, is above `clip`, scale it down to `clip`: one odd batch cannot throw the
# weights about), let the **optimizer** step, let the **schedule** set the next learning rate, and set the gradients
# to zero.

# %% question="finetune-q-accumulate"

# %% [markdown] exercise="training-step"
# Write one optimizer step. `micro_batches` is a list of dicts as `collate` makes them (`input_ids`, `attention_mask`,
# `labels`). `model(**batch)` behaves as transformers' models do: `.logits` has shape $[B, T, V]$ ($V$: words of the
# vocabulary), and `.loss`, if `labels` are given, is the *mean* over that micro-batch's targets. `optimizer` and
# `scheduler` are PyTorch's.
#
# Return the loss of the step (a number): the mean over all targets of all micro-batches. The check runs several steps
# in a row and looks at the parameters, the loss and the learning rate after each.
#
# *Why it matters:* mean of means is what transformers' own `Trainer` computed until the end of 2024 (pull requests
# 34191 and 35438 of its repository). Nobody's run crashed.
# %% exercise="training-step"
def training_step(model, micro_batches, optimizer, scheduler, clip):
    """One optimizer step from several micro-batches. Returns its loss, the mean per target token, as a float."""
    ### BEGIN SOLUTION
    targets = sum(int((b["labels"][:, 1:] != -100).sum()) for b in micro_batches)
    total = 0.0
    for b in micro_batches:
        logits = model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), b["labels"][:, 1:].flatten(), reduction="sum") / targets
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return total
    ### END SOLUTION
# %% check="training-step"
check("training-step", training_step)
# %% [markdown] hint="training-step" level="nudge"
# You need the number of targets of *all* micro-batches before the first `backward`. A target is a label that is not
# −100.
# %% [markdown] hint="training-step" level="shape"
# `logits[:, :-1]` is $[B, T-1, V]$ and `labels[:, 1:]` is $[B, T-1]$. `F.cross_entropy` wants $[\text{places}, V]$
# and $[\text{places}]$: flatten the first two dimensions. With `reduction="sum"` you get the sum over targets. (Or:
# `model(**batch).loss` is a mean; times its number of targets it is a sum again.)
# %% [markdown] hint="training-step" level="code"
# ```python
# for b in micro_batches:
#     loss = (sum of the losses of b's targets) / targets_of_all
#     loss.backward()
#     total += loss.item()
# # after the loop, once each: clip_grad_norm_, optimizer.step(), scheduler.step(), optimizer.zero_grad()
# ```

# %% [markdown]
# Does it hold on the real model? Sixteen rows as one batch, and the same rows as four micro-batches of four, sorted
# by length, so that they differ in size. We compare the gradients:

# %%
attach(model, CONFIG, seed=1)
with torch.no_grad():                                  # B = 0 would make the gradient of A zero; give it something
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.normal_(0, 0.01, generator=torch.Generator().manual_seed(1))
adapter = [p for p in model.parameters() if p.requires_grad]
sixteen = sorted((encode(r, tokenizer) for r in train_rows.select(range(16))),
                 key=lambda e: sum(x != -100 for x in e["labels"]))
pieces = [collate(sixteen[i:i + 4], tokenizer.pad_token_id) for i in range(0, 16, 4)]
counts = [int((b["labels"][:, 1:] != -100).sum()) for b in pieces]


def gradient(losses):
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return torch.cat([p.grad.flatten() for p in adapter])


whole = gradient([model(**collate(sixteen, tokenizer.pad_token_id)).loss])
by_tokens = gradient(model(**b).loss * n / sum(counts) for b, n in zip(pieces, counts))
by_means = gradient(model(**b).loss / len(pieces) for b in pieces)
model.zero_grad()
detach(model)
error = {name: ((g - whole).norm() / whole.norm()).item()
         for name, g in {"by tokens": by_tokens, "mean of means": by_means}.items()}
print(f"targets per micro-batch: {counts}")
for name, e in error.items():
    print(f"{name:>14}: differs from the gradient of the one large batch by {100 * e:.4f} %")

# %% [markdown]
# ## The loop
#
# Around that step there is little: which rows come next, the learning rate's way up and down, a progress bar, and a
# checkpoint now and then. This is the loop of `lab.train`, as it stands in the library. Find in it: the schedule, the
# count of targets, the accumulation, the clipping, the step, the zeroing.

# %%
source = inspect.getsource(lab.train)
print(textwrap.dedent("    " + source[source.index("for step in range"):source.index("    bar.close()")]))

# %% [markdown]
# The optimizer is **AdamW**: it divides each parameter's step by a running estimate of how large its gradients are,
# so that the learning rate means about the same for each of them. The schedule is a straight line up over the first
# twentieth of the steps (*warm-up*) and a straight line down to zero.
#
# ## The run
#
# **Predict:** what share of the programs that the model writes for *held-out wordings* will pass their tests, before
# and after? This share is called **pass@1**: one try per prompt, the likeliest token each time.

# %%
n_eval = lab.steps(100, 8)
longest = max(answer for _, answer in lengths)
short = dict(max_new_tokens=longest + 16)              # of the answers counted above the longest had `longest` tokens
before = evaluate(model, tokenizer, held_out, n=n_eval, **short)
print("before:", before)

# %%
attach(model, CONFIG, seed=0)
history = train(model, train_rows, tokenizer, steps=lab.steps(300), lr=4e-3, batch_size=16)
print(f"{len(history.loss)} steps, {history.tokens:,} targets, {history.seconds:.0f} s")
show(history.plot("Fine-tuning on instruction → Python"),
     alt=f"Training loss over {len(history.loss)} steps: it falls from {history.loss[0]:.2f} to "
         f"{history.smooth()[-1]:.2f} nats per target token, fast at first and then slowly.")

# %% [markdown]
# *The loss falls fast while the model learns the form of an answer, and slowly while it learns what the answers
# should do. How good the programs are, it does not say. For that, run them:*

# %%
after = evaluate(model, tokenizer, held_out, n=n_eval, **short)
on_random = evaluate(model, tokenizer, random_tenth, n=lab.steps(60, 8), **short)
on_new = evaluate(model, tokenizer, new_kinds, n=lab.steps(60, 8), **short)
asked = {"before, held_out": before, "after, held_out": after, "after, random_tenth": on_random,
         "after, new_kinds": on_new}
for name, report in asked.items():
    low, high = (100 * end for end in report.interval)
    print(f"{name:>20}: pass@1 {100 * report.pass_at_1:5.1f} %   (95 % interval {low:.0f} to {high:.0f} %, "
          f"{len(report.rows)} rows)")

# %% [markdown]
# Compare `random_tenth` with `held_out`, and both with `new_kinds`: three honest numbers for three different
# questions. The interval says how far the number could be off because we asked so few times.

# %% question="finetune-q-split"

# %% [markdown]
# ## Before and after, prompt by prompt
#
# Choose a prompt. On the left is what the base model writes, on the right what it writes with the adapter, and
# whether the tests passed.

# %%
order = sorted(range(len(after.rows)), key=lambda i: (not after.rows[i]["passed"], len(after.rows[i]["instruction"])))
viewer = pictures.generation_viewer([before.rows[i] for i in order], [after.rows[i] for i in order])

# %% [markdown]
# *The base model goes on with the text; with the adapter it answers with a function of the name that was asked for,
# and stops. Prompts marked ✗ stand at the end of the list.*
#
# ## What is left to fail
#
# By family of tasks, on the held-out wordings:

# %%
family_of = {r["kind"]: r["family"] for r in held_out}


def by_family(report):
    out = {}
    for r in report.rows:
        passed, n = out.get(family_of[r["kind"]], (0, 0))
        out[family_of[r["kind"]]] = (passed + r["passed"], n + 1)
    return out


a, b = by_family(before), by_family(after)
families = sorted(b, key=lambda f: -b[f][0] / b[f][1])
show(pictures.before_after_bars({f: (a[f], b[f]) for f in families}),
     alt="pass@1 by family before (circles) and after (diamonds): "
         + "; ".join(f"{f} {a[f][0]} → {b[f][0]} of {b[f][1]}" for f in families))

# %% [markdown]
# *Circles are the base model, diamonds the model with the adapter. Few rows stand behind each line, so read the order
# with care.*
#
# And how do answers fail? A program may not be Python at all, may stop with an error, or may run and give a wrong
# result. The three say different things: about the form, about the details, about the meaning.

# %%
def outcome(r):
    if r["passed"]:
        return "passes"
    name = r["error"].split(":")[0]
    return {"AssertionError": "runs, wrong result", "SyntaxError": "is not Python", "IndentationError": "is not Python",
            "NameError": "a name that does not exist"}.get(name, "another error")


outcomes = ["passes", "runs, wrong result", "a name that does not exist", "is not Python", "another error"]
reports = {"base, held_out": before, "LoRA, random_tenth": on_random, "LoRA, held_out": after,
           "LoRA, new_kinds": on_new}
counts = {name: Counter(outcome(r) for r in report.rows) for name, report in reports.items()}
show(pictures.error_bars({name: {o: c[o] for o in outcomes} for name, c in counts.items()}),
     alt="How answers end: " + "; ".join(
         f"{name}: " + ", ".join(f"{o} {c[o]}" for o in outcomes if c[o]) for name, c in counts.items()))

# %% [markdown]
# *The base model's answers fail by their form. With the adapter, what fails mostly runs, and does something else than
# was asked: the form is learned, the meaning in part. On kinds of task that it has never seen, it falls back on what it
# knows.* Read a few failures of each sort:

# %%
for report, title in ((after, "held_out"), (on_new, "new_kinds")):
    for r in [r for r in report.rows if not r["passed"]][:2]:
        print(f"--- {title}: {r['instruction']}" + (f"\n{r['input']}" if r["input"] else ""))
        print(textwrap.indent(r["answer"].strip(), "    ") + f"\n    → {r['error'] or 'no error, no pass'}\n")

# %% [markdown]
# # Step 7 · Saving
#
# What was trained is A and B of each layer, and that is what you save. `peft` made two files the common form:
#
# - `adapter_config.json`: the settings, at least `peft_type` (`"LORA"`), `r`, `lora_alpha` and `target_modules`;
# - `adapter_model.safetensors`: the tensors. *safetensors* is a file of plain numbers with names; unlike a pickle it
#   cannot run code when it is opened.
#
# The names need care. In the model a parameter is called `model.layers.0.self_attn.q_proj.lora_A.default.weight`; in
# the file the same tensor is called `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`: a prefix in
# front, and the adapter's own name, `default`, left out.

# %% [markdown] exercise="save-and-reload"
# Write two functions.
#
# - `save_adapter(model, folder, r, alpha, target_modules)` writes both files into `folder`, a path that may not exist
#   yet. Only the parameters of the adapter go into the file, under their names there.
# - `load_adapter(model, folder)` puts the saved values into the adapter that `model` has already. Names in the file
#   are those of `peft`, names in the model end in `lora_A.default.weight` and `lora_B.default.weight`. Change the
#   existing parameters, do not replace them: an optimizer may hold them.
#
# `safetensors.torch` has `save_file({name: tensor}, path)` and `load_file(path)`, which gives such a dict.
#
# *Why it matters:* an adapter that loads without a complaint and does nothing is one of the commonest faults in this
# field.
# %% exercise="save-and-reload"
def save_adapter(model, folder, r, alpha, target_modules):
    """Write adapter_config.json and adapter_model.safetensors as peft does."""
    ### BEGIN SOLUTION
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": alpha,
              "target_modules": list(target_modules)}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    tensors = {"base_model.model." + name.replace(".default.", "."): p.detach().contiguous()
               for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}
    save_file(tensors, folder / "adapter_model.safetensors")
    ### END SOLUTION


def load_adapter(model, folder):
    """Copy the tensors of adapter_model.safetensors into the adapter that is attached to model."""
    ### BEGIN SOLUTION
    from safetensors.torch import load_file

    saved = load_file(Path(folder) / "adapter_model.safetensors")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                p.copy_(saved["base_model.model." + name.replace(".default.", ".")])
    ### END SOLUTION
# %% check="save-and-reload"
check("save-and-reload", (save_adapter, load_adapter))
# %% [markdown] hint="save-and-reload" level="nudge"
# Both functions need the same piece: from a parameter's name in the model to its name in the file. Both can go
# through `model.named_parameters()` and look only at names with `.lora_A.` or `.lora_B.` in them.
# %% [markdown] hint="save-and-reload" level="shape"
# In the file: `lora_A.weight` is $[r, d_\text{in}]$ and `lora_B.weight` is $[d_\text{out}, r]$, as they are in the
# model. Nothing is transposed or scaled; $\alpha$ is in the configuration, under the name `lora_alpha`.
# %% [markdown] hint="save-and-reload" level="code"
# The name in the file is `"base_model.model." + name.replace(".default.", ".")`. To load: under `torch.no_grad()`,
# for each adapter parameter, `p.copy_(saved[that name])`. The folder: `Path(folder).mkdir(parents=True,
# exist_ok=True)`.

# %% [markdown]
# `pefttools.checkpoint` has both functions, with checks for what can go wrong on disk. We save the adapter that was
# just trained, look at the files, and let **`peft`** load them onto a fresh base model. If the logits agree, it is
# the same adapter:

# %%
from pefttools import checkpoint

folder = checkpoint.save_adapter(model, scratch / "adapter")
sizes = {f.name: f.stat().st_size for f in sorted(folder.iterdir())}
for name, size in sizes.items():
    print(f"{name:<28}{size / 1e6:8.3f} MB")

fresh = load_base("tiny").model
loaded = peft.PeftModel.from_pretrained(fresh, folder).eval()
with torch.no_grad():
    from_ours = model(probe["input_ids"], attention_mask=probe["attention_mask"]).logits
    from_peft = loaded(probe["input_ids"], attention_mask=probe["attention_mask"]).logits
    with loaded.disable_adapter():
        without = loaded(probe["input_ids"], attention_mask=probe["attention_mask"]).logits
reload_gap = (from_ours - from_peft)[real].abs().max().item()
print(f"\nlargest difference of any logit, ours and peft's: {reload_gap:.1e}   (with and without the adapter: "
      f"{(from_peft - without)[real].abs().max():.1f})")

# %% [markdown]
# The second number matters as much as the first: a difference of zero is also what you get when *nothing* was loaded
# on either side.
#
# Slide 000 saves the tokenizer next to the adapter. That is a good habit: whoever loads it needs the same pad token
# and the same special tokens. `tokenizer.save_pretrained(folder)` writes it.
#
# # Against production: `peft` + `Trainer`
#
# Now the same training once more, by the libraries that most people use: `peft` adds the adapter,
# `transformers.Trainer` trains it. Slide 000 configures it by `TrainingArguments`. Does that still run as printed?

# %%
from transformers import Trainer, TrainingArguments

for printed in ("logging_dir='./logs'", "num_train_epochs=1, learning_rate=2e-4, save_strategy='epoch'"):
    try:
        exec(f"TrainingArguments(output_dir=str(scratch), {printed})")
        print(f"{printed:<58} works here")
    except Exception as error:
        print(f"{printed:<58} {type(error).__name__}: {str(error).splitlines()[0][:110]}")

# %% [markdown]
# One setting of it is gone in the transformers that is installed here; take it out and the rest runs. (The slide also
# says `fp16=True`. That is for a GPU, and right for a T4, which has no bfloat16.)
#
# `lab.train_with_trainer` is `Trainer` with our batches. Both start from the *same* A: we save an untrained adapter
# and let `peft` load it. Ours is then trained by `lab.train`, theirs by `Trainer`, with accumulation over two
# micro-batches. **Predict:** how far apart will the losses be after all steps?

# %%
compare = dict(steps=lab.steps(24), lr=5e-3, batch_size=4, grad_accum=2, seed=3, progress=False)
mine = load_base("tiny").model
attach(mine, CONFIG, seed=5)
checkpoint.save_adapter(mine, scratch / "start")
theirs = peft.PeftModel.from_pretrained(load_base("tiny").model, scratch / "start", is_trainable=True)

our_history = train(mine, train_rows.select(range(400)), tokenizer, **compare)
their_history = lab.train_with_trainer(theirs, train_rows.select(range(400)), tokenizer, **compare)
trainer_gap = max(abs(x - y) for x, y in zip(our_history.loss, their_history.loss))
print(f"largest difference of the losses over {len(our_history.loss)} steps: {trainer_gap:.1e}")
show(pictures.loss_pair(our_history.loss, their_history.loss),
     alt="The two loss curves lie on one another; beneath, their difference on a logarithmic scale, at most "
         f"{trainer_gap:.1e}.")

# %% [markdown]
# *Two implementations, one curve: what you have read in one page is what `Trainer` does to your weights.* The rest of
# it is about many devices, precisions, logs and restarts:

# %%
print(f"lines of lab.train: {len(inspect.getsource(lab.train).splitlines())}, of the module of Trainer: "
      f"{len(Path(inspect.getfile(Trainer)).read_text().splitlines()):,}")

# %% [markdown]
#
# ### Where does it live?
#
# The token-weighted loss is spread over three places of transformers. `Trainer` counts the targets of the whole step,
# hands the count to the model as `num_items_in_batch`, and the loss function divides by it. Read the two ends:

# %%
from transformers.loss.loss_utils import fixed_cross_entropy

print(inspect.getsource(fixed_cross_entropy))
counter = inspect.getsource(Trainer._get_num_items_in_batch)
telling = ("Causal LM losses", '["labels"][..., 1:]', ".ne(-100)")
print("\n".join(line.strip() for line in counter.splitlines() if any(part in line for part in telling)))

# %% [markdown]
# Explain the `if` in the first one to yourself: when is the mean taken, and when the sum? (A model whose `forward`
# does not take `num_items_in_batch` gets the mean, and with it the mean of means.)
#
# # The sources say … we measured …

# %%
rows = [
    ("000", "`tokenized_datasets.train_test_split(…)` on what `load_dataset` returns",
     "the name is not defined yet, and a `DatasetDict` has no such method; split its `[\"train\"]`"),
    ("000", "`pad_token = eos_token`, padding to 512, labels copied",
     f"{100 * share['padding']:.0f} % of the targets and {100 * loss_share['padding']:.0f} % of the base model's loss "
     "are then padding"),
    ("a common repair", "labels equal to the pad id → −100, with pad = eos",
     f"{stopped['end-of-text is −100']} of {len(ask_these)} answers end by themselves; with end-of-text as a target "
     f"{stopped['end-of-text is a target']}"),
    ("000", "`from_pretrained(…, load_in_8bit=True)`",
     f"`{removed.split(':')[0]}`: the argument is gone; `BitsAndBytesConfig` is the way"),
    ("000", "the architecture has a separate `lm_head`",
     f"tied: {counted[True]:,} parameters, not {counted[False]:,}"),
    ("003", "norms and head cast \"to FP16\"", "its code and today's `peft` cast to float32, and freeze them"),
    ("003", "a \"6B parameter Llama\"",
     f"{opt_size:,} parameters: OPT-6.7B. The share of {lora_percent:.3f} % holds"),
    ("003", "gradient checkpointing reduces stored activations",
     f"holds: the blocks keep {block_factor:.1f} times less; loss and gradient unchanged; time × {on[3] / off[3]:.2f}"),
    ("003", "one can train on top of an int8 base",
     f"holds: {sum(grads)} of {len(grads)} adapter tensors get a gradient; the base's held-out loss goes from "
     f"{loss_full:.3f} to {loss_eight:.3f}"),
    ("000", "LoRA + `Trainer` teaches a base model to write code on demand",
     f"holds: pass@1 {100 * before.pass_at_1:.0f} % → {100 * after.pass_at_1:.0f} % on held-out wordings; our loop and "
     f"`Trainer` differ by at most {trainer_gap:.0e}"),
]
display(Markdown("\n".join(["| source | says | we found |", "|---|---|---|", *(f"| {' | '.join(r)} |" for r in rows)])))

# %% [markdown]
# ## Summary
#
# | step | what to get right | what goes wrong silently |
# |---|---|---|
# | 1 data | one rule for the prompt, in training and in use; hold out wordings and kinds, not only rows | a score on siblings of the training rows |
# | 2 tokens | −100 on prompt and padding, *by place*; end-of-text a target; no shift | padding as a target; a model that never stops |
# | 3 model | know what is tied, quantized, cast and frozen | counting the head twice |
# | 4 LoRA | $r$, $\alpha$, where | a wrong name for a setting, and a default in its place |
# | 5, 6 training | divide by the targets of the whole step; clip once; step, then schedule, then zero | mean of means |
# | 7 saving | adapter only, `peft`'s names; compare logits after loading, and against the base | an adapter that loads and does nothing |
#
# **Words to keep.** *Target*: a place whose label is not −100. *Micro-batch*: what fits into memory at once.
# *Accumulation*: several of them make one step. *pass@1*: the share of prompts whose one answer passes its tests.
# *Held out*: not seen in training; always ask, *what* was not seen.
#
# **To read.** Hu and others, *LoRA* (2021), section 4, for what is trained. Chen and others, *Evaluating Large
# Language Models Trained on Code* (2021), which introduced judging programs by their tests. Dettmers and others,
# *LLM.int8()* (2022), on what 8-bit matrices do to a model. Chen and others, *Training Deep Nets with Sublinear
# Memory Cost* (2016), gradient checkpointing. Loshchilov and Hutter, *Decoupled Weight Decay Regularization* (2017),
# AdamW.
#
# **Next.** Eight bits were one line here. Chapter 04 takes quantization apart, down to four bits and to the single
# code, and chapter 05 trains on top of it. If you would like to see how far this fine-tune goes on the real
# Llama-3.2-1B, chapter 11 runs it on a T4.
