"""PEFT's own comparison of methods on MetaMathQA, run by run: what each was, and its memory on the simulator.

    experiment("lora/llama-3.2-3B-rank64")  ──►  Run(adapter_config, batch, …)  ──►  run.simulate()  ──►  Memory

The facts are those of huggingface/peft, method_comparison/MetaMathQA: run.py, utils.py, default_training_params.json
and every experiments/*/*/{adapter_config,training_params}.json, in published/peft_experiments.json with their commits.
Every run is one Llama-3.2-3B in bfloat16 on an L40S, adapters in float32, AdamW, clipping at 1.0, no autocast.

What is measured is max_memory_reserved() over everything since the model was there (less that of one nn.Linear(1, 1)):

    training      batch 4, texts of one bucket of 80 sorted longest first, padded to the longest; a mask is passed, and
                  where it masks anything, keys and values are repeated for all heads. A DynamicCache is built too
                  (nobody switches it off) and stays in `outputs`. torch.cuda.empty_cache() every 10 steps, the last
                  time just before each bucket: the widest batch finds an empty cache
    generation    batch 50, at most 800 tokens, under inference_mode: `generation_bytes`
    wiki loss     batch 4, at most 768 tokens, no labels; the logits of the batch before are still held: `wiki_bytes`

The last two are below the first in every run (`Run.phases`: bounds of 9 and 14 GiB, against 18 GiB and more).

**How wide is the widest batch?** Not published. The script states a limit of 768 tokens, and four texts cut there,
which need no padding, are what `Run.simulate` takes. It was chosen after the errors of several readings had been seen;
texts of several lengths, padded, are likelier, and at 768 they miss the aims. What the real widest batch was, the data
would say, and they are not here; some evidence is in `read_width`, and the page shows how the errors depend on it.
"""
from __future__ import annotations

import dataclasses
import difflib
import functools
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from pefttools.vram.memory import Memory

STATED = 768                              # tokens: default_training_params.json, max_seq_length
WIDTH_RUN, WIDTH_BYTES = "lora/llama-3.2-3B-rank64", 22_540_189_696        # see `read_width`
MODEL, GPU = "llama-3.2-3b", "l40s"
RENAMED = {("GRALORA", "gralora_alpha"): "alpha"}
SHAPES = {"layers": 28, "kv": 1024, "vocab": 128_256}          # of Llama-3.2-3B


@functools.cache
def facts() -> dict[str, Any]:
    """published/peft_experiments.json."""
    return json.loads((files("pefttools.vram") / "published" / "peft_experiments.json").read_text(encoding="utf-8"))


def names() -> list[str]:
    return list(facts()["experiments"])


@dataclass(frozen=True)
class Run:
    """One experiment. `config`: adapter_config.json (None: every weight is trained); `training`: what it changes."""

    name: str
    config: dict[str, Any] | None
    training: dict[str, Any]
    commit: str
    note: str = ""

    @property
    def batch(self) -> int:
        return self.training["batch_size"]

    @property
    def missing(self) -> str:
        """Why the installed peft cannot run it; "" if it can."""
        return _missing(self.config)

    def peft_config(self) -> Any:
        """The installed peft's configuration. Raises ValueError where it has none (`missing`)."""
        if self.missing:
            raise ValueError(f"{self.name}: {self.missing}")
        return None if self.config is None else _config(self.config)

    def simulate(self, width: int = STATED, padded: bool = False) -> Memory:
        """Peak of the training step of the widest batch, as this script runs it, in a batch of `width` tokens.

        Raises ValueError: see `missing`.
        """
        from pefttools.vram import simulator, skeleton
        from pefttools.vram.job import make_job

        job = make_job(MODEL, "full" if self.config is None else "lora", self.batch, width, library="peft", gpu=GPU,
                       padded=padded,
                       adapter_dtype="float32" if self.training["autocast_adapter_dtype"] else "bfloat16")
        model = skeleton.build_base(job)
        if self.config is not None:
            model = skeleton.attach_peft(model, self.peft_config(), job)
        if self.training["optimizer_type"] == "lora-fa":       # create_lorafa_optimizer: A stays as it was drawn
            for name, parameter in model.named_parameters():
                if "lora_A" in name:
                    parameter.requires_grad_(False)
        return simulator.run(job, model.train(), use_cache=True, empty_cache=True, mask=True)

    def phases(self, training: Memory) -> dict[str, int]:
        """Upper bounds of the other phases beside the training step, in bytes."""
        lasting = sum(training.terms[term] for term in ("weights", "constants", "adapter", "optimizer"))
        return {"training": training.reserved, "generation": generation_bytes(lasting), "wiki": wiki_bytes(lasting)}


def experiment(name: str) -> Run:
    """The run of this name ("lora/llama-3.2-3B-rank64"; "--" for "/", as the results' files have it, will do).

    Raises ValueError for an unknown one, with the nearest names.
    """
    known = facts()["experiments"]
    plain = name.removesuffix(".json").rpartition("results/")[2].replace("--", "/", 1)
    if plain not in known:
        near = difflib.get_close_matches(plain, known, n=3, cutoff=0.4)
        raise ValueError(f"{name!r} is no experiment of PEFT's MetaMathQA comparison that is known here; "
                         + (f"the nearest are {', '.join(near)}." if near else f"there are {len(known)}: see names()."))
    entry = known[plain]
    training = {**facts()["training"], **entry.get("training_params", {})}
    return Run(plain, entry["adapter_config"], training, entry["commit"], entry.get("note", ""))


def generation_bytes(lasting: int, batch: int = 50, length: int = 800) -> int:
    """At most: what lasts, keys and values of `batch` texts of `length` tokens (one layer's twice while it grows), the
    first pass's feed-forward part and embeddings in bfloat16 and float32, the last token's logits twice in float32."""
    cache = 2 * 2 * batch * length * SHAPES["kv"] * (SHAPES["layers"] + 1)
    return lasting + cache + batch * length * (3 * 2 * 8192 + 3 * 4 * 3072) + 2 * 4 * batch * SHAPES["vocab"]


def wiki_bytes(lasting: int, batch: int = 4, length: int = STATED) -> int:
    """At most: what lasts, logits and keys and values of two batches, one text's logits and log-probabilities."""
    held = batch * length * (2 * SHAPES["vocab"] + 2 * 2 * SHAPES["kv"] * SHAPES["layers"])
    return lasting + 2 * held + 2 * 4 * length * SHAPES["vocab"] + batch * length * (3 * 2 * 8192 + 3 * 4 * 3072)


def read_width(low: int = 640, high: int = STATED) -> int:
    """The width of a padded batch at which the simulator gives what one run measured; used by nothing here.

    The run is no row of our table: lora/llama-3.2-3B-rank64 as it was in June 2025 (its results file at commit
    18e07f189c06, accelerator_memory_max 22,540,189,696 bytes). By bisection, some ten simulations.
    """
    def off(width: int) -> int:
        return experiment(WIDTH_RUN).simulate(width, padded=True).reserved - WIDTH_BYTES

    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if off(middle) <= 0 else (low, middle)
    return min((low, high), key=lambda width: abs(off(width)))


# ------------------------------------------------------------------------------------------------ the installed peft

def _config(given: dict[str, Any]) -> Any:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = given["peft_type"]
    fields = {RENAMED.get((kind, key), key): value for key, value in given.items() if key != "peft_type"}
    return PEFT_TYPE_TO_CONFIG_MAPPING[kind](**fields)


def _missing(given: dict[str, Any] | None) -> str:
    if given is None:
        return ""
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = given["peft_type"]
    cls = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if cls is None:
        return f"peft {peft.__version__} has no tuner {kind}"
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = [key for key in given if key != "peft_type" and RENAMED.get((kind, key), key) not in known]
    if unknown:
        return f"peft {peft.__version__}'s {cls.__name__} has no field {', '.join(unknown)}"
    try:
        _config(given)
    except (ImportError, ValueError, TypeError) as error:
        return f"peft {peft.__version__}: {error}"
    return ""
