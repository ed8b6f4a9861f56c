"""Adapters on disk: to peft and back with equal logits; half-written, damaged and foreign files change nothing."""
from __future__ import annotations

import json
import os
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from pefttools import adapter_files
from pefttools.checkpoint import CONFIG, WEIGHTS, load_adapter, save_adapter
from pefttools.inject import adapter_parameters, attach, attached, count_parameters, detach, merge, trainable
from pefttools.lora import LoRAConfig

IDS = torch.arange(24).reshape(2, 12) % 61
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

CASES = {
    "q and v": LoRAConfig(r=4, alpha=12),
    "rslora": LoRAConfig(r=4, alpha=6, rslora=True, dropout=0.1, target_modules=["k_proj", "down_proj"]),
    "regex": LoRAConfig(r=3, target_modules=r".*\.[02]\..*_proj"),
    "all-linear": LoRAConfig(r=2, alpha=0.5, target_modules="all-linear"),
    "some layers": LoRAConfig(r=2, layers_to_transform=(0, 2)),
    "tied head": LoRAConfig(r=2, target_modules=["lm_head", "q_proj"]),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices this small are slower on several threads, and far slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama(hidden=32, layers=3, dtype=torch.float32):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=hidden, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=61, tie_word_embeddings=True, max_position_embeddings=64)
    return LlamaForCausalLM(config).to(dtype).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def trained(config=CASES["q and v"], **model):
    model = attach(llama(**model), config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def tensors_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def refuses(folder, error, message, model=None):
    """load_adapter raises, and the model keeps every module, tensor and flag."""
    model = model or llama()
    tensors, modules = tensors_of(model), [(name, id(m)) for name, m in model.named_modules()]
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        load_adapter(model, folder)
    assert modules == [(name, id(m)) for name, m in model.named_modules()]
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())


@pytest.fixture
def folder(tmp_path):
    return save_adapter(trained(), tmp_path / "adapter")


def edit(folder, **fields):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# ------------------------------------------------------------------------------------------------ both ways

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_saved_by_us_loads_in_peft_and_here_with_equal_logits(case, dtype, tmp_path):
    from peft import PeftModel

    model = trained(CASES[case], dtype=dtype)
    assert save_adapter(model, tmp_path / "a") == tmp_path / "a"
    theirs = PeftModel.from_pretrained(llama(dtype=dtype), tmp_path / "a").eval()
    torch.testing.assert_close(logits(theirs), logits(model), **CLOSE)
    assert not torch.equal(logits(llama(dtype=dtype)), logits(model))

    again = load_adapter(llama(dtype=dtype), tmp_path / "a")
    assert torch.equal(logits(again), logits(model)) and count_parameters(again) == count_parameters(model)
    assert attached(again).config.to_peft() == CASES[case].to_peft()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_saved_by_peft_loads_here_and_our_files_hold_the_same(case, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = CASES[case]
    targets, layers = config.target_modules, config.layers_to_transform
    theirs = get_peft_model(llama(), LoraConfig(
        r=config.r, lora_alpha=config.alpha, lora_dropout=config.dropout, use_rslora=config.rslora,
        target_modules=list(targets) if isinstance(targets, (list, tuple)) else targets, task_type="CAUSAL_LM",
        layers_to_transform=list(layers) if layers else None))
    ours = trained(config)
    theirs.load_state_dict({"base_model.model." + name: tensor for name, tensor in ours.state_dict().items()})
    theirs.eval().save_pretrained(tmp_path / "theirs", save_embedding_layers=False)

    model = load_adapter(llama(), tmp_path / "theirs")
    torch.testing.assert_close(logits(model), logits(theirs), **CLOSE)

    save_adapter(ours, tmp_path / "ours")
    here, there = load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS)
    assert here.keys() == there.keys() and all(torch.equal(here[key], there[key]) for key in here)
    here, there = (json.loads((tmp_path / name / CONFIG).read_text()) for name in ("ours", "theirs"))
    for name, value in here.items():
        expected = there[name]
        assert sorted(value) == sorted(expected) if isinstance(value, list) else value == expected, name


def test_peft_reads_our_settings_without_a_warning(tmp_path):
    from peft import PeftModel

    save_adapter(trained(), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs = PeftModel.from_pretrained(llama(), tmp_path)
    assert theirs.peft_config["default"].task_type == "CAUSAL_LM"


def test_peft_ignores_a_name_that_selects_nothing_and_so_does_loading(folder):
    edit(folder, target_modules=["q_proj", "v_proj", "c_attn"])
    assert torch.equal(logits(load_adapter(llama(), folder)), logits(trained()))


def test_loading_into_an_attached_model_keeps_the_parameter_objects(folder):
    model = attach(llama(), CASES["q and v"])
    before = {name: id(p) for name, p in trainable(model).items()}
    load_adapter(model, str(folder))
    assert {name: id(p) for name, p in trainable(model).items()} == before
    assert torch.equal(logits(model), logits(trained()))


def test_a_loaded_adapter_is_trainable_and_detaches(folder):
    model = llama()
    first = logits(model)
    load_adapter(model, folder)
    assert set(trainable(model)) == set(adapter_parameters(model)) and torch.equal(logits(model), logits(trained()))
    assert torch.equal(logits(detach(model)), first)


def test_a_merged_adapter_is_saved_as_it_was_trained(folder, tmp_path):
    save_adapter(merge(trained()), tmp_path / "merged")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "merged" / name).read_bytes() == (folder / name).read_bytes()


def test_all_linear_is_written_as_names_and_in_full_where_the_short_ones_say_more(tmp_path):
    save_adapter(trained(CASES["all-linear"]), tmp_path)
    names = json.loads((tmp_path / CONFIG).read_text())["target_modules"]
    assert names == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]

    model = llama()
    model.model.layers[0].q_proj = torch.nn.Embedding(3, 3)         # not linear, but of the same short name
    save_adapter(attach(model, CASES["all-linear"]), tmp_path)
    names = json.loads((tmp_path / CONFIG).read_text())["target_modules"]
    assert len(names) == 21 and "model.layers.0.self_attn.q_proj" in names


# ------------------------------------------------------------------------------------------------ saving is atomic

def test_an_interrupted_save_keeps_the_old_files(folder, monkeypatch):
    old = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    (folder / "optimizer.bin").write_bytes(b"somebody else's")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapter_files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(trained(CASES["rslora"]), folder)
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS, "optimizer.bin"]
    assert old == {name: (folder / name).read_bytes() for name in old}


@pytest.mark.parametrize("stop_at", [0, 1])
def test_stopped_between_the_two_files_never_mixes_settings_and_weights(folder, monkeypatch, stop_at):
    """New weights with the old alpha would load, and be wrong. Either the old adapter is there, or a clear error."""
    replace, calls = os.replace, []

    def stop(source, target):
        calls.append(target)
        if len(calls) > stop_at:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(adapter_files.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(trained(LoRAConfig(r=4, alpha=99)), folder)
    refuses(folder, FileNotFoundError, f"{CONFIG} is not in .*, though {WEIGHTS} is: the save was interrupted.*"
                                       r"What was being saved is in .*\.saving-.*: move its files up")
    for path in next(folder.glob(".saving-*")).iterdir():           # nothing is lost
        replace(path, folder / path.name)
    assert torch.equal(logits(load_adapter(llama(), folder)), logits(trained(LoRAConfig(r=4, alpha=99))))

    calls.clear()
    monkeypatch.undo()
    save_adapter(trained(LoRAConfig(r=4, alpha=98)), folder)
    assert attached(load_adapter(llama(), folder)).config.alpha == 98


def test_stopped_between_the_two_files_of_the_same_run_loses_nothing(folder, monkeypatch):
    def stop(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(adapter_files.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(trained(), folder)
    assert torch.equal(logits(load_adapter(llama(), folder)), logits(trained()))


def test_saving_again_replaces_and_leaves_other_files_alone(folder):
    (folder / "notes.txt").write_text("mine")
    save_adapter(trained(CASES["regex"]), folder)
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS, "notes.txt"]
    assert torch.equal(logits(load_adapter(llama(), folder)), logits(trained(CASES["regex"])))


def test_a_diverged_adapter_does_not_replace_a_good_one(folder):
    old = (folder / WEIGHTS).read_bytes()
    model = trained()
    with torch.no_grad():
        next(iter(trainable(model).values()))[0, 0] = float("nan")
    with pytest.raises(ValueError, match="q_proj.lora_A.default.weight: training has diverged. Nothing was written"):
        save_adapter(model, folder)
    assert (folder / WEIGHTS).read_bytes() == old


def test_saving_what_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="no adapters attached: call attach"):
        save_adapter(llama(), tmp_path / "a")
    model = trained()
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"not in its files: model\.norm\.weight.*requires_grad_\(False\)"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file; give the path of a folder"):
        save_adapter(trained(), tmp_path / "file")


# ------------------------------------------------------------------------------------------------ damaged files

def test_missing_folder_and_files(folder, tmp_path):
    refuses(tmp_path / "nowhere", FileNotFoundError, "there is no folder .*nowhere")
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", FileNotFoundError, f"{CONFIG} is not in .*empty\\.")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    refuses(folder, FileNotFoundError, f"{WEIGHTS} is not in .*adapter_model.bin, a pickle, which can run code")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 2000, -1])
def test_truncated_weights(folder, keep):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:keep])
    refuses(folder, ValueError, rf"{WEIGHTS} \({len(content[:keep])} bytes\) is truncated or damaged")


@pytest.mark.parametrize("content", [b"garbage " * 50, b"\xff" * 100, (3).to_bytes(8, "little") + b"{}{" + b"0" * 50])
def test_weights_that_are_no_safetensors(folder, content):
    (folder / WEIGHTS).write_bytes(content)
    refuses(folder, ValueError, "is truncated or damaged")


@pytest.mark.parametrize("content, message", [
    (b"", "is damaged, it is not JSON"), (b'{"r": 4, "lora_al', "is damaged, it is not JSON"),
    (b"\xff\xfe\x00garbage", "is damaged, it is not JSON"), (b"[1]", "must hold one JSON object; it holds a list"),
    (b"{}", r"peft_type=None; known here: LORA, IA3, LN_TUNING"),
    (b'{"peft_type": ["LORA"]}', "peft_type="),
    (b'{"peft_type": "LORA"}', "has no field 'r'"),
    (b'{"peft_type": "LORA", "r": "four", "lora_alpha": 8, "target_modules": ["q_proj"]}',
     "r must be a whole number.*'four'"),
    (b'{"peft_type": "LORA", "r": 4, "lora_alpha": null, "target_modules": ["q_proj"]}',
     "alpha must be a finite number"),
    (b'{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": 7}',
     r"must name at least one layer; got \[7\]"),
    (b'{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["c_attn"]}', "no module is named 'c_attn'"),
])
def test_damaged_settings(folder, content, message):
    (folder / CONFIG).write_bytes(content)
    refuses(folder, ValueError, message)


@pytest.mark.parametrize("fields, message", [
    ({"use_dora": True}, "missing from the file: .*q_proj.lora_magnitude_vector"),
    ({"bias": "all"}, "bias='all'"), ({"rank_pattern": {"q_proj": 2}}, "rank_pattern="),
    ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern="), ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
    ({"lora_bias": True}, "lora_bias=True"), ({"exclude_modules": ["k_proj"]}, "exclude_modules="),
    ({"trainable_token_indices": [1]}, "trainable_token_indices="),
    ({"of_a_later_peft": 3}, "of_a_later_peft=3"),
    ({"init_lora_weights": "corda"}, "init_lora_weights|init.*corda"),
    ({"peft_type": "VERA"}, "peft_type='VERA'; known here: LORA, "),
])
def test_settings_of_peft_that_we_lack_are_named(folder, fields, message):
    edit(folder, **fields)
    refuses(folder, ValueError, message)


# ------------------------------------------------------------------------------------------------ another base

def test_an_adapter_of_another_base(folder):
    refuses(folder, ValueError, r"made for another base\? other shapes: \S+lora_A.weight is \[4, 32\] in the file and "
                                r"\[4, 64\] in the model.* and \d+ more. The model is unchanged", llama(hidden=64))
    refuses(folder, ValueError, r"without a place in the model: base_model.model.model.layers.2.self_attn.q_proj",
            llama(layers=2))
    refuses(folder, ValueError, r"missing from the file: base_model.model.model.layers.3.self_attn.q_proj",
            llama(layers=4))


def test_missing_unexpected_and_broken_entries(folder):
    tensors = load_file(folder / WEIGHTS)
    key = next(iter(tensors))
    save_file({k: t for k, t in tensors.items() if k != key}, folder / WEIGHTS)
    refuses(folder, ValueError, f"missing from the file: {key}")
    save_file(tensors | {"base_model.model.lm_head.weight": torch.zeros(2)}, folder / WEIGHTS)
    refuses(folder, ValueError, "without a place in the model: base_model.model.lm_head.weight")
    save_file(tensors | {key: torch.full_like(tensors[key], float("nan"))}, folder / WEIGHTS)
    refuses(folder, ValueError, f"NaN, infinite or no floats, in {key}")
    save_file(tensors | {key: tensors[key].int()}, folder / WEIGHTS)
    refuses(folder, ValueError, "NaN, infinite or no floats")


def test_an_adapter_with_a_rank_that_this_model_cannot_have(folder):
    edit(folder, r=17)
    refuses(folder, ValueError, "r = 17 is more than min")


def test_into_a_model_with_another_or_a_merged_adapter(folder):
    refuses(folder, ValueError, r"r is 2 in the model and 4 in .*Call detach\(model\) first",
            attach(llama(), LoRAConfig(r=2, alpha=12)))
    refuses(folder, ValueError, "missing from the file",
            attach(llama(), LoRAConfig(r=4, alpha=12, target_modules=["k_proj", "q_proj"])))
    refuses(folder, ValueError, r"is merged into this model. Call unmerge\(model\)", merge(trained()))


# ------------------------------------------------------------------------------------------------ beyond linear layers

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("changed", [False, True])
def test_an_embedding_that_peft_saved_beside_its_adapter(changed, tmp_path):
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(llama(), LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"))
    if changed:
        with torch.no_grad():
            theirs.get_input_embeddings().base_layer.weight.add_(1)
    theirs.eval().save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("embed_tokens" in key and "lora" not in key for key in load_file(tmp_path / WEIGHTS))
    if changed:      # it was trained or resized: leaving it out would be another model
        refuses(tmp_path, ValueError, "without a place in the model: base_model.model.model.embed_tokens")
    else:
        torch.testing.assert_close(logits(load_adapter(llama(), tmp_path)), logits(theirs), **CLOSE)


@pytest.mark.filterwarnings("error:fan_in_fan_out")
def test_peft_is_told_of_conv1d(small_model, small_inputs, tmp_path):
    from peft import PeftModel

    model = attach(small_model("gpt2"), LoRAConfig(r=4, target_modules=["c_attn"]))
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter += 0.1
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(small_model("gpt2"), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**small_inputs("gpt2")).logits, model(**small_inputs("gpt2")).logits, **CLOSE)
