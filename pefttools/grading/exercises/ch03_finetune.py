"""Exercises of chapter 03: a row of text → ids and labels → a batch → an optimizer step → PEFT's two files.

Judged by what the work does: ids, labels, parameters after steps, the bytes of the saved files. Models are toys of a
few hundred numbers in float64, so that two right ways to sum a loss agree to the last digits that are compared.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from pefttools.grading.exercise import Exercise
from pefttools.grading.question import Question

CHAPTER = "03_finetune"
TITLE = "A fine-tune end to end"
IGNORE = -100


# --- format-example: a row → (prompt, answer) -------------------------------------------------------------------------

def format_inputs(rng: torch.Generator) -> list[dict]:
    def row(instruction, input, output):
        text = instruction + "\n" + (input + "\n" if input else "") + output
        return {"row": {"instruction": instruction, "input": input, "output": output, "text": text}}

    k = int(torch.randint(2, 50, (1,), generator=rng))
    return [
        row(f"Write a function times{k}(x) that multiplies x by {k}.", "",
            f"```python\ndef times{k}(x):\n    return {k} * x\n```"),
        row("Count the vowels of a word.", "word = 'banana'",
            "```python\nprint(sum(c in 'aeiou' for c in word))\n```\n"),
        row("Find the error in this code.", "```python\nprint(1\n```", "```python\nprint(1)\n```"),
        row("Say « bonjour » twice.", "name = 'Zoë'\nn = 2", "```python\nprint('bonjour ' * n)\n```"),
    ]


def pair(result, names: str):
    """The two things a work returned. A TypeError says what came instead: the judge shows it as it stands."""
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        came = "None (is a `return` missing?)" if result is None else f"one {type(result).__name__}"
        raise TypeError(f"return two things, {names}; this returned {came}")
    return result


def format_probe(format_example, case: dict) -> dict:
    prompt, answer = pair(format_example(dict(case["row"])), "(prompt, answer)")
    whole = prompt + answer == case["row"]["text"] if isinstance(prompt, str) and isinstance(answer, str) else False
    return {"prompt": prompt, "answer": answer, "prompt + answer is the text": whole}


def format_reference(row):
    between = row["input"] + "\n" if row["input"] else ""
    return row["instruction"] + "\n" + between, row["output"]


FORMAT = Exercise(
    name="format-example", chapter=CHAPTER, title="From a row to a prompt and an answer",
    points=1, minutes=5, difficulty=1,
    inputs=format_inputs, probe=format_probe, reference=format_reference,
    mistakes={
        "empty line": (
            lambda row: (row["instruction"] + "\n" + row["input"] + "\n", row["output"]),
            "A row without input gets an empty line here. The base model sees a blank line where training data has "
            "none; add the input line only when there is an input."),
        "input forgotten": (
            lambda row: (row["instruction"] + "\n", row["output"]),
            "The input column is missing from the prompt: the model is asked about data that it never sees, so all "
            "it can learn is to guess it."),
        "answer in the prompt": (
            lambda row: (row["text"], row["output"]),
            "The prompt holds the answer already (it is the whole `text`). The model would learn to say everything "
            "twice, and be helpless at generation, when nobody supplies the answer."),
        "newline with the answer": (
            lambda row: ((p := format_reference(row)[0])[:-1], "\n" + row["output"]),
            "The newline before the answer went to the answer. Then the prompt ends in mid-line: the newline belongs "
            "to the prompt, so that the model's first token is the first token of its answer."),
        "newline after the input lost": (
            lambda row: (row["instruction"] + "\n" + row["input"], row["output"]),
            "The input has no line end after it, so the answer would begin in the same line. Instruction and input "
            "each get a line end."),
        "newline lost": (
            lambda row: (format_reference(row)[0].rstrip("\n"), row["output"]),
            "The newline between prompt and answer got lost, so prompt + answer is no longer the row's `text`. A "
            "prompt that differs by one character from training is tokenized differently at exactly the place where "
            "the answer begins."),
        "split at the first fence": (
            lambda row: ((t := row["text"])[:(i := t.index("```python"))], t[i:]),
            "You look for the answer by its first ```python. An input may hold code too (the third case does), and "
            "then part of the prompt becomes a target. The columns already say where the answer begins: use them."),
        "fence stripped": (
            lambda row: (format_reference(row)[0], re.sub(r"^```python\n|\n```\n?$", "", row["output"])),
            "The code fence was taken off the answer. It is part of `output`: the model has to write it too, and the "
            "evaluation looks for it."),
        "stripped": (
            lambda row: (format_reference(row)[0], row["output"].strip()),
            "White space at the end of the answer was stripped, so prompt + answer is no longer the row's `text`. Do "
            "not clean data on the way to the model without being asked to."),
        "swapped": (
            lambda row: format_reference(row)[::-1],
            "You return (answer, prompt). The order is (prompt, answer)."),
    },
    alternatives={
        "cut text by the length of output": lambda row: (
            row["text"][:len(row["text"]) - len(row["output"])], row["output"]),
        "join the parts that are there": lambda row: (
            "".join(part + "\n" for part in (row["instruction"], row["input"]) if part), row["output"]),
        "if and else": lambda row: (
            f"{row['instruction']}\n{row['input']}\n" if row["input"] else f"{row['instruction']}\n", row["output"]),
    },
    hides=("pefttools.lab",),
)


# --- mask-labels: ids of prompt and answer → input_ids and labels -----------------------------------------------------

def mask_inputs(rng: torch.Generator) -> list[dict]:
    def draw(n):
        return torch.randint(3, 40, (n,), generator=rng).tolist()

    shared = draw(5)
    return [
        {"prompt_ids": [11, 12, 13], "answer_ids": [21, 22], "bos_id": 0, "eos_id": 1, "max_length": 16},
        {"prompt_ids": shared + [7], "answer_ids": shared[::-1] + [9, 7], "bos_id": 0, "eos_id": 1, "max_length": 64},
        {"prompt_ids": draw(12), "answer_ids": draw(6), "bos_id": 2, "eos_id": 1, "max_length": 12},  # cut by 8
        {"prompt_ids": draw(9), "answer_ids": draw(6), "bos_id": 0, "eos_id": 1, "max_length": 8},  # no room
        {"prompt_ids": draw(4), "answer_ids": draw(5), "bos_id": 0, "eos_id": 1, "max_length": 11},  # just fits
    ]


def plain(ids) -> list[int]:
    """A list of ints from a list, tuple or tensor: which of them a student returns is a matter of taste."""
    return [int(i) for i in (ids.tolist() if isinstance(ids, torch.Tensor) else ids)]


def mask_probe(mask_labels, case: dict) -> dict:
    ids, labels = pair(mask_labels(list(case["prompt_ids"]), list(case["answer_ids"]), case["bos_id"], case["eos_id"],
                                   case["max_length"]), "(input_ids, labels)")
    return {"input_ids": plain(ids), "labels": plain(labels)}


def cut_prompt(prompt, answer, max_length):
    """The end of the prompt, as much as fits beside begin-of-text, the answer and end-of-text."""
    room = max_length - len(answer) - 2
    return prompt[max(0, len(prompt) - room):]


def mask_reference(prompt, answer, bos, eos, max_length):
    prompt = [bos] + cut_prompt(prompt, answer, max_length)
    answer = answer + [eos]
    return prompt + answer, [IGNORE] * len(prompt) + answer


def relabelled(change):
    """A mistake that gets the ids right and the labels wrong: `change(ids, labels, n)`, where n tokens are masked."""
    def work(prompt, answer, bos, eos, max_length):
        ids, labels = mask_reference(prompt, answer, bos, eos, max_length)
        return ids, change(ids, labels, len(ids) - len(answer) - 1)
    return work


def mask_cut_right(prompt, answer, bos, eos, max_length):
    ids, labels = mask_reference(prompt, answer, bos, eos, 10**6)
    return ids[:max_length], labels[:max_length]


def mask_cut_right_with_eos(prompt, answer, bos, eos, max_length):
    ids, labels = mask_cut_right(prompt, answer, bos, eos, max_length)
    return ids[:-1] + [eos], labels[:-1] + [eos]


def mask_cut_left(prompt, answer, bos, eos, max_length):
    ids, labels = mask_reference(prompt, answer, bos, eos, 10**6)
    return ids[-max_length:], labels[-max_length:]


def mask_minus_zero(prompt, answer, bos, eos, max_length):
    room = max_length - len(answer) - 2
    prompt = [bos] + prompt[-room:]
    return prompt + answer + [eos], [IGNORE] * len(prompt) + answer + [eos]


def mask_without_bos(prompt, answer, bos, eos, max_length):
    ids, labels = mask_reference(prompt, answer, bos, eos, max_length)
    return ids[1:], labels[1:]


def mask_without_eos(prompt, answer, bos, eos, max_length):
    ids, labels = mask_reference(prompt, answer, bos, eos, max_length)
    return ids[:-1], labels[:-1]


def mask_on_tensors(prompt, answer, bos, eos, max_length):
    kept = cut_prompt(prompt, answer, max_length)
    ids = torch.tensor([bos, *kept, *answer, eos])
    labels = ids.clone()
    labels[:1 + len(kept)] = IGNORE
    return ids, labels


def mask_by_loop(prompt, answer, bos, eos, max_length):
    prompt = list(prompt)
    while 1 + len(prompt) + len(answer) + 1 > max_length:
        prompt.pop(0)
    ids, labels = [bos], [IGNORE]
    for token in prompt:
        ids.append(token)
        labels.append(IGNORE)
    for token in [*answer, eos]:
        ids.append(token)
        labels.append(token)
    return ids, labels


MASK = Exercise(
    name="mask-labels", chapter=CHAPTER, title="What the model reads, what it has to predict",
    points=3, minutes=10, difficulty=2,
    inputs=mask_inputs, probe=mask_probe, reference=mask_reference,
    mistakes={
        "prompt not masked": (
            relabelled(lambda ids, labels, n: list(ids)),
            "The labels are a copy of the ids, so the prompt is a target too: the model is trained to write "
            "instructions. Put -100 on begin-of-text and on every token of the prompt."),
        "shifted": (
            relabelled(lambda ids, labels, n: labels[1:] + [IGNORE]),
            "The labels are shifted by one already. transformers' models shift inside (they compare position t with "
            "label t + 1), so these would be shifted twice and the model would learn to skip every other token. "
            "Label t is the id at t."),
        "last prompt token is a target": (
            relabelled(lambda ids, labels, n: [IGNORE] * (n - 1) + ids[n - 1:]),
            "One token too few is masked: the last token of the prompt is a target. Begin-of-text counts as well, so "
            "1 + len(prompt) labels are -100."),
        "first answer token masked": (
            relabelled(lambda ids, labels, n: [IGNORE] * (n + 1) + ids[n + 1:]),
            "One token too many is masked: the first token of the answer is not a target, so nothing teaches the "
            "model how an answer begins. The shift is done by the model, not here."),
        "end-of-text missing": (
            mask_without_eos,
            "There is no end-of-text. Then nothing in training says that an answer ends, and at generation the model "
            "goes on until max_new_tokens stops it."),
        "end-of-text masked": (
            relabelled(lambda ids, labels, n: labels[:-1] + [IGNORE]),
            "End-of-text is read but not a target: its label is -100 (what happens when labels equal to the pad id "
            "are ignored and pad = eos). The model never learns to stop. It is part of the answer."),
        "begin-of-text missing": (
            mask_without_bos,
            "There is no begin-of-text. The base model has seen it in front of every text of its pretraining; "
            "without it all positions and the attention to that first token are unfamiliar."),
        "masked by value": (
            lambda p, a, bos, eos, m: (
                (ids := mask_reference(p, a, bos, eos, m)[0]), [IGNORE if t in (bos, *p) else t for t in ids]),
            "You mask every token that *occurs* in the prompt, wherever it stands. An answer uses the words of its "
            "question (case 2), and those are exactly the tokens it should learn to copy. Mask by position, never by "
            "value."),
        "zeros for -100": (
            relabelled(lambda ids, labels, n: [0] * n + labels[n:]),
            "The masked labels are 0. Zero is a real token id (here: begin-of-text); only -100 is ignored by the "
            "loss."),
        "labels of the answer alone": (
            relabelled(lambda ids, labels, n: labels[n:]),
            "The labels are shorter than the ids. They run in parallel, one label for each id: a masked place still "
            "takes a place, with -100 in it."),
        "not cut": (
            lambda p, a, bos, eos, m: mask_reference(p, a, bos, eos, 10**6),
            "A row that is too long stays too long: max_length is not used. Drop tokens from the beginning of the "
            "prompt until everything fits."),
        "end of the prompt cut": (
            lambda p, a, bos, eos, m: mask_reference(p[:m - len(a) - 2], a, bos, eos, m),
            "A row that is too long lost the *end* of its prompt, the part right before the answer (here the input "
            "would stand). Drop tokens from its beginning."),
        "cut on the right": (
            mask_cut_right,
            "A row that is too long was cut at its end: the answer loses its last tokens and end-of-text. Cut the "
            "beginning of the prompt, and keep the answer and its end whole."),
        "cut, then end-of-text forced": (
            mask_cut_right_with_eos,
            "A row that is too long was cut at its end and end-of-text put on the cut: this teaches the model to "
            "stop in the middle of a program. Cut the beginning of the prompt instead."),
        "begin-of-text cut off": (
            mask_cut_left,
            "A row that is too long lost its begin-of-text (you keep the last max_length ids). Take the tokens away "
            "between begin-of-text and the rest of the prompt."),
        "minus zero": (
            mask_minus_zero,
            "When no room is left for the prompt, the slice goes wrong: prompt[-0:] is the *whole* prompt, because "
            "-0 is 0. Slice from max(0, len(prompt) - room)."),
    },
    alternatives={"clone and overwrite, on tensors": mask_on_tensors, "token by token": mask_by_loop},
    hides=("pefttools.lab", "trl"),
)


# --- collate: rows of different length → one batch --------------------------------------------------------------------

def collate_inputs(rng: torch.Generator) -> list[dict]:
    def row(masked, targets, eos=1):
        ids = [0, *torch.randint(3, 40, (masked - 1 + targets - 1,), generator=rng).tolist(), eos]
        return {"input_ids": ids, "labels": [IGNORE] * masked + ids[masked:]}

    inner = row(3, 4)
    inner["input_ids"][1], inner["input_ids"][4], inner["labels"][4] = 2, 2, 2  # the pad id inside a text
    return [
        {"rows": [row(2, 2), row(3, 4), row(4, 1)], "pad_id": 2},
        {"rows": [row(2, 3), row(6, 5), row(1, 2), row(3, 3)], "pad_id": 1},    # pad = eos, 000's way
        {"rows": [inner, row(4, 5)], "pad_id": 2},
        {"rows": [row(3, 3)], "pad_id": 1},
    ]


def collate_probe(collate, case: dict) -> dict:
    batch = collate([{k: list(v) for k, v in row.items()} for row in case["rows"]], case["pad_id"])
    if not hasattr(batch, "keys"):
        raise TypeError("return a dict with input_ids, attention_mask and labels; this returned "
                        + ("None (is a `return` missing?)" if batch is None else f"one {type(batch).__name__}"))
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels") if name in batch}


def collate_reference(rows, pad_id):
    T = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), T), pad_id)
    mask = torch.zeros(len(rows), T, dtype=torch.int64)
    labels = torch.full((len(rows), T), IGNORE)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        ids[i, :n] = torch.tensor(row["input_ids"])
        mask[i, :n] = 1
        labels[i, :n] = torch.tensor(row["labels"])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def rebatched(change):
    """A mistake made on the right batch: `change(batch, rows, pad_id)` alters it in place or returns another."""
    def work(rows, pad_id):
        batch = collate_reference(rows, pad_id)
        return change(batch, rows, pad_id) or batch
    return work


def labels_padded_with(value):
    def change(batch, rows, pad_id):
        batch["labels"][batch["attention_mask"] == 0] = pad_id if value is None else value
    return rebatched(change)


def collate_left(rows, pad_id, labels_too=True):
    right = collate_reference(rows, pad_id)
    left = {k: torch.stack([row.roll(int((m == 0).sum())) for row, m in zip(v, right["attention_mask"])])
            for k, v in right.items()}
    return left if labels_too else left | {"labels": right["labels"]}


def change_ignore_pads(batch, rows, pad_id):
    batch["labels"][batch["input_ids"] == pad_id] = IGNORE


def change_copy_ids(batch, rows, pad_id):
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE)


def change_mask_by_value(batch, rows, pad_id):
    batch["attention_mask"] = (batch["input_ids"] != pad_id).long()


def change_both_by_value(batch, rows, pad_id):
    change_ignore_pads(batch, rows, pad_id)
    change_mask_by_value(batch, rows, pad_id)


def change_prompt_hidden(batch, rows, pad_id):
    batch["attention_mask"] = (batch["labels"] != IGNORE).long()


def change_ones(batch, rows, pad_id):
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])


def change_upside_down(batch, rows, pad_id):
    batch["attention_mask"] = 1 - batch["attention_mask"]


def change_fixed_length(batch, rows, pad_id):
    T = batch["input_ids"].shape[1]
    return {k: F.pad(v, (0, 512 - T), value={"input_ids": pad_id, "attention_mask": 0, "labels": IGNORE}[k])
            for k, v in batch.items()}


def change_shortest(batch, rows, pad_id):
    T = min(len(row["input_ids"]) for row in rows)
    return {k: v[:, :T] for k, v in batch.items()}


def collate_pad_sequence(rows, pad_id):
    def padded(seqs, value):
        return nn.utils.rnn.pad_sequence([torch.tensor(s) for s in seqs], batch_first=True, padding_value=value)

    return {"input_ids": padded([r["input_ids"] for r in rows], pad_id),
            "attention_mask": padded([[1] * len(r["input_ids"]) for r in rows], 0),
            "labels": padded([r["labels"] for r in rows], IGNORE)}


def collate_lists(rows, pad_id):
    T = max(len(row["input_ids"]) for row in rows)
    out = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        n = len(row["input_ids"])
        out["input_ids"].append(row["input_ids"] + [pad_id] * (T - n))
        out["attention_mask"].append([1] * n + [0] * (T - n))
        out["labels"].append(row["labels"] + [IGNORE] * (T - n))
    return {name: torch.tensor(value) for name, value in out.items()}


def collate_by_lengths(rows, pad_id):
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.full(mask.shape, pad_id)
    ids[mask.bool()] = torch.tensor([t for row in rows for t in row["input_ids"]])
    labels = torch.full(mask.shape, IGNORE)
    labels[mask.bool()] = torch.tensor([t for row in rows for t in row["labels"]])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


COLLATE = Exercise(
    name="collate", chapter=CHAPTER, title="Rows of different length in one batch", points=3, minutes=10, difficulty=2,
    inputs=collate_inputs, probe=collate_probe, reference=collate_reference,
    mistakes={
        "padding is a target": (
            labels_padded_with(None),
            "The labels are padded with the pad id, so the loss is taken over the padding too (what slide 000 does). "
            "Pad labels with -100."),
        "labels padded with 0": (
            labels_padded_with(0),
            "The labels are padded with 0. Zero is a real token id (begin-of-text); only -100 is ignored by the loss."),
        "pads ignored by value": (
            rebatched(change_ignore_pads),
            "You ignore every label *equal to* the pad id. Where pad = eos (case 2) that hides the true end-of-text "
            "as well, and the model never learns to stop. Padding is what lies behind the end of the row: decide by "
            "position."),
        "attention mask by value": (
            rebatched(change_mask_by_value),
            "The attention mask is `input_ids != pad_id`. Where pad = eos, or where the pad token occurs inside a "
            "text, real tokens become invisible. Padding is decided by position, not by value."),
        "both by value": (
            rebatched(change_both_by_value),
            "Attention mask and labels are both decided by comparing with pad_id. Where pad = eos that hides the "
            "true end-of-text from the loss, and the model never learns to stop. Decide by position: you know each "
            "row's length."),
        "attention mask of ones": (
            rebatched(change_ones),
            "The attention mask is 1 everywhere, so padding counts as text. With padding on the right a causal "
            "model's targets happen not to see it; with padding on the left, or any code that counts positions or "
            "tokens by this mask, it does harm."),
        "attention mask upside down": (
            rebatched(change_upside_down),
            "The attention mask is upside down: 1 means a real token, 0 means padding."),
        "prompt hidden": (
            rebatched(change_prompt_hidden),
            "The attention mask is 0 on the prompt (you made it from the labels): the model could not read the "
            "question. A label of -100 means 'not counted', an attention mask of 0 means 'not there'. The prompt is "
            "there."),
        "labels copied from ids": (
            rebatched(change_copy_ids),
            "The labels are the ids again (with padding ignored): the -100 on each prompt, which you were given in "
            "row['labels'], got lost. Pad the labels that the rows bring."),
        "padded on the left": (
            collate_left,
            "The rows are padded on the left. That is the convention for *generation*, where each row must go on "
            "from its last token. In training pad on the right: the first token keeps position 0 without anybody "
            "computing positions."),
        "ids left, labels right": (
            lambda rows, pad_id: collate_left(rows, pad_id, labels_too=False),
            "The ids are padded on the left and the labels on the right, so that labels belong to other tokens than "
            "those they stand at. All three are padded on the same side, here the right."),
        "padded to 512": (
            rebatched(change_fixed_length),
            "Every batch is padded to a fixed length of 512. The result is right and nearly all the work is done on "
            "padding; pad to the longest row of the batch."),
        "cut to the shortest": (
            rebatched(change_shortest),
            "The rows were cut to the shortest one: tokens get lost, end-of-text first. Pad to the longest."),
    },
    alternatives={"pad_sequence": collate_pad_sequence, "lists, then tensors": collate_lists,
                  "mask from lengths": collate_by_lengths},
    hides=("pefttools.lab", "transformers"),
)


# --- training-step: accumulate, clip, step ----------------------------------------------------------------------------

class Output(dict):
    """What a transformers model returns: `.loss`, `.logits`, or by key."""

    __getattr__ = dict.__getitem__


class ToyLM(nn.Module):
    """A causal language model of 300 numbers with the interface of transformers': labels are shifted inside.

    Token t sees the mean of the embeddings up to t. The embedding is frozen, as a base model is; the rest trains.
    """

    def __init__(self, weights: dict[str, torch.Tensor]):
        super().__init__()
        self.embed = nn.Parameter(weights["embed"].clone(), requires_grad=False)
        self.mix = nn.Parameter(weights["mix"].clone())
        self.head = nn.Parameter(weights["head"].clone())

    def forward(self, input_ids, attention_mask=None, labels=None, num_items_in_batch=None):
        h = self.embed[input_ids]                                                    # [B, T, d]
        seen = h.cumsum(1) / torch.arange(1, h.shape[1] + 1, dtype=h.dtype)[:, None]
        logits = torch.tanh(h + seen @ self.mix.T) @ self.head.T                     # [B, T, V]
        if labels is None:
            return Output(logits=logits)
        total = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        return Output(loss=total / (num_items_in_batch or (labels[:, 1:] != IGNORE).sum()), logits=logits)


def step_inputs(rng: torch.Generator) -> list[dict]:
    V, d = 17, 6

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def batch(*rows):  # rows: (masked, targets)
        rows = [{"input_ids": (ids := torch.randint(0, V, (m + t,), generator=rng).tolist()),
                 "labels": [IGNORE] * m + ids[m:]} for m, t in rows]
        return collate_reference(rows, 2)

    def case(optimizer, lr, clip, steps):
        weights = {"embed": normal(V, d), "mix": normal(d, d), "head": normal(V, d)}
        return {"weights": weights, "optimizer": optimizer, "lr": lr, "clip": clip, "steps": steps}

    return [
        case("SGD", 0.5, 0.2, [[batch((2, 9), (3, 8)), batch((4, 1), (2, 2)), batch((3, 3))] for _ in range(3)]),
        case("AdamW", 0.05, 0.1, [[batch((1, 2)), batch((2, 10), (1, 6), (2, 7))] for _ in range(3)]),
        case("SGD", 0.3, 1e3, [[batch((2, 4), (2, 7))], [batch((1, 5)), batch((1, 1))]]),   # a clip that never bites
    ]


def step_probe(training_step, case: dict) -> dict:
    model = ToyLM(case["weights"])
    model.train()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = (torch.optim.SGD(params, lr=case["lr"], momentum=0.5) if case["optimizer"] == "SGD"
                 else torch.optim.AdamW(params, lr=case["lr"], weight_decay=0.1))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 / (1 + s))
    seen = {}
    for i, micro_batches in enumerate(case["steps"], start=1):
        copies = [{k: v.clone() for k, v in b.items()} for b in micro_batches]
        loss = training_step(model, copies, optimizer, scheduler, case["clip"])
        loss = float(loss) if isinstance(loss, torch.Tensor) and loss.numel() == 1 else loss
        seen |= {f"loss of step {i}": loss,
                 f"learning rate after step {i}": float(optimizer.param_groups[0]["lr"]),
                 f"frozen base weight after step {i}": model.embed.detach().clone(),
                 f"head after step {i}": model.head.detach().clone(),
                 f"mix after step {i}": model.mix.detach().clone()}
    return seen


def step_maker(*, divide="tokens", zero="end", clip="once", step="once", schedule="after", targets="shifted",
               loss="total"):
    """training_step with one thing done otherwise: the reference and its mistakes differ in exactly one word."""
    def training_step(model, micro_batches, optimizer, scheduler, clip_norm):
        total_targets = sum(int((b["labels"][:, 1:] != IGNORE).sum()) for b in micro_batches)
        reported = 0.0
        for b in micro_batches:
            logits = model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits
            labels = {"shifted": b["labels"][:, 1:], "unshifted": b["labels"], "twice": b["labels"][:, 2:]}[targets]
            out = F.cross_entropy(logits[:, :labels.shape[1]].flatten(0, 1), labels.flatten(), reduction="sum")
            here = max(1, int((labels != IGNORE).sum()))
            read = sum(int(m["attention_mask"].sum()) for m in micro_batches)
            out = out / {"tokens": total_targets, "all tokens": read, "means": here * len(micro_batches),
                         "sum of means": here, "nothing": 1}[divide]
            if zero == "each":
                optimizer.zero_grad()
            out.backward()
            if clip == "each":
                nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            if step == "each":
                optimizer.step()
                optimizer.zero_grad()
            if schedule == "each":
                scheduler.step()
            reported = out.item() if loss == "last" else reported + out.item()
        if clip == "once":
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        if clip == "value":
            nn.utils.clip_grad_value_(model.parameters(), clip_norm)
        if schedule == "before":
            scheduler.step()
        if step == "once":
            optimizer.step()
        if schedule == "after":
            scheduler.step()
        if zero == "end":
            optimizer.zero_grad()
        return reported
    return training_step


def step_by_all_tokens(model, micro_batches, optimizer, scheduler, clip):
    counts = [b["attention_mask"].sum() for b in micro_batches]
    losses = [model(**b).loss * n / sum(counts) for b, n in zip(micro_batches, counts)]
    sum(losses).backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return sum(losses).item()


def step_with_loss_of_the_model(model, micro_batches, optimizer, scheduler, clip):
    """The mean that the model returns, times its targets: the sum again."""
    optimizer.zero_grad()
    counts = [(b["labels"] != IGNORE).sum() for b in micro_batches]
    losses = []
    for b, n in zip(micro_batches, counts):
        loss = model(**b).loss * n / sum(counts)
        loss.backward()
        losses.append(loss.detach())
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
    optimizer.step()
    scheduler.step()
    return torch.stack(losses).sum()


def step_with_num_items(model, micro_batches, optimizer, scheduler, clip):
    """What transformers' Trainer does: it hands the number of targets of the whole step to the model."""
    n = sum((b["labels"][:, 1:] != IGNORE).sum() for b in micro_batches)
    total = 0.0
    for b in micro_batches:
        loss = model(**b, num_items_in_batch=n).loss
        loss.backward()
        total += loss.item()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    scheduler.step()
    return total


def step_divide_gradients(model, micro_batches, optimizer, scheduler, clip):
    """Sum everything, divide the gradients at the end, clip by hand."""
    n = total = 0
    for b in micro_batches:
        logits = model(b["input_ids"], b["attention_mask"]).logits[:, :-1]
        loss = F.cross_entropy(logits.transpose(1, 2), b["labels"][:, 1:], reduction="sum")
        loss.backward()
        n, total = n + int((b["labels"][:, 1:] != IGNORE).sum()), total + loss.item()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    for g in grads:
        g /= n
    norm = torch.sqrt(sum((g ** 2).sum() for g in grads))
    for g in grads:
        g *= min(1.0, clip / (norm.item() + 1e-6))
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return total / n


STEP = Exercise(
    name="training-step", chapter=CHAPTER, title="One optimizer step, from several micro-batches",
    points=4, minutes=15, difficulty=3,
    inputs=step_inputs, probe=step_probe, reference=step_maker(),
    mistakes={
        "mean of means": (
            step_maker(divide="means"),
            "Each micro-batch's mean loss is divided by the number of micro-batches. A token of a short micro-batch "
            "then weighs more than a token of a long one. Divide the *sum* over tokens by the number of targets of "
            "the whole step."),
        "not divided": (
            step_maker(divide="sum of means"),
            "The mean losses are added and not divided: with more micro-batches the gradient grows. Divide by the "
            "number of targets of the whole step."),
        "sum over tokens": (
            step_maker(divide="nothing"),
            "The loss is a sum over tokens that nobody divides: loss and gradient grow with the length of the "
            "answers. Divide by the number of targets of the whole step."),
        "weighted by all tokens": (
            step_by_all_tokens,
            "The micro-batches are weighted by their number of tokens, the prompts included (the attention mask "
            "counts what is read). What is averaged are *targets*: count labels that are not -100."),
        "divided by all tokens": (
            step_maker(divide="all tokens"),
            "The sum is divided by the number of tokens that were read, the prompts included. Divide by the number "
            "of *targets*: labels that are not -100."),
        "gradients not zeroed": (
            step_maker(zero="never"),
            "The first step is right, the next is not: gradients of earlier steps are still there, and `backward` "
            "adds to them. Call optimizer.zero_grad() once per step."),
        "zeroed for each micro-batch": (
            step_maker(zero="each"),
            "zero_grad is called for each micro-batch, so only the last one's gradient is left when the optimizer "
            "steps. Zero once per step, not inside the loop."),
        "step for each micro-batch": (
            step_maker(step="each", clip="each"),
            "The optimizer steps after each micro-batch: that is several small batches, not one large. Accumulate "
            "with `backward` in the loop, and step once after it."),
        "clipped in the loop": (
            step_maker(clip="each"),
            "The gradient is clipped inside the loop, while it is still half accumulated. Clipping is for the whole "
            "step's gradient: once, after the loop and before optimizer.step()."),
        "not clipped in time": (
            step_maker(clip="never"),
            "The optimizer gets the gradient unclipped. Call torch.nn.utils.clip_grad_norm_(model.parameters(), "
            "clip) after the loop and *before* optimizer.step(); after it, the gradient has been used already."),
        "clipped by value": (
            step_maker(clip="value"),
            "The gradient is clipped element by element (clip_grad_value_), which changes its direction. Clip by the "
            "norm of all gradients together: clip_grad_norm_."),
        "scheduler forgotten": (
            step_maker(schedule="never"),
            "The learning rate never changes: scheduler.step() is missing."),
        "scheduler first": (
            step_maker(schedule="before"),
            "The scheduler steps before the optimizer, so the first learning rate is skipped. optimizer.step() "
            "first, then scheduler.step()."),
        "scheduler in the loop": (
            step_maker(schedule="each"),
            "The scheduler steps for each micro-batch, so the learning rate decays too fast. Once per optimizer step."),
        "labels not shifted": (
            step_maker(targets="unshifted"),
            "Logits at t are compared with the token at t, which the model has just read: it learns to copy. Compare "
            "logits[:, :-1] with labels[:, 1:] (or let the model do it: model(**batch).loss)."),
        "labels shifted twice": (
            step_maker(targets="twice"),
            "The labels are shifted by two: the model is asked for the token after the next. If you pass labels to "
            "the model, it shifts them itself; if you compute the loss from logits, shift once."),
        "last loss returned": (
            step_maker(loss="last"),
            "The parameters are right, and the loss you return is that of the last micro-batch. Return the loss of "
            "the whole step: the sum over micro-batches of what you called backward on."),
    },
    alternatives={"the model's own loss times its targets": step_with_loss_of_the_model,
                  "num_items_in_batch, as Trainer": step_with_num_items,
                  "divide the gradients": step_divide_gradients,
                  "zero first": lambda model, *rest: (rest[1].zero_grad(), step_maker(zero="never")(model, *rest))[1]},
    rtol=1e-6, atol=1e-9,
    hides=("pefttools.lab", "transformers"),
)


# --- save-and-reload: PEFT's files ------------------------------------------------------------------------------------

class ToyLoRA(nn.Module):
    """A wrapped Linear with PEFT's state-dict keys: base_layer.weight, lora_A.default.weight, lora_B.default.weight."""

    def __init__(self, base: nn.Linear, r: int):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, r, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(r, base.out_features, bias=False)})


def toy_model(case: dict, key: str) -> nn.Module:
    """Two layers with LoRA on q and v, and a frozen layer whose name contains the letters l, o, r, a."""
    generator = torch.Generator().manual_seed(case[key])
    d, d_kv, r = case["d"], case["d_kv"], case["r"]
    model = nn.Module()
    model.model = nn.Module()
    model.model.embed_tokens = nn.Embedding(11, d)
    model.model.layers = nn.ModuleList()
    for _ in range(2):
        layer = nn.Module()
        layer.self_attn = nn.Module()
        layer.self_attn.q_proj = ToyLoRA(nn.Linear(d, d, bias=False), r)
        layer.self_attn.k_proj = nn.Linear(d, d_kv, bias=False)
        layer.self_attn.v_proj = ToyLoRA(nn.Linear(d, d_kv, bias=False), r)
        layer.exploration = nn.Linear(d, 1)
        model.model.layers.append(layer)
    model.requires_grad_(False)
    for name, p in model.named_parameters():
        p.data = torch.randn(p.shape, generator=generator)
        p.requires_grad = is_adapter(name)
    return model


def is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def in_file(name: str) -> str:
    """A parameter's name in PEFT's file: a prefix in front, the adapter's own name left out."""
    return "base_model.model." + name.replace(".default", "")


def peft_keys(model) -> dict[str, torch.Tensor]:
    return {in_file(name): p.detach().clone() for name, p in model.named_parameters() if is_adapter(name)}


PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")


def save_inputs(rng: torch.Generator) -> list[dict]:
    def draw(low):
        return int(torch.randint(low, low + 1000, (1,), generator=rng))

    return [{"seed": draw(0), "other": draw(1000), "d": d, "d_kv": d_kv, "r": r, "alpha": alpha,
             "target_modules": ["q_proj", "v_proj"]}
            for d, d_kv, r, alpha in ((6, 4, 2, 16), (8, 8, 3, 32))]


def save_probe(work, case: dict) -> dict:
    from safetensors.torch import load_file, save_file

    save_adapter, load_adapter = pair(work, "(save_adapter, load_adapter)")
    model, out = toy_model(case, "seed"), {}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "runs" / "first"      # does not exist yet, as in real life
        save_adapter(model, str(folder), case["r"], case["alpha"], list(case["target_modules"]))
        files = sorted(f.name for f in folder.iterdir()) if folder.exists() else []
        out["files in the folder"] = {name: True for name in PEFT_FILES if name in files}
        config = json.loads((folder / "adapter_config.json").read_text()) if "adapter_config.json" in files else {}
        for field in ("peft_type", "r", "lora_alpha"):
            out[f"adapter_config.json: {field}"] = config.get(field)
        out["adapter_config.json: target_modules"] = sorted(config.get("target_modules") or [])
        saved = load_file(folder / "adapter_model.safetensors") if "adapter_model.safetensors" in files else {}
        out["names of the saved tensors"] = sorted(saved)
        out["saved tensors, in the order of their names"] = [saved[name] for name in sorted(saved)]

        # Loading is judged on files that the student did not write, into a model with another base and other adapters.
        given = Path(root) / "given"
        given.mkdir()
        save_file(peft_keys(model), given / "adapter_model.safetensors")
        (given / "adapter_config.json").write_text(json.dumps(
            {"peft_type": "LORA", "r": case["r"], "lora_alpha": case["alpha"],
             "target_modules": case["target_modules"]}))
        other = toy_model(case, "other")
        base_before = {n: p.detach().clone() for n, p in other.named_parameters() if not p.requires_grad}
        adapters = [p for p in other.parameters() if p.requires_grad]
        load_adapter(other, str(given))
        out["adapter after loading"] = {n: t for n, t in peft_keys(other).items()}
        now = dict(other.named_parameters())
        out["base weights unchanged by loading"] = all(torch.equal(now[n], p) for n, p in base_before.items())
        out["loaded into the same Parameter objects"] = all(any(p is q for q in now.values()) for p in adapters)
    return out


def adapter_tensors(model, keep=is_adapter, key=in_file):
    return {key(n): p.detach().contiguous().clone() for n, p in model.state_dict().items() if keep(n)}


def save_maker(tensors=adapter_tensors, alpha_name="lora_alpha", peft_type="LORA", config=True, pickled=False):
    """save_adapter with one thing done otherwise."""
    def save_adapter(model, folder, r, alpha, target_modules):
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if config:
            content = {"peft_type": peft_type, "task_type": "CAUSAL_LM", "r": r, alpha_name: alpha,
                       "target_modules": target_modules}
            (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
        if pickled:
            torch.save(tensors(model), folder / "adapter_model.bin")
        else:
            save_file(tensors(model), folder / "adapter_model.safetensors")
    return save_adapter


def load_reference(model, folder):
    from safetensors.torch import load_file

    saved = load_file(Path(folder) / "adapter_model.safetensors")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if is_adapter(name):
                p.copy_(saved[in_file(name)])


def load_strict_false(model, folder):
    from safetensors.torch import load_file

    model.load_state_dict(load_file(Path(folder) / "adapter_model.safetensors"), strict=False)


def load_new_parameters(model, folder):
    from safetensors.torch import load_file

    for name, value in load_file(Path(folder) / "adapter_model.safetensors").items():
        path = re.sub(r"(lora_[AB])\.", r"\1.default.", name.removeprefix("base_model.model."))
        module, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(value))


def load_half(model, folder):
    from safetensors.torch import load_file

    saved = load_file(Path(folder) / "adapter_model.safetensors")
    model.load_state_dict({n.removeprefix("base_model.model.").replace(".weight", ".default.weight"): t
                           for n, t in saved.items() if "lora_B" in n}, strict=False)


def load_by_renaming(model, folder):
    from safetensors.torch import load_file

    saved = {re.sub(r"(lora_[AB])\.weight$", r"\1.default.weight", n.removeprefix("base_model.model.")): t
             for n, t in load_file(Path(folder) / "adapter_model.safetensors").items()}
    report = model.load_state_dict(saved, strict=False)
    if report.unexpected_keys:
        raise KeyError(report.unexpected_keys)


def save_by_requires_grad(model, folder, r, alpha, target_modules):
    from safetensors.torch import save_file

    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / "adapter_config.json", "w") as f:
        json.dump({"target_modules": target_modules, "lora_alpha": alpha, "r": r, "peft_type": "LORA"}, f)
    tensors = {f"base_model.model.{n}".replace(".default.", "."): p.data
               for n, p in model.named_parameters() if p.requires_grad}
    save_file(tensors, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})


def save_by_modules(model, folder, r, alpha, target_modules):
    from safetensors.torch import save

    tensors = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "lora_B"):
            tensors[f"base_model.model.{name}.lora_A.weight"] = module.lora_A["default"].weight.detach()
            tensors[f"base_model.model.{name}.lora_B.weight"] = module.lora_B["default"].weight.detach()
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "adapter_model.safetensors").write_bytes(save(tensors))
    Path(folder, "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "target_modules": target_modules}))


def product_tensors(model):
    return {f"base_model.model.{n}.weight": (m.lora_B["default"].weight @ m.lora_A["default"].weight).detach()
            for n, m in model.named_modules() if hasattr(m, "lora_A")}


def wrong_save(message, **kwargs):
    return (save_maker(**kwargs), load_reference), message


def wrong_tensors(message, **kwargs):
    return wrong_save(message, tensors=lambda model: adapter_tensors(model, **kwargs))


SAVE = Exercise(
    name="save-and-reload", chapter=CHAPTER, title="PEFT's two files", points=3, minutes=15, difficulty=2,
    inputs=save_inputs, probe=save_probe, reference=(save_maker(), load_reference), accepts="value",
    mistakes={
        "full model saved": wrong_tensors(
            "Every tensor of the model is in the file, base weights included. Save lora_A and lora_B only: at "
            "Llama-3.2-1B's size that is megabytes instead of gigabytes, and nobody's base model gets overwritten by "
            "loading.",
            keep=lambda n: True),
        "base weights of the wrapped layers saved": wrong_tensors(
            "The frozen base_layer weights of the wrapped layers are in the file. They belong to the base model; an "
            "adapter is lora_A and lora_B only.", keep=lambda n: "_proj" in n and "k_proj" not in n),
        "anything with 'lora' in its name": wrong_tensors(
            "A layer called `exploration` was saved too: exp-LORA-tion. Look for the name parts `.lora_A.` and "
            "`.lora_B.` (or for what trains), not for four letters anywhere.", keep=lambda n: "lora" in n),
        "adapter name in the keys": wrong_tensors(
            "The keys still hold the adapter's name, `.default`. PEFT leaves it out of the file (and puts in "
            "whatever name you load it under): lora_A.weight, not lora_A.default.weight.",
            key=lambda n: "base_model.model." + n),
        "prefix missing": wrong_tensors(
            "The keys lack the prefix `base_model.model.`, so PEFT finds none of them. It warns, and goes on with "
            "the adapter's fresh weights: a fine-tune that does nothing.", key=lambda n: n.replace(".default", "")),
        "keys as they stand in the model": wrong_tensors(
            "The keys are the model's own. In PEFT's file each begins with `base_model.model.` and the adapter's "
            "name, `.default`, is left out.", key=lambda n: n),
        "only A": wrong_tensors(
            "lora_B is missing from the file. Without B, which starts at zero, the loaded adapter changes nothing.",
            keep=lambda n: ".lora_A." in n),
        "the product B·A saved": wrong_save(
            "The product B·A was saved in place of its factors. That is as large as the base weight, and PEFT's file "
            "wants lora_A and lora_B.", tensors=product_tensors),
        "rounded to half precision": wrong_save(
            "The tensors were rounded to 16 bits on the way into the file. Save them as they are; what is loaded "
            "should be what was trained.",
            tensors=lambda model: {n: t.half() for n, t in adapter_tensors(model).items()}),
        "pickle": wrong_save(
            "The weights were written with torch.save. PEFT looks for adapter_model.safetensors first, and a pickle "
            "can run code when opened: use safetensors.torch.save_file.", pickled=True),
        "no adapter_config.json": wrong_save(
            "adapter_config.json is missing: without it nobody knows r, alpha and where the adapter goes.",
            config=False),
        "alpha under another name": wrong_save(
            "The configuration says `alpha`; PEFT's field is `lora_alpha`. Newer versions ignore an unknown field "
            "with a warning and take the default of 8, so the adapter loads with a wrong scale.", alpha_name="alpha"),
        "no peft_type": wrong_save(
            "The configuration lacks `peft_type` (\"LORA\"): PEFT cannot tell which of its methods this adapter is of.",
            peft_type=None),
        "strict=False": (
            (save_maker(), load_strict_false),
            "Nothing was loaded. The names in the file are not the model's, and strict=False keeps quiet about it. "
            "Turn the file's names into the model's (take the prefix off, put `.default` in) and look at what "
            "load_state_dict returns."),
        "only B loaded": (
            (save_maker(), load_half),
            "lora_B was loaded and lora_A was not: B belongs to the A that it was trained with."),
        "new Parameter objects": (
            (save_maker(), load_new_parameters),
            "The values are right, and the parameters are new objects: an optimizer made before loading goes on "
            "training the old ones. Copy into the existing parameters (copy_ under no_grad, or load_state_dict)."),
    },
    alternatives={"what trains; rename by regular expression": (save_by_requires_grad, load_by_renaming),
                  "module by module": (save_by_modules, load_reference)},
    hides=("pefttools.checkpoint", "pefttools.inject", "pefttools.lora", "peft"),
)


# --- questions --------------------------------------------------------------------------------------------------------

QUESTIONS: list[Question] = [
    Question(
        name="finetune-q-eos", chapter=CHAPTER, points=1,
        text="A tokenizer has no pad token, so somebody sets `pad_token = eos_token`. The collator sets the label of "
             "every token **equal to the pad id** to -100. Training looks fine. What happens at generation?",
        right="c",
        options={
            "a": ("Nothing: padding must not be a target, and it is not.",
                  "Padding is taken care of. But the true end of each answer has the same id, and its label became "
                  "-100 as well."),
            "b": ("The model stops at once, because it has seen so many end-of-text tokens.",
                  "It has *read* many of them, but none was ever a target, so nothing made it likelier. (If they "
                  "were all targets, the padding included, the loss would mostly be about writing end-of-text after "
                  "end-of-text.)"),
            "c": ("The model writes good answers and goes on writing after them until the token limit.",
                  "Yes: the token that ends an answer was never a target, so the model was never taught when to say "
                  "it."),
            "d": ("Generation fails, since pad and eos must differ.",
                  "They may be the same id, if padding is decided by position. `generate` itself only prints a "
                  "notice about it."),
        }),
    Question(
        name="finetune-q-shift", chapter=CHAPTER, points=1,
        text="For `LlamaForCausalLM(input_ids=ids, labels=labels)`, what is `labels` at a target position t?",
        right="b",
        options={
            "a": ("The id at t + 1, because the model predicts the next token.",
                  "The model does predict the next token, and shifts the labels itself to compare. If you shift as "
                  "well, it learns to predict the token after the next."),
            "b": ("The id at t. The model compares its prediction made at t − 1 with it.",
                  "Yes. Labels run parallel to the ids; the shift is inside the model's loss function."),
            "c": ("The id at t − 1, since the model has seen that one.",
                  "That would train the model to repeat what it has just read."),
            "d": ("1 for a target and 0 for a masked token.",
                  "A label is the id of the right token; masked places hold -100. (The attention mask is the one "
                  "with 1 and 0.)"),
        }),
    Question(
        name="finetune-q-accumulate", chapter=CHAPTER, points=1,
        text="One optimizer step has two micro-batches: the first holds 10 target tokens with a mean loss of 3.0, "
             "the second 90 with a mean loss of 1.0. Which loss would one large batch of all these rows have?",
        right="a",
        options={
            "a": ("1.2",
                  "Yes: (10 · 3.0 + 90 · 1.0) / 100. Every token weighs the same, wherever the cut between "
                  "micro-batches falls."),
            "b": ("2.0",
                  "That is the mean of the two means. It makes a token of the small micro-batch weigh nine times as "
                  "much as one of the large; the `Trainer` of `transformers` did this until the end of 2024 (its "
                  "pull requests 34191 and 35438)."),
            "c": ("4.0",
                  "That is the sum of the means: the loss would grow with the number of micro-batches, and the "
                  "learning rate with it."),
            "d": ("1.0", "That is the last micro-batch's loss, the one that is left in the variable after the loop."),
        }),
    Question(
        name="finetune-q-checkpointing", chapter=CHAPTER, points=1,
        text="You switch gradient checkpointing on. What changes?",
        right="d",
        options={
            "a": ("The gradients become a little less exact, in exchange for memory.",
                  "They are the same numbers: the same operations run twice. Nothing is approximated."),
            "b": ("A file with the model's state is written every few steps.",
                  "That is the other meaning of the word: a training checkpoint. Gradient checkpointing writes "
                  "nothing to disk."),
            "c": ("The frozen base weights need less memory.",
                  "Weights stay as they are. Quantization shrinks weights; checkpointing is about what the forward "
                  "pass leaves behind for the backward pass."),
            "d": ("Only each layer's input is kept, the rest is computed again in the backward pass: less memory, "
                  "more time.",
                  "Yes. Activations are traded for about one more forward pass."),
        }),
    Question(
        name="finetune-q-split", chapter=CHAPTER, points=1,
        text="A data set was made from templates: “Write a function that adds {n} to {x}”, 200 rows of each. You "
             "shuffle all rows, keep 10 % as a test set, and reach 97 %. What has been measured?",
        right="c",
        options={
            "a": ("How well the model generalizes: no test row was in the training set.",
                  "No row is the same, but every test row has a sibling in training that differs in a number or a "
                  "name."),
            "b": ("Nothing: 10 % is too little for a test set.",
                  "A few hundred rows make a usable interval. The trouble is which rows they are, not how many."),
            "c": ("How well it does on wordings and tasks it has trained on, with new constants.",
                  "Yes. To learn about new wordings or new kinds of task, whole wordings and whole kinds must be "
                  "held out, as `load_data(\"held_out\")` and `load_data(\"new_kinds\")` are."),
            "d": ("How much the model has forgotten.",
                  "Forgetting is measured on what the *base* model could do, for instance its loss on ordinary "
                  "Python."),
        }),
    Question(
        name="finetune-q-int8", chapter=CHAPTER, points=1,
        text="A base model is loaded with `BitsAndBytesConfig(load_in_8bit=True)` and "
             "`prepare_model_for_kbit_training` is called, then `get_peft_model`. What do the optimizer's steps "
             "change?",
        right="b",
        options={
            "a": ("The int8 weights, rounded to the nearest level after each step.",
                  "An int8 tensor takes no gradient, and steps smaller than a level would be lost. The base stays as "
                  "it is."),
            "b": ("A and B of the adapters, in float32, and nothing else.",
                  "Yes. The base only takes part in the forward and the backward pass; norms and embeddings were "
                  "cast to float32 but are frozen as well."),
            "c": ("A, B and the layer norms: that is why the norms are cast to float32.",
                  "The norms are cast so that their *arithmetic* is exact enough. The same function sets "
                  "requires_grad = False on them."),
            "d": ("The head, since “making the output embedding layer require grads” is in the function's docstring.",
                  "The docstring says so; the code registers a hook that makes the *output of the input embedding* "
                  "require a gradient, which checkpointing needs. The head's weight is frozen."),
        }),
]

EXERCISES: list[Exercise] = [FORMAT, MASK, COLLATE, STEP, SAVE]
