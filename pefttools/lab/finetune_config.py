"""What a fine-tune is asked to do: one table of settings, from the command line, a YAML file, or Python.

    defaults  ◄──  run.yaml  ◄──  the command line            the right one wins
                                       │
                                   Settings ──► checked ──► written beside the result as run.yaml: the run again

The table below is the only one: the command's arguments, its help, and the keys of the file are made of it.
"""
from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pefttools.vram.job import METHODS, among

SPLITS = ("train", "held_out", "new_kinds")
ALIASES = {"adapter": "bottleneck", "adapters": "bottleneck"}
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
AT_LEAST_ONE = ("steps", "batch", "accumulate", "max_length", "r", "length", "width", "save_every")
HERE = ("out", "quiet", "anyway", "plan_only", "gpu", "save_every", "accumulate")  # no part of what a run is


class WrongQuestion(ValueError):
    """Something that was asked for does not exist: nothing was tried."""


def option(default: Any, help: str, kind: str, metavar: str | None = None) -> Any:
    """A field of Settings: its kind is int, float, text, flag, columns or options; None is "choose for me"."""
    make = {"default_factory": dict} if isinstance(default, dict) else {"default": default}
    return field(**make, metadata={"help": help, "kind": kind, "metavar": metavar})


@dataclass(frozen=True)
class Settings:
    """Every setting of a fine-tune. `resolved()` has no None that means "choose for me", apart from `targets`."""

    model: str = option("tiny", "tiny, llama-3.2-1b, a hub id or a folder", "text", "MODEL")
    out: str | None = option(None, "for the adapter (peft's files), the checkpoint, run.yaml and result.json", "text",
                             "FOLDER")
    data: str = option("train", f"a split of the course's data ({', '.join(SPLITS)}), a file (.jsonl, .json, .csv, "
                       ".parquet) or hub:owner/name[@revision][:file], with the columns instruction, input (may be "
                       "missing), output", "text", "DATA")
    columns: dict[str, str] = option({}, "other names of these columns, such as instruction=question,output=answer",
                                     "columns", "A=B,…")
    skip_bad: bool = option(False, "leave out rows that cannot be used, and say how many (else: stop)", "flag")
    method: str = option("lora", f"{', '.join(METHODS)}", "text")
    steps: int = option(200, "optimizer steps", "int", "N")
    lr: float | None = option(None, "peak learning rate (default: what the chapters found for tiny, else a customary "
                              "one)", "float")
    batch: int = option(4, "rows of one pass", "int", "N")
    accumulate: int = option(1, "passes added up to one step (times the processes of accelerate launch)", "int", "N")
    max_length: int = option(512, "longer rows lose the beginning of their prompt", "int", "N")
    r: int = option(16, "rank of LoRA and DoRA", "int", "N")
    alpha: float | None = option(None, "LoRA's alpha (default: the rank)", "float")
    targets: Any = option(None, "modules, such as q_proj,v_proj or all-linear (default: the method's)", "names")
    length: int = option(20, "virtual tokens of prompts and prefixes", "int", "N")
    width: int = option(64, "of a bottleneck adapter", "int", "N")
    options: dict[str, Any] = option({}, "further settings of the method, such as dropout=0.05 or placement=houlsby",
                                     "options", "A=B,…")
    checkpointing: bool = option(False, "run each layer again in the backward pass", "flag")
    precision: str = option("auto", f"what is computed in: {', '.join(PRECISIONS)}; trained parameters are always "
                            "float32 (auto: float32 on a CPU; bfloat16 on a GPU that has it, else float16)", "text")
    held_out: Any = option(None, "rows to look at while training: as --data, or a share of its rows such as 0.1 "
                           "(default: the course's held_out split for its train split, else 0.1)", "text", "DATA|SHARE")
    eval_every: int = option(0, "steps between looks at the held-out rows; the best is kept (0: no looks)", "int", "N")
    patience: int = option(0, "stop after so many looks without a lower loss (0: never)", "int", "N")
    seed: int = option(0, "of the adapter's start, the order of rows, dropout and the held-out share", "int")
    save_every: int = option(50, "steps between checkpoints", "int", "N")
    gpu: str | None = option(None, "plan for this GPU instead of the one that is here", "text")
    plan_only: bool = option(False, "say whether it fits, and stop", "flag")
    anyway: bool = option(False, "go on where the plan says that it does not fit", "flag")
    quiet: bool = option(False, "no progress bar", "flag")

    def __post_init__(self) -> None:
        for each in fields(self):
            value = typed(each.name, each.metadata["kind"], getattr(self, each.name), each.default)
            object.__setattr__(self, each.name, value)
        object.__setattr__(self, "method", ALIASES.get(self.method, self.method))
        for name, known in (("method", METHODS), ("precision", PRECISIONS)):
            try:
                among(name, getattr(self, name), known)
            except ValueError as error:
                raise WrongQuestion(str(error)) from None
        for name in (*AT_LEAST_ONE, "eval_every", "patience", "seed"):
            least = int(name in AT_LEAST_ONE)
            if getattr(self, name) < least:
                raise WrongQuestion(f"--{name.replace('_', '-')} {getattr(self, name)}: a whole number of at least "
                                    f"{least} is needed ({name}={getattr(self, name)}).")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise WrongQuestion(f"--lr {self.lr}: a number above 0 is needed, such as 1e-4.")
        if self.patience and not self.eval_every:
            raise WrongQuestion(f"--patience {self.patience} needs --eval-every: after how many steps to look.")


def typed(name: str, kind: str, value: Any, default: Any) -> Any:
    """`value` as its kind; WrongQuestion with what would do. "1e-3" is a number, though YAML reads it as text."""
    said = f"{name}={value!r}"
    if value is None:
        if default is None or kind in ("columns", "options"):
            return {} if kind in ("columns", "options") else None
        raise WrongQuestion(f"{name} is empty; the default is {default!r}.")
    if kind == "flag":
        if isinstance(value, bool):
            return value
        raise WrongQuestion(f"{said}: true or false is needed.")
    if kind in ("int", "float"):
        try:
            number = float(value) if not isinstance(value, bool) else None
        except (TypeError, ValueError):
            number = None
        if number is None or kind == "int" and number != number // 1:
            raise WrongQuestion(f"{said}: a {'whole ' * (kind == 'int')}number is needed.")
        return int(value) if kind == "int" and isinstance(value, int) else int(number) if kind == "int" else number
    if kind in ("columns", "options"):
        return value if isinstance(value, dict) else pairs(name, str(value))
    if kind == "names" and isinstance(value, (list, tuple)):
        return tuple(map(str, value))
    if kind == "names" and "," in str(value):
        return tuple(str(value).split(","))
    if isinstance(value, (dict, list, tuple)) and name not in ("data", "held_out"):
        raise WrongQuestion(f"{said}: one text is needed.")
    return value if name in ("data", "held_out") and not isinstance(value, Path) else str(value)


def pairs(name: str, text: str) -> dict[str, Any]:
    """"dropout=0.05,placement=houlsby" as a dictionary; each value as YAML reads it."""
    import yaml

    found = {}
    for part in text.split(","):
        key, sign, value = part.partition("=")
        if not sign or not key.strip():
            such = "dropout=0.05" if name == "options" else "output=answer"
            raise WrongQuestion(f"--{name} {text}: pairs such as {such}, separated by commas, are needed.")
        found[key.strip()] = yaml.safe_load(value) if name == "options" else value.strip()
    return found


# ------------------------------------------------------------------------------------------------ the command line

def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments: those of the table, --config, and the model as the first one."""
    known = {each.name: each.metadata["help"] for each in fields(Settings)}
    parser.add_argument("model", nargs="?", default=argparse.SUPPRESS, help=known["model"])
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings from a YAML file, such as a result's "
                        "run.yaml; what is given here as well wins")
    for each in fields(Settings):
        if each.name == "model":
            continue
        help, kind = each.metadata["help"], each.metadata["kind"]
        flag = f"--{each.name.replace('_', '-')}"
        if kind == "flag":
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=help)
            continue
        if isinstance(each.default, (int, str)) and "default" not in help:
            help += f" (default: {each.default})"
        parser.add_argument(flag, default=argparse.SUPPRESS, help=help, metavar=each.metadata["metavar"],
                            type={"int": int, "float": float}.get(kind, str))


def from_arguments(args: argparse.Namespace) -> Settings:
    """The settings of a command line: what it says, else what --config says, else the defaults."""
    from pefttools.lab.finetune_yaml import read_config

    names = {each.name for each in fields(Settings)}
    given = {name: value for name, value in vars(args).items() if name in names}
    return Settings(**((read_config(args.config) if args.config else {}) | given))
