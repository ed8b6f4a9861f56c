"""`pefttools vram`: every field a flag, exit codes, wrong questions, and the answers of formula and simulator."""
from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from pefttools import cli
from pefttools.vram.job import METHODS, Job

ROOT = Path(cli.__file__).parents[1]


def test_every_field_of_a_job_is_a_flag():
    given = {"method": "prefix", "batch": 3, "seq": 77, "r": 5, "targets": "q_proj,v_proj", "length": 9, "width": 8,
             "options": "projection=true", "quantization": "nf4", "dtype": "float16", "adapter_dtype": "bfloat16",
             "optimizer": "sgd", "accumulate": 2, "attention": "eager", "gpus": 2, "library": "peft", "gpu": "t4",
             "shapes": "2x5,3x6"}
    switches = {"clip": "--no-clip", "checkpointing": "--checkpointing", "padded": "--padded", "master": "--master",
                "keep_outputs": "--no-keep-outputs"}
    assert {"model", *given, *switches} == {f.name for f in fields(Job)}
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    args = cli.make_parser().parse_args(["vram", "llama-3.2-1b", *words, *switches.values()])
    from pefttools.vram.flags import job_fields

    job = {"gpu": args.gpu, **job_fields(args)}
    expected = {
        **given,
        "shapes": ((2, 5), (3, 6)),
        "master": True,
        "keep_outputs": False,
        "targets": ("q_proj", "v_proj"),
        "options": {"projection": True},
        "clip": False,
        "checkpointing": True,
        "padded": True,
    }
    assert job == expected
    plain = cli.make_parser().parse_args(["vram", "llama-3.2-1b"])
    assert Job(plain.model, **job_fields(plain)) == Job("llama-3.2-1b")
    none = cli.make_parser().parse_args(["vram", "x", "--quantization", "none", "--options", "placement=houlsby"])
    assert job_fields(none) == {"quantization": None, "options": {"placement": "houlsby"}}


def test_the_issues_line_prints_a_table(capsys):
    line = "vram llama-3.1-8b --method qlora --batch 1 --seq 512 --checkpointing --gpu t4 --formula"
    assert cli.main(line.split()) == 0
    out = capsys.readouterr().out
    assert "weights" in out and "█" in out and "fits on T4" in out
    assert cli.main("vram llama-3.1-8b --method full --gpu t4".split()) == 1
    out = capsys.readouterr().out
    assert "does not fit on T4" in out and "It needs" in out and "that needs" in out
    assert cli.main("vram llama-3.1-8b --method qlora --json".split()) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["job"]["method"] == "qlora" and data["by"] == "formula" and data["terms"]["constants"] > 0
    assert cli.main("vram llama-3.1-8b --method full --gpu t4 --json".split()) == 1
    assert json.loads(capsys.readouterr().out)["gpu"]["fits"] is False


def test_simulate_and_formula_agree_on_a_small_model(capsys):
    totals = []
    for flag in ("--simulate", "--formula"):
        assert cli.main(["vram", "tiny", "--batch", "4", "--seq", "64", "--json", flag]) == 0
        data = json.loads(capsys.readouterr().out)
        totals.append(data["terms"]["weights"])
        assert data["by"] == {"--simulate": "simulator", "--formula": "formula"}[flag]
        assert bool(data.get("timeline")) == (flag == "--simulate")
    assert totals[0] == pytest.approx(totals[1], rel=1e-3)


@pytest.mark.parametrize(
    "words, said",
    [
        ("vram llama-3.3-8b", "Did you mean llama-3.1-8b"),
        ("vram llama-3.1-8b --method qlorra", "did you mean 'qlora'"),
        ("vram llama-3.1-8b --gpu t5", "Did you mean t4"),
        ("vram llama-3.1-8b --batch 0", "batch=0: a whole number"),
        ("vram llama-3.1-8b --r 100000", "r=100000"),
        ("vram llama-3.1-8b --gpu 24G", "24 GB or 24 GiB"),
        ("vram", "which model?"),
        ("vram llama-3.1-8b --plan", "--plan needs a GPU"),
        ("vram llama-3.1-8b --plan --largest seq --gpu t4", "two questions"),
        ("vram llama-3.1-8b --largest bach --gpu t4", "did you mean 'batch'"),
        ("vram llama-3.1-8b --options placement", "NAME=VALUE"),
        ("vram llama-3.1-8b --shapes 4", "ROWSxTOKENS"),
        ("vram llama-3.1-8b --quantization nf5", "did you mean 'nf4'"),
        ("vram --list gpu", "did you mean 'gpus'"),
        ("vram llama-3.1-8b --objective cheap --plan --gpu t4", "objective='cheap'"),
        ("vram llama-3.1-8b --method full --quantization nf4", "cannot be trained"),
    ],
    ids=lambda x: x if x.startswith("vram") else "",
)
def test_a_wrong_question_is_a_sentence_and_2(words, said, capsys, tmp_path):
    assert cli.main(words.split()) == 2
    err = capsys.readouterr().err
    assert said in err and err.startswith("pefttools vram: ") and "Traceback" not in err


def test_a_configuration_with_missing_fields(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    assert cli.main(["vram", str(tmp_path)]) == 2
    assert "lacks the field" in capsys.readouterr().err


def test_lists(capsys):
    assert cli.main(["vram", "--list"]) == 0
    out = capsys.readouterr().out
    assert "llama-3.2-1b" in out and "1,235,814,400" in out and "t4 " in out and all(f"  {m} " in out for m in METHODS)
    assert cli.main(["vram", "--list", "gpus", "--json"]) == 0
    assert "t4" in json.loads(capsys.readouterr().out)["gpus"]


def test_plan_and_largest_reach_their_functions(monkeypatch, capsys, tmp_path):
    from types import SimpleNamespace

    import pefttools.vram.largest
    import pefttools.vram.planner

    seen = {}

    def played(**more):
        def call(*args, **kwargs):
            seen.update(args=args, **kwargs)
            return SimpleNamespace(best=more.get("best"), value=more.get("value"), to_dict=lambda: {"played": True})
        return call

    lengths = tmp_path / "lengths.txt"
    lengths.write_text("12 90\n512\n")
    monkeypatch.setattr(pefttools.vram.planner, "plan", played(best=1))
    assert (
        cli.main(
            "vram m --plan --gpu t4 --batch 8 --accumulate 2 --methods lora,qlora --tasks 9 --r 4 --json".split()
            + ["--lengths", str(lengths)]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out) == {"played": True}
    assert seen["args"] == ("m", "t4") and seen["methods"] == ["lora", "qlora"] and seen["effective_batch"] == 16
    assert (seen["tasks"], seen["r"], seen["lengths"], seen["seq"]) == (9, 4, [12, 90, 512], None)
    monkeypatch.setattr(pefttools.vram.planner, "plan", played())
    assert cli.main("vram m --plan --gpu t4".split()) == 1 and seen["seq"] == 512
    monkeypatch.setattr(pefttools.vram.largest, "largest", played(value=3))
    assert cli.main("vram m --largest seq --multiple 64 --method qlora --gpu t4".split()) == 0
    assert seen["args"] == ("seq", "m", "t4") and seen["multiple"] == 64 and seen["method"] == "qlora"
    monkeypatch.setattr(pefttools.vram.largest, "largest", played())
    assert cli.main("vram --largest model --gpu t4".split()) == 1
    lengths.write_text("12 ninety")
    assert cli.main(f"vram m --plan --gpu t4 --lengths {lengths}".split()) == 2 and "ninety" in capsys.readouterr().err


def test_largest_is_simulated_on_both_sides(capsys):
    """The real formula and simulator: the largest batch fits, the next does not."""
    from pefttools.vram.largest import largest
    from pefttools.vram.simulator import simulate

    model = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048, "max_position_embeddings": 512,
             "tie_word_embeddings": True}
    found = largest("batch", model, "0.7 GiB", method="lora", seq=128)
    limit = found.budget.usable
    assert simulate(found.job).device <= limit < simulate(found.job.but(batch=found.value + 1)).device
    assert found.above == found.value + 1 and found.fits.by == found.too_much.by == "simulator"


@pytest.mark.parametrize(
    "words", ["vram --list", "vram llama-3.1-8b --method qlora --gpu t4 --formula"], ids=["list", "formula"]
)
def test_the_formula_brings_no_torch(words):
    code = f"import sys\nfrom pefttools.cli import main\nmain({words.split()})\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
