"""What every test relies on: no network, no display, no more threads than there are cores; and small random models."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Several workers with a thread pool each would fight over the cores. Read when torch is first imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402

FAMILIES = ("llama", "qwen2", "gpt2", "opt", "bert", "t5")


def build(family: str, dtype: str, seed: int, tied: bool, hidden: int, layers: int):
    import torch
    import transformers as tf

    torch.manual_seed(seed)
    grouped = {"hidden_size": hidden, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4,
               "num_key_value_heads": 2, "vocab_size": 61, "tie_word_embeddings": tied, "max_position_embeddings": 64}
    if family == "llama":
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**grouped))
    elif family == "qwen2":
        model = tf.Qwen2ForCausalLM(tf.Qwen2Config(**grouped))
    elif family == "gpt2":
        model = tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=hidden, n_layer=layers, n_head=4, vocab_size=61, n_positions=64,
                                                 tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0))
    elif family == "opt":
        model = tf.OPTForCausalLM(tf.OPTConfig(hidden_size=hidden, ffn_dim=48, num_hidden_layers=layers,
                                               num_attention_heads=4, vocab_size=61, word_embed_proj_dim=hidden,
                                               max_position_embeddings=64, tie_word_embeddings=tied))
    elif family == "bert":
        model = tf.BertForMaskedLM(tf.BertConfig(hidden_size=hidden, intermediate_size=48, num_hidden_layers=layers,
                                                 num_attention_heads=4, vocab_size=61, max_position_embeddings=64))
    elif family == "t5":
        model = tf.T5ForConditionalGeneration(tf.T5Config(d_model=hidden, d_ff=48, d_kv=8, num_layers=layers, num_heads=4,
                                                          vocab_size=61, decoder_start_token_id=0,
                                                          tie_word_embeddings=tied))
    else:
        raise ValueError(family)
    return model.to(getattr(torch, dtype)).eval()


@pytest.fixture(scope="session")
def small_model():
    """small_model("llama") → a random transformers model of that family (see FAMILIES): 3 layers, width 32, 61 words."""
    def make(family="llama", dtype="float32", seed=0, tied=True, hidden=32, layers=3):
        return build(family, dtype, seed, tied, hidden, layers)

    return make


@pytest.fixture(scope="session")
def small_inputs():
    """small_inputs("llama") → keyword arguments of a forward pass with a loss, for that family: 2 rows of 12 tokens."""
    import torch

    def make(family="llama"):
        ids = torch.arange(24).reshape(2, 12) % 61
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": (ids * 7 + 3) % 61}
        return inputs | ({"decoder_input_ids": (ids[:, :9] * 5 + 1) % 61, "labels": (ids[:, :9] * 7 + 3) % 61}
                         if family == "t5" else {})

    return make


@pytest.fixture
def one_thread():
    """For matrices so small that they are slower on several threads: `pytestmark = pytest.mark.usefixtures("one_thread")`."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
