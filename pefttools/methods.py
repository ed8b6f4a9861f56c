"""Which configuration reads an adapter_config.json: one row for each `peft_type`.

The modules are imported when a file asks for them. BOTTLENECK and HYPER are this library's own (peft has neither).
"""
from __future__ import annotations

from importlib import import_module
from typing import Any

METHODS = {
    "LORA": "pefttools.lora:LoRAConfig",                 # with use_dora: pefttools.dora:DoRAConfig
    "IA3": "pefttools.ia3:IA3Config",
    "LN_TUNING": "pefttools.ln_tuning:LNTuningConfig",
    "BOTTLENECK": "pefttools.placements:AdapterConfig",
    "HYPER": "pefttools.hyper_config:HyperConfig",
    "PROMPT_TUNING": "pefttools.prompt:PromptTuningConfig",
    "PREFIX_TUNING": "pefttools.prefix_config:PrefixTuningConfig",
    "P_TUNING": "pefttools.ptuning:PTuningConfig",
    "ADAPTION_PROMPT": "pefttools.llama_adapter:LlamaAdapterConfig",
}


def config_from_peft(fields: dict[str, Any]) -> Any:
    """The configuration that these fields of adapter_config.json describe.

    Raises ValueError for a method, or a setting of it, that this library does not have, KeyError for a missing field.
    """
    kind = str(fields.get("peft_type"))
    if kind not in METHODS:
        raise ValueError(f"peft_type={fields.get('peft_type')!r}; known here: {', '.join(METHODS)}.")
    place = "pefttools.dora:DoRAConfig" if kind == "LORA" and fields.get("use_dora") else METHODS[kind]
    module, _, name = place.partition(":")
    return getattr(import_module(module), name).from_peft(fields)
