"""The notebook itself: tags, points, ids, cells that are copied, retyped or thrown away, and scores written by hand."""

from __future__ import annotations

import copy

from hostile.attack import notebook

FAMILY = "metadata and cells"
NUMBERS = "numeric last expressions"


def checks(nb):
    """The check cells of a notebook."""
    return [cell for cell in nb["cells"] if cell["id"].startswith("check-")]


def result(text, html=None):
    """An output that says so."""
    return {"output_type": "execute_result", "execution_count": 1, "metadata": {},
            "data": {"text/plain": text, **({"text/html": html} if html else {})}}


@notebook("skip-execution", FAMILY, "the tag skip-execution on the check cells, whose outputs hold the points already")
def _(course, nb):
    for cell in checks(nb):
        cell["metadata"]["tags"] = ["skip-execution"]
        cell["outputs"] = [result(str(cell["metadata"]["nbgrader"]["points"]))]
    return nb


@notebook("skip-no-output", FAMILY, "the tag skip-execution and no output: stock takes a silent check for full marks")
def _(course, nb):
    for cell in checks(nb):
        cell["metadata"]["tags"] = ["skip-execution"]
    return nb


@notebook("more-points", FAMILY, "points = 1000 in the metadata of every check, and a check that gives them")
def _(course, nb):
    for cell in checks(nb):
        cell["metadata"]["nbgrader"]["points"] = 1000
        cell["source"] = "1000"
    return nb


@notebook("unlocked", FAMILY, "locked = false, and the checks rewritten to a number")
def _(course, nb):
    for cell in checks(nb):
        cell["metadata"]["nbgrader"]["locked"] = False
        cell["source"] = str(cell["metadata"]["nbgrader"]["points"])
    return nb


@notebook("swapped-ids", FAMILY,
          "the checks exchange their grade_id and cell id, so that an easy one counts for a dear one")
def _(course, nb):
    first, second = checks(nb)[0], checks(nb)[1]
    first["id"], second["id"] = second["id"], first["id"]
    one, two = first["metadata"]["nbgrader"], second["metadata"]["nbgrader"]
    one["grade_id"], two["grade_id"] = two["grade_id"], one["grade_id"]
    for cell in (first, second):
        cell["source"] = "3"
    return nb


@notebook("check-of-another", FAMILY, "the answer to a 1-point question stands in every answer cell, under every name")
def _(course, nb):
    for cell in nb["cells"]:
        if cell["id"] in course.points:
            cell["source"] = f"# exercise: {cell['id']}\nlora_forward = lora_parameters = lora_init = 'x'"
            cell["metadata"]["nbgrader"]["grade_id"] = "lora-forward"
    return nb


@notebook("two-checks", FAMILY, "every check cell twice, the second with a number: stock stops the whole class")
def _(course, nb):
    extra = copy.deepcopy(checks(nb))
    for cell in extra:
        cell["source"] = "3"
    nb["cells"] += extra
    return nb


@notebook("no-checks", FAMILY, "the check cells are deleted")
def _(course, nb):
    nb["cells"] = [cell for cell in nb["cells"] if not cell["id"].startswith("check-")]
    return nb


@notebook("markdown-checks", FAMILY, "the check cells are made markdown or raw: nothing is left to fail")
def _(course, nb):
    for cell, kind in zip(checks(nb), ("markdown", "raw", "markdown", "raw")):
        cell["cell_type"] = kind
        cell.pop("outputs", None), cell.pop("execution_count", None)
    return nb


@notebook("manual-grading", FAMILY, "the checks are declared solutions, to be graded by hand, with points given")
def _(course, nb):
    for cell in checks(nb):
        cell["metadata"]["nbgrader"] |= {"solution": True, "task": True, "schema_version": 3}
        cell["source"] = "3"
    return nb


@notebook("foreign-schema", FAMILY, "schema_version 99 in every cell: stock stops the whole class")
def _(course, nb):
    for cell in nb["cells"]:
        if "nbgrader" in cell["metadata"]:
            cell["metadata"]["nbgrader"]["schema_version"] = 99
    return nb


@notebook("stripped", FAMILY, "no metadata, no ids, and the checks edited to numbers")
def _(course, nb):
    for cell in checks(nb):
        cell["source"] = "3"
    for cell in nb["cells"]:
        cell["metadata"] = {}
        del cell["id"]
    return nb | {"nbformat_minor": 4}


@notebook("huge-metadata", FAMILY,
          "ten megabytes of metadata in the notebook and in the cells, five hundred levels deep")
def _(course, nb):
    deep = {}
    for _ in range(500):
        deep = {"x": deep}
    nb["metadata"]["padding"] = "x" * 10_000_000
    nb["cells"][0]["metadata"]["deep"] = deep
    for cell in checks(nb):
        cell["source"] = "3"
    return nb


@notebook("other-kernel", FAMILY, "a kernelspec that names another kernel, and a bash kernel's language")
def _(course, nb):
    nb["metadata"]["kernelspec"] = {"name": "evil", "display_name": "Evil", "language": "bash"}
    nb["metadata"]["language_info"] = {"name": "bash"}
    for cell in checks(nb):
        cell["source"] = "echo 3"
    return nb


@notebook("odd-types", FAMILY, "numbers, lists and null where the format wants text: ids, sources, metadata, cells")
def _(course, nb):
    for n, cell in enumerate(nb["cells"]):
        cell["metadata"] = [{"nbgrader": None}, {"nbgrader": []}, [], None, 7][n % 5]
        cell["source"] = [cell["source"], {"a": 1}, None, [1, 2]][n % 4]
        cell["id"] = [n, None, [], {}][n % 4]
    nb["cells"] += [None, 3, "cell", []]
    nb["metadata"] = []
    return nb


@notebook("extra-cells", FAMILY, "cells of its own between the others: a forged check, magics, a shell command")
def _(course, nb):
    source = "!touch /tmp/hostile-extra-cell\ndef check(*_, **__): return 3\n%alias_magic check time"
    nb["cells"].insert(2, {"cell_type": "code", "id": "mine", "metadata": {}, "source": source, "outputs": [],
                           "execution_count": None})
    return nb


@notebook("last-99", NUMBERS, "99 as the last expression of every cell, the check cells among them")
def _(course, nb):
    for cell in nb["cells"]:
        if cell["cell_type"] == "code":
            cell["source"] += "\n99"
    return nb


@notebook("last-nan", NUMBERS, "float('nan') as a check's last expression: stock reads no number and gives full marks")
def _(course, nb):
    for cell in checks(nb):
        cell["source"] = "float('nan')"
    return nb


@notebook("last-text", NUMBERS, "a text as a check's last expression: no number, no error, full marks")
def _(course, nb):
    for cell in checks(nb):
        cell["source"] = "'done'"
    return nb


@notebook("last-points", NUMBERS, "in the answer cell: the points as last expression, shown and printed")
def _(course, nb):
    for cell in nb["cells"]:
        if cell["id"] in course.points:
            cell["source"] += f"\nprint({course.points[cell['id']]})\n{course.points[cell['id']]}"
    return nb


@notebook("comment-check", NUMBERS, "the check commented out: a silent cell is full marks in stock")
def _(course, nb):
    for cell in checks(nb):
        cell["source"] = "# " + cell["source"]
    return nb


@notebook("exit-zero", NUMBERS, "the check cell's code is put inside of `if False:`")
def _(course, nb):
    for cell in checks(nb):
        cell["source"] = "if False:\n    " + cell["source"]
    return nb
