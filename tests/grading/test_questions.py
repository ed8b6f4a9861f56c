"""Multiple choice: letters in many spellings, explanations, and `ask` with and without a front end."""

from __future__ import annotations

import builtins

import pytest

from pefttools.grading import question as module
from pefttools.grading.check import verdict_on
from pefttools.grading.exercise import ExerciseError
from pefttools.grading.judge import judge
from pefttools.grading.probe import Outcome, Raised
from pefttools.grading.question import Question, _html, ask, letter_of

OPTIONS = {
    "a": ("the *first*", "No: the first is `x < 1`."),
    "b": ("the **second**", "Yes: $a_1 * b_1 < 2$ holds."),
    "c": ("the third", "No, not c."),
}


def make(**changes):
    fields = dict(name="test-q", chapter="99_test", points=2, text="Which is $x < 1$?", right="b", options=OPTIONS)
    return Question(**{**fields, **changes})


QUESTION = make()


@pytest.mark.parametrize("answer", ["b", "B", " b ", "b)", "(b)", "B.", "'b'", "b\n"])
def test_the_right_letter_in_any_spelling(answer):
    verdict = verdict_on(QUESTION, answer)
    assert verdict.passed and verdict.points == 2 and OPTIONS["b"][1] in verdict.message


@pytest.mark.parametrize("answer", ["a", "C"])
def test_a_wrong_letter_explains_itself_and_does_not_give_the_right_one_away(answer):
    verdict = verdict_on(QUESTION, answer)
    assert not verdict.passed and verdict.mistake == answer.lower()
    assert verdict.message == OPTIONS[answer.lower()][1]
    assert verdict.expected is None and "'b'" not in verdict.text and OPTIONS["b"][1] not in verdict.text


@pytest.mark.parametrize("answer", ["d", "", "ab", "the second", 2, 1.0, ["b"], {"b"}, object(), True, b"b"])
def test_what_is_no_letter(answer):
    verdict = verdict_on(QUESTION, answer)
    assert not verdict.passed and "one of the letters a, b, c" in verdict.message and verdict.mistake is None


def test_a_run_that_failed_is_no_answer():
    """From another process anything may come: an exception, or nothing."""
    for outcomes in ([], [Outcome(None, Raised("MemoryError", ""))], [Outcome({"something": "else"})], [Outcome(3)]):
        verdict = judge(QUESTION, outcomes, [{}], 1)
        assert not verdict.passed and verdict.expected is None and "'b'" not in verdict.text


@pytest.mark.parametrize("answer", [None, ...])
def test_not_answered_yet(answer):
    assert verdict_on(QUESTION, answer).kind == "blank"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"right": "d"}, "one of a, b, c"),
        ({"text": " "}, "text"),
        ({"options": {"a": ("x", "y")}}, "options"),
        ({"options": {"a": ("x", "y"), "c": ("x", "y")}}, "a, b, c"),
        ({"options": {"a": ("x", ""), "b": ("x", "y")}}, "explanation"),
        ({"options": [("x", "y")]}, "options"),
        ({"points": 0}, "points"),
        ({"name": "Bad Name"}, "name"),
    ],
)
def test_bad_definitions(change, words):
    with pytest.raises(ExerciseError, match=words):
        make(**change)


def test_it_is_an_exercise():
    assert QUESTION.accepts == "value" and QUESTION.stars == "●○○" and set(QUESTION.mistakes) == {"a", "c"}
    assert (
        QUESTION.markdown() == "Which is $x < 1$?\n\n- **a)** the *first*\n- **b)** the **second**\n- **c)** the third"
    )
    assert letter_of(3) == 3


def test_asking_without_a_notebook_prints(capsys):
    ask(QUESTION)
    printed = capsys.readouterr().out
    assert "Which is" in printed and "c) the third" in printed and "Yes" not in printed
    ask(QUESTION, "c")
    assert capsys.readouterr().out == "✗ Not this one. No, not c.\n"
    ask(QUESTION, " B)")
    assert capsys.readouterr().out.startswith("✓ Right. Yes")
    ask(QUESTION, "z")
    assert "one of the letters" in capsys.readouterr().out


def test_asking_for_what_is_no_question():
    with pytest.raises(KeyError, match="no exercise 'no-such-question'"):
        ask("no-such-question")


def test_the_buttons_explain_the_choice(monkeypatch):
    monkeypatch.setattr(module, "in_notebook", lambda: True)
    panel = module.controls(QUESTION)
    text, buttons, explanation = panel.children
    assert buttons.options == ("a", "b", "c") and buttons.value is None and explanation.value == ""
    buttons.value = "a"
    assert "a) ✗ Not this one." in explanation.value and "<code>x &lt; 1</code>" in explanation.value
    buttons.value = "b"
    assert "b) ✓ Right." in explanation.value
    assert "the <em>first</em>" in text.value and "<strong>second</strong>" in text.value


def test_without_ipywidgets_the_question_is_printed(monkeypatch, capsys):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.partition(".")[0] == "ipywidgets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(module, "in_notebook", lambda: True)
    monkeypatch.setattr(builtins, "__import__", missing)
    ask(QUESTION)
    assert "b) the **second**" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("markdown", "html"),
    [
        ("a < b & `c < d`", "a &lt; b &amp; <code>c &lt; d</code>"),
        ("$a_1*b*c$", "$a_1*b*c$"),
        ("**x** and *y*", "<strong>x</strong> and <em>y</em>"),
        ("one\n\ntwo", "one<br>two"),
        ("```python\nx < 1\n```", "<pre>x &lt; 1</pre>"),
        ("<script>", "&lt;script&gt;"),
    ],
)
def test_the_little_markdown(markdown, html):
    assert _html(markdown) == html
