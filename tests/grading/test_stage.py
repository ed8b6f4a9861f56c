"""What the sandbox sees of this package: probes and what answers may import; nothing that answers could be compared with."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports test modules by path, so helpers beside them need this

import judging
from judging import ENTRIES, SAVED, TWICE, notebook

from pefttools.grading.exercise import Exercise, ExerciseError
from pefttools.grading.exercises import tasks
from pefttools.grading.stage import closure, hidden_packages, make_stage, modules_of, probe_module, probe_source

every_task = pytest.mark.parametrize("task", tasks(), ids=lambda task: task.name)


def other(exercise, **changes):
    return Exercise(**{name: value for name, value in {**vars(exercise), **changes}.items()})


def uses_the_reference(work, case):
    return work(case["n"]) == the_reference(case["n"])


def the_reference(n):
    return 2 * n


def uses_the_definition(work, case):
    return DEFINED.points


DEFINED = other(TWICE, name="defined")


@every_task
def test_the_probe_of_every_exercise_is_cut_out(task):
    """It parses, ends in `probe`, imports nothing of ours but what is staged, and holds no message to a student."""
    source = probe_source(task)
    compile(source, task.name, "exec")
    assert source.rstrip().splitlines()[-1].startswith("probe = ")
    for message in (text for _, text in task.mistakes.values()):
        assert message not in source
    names = {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
    secret = {getattr(work, "__name__", "") for work in [task.reference, *(work for work, _ in task.mistakes.values()),
                                                         *task.alternatives.values()]}
    assert not names & secret
    if hasattr(task, "right"):
        assert task.options[task.right][0] not in source


def test_a_probe_that_needs_what_must_not_be_seen_is_refused():
    with pytest.raises(ExerciseError, match="the_reference"):
        probe_source(other(TWICE, probe=uses_the_reference, reference=the_reference))
    with pytest.raises(ExerciseError, match="definition of an exercise"):
        probe_source(other(TWICE, probe=uses_the_definition, name="defined"))
    with pytest.raises(ExerciseError, match="top level"):
        probe_source(other(TWICE, probe=lambda work, case: None))


def test_the_stage_holds_no_reference_and_is_made_once(tmp_path):
    made = make_stage(tmp_path, tasks("02"), ["pefttools.lora", "pefttools.rank"])
    files = sorted(str(path.relative_to(made)) for path in made.rglob("*.py"))
    assert "pefttools/grading/probes/lora_forward.py" in files and "pefttools/rank.py" in files
    assert not [name for name in files if any(word in name for word in ("exercises", "judge", "grading/check"))]
    assert "raise ImportError" in (made / "pefttools/lora.py").read_text()
    stamp = made.stat().st_mtime_ns
    assert make_stage(tmp_path, tasks("02"), ["pefttools.rank", "pefttools.lora"]) == made
    assert made.stat().st_mtime_ns == stamp and len(list(tmp_path.iterdir())) == 1
    assert make_stage(tmp_path, tasks("02")) != made


def test_what_is_staged_can_be_imported_and_says_what_is_hidden(tmp_path):
    made = make_stage(tmp_path, [*tasks("02"), *tasks("00")], ["pefttools.lora", "pefttools.rank"])
    code = ("import pefttools.rank, pefttools.grading.inside, pefttools.grading.probes.lora_forward as p; p.probe\n"
            "from pefttools.grading import check, ask; check('x', 1)\n"
            "try:\n    import pefttools.lora\nexcept ImportError as e:\n    print(e)\n"
            "try:\n    import pefttools.grading.exercises\nexcept ImportError as e:\n    print(e)\n")
    done = subprocess.run([sys.executable, "-P", "-c", code], env={"PYTHONPATH": str(made)}, cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the chapter is about writing" in done.stdout and "No module named" in done.stdout


def test_modules_that_import_what_is_hidden_are_hidden_too(tmp_path):
    users = [name for name in ("pefttools.checkpoint", "pefttools.several", "pefttools.qlora", "pefttools.dora")
             if "pefttools.lora" in closure([name])]
    assert users
    made = make_stage(tmp_path, tasks("02"), users)
    for name in users:
        assert "raise ImportError" in (made / f"{name.replace('.', '/')}.py").read_text()


def test_modules_come_from_the_chapters_own_cells_only():
    nb = notebook({"twice": "import pefttools.nf4\ntwice = 1"}, before="%time x\nfrom pefttools.rank import row_echelon\n"
                  "def later():\n    from pefttools import dora")
    assert modules_of(nb) == ["pefttools.dora", "pefttools.rank"]
    assert modules_of(notebook({}, before="import pefttools.nothing_such\nfrom pefttools.grading import check")) == []
    assert modules_of(notebook({}, before="a = = b")) == []


def test_data_of_a_package_comes_with_it(tmp_path):
    made = make_stage(tmp_path, [TWICE], ["pefttools.lab"])
    assert (made / "pefttools/lab/tiny/model.safetensors").stat().st_size > 2**20
    assert not list(made.rglob("*.ipynb"))


def test_the_probe_of_an_artefact_is_not_where_the_students_code_is(tmp_path):
    name = f"pefttools/grading/probes/{probe_module(SAVED.name)}.py"
    assert not (make_stage(tmp_path, [SAVED]) / name).exists()
    assert (make_stage(tmp_path, [SAVED], hide=False) / name).exists()


def test_hidden_packages():
    assert hidden_packages(ENTRIES.values()) == ()
    assert hidden_packages([other(judging.TWICE, hides=("peft", "pefttools.lora", "trl"))]) == ("peft", "trl")


def test_what_only_a_hidden_module_imports_is_left_out_with_it(tmp_path):
    from pefttools.grading.exercises import tasks

    stage = make_stage(tmp_path, tasks("02"), ["pefttools.lora", "pefttools.inject", "pefttools.nf4"])
    inside = {str(path.relative_to(stage)) for path in stage.rglob("*.py")}
    assert "is not available" in (stage / "pefttools/lora.py").read_text() and "pefttools/nf4.py" in inside
    assert not {"pefttools/lora_update.py", "pefttools/lora_config.py", "pefttools/attached.py"} & inside
