"""The measurements of a report card, each a function of the loaded adapter; each returns plain data."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pefttools.lab.card_files import NotAnAdapter, words
from pefttools.lab.intervals import Interval, bootstrap, paired_bootstrap

NEW_TOKENS = 72  # of an answer; the longest right one of the bundled data has 53 (a test counts)
SPEED_TOKENS = 64
TOO_LARGE = "its weights are finite, but too large to compute with. Go back to an earlier checkpoint."
METHODS = {"LORA": "lora", "IA3": "ia3", "PROMPT_TUNING": "prompt", "PREFIX_TUNING": "prefix", "P_TUNING": "ptuning",
           "LN_TUNING": "ln_tuning", "ADAPTION_PROMPT": "llama_adapter", "BOTTLENECK": "bottleneck"}


@dataclass
class Loaded:
    """The base with the adapter acting."""

    base: Any
    method: str
    trained: int
    total: int
    device: torch.device

    @property
    def model(self) -> Any:
        return self.base.model

    @property
    def tokenizer(self) -> Any:
        return self.base.tokenizer

    def off(self) -> Any:
        """`with loaded.off():` the base alone."""
        from pefttools.inject import disabled

        return disabled(self.model)


def load(folder: Path, name: str) -> Loaded:
    """The base and the adapter on it. Raises NotAnAdapter where the two do not fit, ValueError without a base."""
    from pefttools.attached import adapter_parameters, count_parameters
    from pefttools.checkpoint import load_adapter
    from pefttools.lab.base import load_base

    base = load_base(name, quiet=True)
    if base.name == "tiny" and name != "tiny":
        raise ValueError(f"base {name!r} cannot be loaded here, {base.why}: an adapter is measured on its own base "
                         "only")
    try:
        load_adapter(base.model, folder)
    except (OSError, ValueError, TypeError) as error:
        raise NotAnAdapter(f"{words(error)} The base was {name!r}; --base takes another.") from None
    config = type(base.model._pefttools.config).__name__.removesuffix("Config")
    trained = sum(p.numel() for p in adapter_parameters(base.model).values())
    return Loaded(base, config, trained, count_parameters(base.model)[1], next(base.model.parameters()).device)


def plain(found: Interval) -> dict[str, float]:
    return {"value": found.value, "low": found.low, "high": found.high}


def both(adapter: Interval, base: Interval, difference: Interval) -> dict[str, dict[str, float]]:
    """adapter − base is paired: over the same rows."""
    return {"adapter": plain(adapter), "base": plain(base), "difference": plain(difference)}


# ------------------------------------------------------------------------------------------------ quality

def losses(loaded: Loaded, rows: Sequence[dict], seed: int) -> dict[str, Any]:
    """Loss and perplexity per target token, with intervals over rows."""
    from pefttools.lab.losses import row_losses

    with loaded.off():
        before, counts = zip(*row_losses(loaded.model, loaded.tokenizer, rows))
    after, _ = zip(*row_losses(loaded.model, loaded.tokenizer, rows))
    if broken := sum(not math.isfinite(nats) for nats in after):
        raise NotAnAdapter(f"With this adapter the loss is no number on {broken} of {len(rows)} held-out rows: "
                           f"{TOO_LARGE}")
    ours, theirs = bootstrap(after, counts, seed=seed), bootstrap(before, counts, seed=seed)
    change = paired_bootstrap(after, before, counts, seed=seed)
    ratio = Interval(*map(_exp, change))
    return {"rows": len(rows), "loss": both(ours, theirs, change),
            "perplexity": {"adapter": plain(Interval(*map(_exp, ours))),
                           "base": plain(Interval(*map(_exp, theirs))), "ratio": plain(ratio)}}


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))  # e to the 710 is no float any more


def passing(loaded: Loaded, rows: Sequence[dict], seed: int, base_too: bool = True) -> dict[str, Any]:
    """Greedy pass@1, with Wilson's intervals; the difference is a paired bootstrap over rows."""
    from pefttools.lab.evaluation import evaluate

    with loaded.off():
        before = evaluate(loaded.model, loaded.tokenizer, rows, max_new_tokens=NEW_TOKENS) if base_too else None
    after = evaluate(loaded.model, loaded.tokenizer, rows, max_new_tokens=NEW_TOKENS)
    found = {"rows run": len(rows), "programs ran in": after.where,
             "worst kinds": [[kind, *count] for kind, count in list(after.by_kind.items())[:5]]}
    if before is None:
        return {**found, "pass@1": {"adapter": plain(after.pass_at(1))}}
    return {**found, "pass@1": both(after.pass_at(1), before.pass_at(1),
                                    paired_bootstrap(after.values(), before.values(), seed=seed))}


def sampled(loaded: Loaded, rows: Sequence[dict], samples: int, temperature: float, seed: int) -> dict[str, Any]:
    """pass@k for k = samples, of answers drawn at `temperature`, adapter and base."""
    from pefttools.lab.evaluation import evaluate

    def run():
        return evaluate(loaded.model, loaded.tokenizer, rows, max_new_tokens=NEW_TOKENS, samples=samples,
                        temperature=temperature, k=(samples,), seed=seed)

    with loaded.off():
        before = run()
    try:
        after = run()
    except RuntimeError as error:
        if "probability tensor" in str(error):  # torch's words for NaN or infinity where probabilities should be
            raise NotAnAdapter(f"With this adapter no token can be drawn: {TOO_LARGE}") from None
        raise
    return {"rows sampled": len(rows), "samples": samples, "temperature": temperature,
            f"pass@{samples}": both(after.pass_at(samples), before.pass_at(samples),
                                    paired_bootstrap(after.values(samples), before.values(samples), seed=seed))}


# ------------------------------------------------------------------------------------------------ the rest

def forgotten(loaded: Loaded, documents: int, seed: int) -> dict[str, Any]:
    """Loss on base-domain text, adapter off and on."""
    from pefttools.lab.base_domain import base_texts, forgetting

    found = forgetting(loaded.model, loaded.tokenizer, base_texts(documents), seed=seed)
    note = ("These documents were kept out of the bundled model's pretraining; this base has probably read them. The "
            "change is about forgetting all the same.")
    return {"documents": len(found.rows), "tokens": sum(row["tokens"] for row in found.rows),
            "before": plain(found.before), "after": plain(found.after), "change": plain(found.change),
            "note": "" if loaded.base.name == "tiny" else note}


def safe(loaded: Loaded, n: int, seed: int) -> dict[str, Any]:
    """The rates of `redteam.safety`; where they cannot be taken, the reason."""
    try:
        from pefttools.lab.redteam import safety

        found = safety(loaded.model, loaded.tokenizer, n=n, seed=seed)
    except ImportError as error:
        return {"not measured": f"{error.name or error} is missing: pip install pefttools[redteam]"}
    nothing = {"not applicable": "nothing that the model wrote could be looked at"}
    return {what: {name: getattr(rate, name) for name in ("value", "low", "high", "hits", "n")} if rate.n else nothing
            for what, rate in found.items()}


def memory(loaded: Loaded, config: dict[str, Any], batch: int = 4, seq: int = 256) -> dict[str, Any]:
    """Planned GPU memory of one training step of this method on this base, and of full fine-tuning beside it."""
    from pefttools.vram import estimate

    kind = METHODS.get(str(config.get("peft_type")))
    method = "dora" if kind == "lora" and config.get("use_dora") else kind
    if method is None:
        return {"not applicable": f"the planner has no method for peft_type={config.get('peft_type')!r}"}
    dtype = str(next(loaded.model.parameters()).dtype).removeprefix("torch.")
    if dtype not in ("float32", "bfloat16", "float16"):
        dtype = "bfloat16"
    try:
        planned = estimate(loaded.model.config, method, batch, seq, dtype=dtype, **_settings(method, config))
        full = estimate(loaded.model.config, "full", batch, seq, dtype=dtype)
    except (ValueError, TypeError) as error:
        return {"not applicable": f"the planner does not know it: {error}"}
    return {"method": method, "batch": batch, "seq": seq, "dtype": dtype, "trainable": planned.trainable,
            "bytes": planned.total,
            "terms": {name: size for name, size in planned.terms.items() if size},
            "full fine-tuning, bytes": full.total, "by": planned.by}


def _settings(method: str, config: dict[str, Any]) -> dict[str, Any]:
    """What the planner asks about a method, from the fields of the adapter's configuration."""
    if method in ("lora", "dora"):
        targets = config.get("target_modules")
        return {"r": config.get("r") or 8, "targets": tuple(targets) if isinstance(targets, list) else targets}
    if method == "bottleneck":
        width = {"bottleneck": config["bottleneck"]} if config.get("bottleneck") else {
            "reduction_factor": config.get("reduction_factor") or 16}
        return {"options": {"placement": config.get("placement", "pfeiffer"), **width}}
    if method == "llama_adapter":
        return {"length": config["adapter_len"], "options": {"layers": config["adapter_layers"]}}
    return {"length": config["num_virtual_tokens"]} if "num_virtual_tokens" in config else {}


def speed(loaded: Loaded, rounds: int, tokens: int = SPEED_TOKENS) -> dict[str, Any]:
    """Tokens per second of one greedy answer, rounds interleaved: base, adapter, merged. Medians and extremes."""
    from pefttools.inject import merge, unmerge

    model, tokenizer = loaded.model, loaded.tokenizer
    ids = torch.tensor([[tokenizer.bos_token_id if tokenizer.bos_token_id is not None else 0,
                         *tokenizer("Write a function", add_special_tokens=False)["input_ids"]]], device=loaded.device)

    def once() -> float:
        began = time.perf_counter()
        with torch.no_grad():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
                           min_new_tokens=tokens, do_sample=False, temperature=None, top_p=None, top_k=None,
                           pad_token_id=tokenizer.pad_token_id)
        if loaded.device.type == "cuda":
            torch.cuda.synchronize()
        return tokens / (time.perf_counter() - began)

    seen: dict[str, list[float]] = {"base": [], "adapter": [], "merged": []}
    why = ""
    once()
    for _ in range(rounds):
        with loaded.off():
            seen["base"].append(once())
        seen["adapter"].append(once())
        try:
            merge(model)
        except (ValueError, TypeError) as error:
            why = words(error)
            continue
        seen["merged"].append(once())
        unmerge(model)
    found: dict[str, Any] = {name: {"value": statistics.median(each), "low": min(each), "high": max(each)}
                             for name, each in seen.items() if each}
    if why:
        found["merged"] = {"not applicable": why}
    return {"new tokens": tokens, "rounds": rounds, "tokens per second": found,
            "note": "one answer at a time; medians, slowest and fastest round on this machine as busy as it was"}
