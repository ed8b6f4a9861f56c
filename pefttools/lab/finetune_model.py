"""The model of a fine-tune: its tokenizer before anything large is loaded, its learning rate, its method, its files."""
from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from pefttools.lab.finetune_config import Settings, WrongQuestion
from pefttools.vram.job import Job, among

# Peak learning rates. On the bundled model the ones that the chapters' runs chose (lab/flavours.py, adapter_places.py,
# virtual_starts.py). Elsewhere nobody tuned them here: 1e-5 and 2e-4 are customary for full fine-tuning and LoRA
# (QLoRA's paper: 2e-4 up to 13B), 3e-3 is IA³'s paper (Liu et al. 2022); virtual tokens need far more than weights.
TINY_RATES = {"full": 1e-3, "prompt": 0.3, "prefix": 0.3, "ptuning": 1e-3, "llama_adapter": 0.1, "ia3": 0.1,
              "ln_tuning": 0.03}
RATES = {"full": 1e-5, "prompt": 3e-2, "prefix": 3e-2, "ptuning": 1e-3, "llama_adapter": 1e-2, "ia3": 3e-3,
         "ln_tuning": 1e-3}


def rate(settings: Settings) -> float:
    """The peak learning rate: as given, else what is known for this method on this model."""
    if settings.lr is not None:
        return settings.lr
    return TINY_RATES.get(settings.method, 1e-2) if settings.model == "tiny" else RATES.get(settings.method, 2e-4)


def job_of(settings: Settings, model: Any = None) -> Job:
    """What the planner is asked, and `prepare` does. WrongQuestion for a setting that the method does not have."""
    from dataclasses import fields
    from importlib import import_module

    from pefttools.vram.skeleton import OURS

    options = dict(settings.options)
    try:
        if settings.method != "full":
            module, _, name = OURS[settings.method].partition(":")
            known = [each.name for each in fields(getattr(import_module(module), name))]
            for option in options:
                among("--options: setting", option, known)
            if settings.alpha is not None and "alpha" in known:
                options.setdefault("alpha", settings.alpha)
        elif options:
            raise ValueError(f"--options {', '.join(options)}: full fine-tuning has none.")
        if settings.method == "llama_adapter" and "layers" not in options and (n := layers_of(settings.model, model)):
            options["layers"] = min(n, 8)
        # keep_outputs: lab.train's logits go once the loss is there
        return Job(shapes_of(settings.model, model), settings.method, settings.batch, settings.max_length, r=settings.r,
                   targets=settings.targets, length=settings.length, width=settings.width, options=options,
                   accumulate=settings.accumulate, checkpointing=settings.checkpointing, keep_outputs=False)
    except ValueError as error:
        raise WrongQuestion(str(error)) from None


def shapes_of(name: str, model: Any = None) -> Any:
    """What tells the planner the model's shapes: a name that it knows, else a configuration where there is one."""
    from pefttools.vram.presets import config_of

    try:
        config_of(name)
        return name
    except ValueError:
        if model is not None:
            return model.config
    from pefttools.lab.base import hub_fault

    try:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(name, local_files_only=bool(hub_fault()))
    except Exception:                                          # load_base will say what is wrong with it
        return name


def layers_of(name: str, model: Any = None) -> int | None:
    """Decoder layers of the model, or None where that is not known before it is loaded."""
    from pefttools.vram.presets import config_of

    try:
        return config_of(shapes_of(name, model)).num_hidden_layers
    except (ValueError, AttributeError):
        return None


def tokenizer_for(model: str) -> Any:
    """The tokenizer alone, for the plan comes before gigabytes are loaded; the bundled one where there is none."""
    from pefttools.lab.base import LLAMA_1B, TINY, hub_fault, tokenizer_of

    if model == "tiny":
        return tokenizer_of(TINY, local_files_only=True)
    offline = not Path(model).is_dir() and bool(hub_fault())
    for name in LLAMA_1B if model.lower() == "llama-3.2-1b" else (model,):
        try:
            return tokenizer_of(name, local_files_only=offline)
        except Exception:                                      # load_base will say what is wrong with it
            continue
    return tokenizer_of(TINY, local_files_only=True)


def weights_dtype(settings: Settings) -> Any:
    """What to load the weights in. Full fine-tuning trains float32 whatever it computes in (training_engine)."""
    import torch

    return torch.float32 if settings.method == "full" else computed_in(settings)


def computed_in(settings: Settings) -> Any:
    """float32 on a CPU; on a GPU bfloat16 where it has it (a T4 only emulates it), else float16; or as asked."""
    import torch

    if settings.precision != "auto":
        return getattr(torch, settings.precision)
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def prepare(model: Any, job: Job, seed: int) -> None:
    """Quantize, attach, checkpoint: as the job says. A base that is quantized already stays as it is."""
    if job.quantization:
        from pefttools.nf4_linear import NF4Linear
        from pefttools.qlora import quantize_model

        if not any(isinstance(module, NF4Linear) for module in model.modules()):
            quantize_model(model, double_quant=job.quantization == "nf4-dq")
    if job.method == "full":
        model.requires_grad_(True)
    else:
        from pefttools.inject import attach
        from pefttools.vram.skeleton import our_config

        attach(model, our_config(job), seed=seed)
    if job.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def save(base: Any, job: Job, out: Path) -> Path:
    """peft's two files; of a full fine-tune the model and its tokenizer as transformers saves them. Each file appears
    whole or not at all; OSError says what could not be written."""
    from pefttools.checkpoint import save_adapter
    from pefttools.lab.training_checkpoint import FULL, NotWritten, cause_of, room

    try:
        return save_model(base, out) if job.method == "full" else save_adapter(base.model, out)
    except Exception as error:
        cause = cause_of(error)
        if cause is None:
            raise
        why = f"{os.strerror(cause.errno)}; {room(out)}" if cause.errno in FULL else str(cause)
        what = "model" if job.method == "full" else "adapter"
        raise NotWritten(cause.errno, f"the {what} could not be written to {out} ({why}). The training is not lost: it "
                         "is in checkpoint.pt. Make room, and run the same again: it only saves") from error


def save_model(base: Any, out: Path) -> Path:
    """transformers' files, written beside and then moved; config.json, without which nothing loads, comes last."""
    scratch = Path(tempfile.mkdtemp(prefix=".saving-", dir=out))
    try:
        base.model.save_pretrained(scratch)
        base.tokenizer.save_pretrained(scratch)
        (out / "config.json").unlink(missing_ok=True)
        for path in sorted(scratch.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, out / path.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return out
