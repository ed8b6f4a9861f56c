"""Trainable parameters by formula, library and peft, every preset × method: `python -m pefttools.vram.counts`.

    formula     terms/adapters.py, from the configuration alone
    pefttools   attach() on the meta device, counted
    peft        get_peft_model() on the meta device, counted, where peft has the method

With `--layers 2` each model has two decoder layers (they are alike, so that the counts of a layer are compared, and a
test can do it in a minute); without, all of them.
"""
from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from pefttools.vram.job import METHODS, Job
from pefttools.vram.preset_data import PRESETS
from pefttools.vram.presets import config_of
from pefttools.vram.shape import FAMILIES, shape_of


class Count(NamedTuple):
    """One comparison; None where a library does not have the method for the model."""

    preset: str
    method: str
    formula: int
    pefttools: int | None
    peft: int | None

    @property
    def agree(self) -> bool:
        return all(other in (None, self.formula) for other in (self.pefttools, self.peft))


def presets() -> list[str]:
    """Those whose layer the formula knows."""
    return [name for name, (fields, _, _) in PRESETS.items() if fields["model_type"] in FAMILIES]


def with_layers(name: str, layers: int | None) -> Any:
    """The preset's configuration, with fewer layers."""
    config = copy.deepcopy(config_of(name))
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    return config


def job_of(config: Any, method: str, library: str, **fields: Any) -> Job:
    """A job on all matrices where the method has a choice; LLaMA-Adapter in the two upper layers."""
    fields = dict(fields)
    if method in ("lora", "qlora", "dora", "qdora"):
        fields.setdefault("targets", "all-linear")
    if method == "llama_adapter":
        fields["options"] = {"layers" if library == "pefttools" else "adapter_layers": 2}
    kind = config.model_type
    eager = {"attention": "eager"} if kind == "gemma2" else {}
    return Job(config, method, library=library, quantization=None, **eager, **fields)


def exists(kind: str, method: str, library: str) -> bool:
    """Whether the library has the method for this type of model, with its own choice of layers."""
    if method == "llama_adapter":
        return kind in ("llama", "mistral", "gpt2") or library == "pefttools" and kind == "qwen2"
    if method == "ln_tuning":
        return kind != "opt"
    return library == "pefttools" or method not in ("full", "bottleneck")


def built(job: Job) -> int:
    """Trainable parameters of the model with the method attached, on meta."""
    from pefttools.vram.skeleton import build

    return sum(parameter.numel() for parameter in build(job).parameters() if parameter.requires_grad)


def compare(name: str, methods: Iterator[str] | list[str] = tuple(METHODS), layers: int | None = None,
            libraries: tuple[str, ...] = ("pefttools", "peft"), **fields: Any) -> Iterator[Count]:
    """A Count for each method that the preset can have; `fields` are of the Job (r, width, …)."""
    from pefttools.vram.terms.adapters import trainable

    config = with_layers(name, layers)
    shape = shape_of(config)
    for method in methods:
        if not exists(config.model_type, method, "pefttools"):
            continue
        said = trainable(job_of(config, method, "pefttools", **fields), shape)
        counts = {library: built(job_of(config, method, library, **fields))
                  if library in libraries and exists(config.model_type, method, library) else None
                  for library in ("pefttools", "peft")}
        yield Count(name, method, said, counts["pefttools"], counts["peft"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pefttools.vram.counts", description=__doc__.split("\n")[0])
    parser.add_argument("presets", nargs="*", help="names of presets (default: all)")
    parser.add_argument("--layers", type=int, help="so many decoder layers in each instead of all")
    given = parser.parse_args(arguments)
    wrong = checked = 0
    for name in given.presets or presets():
        for count in compare(name, layers=given.layers):
            checked += 1
            wrong += not count.agree
            print(f"{'' if count.agree else 'DIFFERS '}{count.preset:16} {count.method:14} {count.formula:>18,}"
                  + "".join(f"  {library} {n:,}" if n is not None else f"  {library} –"
                            for library, n in (("pefttools", count.pefttools), ("peft", count.peft))), flush=True)
    print(f"{checked - wrong} of {checked} agree.")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
