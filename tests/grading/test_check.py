"""`check` as a student meets it: blanks, errors, noise, points, and the cell that nbgrader reads."""

from __future__ import annotations

import logging
import random
import subprocess
import sys
import warnings

import nbformat
import numpy as np
import pytest
import torch
from nbgrader.utils import determine_grade

from pefttools.grading import case, check
from pefttools.grading import exercises as registry
from pefttools.grading.check import reset_progress, verdict_on
from pefttools.grading.exercise import Exercise, ExerciseError
from pefttools.grading.question import Question


def double_inputs(rng):
    return [{"x": torch.randn(n, 3, generator=rng), "k": n} for n in (2, 4)]


def double_probe(work, case):
    return {"output": work(case["x"], case["k"])}


def make(**changes):
    fields = dict(
        name="check-double",
        chapter="99_test",
        title="Double it",
        points=2,
        minutes=1,
        difficulty=1,
        inputs=double_inputs,
        probe=double_probe,
        reference=lambda x, k: 2 * x,
        mistakes={"not doubled": (lambda x, k: x.clone(), "This is <x> itself: `x` & nothing else.")},
        alternatives={"sum": lambda x, k: x + x},
    )
    return Exercise(**{**fields, **changes})


DOUBLE = make()


# ── what comes back ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_points_and_text(capsys):
    verdict = check(DOUBLE, lambda x, k: x + x)
    assert (verdict.passed, verdict.points, verdict.max_points, repr(verdict), float(verdict)) == (True, 2, 2, "2", 2.0)
    assert "✓ Passed · Double it · 2 of 2 points" in capsys.readouterr().out
    verdict = check(DOUBLE, lambda x, k: x)
    assert (verdict.passed, verdict.points, repr(verdict), verdict.mistake) == (False, 0, "0", "not doubled")
    assert "This is <x> itself" in capsys.readouterr().out
    assert not verdict and bool(check(DOUBLE, lambda x, k: x + x))


@pytest.mark.parametrize("work", [None, ...])
def test_a_value_that_is_not_there(work):
    verdict = check(DOUBLE, work)
    assert verdict.kind == "blank" and verdict.points == 0 and "Not written yet" in verdict.message


@pytest.mark.parametrize(
    "message", ["check-double: not written yet", "not written yet", "", "TODO", "Not implemented."]
)
def test_stubs(message):
    def stub(x, k):
        raise NotImplementedError(message)

    assert check(DOUBLE, stub).kind == "blank"


def test_a_stub_of_another_exercise_is_named():
    def work(x, k):
        raise NotImplementedError("lora-forward: not written yet")

    verdict = check(DOUBLE, work)
    assert verdict.kind == "blank" and "`lora-forward`" in verdict.message


def test_a_module_without_forward_is_no_stub():
    class Layer(torch.nn.Module):
        pass

    layer = Layer()
    verdict = check(DOUBLE, lambda x, k: layer(x))
    assert verdict.kind == "raised" and "forward" in verdict.message


def test_dots_left_inside_an_answer():
    both = make(
        name="check-both",
        probe=lambda work, case: dict(work),
        reference={"q": 1, "v": 2},
        accepts="value",
        mistakes={},
        alternatives={},
    )
    assert check(both, {"q": ..., "v": ...}).kind == "blank"
    verdict = check(both, {"q": 1, "v": ...})
    assert verdict.kind == "type" and "not written yet" in verdict.message


def test_a_result_instead_of_the_function():
    verdict = check(DOUBLE, torch.zeros(2))
    assert verdict.kind == "work" and "without brackets" in verdict.message
    assert "path" in check(make(accepts="folder"), 3).message


# ── errors in the work ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_last_line_in_the_students_code_is_shown():
    def helper(x):
        return x @ torch.zeros(7, 7)

    def work(x, k):
        return helper(x)

    verdict = check(DOUBLE, work)
    assert verdict.kind == "raised" and verdict.line == "return x @ torch.zeros(7, 7)"
    assert verdict.place.endswith("of test_check.py, in helper")
    assert "RuntimeError: mat1 and mat2 shapes" in verdict.message and "double_probe" not in verdict.text


def test_wrong_arguments_and_wrong_results_are_explained():
    verdict = check(DOUBLE, lambda x: x)
    assert (
        verdict.kind == "raised"
        and verdict.place is None
        and "takes 1 positional argument but 2 were given" in verdict.message
    )
    shape = make(
        probe=lambda work, case: {"output": work(case["x"], case["k"]).sum()}, reference=lambda x, k: x, mistakes={}
    )
    assert "without `return`" in check(shape, lambda x, k: None).message


@pytest.mark.parametrize(
    "error",
    [
        SystemExit(0),
        SystemExit("bye"),
        GeneratorExit(),
        RecursionError(),
        MemoryError(),
        StopIteration(),
        BaseException("base"),
        Warning("w"),
    ],
)
def test_nothing_but_an_interrupt_gets_out(error):
    def work(x, k):
        raise error

    verdict = check(DOUBLE, work)
    assert verdict.kind == "raised" and type(error).__name__ in verdict.message


def test_an_interrupt_gets_out():
    def work(x, k):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check(DOUBLE, work)


def test_an_endless_recursion_is_an_error_like_others():
    def work(x, k):
        return work(x, k)

    assert "RecursionError" in check(DOUBLE, work).message


def test_an_exception_that_cannot_be_read():
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError("no")

    def work(x, k):
        raise Mute

    assert "Mute" in check(DOUBLE, work).message


# ── a quiet room, left as it was found ────────────────────────────────────────────────────────────────────────────────


def test_noise_stays_inside(capfd):
    def work(x, k):
        print("printed")
        print("to stderr", file=sys.stderr)
        warnings.warn("warned", stacklevel=1)
        logging.getLogger("somewhere").error("logged")
        return 2 * x

    logger = logging.getLogger("somewhere")
    handler = logging.StreamHandler(sys.stderr)  # as libraries do: it keeps the stream of now
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            verdict = verdict_on(DOUBLE, work)
    finally:
        logger.removeHandler(handler)
    assert verdict.passed and capfd.readouterr() == ("", "") and caught == []
    assert logging.root.manager.disable == 0


def test_what_was_printed_is_shown_with_a_failure():
    def work(x, k):
        print("I am <here>", "x" * 10_000)
        return x

    verdict = verdict_on(DOUBLE, work)
    assert verdict.printed.startswith("I am <here>") and len(verdict.printed) < 3000
    assert "I am &lt;here&gt;" in verdict.html and "<here>" not in verdict.html
    passed = verdict_on(DOUBLE, lambda x, k: (print("noise"), 2 * x)[1])
    assert "noise" not in passed.text and "noise" not in passed.html


def test_the_state_of_the_notebook_is_left_alone():
    def work(x, k):
        torch.manual_seed(99)
        random.seed(99)
        np.random.seed(99)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        return 2 * x

    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    want = torch.rand(1).item(), random.random(), np.random.rand()
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    verdict_on(DOUBLE, work)
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == want
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()


def test_the_state_of_the_notebook_does_not_matter():
    grad = make(
        probe=lambda work, case: {
            "output": work(case["x"].requires_grad_(), case["k"]).requires_grad,
            "new": str(torch.ones(1).dtype),
        },
        reference=lambda x, k: x * 2,
        mistakes={},
    )
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            assert verdict_on(grad, lambda x, k: x + x).passed
        with torch.inference_mode():
            assert verdict_on(grad, lambda x, k: x + x).passed
            assert verdict_on(DOUBLE, lambda x, k: x + x).passed
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    torch.set_default_device("meta")
    try:
        assert verdict_on(DOUBLE, lambda x, k: x + x, seed=77).passed
    finally:
        torch.set_default_device(None)


def test_works_that_write_into_their_inputs_do_not_spoil_the_next():
    def work(x, k):
        x.mul_(2)
        return x

    assert verdict_on(DOUBLE, work).passed
    cases = [{"x": torch.ones(2, 3), "k": 1}]
    shared = make(inputs=lambda rng: cases)
    assert verdict_on(shared, work).passed and verdict_on(shared, work).passed and cases[0]["x"].eq(1).all()


def test_random_works_see_the_same_numbers_every_time():
    noisy = make(reference=lambda x, k: torch.rand(3), mistakes={})
    torch.manual_seed(3)
    assert verdict_on(noisy, lambda x, k: torch.rand(3)).passed


def test_seeds():
    assert verdict_on(DOUBLE, lambda x, k: 2 * x, seed=2**62).passed
    assert not torch.equal(DOUBLE.cases(1)[0]["x"], DOUBLE.cases(2)[0]["x"])
    assert not torch.equal(DOUBLE.cases(1)[0]["x"], make(name="other").cases(1)[0]["x"])
    memorised = {n: 2 * c["x"] for n, c in zip((2, 4), DOUBLE.cases(20))}
    assert verdict_on(DOUBLE, lambda x, k: memorised[k]).passed
    assert not verdict_on(DOUBLE, lambda x, k: memorised[k], seed=21).passed


def test_a_case_can_be_had_to_try():
    assert torch.equal(case(DOUBLE, 2)["x"], DOUBLE.cases(20)[1]["x"])
    assert 'case("check-double", 1)' in verdict_on(DOUBLE, lambda x, k: x).text
    with pytest.raises(ValueError, match="has the cases 1 to 2"):
        case(DOUBLE, 3)


# ── HTML ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_everything_of_the_student_is_escaped():
    attack = "<script>alert(1)</script><img src=x onerror=alert(1)>"

    def raises(x, k):
        raise ValueError(attack)

    Evil = type(attack, (), {})
    texts = make(probe=lambda work, case: work(), reference=lambda: {"t": "x"}, mistakes={})
    for verdict in (
        verdict_on(DOUBLE, raises),
        verdict_on(DOUBLE, lambda x, k: Evil()),
        verdict_on(texts, lambda: {"t": attack}),
        verdict_on(texts, lambda: {attack: 1, "t": "x"}),
        verdict_on(texts, lambda: {"t": attack + "y" * 100}),
        verdict_on(make(accepts="value", probe=lambda work, case: work, reference=1, mistakes={}), attack),
    ):
        assert "<script" not in verdict.html and "<img" not in verdict.html
        assert "alert(1)" in verdict.html


def test_the_box_needs_nothing_from_outside_and_not_only_colour():
    for work, words in ((lambda x, k: 2 * x, "✓ Passed"), (lambda x, k: x, "✗ Not yet"), (None, "○ Not written yet")):
        verdict = verdict_on(DOUBLE, work)
        bundle = verdict._repr_mimebundle_()
        assert bundle["text/plain"] == str(verdict.points) and words in bundle["text/html"]
        for foreign in ("<script", "http", "src=", "<link", "<style", "class="):
            assert foreign not in bundle["text/html"]
        assert "color:inherit" in bundle["text/html"]
    assert "This is &lt;x&gt; itself: <code>x</code> &amp; nothing else." in verdict_on(DOUBLE, lambda x, k: x).html


# ── definitions ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"name": "Lora_Forward"}, "name"),
        ({"name": ""}, "name"),
        ({"chapter": "lora"}, "chapter"),
        ({"title": " "}, "title"),
        ({"points": 0}, "points"),
        ({"points": 1.5}, "points"),
        ({"points": True}, "points"),
        ({"minutes": -1}, "minutes"),
        ({"difficulty": 4}, "difficulty"),
        ({"inputs": None}, "inputs"),
        ({"probe": 3}, "probe"),
        ({"reference": None}, "reference"),
        ({"mistakes": {"a": print}}, "mistakes"),
        ({"mistakes": {"a": (print, "")}}, "mistakes"),
        ({"mistakes": []}, "mistakes"),
        ({"alternatives": [print]}, "alternatives"),
        ({"rtol": -1}, "rtol"),
        ({"atol": float("nan")}, "atol"),
        ({"accepts": "method"}, "accepts"),
        ({"hides": "peft"}, "hides"),
        ({"hides": ["peft"]}, "hides"),
    ],
)
def test_a_bad_definition_says_what_is_wrong(change, name):
    with pytest.raises(ExerciseError, match=name):
        make(**change)


def test_inputs_must_be_cases():
    for inputs in (lambda rng: [], lambda rng: {}, lambda rng: [1], lambda rng: 1 / 0):
        with pytest.raises(ExerciseError, match="inputs"):
            make(inputs=inputs).cases(1)


def test_works_given_by_name_are_imported_when_needed():
    lazy = make(reference="torch.nn.functional:relu", probe=lambda work, case: work(case["x"]), mistakes={})
    assert lazy.resolve(lazy.reference) is torch.nn.functional.relu
    assert verdict_on(lazy, lambda x: x.clamp(min=0)).passed
    missing = make(reference="pefttools.no_such_module:thing")
    with pytest.raises(ExerciseError, match="pefttools.no_such_module:thing"):
        verdict_on(missing, lambda x, k: x)
    with pytest.raises(ExerciseError, match="no_such_name"):
        make().resolve("torch:no_such_name")
    assert make(accepts="value").resolve("q_proj:v_proj") == "q_proj:v_proj"


def test_importing_the_package_imports_no_torch():
    code = "import sys, pefttools.grading; print(*(x in sys.modules for x in ('torch', 'ipywidgets', 'IPython')))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout.split() == ["False", "False", "False"], run.stderr


# ── the registry and progress ─────────────────────────────────────────────────────────────────────────────────────────


MODULE = """
import torch
from pefttools.grading.exercise import Exercise
from pefttools.grading.question import Question

TITLE = "Test"
EXERCISES = [Exercise(name=name, chapter="{chapter}", title=name, points=3, minutes=1, difficulty=1,
                      inputs=lambda rng: [{{"x": 1}}], probe=lambda work, case: work(case["x"]),
                      reference=lambda x: x + 1)
             for name in {names}]
QUESTIONS = [Question("q-{chapter}".replace("_", "-"), "{chapter}", 1, "Which is it?", "b",
                      {{"a": ("this", "no, since it is that"), "b": ("that", "yes, since it is that")}})]
"""


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A registry over the modules of a folder of the test's own."""
    import pefttools.grading.exercises.__main__  # noqa: F401 while its package's own path still stands

    monkeypatch.setattr(registry, "__path__", [str(tmp_path)])
    monkeypatch.setattr(registry, "_loaded", {})
    monkeypatch.setattr(registry, "_failed", {})
    monkeypatch.setattr(registry, "_done", False)
    before = set(sys.modules)
    reset_progress()

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        registry.reload()

    yield write
    reset_progress()
    for name in set(sys.modules) - before:
        if name.startswith("pefttools.grading.exercises."):
            del sys.modules[name]
            if hasattr(registry, name.rpartition(".")[2]):
                delattr(registry, name.rpartition(".")[2])


def test_an_empty_registry(modules):
    assert registry.chapters() == [] and registry.exercises() == [] and registry.tasks("02_lora") == []
    with pytest.raises(KeyError, match="There are: none"):
        registry.exercise("lora-forward")
    from pefttools.grading.exercises.__main__ import table

    assert table() == "no exercises yet"


def test_exercises_are_found(modules):
    modules("ch90_one", MODULE.format(chapter="90_one", names=["one-a", "one-b"]))
    modules("ch91_two", MODULE.format(chapter="91_two", names=["two-a"]))
    modules("notes", "1 / 0")
    assert registry.chapters() == ["90_one", "91_two"]
    assert (
        [entry.name for entry in registry.exercises("90_one")]
        == ["one-a", "one-b"]
        == [e.name for e in registry.exercises("90")]
    )
    assert [type(entry) for entry in registry.questions("91_two")] == [Question]
    assert registry.exercise("two-a").chapter == "91_two" and registry.title("90_one") == "90 Test"
    with pytest.raises(KeyError, match="Did you mean 'one-a' or 'one-b'|Did you mean 'one-"):
        check("one-c", print)


def test_a_broken_module_is_named_and_does_not_take_the_others_with_it(modules):
    modules("ch90_one", MODULE.format(chapter="90_one", names=["one-a"]))
    modules("ch91_two", "import no_such_thing")
    assert check("one-a", lambda x: x + 1).passed
    assert [entry.name for entry in registry.exercises("90_one")] == ["one-a"]
    for call in (
        registry.chapters,
        lambda: registry.exercises("91_two"),
        lambda: registry.exercises(),
        lambda: registry.exercise("two-a"),
    ):
        with pytest.raises(
            registry.RegistryError,
            match="ch91_two cannot be used: ModuleNotFoundError: No module named 'no_such_thing'",
        ):
            call()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (MODULE.format(chapter="91_two", names=["one-a"]), "two exercises of the name 'one-a'"),
        (MODULE.format(chapter="92_three", names=["x"]), "says chapter '92_three'"),
        ("EXERCISES = [1]", "EXERCISES holds 1, which is no Exercise"),
    ],
)
def test_bad_modules(modules, text, words):
    modules("ch90_one", MODULE.format(chapter="90_one", names=["one-a"]))
    modules("ch91_two", text)
    with pytest.raises(registry.RegistryError, match=words):
        registry.chapters()


def test_progress_of_the_chapter(modules):
    modules("ch90_one", MODULE.format(chapter="90_one", names=["one-a", "one-b"]))
    assert check("one-a", lambda x: x).progress == "90 Test: 0 of 3 done, 0 of 7 points"
    assert check("one-a", lambda x: x + 1).progress == "90 Test: 1 of 3 done, 3 of 7 points"
    question = registry.questions("90_one")[0]
    assert check(question, "b").progress == "90 Test: 2 of 3 done, 4 of 7 points"
    assert check("one-a", lambda x: x + 1).progress == "90 Test: 2 of 3 done, 4 of 7 points"
    assert check("one-a", lambda x: x).progress == "90 Test: 1 of 3 done, 1 of 7 points"
    assert "90 Test: 1 of 3 done" in check("one-b", None).html
    assert verdict_on(registry.exercise("one-b"), lambda x: x + 1).progress == "", "verdict_on counts nothing"
    assert check(DOUBLE, lambda x, k: 2 * x).progress == "", "no chapter of the course"


# ── a notebook ────────────────────────────────────────────────────────────────────────────────────────────────────────

CELLS = [
    """
import logging, sys, warnings
import torch
from pefttools.grading import Exercise, Question, ask, check
double = Exercise(name="kernel-double", chapter="99_test", title="Double it", points=2, minutes=1, difficulty=1,
                  inputs=lambda rng: [{"x": torch.randn(3, generator=rng)}],
                  probe=lambda work, case: {"output": work(case["x"])}, reference=lambda x: 2 * x,
                  mistakes={"not doubled": (lambda x: x.clone(), "This is x itself.")})
logger = logging.getLogger("library")
logger.addHandler(logging.StreamHandler())
question = Question("kernel-q", "99_test", 1, "Which is it?", "b",
                    {"a": ("this", "no, since it is that"), "b": ("that", "yes, that")})
""",
    """
def noisy(x):
    from IPython.display import display
    from tqdm.auto import tqdm
    print("out"); print("err", file=sys.stderr); warnings.warn("warned"); logger.error("logged")
    display("shown")
    for _ in tqdm(range(3)):
        pass
    return x + x

check(double, noisy)
""",
    "check(double, lambda x: x)",
    """
def broken(x):
    y = x * 2
    return y.nothing

check(double, broken)
""",
    "check(double, ...)",
    "ask(question)",
]


def graded(cell, points=2):
    """The cell as nbgrader keeps a graded one."""
    cell = nbformat.from_dict(cell)
    cell.metadata["nbgrader"] = {
        "grade": True,
        "solution": False,
        "locked": True,
        "points": points,
        "grade_id": "g",
        "schema_version": 3,
        "cell_type": "code",
        "task": False,
    }
    return cell


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    from nbclient import NotebookClient

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source.strip()) for source in CELLS])
    NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path_factory.mktemp("kernel"))}},
    ).execute()
    return notebook.cells


@pytest.mark.parametrize(
    ("index", "points", "words"),
    [(1, 2, "✓ Passed"), (2, 0, "This is x itself."), (3, 0, "return y.nothing"), (4, 0, "Not written yet")],
)
def test_nbgrader_reads_the_points_of_an_executed_cell(executed, index, points, words):
    cell = executed[index]
    assert [output.output_type for output in cell.outputs] == ["execute_result"], cell.outputs
    assert cell.outputs[0].data["text/plain"] == str(points) and words in cell.outputs[0].data["text/html"]
    assert determine_grade(graded(cell)) == (points, 2)


def test_the_cell_is_named_where_the_error_is(executed):
    assert "line 3 of the cell In[4], in broken" in executed[3].outputs[0].data["text/html"]


def test_a_question_in_a_kernel_has_buttons_and_text(executed):
    (output,) = executed[5].outputs
    assert output.output_type == "display_data" and "application/vnd.jupyter.widget-view+json" in output.data
    assert "Which is it?" in output.data["text/plain"] and "**b)** that" in output.data["text/markdown"]


@pytest.mark.parametrize(("text", "points"), [("2", 2), ("0", 0)])
def test_nbgrader_reads_what_the_verdict_prints(text, points):
    verdict = verdict_on(DOUBLE, (lambda x, k: 2 * x) if points else (lambda x, k: x))
    output = nbformat.v4.new_output("execute_result", data=verdict._repr_mimebundle_())
    cell = nbformat.v4.new_code_cell("check(...)", outputs=[output])
    assert output.data["text/plain"] == text and determine_grade(graded(cell)) == (points, 2)
