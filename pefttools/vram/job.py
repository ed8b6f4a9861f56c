"""What is to be run: one training step, described once for the formula, the simulator and the planner.

    Job(model="llama-3.2-1b", method="qlora", batch=4, seq=2048, checkpointing=True)

Every field has one meaning everywhere, and a wrong one is refused here, with the nearest names that exist.
"""
from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields, replace
from typing import Any

METHODS = {
    "full": "every weight is trained",
    "lora": "W + (α/r)BA on the target layers",
    "qlora": "LoRA on a base in NF4 with double quantization",
    "dora": "LoRA with a trained magnitude per output",
    "qdora": "DoRA on a base in NF4 with double quantization",
    "bottleneck": "adapters: down, nonlinearity, up, added (Houlsby, Pfeiffer, parallel …: options={'placement': …})",
    "ia3": "learned factors of keys, values and the feed-forward activation",
    "ln_tuning": "the normalisation layers' weights only",
    "prompt": "trained input embeddings before the text",
    "ptuning": "prompt tuning through a small encoder",
    "prefix": "trained keys and values before the text, in every layer",
    "llama_adapter": "trained prompts with a gate at zero, in the upper layers",
}
QUANTIZED = {"qlora": "nf4-dq", "qdora": "nf4-dq"}
QUANTIZATIONS = (None, "nf4", "nf4-dq")
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "sgd", "adafactor")
ATTENTION = ("sdpa", "flash", "eager")  # sdpa: the kernel that torch would choose on that GPU for that mask
LIBRARIES = ("pefttools", "peft")


@dataclass(frozen=True)
class Job:
    """One training step of a causal language model.

    model          a preset ("llama-3.2-1b", see `presets.py`), a transformers configuration, or its dictionary
    method         a key of METHODS
    batch, seq     rows, and tokens in a row, of one forward pass on one GPU; padding included
    r, targets     rank, and target modules in peft's meaning (None: the method's default for the model); LoRA kinds
    length         virtual tokens of prompt, ptuning, prefix, llama_adapter; width of a bottleneck is `width`
    options        further fields of the method's configuration, by its own names
    quantization   of the frozen base: None, "nf4", "nf4-dq" (default: what the method says)
    dtype          of the base and of the computation; `adapter_dtype` of what is trained (full: the base's)
    optimizer      a member of OPTIMIZERS; `accumulate` passes are summed before one step of it
    clip           gradient clipping by global norm, as Trainer and most scripts do
    checkpointing  each decoder layer is run again in the backward pass (non-reentrant)
    attention      "sdpa", "flash" or "eager"; `padded`: rows of several lengths, so that a mask is passed
    gpus           > 1: accelerate's FSDP, fully sharded
    library        whose code runs: "pefttools" or "peft" (peft saves more; see the chapter)
    gpu            a name of `gpus.py`: decides which attention kernels exist, and what fits
    master         full fine-tuning only: weights in float32, computed in `dtype` under autocast
    keep_outputs   the model's outputs (the logits, 2 bytes a number) live on until the step ends, as in a script that
                   says `outputs = model(…)`; Trainer lets them go before the backward pass
    shapes         (batch, seq) of batches of other sizes that were trained on before; the peak is the last batch's

    Raises ValueError: says which field, what was given, and what would do.
    """

    model: Any
    method: str = "lora"
    batch: int = 1
    seq: int = 512
    r: int = 16
    targets: str | tuple[str, ...] | None = None
    length: int = 20
    width: int = 64
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    quantization: str | None = "method"
    dtype: str = "bfloat16"
    adapter_dtype: str = "float32"
    optimizer: str = "adamw"
    accumulate: int = 1
    clip: bool = True
    checkpointing: bool = False
    attention: str = "sdpa"
    padded: bool = False
    gpus: int = 1
    library: str = "pefttools"
    gpu: str | None = None
    master: bool = False
    keep_outputs: bool = True
    shapes: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("dtype", DTYPES), ("adapter_dtype", DTYPES), ("optimizer", OPTIMIZERS),
                            ("attention", ATTENTION), ("library", LIBRARIES)):
            among(name, getattr(self, name), known)
        for name in ("batch", "seq", "r", "length", "width", "accumulate", "gpus"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: a whole number of at least 1 is needed.")
        if self.quantization == "method":
            object.__setattr__(self, "quantization", QUANTIZED.get(self.method))
        among("quantization", self.quantization, QUANTIZATIONS)
        if self.method == "full" and self.quantization:
            raise ValueError(f"quantization={self.quantization!r} with method='full': codes of 4 bits cannot be trained. "
                             "Use method='qlora', or quantization=None.")
        if self.master and self.method != "full":
            raise ValueError(f"master=True with method={self.method!r}: adapters are float32 already (adapter_dtype). "
                             "Use method='full', or master=False.")
        if any(len(shape) != 2 or min(shape) < 1 for shape in self.shapes):
            raise ValueError(f"shapes={self.shapes!r}: pairs (batch, seq) of whole numbers of at least 1 are needed.")
        if isinstance(self.targets, list):
            object.__setattr__(self, "targets", tuple(self.targets))

    def but(self, **changes: Any) -> Job:
        """The same job with some fields changed."""
        if unknown := set(changes) - {f.name for f in fields(self)}:
            raise ValueError(f"{unknown.pop()!r} is no field of a job; there are {', '.join(f.name for f in fields(self))}.")
        if "method" in changes and "quantization" not in changes:
            changes["quantization"] = "method"
        return replace(self, **changes)


def make_job(model: Any, method: str = "lora", batch: int = 1, seq: int = 512, **options: Any) -> Job:
    """A Job from the arguments of `estimate` and `simulate`; `model` may be a Job already, then options change it."""
    known = [f.name for f in fields(Job)]
    for name in options:
        among("argument", name, known)
    if isinstance(model, Job):
        return model.but(**options) if options else model
    return Job(model, method, batch, seq, **options)


def among(name: str, value: Any, known: Any) -> None:
    """Raise ValueError unless `value` is one of `known`; names the nearest."""
    if value in known:
        return
    names = [str(each) for each in known]
    near = difflib.get_close_matches(str(value), names, n=3, cutoff=0.5)
    raise ValueError(f"{name}={value!r} is not known; {'did you mean ' + ' or '.join(map(repr, near)) + '? ' if near else ''}"
                     f"There are {', '.join(names)}.")
