"""Two turns, two models, a judge: in the manner of MT-Bench (Zheng et al. 2023), with tests in place of opinions.

    turn 1   "Make a function `count_pipe` that adds 14 to …"     →  program, run against the row's tests
    turn 2   "Now use 30 instead of 14."                          →  program, run against the changed row's tests

The judge sees both models' conversations side by side and names the better one, or a tie. It is asked twice, with
the places swapped: who wins in one place only has won by the place, and that is a tie (their §3.4, the conservative
of two ways they name). The judge here runs tests and cannot be flattered. Any callable may stand in its place, a
language model too (`asking`); nothing needs one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pefttools.lab.intervals import Interval, bootstrap
from pefttools.lab.programs import code_of, run_programs

Conversation = tuple[str, str]  # a model's answers in turn 1 and turn 2
Judge = Callable[["Question", Conversation, Conversation], str]
VERDICTS = ("first", "second", "tie")
CHANGES = {"number": ("Now use {new} instead of {old}.", "Change {old} to {new}.", "Use {new} in place of {old}."),
           "name": ("Now call it `{new}` instead of `{old}`.", "Rename `{old}` to `{new}`.")}


@dataclass(frozen=True)
class Question:
    """Two turns; the second asks to change the answer to the first. `right`: programs that pass."""

    first: str
    second: str
    tests_first: tuple[str, ...]
    tests_second: tuple[str, ...]
    kind: str
    right: Conversation

    def prompts(self, answer: str | None = None) -> str:
        """What a model is given: the first turn, or, with its answer to that, both."""
        return self.first + "\n" if answer is None else f"{self.first}\n{answer}\n{self.second}\n"


@dataclass(frozen=True)
class Match:
    """Of model a against model b. `flipped`: verdicts that followed the place (ties, too)."""

    results: tuple[str, ...]           # "a", "b" or "tie" for each question
    flipped: int
    win_rate: Interval                 # of a; a tie is half a win

    @property
    def wins(self) -> int:
        return self.results.count("a")

    @property
    def losses(self) -> int:
        return self.results.count("b")

    @property
    def ties(self) -> int:
        return self.results.count("tie")

    def __str__(self) -> str:
        return (f"{self.wins} wins, {self.losses} losses, {self.ties} ties ({self.flipped} of them because the verdict "
                f"followed the place); win rate {self.win_rate}")


def questions(n: int | None = None, seed: int = 0, split: str = "held_out") -> list[Question]:
    """`n` questions (all by default: two a kind at most), kinds in turn, drawn with `seed`.

    The second turn changes a number or the name. Raises ValueError for an unknown split or n < 1.
    """
    from pefttools.lab.tasks.build import draw_rows, kinds_of

    if n is not None and n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    rng = random.Random(f"{seed}/two turns/{split}")
    kinds = kinds_of(split)
    rng.shuffle(kinds)
    drawn = {kind.name: draw_rows(kind, split, 2, seed=seed) for kind in kinds}
    found = []
    for turn in range(2):
        for kind in kinds:
            slots, row = drawn[kind.name][turn]
            wanted = ("number", "name") if rng.random() < 0.7 else ("name", "number")
            made = (_changed(kind, slots, row, what, split, rng) for what in wanted)
            if question := next(filter(None, made), None):
                found.append(question)
    return found[:n]


def _changed(kind, slots, row: dict, what: str, split: str, rng: random.Random) -> Question | None:
    """The question in which `what` changes; None where this row has nothing of the sort that is said exactly once."""
    from pefttools.lab.tasks.core import Draw, Slots, fill, tests_of

    other = Slots(kind.draw(Draw(rng, split, kind.name)))
    instruction = row["instruction"]
    for slot in sorted(slots, key=lambda slot: rng.random()):
        old, new = slots[slot], other.get(slot)
        if (slot == "name") != (what == "name") or old == new or not isinstance(old, str if what == "name" else int):
            continue
        if isinstance(old, bool) or len(re.findall(rf"(?<![\w.-]){re.escape(str(old))}(?!\w)", instruction)) != 1:
            continue
        changed = Slots({**slots, slot: new})
        try:  # slots changed one by one need not fit together
            code, tests = fill(kind.code, changed), tests_of(kind, changed)
        except Exception:
            continue
        first = code_of(row["output"])
        if what == "number" and str(old) not in first or code == first or tests == row["tests"]:
            continue
        said = rng.choice(CHANGES[what]).format(old=old, new=new)
        asked = instruction + (f"\n{row['input']}" if row["input"] else "")
        return Question(asked, said, tuple(row["tests"]), tuple(tests), kind.name, (first, code))
    return None


def play(model, tokenizer, asked: Sequence[Question], max_new_tokens: int = 160) -> list[Conversation]:
    """The model's two answers to each question, greedy; the second with its own first answer before it."""
    from pefttools.lab.generation import generate

    one = generate(model, tokenizer, [q.prompts() for q in asked], max_new_tokens)
    two = generate(model, tokenizer, [q.prompts(answer) for q, answer in zip(asked, one)], max_new_tokens)
    return list(zip(one, two))


def passed(asked: Sequence[Question], played: Sequence[Conversation], seconds: int = 3) -> list[tuple[bool, bool]]:
    """Whether each answer passes its turn's tests. Raises ValueError where questions and conversations do not match."""
    _same_length(asked, played)
    jobs = [(code_of(answer), tests) for q, both in zip(asked, played)
            for answer, tests in zip(both, (q.tests_first, q.tests_second))]
    results = [r["passed"] for r in run_programs(jobs, seconds)]
    return list(zip(results[::2], results[1::2]))


def by_tests(asked: Sequence[Question], *played: Sequence[Conversation]) -> Judge:
    """A judge that counts turns whose tests pass; every program of `played` is run once, now."""
    known = {(q, both): sum(turns) for each in played for q, both, turns in zip(asked, each, passed(asked, each))}

    def judge(question: Question, first: Conversation, second: Conversation) -> str:
        a, b = known[question, first], known[question, second]
        return "tie" if a == b else "first" if a > b else "second"

    return judge


def asking(ask: Callable[[str], str]) -> Judge:
    """A judge that asks a language model: `ask(prompt)` returns its reply, which must hold [[A]], [[B]] or [[C]] (tie).

    Such a judge prefers a place, length, and answers like its own (Zheng et al. 2023, §3.3): compare with `by_tests`.
    """

    def judge(question: Question, first: Conversation, second: Conversation) -> str:
        shown = "\n\n".join(f"### Assistant {name}\n{both[0]}\n\n(asked again)\n{both[1]}"
                            for name, both in (("A", first), ("B", second)))
        reply = ask("Two assistants were asked for Python, and then for a change.\n\n### Asked first\n"
                    f"{question.first}\n\n### Asked then\n{question.second}\n\n{shown}\n\nWhich one did what was "
                    "asked, both times? The order in which they stand and the length of an answer say nothing. End "
                    "with [[A]], [[B]], or [[C]] for a tie.")
        found = re.findall(r"\[\[([ABC])\]\]", reply)
        if not found:
            raise ValueError(f"the judge's reply holds none of [[A]], [[B]], [[C]]: {reply[-200:]!r}")
        return {"A": "first", "B": "second", "C": "tie"}[found[-1]]

    return judge


def compare(asked: Sequence[Question], a: Sequence[Conversation], b: Sequence[Conversation],
            judge: Judge | None = None, seed: int = 0) -> Match:
    """Model a against model b on the same questions; `judge` is `by_tests` unless another one is given.

    Asked twice with the places swapped: a win in both is a win, anything else a tie. The interval is over questions.
    Raises ValueError for other numbers of conversations than questions, or a verdict that is none.
    """
    _same_length(asked, a)
    _same_length(asked, b)
    judge = by_tests(asked, a, b) if judge is None else judge
    results, flipped = [], 0
    for question, ours, theirs in zip(asked, a, b):
        here, there = judge(question, ours, theirs), judge(question, theirs, ours)
        for verdict in (here, there):
            if verdict not in VERDICTS:
                raise ValueError(f"judge: got {verdict!r}; a verdict is one of {', '.join(VERDICTS)}")
        results.append({("first", "second"): "a", ("second", "first"): "b"}.get((here, there), "tie"))
        flipped += here == there != "tie"
    score = {"a": 1.0, "b": 0.0, "tie": 0.5}
    return Match(tuple(results), flipped, bootstrap([score[r] for r in results], seed=seed))


def _same_length(asked: Sequence[Question], played: Sequence[Conversation]) -> None:
    if not asked or len(asked) != len(played):
        raise ValueError(f"{len(played)} conversations for {len(asked)} questions: one for each, and at least one")
