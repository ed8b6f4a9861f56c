"""The judge: what it says of two pieces of plain data, in which order, and that nothing but plain data gets past it."""

from __future__ import annotations

import collections
import enum
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pefttools.grading.compare import compare
from pefttools.grading.exercise import Exercise, ExerciseError
from pefttools.grading.judge import judge
from pefttools.grading.plain import MAX_ELEMENTS, NotPlain, plain, type_name
from pefttools.grading.probe import Outcome, Raised, probe_all
from pefttools.grading.words import describe_case, tensor_text

Y = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])


# ── agreement ─────────────────────────────────────────────────────────────────────────────────────────────────────────

SCALAR = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.binary(max_size=8))
TREE = st.recursive(
    SCALAR,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.tuples(inner, inner), st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(TREE)
def test_everything_plain_agrees_with_itself(tree):
    assert compare(tree, tree, 0, 0) is None


@settings(max_examples=150, deadline=None)
@given(TREE, TREE)
def test_a_difference_is_a_sentence_and_json(x, y):
    difference = compare(x, y, 0, 0)
    if difference is not None:
        assert len(difference.message) > 10
        json.dumps(difference.to_dict())
        assert (
            compare(y, x, 0, 0) is not None
        ), "whether two agree does not depend on which is which when nothing is tolerated"


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.uint8,
        torch.bool,
        torch.complex64,
        torch.float8_e4m3fn,
    ],
)
def test_tensors_of_every_kind_agree_with_themselves_and_differ_from_others(dtype):
    tensor = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    other = torch.tensor([[0, 1, 1], [1, 1, 1]]).to(dtype)
    assert compare(tensor, tensor) is None
    difference = compare(other, tensor)
    assert (difference.stage, difference.details["position"], difference.details["differing"]) == ("value", [1, 1], 1)


def test_tolerance_is_absolute_plus_relative_of_the_expected():
    assert compare(Y * (1 + 0.9e-3), Y, rtol=1e-3, atol=0) is None
    assert compare(Y * (1 + 1.1e-3), Y, rtol=1e-3, atol=0).stage == "value"
    assert compare(torch.zeros(2) + 0.9e-3, torch.zeros(2), rtol=1, atol=1e-3) is None
    assert compare(torch.zeros(2) + 1.1e-3, torch.zeros(2), rtol=1, atol=1e-3).stage == "value"
    assert compare(1.0 + 1e-7, 1.0) is None and compare(1.1, 1.0).stage == "value"
    assert compare(torch.tensor([2**60 + 1]), torch.tensor([2**60])).stage == "value", "integers are exact"


def test_numpy_shapes_and_ordered_dicts_count_as_plain():
    assert compare(Y.numpy(), Y) is None
    assert (
        compare(np.float32(1.5), 1.5) is None
        and compare(np.int64(3), 3) is None
        and compare(np.bool_(True), True) is None
    )
    assert compare(np.asfortranarray(Y.numpy())[:, ::-1], Y.flip(1)) is None
    assert compare(Y.numpy().astype(">f4"), Y) is None
    assert compare(Y.shape, (2, 3)) is None and compare([1, 2], (1, 2)) is None
    assert compare(collections.OrderedDict(a=1), {"a": 1}) is None
    assert compare(torch.float16, "torch.float16") is None
    assert compare(torch.nn.Parameter(Y), Y) is None


def test_gradients_and_views_do_not_matter():
    x = Y.clone().requires_grad_()
    assert compare(x * 2, Y * 2) is None
    assert compare(Y.T, Y.T.contiguous()) is None
    assert compare(Y[:1].expand(4, 3), Y[:1].repeat(4, 1)) is None


# ── the order of complaints ───────────────────────────────────────────────────────────────────────────────────────────

RIGHT = {"gradient of A": Y, "output": Y, "count": 24, "frozen": True}


@pytest.mark.parametrize(
    ("change", "stage", "leaf"),
    [
        ({"output": None, "count": 25}, "type", "output"),
        ({"output": Y.T, "count": "24"}, "type", "count"),
        ({"output": Y.T, "count": 25}, "shape", "output"),
        ({"output": Y.double(), "count": 25}, "dtype", "output"),
        ({"output": Y + 1, "gradient of A": None}, "value", "output"),
        ({"frozen": False, "gradient of A": Y.T}, "value", "frozen"),
        ({"gradient of A": None}, "type", "gradient of A"),
        ({"gradient of A": Y.T}, "shape", "gradient of A"),
        ({"gradient of A": 2 * Y}, "value", "gradient of A"),
        ({"surplus": 1, "output": None}, "extra", "surplus"),
    ],
)
def test_the_first_complaint(change, stage, leaf):
    difference = compare({**RIGHT, **change}, RIGHT)
    assert (difference.stage, difference.leaf) == (stage, leaf)


def test_a_missing_leaf_comes_before_all_but_a_missing_gradient_last():
    assert compare({"gradient of A": Y, "output": None, "frozen": True}, RIGHT).leaf == "count"
    without = {key: value for key, value in RIGHT.items() if key != "gradient of A"}
    assert compare(without, RIGHT).stage == "missing"
    assert compare({**without, "count": 25}, RIGHT).leaf == "count"


def test_nested_leaves_have_readable_names():
    right = {"layers": [{"q": Y}, {"q": Y}], "sizes": {"r": 4}}
    assert compare({"layers": [{"q": Y}, {"q": Y.T}], "sizes": {"r": 4}}, right).leaf == "layers[1] / q"
    assert compare({"layers": [{"q": Y}, {"q": Y}], "sizes": {"r": 5}}, right).leaf == "sizes / r"
    assert compare(3, 4).leaf == "the result"


# ── messages ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("got", "expected", "words"),
    [
        (None, Y, ["`y` should be a tensor of shape (2, 3); it is None", "without `return`"]),
        (len, Y, ["it is a function", "brackets"]),
        (torch.tensor(3), 3, ["should be a whole number", "`.item()`"]),
        (24.0, 24, ["should be a whole number; it is the number 24.0", "`.numel()`"]),
        (1, True, ["should be True or False; it is the whole number 1"]),
        (True, 1, ["should be a whole number; it is True"]),
        ("3", 3, ["it is the text '3'"]),
        ([1, 2, 3], Y, ["it is a list of 3"]),
        (Y.T, Y, ["has shape (3, 2); expected (2, 3)", "the other way round"]),
        (Y[None], Y, ["(1, 2, 3)", "dimensions of size 1"]),
        (Y.flatten(), Y, ["(6,)", "arrangement"]),
        (Y[:, :2], Y, ["Only dimension 1 is wrong"]),
        (Y.half(), Y, ["float16; expected float32"]),
        (
            2 * Y,
            Y,
            ["Every value of yours is 2 times the expected one", "6 of its 6", "at [1, 2]: expected 6.0, got 12.0"],
        ),
        (Y / 8, Y, ["Every value of yours is 1/8 of the expected one"]),
        (-Y, Y, ["is minus the expected one"]),
        (Y + 1, Y, ["the expected one plus 1"]),
        (0 * Y, Y, ["zero everywhere"]),
        (torch.full((2, 3), math.nan), Y, ["All of yours are NaN"]),
        (torch.where(Y == 5, math.nan, Y), Y, ["1 of yours is NaN", "1 of its 6", "at [1, 1]"]),
        (torch.where(Y == 5, math.inf, Y), Y, ["1 of its 6", "got inf"]),
        (torch.eye(3)[[1, 2, 0]], torch.eye(3)[[2, 0, 1]], ["Transposed, yours would be right"]),
        (torch.where(Y > 3, Y + torch.rand(2, 3), Y), Y, ["Only index 1 of the first dimension is wrong"]),
        (6.0, 3.0, ["expected 3.0, got 6.0", "2 times"]),
        (1.00000099, 1.0000001, ["expected 1.0000001, got 1.00000099"]),
        ([1, 2, -100, 4], [1, 2, 3, 4], ["1 of its 4 entries is wrong", "position 2: expected 3, got -100"]),
        ([1, 2], [1, 2, 3], ["has 2 entries; expected 3"]),
        ("yes", "no", ["expected 'no', got 'yes'"]),
        ("a" * 50 + "X" + "b" * 50, "a" * 50 + "Y" + "b" * 50, ["part at character 50"]),
        ({"a": 1}, {"b": 1}, ["There is no `y / b`", "It has `a`; it should have `b`"]),
        (10**5000, 1, ["a whole number of 16610 bits"]),
        (10**400, 1.0, ["expected 1.0"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_messages_say_what_a_student_needs(got, expected, words):
    difference = compare({"y": got}, {"y": expected}, rtol=1e-8, atol=1e-9)
    for word in words:
        assert word in difference.message, difference.message


def test_a_hint_is_only_given_where_it_holds():
    almost = 2 * Y
    almost[0, 0] += 0.5
    assert "times" not in compare(almost, Y).message
    assert "Transposed" not in compare(torch.rand(3, 3), torch.eye(3)).message
    assert "plus" not in compare(Y + torch.rand(2, 3) + 1, Y).message


def test_nan_and_infinity_agree_only_with_themselves():
    special = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    assert compare(special, special) is None
    assert compare(float("nan"), float("nan")) is None
    for index in range(4):
        wrong = special.clone()
        wrong[index] = 7.0
        difference = compare(wrong, special, rtol=1.0, atol=100.0) if index < 3 else compare(wrong, special)
        assert difference.details["differing"] == 1 and difference.details["position"] == [index]
    assert compare(torch.tensor([-math.inf]), torch.tensor([math.inf])).stage == "value"
    assert compare(0.0, float("nan")).stage == "value" and compare(float("nan"), 0.0).stage == "value"
    assert compare(math.inf, 1.0, rtol=1, atol=1).stage == "value"


def test_numbers_in_the_structured_form():
    got = Y.clone()
    got[1, 0] += 2
    got[0, 1] += 0.5
    difference = compare({"output": got}, {"output": Y})
    assert difference.details["differing"] == 2 and difference.details["total"] == 6
    assert difference.details["max_abs"] == pytest.approx(2) and difference.details["max_rel"] == pytest.approx(0.5)
    assert difference.details["position"] == [1, 0]


def test_small_tensors_are_shown_whole_and_large_ones_around_the_worst_place():
    assert tensor_text(Y) == "[1  2  3]\n[4  5  6]"
    assert tensor_text(torch.tensor(2.5)) == "2.5" and tensor_text(torch.zeros(0, 3)) == "nothing (shape (0, 3))"
    big = torch.zeros(50, 4, 100)
    big[30, 2, 77] = 9
    text = tensor_text(big, [30, 2, 77])
    assert text.startswith("[30, :, :]\n") and "9" in text and "…" in text and len(text) < 400
    assert len(tensor_text(torch.rand(1000), [999])) < 150


def test_the_case_is_described_by_its_sizes():
    case = {
        "x": torch.zeros(3, 5),
        "alpha": 16,
        "bias": None,
        "names": ["q", "v"],
        "shape": [2, 3],
        "f": print,
        "scale": torch.tensor(2.0),
    }
    assert (
        describe_case(case, 1, 5)
        == "case 2 of 5: x (3, 5), alpha = 16, bias = None, names: list of 2, shape = [2, 3], scale = 2.0"
    )


# ── hostile objects ───────────────────────────────────────────────────────────────────────────────────────────────────


class AlwaysEqual:
    def __eq__(self, other):
        return True

    def __getattr__(self, name):
        raise RuntimeError(f"code of the object was run: {name}")

    def __array__(self, *args, **kwargs):
        return Y.numpy()

    def __float__(self):
        return 1.0

    __hash__ = None


class LyingMeta(type):
    def __getattribute__(cls, name):
        return {"__name__": "float", "__module__": "builtins"}.get(name) or type.__getattribute__(cls, name)

    def __eq__(cls, other):
        return True

    def __instancecheck__(cls, instance):
        return True

    __hash__ = type.__hash__


class Meta(metaclass=LyingMeta):
    __class__ = torch.Tensor


class LyingTensor(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError("code of the object was run")


class LyingFloat(float):
    def __eq__(self, other):
        return True

    def __sub__(self, other):
        return 0.0

    __hash__ = float.__hash__


class LyingDict(dict):
    def __getitem__(self, key):
        raise RuntimeError("code of the object was run")

    def items(self):
        return [("y", Y)]


class LyingStr(str):
    def __eq__(self, other):
        return True

    __hash__ = str.__hash__


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    "liar",
    [
        AlwaysEqual(),
        Meta(),
        Meta,
        Y.as_subclass(LyingTensor),
        LyingFloat(1.0),
        LyingDict(y=Y),
        LyingStr("right"),
        Colour.RED,
        np.ma.array([1.0]),
        np.array([object()]),
        {1.5: 2},
        {1, 2},
        range(3),
        iter([1]),
        (i for i in [1]),
        type("X" * 500, (), {})(),
        torch.nn.Linear(2, 2),
        1j,
        bytearray(b"x"),
    ],
    ids=lambda liar: str(type(liar).__name__)[:20],
)
@pytest.mark.parametrize("expected", [Y, 1.0, 1, True, "right", None, [1.0], {"y": Y}])
def test_only_exact_plain_types_are_accepted(liar, expected):
    difference = compare(liar, expected, rtol=1e9, atol=1e9)
    assert difference.stage == "type"
    assert len(difference.message) < 300
    inside = compare({"y": liar, "z": 1}, {"y": expected, "z": 1}, rtol=1e9, atol=1e9)
    assert (inside.stage, inside.leaf) == ("type", "y")


def test_the_type_is_named():
    assert "an object of class `AlwaysEqual`" in compare(AlwaysEqual(), Y).message
    assert "a tensor of the subclass `LyingTensor`" in compare(Y.as_subclass(LyingTensor), Y).message
    assert "a module (`Linear`)" in compare(torch.nn.Linear(1, 1), Y).message
    assert type_name(Meta()) == "an object of class `Meta`"
    assert "a dict with a key that is a float" in compare({1.5: 2}, {"y": 1}).message
    assert type_name(Meta) == "a class"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Y.to_sparse(), "sparse"),
        (lambda: Y.to("meta"), "meta"),
        (lambda: torch.empty(0, 3), "shape"),
        (lambda: torch.zeros(1).expand(2**40), "far larger"),
        (lambda: torch.nested.nested_tensor([Y[0], Y[0, :2]]), "nested"),
        (lambda: torch.quantize_per_tensor(Y, 0.1, 0, torch.quint8), "quantized"),
    ],
    ids=["sparse", "meta", "empty", "huge", "nested", "quantized"],
)
def test_unusual_tensors_are_refused_and_never_built_up(make, words):
    assert words in compare(make(), Y).message


def test_methods_put_on_a_tensor_do_not_answer_for_it():
    tensor = torch.zeros(2, 3)
    tensor.detach = lambda: Y
    tensor.cpu = lambda: Y
    tensor.clone = lambda **kwargs: Y
    assert compare(tensor, Y).stage == "value"


def test_endless_and_enormous_structures_end():
    loop: list = []
    loop.append(loop)
    assert compare(loop, [1.0]).stage == "type"
    assert compare(loop, Y).stage == "type"
    deep: dict = {}
    deep["a"] = deep
    assert compare(deep, {"a": {"a": 1}}).stage in ("type", "extra", "missing")
    assert "a list of 1000000" in compare([0] * 1_000_000, [0]).message
    assert compare([[[0] * 300] * 300] * 300, [[[0]]]) is not None
    assert len(compare({str(i) * 50: 0 for i in range(5000)}, {"y": 1}).message) < 2000


def test_what_is_taken_is_a_copy():
    kept = torch.zeros(2, 3)
    data = plain({"y": kept, "l": [1]})
    kept += 1
    assert not data["y"].any()
    assert isinstance(plain(torch.zeros(1).expand(MAX_ELEMENTS + 1)), NotPlain)
    once = plain({"f": print, "t": Y, "n": [1, (2.0, None)]})
    assert repr(plain(once)) == repr(once), "what is plain stays as it is"


def test_an_expectation_that_is_not_plain_is_our_fault():
    with pytest.raises(ExerciseError, match="an object of class `AlwaysEqual`"):
        compare(1, AlwaysEqual())


# ── judging outcomes ──────────────────────────────────────────────────────────────────────────────────────────────────


def scale_inputs(rng):
    return [
        {"x": torch.randn(n, generator=rng), "alpha": float(a), "r": r}
        for n, a, r in ((4, 16, 2), (3, 1, 4), (5, 3, 1))
    ]


def scale_probe(work, case):
    x = case["x"].requires_grad_()
    y = work(x, case["alpha"], case["r"])
    (gradient,) = torch.autograd.grad(y.sum(), x)
    return {"output": y, "gradient of x": gradient, "kept": True}


def wrong_argument(x, alpha, r):
    return (x * alpha).reshape(r, -1, 7)


class Stateful:
    """Right at its first call, wrong afterwards."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, alpha, r):
        self.calls += 1
        return alpha / r * x if self.calls == 1 else x


EXERCISE = Exercise(
    name="judge-scale",
    chapter="99_test",
    title="Scale",
    points=3,
    minutes=1,
    difficulty=1,
    inputs=scale_inputs,
    probe=scale_probe,
    reference=lambda x, alpha, r: alpha / r * x,
    mistakes={
        "no r": (lambda x, alpha, r: alpha * x, "This multiplies by alpha alone."),
        "no scale": (lambda x, alpha, r: 1 * x, "There is no scale in this."),
        "raises": (wrong_argument, "A reshape that cannot be."),
        "same": (lambda x, alpha, r: x * alpha / r, "The cases do not tell this from right work."),
        "first only": (lambda x, alpha, r: alpha / r * x if alpha > 2 else x, "This is right for a large alpha only."),
    },
)


def verdict_for(work, seed=5):
    cases = EXERCISE.cases(seed)
    return judge(EXERCISE, probe_all(EXERCISE, work, cases), cases, seed)


def test_right_work_passes():
    verdict = verdict_for(lambda x, alpha, r: x * (alpha / r))
    assert verdict.passed and verdict.points == 3 and verdict.mistake is None and "3 cases" in verdict.message


@pytest.mark.parametrize("name", ["no r", "no scale", "first only"])
def test_mistakes_are_named(name):
    work, message = EXERCISE.mistakes[name]
    verdict = verdict_for(lambda x, alpha, r: work(x, alpha, r) + 0)
    assert verdict.mistake == name and verdict.message.startswith(message) and verdict.points == 0
    assert verdict.leaf == "output" and "`output`" in verdict.message


def test_a_mistake_that_raises_is_named_by_its_error():
    def mine(x, alpha, r):
        return (alpha * x).reshape(r, -1, 7)

    assert verdict_for(mine).mistake == "raises"

    def other(x, alpha, r):
        raise RuntimeError("something else entirely, about devices")

    verdict = verdict_for(other)
    assert verdict.mistake is None and "something else entirely" in verdict.message

    def other_type(x, alpha, r):
        raise ValueError("shape '[2, -1, 7]' is invalid for input of size 4")

    assert verdict_for(other_type).mistake is None


def test_an_unknown_error_is_not_given_a_name():
    verdict = verdict_for(lambda x, alpha, r: alpha / r * x + 0.125)
    assert verdict.mistake is None and "plus 0.125" in verdict.message
    assert verdict_for(Stateful()).mistake is None


def test_a_mistake_among_others_is_still_named():
    """Right in nothing but wrong in the output exactly as a known mistake is: that mistake explains the output."""
    cases = EXERCISE.cases(5)
    outcomes = [
        Outcome({**outcome.data, "kept": False})
        for outcome in probe_all(EXERCISE, EXERCISE.mistakes["no scale"][0], cases)
    ]
    verdict = judge(EXERCISE, outcomes, cases, 5)
    assert verdict.mistake == "no scale"


def test_the_worst_stage_of_all_cases_is_shown_first():
    cases = EXERCISE.cases(5)
    right = [outcome.data for outcome in probe_all(EXERCISE, EXERCISE.reference, cases)]
    outcomes = [
        Outcome({**right[0], "output": right[0]["output"] + 1}),
        Outcome({**right[1], "output": None}),
        Outcome(right[2]),
    ]
    verdict = judge(EXERCISE, outcomes, cases, 5)
    assert (
        verdict.kind == "type"
        and verdict.case_number == 1
        and verdict.case.startswith("case 2 of 3: x (3,), alpha = 1.0, r = 4")
    )
    outcomes[2] = Outcome(None, Raised("ValueError", "no"))
    assert judge(EXERCISE, outcomes, cases, 5).kind == "raised"
    outcomes[2] = Outcome(None, Raised("NotImplementedError", "judge-scale: not written yet", unwritten="judge-scale"))
    assert judge(EXERCISE, outcomes, cases, 5).kind == "blank"


def test_fewer_outcomes_than_cases_is_no_pass():
    cases = EXERCISE.cases(5)
    outcomes = probe_all(EXERCISE, EXERCISE.reference, cases)
    assert judge(EXERCISE, outcomes[:2], cases, 5).kind == "raised"
    assert not judge(EXERCISE, [], cases, 5).passed


def test_raw_data_from_elsewhere_is_not_trusted():
    cases = EXERCISE.cases(5)
    outcomes = [Outcome({"output": AlwaysEqual(), "gradient of x": AlwaysEqual(), "kept": True}) for _ in cases]
    verdict = judge(EXERCISE, outcomes, cases, 5)
    assert verdict.kind == "type" and verdict.mistake is None


def test_without_a_seed_the_cases_given_are_used():
    cases = [{"x": torch.ones(2), "alpha": 6.0, "r": 2}]
    verdict = judge(EXERCISE, probe_all(EXERCISE, lambda x, alpha, r: 2 * x, cases), cases)
    assert verdict.kind == "value" and "expected 3.0, got 2.0" in verdict.message
    assert judge(EXERCISE, probe_all(EXERCISE, lambda x, alpha, r: 3 * x, cases), cases).passed


def test_a_broken_reference_is_told_as_ours():
    broken = Exercise(
        name="broken",
        chapter="99_test",
        title="Broken",
        points=1,
        minutes=1,
        difficulty=1,
        inputs=lambda rng: [{}],
        probe=lambda work, case: work(),
        reference=lambda: 1 / 0,
    )
    with pytest.raises(ExerciseError, match="'broken' is broken: its reference raises ZeroDivisionError"):
        judge(broken, [Outcome(1)], [{}], 1)


def test_verdicts_are_json_able():
    for work in (EXERCISE.reference, lambda x, alpha, r: x, lambda x, alpha, r: None, 3):
        json.dumps(verdict_for(work).to_dict())
