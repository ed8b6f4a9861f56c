"""The bundled data set: its splits, its files, and the proof that its tests tell right from wrong."""

from __future__ import annotations

import gzip
import json
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from pefttools.lab import data
from pefttools.lab.tasks import KINDS, Kind, build, check, core
from pefttools.lab.tasks import words as vocabulary

COLUMNS = ["instruction", "input", "output", "text", "kind", "family", "tests"]


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict]]:
    return {split: data.load_rows(split) for split in data.SPLITS}


def names(row: dict) -> set[str]:
    """Names of functions, classes and named tuples that an answer defines at the left margin."""
    return set(re.findall(r"^(?:def |class )?(\w+)(?=\(| =|:)", row["output"], re.MULTILINE))


# --- what is in it

def test_size_and_variety(rows):
    kinds = {split: {row["kind"] for row in rows[split]} for split in rows}
    assert len(rows["train"]) >= 9000 and len(kinds["train"]) >= 50
    assert len({row["family"] for row in rows["train"]}) >= 8
    assert kinds["held_out"] == kinds["train"] and len(rows["held_out"]) >= 500
    assert len(kinds["new_kinds"]) >= 10 and len(rows["new_kinds"]) >= 250
    assert not kinds["new_kinds"] & kinds["train"]
    with_input = {row["kind"] for row in rows["train"] if row["input"]}
    assert len(with_input) >= len(kinds["train"]) / 3


def test_columns_and_text(rows):
    for split in rows:
        for row in rows[split]:
            assert list(row) == COLUMNS
            assert row["text"] == data.prompt_of(row) + data.answer_of(row)
            assert check.code_of(row["output"]) and len(row["tests"]) >= 2
            assert "$" not in row["text"]
            assert all("assert " in test for test in row["tests"])


def test_no_row_twice(rows):
    texts = [row["text"] for split in rows for row in rows[split]]
    assert len(texts) == len(set(texts))


def test_prompt_with_and_without_input():
    row = {"instruction": "Do it.", "input": "", "output": "x", "text": ""}
    assert data.prompt_of(row) == "Do it.\n"
    assert data.prompt_of({**row, "input": "[1]"}) == "Do it.\n[1]\n"
    assert data.prompt_of({"instruction": "Do it.", "input": None}) == "Do it.\n"


def test_first_rows_of_held_out_cover_the_kinds(rows):
    for split in ("held_out", "new_kinds"):
        kinds = {row["kind"] for row in rows[split]}
        assert {row["kind"] for row in rows[split][:len(kinds)]} == kinds


def test_rows_are_short_for_the_bundled_tokenizer(rows):
    path = Path(data.FOLDER).parent / "tiny" / "tokenizer.json"
    assert path.is_file(), "it is part of the package"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    for split in rows:
        lengths = [len(found.ids) + 2 for found in tokenizer.encode_batch([row["text"] for row in rows[split][::5]],
                                                                         add_special_tokens=False)]
        assert median(lengths) <= 75 and max(lengths) <= 150


# --- held out

def test_held_out_names_are_not_in_train(rows):
    seen = {name for row in rows["train"] for name in names(row)} - {"file"}
    assert len(seen) > 6000
    for split in ("held_out", "new_kinds"):
        for row in rows[split]:
            assert names(row) and not names(row) & seen, row["output"]


def test_held_out_wordings_and_openings_are_not_in_train():
    for kind in KINDS:
        assert kind.new or (len(set(kind.wordings)) >= 6 and len(set(kind.held_out)) >= 2), kind.name
        assert not set(kind.wordings) & set(kind.held_out), kind.name
    for opening, phrases in core.OPENINGS["train"].items():
        assert not set(phrases) & set(core.OPENINGS["held_out"][opening])


@pytest.mark.parametrize("values", [range(2, 30), range(1, 13), vocabulary.WORDS, vocabulary.FIELDS,
                                    vocabulary.SEPARATORS, vocabulary.LETTERS], ids=len)
def test_constants_are_divided(values):
    for kind in ("add_affix", "clamp"):
        train, held_out, new = (core.Draw(random.Random(0), part, kind).mine(values) for part in data.SPLITS)
        assert train and held_out and not set(train) & set(held_out)
        assert set(train) | set(held_out) == set(values) == set(new)
        assert len(held_out) == max(1, len(values) // 5)
    assert len(set(vocabulary.WORDS)) == len(vocabulary.WORDS) and "'" not in "".join(vocabulary.WORDS)


def test_numbers_of_held_out_rows_are_not_in_train_rows_of_the_kind(rows):
    for kind in ("best_plus", "repeat_text", "with_key", "generator"):
        seen, held = ({number for row in rows[split] if row["kind"] == kind
                       for number in re.findall(r"\b\d+\b", row["output"])} for split in ("train", "held_out"))
        assert held and not held & seen, kind


# --- right and wrong answers

@pytest.fixture
def few(monkeypatch):
    """Few rows of each kind, so that the check takes seconds; `python -m pefttools.lab.tasks --check` takes them all."""
    for split, count in {"train": 3, "held_out": 1, "new_kinds": 1}.items():
        monkeypatch.setitem(build.ROWS_PER_KIND, split, count)


@pytest.mark.parametrize("family", sorted({kind.family for kind in KINDS}))
def test_right_answers_pass_and_wrong_ones_fail(few, family):
    for kind in KINDS:
        if kind.family == family:
            found = check.check_kind((kind.name, build.SEED))
            assert not found["faults"]
            assert found["rows"] >= 1 and found["mutants"] >= 3 * found["rows"]
            assert kind.new or found["copies"] == 3


def test_rows_of_the_files_pass(rows):
    for row in [row for split in rows for row in rows[split][:97]]:
        code = check.code_of(row["output"])
        assert check.passes(code, row["tests"]), row["text"]
        assert not check.passes("", row["tests"])
        name = re.search(r"(?:def|class) (\w+)|^(\w+) = ", code, re.MULTILINE)
        assert not check.passes(code.replace(name[1] or name[2], "other_name"), row["tests"])


def a_kind(**changes) -> Kind:
    return replace(Kind(
        "sample", "numbers", wordings=("$write that adds $n.",), held_out=("`$name` adds $n.",),
        draw=lambda d: dict(name=d.name("add"), n=d.number(2, 90)), code="def $name(x):\n    return x + $n",
        calls=lambda s: [(1,), (5,)], answer=lambda s, x: x + s.n), **changes)


@pytest.mark.parametrize(("changes", "complaint"), [
    ({}, None),
    ({"code": "def $name(x):\n    return x - $n"}, "its own output fails"),
    ({"code": "def $name(x)\n    return x + $n"}, "its own output fails"),
    ({"calls": lambda s: [], "answer": None}, "passes for"),
    ({"answer": lambda s, x: x + s.n, "code": "def $name(x):\n    return x + $n if x < $m else 0",
      "draw": lambda d: dict(name=d.name("add"), n=d.number(2, 90), m=50)}, "'m' is not said"),
    ({"held_out": ("`$name` adds a number.",)}, "'n' is not said"),
    ({"wordings": ("Write a function that adds $n.",)}, "'name' is not said"),
    ({"code": "def $name(x):\n    while $n:\n        pass"}, "its own output fails"),
])
def test_the_check_finds_faults(few, monkeypatch, changes, complaint):
    monkeypatch.setattr(check, "KINDS", (a_kind(**changes),))
    monkeypatch.setattr(check, "LIMIT_S", 0.05)
    monkeypatch.setattr(check, "kinds_of", lambda split: list(check.KINDS) if split != "new_kinds" else [])
    faults = check.check_kind(("sample", 0))["faults"]
    assert any(complaint in fault for fault in faults) if complaint else not faults, faults


def test_a_kind_with_too_few_constants_is_refused():
    with pytest.raises(ValueError, match="only 1 different rows of 120"):
        build.draw_rows(a_kind(draw=lambda d: dict(name="add_box", n=2), wordings=("`$name` adds $n.",)), "train", 120)


# --- files

def test_regenerating_gives_the_same_files():
    index = json.loads((data.FOLDER / build.INDEX).read_text())
    splits = {split: build.build(split, index["seed"]) for split in data.SPLITS}
    for split, made in splits.items():
        assert build.to_bytes(made) == gzip.decompress((data.FOLDER / f"{split}.jsonl.gz").read_bytes()), (
            f"{split} is not what the generator makes: run python -m pefttools.lab.tasks --write")
    assert build.card(splits, index["seed"]) == (data.FOLDER / "README.md").read_text()


def test_another_seed_gives_other_rows():
    kind = KINDS[0]
    first, again, other = (build.draw_rows(kind, "train", 5, seed) for seed in (1, 1, 2))
    assert first == again and first != other


def test_files_are_small():
    assert sum(path.stat().st_size for path in data.FOLDER.iterdir()) < 2_000_000


def test_loads_as_a_dataset(rows):
    for split in data.SPLITS:
        loaded = data.load_data(split)
        assert loaded.column_names == COLUMNS and loaded.num_rows == len(rows[split])
        assert loaded[0] == rows[split][0]
    assert data.load_data().num_rows == len(rows["train"])


def test_loads_by_the_card(rows, tmp_path):
    from datasets import load_dataset

    loaded = load_dataset(str(data.FOLDER), cache_dir=str(tmp_path))
    assert {split: loaded[split].num_rows for split in loaded} == {split: len(rows[split]) for split in rows}
    assert loaded["held_out"][0] == rows["held_out"][0]


def test_unknown_split():
    with pytest.raises(ValueError, match="got 'test'; the splits are train, held_out, new_kinds"):
        data.load_data("test")


@pytest.mark.parametrize("name", ["train.jsonl.gz", "splits.json"])
def test_missing_file(tmp_path, name):
    folder = shutil.copytree(data.FOLDER, tmp_path / "data")
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing; .*--write"):
        data.load_data("train", folder)


@pytest.mark.parametrize(("name", "damage"), [
    ("held_out.jsonl.gz", lambda raw: raw[:-2000]),
    ("held_out.jsonl.gz", lambda raw: raw[:500] + b"\0" * 50 + raw[550:]),
    ("held_out.jsonl.gz", lambda raw: b""),
    ("held_out.jsonl.gz", lambda raw: b"no gzip"),
    ("held_out.jsonl.gz", lambda raw: gzip.compress(gzip.decompress(raw)[:-10])),
    ("splits.json", lambda raw: raw[:100]),
    ("splits.json", lambda raw: b"[]"),
    ("splits.json", lambda raw: b"\xff\xfe"),
])
def test_damaged_file(tmp_path, name, damage):
    folder = shutil.copytree(data.FOLDER, tmp_path / "data")
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with pytest.raises(ValueError, match="held_out.*--write"):
        data.load_data("held_out", folder)


def test_loading_imports_datasets_only_when_asked():
    code = ("import sys, pefttools.lab.data as data, pefttools.lab.tasks.build; data.load_rows('new_kinds'); "
            "print([name for name in ('datasets', 'torch', 'transformers') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_command_line(capsys):
    from pefttools.lab.tasks.__main__ import main

    assert main(["--show", "1", "--kind", "clamp"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("--- numbers/clamp") == 2 and "max(" in shown and "assert " in shown
    assert main([]) == 2
