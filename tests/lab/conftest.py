import pytest
import torch


@pytest.fixture(scope="session")
def tiny():
    from pefttools.lab import load_base

    return load_base("tiny")


@pytest.fixture
def small(tiny):
    """A Llama of 20,000 parameters with the bundled tokenizer, fresh for every test."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tiny.tokenizer), hidden_size=16, intermediate_size=32,
                                        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)).eval()


@pytest.fixture(scope="session")
def rows():
    return [{"instruction": f"Write a function `f{i}` that adds {i}.", "input": "", "kind": "add",
             "output": f"```python\ndef f{i}(x):\n    return x + {i}\n```", "tests": [f"assert f{i}(1) == {i + 1}"]}
            for i in range(24)]
