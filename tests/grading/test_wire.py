"""The wire: what goes in comes out, in exactly its types; and whatever else arrives is refused in bounded time and memory."""

from __future__ import annotations

import json
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from pefttools.grading.plain import NotPlain
from pefttools.grading.probe import Outcome, Raised
from pefttools.grading.wire import DTYPES, MAGIC, Bounds, WireError, from_bytes, to_bytes


def same(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and (
            torch.equal(a.nan_to_num(7) if a.is_floating_point() else a, b.nan_to_num(7) if b.is_floating_point() else b))
    if isinstance(a, float):
        return a == b and math.copysign(1, a) == math.copysign(1, b) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, dict):
        return list(a) == list(b) and [type(k) for k in a] == [type(k) for k in b] and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Outcome):
        return same(a.data, b.data) and a.raised == b.raised and a.printed == b.printed
    return a == b


LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-10**30, 10**30), st.floats(), st.text(max_size=8),
                   st.binary(max_size=8), st.just(...), st.builds(NotPlain, st.text(max_size=5)),
                   st.builds(lambda shape, d: torch.ones(shape).to(d), st.lists(st.integers(0, 3), max_size=3),
                             st.sampled_from(sorted(DTYPES, key=str))))
TREES = st.recursive(LEAVES, lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple),
    st.dictionaries(st.one_of(st.text(max_size=4), st.integers(2, 9)), inner, max_size=3)), max_leaves=12)


@settings(max_examples=150, deadline=None)
@given(TREES)
def test_what_goes_in_comes_out_in_exactly_its_types(data):
    assert same(from_bytes(to_bytes(data)), data)


def test_tensors_bit_by_bit_views_and_complex_ones_too():
    base = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    data = {"row": base[1], "column": base[:, 2], "whole": base, "again": base, "complex": torch.complex(base, -base),
            "empty": torch.zeros(0, 3), "scalar": torch.tensor(2), "nan": torch.tensor([float("nan"), 1.0])}
    got = from_bytes(to_bytes(data))
    assert same({k: v for k, v in got.items() if k != "complex"}, {k: v for k, v in data.items() if k != "complex"})
    assert torch.equal(got["complex"], data["complex"]) and got["complex"].dtype == torch.complex64


def test_outcomes_travel_and_their_texts_are_cut():
    raised = Raised("ValueError", "no", "line 3 of the cell In[7]", "x = 1", None)
    outcomes = [Outcome({"y": torch.ones(2)}, None, "hi"), Outcome(None, raised, "")]
    assert same(from_bytes(to_bytes(outcomes)), outcomes)
    long = from_bytes(to_bytes(Outcome(None, Raised("E" * 999, "m" * 9999), "p" * 99_999)))
    assert len(long.raised.type) == 80 and len(long.raised.message) == 600 and len(long.printed) == 4_000


@pytest.mark.parametrize("data", [object(), {1, 2}, {(1, 2): 3}, [lambda: 0], torch.nn.Linear(2, 2), 1j,
                                  torch.ones(2).to_sparse()],
                         ids=["object", "set", "key", "function", "module", "complex", "sparse"])
def test_what_is_not_plain_is_not_sent(data):
    with pytest.raises((WireError, TypeError, RuntimeError, ValueError)):
        from_bytes(to_bytes(data))


def blob(tree, tensors=b""):
    tree = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    return MAGIC + len(tree).to_bytes(4, "big") + tree + tensors


HOSTILE = {
    "nothing": (b"", "does not begin"),
    "a pickle": (pickle.dumps({"a": 1}), "does not begin"),
    "a pickle inside": (blob(pickle.dumps([1])), "not JSON"),
    "cut off": (to_bytes({"a": 1})[:-1], "cut off"),
    "a length that lies": (MAGIC + (2**32 - 1).to_bytes(4, "big") + b"1", "cut off"),
    "brackets": (blob(b"[" * 2_000_000), "more than"),
    "deep": (blob(b"[" * 5_000 + b"]" * 5_000), "deep"),
    "many": (blob(b"[" + b"0," * 1_500_000 + b"0]"), "more than"),
    "a huge number": (blob(b"9" * 100_000), "not JSON"),
    "NaN bare": (blob(b"NaN"), "stands bare"),
    "not UTF-8": (blob(b'"\xff\xff"'), "not JSON"),
    "an unknown node": (blob({"Q": 1}), "a node 'Q'"),
    "two marks": (blob({"T": 0, "t": []}), "a node that"),
    "a number in words": (blob({"f": "1e5"}), "a number that is none"),
    "bytes that are none": (blob({"b": "?"}), "not base64"),
    "a key twice": (blob({"d": [["a", 1], ["a", 2]]}), "an entry"),
    "a key of a list": (blob({"d": [[[1], 1]]}), "an entry"),
    "an exception without a type": (blob({"R": {"message": "x"}}), "an exception that is none"),
    "an exception of numbers": (blob({"R": {"type": 1, "message": "", "place": None, "line": None, "unwritten": None}}),
                                "an exception that is none"),
    "an outcome of two": (blob({"O": [1, None]}), "an outcome that is none"),
    "an outcome that raised a number": (blob({"O": [1, 2, ""]}), "an outcome that is none"),
    "no such tensor": (blob({"T": 0}), "missing"),
    "a tensor twice": (blob([{"T": 0}, {"T": 0}], save({"0": torch.ones(2)})), "twice"),
    "a tensor too many": (blob(1, save({"0": torch.ones(2)})), "nothing refers to"),
    "tensor names that lie": (blob({"T": 0}, (2**40).to_bytes(8, "little") + b"{}"), "bytes of tensor names"),
    "tensors that are none": (blob({"T": 0}, b"\x02\0\0\0\0\0\0\0{}extra"), "cannot be read"),
    "a shape that lies": (blob({"T": 0}, (lambda h: len(h).to_bytes(8, "little") + h + b"\0" * 4)(
        b'{"0":{"dtype":"F32","shape":[1099511627776,1099511627776],"data_offsets":[0,4]}}')), "cannot be read"),
    "complex of whole numbers": (blob({"C": 0}, save({"0": torch.ones(3, 2, dtype=torch.int32)})), "complex"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_bytes_are_refused(case):
    content, message = HOSTILE[case]
    with pytest.raises(WireError, match=message):
        from_bytes(content)


def test_bounds_are_looked_at_before_anything_is_parsed():
    good = to_bytes([torch.zeros(100), "text"])
    for bounds in (Bounds(total=100), Bounds(tree=5), Bounds(leaves=1), Bounds(tensors=0)):
        with pytest.raises(WireError):
            from_bytes(good, bounds)
    assert len(from_bytes(good)) == 2


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_flipped_bytes_never_raise_anything_else(data):
    good = bytearray(to_bytes({"y": torch.arange(6.0), "n": [1, (2.5, None)], "o": Outcome(1, None, "x")}))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        from_bytes(bytes(good))
    except WireError:
        pass
