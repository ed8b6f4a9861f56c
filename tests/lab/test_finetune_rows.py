"""Rows from files and from Python: every form is read, every fault is named, nothing is dropped in silence."""

from __future__ import annotations

import json

import pytest

from pefttools.lab.rows import read_rows

GOOD = [
    {"instruction": "Add, please.", "input": "", "output": "x + 1"},
    {"instruction": 'Say "é".', "input": "1\n2", "output": "é"},
]


def written(folder, name: str, rows: list[dict]):
    path = folder / name
    if name.endswith("jsonl"):
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    elif name.endswith("json"):
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif name.endswith("csv"):
        import csv

        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_every_form_gives_the_same_rows(tmp_path, name):
    path = written(tmp_path, name, [{**row, "id": "7"} for row in GOOD])
    assert read_rows(path) == read_rows(str(path)) == GOOD
    renamed = [{"question": row["instruction"], "answer": row["output"]} for row in GOOD]
    path = written(tmp_path, f"b{path.suffix}", renamed)
    assert read_rows(path, {"instruction": "question", "output": "answer"}) == [{**row, "input": ""} for row in GOOD]


def test_rows_of_python_and_of_the_course():
    from pefttools.lab import load_data

    assert read_rows(GOOD) == GOOD and read_rows(iter(GOOD)) == GOOD
    some = load_data("held_out").select(range(3))
    assert read_rows(some) == [{name: row[name] for name in ("instruction", "input", "output")} for row in some]
    assert len(read_rows("held_out")) == len(load_data("held_out"))
    with pytest.raises(ValueError, match="a list of rows is needed.*got a dict"):
        read_rows({"instruction": "x"})


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("a.jsonl", '{"instruction": "a", "out": "b"}\n', "has no column 'output'; did you mean 'out'"),
        ("a.csv", "instruction,answer\na,b\n", "has no column 'output'.*It has instruction, answer.*--columns output="),
        ("a.csv", "instruction,output,output\na,b,c\n", "has the column 'output' twice"),
        (
            "a.csv",
            "instruction,output\na,b\ninstruction,output\nc,d\n",
            "line 3 is the header a second time.*1 of 3 rows",
        ),
        ("a.csv", "instruction,output\na,b, and c\n", "line 2 has 3 cells for 2 columns"),
        ("a.csv", "instruction,output\na\nb,c\n", "line 2 has no text in 'output': it is missing"),
        ("a.csv", 'instruction,output\n"a,b\n', "is no CSV"),
        ("a.csv", "", "holds no rows"),
        (
            "a.jsonl",
            '{"instruction": "a", "output": "b", "output": "c"}\n{"instruction": "a", "output": "b"}\n',
            "line 1 has the column 'output' twice",
        ),
        (
            "a.jsonl",
            '{"instruction": "a", "output": 3}\n{"instruction": "a", "output": "b"}\n',
            "no text in 'output': it is of type int",
        ),
        (
            "a.jsonl",
            '{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": "b", "input": []}\n',
            "line 2.*'input'",
        ),
        (
            "a.jsonl",
            '{"instruction": "a", "output": "b"}\n{"instruction": " ", "output": "b"}\n' * 3,
            "line 2 has an empty 'instruction' .and 2 more like it.. 3 of 6 rows cannot be used; skip_bad",
        ),
        ("a.json", '{"data": []}', "holds one dict; a list of objects"),
        ("a.json", '{"a": 1}\n{"a": 2}\n', "one object a line is JSON Lines"),
        ("a.json", "[{]", "is no JSON"),
        ("a.txt", "x", "ends in .txt; rows are read from .jsonl"),
        ("a.parquet", "PAR1 and no more", "no whole Parquet file"),
    ],
)
def test_a_fault_is_named_with_its_place(tmp_path, name, text, said):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=f"(?s){said}"):
        read_rows(path)


def test_a_parquet_file_that_was_cut_off_and_text_that_is_not_utf8(tmp_path):
    path = written(tmp_path, "a.parquet", GOOD * 50)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="no whole Parquet file.*download it again"):
        read_rows(path)
    path = tmp_path / "a.csv"
    path.write_bytes("instruction,output\na,b\né,c\n".encode("latin-1"))
    with pytest.raises(ValueError, match="line 3 is not UTF-8"):
        read_rows(path)


def test_bad_rows_are_left_out_when_asked_and_counted(tmp_path):
    rows = [
        GOOD[0],
        {"instruction": "", "output": "x"},
        {"instruction": "a", "output": None},
        "text",
        GOOD[1],
        {"instruction": "", "output": "y"},
    ]
    said: list[str] = []
    assert read_rows(rows, skip_bad=True, say=said.append) == GOOD
    assert (
        len(said) == 1
        and "4 of 6 rows" in said[0]
        and "row 2 has an empty 'instruction' (and 1 more like it)" in said[0]
    )
    with pytest.raises(ValueError, match="none of the 2 rows can be used"):
        read_rows([{"instruction": "", "output": ""}] * 2, skip_bad=True)


def test_wrong_names(tmp_path):
    with pytest.raises(ValueError, match="did you mean train"):
        read_rows("trian")
    with pytest.raises(ValueError, match="not the other way round"):
        read_rows(GOOD, {"answer": "output"})
    with pytest.raises(ValueError, match="has no column 'Q'"):
        read_rows(GOOD, {"input": "Q"})
