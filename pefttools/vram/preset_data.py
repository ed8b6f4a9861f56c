"""The configurations of well-known models, from the config.json that each publishes, and how many parameters each has.

Only fields that change a shape, a saved tensor or a tie are kept: widths, depths, heads, vocabulary, biases, ties and
activation. `count` is the number of parameters (tied ones once) as the model's own page states it, and a test builds
every one of them to compare. The page is that of the first repository named; the others hold the same shapes.
"""
from __future__ import annotations

from typing import Any


def _llama(h: int, m: int, L: int, H: int, kv: int, V: int = 32000, tied: bool = False, **more: Any) -> dict[str, Any]:
    return {"model_type": "llama", "hidden_size": h, "intermediate_size": m, "num_hidden_layers": L,
            "num_attention_heads": H, "num_key_value_heads": kv, "vocab_size": V, "tie_word_embeddings": tied,
            "max_position_embeddings": 4096, "hidden_act": "silu", **more}


def _llama3(h: int, m: int, L: int, H: int, kv: int, tied: bool = False, **more: Any) -> dict[str, Any]:
    return _llama(h, m, L, H, kv, 128256, tied, max_position_embeddings=131072, **more)


def _qwen(h: int, m: int, L: int, H: int, kv: int, V: int, tied: bool) -> dict[str, Any]:
    return _llama(h, m, L, H, kv, V, tied) | {"model_type": "qwen2", "max_position_embeddings": 32768}


def _gemma(kind: str, h: int, m: int, L: int, H: int, kv: int, d: int, V: int, **more: Any) -> dict[str, Any]:
    return _llama(h, m, L, H, kv, V, True, head_dim=d, **more) | {
        "model_type": kind, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192}


def _gpt2(d: int, L: int, H: int, n: int = 1024) -> dict[str, Any]:
    return {"model_type": "gpt2", "n_embd": d, "n_layer": L, "n_head": H, "n_positions": n, "vocab_size": 50257,
            "activation_function": "gelu_new", "tie_word_embeddings": True}


def _opt(d: int, m: int, L: int, H: int) -> dict[str, Any]:
    return {"model_type": "opt", "hidden_size": d, "ffn_dim": m, "num_hidden_layers": L, "num_attention_heads": H,
            "vocab_size": 50272, "word_embed_proj_dim": d, "max_position_embeddings": 2048, "tie_word_embeddings": True,
            "activation_function": "relu", "do_layer_norm_before": True, "dropout": 0.1, "attention_dropout": 0.0}


def _phi(h: int, m: int, L: int, H: int, rotary: float) -> dict[str, Any]:
    return {"model_type": "phi", "hidden_size": h, "intermediate_size": m, "num_hidden_layers": L,
            "num_attention_heads": H, "num_key_value_heads": H, "vocab_size": 51200, "partial_rotary_factor": rotary,
            "hidden_act": "gelu_new", "max_position_embeddings": 2048, "tie_word_embeddings": False}


# name: (fields of config.json, parameters, repositories with these shapes)
PRESETS: dict[str, tuple[dict[str, Any], int, tuple[str, ...]]] = {
    "tiny": (_llama(256, 704, 6, 4, 2, 4096, True, head_dim=64, max_position_embeddings=1024), 5_475_584,
             ("pefttools/lab/tiny",)),
    "llama-3.2-1b": (_llama3(2048, 8192, 16, 32, 8, True, head_dim=64), 1_235_814_400,
                     ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B-Instruct", "unsloth/Llama-3.2-1B")),
    "llama-3.2-3b": (_llama3(3072, 8192, 28, 24, 8, True, head_dim=128), 3_212_749_824,
                     ("meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.2-3B-Instruct", "unsloth/Llama-3.2-3B")),
    "llama-3.1-8b": (_llama3(4096, 14336, 32, 32, 8), 8_030_261_248,
                     ("meta-llama/Llama-3.1-8B", "meta-llama/Meta-Llama-3-8B", "meta-llama/Llama-3.1-8B-Instruct")),
    "llama-3.1-70b": (_llama3(8192, 28672, 80, 64, 8), 70_553_706_496,
                      ("meta-llama/Llama-3.1-70B", "meta-llama/Meta-Llama-3-70B", "meta-llama/Llama-3.3-70B-Instruct")),
    "llama-3.1-405b": (_llama3(16384, 53248, 126, 128, 8), 405_853_388_800, ("meta-llama/Llama-3.1-405B",)),
    "llama-2-7b": (_llama(4096, 11008, 32, 32, 32), 6_738_415_616,
                   ("meta-llama/Llama-2-7b-hf", "huggyllama/llama-7b", "meta-llama/Llama-2-7b-chat-hf")),
    "llama-2-13b": (_llama(5120, 13824, 40, 40, 40), 13_015_864_320,
                    ("meta-llama/Llama-2-13b-hf", "huggyllama/llama-13b")),
    "llama-2-70b": (_llama(8192, 28672, 80, 64, 8), 68_976_648_192, ("meta-llama/Llama-2-70b-hf",)),
    "llama-65b": (_llama(8192, 22016, 80, 64, 64, max_position_embeddings=2048), 65_285_660_672,
                  ("huggyllama/llama-65b",)),
    "tinyllama-1.1b": (_llama(2048, 5632, 22, 32, 4, max_position_embeddings=2048), 1_100_048_384,
                       ("TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",)),
    "mistral-7b": (_llama(4096, 14336, 32, 32, 8) | {"model_type": "mistral", "sliding_window": None,
                                                    "max_position_embeddings": 32768}, 7_241_732_096,
                   ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-Instruct-v0.2")),
    "qwen2.5-0.5b": (_qwen(896, 4864, 24, 14, 2, 151936, True), 494_032_768, ("Qwen/Qwen2.5-0.5B",)),
    "qwen2.5-1.5b": (_qwen(1536, 8960, 28, 12, 2, 151936, True), 1_543_714_304, ("Qwen/Qwen2.5-1.5B",)),
    "qwen2.5-3b": (_qwen(2048, 11008, 36, 16, 2, 151936, True), 3_085_938_688, ("Qwen/Qwen2.5-3B",)),
    "qwen2.5-7b": (_qwen(3584, 18944, 28, 28, 4, 152064, False), 7_615_616_512, ("Qwen/Qwen2.5-7B",)),
    "qwen2.5-14b": (_qwen(5120, 13824, 48, 40, 8, 152064, False), 14_770_033_664, ("Qwen/Qwen2.5-14B",)),
    "qwen2.5-32b": (_qwen(5120, 27648, 64, 40, 8, 152064, False), 32_763_876_352, ("Qwen/Qwen2.5-32B",)),
    "qwen2.5-72b": (_qwen(8192, 29568, 80, 64, 8, 152064, False), 72_706_203_648, ("Qwen/Qwen2.5-72B",)),
    "gemma-2b": (_gemma("gemma", 2048, 16384, 18, 8, 1, 256, 256000), 2_506_172_416, ("google/gemma-2b",)),
    "gemma-7b": (_gemma("gemma", 3072, 24576, 28, 16, 16, 256, 256000), 8_537_680_896, ("google/gemma-7b",)),
    "gemma-2-2b": (_gemma("gemma2", 2304, 9216, 26, 8, 4, 256, 256000, query_pre_attn_scalar=256,
                          sliding_window=4096, final_logit_softcapping=30.0, attn_logit_softcapping=50.0),
                   2_614_341_888, ("google/gemma-2-2b",)),
    "gemma-2-9b": (_gemma("gemma2", 3584, 14336, 42, 16, 8, 256, 256000, query_pre_attn_scalar=256,
                          sliding_window=4096, final_logit_softcapping=30.0, attn_logit_softcapping=50.0),
                   9_241_705_984, ("google/gemma-2-9b",)),
    "gemma-3-1b": (_gemma("gemma3_text", 1152, 6912, 26, 4, 1, 256, 262144, query_pre_attn_scalar=256,
                          sliding_window=512), 999_885_952, ("google/gemma-3-1b-pt",)),
    "gpt2": (_gpt2(768, 12, 12), 124_439_808, ("openai-community/gpt2",)),
    "gpt2-medium": (_gpt2(1024, 24, 16), 354_823_168, ("openai-community/gpt2-medium",)),
    "gpt2-large": (_gpt2(1280, 36, 20), 774_030_080, ("openai-community/gpt2-large",)),
    "gpt2-xl": (_gpt2(1600, 48, 25), 1_557_611_200, ("openai-community/gpt2-xl",)),
    # Brown et al. 2020, arXiv:2005.14165, table 2.1, as a GPT-2 of that size (its sparse layers have the same weights)
    "gpt-3-175b": (_gpt2(12288, 96, 96, 2048), 174_604_259_328, ()),
    "opt-125m": (_opt(768, 3072, 12, 12), 125_239_296, ("facebook/opt-125m",)),
    "opt-1.3b": (_opt(2048, 8192, 24, 32), 1_315_758_080, ("facebook/opt-1.3b",)),
    "opt-6.7b": (_opt(4096, 16384, 32, 32), 6_658_473_984, ("facebook/opt-6.7b",)),
    # models of published measurements whose layer the formula does not know: simulate() runs them
    "stablelm-alpha-3b": ({"model_type": "gpt_neox", "hidden_size": 4096, "intermediate_size": 16384,
                           "num_hidden_layers": 16, "num_attention_heads": 32, "vocab_size": 50688,
                           "rotary_pct": 0.25, "use_parallel_residual": True, "hidden_act": "gelu",
                           "max_position_embeddings": 4096, "tie_word_embeddings": False}, 3_637_321_728,
                          ("stabilityai/stablelm-base-alpha-3b",)),
    "falcon-7b": ({"model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71,
                   "vocab_size": 65024, "multi_query": True, "parallel_attn": True, "bias": False, "alibi": False,
                   "new_decoder_architecture": False, "tie_word_embeddings": True}, 6_921_720_704,
                  ("tiiuae/falcon-7b",)),
    "phi-1.5": (_phi(2048, 8192, 24, 32, 0.5), 1_418_270_720, ("microsoft/phi-1_5",)),
    "phi-2": (_phi(2560, 10240, 32, 32, 0.4), 2_779_683_840, ("microsoft/phi-2",)),
    "phi-3-mini": (_llama(3072, 8192, 32, 32, 32, 32064) | {"model_type": "phi3", "pad_token_id": 32000}, 3_821_079_552,
                   ("microsoft/Phi-3-mini-4k-instruct",)),
    "bloomz-7b1": ({"model_type": "bloom", "hidden_size": 4096, "n_layer": 30, "n_head": 32, "vocab_size": 250880,
                    "tie_word_embeddings": True}, 7_069_016_064, ("bigscience/bloomz-7b1", "bigscience/bloom-7b1")),
}
ALIASES = {"llama-3-8b": "llama-3.1-8b", "llama-3-70b": "llama-3.1-70b", "llama-3.3-70b": "llama-3.1-70b",
           "llama-7b": "llama-2-7b", "llama-13b": "llama-2-13b", "tinyllama": "tinyllama-1.1b",
           "tiny-llama": "tinyllama-1.1b",
           "mistral-7b-v0.1": "mistral-7b", "mistral-7b-v0.2": "mistral-7b", "gpt-2": "gpt2",
           "gpt-2-medium": "gpt2-medium",
           "gpt3": "gpt-3-175b", "gpt-3": "gpt-3-175b", "gpt3-175b": "gpt-3-175b",
           "phi-3-mini-4k-instruct": "phi-3-mini",
           "stablelm-base-alpha-3b": "stablelm-alpha-3b", "bloom-7b1": "bloomz-7b1", "gemma-1-2b": "gemma-2b"}
