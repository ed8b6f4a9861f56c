"""Which layers get LoRA where nobody says: a table, importable without torch (the memory formula reads it too)."""
from __future__ import annotations

# What peft takes for a family of models (model.config.model_type) unless told otherwise: the attention's queries and
# values mostly, as in Hu et al. 2021, section 4.2. peft/utils/constants.py, TRANSFORMERS_MODELS_TO_LORA_TARGET_….
DEFAULT_TARGETS: dict[str, list[str] | str] = {family: targets.split() for families, targets in {
    "llama llama4 mistral mixtral gemma gemma2 gemma3_text qwen2 qwen3 opt bart gptj gpt_neo stablelm": "q_proj v_proj",
    "t5 mt5": "q v",
    "bert roberta xlm-roberta electra layoutlm": "query value",
    "deberta-v2": "query_proj value_proj",
    "deberta": "in_proj",
    "gpt2 gpt_bigcode": "c_attn",
    "btlm": "c_proj c_attn",
    "bloom gpt_neox chatglm falcon RefinedWeb RefinedWebModel": "query_key_value",
    "phi": "q_proj v_proj fc1 fc2",
    "mpt": "Wqkv",
    "codegen": "qkv_proj",
    "blip-2": "q v q_proj v_proj",
    "nemotron_h": "q_proj k_proj v_proj o_proj",
    "rwkv": "key value receptance output",
    "rwkv7": "r_proj k_proj v_proj o_proj key value",
}.items() for family in families.split()} | {"gemma4": r".*language_model\..*\.(q_proj|v_proj)"}
