"""Settings from defaults, a YAML file and the command line: who wins, what is refused, what repeats a run."""

from __future__ import annotations

import argparse
from dataclasses import fields

import pytest

from pefttools.lab.finetune_config import Settings, WrongQuestion, add_arguments, from_arguments
from pefttools.lab.finetune_model import job_of, rate
from pefttools.lab.finetune_yaml import check_same, config_text, read_config


def asked(*words: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return from_arguments(parser.parse_args(words))


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("method: qlora\nlr: 1e-3\nmax-length: 64\ntargets: [q_proj, v_proj]\ncheckpointing: true\n")
    found = asked("--config", str(path), "--method", "dora", "--batch", "2")
    assert (found.method, found.batch, found.lr, found.max_length, found.accumulate) == ("dora", 2, 1e-3, 64, 1)
    assert found.targets == ("q_proj", "v_proj") and found.checkpointing is True and found.model == "tiny"
    assert asked("llama-3.2-1b", "--config", str(path)).model == "llama-3.2-1b"


def test_what_is_written_is_read_again_as_the_same_settings(tmp_path):
    before = Settings(
        model="tiny",
        out="a",
        targets=("q_proj", "v_proj"),
        options={"dropout": 0.05},
        lr=3e-4,
        held_out=0.25,
        columns={"output": "answer"},
        method="adapter",
        alpha=8,
        seed=3,
        eval_every=5,
        patience=2,
    )
    path = tmp_path / "run.yaml"
    path.write_text(config_text(before), encoding="utf-8")
    assert Settings(**read_config(path)) == before and before.method == "bottleneck"
    assert config_text(before) == config_text(Settings(**read_config(path)))
    check_same(path, config_text(before))
    with pytest.raises(ValueError, match="another run .seed was 3 and is 4"):
        check_same(path, config_text(Settings(**read_config(path) | {"seed": 4})))


@pytest.mark.parametrize(
    "text, said",
    [
        ("methd: lora\n", "did you mean 'method'"),
        ("lr: 1e-3\nlr: 1e-4\n", "line 2: 'lr' stands there twice"),
        ("method: [lora\n", "is no YAML"),
        ("- lora\n", "must hold settings"),
        ("steps: many\n", "steps='many': a whole number"),
        ("steps: 2.5\n", "steps=2.5: a whole number"),
        ("steps:\n", "steps is empty; the default is 200"),
        ("quiet: perhaps\n", "quiet='perhaps': true or false"),
        ("precision: float8\n", "precision='float8' is not known"),
        ("method: lorra\n", "did you mean 'lora'"),
        ("model: {a: 1}\n", "one text is needed"),
        ("options: dropout\n", "pairs such as dropout=0.05"),
        ("patience: 3\n", "needs --eval-every"),
        ("lr: -1\n", "above 0"),
        ("seed: -1\n", "at least 0"),
    ],
)
def test_a_wrong_file_says_what_would_do(tmp_path, text, said):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(WrongQuestion) as caught:
        asked("--config", str(path))
    assert said in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(WrongQuestion, match="cannot be read .No such file"):
        asked("--config", str(tmp_path / "none.yaml"))


def test_every_setting_has_an_argument_and_a_help():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    there = {action.dest: action.help for action in parser._actions}
    for each in fields(Settings):
        assert there[each.name], each.name
    assert "default: 200" in there["steps"] and "--plan-only" in parser.format_help()


def test_settings_of_the_method():
    job = job_of(asked("--options", "dropout=0.1,rslora=true", "--alpha", "32", "--accumulate", "3"))
    assert job.options == {"dropout": 0.1, "rslora": True, "alpha": 32.0} and job.accumulate == 3
    with pytest.raises(WrongQuestion, match="did you mean 'dropout'"):
        job_of(asked("--options", "dropuot=0.1"))
    with pytest.raises(WrongQuestion, match="full fine-tuning has none"):
        job_of(asked("--method", "full", "--options", "dropout=0.1"))
    assert job_of(asked("--method", "llama_adapter")).options == {"layers": 6}, (
        "tiny has six layers, the default is eight"
    )


def test_rates_are_those_of_the_method_and_the_model():
    from pefttools.lab.adapter_places import best_rate, results

    assert rate(asked("--lr", "0.5")) == 0.5
    assert rate(asked("--method", "full")) == 1e-3 and rate(asked("--method", "qlora")) == 1e-2
    assert rate(asked("--method", "ia3")) == float(best_rate("IA³", results()["IA³"]))
    assert (
        rate(asked("llama-3.2-1b", "--method", "qlora")) == 2e-4
        and rate(asked("llama-3.2-1b", "--method", "full")) == 1e-5
    )
