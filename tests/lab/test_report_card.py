"""The report card of an adapter: what is measured, the gate on it, the page, and every sort of wrong input."""

import json
import re
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch

from pefttools import cli
from pefttools.checkpoint import save_adapter
from pefttools.inject import attach
from pefttools.lab import card_measures, load_base, report_card
from pefttools.lab.card_page import to_html
from pefttools.lab.gate import DEFAULT, FIGURES, check_gate, default_gate, figure_of, parse_gate, released
from pefttools.lora import LoRAConfig

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"loss_rows": (6, 6), "rows": (3, 3), "sampled_rows": (2, 2), "samples": (5, 5),
         "documents": (2, 2), "safety": (2, 2)}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A folder with LoRA of random B: it changes everything a little and teaches nothing."""
    base = load_base("tiny", quiet=True)
    attach(base.model, LoRAConfig(r=2, target_modules="all-linear"), seed=0)
    with torch.no_grad():
        for name, p in base.model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.01, generator=torch.Generator().manual_seed(1))
    return save_adapter(base.model, tmp_path_factory.mktemp("adapters") / "of <b>mine")


@pytest.fixture(scope="module")
def card(adapter):
    patch = pytest.MonkeyPatch()
    patch.setattr("pefttools.lab.report_card.SIZES", SMALL)
    patch.setattr(card_measures, "NEW_TOKENS", 8)
    try:
        return report_card.report_card(adapter, quick=True, progress=False)
    finally:
        patch.undo()


# ------------------------------------------------------------------------------------------------ what is measured

def test_every_part_is_there_and_is_plain_data(card):
    assert json.loads(json.dumps(card, allow_nan=False)) == card
    assert card["base"] == "tiny" and card["method"] == "LoRA" and card["quick"] is True
    held_out = card["quality"]["held-out rows"]
    for name in ("loss", "pass@1", "pass@5"):
        found = held_out[name]
        assert set(found) == {"adapter", "base", "difference"}
        ours, theirs, difference = (found[who]["value"] for who in ("adapter", "base", "difference"))
        assert difference == pytest.approx(ours - theirs, abs=1e-9)
        assert all(each["low"] <= each["value"] <= each["high"] for each in found.values())
    assert card["forgetting"]["change"]["value"] == pytest.approx(
        card["forgetting"]["after"]["value"] - card["forgetting"]["before"]["value"], abs=1e-9)
    memory = card["memory"]
    assert memory["method"] == "lora" and 10**7 < memory["bytes"] < memory["full fine-tuning, bytes"]
    assert set(card["speed"]["tokens per second"]) == {"base", "adapter", "merged"}
    assert held_out["pass@5"]["base"]["high"] > 0  # none of ten does not mean never


def test_figures_are_those_of_the_library(card, adapter):
    from pefttools.checkpoint import load_adapter
    from pefttools.lab import held_out_loss
    from pefttools.lab.data import load_rows

    base = load_base("tiny", quiet=True)
    rows = load_rows("held_out")[:6]
    found = card["quality"]["held-out rows"]["loss"]
    assert found["base"]["value"] == pytest.approx(held_out_loss(base.model, base.tokenizer, rows), rel=1e-4)
    load_adapter(base.model, adapter)
    assert found["adapter"]["value"] == pytest.approx(held_out_loss(base.model, base.tokenizer, rows), rel=1e-4)


def test_files_are_named_with_their_sums_and_no_path_of_this_machine(card, adapter):
    import hashlib

    weights = (adapter / "adapter_model.safetensors").read_bytes()
    found = card["files"]["files"]["adapter_model.safetensors"]
    assert found == {"bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
    assert card["files"]["config"]["r"] == 2 and card["files"]["config"]["base_model_name_or_path"] == "tiny"
    assert str(adapter.parent) not in json.dumps(card)


def test_right_answers_fit_into_the_tokens_that_are_allowed(tiny):
    from pefttools.lab.data import load_rows

    for split in ("held_out", "new_kinds"):
        longest = max(len(tiny.tokenizer(row["output"])["input_ids"]) for row in load_rows(split))
        assert 1.3 * longest < card_measures.NEW_TOKENS


def test_what_cannot_be_merged_or_planned_says_so():
    from pefttools.prompt import PromptTuningConfig

    base = load_base("tiny", quiet=True)
    attach(base.model, PromptTuningConfig(length=4), seed=0)
    loaded = card_measures.Loaded(base, "PromptTuning", 1, 2, torch.device("cpu"))
    found = card_measures.speed(loaded, rounds=1, tokens=2)["tokens per second"]
    assert "not applicable" in found["merged"] and found["adapter"]["value"] > 0
    assert "no method for peft_type='VERA'" in card_measures.memory(loaded, {"peft_type": "VERA"})["not applicable"]
    assert "the planner does not know it" in card_measures.memory(
        loaded, {"peft_type": "ADAPTION_PROMPT", "adapter_len": 4, "adapter_layers": 99})["not applicable"]


@pytest.mark.parametrize("module, config, fields", [
    ("lora", "LoRAConfig", {"r": 3, "target_modules": "all-linear"}), ("dora", "DoRAConfig", {"r": 2}),
    ("ia3", "IA3Config", {}), ("ln_tuning", "LNTuningConfig", {}), ("prompt", "PromptTuningConfig", {"length": 4}),
    ("prefix", "PrefixTuningConfig", {"length": 3}),
    ("llama_adapter", "LlamaAdapterConfig", {"length": 5, "layers": 2}),
    ("placements", "AdapterConfig", {"bottleneck": 8, "placement": "houlsby"}), ("placements", "AdapterConfig", {}),
])
def test_the_plan_is_of_this_adapter(module, config, fields, small, tmp_path):
    """The planner counts the parameters that are in the file."""
    from importlib import import_module

    from pefttools.lab.card_files import files_of

    attach(small, getattr(import_module(f"pefttools.{module}"), config)(**fields), seed=0)
    files = files_of(save_adapter(small, tmp_path))
    trained = sum(p.numel() for p in small.parameters() if p.requires_grad)
    loaded = card_measures.Loaded(SimpleNamespace(model=small), config, 0, 1, torch.device("cpu"))
    found = card_measures.memory(loaded, files["config"])
    assert found["trainable"] == trained, found


# ------------------------------------------------------------------------------------------------ the gate

def made(**figures):
    """A card that holds just these figures."""
    card = {"quality": {"held-out rows": {}, "new kinds": {}}}
    card["quality"]["held-out rows"]["pass@1"] = {"adapter": figures.get("passed")}
    card["forgetting"] = {"change": figures.get("forgot")}
    return card


def test_conditions_are_read():
    found = parse_gate("pass@1>=0.5, Forgetting.HIGH ≤ 30%,over-refusals<1e-2")
    assert [str(each) for each in found] == ["pass@1>=0.5", "forgetting.high<=0.3", "over_refusals<0.01"]


@pytest.mark.parametrize("text, words", [
    ("pas@1>=0.5", "did you mean 'pass@1'"), ("forgeting<=1", "did you mean 'forgetting'"),
    ("xyzzy>1", "There are pass@1"), ("pass@1", "no condition"), ("pass@1=>0.5", "no condition"),
    ("pass@1>=much", "no condition"),
    ("pass@1>=1.2.3", "no number"),
    (" , ", "no condition was given"), ("pass@1.middle>=1", "no condition"), ("pass@1==1", "no condition"),
])
def test_wrong_conditions_are_named(text, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        parse_gate(text)


def test_the_gate_decides_at_the_bound_and_on_the_end_that_was_asked_for():
    card = made(passed={"value": 0.5, "low": 0.4, "high": 0.6}, forgot={"value": 0.2, "low": -0.1, "high": 0.4})
    for gate, passes in (("pass@1>=0.5", True), ("pass@1>0.5", False), ("pass@1.low>=0.5", False),
                         ("pass@1.high>=0.6", True), ("forgetting<=0.3", True), ("forgetting.high<=0.3", False),
                         ("pass@1>=50%,forgetting<0.1", False)):
        assert released(check_gate(card, gate)) is passes, gate


def test_what_was_not_measured_does_not_pass_unless_nobody_asked():
    card = made(passed={"value": 0.9, "low": 0.8, "high": 1.0})
    [verdict] = check_gate(card, "insecure_code<=0.5")
    assert verdict.passed is False and verdict.value is None and "not measured" in verdict.why
    assert not released(check_gate(card))  # nothing of the default could be checked: that is no release
    verdicts = check_gate(made(forgot={"value": 0.1, "low": 0.0, "high": 0.2}))
    assert [v.passed for v in verdicts].count(None) == len(DEFAULT) - 1 and released(verdicts)


def test_every_figure_can_be_found_in_a_card_and_every_default_has_its_reason(card):
    assert {name for name in FIGURES if figure_of(card, name) is None} == set()
    assert all(each.why and each.figure in FIGURES for each in default_gate())


# ------------------------------------------------------------------------------------------------ the page

class Page(HTMLParser):
    """Tags in order, with what is left open; every picture's words."""

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.pictures, self.attributes = [], set(), [], []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag == "svg":
            self.pictures.append(dict(attrs))
        if tag not in ("meta", "line", "circle", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("line", "circle", "rect"):
            assert self.open.pop() == tag


@pytest.fixture
def finished(card):
    verdicts = check_gate(card)
    return {**card, "gate": [vars(v) for v in verdicts], "released": released(verdicts)}


def test_the_page_stands_alone_and_says_its_pictures_in_words(finished):
    source = to_html(finished)
    page = Page(source)
    assert page.open == [] and not page.tags & {"script", "link", "img", "iframe", "object"}
    assert not re.search(r"https?://|url\(|@import|javascript:", source)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
    assert len(page.pictures) > 12
    assert all(p["role"] == "img" and re.search(r"\d", p["aria-label"]) for p in page.pictures)
    assert "width=device-width" in source and 'lang=\'en\'' in source
    for words in ("Not to be released", "Perplexity", "SHA-256", "full fine-tuning", "sample", "adapter off", "tokens"):
        assert words.lower() in source.lower(), words


def test_the_page_escapes_what_comes_from_outside(finished):
    evil = "<script>alert('x')</script>\" onload='y"
    card = json.loads(json.dumps(finished))
    card["adapter"] = card["base"] = card["method"] = evil
    card["files"]["config"] = {evil: evil}
    card["safety"] = {evil: {"value": 0.1, "low": 0.0, "high": 0.2, "hits": 1, "n": 10},
                      "other": {"not applicable": evil}}
    card["memory"] = {"not applicable": evil}
    card["quality"]["held-out rows"]["worst kinds"] = [[evil, 0, 1]]
    card["gate"][0] |= {"condition": evil, "why": evil, "passed": False}
    page = Page(to_html(card))
    assert "script" not in page.tags and page.open == []
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert finished["adapter"] == "of <b>mine" and "<b>mine" not in to_html(finished)


# ------------------------------------------------------------------------------------------------ the command

def test_the_command_writes_both_and_exits_with_the_gate(card, adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report_card, "report_card", lambda *a, **k: json.loads(json.dumps(card)))
    page = tmp_path / "card.html"
    assert cli.main(["evaluate", str(adapter), "--out", str(page), "--gate", "pass@1>=0", "--quick"]) == 0
    said = capsys.readouterr().out
    assert "May be released." in said and "passed    pass@1>=0" in said
    assert cli.main(["evaluate", str(adapter), "--out", str(page), "--json", str(tmp_path / "b.json"),
                     "--gate", "pass@1>=0.99"]) == 1
    assert "FAILED" in capsys.readouterr().out
    data = json.loads((tmp_path / "b.json").read_text())
    assert data["released"] is False and data["gate"][0]["condition"] == "pass@1>=0.99"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.json", "card.html", "card.json"]
    assert cli.main(["evaluate", "--list-gate"]) == 0
    assert "forgetting.low<=1" in capsys.readouterr().out


def broken(kind, adapter, folder):
    """A copy of the adapter, broken in one way."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapter, folder)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if kind == "nan":
        tensors = load_file(weights)
        next(iter(tensors.values()))[0, 0] = float("nan")
        save_file(tensors, weights)
    elif kind == "explodes":
        save_file({name: t * 1e22 for name, t in load_file(weights).items()}, weights)
    elif kind == "half":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "no weights":
        weights.unlink()
    elif kind == "no config":
        config.unlink()
    elif kind == "interrupted":
        (folder / ".saving-x").mkdir()
        shutil.move(weights, folder / ".saving-x")
    elif kind == "config cut":
        config.write_text(config.read_text()[:40])
    elif kind == "other base":
        save_file({name: torch.zeros(t.shape[0], t.shape[1] + 1) for name, t in load_file(weights).items()}, weights)
    elif kind == "other method":
        config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": "VERA"}))
    return folder


@pytest.mark.parametrize("kind, words", [
    ("nan", "NaN"), ("half", "truncated or damaged"), ("no weights", "adapter_model.safetensors is not in"),
    ("no config", "adapter_config.json is not in"), ("interrupted", "save was interrupted"), ("config cut", "not JSON"),
    ("explodes", "the loss is no number on"), ("other base", "was the adapter made for another base"),
    ("other method", "peft_type='VERA'"),
])
def test_broken_adapters_are_named_with_exit_2(kind, words, adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report_card, "SIZES", SMALL)
    folder = broken(kind, adapter, tmp_path / "adapter")
    assert cli.main(["evaluate", str(folder), "--out", str(tmp_path / "card.html"), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert words in said and said.startswith("pefttools evaluate: ") and "Traceback" not in said
    assert not (tmp_path / "card.html").exists() and not (tmp_path / "card.json").exists()


@pytest.mark.parametrize("arguments, words", [
    ([], "which adapter"), (["nowhere"], "there is no folder"),
    (["{adapter}", "--gate", "pas@1>=1"], "did you mean 'pass@1'"),
    (["{adapter}", "--out", "no/such/folder/card.html"], "there is no folder"),
    (["{adapter}", "--out", "{here}"], "that is a folder"),
    (["{adapter}", "--out", "a.html", "--json", "a.html"], "the same file"),
    (["{adapter}", "--base", "no/model"], "no/model"),
])
def test_wrong_questions_are_named_with_exit_2(arguments, words, adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    filled = [a.format(adapter=adapter, here=tmp_path) for a in arguments]
    assert cli.main(["evaluate", *filled, "--quiet"]) == 2
    assert words in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_a_base_that_cannot_be_loaded_is_not_replaced_by_the_bundled_one(adapter, monkeypatch):
    from pefttools.lab import base as bases

    def fallback(name, **_):
        found = bases.Base(*bases.load_tiny(torch.float32), "tiny", "the bundled model, because nothing answers")
        return found

    monkeypatch.setattr(bases, "load_base", fallback)
    with pytest.raises(ValueError, match="measured on its own base only"):
        card_measures.load(adapter, "llama-3.2-1b")
