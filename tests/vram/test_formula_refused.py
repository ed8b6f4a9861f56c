"""What the formula refuses says which argument, what was given, and what would do."""
from __future__ import annotations

import json

import pytest

from pefttools.vram.formula import estimate

ONE_B = "llama-3.2-1b"


@pytest.mark.parametrize("fields, words", [
    ({"model": "lama-3.2-1b"}, "Did you mean llama-3.2-1b"),
    ({"model": "phi-2"}, "does not know the layer of model_type='phi'.*simulate"),
    ({"model": "falcon-7b"}, "does not know the layer"),
    ({"method": "lorra"}, "did you mean 'lora'"),
    ({"batch": 0}, "batch=0.*at least 1"), ({"seq": -1}, "seq=-1"), ({"batch": True}, "batch=True"),
    ({"seq": 2.5}, "seq=2.5"),
    ({"r": 4096}, "r=4096 is above the rank that self_attn.q_proj .* can have: 2048"),
    ({"r": 600}, "above the rank that self_attn.v_proj .* can have: 512"),
    ({"targets": ("q_prj",)}, "'q_proj'"), ({"targets": ("q_proj", "query")}, "no module is named 'query'"),
    ({"targets": r".*\.queries"}, "selects nothing"),
    ({"options": {"layers_to_transform": [16]}}, "no layer 16"),
    ({"gpu": "v100"}, "is not known.*h100"), ({"optimizer": "adam"}, "adamw"), ({"dtype": "bf16"}, "bfloat16"),
    ({"attention": "flash2"}, "'flash'"), ({"method": "full", "quantization": "nf4"}, "cannot be trained"),
    ({"model": "gpt2", "seq": 2000}, "table of 1024 positions"), ({"model": "gemma-2-2b"}, "attention='eager'"),
    ({"gpus": 2}, "one GPU"), ({"method": "bottleneck", "library": "peft"}, "peft does not have it"),
    ({"method": "bottleneck", "options": {"placement": "houslby"}}, "houlsby"),
    ({"method": "llama_adapter", "options": {"layers": 17}}, "layers=17, but this model has 16"),
    ({"method": "llama_adapter", "model": "opt-125m"}, "LLaMA-Adapter is for"),
    ({"method": "ln_tuning", "model": "opt-125m"}, "targets must be given"),
    ({"bach": 3}, "did you mean 'batch'"),
    ({"model": {"model_type": "llama", "hidden_size": 64}}, "lacks the field")],
    ids=lambda value: json.dumps(value)[:50])
def test_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        estimate(**({"model": ONE_B} | fields))
