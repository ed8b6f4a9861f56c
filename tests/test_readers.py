"""A method's file can be read in one sitting, and who knows the paper finds its symbols there."""
from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import pefttools

LINES = 212       # "about 200", docstring included

# module: (source, symbols of the paper in the docstring, what implements them)
METHODS = {
    "rank": ("Eckart & Young", "σ₁ U S Vᵀ", "matrix_rank low_rank effective_rank"),
    "elimination": ("pivot", "row", "row_echelon"),
    "subspace": ("Hu et al. 2021", "φ U_A i j", "subspace_similarity"),
    "intrinsic": ("arXiv:1804.08838", "θ₀ P d λᵢ", "IntrinsicSubspace d90"),
    "absmax": ("arXiv:2208.07339", "127 a ŵ", "quantize_rowwise quantize_blockwise"),
    "codebook": ("arXiv:2305.14314", "absmax NF4 FP4", "nf4_codebook lloyd_max"),
    "blockwise": ("arXiv:2110.02861", "absmax code s", "nearest_codes pack unpack"),
    "nf4": ("arXiv:2305.14314", "absmax codeᵢ ŵᵢ", "quantize_nf4 dequantize_nf4"),
    "nf4_tensor": ("arXiv:2305.14314", "absmax ŵᵢ", "NF4Tensor"),
    "double_quant": ("arXiv:2305.14314", "absmax₂ offset", "quantize_8bit dequantize_8bit"),
    "nf4_linear": ("arXiv:2305.14314", "dequantize(q)ᵀ ∂y/∂x", "nf4_linear NF4Linear"),
    "qlora": ("arXiv:2305.14314", "dequantize(q)ᵀ B A α/r", "quantize_model"),
    "lora": ("arXiv:2106.09685", "W₀ ΔW α/r B A [r, [d_out,", "lora_forward lora_delta LoRALinear"),
    "lora_starts": ("arXiv:2404.02948", "Vᵣᵀ Uᵣ Σᵣ", "lora_init principal_parts olora_start loftq_start"),
    "lora_combine": ("ΔW", "wᵢ sᵢ Bᵢ", "combined add_weighted_adapter"),
    "loraplus": ("arXiv:2402.12354", "η_A η_B λ", "loraplus_groups"),
    "dora": ("arXiv:2402.09353", "m W₀ ‖W₀ s·B·A", "dora_forward DoRALinear"),
    "adapters": ("arXiv:1902.00751", "W_down W_up f(", "bottleneck_update BottleneckAdapter"),
    "placements": ("houlsby", "houlsby pfeiffer parallel bapna", "AdapterConfig"),
    "ia3": ("arXiv:2205.05638", "l_k l_v l_ff ⊙", "ia3_scale IA3Linear"),
    "ln_tuning": ("arXiv:2312.11420", "γ β μ σ", "LNTuningLayer"),
    "hyper": ("arXiv:2106.04489", "z_τ l_i p_j W_down", "HyperAdapters"),
    "compose": ("arXiv:2203.05482", "δ_i θ_i", "soup routed"),
    "prompt": ("arXiv:2104.08691", "p_P e(x₁)", "PromptTuning"),
    "prefix": ("arXiv:2101.00190", "P_k P_v q_t d_h", "prefix_attention PrefixTuning"),
    "ptuning": ("arXiv:2103.10385", "encoder E", "PTuning"),
    "llama_adapter": ("arXiv:2303.16199", "P_k P_v g", "LlamaAdapter"),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_can_be_read_beside_its_paper(name):
    source, symbols, objects = METHODS[name]
    text = Path(pefttools.__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(text))
    assert text.count("\n") <= LINES, "split it: one idea a file"
    assert source in docstring
    assert [symbol for symbol in symbols.split() if symbol not in docstring] == []
    module = importlib.import_module(f"pefttools.{name}")
    for wanted in objects.split():
        found = getattr(module, wanted)
        assert found.__doc__ and ("[" in found.__doc__ or "Raises" in found.__doc__ or "→" in found.__doc__), wanted


def test_every_module_of_the_library_is_short():
    """`cli` and `workspace` are the house's own and no method."""
    lengths = {path.name: path.read_text(encoding="utf-8").count("\n")
               for path in Path(pefttools.__file__).parent.glob("*.py")}
    assert {name: length for name, length in lengths.items() if length > LINES} == {
        name: lengths[name] for name in ("cli.py", "workspace.py")}
