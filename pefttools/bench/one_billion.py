"""A model of Llama-3.2-1B's shape, quantized to NF4 and trained for one QLoRA step, in a process of its own.

    python -m pefttools.bench.one_billion                          prints one line of JSON
    python -m pefttools.bench.one_billion --with bitsandbytes      the same with bitsandbytes' layers and peft's LoRA

1,235,814,400 random weights in bfloat16, of which 973,078,528 are in linear layers; NF4 with double quantization, LoRA
with r = 16 on every linear layer, batch 1 × 128 tokens, forward, loss, backward, AdamW.

    layer by layer:  allocate ► fill ► quantize ► free     ► attach LoRA ► step
                     └─ build_s ─┘   └ quantize_s ┘          └ attach_s   └ step_s

A decoder layer is filled and quantized before the next is allocated, so that the model never stands in memory in 16
bits: what a loader does that reads a file layer by layer. Filling (tiles of one random block; a plain initialisation
takes 14 s) is what reading a file would be, so it is timed apart and not in `total_s`, which is quantize_s + step_s.
`step_s` is the first step, with all that happens only once; `steps_s` has those asked for with --steps.
`peak_rss_gb` is the process's, imports and all, in 10⁹ bytes.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256, "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LIBRARIES = ("pefttools", "bitsandbytes")


def run(library: str = "pefttools", tokens: int = 128, batch: int = 1, steps: int = 1, r: int = 16,
        eager: bool = False, shape: dict[str, Any] | None = None) -> dict[str, Any]:
    """Everything, in this process: → seconds, bytes, parameters, losses. `shape` changes entries of `LLAMA_1B`.

    eager: pefttools without its C kernels; else it builds them amid quantize_s. Raises ValueError for another library
    than "pefttools" and "bitsandbytes".
    """
    if library not in LIBRARIES:
        raise ValueError(f"library must be one of {LIBRARIES}; got {library!r}.")
    import torch
    import transformers

    quantize, adapt = _ours(eager) if library == "pefttools" else _theirs()
    seconds = dict.fromkeys(("build_s", "quantize_s", "attach_s"), 0.0)
    clock = _Clock(seconds)

    config = transformers.LlamaConfig(**LLAMA_1B | (shape or {}))
    with clock("build_s"):
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        parameters = sum(p.numel() for p in model.parameters())
        tile = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
        model.model.rotary_emb = type(model.model.rotary_emb)(config)            # its buffer is no parameter
        for part in (model.model.embed_tokens, model.model.norm):
            _fill(part, tile)
        model.tie_weights()
    for layer in model.model.layers:
        with clock("build_s"):
            _fill(layer, tile)
        with clock("quantize_s"):
            quantize(layer)
    with clock("attach_s"):
        model = adapt(model, r)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=2e-4)
    ids = torch.randint(config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(1))

    model.train()
    losses, times, before = [], [], _rss()
    for _ in range(steps):
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(round(time.perf_counter() - start, 3))
        losses.append(loss.item())
    return {"library": library, "eager": eager, "threads": torch.get_num_threads(), "batch": batch,
            "tokens": tokens, "parameters": parameters, "trained": sum(p.numel() for p in trained),
            **{key: round(value, 3) for key, value in seconds.items()}, "step_s": times[0], "steps_s": times,
            "total_s": round(seconds["quantize_s"] + times[0], 3), "rss_before_step_gb": round(before / 1e9, 3),
            "peak_rss_gb": round(_peak() / 1e9, 3), "losses": losses}


# ------------------------------------------------------------------------------------------------ the two libraries

def _ours(eager: bool) -> tuple:
    from pefttools import nf4_compiled
    from pefttools.inject import attach
    from pefttools.lora import LoRAConfig
    from pefttools.qlora import quantize_model

    def quantize(layer: Any) -> None:
        if eager:
            nf4_compiled.use(False)
        quantize_model(layer, double_quant=True, progress=False)

    return quantize, lambda model, r: attach(model, LoRAConfig(r=r, alpha=2 * r, target_modules=TARGETS))


def _theirs() -> tuple:
    from torch import nn

    import peft
    from bitsandbytes.nn import Linear4bit, Params4bit

    from pefttools.bnb import make_safe

    def quantize(layer: nn.Module) -> None:
        for name, base in list(layer.named_modules()):
            if type(base) is nn.Linear:
                new = Linear4bit(base.in_features, base.out_features, base.bias is not None, quant_type="nf4",
                                 compute_dtype=base.weight.dtype, compress_statistics=True, device="meta")
                new.weight = Params4bit(base.weight.data, requires_grad=False, quant_type="nf4", module=new).to("cpu")
                layer.set_submodule(name, new)

    def adapt(model: nn.Module, r: int) -> nn.Module:
        model.is_loaded_in_4bit = True
        return peft.get_peft_model(make_safe(model), peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=TARGETS))

    return quantize, adapt


# ------------------------------------------------------------------------------------------------ helpers

def _fill(module: Any, tile: Any) -> None:
    """Allocate a module of the meta device on the CPU: matrices from the tile, norms 1."""
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1)
        else:
            for part in parameter.data.view(-1).split(len(tile)):
                part.copy_(tile[:len(part)])


class _Clock:
    """`with clock("build_s"):` adds the block's seconds to that entry."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds

    def __call__(self, name: str) -> _Clock:
        self.name = name
        return self

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.name] += time.perf_counter() - self.start


def _status(field: str) -> int | None:
    """Bytes in a line of /proc/self/status; None where there is none (not Linux)."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def _rss() -> int:
    return _status("VmRSS") or 0


def _peak() -> int:
    if peak := _status("VmHWM"):
        return peak
    import resource                                                              # not on Windows

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


def main(arguments: list[str] | None = None) -> None:
    """The command line; prints one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m pefttools.bench.one_billion", description=__doc__.splitlines()[0])
    parser.add_argument("--with", dest="library", choices=LIBRARIES, default=LIBRARIES[0])
    for name, value in (("tokens", 128), ("batch", 1), ("steps", 1), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--eager", action="store_true", help="pefttools without its C kernels")
    parser.add_argument("--shape", type=json.loads, default={}, metavar="JSON", help='such as {"num_hidden_layers": 2}')
    given = parser.parse_args(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import torch

    torch.set_num_threads(given.threads)
    print(json.dumps(run(given.library, given.tokens, given.batch, given.steps, eager=given.eager,
                         shape=given.shape)))


if __name__ == "__main__":
    main()
