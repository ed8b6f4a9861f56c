"""Published measurements: each row has a job or a reason, the page is written, a few rows come out as measured."""
from __future__ import annotations

import copy
import csv
import dataclasses
import json

import pytest

from pefttools.vram import other_runs, peft_runs, published
from pefttools.vram.presets import config_of
from pefttools.vram.published_page import page, summary, table
from pefttools.vram.units import GiB

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = published.read_rows()
PEFT = [row for row in ROWS if published.is_peft(row)]
OTHER = [row for row in ROWS if not published.is_peft(row)]


@pytest.fixture
def two_layers(monkeypatch):
    """The same model with 2 layers, for what grows with them: quick."""
    config = copy.deepcopy(config_of("llama-3.2-3b"))
    config.num_hidden_layers = 2
    config.layer_types = None
    monkeypatch.setattr(peft_runs, "MODEL", config)
    return config


def by_id(name: str) -> dict[str, str]:
    return next(row for row in ROWS if row["id"] == name)


def test_the_rows_are_the_csv_s():
    assert len(ROWS) == len({row["id"] for row in ROWS}) == len(PEFT) + len(OTHER)
    assert len(PEFT) == 31 and len(OTHER) == 71


def test_every_other_row_has_a_job_or_a_reason():
    for row in OTHER:
        found = other_runs.recipe(row["id"])
        assert (found.job is None) == bool(found.why), row["id"]
        if found.job is not None:
            assert found.world in other_runs.WORLDS and found.path, row["id"]
            assert found.job.batch == int(row["batch"]), row["id"]
            assert found.commit or "not in the index" in found.path, row["id"]


def test_every_peft_row_is_an_experiment():
    for row in PEFT:
        run = peft_runs.experiment(row["url_or_path"])
        assert len(run.commit) == 12 and run.batch == int(row["batch"])
        config = run.config or {}
        if row["rank"] and "num_virtual_tokens" not in config:
            assert config["r"] == int(row["rank"]), row["id"]


def test_experiments_that_the_installed_peft_does_not_have_say_so():
    for name in peft_runs.names():
        run = peft_runs.experiment(name)
        if run.missing:
            assert "peft" in run.missing
            with pytest.raises(ValueError, match=name.replace("+", r"\+")):
                run.peft_config()
        elif run.config is not None:
            assert str(run.peft_config().peft_type.value) == run.config["peft_type"]
    assert "BONE" in peft_runs.experiment("bone/llama-3.2-3B-bat").missing


def test_an_unknown_experiment_names_the_nearest():
    with pytest.raises(ValueError, match="lora/llama-3.2-3B-rank64"):
        peft_runs.experiment("lora/llama-3.2-3B-rank65")


def test_training_parameters_of_an_experiment_replace_the_defaults():
    assert peft_runs.experiment("oft/llama-3.2-3B-rank32-batch_size-2").batch == 2
    assert peft_runs.experiment("lora/llama-3.2-3B-rank32").batch == 4
    assert peft_runs.experiment("osf/llama-3.2-3B-rank128").training["autocast_adapter_dtype"] is False


@pytest.mark.parametrize("name", ["35", "38", "51"])       # LoRA, a method without a formula, virtual tokens
def test_peft_rows_come_out_within_the_aim(name):
    found = published.answer(by_id(name))
    assert not found.why
    assert abs(found.error(found.simulator)) < 4, found
    assert found.measured == pytest.approx(float(by_id(name)["peak_gib"]) * GiB, abs=1)
    if found.formula is not None:
        assert abs(found.error(found.formula)) < 8


def test_padding_repeats_keys_and_values(two_layers):
    run = peft_runs.experiment("lora/llama-3.2-3B-rank32")
    plain, padded = run.simulate(256), run.simulate(256, padded=True)
    repeated = 2 * 4 * 256 * 2 * 2 * (3072 - 1024)        # layers · tokens · bytes · (K, V) · (24 − 8 heads)
    # … beside the 8 heads, which the cache holds; the mask as numbers, once a layer, and the cache of the old ones
    held = 2 * 4 * 256 * 2 * 2 * 1024
    mask = 2 * 4 * 256 * 256 * 2
    assert padded.total - plain.total == pytest.approx(repeated + held + mask, rel=0.03)


def test_lora_fa_does_not_train_a(two_layers):
    run = peft_runs.experiment("lora/llama-3.2-3B-rank32-lorafa")
    both = peft_runs.experiment("lora/llama-3.2-3B-rank32").simulate(64)
    only_b = run.simulate(64)
    assert both.trainable - only_b.trainable == 2 * 2 * 32 * 3072
    assert only_b.total < both.total


def test_the_training_step_is_the_largest_phase():
    run = peft_runs.experiment("ln_tuning/llama-3.2-3B-default")          # the smallest of all
    phases = run.phases(run.simulate())
    assert max(phases, key=phases.get) == "training"


def test_generation_and_wiki_are_bounds_of_what_is_held():
    assert peft_runs.generation_bytes(0) > 2 * 2 * 50 * 800 * 1024 * 28
    assert peft_runs.wiki_bytes(10) == peft_runs.wiki_bytes(0) + 10


def small(found, config):
    return dataclasses.replace(found, job=found.job.but(model=config))


def test_litgpt_s_chunks_hold_less_than_transformers_loss(two_layers):
    from pefttools.vram.simulator import simulate

    found = small(other_runs.recipe("116"), two_layers)
    memory, plain = found.simulate(), simulate(found.job)
    assert memory.trainable == plain.trainable == 2 * 32 * (3072 + 3072 + 3072 + 1024)
    saved = plain.total - memory.total
    N, V = 512, 128_256
    assert 0.5 * N * V * (14 - 4) < saved < N * V * 14      # 14·V bytes a token there, about 4·V and a chunk here
    assert found.compared(memory) == memory.total


def test_torchtune_counts_no_foreach_step(two_layers):
    found = small(other_runs.recipe("151"), two_layers)
    memory = found.simulate()
    assert found.compared(memory) <= memory.total


def test_the_page_is_written_and_says_all(tmp_path):
    some = published.answers([by_id("202"), by_id("184")], jobs=1)
    text = page(some, [], {(704, True): [1.0, -2.0]})
    assert "batch and length are not stated" in text and "Unsloth" in text and "4 × 704, padded" in text
    assert "No row of PEFT's comparison could be simulated." in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")


def test_a_row_of_another_source_gets_a_reason():
    found = published.answer({"id": "9999", "source": "somewhere", "url_or_path": "x", "model": "m", "method": "LoRA",
                              "peak_value": "3", "unit": "GB"})
    assert "has not been looked at" in found.why and found.measured == 3_000_000_000


def test_further_peft_rows_are_found_by_name(tmp_path):
    row = {"id": "x1", "source": "peft method_comparison", "model": "Llama-3.2-3B", "method": "?", "peak_value": "20",
           "unit": "GiB", "url_or_path": "method_comparison/MetaMathQA/results/nothing--like-this.json"}
    assert "no experiment" in published.answer(row).why
    row["url_or_path"] = "method_comparison/MetaMathQA/results/bone--llama-3.2-3B-bat.json"
    assert "no tuner BONE" in published.answer(row).why


@pytest.mark.parametrize("column", published.COLUMNS)
def test_a_csv_says_which_column_is_missing(column, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [name for name in published.COLUMNS if name != column])
        writer.writeheader()
    assert published.main(["--csv", str(path), "--only", "35"]) == 2
    error = capsys.readouterr().err
    assert f"column {column} missing" in error and str(path) in error


@pytest.mark.parametrize(("value", "unit", "says"), [
    ("much", "GB", "a number above 0"), ("-1", "GB", "a number above 0"), ("3", "gigs", "GB, GiB, MB or MiB")])
def test_a_csv_with_a_wrong_value_says_which(value, unit, says, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(",".join(published.COLUMNS) + f"\n7,s,u,m,x,{value},{unit}\n")
    with pytest.raises(ValueError, match=says):
        published.read_rows(path)


def test_an_unknown_row_and_an_absent_folder_are_named(capsys, tmp_path):
    assert published.main(["--only", "35,7777"]) == 2
    assert "7777" in capsys.readouterr().err
    assert published.main(["--out", str(tmp_path / "nowhere" / "page.md")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_summary_counts_by_nearest_rank():
    line = summary("x", [-1.0] * 19 + [9.0])
    assert line == "| x | 20 | 1.00 % | 1.00 % | 19 of 20 | 9.00 % |"
    assert "–" in summary("none", [])


def test_the_table_keeps_the_source_s_unit():
    text = table(published.answers([by_id("202"), by_id("7") | {"url_or_path": "results/none--such.json"}], jobs=1))
    assert "56.00 GB" in text and ("20.55 GiB" in text or "20.54 GiB" in text)


def test_data_are_readable_and_complete():
    facts = peft_runs.facts()
    assert len(facts["experiments"]) >= 75 and facts["training"]["batch_size_eval"] == 50
    assert json.dumps(facts)                                # plain data
