"""The splice: answers arrive, nothing else does, and nothing in a submission makes it raise."""

from __future__ import annotations

import copy
import json

import nbformat
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pefttools.grading.chapter import dumps
from pefttools.grading.splice import BadSubmission, answer_names, check_name, identity, read_notebook, splice

NAMES = ["tiny-double", "tiny-box", "tiny-total", "tiny-q-even"]


@pytest.fixture
def pristine(tiny):
    return tiny.pristine()


@pytest.fixture
def solved(tiny):
    return tiny.solved()


def answers(notebook):
    return {c["id"]: "".join(c["source"]) for c in notebook["cells"] if c["id"] in NAMES}


def at(notebook, name):
    return next(n for n, cell in enumerate(notebook["cells"]) if cell.get("id") == name)


def code(source, **metadata):
    return {"cell_type": "code", "metadata": metadata, "source": source, "outputs": [], "execution_count": None}


def everything_else(notebook):
    return [
        (c["cell_type"], c["id"], c["metadata"], None if c["id"] in NAMES else "".join(c["source"]))
        for c in notebook["cells"]
    ]


def test_answers_are_taken_and_the_rest_is_pristine(pristine, solved):
    solved["cells"][3]["source"] = "print('changed demonstration')"
    solved["cells"][at(solved, "check-tiny-box")]["metadata"]["tags"] = ["skip-execution"]
    merged, repairs = splice(pristine, solved)
    assert answers(merged) == answers(solved)
    assert everything_else(merged) == everything_else(pristine)
    assert repairs == []
    nbformat.validate(merged)


def test_splicing_again_repairs_nothing(pristine, solved):
    solved["cells"].pop(at(solved, "check-tiny-box"))
    once, repairs = splice(pristine, solved)
    assert repairs
    twice, repairs = splice(pristine, json.loads(dumps(once)))
    assert repairs == [] and dumps(twice) == dumps(once)


def test_a_blank_notebook_stays_blank(pristine):
    merged, repairs = splice(pristine, pristine)
    assert dumps(merged) == dumps(pristine) and repairs == []


def test_the_arguments_are_not_changed(pristine, solved):
    before = copy.deepcopy((pristine, solved))
    splice(pristine, solved)
    assert (pristine, solved) == before


def test_names_of_answers_and_checks(pristine):
    assert answer_names(pristine) == NAMES
    assert [check_name(c) for c in pristine["cells"] if check_name(c)] == NAMES


# ------------------------------------------------------------------------------------------ what gets repaired


def colab(notebook):
    """As Colab saves: no cell ids but in the metadata, nbformat 4.0, its own tags."""
    for cell in notebook["cells"]:
        cell["metadata"] = {"id": cell.pop("id"), "outputId": "x", **cell["metadata"]}
    return notebook | {"nbformat_minor": 0}


def stripped(notebook):
    for cell in notebook["cells"]:
        cell["metadata"] = {}
        cell.pop("id")
    return notebook


def no_metadata(notebook):
    for cell in notebook["cells"]:
        del cell["metadata"]
    return notebook


def format_3(notebook):
    cells = [
        {"cell_type": c["cell_type"], "input" if c["cell_type"] == "code" else "source": c["source"]}
        for c in notebook["cells"]
    ]
    return {"worksheets": [{"cells": cells}], "nbformat": 3, "metadata": {}}


def backwards(notebook):
    notebook["cells"].reverse()
    return notebook


def retyped(notebook):
    for cell in notebook["cells"]:
        cell["cell_type"] = "markdown"
    return notebook


def foreign_schema(notebook):
    for cell in notebook["cells"]:
        if "nbgrader" in cell["metadata"]:
            cell["metadata"]["nbgrader"]["schema_version"] = 99
    return notebook


def lines(notebook):
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"]).splitlines(keepends=True)
    return notebook


def windows(notebook):
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"]).replace("\n", "\r\n")
    return notebook


@pytest.mark.parametrize(
    "damage", [colab, stripped, no_metadata, format_3, backwards, retyped, foreign_schema, lines, windows]
)
def test_answers_survive(damage, pristine, solved, tmp_path):
    wanted = answers(solved)
    (tmp_path / "x.ipynb").write_text(json.dumps(damage(solved)))
    merged, repairs = splice(pristine, read_notebook(tmp_path / "x.ipynb"))
    assert answers(merged) == wanted
    assert everything_else(merged) == everything_else(pristine)
    if damage in (stripped, format_3):
        assert any(
            "recognised by its first line (tiny-double, tiny-box, tiny-total, tiny-q-even)" in r for r in repairs
        )
    if damage is retyped:
        assert any("no longer a code cell" in r for r in repairs)
    if damage in (foreign_schema, lines, windows):
        assert repairs == []


def test_a_missing_answer_is_not_written(pristine, solved):
    solved["cells"].pop(at(solved, "tiny-box"))
    merged, repairs = splice(pristine, solved)
    assert answers(merged)["tiny-box"] == answers(pristine)["tiny-box"]
    assert repairs == ["The answer cell is missing: it counts as not written (tiny-box)."]


def test_a_missing_check_is_put_back_and_an_edited_one_restored(pristine, solved):
    solved["cells"].pop(at(solved, "check-tiny-box"))
    solved["cells"][at(solved, "check-tiny-double")]["source"] = "2.0"
    merged, repairs = splice(pristine, solved)
    assert "".join(merged["cells"][at(merged, "check-tiny-double")]["source"]) == 'check("tiny-double", double)'
    assert repairs == [
        "The check cell had been edited and is put back as it was (tiny-double).",
        "The check cell was missing and is put back (tiny-box).",
    ]


def test_of_copies_the_last_written_one_before_its_check_is_taken(pristine, solved):
    cell = solved["cells"][at(solved, "tiny-total")]
    better = {**copy.deepcopy(cell), "source": "# exercise: tiny-total\ntotal_of_numbers = 21  # better"}
    scratch = {**copy.deepcopy(cell), "source": "# exercise: tiny-total\ntotal_of_numbers = 'scratch'"}
    blank = copy.deepcopy(pristine["cells"][at(pristine, "tiny-total")])
    n = at(solved, "tiny-total")
    solved["cells"][n + 1 : n + 1] = [better, blank]
    solved["cells"].append(scratch)
    merged, repairs = splice(pristine, solved)
    assert "better" in answers(merged)["tiny-total"]
    assert repairs == ["The answer cell occurs 4 times: the last written one before its check was taken (tiny-total)."]


def test_the_halves_of_a_split_cell_are_put_together(pristine, solved):
    n = at(solved, "tiny-box")
    text = "".join(solved["cells"][n]["source"])
    top, bottom = text.split("    def volume", 1)
    second = copy.deepcopy(solved["cells"][n])
    solved["cells"][n]["source"], second["source"] = top.rstrip("\n"), "    def volume" + bottom
    second.pop("id")
    solved["cells"].insert(n + 1, second)
    merged, repairs = splice(pristine, solved)
    assert "def __init__" in answers(merged)["tiny-box"] and "def volume" in answers(merged)["tiny-box"]
    compile(answers(merged)["tiny-box"].replace("### ", "# "), "x", "exec")
    assert any("its parts were put together (tiny-box)" in r for r in repairs)


def test_own_cells_are_left_out_and_said(pristine, solved):
    solved["cells"].insert(5, code("import os\nhelper = 1"))
    solved["cells"].append(code(""))
    merged, repairs = splice(pristine, solved)
    assert "helper" not in dumps(merged)
    assert repairs == ["1 code cell of your own is left out: only the answer cells are taken."]


def test_an_answer_without_its_marker_goes_by_its_metadata(pristine, solved):
    n = at(solved, "tiny-total")
    solved["cells"][n]["source"] = "total_of_numbers = 21"
    solved["cells"][n]["id"] = "something-else"
    merged, repairs = splice(pristine, solved)
    assert answers(merged)["tiny-total"] == "total_of_numbers = 21" and repairs == []


def test_a_marker_in_a_check_cell_does_not_make_it_an_answer(pristine, solved):
    solved["cells"][at(solved, "check-tiny-total")]["source"] = "# exercise: tiny-total\ntotal_of_numbers = 0"
    merged, _ = splice(pristine, solved)
    assert "sum(numbers)" in answers(merged)["tiny-total"]


def test_an_endless_answer_is_refused(pristine, solved):
    solved["cells"][at(solved, "tiny-total")]["source"] = "# exercise: tiny-total\n" + "x = 1\n" * 100_000
    merged, repairs = splice(pristine, solved)
    assert answers(merged)["tiny-total"] == answers(pristine)["tiny-total"]
    assert "more than 262,144 characters" in repairs[0]


def test_text_that_no_file_can_hold_is_mended(pristine, solved):
    solved["cells"][at(solved, "tiny-total")]["source"] = "# exercise: tiny-total\ntotal_of_numbers = 21  # \ud800\x00"
    merged, _ = splice(pristine, solved)
    dumps(merged).encode("utf-8")
    assert answers(merged)["tiny-total"].endswith("# ?")


def test_identity_prefers_metadata_then_id_then_first_line():
    known = {"a", "b", "c"}
    cell = {"metadata": {"nbgrader": {"grade_id": "a"}}, "id": "b", "source": "# exercise: c"}
    assert identity(cell, known) == "a"
    assert identity(cell | {"metadata": {}}, known) == "b"
    assert identity({"source": ["\n", "## Exercise : C \n", "x"]}, known) == "c"
    assert identity({"source": "x = 1\n# exercise: c"}, known) is None
    assert identity(None, known) is None


# ------------------------------------------------------------------------------------------ into a new version


def test_with_the_previous_version_a_changed_stub_reaches_the_reader(tiny, pristine):
    mine = copy.deepcopy(pristine)
    mine["cells"][at(mine, "tiny-double")]["source"] = "# exercise: tiny-double\ndef double(x):\n    return 2 * x"
    new = copy.deepcopy(pristine)
    for name, text in {
        "tiny-box": "a new stub",
        "check-tiny-box": "a new check",
        "tiny-double": "another stub",
    }.items():
        new["cells"][at(new, name)]["source"] = text
    new["cells"].append({**copy.deepcopy(new["cells"][at(new, "tiny-total")]), "id": "tiny-new"})
    new["cells"][-1]["metadata"]["nbgrader"]["grade_id"] = "tiny-new"
    merged, repairs = splice(new, mine, previous=pristine)
    assert answers(merged)["tiny-box"] == "a new stub"
    assert "return 2 * x" in answers(merged)["tiny-double"]
    assert repairs == []


# ------------------------------------------------------------------------------------------ whatever comes

junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([*NAMES, "# exercise: tiny-box\nx = 1"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["cell_type", "source", "input", "metadata", "nbgrader", "grade_id", "id", "outputs", "x"]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cells=st.lists(junk, max_size=6), seed=st.integers(0, 30))
def test_any_cells_at_all_give_a_valid_notebook(pristine, solved, cells, seed):
    mixed = solved["cells"][:seed] + cells + solved["cells"][seed:]
    merged, repairs = splice(pristine, {"cells": mixed})
    nbformat.validate(merged)
    assert everything_else(merged) == everything_else(pristine)
    assert all(isinstance(r, str) and r.endswith(".") for r in repairs)


@pytest.mark.parametrize("submitted", [{}, {"cells": None}, {"cells": {}}, [], None, "x", {"cells": [None, 1, [], {}]}])
def test_anything_but_a_notebook_counts_as_nothing_written(pristine, submitted):
    merged, repairs = splice(pristine, submitted)
    assert answers(merged) == answers(pristine)
    assert (
        "The answer cell is missing: it counts as not written (tiny-double, tiny-box, tiny-total, tiny-q-even)."
        in repairs
    )


# ------------------------------------------------------------------------------------------ files

NOT_NOTEBOOKS = {
    "broken": (b'{"cells": [', "JSON is broken"),
    "empty": (b"  \n", "is empty"),
    "zip": (b"PK\x03\x04....", "zip archive"),
    "list": (b"[]", "not a notebook"),
    "no cells": (b'{"nbformat": 4}', "no list of cells"),
    "html": (b"<!doctype html>", "JSON is broken"),
    "deep": (b"[" * 200_000, "nested too deeply|JSON is broken"),
    "huge number": (b'{"cells": [' + b"9" * 5000 + b"]}", "JSON is broken"),
    "many cells": (b'{"cells": [' + b"0," * 6000 + b"0]}", "has 6001 cells"),
    "binary": (bytes(range(256)), "JSON is broken"),
}


@pytest.mark.parametrize("case", NOT_NOTEBOOKS)
def test_what_is_no_notebook_is_said_in_a_sentence(case, tmp_path):
    data, message = NOT_NOTEBOOKS[case]
    (tmp_path / "x.ipynb").write_bytes(data)
    with pytest.raises(BadSubmission, match=message) as raised:
        read_notebook(tmp_path / "x.ipynb")
    assert str(raised.value).startswith("x.ipynb ") and str(raised.value).endswith(".")


def test_missing_folder_and_oversized_files(tmp_path):
    with pytest.raises(BadSubmission, match="does not exist"):
        read_notebook(tmp_path / "none.ipynb")
    with pytest.raises(BadSubmission, match="is not a file"):
        read_notebook(tmp_path)
    (tmp_path / "big.ipynb").write_bytes(b" " * 2_000_000)
    with pytest.raises(BadSubmission, match="has 2 MiB; the limit is 1 MiB"):
        read_notebook(tmp_path / "big.ipynb", limit=2**20)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_any_usual_encoding_is_read(encoding, solved, tmp_path):
    (tmp_path / "x.ipynb").write_bytes(json.dumps(solved, ensure_ascii=False).encode(encoding))
    assert read_notebook(tmp_path / "x.ipynb")["cells"] == solved["cells"]


# ------------------------------------------------------------------------------------------ answers that moved


def test_an_answer_in_a_new_cell_below_is_taken(pristine, solved):
    """With the marker wherever it stands; without it where it defines what the stub asks for."""
    for marker in ("# exercise: tiny-double\n", ""):
        mine = copy.deepcopy(pristine)
        n = at(mine, "tiny-double")
        mine["cells"].insert(n + 1, code("print('trying')"))
        mine["cells"].insert(n + 2, code(f"{marker}def double(x):\n    return 2 * x"))
        merged, repairs = splice(pristine, mine)
        assert "return 2 * x" in answers(merged)["tiny-double"]
        assert "trying" not in answers(merged)["tiny-double"]
        said = "occurs 2 times" if marker else "stood in a cell of your own under the answer cell"
        assert any(said in r for r in repairs) and any("1 code cell of your own is left out" in r for r in repairs)


def test_a_value_in_a_new_cell_below_is_taken_after_the_stub(pristine):
    mine = copy.deepcopy(pristine)
    mine["cells"].insert(at(mine, "tiny-total") + 1, code("total_of_numbers = sum(numbers)"))
    merged, _ = splice(pristine, mine)
    answer = answers(merged)["tiny-total"]
    assert answer.index("numbers = [6, 7, 8]") < answer.index("total_of_numbers = sum(numbers)")


def test_cells_of_ones_own_that_define_something_else_are_not_taken(pristine, solved):
    solved["cells"].insert(at(solved, "tiny-double") + 1, code("def double(x):\n    return 'a later experiment'"))
    solved["cells"].insert(at(solved, "check-tiny-total") + 1, code("total_of_numbers = 'beneath the check'"))
    wanted = {n: "".join(solved["cells"][at(solved, n)]["source"]) for n in NAMES}
    merged, _ = splice(pristine, solved)
    assert answers(merged) == wanted


@pytest.mark.parametrize("keeps_metadata", [True, False])
def test_the_lower_half_of_a_split_cell_that_nothing_marks(keeps_metadata, pristine, solved):
    n = at(solved, "tiny-box")
    top, bottom = "".join(solved["cells"][n]["source"]).split("    def volume", 1)
    solved["cells"][n]["source"] = top
    solved["cells"].insert(n + 1, code("    def volume" + bottom))
    if not keeps_metadata:
        stripped(solved | {"cells": [c for c in solved["cells"] if "id" in c]})
    merged, repairs = splice(pristine, solved)
    assert "def __init__" in answers(merged)["tiny-box"] and "def volume" in answers(merged)["tiny-box"]
    assert "The answer was split over several cells: its parts were put together (tiny-box)." in repairs


def test_a_copy_of_another_answers_cell_goes_by_its_own_first_line(pristine, solved):
    copied = copy.deepcopy(solved["cells"][at(solved, "tiny-double")])
    copied["source"] = "# exercise: tiny-total\ntotal_of_numbers = 21"
    solved["cells"][at(solved, "tiny-total")] = copied
    merged, _ = splice(pristine, solved)
    assert answers(merged)["tiny-total"].endswith("= 21") and "doubled" in answers(merged)["tiny-double"]


@pytest.mark.parametrize("kind", ["markdown", "raw", "heading", "nonsense", None, 3])
@pytest.mark.parametrize("fence", ["```python\n{}\n```", "```\n{}\n```\n", "{}"])
def test_an_answer_in_a_text_cell_loses_its_fence(kind, fence, pristine, solved):
    wanted = answers(solved)
    cell = solved["cells"][at(solved, "tiny-double")]
    cell["cell_type"], cell["source"] = kind, fence.format("".join(cell["source"]))
    merged, repairs = splice(pristine, solved)
    assert answers(merged) == wanted and any("no longer a code cell" in r for r in repairs)


# ------------------------------------------------------------------------------------------ anything at all


def parts_of(node, path=()):
    yield path
    if isinstance(node, (dict, list)):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from parts_of(child, (*path, key))


@st.composite
def mutation(draw):
    return (
        draw(st.sampled_from(["delete", "replace", "duplicate", "swap", "wrap", "rename", "cut"])),
        draw(st.integers(0, 10**6)),
        draw(st.integers(0, 10**6)),
        draw(junk),
    )


def mutate(document, how, first, second, value):
    """One change somewhere in a document; the document itself where its top is what changes."""
    every = [path for path in parts_of(document) if path]
    if not every:
        return document
    path = every[first % len(every)]
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    key = path[-1]
    if how == "delete":
        del parent[key]
    elif how == "replace":
        parent[key] = value
    elif how == "duplicate" and isinstance(parent, list):
        parent.insert(second % (len(parent) + 1), copy.deepcopy(parent[key]))
    elif how == "swap" and isinstance(parent, list):
        other = second % len(parent)
        parent[key], parent[other] = parent[other], parent[key]
    elif how == "wrap":
        parent[key] = [parent[key]]
    elif how == "rename" and isinstance(parent, dict):
        parent[str(value)[:20]] = parent.pop(key)
    elif how == "cut" and isinstance(parent[key], str):
        parent[key] = parent[key][: second % (len(parent[key]) + 1)]
    return document


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(mutation(), min_size=1, max_size=12))
def test_a_hand_in_mutated_at_random_gives_the_pristine_notebook_or_a_sentence(pristine, solved, tmp_path, changes):
    document = copy.deepcopy(solved)
    for change in changes:
        document = mutate(document, *change)
    (tmp_path / "x.ipynb").write_text(json.dumps(document), encoding="utf-8")
    try:
        read = read_notebook(tmp_path / "x.ipynb")
    except BadSubmission as error:
        assert str(error).startswith("x.ipynb ") and str(error).endswith(".")
        return
    merged, repairs = splice(pristine, read)
    nbformat.validate(merged)
    assert everything_else(merged) == everything_else(pristine)
    assert all(isinstance(r, str) and r.endswith(".") for r in repairs)
    dumps(merged).encode("utf-8")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 40), st.binary(max_size=6)), min_size=1, max_size=8)
)
def test_bytes_changed_at_random_give_a_notebook_or_a_sentence(pristine, solved, tmp_path, cuts):
    data = json.dumps(solved).encode()
    for where, length, put in cuts:
        where %= len(data) + 1
        data = data[:where] + put + data[where + length :]
    (tmp_path / "x.ipynb").write_bytes(data)
    try:
        merged, _ = splice(pristine, read_notebook(tmp_path / "x.ipynb"))
    except BadSubmission:
        return
    nbformat.validate(merged)
    assert everything_else(merged) == everything_else(pristine)


SLOW = {
    "blank lines": lambda n: "\n" * n,
    "hashes": lambda n: "#" * n,
    "spaces": lambda n: " " * n + "x",
    "names": lambda n: "a," * (n // 2),
    "colons": lambda n: ("a:" + ":" * 50 + "\n") * (n // 53),
    "fences": lambda n: "```\n" * (n // 4),
    "markers": lambda n: "# exercise: tiny-double\n" * (n // 24),
}


@pytest.mark.parametrize("shape", SLOW)
def test_time_grows_in_proportion(shape, pristine, solved):
    """Four times the text takes no more than some four times as long (the limit leaves room for a busy machine)."""
    import time

    def seconds(n):
        mine = copy.deepcopy(solved)
        for cell in mine["cells"]:
            cell["source"] = SLOW[shape](n)
        mine["cells"] += [code(SLOW[shape](n // 10)) for _ in range(50)]
        best = 9e9
        for _ in range(3):
            start = time.perf_counter()
            splice(pristine, mine)
            best = min(best, time.perf_counter() - start)
        return best

    short, long = seconds(30_000), seconds(240_000)
    assert long < 30 * short + 0.3, (short, long)


def test_five_thousand_cells_are_quick(pristine, solved):
    import time

    cell = code("# exercise: tiny-double\ndef double(x):\n    return x")
    for more in ([cell] * 4_900, [code("x = 1")] * 4_900, [solved["cells"][at(solved, "tiny-box")]] * 4_900):
        mine = copy.deepcopy(solved)
        n = at(mine, "tiny-double") + 1
        mine["cells"][n:n] = more
        start = time.perf_counter()
        splice(pristine, mine)
        assert time.perf_counter() - start < 5


def test_a_million_small_parts_are_refused_before_they_are_made(tmp_path):
    (tmp_path / "x.ipynb").write_bytes(b'{"cells": [' + b"[]," * 3_000_000 + b"[]]}")
    with pytest.raises(BadSubmission, match="more than 5,000,000 parts"):
        read_notebook(tmp_path / "x.ipynb")


def test_a_notebook_saved_as_a_text_in_json(solved, tmp_path):
    (tmp_path / "x.ipynb").write_text(json.dumps(json.dumps(solved)))
    assert read_notebook(tmp_path / "x.ipynb")["cells"] == solved["cells"]
