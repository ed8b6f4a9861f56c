"""peft's own get_peft_model on a model without memory: any of its methods, from a configuration or its file's fields.

    adapter_config.json ──► peft's configuration ──► get_peft_model, made on meta ──► parameters and buffers on meta
                                                          └ indices have to be drawn: made on the CPU, then moved

What a method computes from the base's weights at the start (FRoD's decomposition, KaSA's truncation) is left out where
its result has a shape that is known. AdaMSS cannot be: the shapes of its parameters depend on those weights.
"""
from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from dataclasses import fields as fields_of
from typing import Any

import torch
from torch import Tensor, nn

from pefttools.nf4_linear import NF4Linear
from pefttools.vram.job import Job
from pefttools.vram.values import Answers

# Fields whose names have changed since published files were written.
RENAMED = {"GRALORA": {"gralora_alpha": "alpha"}}


def config_from_dict(fields: dict[str, Any]) -> Any:
    """peft's configuration from the fields of an adapter_config.json; those that this peft does not know are left out.

    Raises ValueError where a field is left out that might matter (its value is not empty), naming it.
    """
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known

    kind = fields.get("peft_type")
    if kind not in known:
        raise ValueError(f"peft_type={kind!r}: the installed peft has {', '.join(str(k.value) for k in known)}.")
    cls = known[kind]
    names = {f.name for f in fields_of(cls)} | {f.name for f in fields_of(PeftConfig)}
    renamed = RENAMED.get(kind, {})
    given = {renamed.get(key, key): value for key, value in fields.items() if key != "peft_type"}
    unknown = {key: value for key, value in given.items()
               if key not in names and value not in (None, {}, [], False, "")}
    if unknown:
        raise ValueError(f"{cls.__name__} of the installed peft has no field {', '.join(map(repr, unknown))}.")
    return cls(**{"task_type": "CAUSAL_LM"} | {key: value for key, value in given.items() if key in names})


@contextlib.contextmanager
def as_without_data() -> Iterator[None]:
    """Initialisations that compute for minutes on the base's values, and whose result has a shape that is known."""
    from torch.fx.experimental import _config as meta

    replaced: list[tuple[Any, str, Any]] = [(meta, "meta_nonzero_assume_all_nonzero", True)]
    with contextlib.suppress(ImportError):
        from peft.tuners.frod import model as frod

        replaced.append((frod, "_projection_from_weights", lambda matrices, alpha: matrices[0].new_empty(
            matrices[0].shape[1], matrices[0].shape[1])))
    before = [(place, name, getattr(place, name)) for place, name, _ in replaced]
    for place, name, value in replaced:
        setattr(place, name, value)
    try:
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


def _prepared(config: Any) -> Any:
    """A copy of the configuration; SHiRA's random mask is drawn on the CPU, for its size depends on its values."""
    config = copy.deepcopy(config)
    if getattr(config, "mask_fn", None) is not None:
        draw = config.mask_fn
        config.mask_fn = lambda base, r, **rest: draw(_on_cpu(base), r, **rest)
    return config


def _on_cpu(base: nn.Module) -> nn.Module:
    layer = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.zeros(1).expand(base.out_features, base.in_features), requires_grad=False)
    return layer


DRAWS_INDICES = ("FROD", "SHIRA", "UNILORA")


def attach_peft(model: nn.Module, config: Any, job: Job) -> nn.Module:
    """peft's own get_peft_model on the meta model; `config`: its configuration, or adapter_config.json's dictionary.

    A method that draws indices needs their values: it is built a second time with what it adds on the CPU, and that
    is moved to meta afterwards.
    """
    import peft

    if isinstance(config, dict):
        config = config_from_dict(config)
    failed: Exception | None = None
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    for device in ("cpu",) if kind in DRAWS_INDICES else ("meta", "cpu"):
        base = copy.deepcopy(model) if device == "meta" else model          # a failed attempt leaves traces
        if job.quantization:
            _as_bitsandbytes(base)
        try:
            with warnings.catch_warnings(), torch.device(device), Answers(), as_without_data():
                warnings.simplefilter("ignore")
                built = peft.get_peft_model(base, _prepared(config),
                                            autocast_adapter_dtype=job.adapter_dtype == "float32")
            return _to_meta(built)
        except (NotImplementedError, RuntimeError, ValueError, TypeError) as error:
            failed = error
    raise failed


def stays_on_host(module: nn.Module, buffer: str) -> bool:
    """Whether peft leaves this buffer of an adapter's layer on the CPU, where it made it (BOFT's permutation matrices).

    It moves what `adapter_layer_names` and `other_param_names` name (tuners_utils.py,
    `_move_adapter_to_device_of_base_layer`), and nothing else; a forward pass copies the rest each time.
    """
    names = getattr(module, "adapter_layer_names", None)
    return names is not None and hasattr(module, "base_layer") and buffer not in (
        *names, *getattr(module, "other_param_names", ()))


def _as_bitsandbytes(model: nn.Module) -> None:
    """Let peft take our 4-bit layers for bitsandbytes' own, whose products take and keep the same."""
    from bitsandbytes.nn import Linear4bit

    both = type("Linear4bit", (NF4Linear, Linear4bit), {})
    for module in model.modules():
        if type(module) is NF4Linear:
            module.__class__ = both
            module.weight.compress_statistics, module.weight.quant_type = module._q.nested, "nf4"
    model.is_loaded_in_4bit = model.is_quantized = True


def _to_meta(model: nn.Module) -> nn.Module:
    """Parameters, buffers and plain tensor attributes."""
    moved: dict[int, Tensor] = {}

    def meta(tensor: Tensor) -> Tensor:
        if tensor.device.type != "cpu" or not tensor.is_floating_point() and tensor.numel() <= 8:
            return tensor                                     # a few whole numbers: a shape that is asked for
        if id(tensor) not in moved:
            new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            moved[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
        return moved[id(tensor)]

    for module in model.modules():
        getattr(module, "_lora_kasa_truncation_deferred", set()).clear()     # KaSA: waits for values of the base
        for held in (module._parameters, module._buffers, vars(module)):
            for name, value in list(held.items()):
                if isinstance(value, Tensor):
                    held[name] = meta(value)
    return model
