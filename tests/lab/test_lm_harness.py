"""lm-evaluation-harness reads our adapters through peft and counts what we count. Skipped where it is not installed."""

import pytest

from pefttools.checkpoint import save_adapter
from pefttools.inject import attach
from pefttools.lab import load_base, row_losses
from pefttools.lab.card_files import NotAnAdapter
from pefttools.lab.lm_harness import lm_eval_command, lm_eval_model
from pefttools.lora import LoRAConfig


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    import torch

    base = load_base("tiny", quiet=True)
    attach(base.model, LoRAConfig(r=4, target_modules="all-linear"), seed=0)
    with torch.no_grad():
        for name, p in base.model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    return base, save_adapter(base.model, tmp_path_factory.mktemp("adapter"))


def test_the_command_names_base_and_adapter(adapter, tmp_path):
    line = lm_eval_command(adapter[1], "hellaswag,arc_easy")
    assert line.startswith("lm_eval --model hf --model_args pretrained=") and "lab/tiny,peft=" in line
    assert line.endswith("--tasks hellaswag,arc_easy") and str(adapter[1]) in line
    with pytest.raises(NotAnAdapter, match="adapter_config.json is not in"):
        lm_eval_command(tmp_path, "hellaswag")


def test_without_it_it_says_what_to_install(adapter):
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="pefttools\\[lm-eval\\]"):
            lm_eval_model(adapter[1])
    else:
        pytest.skip("lm-eval is installed")


def test_the_harness_counts_what_we_count(adapter, rows):
    instances = pytest.importorskip("lm_eval.api.instance")
    base, folder = adapter
    # the harness counts space at the end of the context with the continuation, and no end token after it
    from pefttools.lab.data import prompt_of

    def ids(text):
        return base.tokenizer(text, add_special_tokens=False)["input_ids"]

    coded, pairs = [], [(prompt_of(row).rstrip(), "\n" + row["output"]) for row in rows[:4]]
    for context, answer in pairs:
        whole, before = [base.tokenizer.bos_token_id, *ids(context + answer)], 1 + len(ids(context))
        coded.append({"input_ids": whole, "labels": [-100] * before + whole[before:]})
    ours = [-nats for nats, _ in row_losses(base.model, base.tokenizer, coded)]
    harness = lm_eval_model(folder, dtype="float32", add_bos_token=True)
    asked = [instances.Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    theirs = [found for found, _ in harness.loglikelihood(asked)]
    assert theirs == pytest.approx(ours, rel=1e-3)
