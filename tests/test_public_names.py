"""The names that people import: they stay, with the arguments that the documents promise."""
from __future__ import annotations

import importlib
import inspect

import pytest

NAMES = {
    "pefttools.rank": {"row_echelon": "A", "matrix_rank": "A tol", "low_rank": "A k", "effective_rank": "A",
                       "subspace_similarity": "A B i j"},
    "pefttools.nf4": {"NF4_CODE": None, "nf4_codebook": "", "quantize_nf4": "w block_size double_quant",
                      "dequantize_nf4": "q", "NF4Tensor": None},
    "pefttools.lora": {"LoRALinear": "base r alpha dropout rslora", "LoRAConfig": None},
    "pefttools.dora": {"DoRALinear": "base r alpha"},
    "pefttools.qlora": {"NF4Linear": "base block_size double_quant compute_dtype", "quantize_model": "model"},
    "pefttools.adapters": {"BottleneckAdapter": "d_model bottleneck activation"},
    "pefttools.prefix": {"PrefixTuning": "config length", "PromptTuning": None, "LlamaAdapter": None},
    "pefttools.inject": {"attach": "model config", "detach": "model", "disabled": "model", "merge": "model",
                         "unmerge": "model", "trainable": "model"},
    "pefttools.checkpoint": {"save_adapter": "model folder", "load_adapter": "model folder"},
    "pefttools.vram": {"estimate": "model method batch seq", "simulate": "model method batch seq", "plan": "model gpu",
                       "Memory": None},
    "pefttools.lab": {"load_base": "name", "load_data": "split", "train": "model data", "generate": None, "evaluate": None},
    "pefttools.grading": {"Exercise": None, "check": "exercise work", "grade": "submissions chapter out"},
}
DEFAULTS = {("pefttools.nf4", "quantize_nf4", "block_size"): 64, ("pefttools.nf4", "quantize_nf4", "double_quant"): False,
            ("pefttools.qlora", "NF4Linear", "double_quant"): True, ("pefttools.lora", "LoRALinear", "dropout"): 0.0,
            ("pefttools.adapters", "BottleneckAdapter", "activation"): "relu"}


@pytest.mark.parametrize("module, name", [(module, name) for module, names in NAMES.items() for name in names])
def test_a_public_name_with_its_arguments(module, name):
    found = getattr(importlib.import_module(module), name)
    wanted = NAMES[module][name]
    if wanted is None:
        return
    parameters = [p for p in inspect.signature(found).parameters if p != "self"]
    assert parameters[:len(wanted.split())] == wanted.split()
    for p in parameters:
        if (module, name, p) in DEFAULTS:
            assert inspect.signature(found).parameters[p].default == DEFAULTS[module, name, p]
