"""The prefix under gradient checkpointing, where layers lose their cache."""
from __future__ import annotations

import copy

import pytest
import torch

from pefttools.inject import attach, detach, disabled, trainable
from pefttools.prefix import PrefixTuningConfig

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def losses_and_gradients(model, batches):
    """The loss of each batch, and the gradients of their sum: every forward comes before the one backward."""
    losses = [model(**batch).loss for batch in batches]
    torch.stack(losses).sum().backward()
    grads = [p.grad.clone() for p in trainable(model).values()]
    model.zero_grad()
    return [loss.detach() for loss in losses], grads


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
def test_losses_and_gradients_are_those_without_checkpointing(family, projection, small_model, small_inputs):
    model = attach(small_model(family), PrefixTuningConfig(5, projection=projection, hidden=8), seed=1).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name in ("attn_pdrop", "attention_dropout", "dropout"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    inputs = small_inputs(family)
    small = {key: value[:1, :7] for key, value in inputs.items()}
    batches = [inputs, small, inputs]                        # of other sizes: all forwards come before the backward
    plain = losses_and_gradients(model, batches)
    model.gradient_checkpointing_enable()
    seen = []
    layer = model.get_decoder().layers[1] if family in ("llama", "qwen2") else None
    if layer is not None:
        layer.self_attn.register_forward_hook(lambda *a: seen.append(1))
    for mine, expected in zip(losses_and_gradients(model, batches), plain):
        torch.testing.assert_close(mine, expected)
        assert all(t.any() for t in mine)
    assert layer is None or len(seen) == 6                   # it did run again
    # off again, and in evaluation, where transformers does not checkpoint
    model.eval()
    with_checkpointing = model(**inputs).logits
    model.gradient_checkpointing_disable()
    assert torch.equal(model(**inputs).logits, with_checkpointing)
    for mine, expected in zip(losses_and_gradients(model.train(), batches), plain):
        torch.testing.assert_close(mine, expected)


def test_generating_and_disabling_between_steps_of_training(small_model, small_inputs):
    model = attach(small_model("llama"), PrefixTuningConfig(5), seed=1)
    inputs, options = small_inputs("llama"), {"max_new_tokens": 4, "pad_token_id": 0, "do_sample": False}
    expected, base = model.generate(inputs["input_ids"], **options), copy.deepcopy(detach(copy.deepcopy(model)))
    model.train().gradient_checkpointing_enable()
    model(**inputs).loss.backward()
    copy.deepcopy(model)                                  # what is kept for the backward pass is not
    assert torch.equal(model.eval().generate(inputs["input_ids"], **options), expected)
    with disabled(model.train()):
        model(**inputs)
        base.train().gradient_checkpointing_enable()
        torch.testing.assert_close(model(**inputs).logits, base(**inputs).logits)
    detach(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_cannot_work_is_refused(small_model, small_inputs):
    model = attach(small_model("llama"), PrefixTuningConfig(5)).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        model(**small_inputs("llama"))
    for family in ("t5", "bert"):
        model = attach(small_model(family), PrefixTuningConfig(5)).train()
        model.gradient_checkpointing_enable()
        with pytest.raises(ValueError, match="gradient checkpointing works for decoders"):
            model(**small_inputs(family))
        assert model.eval()(**small_inputs(family)).logits.isfinite().all()
    model = attach(small_model("llama"), PrefixTuningConfig(5)).train()
    model.gradient_checkpointing_enable()
    cache = model.eval()(torch.tensor([[1]])).past_key_values
    with pytest.raises(ValueError, match="model.eval"):
        model.train()(torch.tensor([[2]]), past_key_values=cache)


def test_without_gradients_in_training_mode_too(small_model, small_inputs):
    """transformers takes the cache away whenever a checkpointed layer is in training mode."""
    model = attach(small_model("llama"), PrefixTuningConfig(5)).train()
    expected = model(**small_inputs("llama")).logits
    model.gradient_checkpointing_enable()
    with torch.no_grad():
        torch.testing.assert_close(model(**small_inputs("llama")).logits, expected)


def test_in_peft_it_fails(small_model, small_inputs):
    from peft import PrefixTuningConfig as Theirs
    from peft import get_peft_model

    model = get_peft_model(small_model("llama"), Theirs(task_type="CAUSAL_LM", num_virtual_tokens=5)).train()
    model.base_model.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="size of tensor"):
        model(**small_inputs("llama"))
