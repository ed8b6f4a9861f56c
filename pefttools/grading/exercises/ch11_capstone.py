"""Chapter 11, the capstone: six exercises and five questions.

Four functions are judged by values on drawn cases. `run-it` is an artefact: the files of an adapter, loaded onto the
bundled model where no student's code is, and its loss taken on rows that are generated at grading time, so that nobody
can have trained on them. Why the bundled model's adapter: it is the one that every student can train, with a GPU and
without, and the one whose quality the grader can measure (it has no GPU and no licence for Llama). An adapter of
Llama-3.2-1B may lie beside it; of that one the structure is checked, for random numbers of the right shapes could not
be told from a fine-tune without running the model, and so it earns no points of its own. Files do not say who trained
them; `report-it` and the outputs of the notebook are for that.

`report-it` checks that what a report says agrees with the table in it. Whether it is a good one, somebody reads.
Imports torch and the standard library only; the library is imported when something is judged.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from pefttools.grading.exercise import Exercise
from pefttools.grading.question import Question

CHAPTER = "11_capstone"
TITLE = "Llama-3.2-1B on a T4"
HIDES = ("pefttools.lab.capstone_plan",)
FOLDERS = "pefttools.grading.exercises.capstone_folders"


def whole(rng: torch.Generator, low: int, high: int) -> int:
    """A whole number from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=rng))


def shuffled(rng: torch.Generator, items: list) -> list:
    return [items[i] for i in torch.randperm(len(items), generator=rng).tolist()]


def numbers(value: Any) -> Any:
    """Whole numbers as such whatever their kind (NumPy's, a tensor's), in lists and dicts too; all else as it is."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if hasattr(value, "item") and not isinstance(value, torch.Tensor):
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {str(key): numbers(each) for key, each in value.items()}
    return [numbers(each) for each in value] if isinstance(value, (list, tuple)) else value


# ================================================================================================ pick-precision

CARDS = {  # name: (compute capability, what torch.cuda.is_bf16_supported() says)
    "T4": ((7, 5), True), "V100": ((7, 0), True), "P100": ((6, 0), False), "A100": ((8, 0), True), "L4": ((8, 9), True),
    "H100": ((9, 0), True), "B200": ((10, 0), True), "RTX 5090": ((12, 0), True),
}


def precision_inputs(rng: torch.Generator) -> list[dict]:
    drawn = shuffled(rng, list(CARDS))
    cases = [{"gpu": name, "capability": list(CARDS[name][0]), "claims": CARDS[name][1]} for name in drawn]
    none = {"gpu": "", "capability": [0, 0], "claims": False}
    at = whole(rng, 0, len(cases))
    return [*cases[:at], none, *cases[at:]]


def precision_probe(work: Callable, case: dict) -> dict[str, Any]:
    got = work(case["gpu"], tuple(case["capability"]), case["claims"])
    return {"dtype": str(got).removeprefix("torch.") if isinstance(got, (str, torch.dtype)) else got}


def precision_reference(gpu, capability, claims_bf16):
    if not gpu:
        return "float32"
    return "bfloat16" if capability >= (8, 0) else "float16"


def precision_with(rule: Callable) -> Callable:
    """On a GPU bfloat16 where rule(capability, claims) is true, else float16; float32 without a GPU."""
    def work(gpu, capability, claims_bf16):
        return ("bfloat16" if rule(capability, claims_bf16) else "float16") if gpu else "float32"
    return work


def precision_by_table(gpu, capability, claims_bf16):
    if gpu == "" or gpu is None:
        return torch.float32
    return {True: torch.bfloat16, False: torch.float16}[capability[0] > 7]


def precision_by_number(gpu, capability, claims_bf16):
    version = 10 * capability[0] + capability[1]
    return "float32" if version == 0 else ("float16", "bfloat16")[version >= 80]


PICK_PRECISION = Exercise(
    name="pick-precision", chapter=CHAPTER, title="Which numbers does this card compute in?", points=1, minutes=4,
    difficulty=1, inputs=precision_inputs, probe=precision_probe, reference=precision_reference,
    mistakes={
        "trusts the claim": (precision_with(lambda capability, claims: claims),
            "You trust `claims_bf16`. On a T4 torch says that bfloat16 is supported, because it can *emulate* it, many "
            "times more slowly. The tensor cores know it from compute capability 8.0 on."),
        "always float16": (precision_with(lambda capability, claims: False),
            "float16 on every GPU. From compute capability 8.0 there is bfloat16, with float32's range: then no loss "
            "has to be scaled so that small gradients do not vanish."),
        "always bfloat16": (precision_with(lambda capability, claims: True),
            "bfloat16 on every GPU. A T4 (7.5) and all cards before 8.0 compute it by emulation only."),
        "float32 on old cards": (
            lambda gpu, capability, claims: "bfloat16" if gpu and capability >= (8, 0) else "float32",
            "float32 on a card below 8.0: correct, twice the memory, and without tensor cores. Those of a T4 compute "
            "in float16."),
        "float16 on a CPU": (lambda gpu, capability, claims: "bfloat16" if capability >= (8, 0) else "float16",
            "Without a GPU you take float16. A CPU computes it slowly or not at all, and the bundled model is small: "
            "float32."),
        "8.0 left out": (precision_with(lambda capability, claims: capability > (8, 0)),
            "8.0 itself, an A100, has bfloat16: the comparison is ≥."),
        "only the eights": (precision_with(lambda capability, claims: capability[0] == 8),
            "You ask for capability 8.x. Later cards (9.0, 10.0, 12.0) have bfloat16, too."),
        "compared as text": (precision_with(lambda capability, claims: f"{capability[0]}.{capability[1]}" >= "8.0"),
            "You compare texts: \"10.0\" comes before \"8.0\" there. Tuples compare as they should: (10, 0) ≥ (8, 0)."),
    },
    alternatives={"as torch dtypes": precision_by_table, "by one number": precision_by_number},
    accepts="function", hides=("pefttools.lab.colab", *HIDES))


# ================================================================================================ keep-rows

NAMES = ("total", "count", "merge", "clean", "parse", "split", "rank", "load", "trim", "pick", "join", "scale")


def keep_inputs(rng: torch.Generator) -> list[dict]:
    return [_rows_case(rng, whole(rng, 9, 14)), _rows_case(rng, whole(rng, 12, 20)), {"rows": [], "max_chars": 80}]


def _rows_case(rng: torch.Generator, count: int) -> dict:
    """Good rows, and one or two of each kind that has to go, at drawn places; some good ones look bad at a glance."""
    rows = [_row(rng) for _ in range(count)]
    limit = max(len(r["instruction"]) + len(r["input"]) + len(r["output"]) for r in rows)      # the longest just fits
    first = rows[0]
    bad = [{**first}, {**rows[1]},                                                             # twice the same
           {**_row(rng), "output": _fenced("def f(:\n    return 1")},                          # no Python
           {**_row(rng), "output": _fenced("print('press 'q' to stop')")},                     # as in the real set
           {**_row(rng), "output": _fenced("x = 1\n" * (limit // 5))},                         # too long
           {**_row(rng), "instruction": "Write a function, please. " * (limit // 10)}]         # so is this
    good = [{**first, "output": _fenced(f"answer = {whole(rng, 100, 999)}")},             # same question, other answer
            {**_row(rng), "output": first["output"]},                                     # other question, same answer
            {**first, "input": f"With {whole(rng, 10, 99)}."},                            # other input, same both
            {**_row(rng), "output": _fenced(f"run(job_{whole(rng, 10, 99)})")},           # Python, and cannot be run
            {**_row(rng), "output": _fenced(f"n = {whole(rng, 1, 9)}") + "\n" + _fenced(">>> n")},     # two fences
            {**_row(rng), "output": f"value = {whole(rng, 10, 99)}"},                     # no fence: all of it is code
            {**_row(rng), "output": _fenced(f"n = {whole(rng, 1, 9)}") + "\n\nThis sets n to a number."}]
    later = shuffled(rng, [*rows[2:], *bad, *good])
    longest = max(len(r["instruction"]) + len(r["input"]) + len(r["output"]) for r in [*rows, *good])
    return {"rows": [first, rows[1], *later], "max_chars": longest}


def _row(rng: torch.Generator) -> dict[str, str]:
    name, n = NAMES[whole(rng, 0, len(NAMES) - 1)], whole(rng, 10, 99_999)
    given = f"For example {n}." if whole(rng, 0, 1) else ""
    return {"instruction": f"Write a function {name}_{n}.", "input": given,
            "output": _fenced(f"def {name}_{n}(x):\n    return x + {n}")}


def _fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def keep_probe(work: Callable, case: dict) -> dict[str, Any]:
    got = work([dict(row) for row in case["rows"]], case["max_chars"])
    return {"numbers of the rows that stay": numbers(list(got)) if isinstance(got, (list, tuple, range)) else got}


def program_of(output: str) -> str:
    if "```python" not in output:
        return output
    return output.split("```python", 1)[1].split("```", 1)[0]


def parses(code: str) -> bool:
    import ast

    try:
        ast.parse(code)
    except (SyntaxError, ValueError):
        return False
    return True


def keep_with(program: Callable = program_of, key: Callable | None = None, size: Callable | None = None,
              fits: Callable = lambda n, most: n <= most, good: Callable = parses, last: bool = False) -> Callable:
    """The reference with one part changed."""
    key = key or (lambda row: (row["instruction"], row["input"], row["output"]))
    size = size or (lambda row: len(row["instruction"]) + len(row["input"]) + len(row["output"]))

    def work(rows, max_chars):
        kept: dict[Any, int] = {}
        for number, row in enumerate(rows):
            if fits(size(row), max_chars) and good(program(row["output"])):
                if last:
                    kept.pop(key(row), None)
                kept.setdefault(key(row), number)
        return list(kept.values())
    return work


def runs(code: str) -> bool:
    try:
        exec(code, {})
    except Exception:
        return False
    return True


def keep_until_bad(rows, max_chars):
    """Stops where it should go on."""
    found = keep_with()(rows, max_chars)
    for number, row in enumerate(rows):
        if not parses(program_of(row["output"])):
            return [n for n in found if n < number]
    return found


def keep_by_regex(rows, max_chars):
    import re

    seen, found = set(), []
    for number, row in enumerate(rows):
        text = "\n".join((row["instruction"], row["input"], row["output"]))
        fence = re.search(r"```python\n(.*?)```", row["output"], re.S)
        try:
            compile(fence[1] if fence else row["output"], "<row>", "exec")
        except (SyntaxError, ValueError):
            continue
        if len(text) - 2 <= max_chars and text not in seen:
            seen.add(text)
            found.append(number)
    return found


def keep_in_passes(rows, max_chars):
    def whole_text(row):
        return row["instruction"], row["input"], row["output"]

    short = [n for n, row in enumerate(rows) if sum(map(len, whole_text(row))) <= max_chars]
    python = [n for n in short if parses(program_of(rows[n]["output"]))]
    return [n for at, n in enumerate(python) if whole_text(rows[n]) not in [whole_text(rows[m]) for m in python[:at]]]


keep_reference = keep_with()

KEEP_ROWS = Exercise(
    name="keep-rows", chapter=CHAPTER, title="Rows worth training on", points=3, minutes=12, difficulty=2,
    inputs=keep_inputs, probe=keep_probe, reference=keep_reference,
    mistakes={
        "all of them": (lambda rows, max_chars: list(range(len(rows))), "You keep every row, whatever is in it."),
        "the fence as code": (keep_with(program=lambda output: output),
            "You parse the whole answer. The line ```python is no Python, so hardly a row is left: take what stands "
            "between the fences."),
        "no fence, no row": (keep_with(program=lambda output: program_of(output) if "```python" in output else "def"),
            "Answers without a fence fall out. Where there is none, all of the answer is the program."),
        "to the last fence": (keep_with(program=lambda output: output.replace("```python", "").replace("```", "")),
            "You take the fences away and parse all the rest. What stands behind the closing fence is prose, not "
            "Python: stop there."),
        "not parsed": (keep_with(good=lambda code: True),
            "Programs that are no Python stay in. `ast.parse(code)` raises SyntaxError for those; nothing has to be run."),
        "doubles stay": (keep_with(key=lambda row: object()),
            "Rows that occur twice stay twice: the model sees them twice as often. (In the real set, every row does "
            "where both of its files are loaded.)"),
        "by question": (keep_with(key=lambda row: (row["instruction"], row["input"])),
            "You take rows with the same question for equal. Another answer to it is another row."),
        "by answer": (keep_with(key=lambda row: row["output"]),
            "You take rows with the same answer for equal. Another question with that answer is another row."),
        "the last stays": (keep_with(last=True),
            "Of equal rows you keep the last. Keep the first, and return the numbers in rising order."),
        "answer's length": (keep_with(size=lambda row: len(row["output"])),
            "You measure the answer alone. Instruction and input are read, too: all three count."),
        "shorter than": (keep_with(fits=lambda n, most: n < most),
            "A row of exactly max_chars characters fits."),
        "by question and answer": (keep_with(key=lambda row: (row["instruction"], row["output"])),
            "You take rows for equal that differ in their input. All three texts count."),
        "numbers from one": (lambda rows, max_chars: [n + 1 for n in keep_with()(rows, max_chars)],
            "Your numbers begin at 1. A position in a list begins at 0: enumerate(rows)."),
        "the rows themselves": (lambda rows, max_chars: [rows[n] for n in keep_with()(rows, max_chars)],
            "You return the rows. What is asked for are their numbers, the positions in the list."),
        "stops at a bad row": (keep_until_bad,
            "Nothing is kept after the first program that is no Python: you leave the loop there. Go on with the "
            "next row: continue, not break."),
        "runs the program": (keep_with(good=runs),
            "You run the programs. Some are good Python and need something that is not there; and nobody knows what "
            "a stranger's program does. ast.parse reads it without running it."),
        "the last program": (keep_with(program=lambda output: output.split("```python")[-1].split("```")[0]),
            "Where an answer has several fences, you take the last program. It is the first that counts."),
        "no limit": (keep_with(fits=lambda n, most: True),
            "Long rows stay in. The longest row of a batch decides its memory, so one of them may end the run."),
    },
    alternatives={"by regular expression": keep_by_regex, "in three passes": keep_in_passes},
    accepts="function", hides=("pefttools.lab.python_codes", "pefttools.lab.evaluation", *HIDES))


# ================================================================================================ plan-it

METHODS = ("qlora", "lora", "dora", "adapter", "ia3", "prefix", "prompt", "full", "ptuning", "lnorm")
PLAN_MARGIN = 1.05


def plan_inputs(rng: torch.Generator) -> list[dict]:
    return [_plan_case(rng, examples) for examples in (8, 16, 4, 1)]


# share of the room, (with a fixed part of about 0.3): (all rows at once, each row, the same two with checkpointing)
SHARES = {"all": (0.6, None, 0.4, None), "near": (0.97, None, 0.5, None), "close": (0.93, None, 0.5, None),
          "tight": (0.9512, None, 0.5, None), "exact": (20 / 21, None, 0.5, None), "over": (1.03, None, 0.6, None), "one": (None, 0.5, 0.6, None), "checkpointed": (None, 1.2, 0.7, None),
          "one, checkpointed": (None, 1.3, None, 0.5), "never": (None, 3.0, None, 2.0)}


def _plan_case(rng: torch.Generator, examples: int) -> dict:
    """Predictions for every choice, and a room in which every outcome occurs: all at once, just not (by the margin), a
    smaller batch, checkpointing, nothing at all."""
    table, part = [], whole(rng, 550_000_000, 750_000_000)
    while 20 * part * PLAN_MARGIN != 21 * part or 21 * part / PLAN_MARGIN != 20 * part:
        part += 1                                       # or it would depend on how one rounds whether "exact" fits
    room = 21 * part
    names = shuffled(rng, list(METHODS))
    for name, (kind, share) in zip(names, SHARES.items(), strict=True):
        fixed = 0.25 + 0.1 * torch.rand((), generator=rng).item()
        for checkpointing, (whole_share, each) in ((False, share[:2]), (True, share[2:])):
            slope = each if whole_share is None else (whole_share - fixed) / examples
            table += [{"method": name, "batch": batch, "checkpointing": checkpointing,
                       "bytes": 20 * part if (kind, batch, checkpointing) == ("exact", examples, False) else
                       int(room * (fixed + slope * batch))} for batch in powers(examples)]
    return {"methods": shuffled(rng, names), "examples": examples, "room": room, "table": table}


def powers(examples: int) -> list[int]:
    return [2**i for i in range(examples.bit_length()) if 2**i <= examples]


def plan_probe(work: Callable, case: dict) -> dict[str, Any]:
    known = {(row["method"], row["batch"], row["checkpointing"]): row["bytes"] for row in case["table"]}

    def predict(method, batch, checkpointing):
        if (method, batch, bool(checkpointing)) not in known:
            raise ValueError(f"predict: nothing is known of method {method!r}, batch {batch!r}, checkpointing "
                             f"{checkpointing!r}; batches are {sorted({key[1] for key in known})}")
        return known[method, batch, bool(checkpointing)]

    got = work(list(case["methods"]), case["examples"], case["room"], predict)
    if not isinstance(got, dict):
        return {"plan": got}
    found: dict[str, Any] = {"methods": sorted(map(str, got))}
    for name in case["methods"]:
        choice = got.get(name, "nothing is said of it")
        for key in ("batch", "accumulate", "checkpointing", "bytes"):
            found[f"{name}: {key}"] = numbers(choice.get(key, "missing")) if isinstance(choice, dict) else choice
    return found


def plan_with(margin: float = PLAN_MARGIN, order: tuple = (False, True), batches: Callable = lambda n: powers(n)[::-1],
              accumulate: Callable = lambda n, b: n // b, nothing: bool = True, reported: Callable = lambda n: n,
              batch_first: bool = False, exactly: bool = True, turned: bool = False) -> Callable:
    """The reference with one part changed."""
    def work(methods, examples, room, predict):
        found: dict[str, Any] = {}
        for method in methods:
            choices = [(batch, checkpointing) for checkpointing in order for batch in batches(examples)]
            if batch_first:
                choices = [(batch, checkpointing) for batch in batches(examples) for checkpointing in order]
            for batch, checkpointing in choices:
                need = predict(method, batch, checkpointing)
                if need * margin < room or exactly and need * margin == room:
                    batch, steps = (accumulate(examples, batch), batch) if turned else (batch, accumulate(examples, batch))
                    found[method] = {"batch": batch, "accumulate": steps, "checkpointing": checkpointing,
                                     "bytes": reported(need)}
                    break
            else:
                if nothing:
                    found[method] = None
        return found
    return work


plan_reference = plan_with()


def plan_by_halving(methods, examples, room, predict):
    plan = dict.fromkeys(methods)
    for method in methods:
        for checkpointing in (True, False):             # the later choice replaces the earlier one
            batch = examples
            while batch and 105 * predict(method, batch, checkpointing) > 100 * room:
                batch //= 2
            if batch:
                plan[method] = dict(batch=batch, accumulate=examples // batch, checkpointing=checkpointing,
                                    bytes=predict(method, batch, checkpointing))
    return plan


def plan_by_the_best(methods, examples, room, predict):
    def choices(method):
        for checkpointing in (0, 1):
            for power in range(examples.bit_length()):
                if predict(method, 1 << power, checkpointing) * 21 <= room * 20:
                    yield -checkpointing, 1 << power

    def told(method, choice):
        saved, batch = choice
        return {"bytes": predict(method, batch, -saved), "checkpointing": bool(saved), "accumulate": examples // batch,
                "batch": batch}

    return {method: told(method, best) if (best := max(choices(method), default=None)) else None for method in methods}


PLAN_IT = Exercise(
    name="plan-it", chapter=CHAPTER, title="Plan it: what fits, before anything is loaded", points=4, minutes=20,
    difficulty=2, inputs=plan_inputs, probe=plan_probe, reference=plan_reference,
    mistakes={
        "no margin": (plan_with(margin=1.0),
            "The margin is missing: the prediction times 1.05 has to fit. The allocator keeps a little more than what "
            "is in use."),
        "margin on the wrong side": (plan_with(margin=1 / PLAN_MARGIN),
            "The margin makes the need smaller in your plan. It has to make it larger."),
        "95 % of the room": (plan_with(margin=1 / 0.95),
            "You compare with 95 % of the room. That is a margin of 5.3 %: 5 % on top of the prediction were asked "
            "for, and a prediction between the two fits."),
        "less than the room": (plan_with(exactly=False),
            "What takes exactly the room, margin included, fits: at most, and not less than."),
        "batch and accumulate": (plan_with(turned=True),
            "batch and accumulate have changed places: batch is the rows in one pass."),
        "ten percent": (plan_with(margin=1.10), "Your margin is 10 %. 5 % were asked for: the prediction times 1.05."),
        "always checkpointing": (plan_with(order=(True,)),
            "You checkpoint wherever it fits. It costs a forward pass more in every step: first try all batches "
            "without, and take it only where none of them fits."),
        "never checkpointing": (plan_with(order=(False,)),
            "You never try checkpointing. Where no batch fits without it, it may still fit with it."),
        "a larger batch by checkpointing": (plan_with(batch_first=True),
            "You take a larger batch with checkpointing before a smaller one without. Here it is the other way round: "
            "all batches without checkpointing come first."),
        "the smallest batch": (plan_with(batches=powers),
            "You take the smallest batch that fits. Begin with all examples at once, and halve."),
        "all or nothing": (plan_with(batches=lambda n: [n]),
            "You try all examples at once only. Halve the batch until it fits; accumulation makes up for it."),
        "never one row": (plan_with(batches=lambda n: [b for b in powers(n)[::-1] if b > 1 or n == 1]),
            "You stop halving at 2. One row at a time is a batch, too."),
        "accumulates all": (plan_with(accumulate=lambda n, b: n),
            "accumulate is the number of passes in one step: batch · accumulate must be `examples`."),
        "does not accumulate": (plan_with(accumulate=lambda n, b: 1),
            "With accumulate = 1 a smaller batch makes a smaller step. batch · accumulate must be `examples`."),
        "left out": (plan_with(nothing=False),
            "A method that fits nowhere is missing from your plan. Say so: its value is None."),
        "with the margin": (plan_with(reported=lambda n: int(n * PLAN_MARGIN)),
            "`bytes` in your plan has the margin in it. The margin is for the decision; report the prediction itself, "
            "which you will compare with what is measured."),
    },
    alternatives={"by halving": plan_by_halving, "the best of all that fit": plan_by_the_best},
    accepts="function", hides=HIDES)


# ================================================================================================ run-it

ROWS = 16
BOUND = 0.6            # nats; chosen after trials: 60 steps of LoRA reach 0.4 here, the base model has 2.5
FILES = ("adapter_config.json", "adapter_model.safetensors", "llama_1b_config.json", "llama_1b_model.safetensors")
TINY, LARGE = 256, 2048                        # hidden sizes
LARGE_SHAPES = {"q_proj": (2048, 2048), "k_proj": (512, 2048), "v_proj": (512, 2048), "o_proj": (2048, 2048),
                "gate_proj": (8192, 2048), "up_proj": (8192, 2048), "down_proj": (2048, 8192)}  # Llama-3.2-1B: out, in
LARGE_LAYERS = 16


def run_inputs(rng: torch.Generator) -> list[dict]:
    """Rows that did not exist before: the generator of the bundled data, held-out wordings, a seed of this moment."""
    from pefttools.lab.tasks.build import draw_rows, kinds_of

    kinds = shuffled(rng, kinds_of("held_out"))[:ROWS]
    rows = [draw_rows(kind, "held_out", 1, whole(rng, 0, 2**31 - 1))[0][1] for kind in kinds]
    return [{"rows": [{key: row[key] for key in ("instruction", "input", "output")} for row in rows]}]


def run_probe(folder: Any, case: dict) -> dict[str, Any]:
    """What lies in the files, and the loss of the bundled model with them on the case's rows."""
    from pathlib import Path

    if not Path(folder).is_dir():
        raise FileNotFoundError("there is no such folder: was the adapter trained and saved?")
    found = described(Path(folder), "adapter_config.json", "adapter_model.safetensors")
    other = described(Path(folder), "llama_1b_config.json", "llama_1b_model.safetensors")
    return {"adapter": found, "Llama-3.2-1B": other, "rows": [row["instruction"] for row in case["rows"]],
            "losses": losses_with(Path(folder), case["rows"]) if loadable(found) else []}


def described(folder: Any, config: str, weights: str) -> dict[str, Any]:
    """The settings, and of every tensor its shape, its largest entry and whether it is finite; or which of the two
    files are missing. Raises where one is damaged."""
    import json

    from safetensors.torch import load_file

    if missing := [name for name in (config, weights) if not (folder / name).is_file()]:
        return {"missing": missing, "type": "", "rank": None, "alpha": None, "tensors": {}}
    fields = json.loads((folder / config).read_text(encoding="utf-8"))
    if not isinstance(fields, dict):
        raise ValueError(f"{config} must hold one JSON object; it holds a {type(fields).__name__}")
    tensors = load_file(folder / weights)
    return {"missing": [], "type": str(fields.get("peft_type")), "rank": fields.get("r"),
            "alpha": fields.get("lora_alpha"), "tensors": {name: [list(t.shape), float(t.abs().max()) if t.numel() else 0.0, bool(t.isfinite().all())]
                        for name, t in tensors.items()}}


def loadable(found: dict) -> bool:
    tensors = found["tensors"]
    return bool(tensors) and base_of(tensors) == "the bundled model" and all(t[2] for t in tensors.values())


def base_of(tensors: dict) -> str:
    """By the width that q_proj's A reads (or any A of attention): whose adapter this is."""
    widths = {shape[-1] for name, (shape, _, _) in tensors.items()
              if name.endswith(("q_proj.lora_A.weight", "k_proj.lora_A.weight", "v_proj.lora_A.weight",
                                "gate_proj.lora_A.weight", "up_proj.lora_A.weight"))}
    return {(): "no LoRA in it", (TINY,): "the bundled model", (LARGE,): "Llama-3.2-1B"}.get(
        tuple(sorted(widths)), "another model")


def losses_with(folder: Any, rows: list[dict]) -> list[list[float]]:
    """[nats, target tokens] of each row, by the bundled model with this adapter. Raises what `load_adapter` raises."""
    import pefttools.bnb  # noqa: F401  imported where it is needed; named here so that it is in the sandbox
    import pefttools.lab.data  # noqa: F401
    import pefttools.lora  # noqa: F401
    import pefttools.lora_init  # noqa: F401
    import pefttools.lora_starts  # noqa: F401
    from pefttools.checkpoint import load_adapter
    from pefttools.lab.base import load_base
    from pefttools.lab.losses import row_losses

    base = load_base("tiny", device="cpu", quiet=True)
    load_adapter(base.model, folder)
    return [[float(nats), int(tokens)] for nats, tokens in row_losses(base.model, base.tokenizer, rows)]


def run_reading(data: dict, case: dict) -> dict[str, Any]:
    found, large = data["adapter"], data["Llama-3.2-1B"]
    tensors = found["tensors"]
    sizes = [t[1] for name, t in tensors.items() if ".lora_B." in name]
    return {"files": f"missing: {', '.join(found['missing'])}" if found["missing"] else "both are there",
            "method in adapter_config.json": found["type"],
            "made for": base_of(tensors),
            "rank": rank_said(found),
            "numbers": "finite" if all(t[2] for t in tensors.values()) else "NaN or infinite",
            "B": "trained" if sizes and max(sizes) > 0 else "zero everywhere",
            "rows it was judged on": "of this grading" if data["rows"] == [r["instruction"] for r in case["rows"]]
            else "others",
            "held-out loss": loss_said(data["losses"]),
            "adapter of Llama-3.2-1B": large_said(large) if len(large["missing"]) < 2
            else "none, or in order"}


def rank_said(found: dict) -> str:
    ranks = {t[0][0] for name, t in found["tensors"].items() if ".lora_A." in name}
    return "as in the tensors" if ranks == {found["rank"]} and found["alpha"] else "not as in the tensors"


def loss_said(losses: list) -> str:
    """In words, so that everybody who made a mistake gives the same; chapter 10 is about finer distinctions."""
    if not losses:
        return "not taken"
    loss = sum(nats for nats, _ in losses) / sum(tokens for _, tokens in losses)
    if not math.isfinite(loss) or loss > 4:
        return "far above the base model's"
    return f"at most {BOUND}" if loss <= BOUND else f"above {BOUND}" if loss < 2 else "about the base model's"


def large_said(found: dict) -> str:
    """"none, or in order", or what is wrong with the structure of the adapter of Llama-3.2-1B."""
    tensors, r = found["tensors"], found["rank"]
    if found["missing"]:
        return "one of its two files is missing"
    if found["type"] != "LORA" or type(r) is not int or r < 1:
        return "its configuration is not LoRA's"
    wanted: dict[str, list[int]] = {}
    kinds = {kind for kind in LARGE_SHAPES if any(f".{kind}." in name for name in tensors)}
    for layer in range(LARGE_LAYERS):
        for kind in kinds:
            part = "self_attn" if kind in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            where = f"base_model.model.model.layers.{layer}.{part}"
            d_out, d_in = LARGE_SHAPES[kind]
            wanted |= {f"{where}.{kind}.lora_A.weight": [r, d_in], f"{where}.{kind}.lora_B.weight": [d_out, r]}
    if not kinds or set(wanted) != set(tensors):
        return "its layers are not those of Llama-3.2-1B"
    if any(tensors[name][0] != shape for name, shape in wanted.items()):
        return "its shapes are not those of Llama-3.2-1B"
    if not all(t[2] for t in tensors.values()):
        return "NaN or infinite numbers in it"
    if any(t[1] == 0 for name, t in tensors.items() if ".lora_B." in name):
        return "a B of it is zero: it was not trained"
    return "none, or in order"


RUN_IT = Exercise(
    name="run-it", chapter=CHAPTER, title="Run it: the adapter that you hand in", points=6, minutes=15, difficulty=2,
    inputs=run_inputs, probe=run_probe, reading=run_reading, reference=f"{FOLDERS}:reference",
    mistakes={
        "untrained": (f"{FOLDERS}:untrained",
            "Every B is zero: this adapter was saved before it was trained, or another one was trained than the one "
            "saved. It loads without a complaint and changes nothing."),
        "stopped early": (f"{FOLDERS}:stopped_early",
            "The adapter loads and does something, but too little: on fresh rows the loss is above the bound. More "
            "steps, or a higher learning rate: LoRA on this model takes 4e-3 to 1e-2. (Was the run stopped half-way? "
            "The same call goes on.)"),
        "diverged": (f"{FOLDERS}:diverged",
            "With this adapter the model is far worse than without. The learning rate was too high, or the scale "
            "lora_alpha/r is not the one that it was trained with."),
        "of the large model": (f"{FOLDERS}:of_the_large_model",
            "Under the names adapter_config.json and adapter_model.safetensors lies the adapter of Llama-3.2-1B. The "
            "bundled model's belongs there, which the grader can run; hand the large one in beside it as "
            "llama_1b_config.json and llama_1b_model.safetensors."),
        "not a number": (f"{FOLDERS}:not_a_number",
            "There are NaN or infinite numbers in the file: training had diverged. In float16 a loss scale that is too "
            "high does that, too."),
        "no configuration": (f"{FOLDERS}:no_configuration",
            "adapter_config.json is missing. Without it nobody knows rank, scale and layers: an adapter is two files."),
        "no weights": (f"{FOLDERS}:no_weights",
            "adapter_model.safetensors is missing: the configuration alone says what was planned, not what was learned."),
        "another rank": (f"{FOLDERS}:another_rank",
            "adapter_config.json says another rank than the tensors have: the two files are of different runs."),
        "the whole model": (f"{FOLDERS}:whole_model",
            "There is no LoRA in this file: the names are those of whole weights. Save the adapter, not the model "
            "(save_adapter, or save_pretrained of peft's model)."),
        "names of the model": (f"{FOLDERS}:names_of_the_model",
            "The tensors carry the names that they have inside the model. peft puts base_model.model. in front and "
            "leaves out the adapter's own name (default); without that nothing would be found."),
        "another method": (f"{FOLDERS}:another_method",
            "peft_type is not LORA. Other methods are in your table; handed in is LoRA's (QLoRA is LoRA on a base in 4 "
            "bits, and saved the same)."),
        "large one broken": (f"{FOLDERS}:large_one_broken",
            "The bundled model's adapter is in order. The one of Llama-3.2-1B beside it is not: some of the 16 layers "
            "are missing. Hand it in whole, or leave it out."),
        "large one untrained": (f"{FOLDERS}:large_one_untrained",
            "The bundled model's adapter is in order. In the one of Llama-3.2-1B beside it a B is zero: it was saved "
            "before it was trained."),
    },
    alternatives={"in float32": f"{FOLDERS}:in_float32", "twice the rank": f"{FOLDERS}:twice_the_rank",
                  "with the large one beside it": f"{FOLDERS}:with_the_large_one"},
    accepts="artefact", files=FILES)


# ================================================================================================ pareto-front

def front_inputs(rng: torch.Generator) -> list[dict]:
    return [{"points": _cloud(rng, 7)}, {"points": _cloud(rng, 10)}, {"points": _cloud(rng, 1)},
            {"points": _with_ties(rng)}, {"points": _cloud(rng, 12)}]


def _cloud(rng: torch.Generator, n: int) -> list[list]:
    names = shuffled(rng, [f"{kind}-{r}" for kind in ("lora", "qlora", "prefix", "full") for r in (1, 4, 16)])[:n]
    return [[name, float(whole(rng, 1_000, 15_000)), whole(rng, 300, 2_500) / 1000] for name in names]


def _with_ties(rng: torch.Generator) -> list[list]:
    """Equal in one number, and equal in both: the places where ≤ and < differ."""
    memory, loss = float(whole(rng, 4_000, 9_000)), whole(rng, 800, 1_500) / 1000
    points = [["a", memory, loss], ["as good as a", memory, loss], ["worse in loss only", memory, loss + 0.2],
              ["worse in memory only", memory + 500, loss], ["smaller", memory - 1000, loss + 0.3],
              ["better", memory + 2000, loss - 0.3], ["beaten twice", memory + 2500, loss + 0.1]]
    return shuffled(rng, points)


def front_probe(work: Callable, case: dict) -> dict[str, Any]:
    got = work([tuple(point) for point in case["points"]])
    return {"names": list(got) if isinstance(got, (list, tuple)) else got}


def front_with(beats: Callable) -> Callable:
    """Names of the points that none of the others beats: beats(memory, loss, memory of the other, its loss)."""
    def work(points):
        return [name for i, (name, memory, loss) in enumerate(points)
                if not any(beats(memory, loss, m, q) for j, (_, m, q) in enumerate(points) if j != i)]
    return work


front_reference = front_with(lambda memory, loss, m, q: m <= memory and q <= loss and (m < memory or q < loss))


def front_by_sorting(points):
    """Along rising memory, what is better than all before; points equal to one that stays, stay too."""
    kept, best = set(), math.inf
    for _, memory, loss in sorted(points, key=lambda point: (point[1], point[2])):
        if loss < best:
            kept.add((memory, loss))
            best = loss
    return [name for name, memory, loss in points if (memory, loss) in kept]


def front_by_numbers(points):
    memory, loss = (torch.tensor([point[i] for point in points], dtype=torch.float64) for i in (1, 2))
    no_worse = (memory[None] <= memory[:, None]) & (loss[None] <= loss[:, None])
    better = (memory[None] < memory[:, None]) | (loss[None] < loss[:, None])
    beaten = (no_worse & better).any(1)
    return [point[0] for point, out in zip(points, beaten.tolist()) if not out]


def front_of_the_best(points):
    return [min(points, key=lambda p: p[2])[0]] if len(points) == 1 else [
        min(points, key=lambda p: p[1])[0], min(points, key=lambda p: p[2])[0]]


def front_by_a_sum(points):
    return [min(points, key=lambda p: p[1] / 6000 + p[2])[0]]


PARETO_FRONT = Exercise(
    name="pareto-front", chapter=CHAPTER, title="Who is beaten by nobody?", points=2, minutes=10, difficulty=2,
    inputs=front_inputs, probe=front_probe, reference=front_reference,
    mistakes={
        "all of them": (lambda points: [point[0] for point in points], "You return all of them."),
        "strictly better in both": (front_with(lambda memory, loss, m, q: m < memory and q < loss),
            "You call a point beaten only where another is better in *both* numbers. As good in one and better in the "
            "other is enough."),
        "as good is beaten": (front_with(lambda memory, loss, m, q: m <= memory and q <= loss),
            "Two points with the same two numbers throw each other out. To beat, another has to be better in at least "
            "one number."),
        "better in either": (front_with(lambda memory, loss, m, q: m < memory or q < loss),
            "You call a point beaten where another is better in *one* number. It must not be worse in the other one."),
        "larger loss": (front_with(lambda memory, loss, m, q: m <= memory and q >= loss and (m < memory or q > loss)),
            "You take a larger loss for a better one. Less is better, in both numbers."),
        "larger memory": (front_with(lambda memory, loss, m, q: m >= memory and q <= loss and (m > memory or q < loss)),
            "You take more memory for better. Less is better, in both numbers."),
        "the two ends": (front_of_the_best,
            "You return the cheapest and the best. What lies between them may be beaten by neither."),
        "by a sum": (front_by_a_sum,
            "You add the two numbers up and take the smallest sum. MiB and nats have no common unit: how many MiB is a "
            "nat worth? The front leaves that open."),
        "only memory": (front_with(lambda memory, loss, m, q: m < memory), "You look at memory alone."),
    },
    alternatives={"by sorting": front_by_sorting, "all pairs at once": front_by_numbers},
    accepts="function", hides=("pefttools.widgets.capstone", *HIDES))


# ================================================================================================ report-it

COLUMNS = ("method", "trainable", "planned MiB", "measured MiB", "tokens/s", "loss", "forgetting")
OFF = 0.10             # of what was measured
WORDS = 120


def report_inputs(rng: torch.Generator) -> list[dict]:
    """Which cells of the student's table are looked up, and the card that the report is asked about: a small, a
    middling and a large one."""
    return [{"cells": [[whole(rng, 0, 6), COLUMNS[whole(rng, 1, len(COLUMNS) - 1)]] for _ in range(8)],
             "share": whole(rng, low, high) / 1000} for low, high in ((1, 60), (200, 800), (960, 999))]


def report_probe(work: Any, case: dict) -> dict[str, Any]:
    """The report as plain data, and some cells of its table, read out here."""
    if not isinstance(work, dict):
        return {"report": f"a {type(work).__name__}, not a dict"}
    table = table_of(work.get("table", ""))
    names = list(table)
    looked_up = [table[names[row % len(names)]].get(column, "missing") if names else "no table"
                 for row, column in case["cells"]]
    lists = {key: [str(name) for name in work[key]] if isinstance(work.get(key), (list, tuple)) else f"{work.get(key)!r:.60}"
             for key in ("front", "off")}
    choose = work.get("choose")
    rooms = [table[name]["measured MiB"] for name in names if isinstance(table[name].get("measured MiB"), float)]
    room = min(rooms) + case["share"] * (max(rooms) - min(rooms)) if rooms else 0.0
    return {"table": table, "looked up": looked_up, **lists, "room": room, "text": str(work.get("text", ""))[:20_000],
            "chosen": str(choose(room)) if callable(choose) else "choose is no function"}


def table_of(text: Any) -> dict[str, dict]:
    """A Markdown table as {method: {column: number}}; what is no number stays a text. Rows of another length are left
    out."""
    lines = [line.strip() for line in str(text).splitlines() if line.strip().startswith("|")]
    cells = [[cell.strip().strip("*`").strip() for cell in line.strip("|").split("|")] for line in lines]
    cells = [row for row in cells if not all(set(cell) <= set("-: ") for cell in row)]
    if len(cells) < 2:
        return {}
    head = cells[0]
    return {row[0]: {name: as_number(cell) for name, cell in zip(head, row)} for row in cells[1:] if len(row) == len(head)}


def as_number(cell: str) -> Any:
    """The number at the beginning of a cell: "1,234", "0.62 (0.55 to 0.69)", "+0.10"; else the text."""
    import re

    found = re.match(r"[+\-−]?[\d,]*\.?\d+(?:[eE][+-]?\d+)?", cell)
    return float(found[0].replace(",", "").replace("−", "-")) if found else cell


def report_reading(data: dict, case: dict) -> dict[str, Any]:
    """Does what the report says agree with its own table?"""
    table = {name: row for name, row in data["table"].items() if usable(row)}
    names = list(data["table"])
    again = [data["table"][names[row % len(names)]].get(column, "missing") if names else "no table"
             for row, column in case["cells"]]
    return {"columns of the table": "all there" if table_complete(data["table"]) else "some are missing",
            "methods": methods_said(table),
            "trainable parameters": trainable_said(table),
            "cells that were looked up": "as in the table" if names and data["looked up"] == again else "others",
            "off": same_names(data["off"], [name for name, row in table.items() if is_off(row)]),
            "front": same_names(data["front"], front_reference(
                [(name, row["measured MiB"], row["loss"]) for name, row in table.items()])),
            "choose": choice_said(table, data["room"], case["share"], data["chosen"]),
            "text": "long enough" if len(data["text"].split()) >= WORDS else f"fewer than {WORDS} words"}


def usable(row: dict) -> bool:
    return all(isinstance(row.get(column), float) for column in COLUMNS[1:] if column != "forgetting")


def table_complete(table: dict) -> bool:
    return bool(table) and all(set(COLUMNS[1:]) <= set(row) for row in table.values())


def methods_said(table: dict) -> str:
    missing = [name for name in METHODS if name != "full" and name not in table]
    return "all seven, with numbers" if not missing else f"not there, or without numbers: {', '.join(missing)}"


def trainable_said(table: dict) -> str:
    """QLoRA trains what LoRA trains, DoRA a magnitude for each row more, a prompt the least of all that were run."""
    count = {name: row["trainable"] for name, row in table.items()}
    if not {"qlora", "lora", "dora", "prompt"} <= set(count):
        return "not all there"
    if count["qlora"] != count["lora"]:
        return "QLoRA and LoRA differ: they train the same A and B"
    more = count["lora"] < count["dora"] and min(count.values()) > 0
    return "in order" if more else "DoRA does not train more than LoRA"


def is_off(row: dict) -> bool:
    return abs(row["planned MiB"] / row["measured MiB"] - 1) > OFF if row["measured MiB"] else True


def same_names(said: Any, right: list[str]) -> str:
    if not isinstance(said, list):
        return "no list"
    extra, missing = [name for name in said if name not in right], [name for name in right if name not in said]
    if extra and missing:
        return "names too many and names missing"
    return "names too many" if extra else "names missing" if missing else "as in the table"


def choice_said(table: dict, room: float, share: float, chosen: str) -> str:
    """The lowest loss among those that were measured to fit."""
    if not table:
        return "no table"
    rooms = [row["measured MiB"] for row in table.values()]
    if abs(min(rooms) + share * (max(rooms) - min(rooms)) - room) > 1e-6 * max(rooms):
        return "asked about another card"
    fitting = {name: row for name, row in table.items() if row["measured MiB"] <= room}
    if chosen not in table:
        return "no method of the table"
    if chosen not in fitting:
        return "does not fit"
    best = min(row["loss"] for row in fitting.values())
    good = fitting[chosen]["loss"] == best
    return "the lowest loss that fits" if good else "fits, but another that fits has a lower loss"


def report_with(**changes: Any) -> dict[str, Any]:
    """A report about a made-up table, with parts changed."""
    table = changes.pop("table", EXAMPLE)
    parsed = {name: row for name, row in table_of(table).items() if usable(row)}

    def choose(room):
        return min((name for name, row in parsed.items() if row["measured MiB"] <= room),
                   key=lambda name: parsed[name]["loss"])

    def cheapest(room):
        return min(parsed, key=lambda name: parsed[name]["measured MiB"])

    def best(room):
        return min(parsed, key=lambda name: parsed[name]["loss"])

    known = {"choose": choose, "cheapest": cheapest, "best": best}
    points = [(name, row["measured MiB"], row["loss"]) for name, row in parsed.items()]
    report = {"table": table, "front": front_reference(points), "choose": choose,
              "off": [name for name, row in parsed.items() if is_off(row)], "text": "Measured, and seen. " * 60}
    for key, value in changes.items():
        report[key] = known.get(value, value) if isinstance(value, str) else value(report) if callable(value) else value
    return report


EXAMPLE = """
| method | trainable | planned MiB | measured MiB | tokens/s | loss | forgetting |
|---|---|---|---|---|---|---|
| qlora | 448,512 | 160.0 | 158.0 | 900 | 0.70 (0.6 to 0.8) | +0.30 |
| lora | 448,512 | 180.0 | 178.0 | 1,000 | 0.60 (0.5 to 0.7) | +0.30 |
| dora | 454,400 | 230.0 | 201.0 | 700 | 0.61 (0.5 to 0.7) | +0.31 |
| adapter | 200,000 | 140.0 | 139.5 | 1,100 | 0.80 (0.7 to 0.9) | +0.20 |
| ia3 | 5,760 | 165.0 | 164.0 | 1,100 | 1.50 (1.4 to 1.6) | +0.10 |
| prefix | 24,576 | 148.0 | 147.0 | 1,050 | 1.40 (1.3 to 1.5) | +0.10 |
| prompt | 4,096 | 169.0 | 152.0 | 1,000 | 1.80 (1.7 to 1.9) | +0.05 |
| full | 5,475,584 | 228.0 | 227.0 | 950 | 0.40 (0.3 to 0.5) | +0.90 |
"""


def lines_without(*names: str) -> str:
    out = tuple(f"| {name} " for name in names)
    return "\n".join(line for line in EXAMPLE.splitlines() if not line.startswith(out))


def without_a_column(name: str) -> str:
    at = COLUMNS.index(name)
    return "\n".join("|".join(cell for n, cell in enumerate(line.split("|")) if n != at + 1)
                     for line in EXAMPLE.splitlines())


REPORT_IT = Exercise(
    name="report-it", chapter=CHAPTER, title="Report it", points=4, minutes=25, difficulty=2, inputs=report_inputs,
    probe=report_probe, reading=report_reading, reference=report_with(),
    mistakes={
        "a method is missing": (report_with(table=lines_without("prefix")),
            "A method is missing from your table. All seven that fit anywhere belong into it; full fine-tuning where "
            "memory allows."),
        "a column is missing": (report_with(table=without_a_column("forgetting")),
            "A column of the table is missing. Paste it as the notebook prints it: forgetting belongs to the report, too."),
        "QLoRA counted by bytes": (report_with(table=EXAMPLE.replace("| qlora | 448,512", "| qlora | 112,128")),
            "In your table QLoRA trains fewer parameters than LoRA. Quantized is the frozen base; A and B are the same."),
        "the whole table": (report_with(front=lambda report: list(METHODS)),
            "Your `front` holds methods that another one beats: less memory and a loss as low. It is your `front` of "
            "the table's measured MiB and loss."),
        "the best alone": (report_with(front=lambda report: ["full"]),
            "Methods are missing in `front`. It has the cheapest, the best, and whatever lies between them unbeaten."),
        "nothing is off": (report_with(off=lambda report: []),
            "`off` is empty, and in your table there are methods whose plan differs from the measurement by more than "
            "10 %. A report names them."),
        "off by the wrong base": (report_with(off=lambda report: ["dora", "prompt", "full"]),
            "`off` names a method whose plan is within 10 % of what was measured. The share is of the measured bytes: "
            "planned / measured − 1."),
        "always the cheapest": (report_with(choose="cheapest"),
            "Your `choose` takes the cheapest method however much room there is. Of those that fit, the one with the "
            "lowest loss was asked for."),
        "always the best": (report_with(choose="best"),
            "Your `choose` takes the lowest loss, whether it fits or not. First those with measured MiB ≤ room, then "
            "the lowest loss of these."),
        "too short": (report_with(text=lambda report: "LoRA is best."),
            "The text is too short to be a report: at least 120 words, on the five points of the list."),
    },
    alternatives={"without full fine-tuning": report_with(table=lines_without("full")),
                  "front in another order": report_with(front=lambda report: sorted(report["front"], reverse=True)),
                  "bold and a tuple": report_with(table=EXAMPLE.replace("| full |", "| **full** |"),
                                                  off=lambda report: tuple(report["off"]))},
    accepts="value", hides=HIDES, by_hand=10)


# ------------------------------------------------------------------------------------------------ questions

QUESTIONS: list[Question] = [
    Question(
        name="capstone-q-scaler", chapter=CHAPTER, points=1,
        text="On the T4 the base computes in float16, and the training multiplies the loss by a large number before "
             "`backward()` and divides the gradients by it afterwards. What for?",
        right="c",
        options={
            "a": ("To take larger steps: float16 needs a higher learning rate.",
                  "The gradients are divided by the same number before the optimizer sees them. The steps stay as they "
                  "were."),
            "b": ("Because the logits of a large vocabulary overflow otherwise.",
                  "Multiplying makes numbers larger and overflow more likely: if there is one, the step is left out "
                  "and the factor halved."),
            "c": ("Small gradients would become zero: float16 has nothing below 6 · 10⁻⁸. Multiplied, they survive.",
                  "Yes. bfloat16 has float32's exponents and needs no such scale; that is why it is preferred where "
                  "the card has it."),
            "d": ("To average over the accumulated batches.",
                  "That is another division, by the number of target tokens of the whole step."),
        }),
    Question(
        name="capstone-q-no-deps", chapter=CHAPTER, points=1,
        text="The set-up cell installs what is missing with `--no-deps`, and never torch or numpy. Why?",
        right="a",
        options={
            "a": ("A new torch or numpy under a running kernel breaks what is loaded already, and Colab's torch is "
                  "built for its driver.",
                  "Yes. Without `--no-deps` pip may decide by itself that a dependency wants another one."),
            "b": ("Without dependencies the packages take less memory on the GPU.",
                  "What lies on the disk takes nothing of a GPU's memory."),
            "c": ("pip cannot install dependencies in a notebook.",
                  "It can, and that is the trouble."),
            "d": ("It makes a run reproducible.",
                  "No: versions are not pinned by it. The run's record writes down which ones there were."),
        }),
    Question(
        name="capstone-q-pinned", chapter=CHAPTER, points=1,
        text="The loader asks for the data set at a commit (`revision=\"0ed98ff2…\"`), not at `main`. What does that buy?",
        right="d",
        options={
            "a": ("A faster download: pinned files are cached.", "The newest revision is cached just as well."),
            "b": ("Access without a token.", "Whether a token is needed has nothing to do with the revision."),
            "c": ("Only rows that somebody has checked.",
                  "A commit is a name for a state of the files, not a seal: the rows are whatever they were then. We "
                  "check them on loading."),
            "d": ("The same rows tomorrow, and for whoever repeats your run.",
                  "Yes. `main` may move while you train, and then two rows of your table have seen different data."),
        }),
    Question(
        name="capstone-q-first-step", chapter=CHAPTER, points=1,
        text="The plan said 5.9 GiB and the run ends with out of memory after 40 steps, not at the first. The card "
             "has 14.6 GiB and nothing else runs on it. Which is the likeliest?",
        right="b",
        options={
            "a": ("A leak in PyTorch.", "Possible, and the last thing to suspect."),
            "b": ("The plan was made for shorter rows: at step 40 came the batch with the longest ones.",
                  "Yes. What layers keep and the logits grow with the tokens of the batch. Plan for the worst batch, "
                  "or limit the length."),
            "c": ("The adapter grows while it is trained.", "A and B have the size that they had when they were made."),
            "d": ("AdamW's moments are made at step 40.",
                  "They are made in the first step: the *second* is the first whole one, and there the peak is "
                  "reached, if rows are equally long."),
        }),
    Question(
        name="capstone-q-merged", chapter=CHAPTER, points=1,
        text="Your QLoRA adapter was trained on the base in 4 bits. The grader loads it onto the base in 32 bits. "
             "What is to be expected?",
        right="b",
        options={
            "a": ("An error: the shapes of 4-bit weights are others.",
                  "The adapter has A and B only, and these have the layer's own shapes."),
            "b": ("A loss near the one that you saw, a little higher or lower: the adapter had adjusted to the rounded "
                  "weights, and the exact ones are close to them.",
                  "Yes. Chapter 05 measured it, for four ways to ship an adapter."),
            "c": ("Exactly the loss that you saw: the adapter is the same.",
                  "The adapter is, the base is not: W and its 4-bit version differ by some percent."),
            "d": ("The base model's loss: an adapter works on the base that it was trained on, and on no other.",
                  "On an unrelated base, yes. Here the two differ by rounding."),
        }),
]

EXERCISES: list[Exercise] = [PICK_PRECISION, KEEP_ROWS, PLAN_IT, RUN_IT, PARETO_FRONT, REPORT_IT]
