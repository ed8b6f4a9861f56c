"""The fast loops of pefttools.nf4: C and torch, one thread and several, give the same bytes; time and memory."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pefttools import chunks, nf4_compiled, nf4_kernels
from pefttools.codebook import FP4_CODE, NF4_CODE, midpoints
from pefttools.double_quant import level_of_bin, quantize_8bit
from pefttools.nf4 import BLOCK_SIZES, nearest_codes, pack, quantize_4bit, quantize_nf4

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler here")
ODD = (641, 1023)                    # three chunks, of which one is short, and a tail


def weights(*shape, dtype=torch.float32, seed=0, scale=0.02):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(scale).to(dtype)


def equal(a, b):
    return torch.equal(a.packed, b.packed) and torch.equal(a.absmax, b.absmax)


@pytest.fixture
def other_threads():
    def use(threads):
        torch.set_num_threads(threads)
    yield use
    torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------------ compiled

@pytest.fixture(params=["as the machine has it", "plain C"])
def library(request, monkeypatch):
    """The kernels, and those for processors without AVX-512."""
    if request.param == "plain C":
        if platform.machine() not in ("x86_64", "AMD64"):
            pytest.skip("plain C is what this machine has anyway")
        monkeypatch.setattr(nf4_compiled, "FLAGS", (*nf4_compiled.FLAGS, "-mno-avx512f"))
    nf4_compiled.library.cache_clear()
    yield nf4_compiled.library()
    nf4_compiled.library.cache_clear()


@needs_compiler
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_is_eager_in_every_bit(library, dtype, quant_type):
    g = torch.Generator().manual_seed(0)
    middles = midpoints({"nf4": NF4_CODE, "fp4": FP4_CODE}[quant_type].sort().values)
    ties = torch.cat([middles, -middles, torch.nextafter(middles, torch.tensor(2.0))])
    ties = torch.nn.functional.pad(ties, (1, 18), value=1).repeat(100)
    cases = [weights(*ODD, dtype=dtype), torch.zeros(70, 64, dtype=dtype), ties.to(dtype), weights(1, dtype=dtype),
             ((torch.rand(70, 64, generator=g) * 2 - 1) * torch.finfo(dtype).max).to(dtype),
             ((torch.rand(70, 64, generator=g) * 2 - 1) * torch.finfo(dtype).tiny * 0.1).to(dtype),
             weights(64, 128, dtype=dtype)[:, ::2]]
    for block_size in (32, 64, 4096):
        for w in cases:
            eager = quantize_4bit(w, quant_type, block_size)
            compiled = quantize_4bit(w, quant_type, block_size, compiled=True)
            assert equal(compiled, eager)
            for out in DTYPES:
                one, other = (eager.dequantize(dtype=out, compiled=compiled) for compiled in (True, False))
                assert torch.equal(one, other)


@needs_compiler
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_compiled_refuses_what_is_not_finite(library, bad):
    for dtype in DTYPES:
        w = weights(8, 64, dtype=dtype)
        w[3, 5] = bad
        with pytest.raises(ValueError, match=r"first at \[3, 5\]"):
            quantize_nf4(w, compiled=True)


@needs_compiler
def test_compiled_is_bitsandbytes_in_every_bit():
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.functional import quantize_4bit as theirs

    for dtype in DTYPES:
        w = weights(512, 1024, dtype=dtype)
        packed, state = theirs(w, quant_type="nf4", compress_statistics=True)
        q = quantize_nf4(w, double_quant=True, compiled=True)
        assert torch.equal(q.packed, packed) and torch.equal(q.absmax, state.absmax)
        assert torch.equal(q.nested_absmax, state.state2.absmax)
        assert torch.equal(q.dequantize(compiled=True), dequantize_4bit(packed, state))


@needs_compiler
@pytest.mark.parametrize("absmax", [
    torch.rand(256, generator=torch.Generator().manual_seed(0)), torch.rand(1000), torch.zeros(300), torch.ones(1),
    torch.full((256,), 0.1), torch.rand(600) * 1e38, torch.arange(256) * 1e-45, torch.rand(512) * 1e-39, torch.rand(0)])
def test_compiled_double_quantization_is_eager_in_every_bit(library, absmax):
    offset = absmax.mean().nan_to_num(0)
    codes, nested = quantize_8bit(absmax - offset)
    theirs = nf4_compiled.encode_nested(absmax, offset, level_of_bin(torch.device("cpu")))
    assert torch.equal(theirs[0], codes) and torch.equal(theirs[1], nested)


@needs_compiler
def test_compiled_takes_any_dtype_and_refuses_what_does_not_fit(library):
    w = weights(64, 64)
    q = quantize_nf4(w, compiled=True)
    out = torch.empty(64, 64, dtype=torch.float64, requires_grad=True)
    assert q.dequantize(out, compiled=True) is out and torch.equal(out.detach(), q.dequantize(compiled=False).double())
    half = dataclasses.replace(q, absmax=q.absmax.half())           # as some files have it
    assert torch.equal(half.dequantize(compiled=True), half.dequantize(compiled=False))
    q.packed = q.packed[:-1]
    with pytest.raises(ValueError, match="2047 packed bytes and 64 absmaxes do not fit 4096 weights in blocks of 64"):
        q.dequantize(compiled=True)
    nested = quantize_nf4(w, double_quant=True)
    for name, wrong in {"nested_code": nested.nested_code[:100], "code": nested.code[:8],
                        "absmax": nested.absmax.int(), "packed": nested.packed.int()}.items():
        broken = dataclasses.replace(nested)
        setattr(broken, name, wrong)                                # behind the back of its own check
        with pytest.raises(ValueError, match="do not fit"):
            broken.dequantize(compiled=True)
    q.packed = quantize_nf4(torch.cat([w, w])).packed[::2]
    with pytest.raises(ValueError, match="scattered"):
        q.dequantize(compiled=True)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_a_buffer_that_backward_needs_is_not_overwritten_unseen(compiled):
    q = quantize_nf4(weights(64, 64))
    buffer = q.dequantize()
    loss = (torch.ones(64, 64, requires_grad=True) * buffer).sum()
    q.dequantize(buffer, compiled=compiled)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ------------------------------------------------------------------------------------------------ when

@pytest.fixture
def calls(monkeypatch):
    """What was asked of the C kernels, and the choice as it is in a new process."""
    called = []
    real = nf4_compiled._call
    monkeypatch.setattr(nf4_compiled, "_call", lambda name, *rest: (called.append(name), real(name, *rest)))
    before = nf4_compiled._asked, nf4_compiled._seen
    nf4_compiled.use(None)
    yield called
    nf4_compiled._asked, nf4_compiled._seen = before


@needs_compiler
def test_use_decides_for_calls_that_leave_it_open(calls):
    nf4_compiled.use()
    assert nf4_compiled.in_use()
    q = quantize_nf4(torch.zeros(64), compiled=False)
    q.dequantize()
    assert calls == ["decode"]
    nf4_compiled.use(False)
    q.dequantize()
    quantize_nf4(torch.zeros(64))
    assert calls == ["decode"]
    quantize_nf4(torch.zeros(64), compiled=True)
    assert calls == ["decode", "encode"]


@needs_compiler
def test_left_open_it_begins_when_it_is_worth_the_build(calls, monkeypatch):
    monkeypatch.setattr(nf4_compiled, "WORTH", 10_000)
    w = weights(64, 64)
    for _ in range(2):
        q = quantize_nf4(w)                      # 4096, 8192, 12288: the fourth call begins with more than 10,000
    eager = q.dequantize()
    assert calls == [] and nf4_compiled.in_use() is None
    assert torch.equal(q.dequantize(), eager) and equal(quantize_nf4(w), q)
    assert calls == ["decode", "encode"]


def test_left_open_a_machine_without_a_compiler_hears_nothing(calls, monkeypatch, tmp_path):
    monkeypatch.setattr(nf4_compiled, "WORTH", 1)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    nf4_compiled.library.cache_clear()
    w = weights(64, 64)
    for _ in range(3):
        assert equal(quantize_nf4(w), quantize_nf4(w, compiled=False))
    assert calls == [] and nf4_compiled.in_use() is False


@pytest.mark.parametrize("value, asked", [("0", False), ("1", True), ("", None)])
def test_the_environment_decides_for_the_process(value, asked):
    script = "from pefttools import nf4_compiled; print(nf4_compiled.in_use())"
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PEFTTOOLS_COMPILED": value},
                          capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str(asked), done.stderr


def test_without_a_compiler_the_error_says_so(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    nf4_compiled.library.cache_clear()
    for act in (lambda: quantize_nf4(torch.zeros(64), compiled=True), nf4_compiled.use,
                lambda: quantize_nf4(torch.zeros(64)).dequantize(compiled=True)):
        with pytest.raises(RuntimeError, match="needs a C compiler.*compiled=False"):
            act()
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(RuntimeError, match="no-such-compiler could not build"):
        nf4_compiled.library()


@needs_compiler
def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    monkeypatch.setattr(nf4_compiled, "SOURCE", tmp_path / "nf4.c")
    (tmp_path / "nf4.c").write_text("this is not C")
    nf4_compiled.library.cache_clear()
    with pytest.raises(RuntimeError, match="(?s)could not build.*error.*compiled=False"):
        nf4_compiled.library()


# ------------------------------------------------------------------------------------------------ threads

@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
@pytest.mark.parametrize("threads", [2, 3, 4])
def test_any_number_of_threads_gives_the_same_bytes(other_threads, threads, compiled):
    for dtype in DTYPES:
        for shape in (ODD, (1024, 512), (2048, 513)):
            w = weights(*shape, dtype=dtype)
            torch.set_num_threads(1)
            one = quantize_nf4(w)
            back = one.dequantize()
            other_threads(threads)
            assert equal(quantize_nf4(w, compiled=compiled), one)
            assert torch.equal(one.dequantize(compiled=compiled), back)


def test_threads_leave_torchs_settings_alone(other_threads):
    other_threads(3)
    seen = []
    quantize_nf4(weights(2048, 512)).dequantize()
    assert torch.get_num_threads() == 3
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [3]


def test_threads_know_the_modes_of_their_caller(other_threads):
    w = torch.nn.Parameter(weights(2048, 512))
    expected = quantize_nf4(w).dequantize()
    buffer = torch.empty_like(expected)
    other_threads(2)
    with torch.inference_mode():
        q = quantize_nf4(w, double_quant=True)
        q.dequantize(out=buffer)
        q.dequantize()
        quantize_nf4(torch.randn(2048, 512))
    with torch.enable_grad():
        quantize_nf4(w).dequantize(out=buffer)
    assert torch.equal(buffer, expected)


def test_an_error_in_a_thread_reaches_the_caller(other_threads):
    other_threads(2)
    w = weights(2048, 512)
    w[2000, 0] = math.nan
    with pytest.raises(ValueError, match=r"\[2000, 0\]"):
        quantize_nf4(w)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_after_a_fork(tmp_path):
    """A child has none of its parent's threads: it must not wait for them."""
    # Nothing large outside of quantize_nf4: after a fork, torch's own parallel operations do hang.
    script = ("import os, signal, torch\nfrom pefttools.nf4 import quantize_nf4\ntorch.set_num_threads(2)\n"
              "w = torch.ones(512, 2048)\nfirst = quantize_nf4(w, compiled=False).packed.numpy().tobytes()\n"
              "pid = os.fork()\nif pid == 0:\n    signal.alarm(30)\n"
              "    same = quantize_nf4(w, compiled=False).packed.numpy().tobytes() == first\n"
              "    quantize_nf4(w, compiled=False).dequantize(compiled=False)\n"
              "    os._exit(7 if same and torch.get_num_threads() == 2 else 1)\n"
              "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n")
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 7


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows, columns", [(1, 64), (5, 32), (700, 48)])
def test_look_up_is_indexing(other_threads, threads, rows, columns):
    other_threads(threads)
    for table in (torch.arange(100, dtype=torch.uint8), torch.randn(100, dtype=torch.float64)):
        rows_of = torch.randint(100, (rows, columns), generator=torch.Generator().manual_seed(0))
        at = chunks.index((rows, columns)).copy_(rows_of)
        out = torch.empty(rows, columns, dtype=table.dtype)
        chunks.look_up(table, at, out)
        assert torch.equal(out, table[rows_of])


# ------------------------------------------------------------------------------------------------ the table

def test_few_bins_need_a_second_look():
    """Fifteen midpoints, fifteen marked bins (a midpoint near an edge marks two); 3 in 10,000 normal weights."""
    bounds, order, table = nf4_kernels._tables(tuple(NF4_CODE.tolist()))
    marked = (table & nf4_kernels._AGAIN).bool()
    assert 15 <= int(marked.sum()) <= 18
    assert torch.equal((table & 15)[~marked].unique(), order)
    w = weights(1 << 14, 64)
    s = w / w.abs().amax(1, keepdim=True)
    share = marked[(s * nf4_kernels._SCALE + nf4_kernels._BINS / 2).long()].float().mean().item()
    assert share == pytest.approx(3e-4, abs=1.5e-4)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_the_table_is_exact_around_every_midpoint(block_size):
    """A hundred neighbouring floats on both sides of each midpoint, scaled by many absmaxes, against the formula."""
    near = midpoints(NF4_CODE).view(torch.int32).unsqueeze(1) + torch.arange(-50, 50, dtype=torch.int32)
    near = near.view(torch.float32).view(-1)
    near = torch.nn.functional.pad(near, (0, -len(near) % (block_size - 1))).view(-1, block_size - 1)
    scales = torch.rand(40, 1, 1, generator=torch.Generator().manual_seed(0))
    w = torch.cat([torch.ones(len(near), 1), near], 1) * scales
    codes, absmax = nearest_codes(w.view(-1), NF4_CODE, block_size)
    q = quantize_nf4(w, block_size)
    assert torch.equal(q.packed.view(-1), pack(codes)) and torch.equal(q.absmax, absmax)


# ------------------------------------------------------------------------------------------------ time and space

def test_empty_is_torch_empty_with_any_size():
    for shape in ((0,), (3, 5), (1 << 20,), (1025, 1023), (4096, 2048)):
        for dtype in DTYPES:
            t = chunks.empty(torch.Size(shape), dtype=dtype, device="cpu")
            assert t.shape == shape and t.dtype == dtype and t.is_contiguous()
            assert torch.equal(t.fill_(1), torch.ones(shape, dtype=dtype))


class Largest(TorchDispatchMode):
    """The largest storage that appears as the result of an operation, in bytes, the given ones excepted."""

    def __init__(self):
        super().__init__()
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return out


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
def test_scratch_memory_is_small(compiled):
    w = weights(2048, 2048, dtype=torch.bfloat16)
    nf4_kernels._tables(tuple(NF4_CODE.tolist()))
    with Largest() as trace:
        q = quantize_nf4(w, compiled=compiled)
    output = {t.untyped_storage().data_ptr() for t in (w, q.packed, q.absmax)}
    scratch = [size for pointer, size in trace.sizes.items() if pointer not in output]
    assert max(scratch) <= 2**20 + 64
    out = torch.empty_like(w)
    with Largest() as trace:
        q.dequantize(out=out, compiled=compiled)
    scratch = [size for pointer, size in trace.sizes.items() if pointer not in output | {out.data_ptr()}]
    assert max(scratch, default=0) <= 2**20 + 64


def ratio(ours, theirs, rounds=7):
    """How many times as fast, the median over interleaved rounds."""
    ours(), theirs()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        theirs()
        middle = time.perf_counter()
        ours()
        found.append((middle - start) / (time.perf_counter() - middle))
    return statistics.median(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_is_three_times_as_fast_as_bitsandbytes(dtype):
    """Eager, one thread, 2048 → 512; 9 times on a quiet machine. The table over all shapes is `make bench`'s."""
    from bitsandbytes.functional import quantize_4bit as theirs

    w = weights(512, 2048, dtype=dtype)
    assert ratio(lambda: quantize_nf4(w, compiled=False), lambda: theirs(w, quant_type="nf4")) >= 3


@needs_compiler
def test_compiled_is_many_times_as_fast_as_bitsandbytes():
    """30 to 60 times on a quiet machine with AVX-512 (`make bench`); here only that it is compiled at all."""
    from bitsandbytes.functional import quantize_4bit as theirs

    w = weights(512, 2048)
    assert ratio(lambda: quantize_nf4(w, compiled=True), lambda: theirs(w, quant_type="nf4")) >= 6


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_dequantize_is_no_slower_than_bitsandbytes(dtype):
    """Twice as fast on a quiet machine, here with room for a busy one; 2048 → 512, double quantization."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.functional import quantize_4bit as theirs

    w = weights(512, 2048, dtype=dtype)
    packed, state = theirs(w, quant_type="nf4", compress_statistics=True)
    q = quantize_nf4(w, double_quant=True)
    assert ratio(lambda: q.dequantize(compiled=True), lambda: dequantize_4bit(packed, state), rounds=31) >= 0.8
