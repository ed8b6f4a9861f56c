"""Multiple choice: an exercise whose work is a letter. Every wrong option is a misconception, and explains itself.

`ask` shows a question for practice: radio buttons, and the explanation of the option chosen. It never grades.
"""

from __future__ import annotations

import html
import re
import string
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pefttools.grading.exercise import Exercise, ExerciseError
from pefttools.grading.room import in_notebook

if TYPE_CHECKING:
    import torch

LEAF = "your answer"


def letter_of(work: Any) -> Any:
    """ " B) " → "b". What is not a text comes back as it is, for the judge to name its type."""
    return work.strip(" \t\n\"'`().:,").lower() if type(work) is str else work


def _one_case(rng: torch.Generator) -> list[dict]:
    return [{}]


def _read_letter(work: Any, case: dict) -> dict:
    return {LEAF: letter_of(work)}


@dataclass(frozen=True, eq=False, init=False)
class Question(Exercise):
    """A multiple-choice question.

    Args:
        text: the question, in Markdown.
        right: the letter of the right option.
        options: {"a": (option in Markdown, why whoever picks it is mistaken, or why it is right), "b": …}.
    """

    text: str = ""
    right: str = ""
    options: dict[str, tuple[str, str]] | None = None

    reveals = False

    def __init__(
        self,
        name: str,
        chapter: str,
        points: int,
        text: str,
        right: str,
        options: dict[str, tuple[str, str]],
        title: str = "Question",
        minutes: int = 1,
        difficulty: int = 1,
    ) -> None:
        where = f"question {name!r}"
        if not isinstance(text, str) or not text.strip():
            raise ExerciseError(f"{where}: text is {text!r}; it must be the question in Markdown")
        letters = list(string.ascii_lowercase[: len(options)]) if isinstance(options, dict) else []
        if not 2 <= len(letters) <= 6 or list(options) != letters:
            raise ExerciseError(
                f"{where}: options must be a dict of two to six, with the keys a, b, c … in this order; "
                f"given {list(options) if isinstance(options, dict) else options!r:.100}"
            )
        for key, entry in options.items():
            if not (
                isinstance(entry, tuple)
                and len(entry) == 2
                and all(isinstance(part, str) and part.strip() for part in entry)
            ):
                raise ExerciseError(f"{where}: options[{key!r}] is {entry!r:.100}; it must be (option, explanation)")
        if right not in options:
            raise ExerciseError(f"{where}: right is {right!r}; it must be one of {', '.join(letters)}")
        object.__setattr__(self, "text", text)
        object.__setattr__(self, "right", right)
        object.__setattr__(self, "options", options)
        super().__init__(
            name=name,
            chapter=chapter,
            title=title,
            points=points,
            minutes=minutes,
            difficulty=difficulty,
            inputs=_one_case,
            probe=_read_letter,
            reference=right,
            accepts="value",
            mistakes={key: (key, entry[1]) for key, entry in options.items() if key != right},
            alternatives={"capital letter": right.upper(), "with a bracket and spaces": f" {right}) "},
        )

    @property
    def praise(self) -> str:
        """Why the right option is right: shown when it was chosen."""
        return self.options[self.right][1]

    def complaint(self, got: str | None) -> str:
        """What to say of an answer that is no option at all."""
        return f"The answer is one of the letters {', '.join(self.options)} in quotes; yours is {got}."

    def markdown(self) -> str:
        """The question with its options, as Markdown."""
        return (
            self.text.strip()
            + "\n\n"
            + "\n".join(f"- **{key})** {entry[0].strip()}" for key, entry in self.options.items())
        )

    def feedback(self, choice: Any) -> tuple[bool, str]:
        """Whether the choice is right, and its explanation."""
        key = letter_of(choice)
        if key not in self.options:
            return False, self.complaint(repr(choice))
        return key == self.right, self.options[key][1].strip()


def ask(question: str | Question, answer: str | None = None) -> None:
    """Show a question to practise on: radio buttons and the explanation of each choice. Nothing is graded.

    Without a notebook, or without ipywidgets, the question is printed; `ask(name, "b")` then prints what b has to it.

    Raises:
        KeyError: if there is no question of this name.
    """
    if not isinstance(question, Question):
        from pefttools.grading.exercises import exercise

        found = exercise(question)
        if not isinstance(found, Question):
            raise KeyError(f"{question!r} is an exercise to write, not a question: use check({question!r}, your_work)")
        question = found
    if answer is not None:
        print(_feedback_text(question, answer))
        return
    panel = controls(question)
    if panel is None:
        print(_plain_text(question))
        return
    from IPython.display import display

    # One output with both: front ends that know widgets show the buttons, all others the text.
    from pefttools.widgets.base import widget_bundle

    bundle = widget_bundle(panel)
    bundle["text/plain"] = _plain_text(question)
    bundle["text/markdown"] = question.markdown()
    display(bundle, raw=True)


def controls(question: Question) -> Any:
    """The question as a widget (core ipywidgets only); None where there is no notebook or ipywidgets is missing."""
    if not in_notebook():
        return None
    try:
        import ipywidgets
    except ImportError:
        return None
    text = ipywidgets.HTMLMath(value=f"<div style='max-width:50em;line-height:1.4'>{_html(question.markdown())}</div>")
    buttons = ipywidgets.RadioButtons(
        options=list(question.options), value=None, description="", layout=ipywidgets.Layout(width="max-content")
    )
    explanation = ipywidgets.HTMLMath(value="")

    def chosen(change: dict) -> None:
        if change["new"] is not None:
            good, why = question.feedback(change["new"])
            mark = "✓ Right." if good else "✗ Not this one."
            colour = "46, 125, 50" if good else "198, 40, 40"
            explanation.value = (
                f"<div style='border-left:5px solid rgb({colour});padding:.4em .8em;line-height:1.4;max-width:50em'>"
                f"<strong>{change['new']}) {mark}</strong> {_html(why)}</div>"
            )

    buttons.observe(chosen, "value")
    return ipywidgets.VBox([text, buttons, explanation])


def _feedback_text(question: Question, answer: str) -> str:
    good, why = question.feedback(answer)
    return f"{'✓ Right.' if good else '✗ Not this one.'} {why}"


def _plain_text(question: Question) -> str:
    options = [f"  {key}) {entry[0].strip()}" for key, entry in question.options.items()]
    return "\n".join([question.text.strip(), *options, f'ask("{question.name}", "a") explains option a, and so on.'])


def _html(markdown: str) -> str:
    """A question's Markdown as HTML: paragraphs, lists, `code`, **bold**, *emphasis*; math is left to MathJax."""
    blocks = []
    for block in re.split(r"\n\s*\n", markdown.strip()):
        if block.startswith("```"):
            blocks.append(f"<pre>{html.escape(re.sub(r'^```[a-z]*|```$', '', block).strip())}</pre>")
            continue
        lines = [_inline(line) for line in block.splitlines()]
        if block.startswith("- "):
            items = "".join(f"<li>{line.removeprefix('- ')}</li>" for line in lines)
            blocks.append(f"<ul style='list-style:none;padding-left:.5em;margin:.2em 0'>{items}</ul>")
        else:
            blocks.append(" ".join(lines))
    return "<br>".join(blocks)


def _inline(line: str) -> str:
    pieces = re.split(r"(`[^`]+`|\$[^$]+\$)", line)
    for index, piece in enumerate(pieces):
        if piece.startswith("`") and len(piece) > 1:
            pieces[index] = f"<code>{html.escape(piece[1:-1])}</code>"
        elif piece.startswith("$") and len(piece) > 1:
            pieces[index] = html.escape(piece)
        else:
            text = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", html.escape(piece))
            pieces[index] = re.sub(r"\*([^*]+)\*", r"<em>\1</em>", text)
    return "".join(pieces)
