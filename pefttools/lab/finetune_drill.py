"""A drill for `pefttools finetune`: killed ten times at random steps, resumed each time; the adapter must be the same.

    python -m pefttools.lab.finetune_drill --to docs/finetune_drill.md

    the command, left alone ────────────────────────────────────────────► adapter A, loss of every step ─┐
    the command, SIGKILL at a random step, the same command again, … ───► adapter B, loss of every step ─┴─ equal?

Where a kill strikes is drawn as well (PLACES): from outside at any moment, after a backward pass, half-way through the
bytes of a checkpoint, between writing it and renaming it, and once between the adapter's two files. All but the first
are hooks in the killed process, since no one can time a millisecond from outside; what kills is SIGKILL each time.
"""
from __future__ import annotations

import argparse
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS, SAVE_EVERY = 60, 4
PLACES = ("from outside", "after a backward pass", "half of a checkpoint written", "a checkpoint not yet renamed")
LAST = "between the adapter's two files"
# name: (arguments, kills); the first three as often as the course promises, the others to see that no method differs
WAYS: dict[str, tuple[list[str], int]] = {
    "lora": (["--method", "lora"], 10),
    "qlora": (["--method", "qlora"], 10),
    "lora, dropout, early stopping": (["--method", "lora", "--options", "dropout=0.1", "--held-out", "0.02",
                                       "--eval-every", "6", "--patience", "9"], 10),
    "full": (["--method", "full", "--lr", "1e-4"], 3),
    "dora": (["--method", "dora"], 3),
    "bottleneck": (["--method", "adapter"], 3),
    "ia3": (["--method", "ia3"], 3),
    "prompt": (["--method", "prompt"], 3),
    "prefix": (["--method", "prefix"], 3),
}


def command(way: str, out: Path, steps: int, more: list[str]) -> list[str]:
    """What is run, as the arguments of `pefttools`."""
    return ["finetune", "tiny", "--out", str(out), "--steps", str(steps), "--save-every", str(SAVE_EVERY),
            "--batch", "4", "--max-length", "160", "--quiet", *WAYS[way][0], *more]


# ------------------------------------------------------------------------------------------------ in the killed process

def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(place: str, at: int) -> None:
    """Let this process be killed at `place` when it has come to step `at` (from 1)."""
    import torch

    from pefttools import adapter_files
    from pefttools.lab import training_checkpoint
    from pefttools.lab.training_engine import Engine

    step = [0]
    passes, collect, replace, save = Engine.passes, Engine.collect, os.replace, torch.save

    def counted(self: Engine, number: int, *rest: Any) -> list[int]:
        step[0] = number + 1
        if place == "from outside" and step[0] == at:
            print("NOW", flush=True)
        return passes(self, number, *rest)

    def collected(self: Engine, optimizer: Any) -> None:
        if place == "after a backward pass" and step[0] == at:
            die()
        collect(self, optimizer)

    def half(content: Any, file: Any) -> None:
        if place == "half of a checkpoint written" and step[0] >= at:
            whole = io.BytesIO()
            save(content, whole)
            file.write(whole.getbuffer()[:len(whole.getbuffer()) // 2])
            file.flush()
            die()
        save(content, file)

    def replaced(source: Any, target: Any) -> None:
        if place == "a checkpoint not yet renamed" and step[0] >= at and str(target).endswith(training_checkpoint.NAME):
            die()
        if place == LAST and str(target).endswith(adapter_files.CONFIG):
            die()
        replace(source, target)

    Engine.passes, Engine.collect, torch.save, os.replace = counted, collected, half, replaced


# ------------------------------------------------------------------------------------------------ the drill

def run(arguments: list[str], place: str = "", at: int = 0, delay: float = 0.0) -> int:
    """The command in a process of its own; its exit status, -9 where it was killed."""
    process = subprocess.Popen([sys.executable, "-m", __spec__.name, "--child", f"{place}:{at}", *arguments],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    said = []
    for line in process.stdout:
        said.append(line)
        if line.strip() == "NOW":
            time.sleep(delay)
            process.kill()
    status = process.wait()
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"{' '.join(arguments)} ended with {status}:\n{''.join(said)}")
    return status


def drawn(rng: random.Random, kills: int, steps: int, last: bool) -> list[tuple[str, int, float]]:
    """(place, step, seconds of delay) of each kill, steps rising; the places take turns, in an order that is drawn."""
    # the last steps are left free: a kill from outside that comes late would find a finished run
    at = sorted(rng.sample(range(1, steps - SAVE_EVERY), kills - last))
    places = [place for _ in range(-(-kills // len(PLACES))) for place in rng.sample(PLACES, len(PLACES))]
    plan = [(place, step, rng.uniform(0, 0.05)) for place, step in zip(places, at)]
    return plan + [(LAST, steps, 0.0)] * last


def drill(way: str, folder: Path, steps: int = STEPS, kills: int | None = None, seed: int = 0,
          more: tuple[str, ...] = ()) -> dict:
    """Run `way` left alone and killed; what was found. Raises RuntimeError where a process fails instead of dying."""
    rng = random.Random(f"{way}, {seed}")
    kills = WAYS[way][1] if kills is None else kills
    alone, killed = folder / "alone", folder / "killed"
    run(command(way, alone, steps, list(more)))
    strikes, missed = [], 0
    for place, at, delay in drawn(rng, kills, steps, last=kills > 3 and way != "full"):
        if run(command(way, killed, steps, list(more)), place, at, delay) == 0:
            missed += 1
        else:
            strikes.append((place, at))
    run(command(way, killed, steps, list(more)))
    return {"way": way, "steps": steps, "kills": strikes, "missed": missed, **compared(alone, killed)}


def compared(alone: Path, killed: Path) -> dict[str, Any]:
    """The largest difference between the two results: of any trained number, and of any step's loss."""
    from safetensors.torch import load_file

    name = "adapter_model.safetensors" if (alone / "adapter_model.safetensors").exists() else "model.safetensors"
    a, b = load_file(alone / name), load_file(killed / name)
    losses = [json.loads((each / "result.json").read_text()) for each in (alone, killed)]
    if a.keys() != b.keys() or len(losses[0]["loss"]) != len(losses[1]["loss"]):
        raise RuntimeError(f"{alone} and {killed} do not hold the same tensors, or not the same number of steps")
    moved = max((a[key].float() - b[key].float()).abs().max().item() for key in a)
    return {"numbers": sum(t.numel() for t in a.values()), "difference": moved,
            "same bytes": (alone / name).read_bytes() == (killed / name).read_bytes(),
            "loss": max(abs(x - y) for x, y in zip(losses[0]["loss"], losses[1]["loss"])),
            "held out": losses[0]["held_out"] == losses[1]["held_out"],
            "left over": sorted(path.name for path in killed.iterdir() if path.suffix == ".part")}


def page(rows: list[dict], told: str, about: dict[str, Any]) -> str:
    """The table as Markdown, every figure from the rows."""
    n = sum(len(row["kills"]) for row in rows)
    same = all(row["same bytes"] and row["loss"] == 0 and row["held out"] for row in rows)
    lines = ["# Fine-tuning drill", "", f"Made by `make finetune-drill` (`{told}`); nothing here is typed by hand.", "",
             "; ".join(f"{name} {value}" for name, value in about.items()) + "; one thread.", "",
             f"Every way was run once left alone, {rows[0]['steps']} steps with a checkpoint every {SAVE_EVERY}, and "
             f"once killed with SIGKILL at random steps and started again each time by the same command: {n} kills in "
             "all. " + ("Every final file is equal byte for byte, and so is the loss of every step." if same else
                "**Not every final file is equal byte for byte.**"), "",
             "| way | numbers in the file | kills | largest difference of a number | file | largest difference of a "
             "step's loss |",
             "|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(f"| {row['way']} | {row['numbers']:,} | {len(row['kills'])} | {row['difference']:g} | "
                     f"{'equal' if row['same bytes'] else 'differs'} | {row['loss']:g} |")
    count = {place: sum(where == place for row in rows for where, _ in row["kills"]) for place in (*PLACES, LAST)}
    lines += ["", "| the kill came | times |", "|---|---|",
              *(f"| {place} | {times} |" for place, times in count.items()), "",
              "| way | killed at step |", "|---|---|",
              *(f"| {row['way']} | {', '.join(str(step) for _, step in row['kills'])} |" for row in rows), ""]
    if missed := sum(row["missed"] for row in rows):
        lines += [f"{missed} kills from outside came after the run had ended, and are not counted.", ""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--child"]:
        from pefttools import cli

        place, _, at = argv[1].rpartition(":")
        if place:
            arm(place, int(at))
        return cli.main(argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("docs/finetune_drill.md"))
    parser.add_argument("--only", nargs="*", choices=list(WAYS), help="these ways only")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    from pefttools.bench.machine import machine

    about = {name: value for name, value in machine().items()
             if name in ("processor", "cores", "memory", "system", "Python", "torch")}
    rows = []
    for way in args.only or WAYS:
        with tempfile.TemporaryDirectory(prefix="finetune-drill-") as folder:
            rows.append(drill(way, Path(folder), seed=args.seed))
        print(rows[-1], flush=True)
        args.to.write_text(page(rows, f"python -m {__spec__.name} --to {args.to.as_posix()} --seed {args.seed}", about))
    return 0 if all(row["same bytes"] and not row["left over"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
