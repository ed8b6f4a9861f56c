"""Two-turn questions with tests as the judge; places are swapped, so that a favourite place decides nothing."""

import re

import pytest

from pefttools.lab.multiturn import Question, asking, by_tests, compare, passed, play, questions


@pytest.fixture(scope="module")
def asked():
    return questions()


@pytest.fixture(scope="module")
def right(asked):
    return [q.right for q in asked]


NOTHING = ("```python\npass\n```", "no idea")


def test_questions_are_drawn_from_the_bundled_kinds_with_a_seed(asked):
    from pefttools.lab.tasks.build import kinds_of

    kinds = {kind.name for kind in kinds_of("held_out")}
    assert {q.kind for q in asked} == kinds and len(asked) == 2 * len(kinds)
    assert questions(10) == asked[:10] and questions(10, seed=1) != asked[:10]
    assert len({q.kind for q in asked[:54]}) == 54  # kinds in turn
    numbers = [q for q in asked if not re.search("[Rr]ename|call it", q.second)]
    assert 0.2 < len(numbers) / len(asked) < 0.8
    with pytest.raises(ValueError, match="n must be at least 1"):
        questions(0)
    with pytest.raises(ValueError, match="split"):
        questions(split="test")
    assert len(questions(20, split="new_kinds")) == 20


def test_right_answers_pass_and_each_turn_needs_its_own(asked, right):
    assert passed(asked, right) == [(True, True)] * len(asked)
    assert passed(asked, [(one, one) for one, _ in right]) == [(True, False)] * len(asked)  # the change was not made
    assert passed(asked, [(two, two) for _, two in right]) == [(False, True)] * len(asked)


def test_tests_judge(asked, right):
    few, good = asked[:9], right[:9]
    half = [(one, one) for one, _ in good]
    match = compare(few, good, half)
    assert (match.wins, match.losses, match.ties, match.flipped) == (9, 0, 0, 0) and match.win_rate.low == 1.0
    match = compare(few, good[:3] + half[3:6] + [NOTHING] * 3, half[:3] + good[3:6] + [NOTHING] * 3)
    assert match.results == ("a",) * 3 + ("b",) * 3 + ("tie",) * 3
    assert match.win_rate.value == 0.5 and 0.5 in match.win_rate and "3 wins, 3 losses, 3 ties" in str(match)


def test_a_judge_with_a_favourite_place_is_neutralised(asked, right):
    few = asked[:12]
    for favourite in ("first", "second"):
        match = compare(few, right[:12], [NOTHING] * 12, judge=lambda q, a, b: favourite)
        assert match.results == ("tie",) * 12 and match.flipped == 12 and match.win_rate.value == 0.5
    tests = by_tests(few, right[:12], [NOTHING] * 12)

    def torn(question, first, second):  # the place decides in every other question, the tests in the rest
        return "first" if few.index(question) % 2 else tests(question, first, second)

    match = compare(few, right[:12], [NOTHING] * 12, judge=torn)
    assert match.results == ("a", "tie") * 6 and match.flipped == 6
    reluctant = compare(few, right[:12], [NOTHING] * 12, judge=lambda q, a, b: "first" if a == q.right else "tie")
    assert reluctant.results == ("tie",) * 12 and reluctant.flipped == 0  # a win in one place alone is none


def test_a_language_model_may_judge(asked, right):
    prompts = []

    def model(prompt):
        prompts.append(prompt)
        return "B did nothing. [[A]]" if prompt.index("no idea") > prompt.index(right[0][1]) else "[[A]]? No: [[B]]"

    match = compare(asked[:1], right[:1], [NOTHING], judge=asking(model))
    assert match.results == ("a",) and len(prompts) == 2
    assert asked[0].first in prompts[0] and asked[0].second in prompts[0] and "Assistant A" in prompts[0]
    with pytest.raises(ValueError, match="none of"):
        compare(asked[:1], right[:1], [NOTHING], judge=asking(lambda prompt: "both fine"))
    with pytest.raises(ValueError, match="got 'A'"):
        compare(asked[:1], right[:1], [NOTHING], judge=lambda *_: "A")
    with pytest.raises(ValueError, match="2 conversations for 1 questions"):
        compare(asked[:1], right[:2], right[:1])


def test_playing_puts_the_models_own_first_answer_before_the_second_turn(small, tiny, monkeypatch):
    seen = []

    def generate(model, tokenizer, prompts, most):
        seen.append(prompts)
        return [f"answer {len(seen)}.{i}" for i in range(len(prompts))]

    monkeypatch.setattr("pefttools.lab.generation.generate", generate)
    few = [Question("one", "two", (), (), "k", ("", "")), Question("three", "four", (), (), "k", ("", ""))]
    assert play(small, tiny.tokenizer, few) == [("answer 1.0", "answer 2.0"), ("answer 1.1", "answer 2.1")]
    assert seen == [["one\n", "three\n"], ["one\nanswer 1.0\ntwo\n", "three\nanswer 1.1\nfour\n"]]
