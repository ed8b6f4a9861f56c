"""A fine-tune from settings to files, as a function: what `pefttools finetune` does, for notebooks.

    from pefttools.lab.finetune import run_method

    result = run_method("qlora", data=rows, steps=200, out="runs/qlora")
    result.history.plot(), result.tokens_per_second, result.memory(), result.model

    rows ──► tokens ──► plan on this GPU ──► load_base ──► quantize, attach ──► lab.train ──► adapter, result.json
                              └ does not fit: says what would, and stops

Called again with the same arguments and folder it goes on from the last checkpoint, or loads what is finished.
"""
from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pefttools.lab.finetune_config import Settings, WrongQuestion
from pefttools.lab.finetune_data import encode_rows, gather, looked_at
from pefttools.lab.finetune_folder import begin, processes_in_turn, taken
from pefttools.lab.finetune_memory import Peak, compared, count_anew, peak_now, plan_for
from pefttools.lab.finetune_model import computed_in, job_of, prepare, rate, save, tokenizer_for, weights_dtype
from pefttools.lab.finetune_oom import ran_out, what_would_need_less


@dataclass
class Result:
    """A finished fine-tune. `model` (in eval mode) and `tokenizer` can be used at once; memory is in bytes."""

    settings: Settings
    base: str                      # the name of what was really loaded
    history: Any                   # lab.History: loss, lr, tokens, read, seconds, held_out
    trainable: int
    parameters: int
    planned: Any                   # pefttools.vram.Memory; None where nothing was planned
    peak: Peak
    longest: int                   # tokens of the longest row that was trained on
    best: tuple[int, float] | None # (step, loss) on the held-out rows; the model then has that step's parameters
    folder: Path | None
    model: Any
    tokenizer: Any

    @property
    def method(self) -> str:
        return self.settings.method

    @property
    def seconds(self) -> float:
        """Of the optimizer steps, over all parts of a run that was resumed."""
        return self.history.seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens read (prompts and answers, without padding) by all processes in a second of training."""
        return self.history.read / self.history.seconds if self.history.seconds else 0.0

    def memory(self) -> str:
        """"planned 4.10 GiB, peak 4.20 GiB (+2.4 %)", or on a CPU what applies."""
        return compared(self.planned, self.peak, self.longest)

    def row(self) -> dict[str, Any]:
        """The numbers of one row of a table."""
        smooth = self.history.smooth()
        return {"method": self.method, "base": self.base, "trainable": self.trainable, "parameters": self.parameters,
                "steps": len(self.history.loss), "seconds": self.seconds, "targets": self.history.tokens,
                "read": self.history.read, "tokens_per_second": self.tokens_per_second, "first_loss": smooth[0],
                "last_loss": smooth[-1], "best": self.best, "planned": self.planned and self.planned.total,
                "planned_device": self.planned and self.planned.device, "peak_kind": self.peak.kind,
                "peak_allocated": self.peak.allocated, "peak_reserved": self.peak.reserved,
                "peak_loading": self.peak.loading, "peak_resident": self.peak.resident}


def run_method(method: str = "lora", *, model: str | None = None, data: Any = "train", held_out: Any = None,
               base: Any = None, out: str | Path | None = None, quiet: bool = False, progress: bool = True,
               **settings: Any) -> Result:
    """Fine-tune with `method` and return a Result. `settings`: those of `pefttools finetune --help`, under their names.

    data, held_out: a name as there, or rows (dictionaries, or a datasets.Dataset) with instruction, input, output.
    base: a Base that is loaded already, instead of `model`; it is changed. out: None writes nothing; nothing resumes.
    Raises WrongQuestion for a wrong setting or wrong rows, DoesNotFit and OutOfMemory with advice, ValueError for a
    folder of another run, OSError for a disk that is full.
    """
    from dataclasses import fields

    from pefttools.vram.job import among

    for name in settings:
        try:
            among("setting", name, [each.name for each in fields(Settings)])
        except ValueError as error:
            raise WrongQuestion(str(error)) from None
    named = isinstance(data, (str, Path))
    looked = held_out is None or isinstance(held_out, (str, Path, float, int))
    asked = Settings(model=model or getattr(base, "name", "tiny"), method=method, out=None if out is None else str(out),
                     quiet=not progress or quiet, **({"data": str(data)} if named else {}),
                     **({"held_out": held_out} if looked else {}), **settings)
    result = run(asked, None if named else list(data), None if looked else list(held_out), base,
                 None if quiet else print)
    if result is None:
        raise WrongQuestion("plan_only=True: run_method trains; ask pefttools.vram.plan.")
    return result


def run(settings: Settings, rows: Any = None, held_out: Any = None, base: Any = None,
        say: Callable[[str], None] | None = print) -> Result | None:
    """`run_method` for Settings; None with plan_only. `say` is told what a reader should know, on the first process."""
    from pefttools.lab.training_engine import Processes, compute_dtype

    job = job_of(settings, base and base.model)
    if base is not None and settings.precision == "auto":      # what is loaded decides
        settings = replace(settings, precision=str(compute_dtype(base.model)).removeprefix("torch."))
    settings = replace(settings, held_out=looked_at(settings, rows, held_out))
    processes = Processes()
    speak = say if say and processes.first else lambda sentence: None
    with processes_in_turn(processes):                         # a download happens once
        to_train, to_look = gather(settings, rows, held_out, speak)
        tokenizer = base.tokenizer if base else tokenizer_for(settings.model)
    encoded, looked = encode_both(to_train, to_look, tokenizer, settings, speak)
    lengths = [len(row["input_ids"]) for row in encoded]
    planned = plan_for(settings, job, lengths, speak)
    if settings.plan_only:
        return None
    settings = replace(settings, lr=rate(settings), alpha=settings.alpha if settings.alpha is not None else
                       float(settings.r) if "lora" in settings.method or "dora" in settings.method else None)
    folder = Path(settings.out) if settings.out else None
    with taken(folder if processes.first else None):
        if folder and processes.first:
            begin(folder, settings, to_train if rows is not None else None, to_look if held_out is not None else None)
        try:
            count_anew()
            if base is None:
                from pefttools.lab.base import load_base

                silent = not processes.first or say is None
                base = load_base(settings.model, dtype=weights_dtype(settings), quiet=silent)
                if len(base.tokenizer) != len(tokenizer):      # load_base fell back to another model than was asked for
                    encoded, looked = encode_both(to_train, to_look, base.tokenizer, settings, lambda sentence: None)
            result = trained(settings, job, base, encoded, looked, planned, folder, processes, speak)
        except BaseException as error:
            if not ran_out(error):
                raise
            kept = "Nothing was saved yet." if not folder or not (folder / "checkpoint.pt").exists() else \
                f"{folder} has the checkpoint of before; with another batch it is another run: give it another folder."
            raise what_would_need_less(settings, job, lengths, kept) from error
    return result


def encode_both(to_train: list, to_look: list, tokenizer: Any, settings: Settings, say: Callable[[str], None]) -> tuple:
    return (encode_rows(to_train, tokenizer, settings, "the data", say),
            encode_rows(to_look, tokenizer, settings, "the held-out rows", say) if to_look else [])


def trained(settings: Settings, job: Any, base: Any, encoded: list, looked: list, planned: Any, folder: Path | None,
            processes: Any, say: Callable[[str], None]) -> Result:
    """Attach, train, save: the part that takes time."""
    from pefttools.attached import count_parameters
    from pefttools.lab.text import batches
    from pefttools.lab.training import train
    from pefttools.lab.training_watch import Watch

    prepare(base.model, job, settings.seed)
    loading = count_anew()
    trainable, parameters = count_parameters(base.model)
    dtype = str(computed_in(settings)).removeprefix("torch.")
    say(f"Training {trainable:,} of {parameters:,} parameters ({100 * trainable / parameters:.2g} %): {job.method} on "
        f"{base.name}, computed in {dtype}" + (f", {processes.count} processes." if processes.count > 1 else "."))
    watch = Watch(looked, base.tokenizer, settings.eval_every, settings.patience, settings.batch) if looked else None
    identity = {"model": base.name, "method": job.method, "quantization": job.quantization, "r": job.r, "targets":
                repr(job.targets), "length": job.length, "width": job.width,
                "options": repr(sorted(job.options.items()))}
    history = train(base.model, encoded, base.tokenizer, steps=settings.steps, lr=settings.lr,
                    batch_size=settings.batch, grad_accum=settings.accumulate, seed=settings.seed,
                    max_length=settings.max_length, folder=folder, save_every=settings.save_every,
                    progress=not settings.quiet, watch=watch, identity=identity, precision=dtype)
    passes = batches(encoded, settings.batch, len(history.loss) * settings.accumulate * processes.count, settings.seed)
    result = Result(settings, base.name, history, trainable, parameters, planned and planned.memory, peak_now(loading),
                    max(len(encoded[i]["input_ids"]) for batch in passes for i in batch),
                    (watch.step, watch.loss) if watch and watch.best else None, folder, base.model, base.tokenizer)
    first, last = history.smooth()[0], history.smooth()[-1]
    early = f" Stopped early: {settings.patience} looks without a lower loss." if watch and watch.stopped else ""
    say(f"{len(history.loss)} steps, {history.tokens:,} target tokens, loss {first:.3f} → {last:.3f} (mean of 20 "
        f"steps), {history.seconds:.0f} s, {result.tokens_per_second:,.0f} tokens/s.{early}")
    if result.best:
        say(f"Best held-out loss {result.best[1]:.3f} at step {result.best[0]}: that step's parameters are kept.")
    say(f"Memory: {result.memory()}.")
    if folder and processes.first:
        from pefttools.lab.training_checkpoint import write_whole

        save(base, job, folder)
        content = json.dumps(result.row() | versions() | {"loss": history.loss, "held_out": history.held_out}, indent=1)
        write_whole(folder / "result.json", lambda file: file.write(content.encode()), "result.json")
        say(f"Saved in {folder}")
    processes.wait()
    return result


def versions() -> dict[str, str]:
    """What it ran on: `device` and the versions that change numbers."""
    import platform

    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    return {"device": device, "torch": torch.__version__, "transformers": transformers.__version__}
