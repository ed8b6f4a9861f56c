"""The benchmark's own parts: ratios of a known pair, memory to the byte, verdicts, resuming after a kill, the page."""
from __future__ import annotations

import itertools
import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pefttools.bench import __main__ as command
from pefttools.bench import groups, harness, layer_memory, layers, machine, page
from pefttools.bench.harness import Effort, Ratio, interleave
from pefttools.bench.memory import Trace, kept, kept_bytes, peak_bytes

ROOT = Path(__file__).resolve().parents[1]
EARLIER = "earlier state of the code"
pytestmark = pytest.mark.usefixtures("one_thread")


# ── times ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
class Clock:
    """A clock that only the work moves on."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        def run():
            self.now += seconds() if callable(seconds) else seconds
        return run


def test_a_known_ratio_with_sleeps():
    ways = {"slow": lambda: time.sleep(0.03), "fast": lambda: time.sleep(0.01)}
    times = interleave(ways, Effort(seconds=0.3, least=9, most=9, sample=0.001))
    assert times.ratio("slow", "fast").median == pytest.approx(3, rel=0.25)
    assert times.control().median == pytest.approx(1, rel=0.2)
    assert set(times.milliseconds()) == {"slow", "fast"} and times.milliseconds()["slow"] >= 30


def test_a_drifting_machine_does_not_move_the_ratio():
    """The machine slows down tenfold on the way: each round is slowed alike, minima and means are not."""
    clock, slowness = Clock(), itertools.count(1, 0.01)
    factor = {"now": 1.0}

    def work(seconds):
        def run():
            factor["now"] = next(slowness)
            clock.now += seconds * factor["now"]
        return run

    times = interleave({"ours": work(0.8), "theirs": work(1.0)}, Effort(seconds=1e9, least=300, most=300), clock=clock)
    assert times.seconds["theirs"][-1] > 8 * times.seconds["theirs"][0]
    ratio = times.ratio("ours", "theirs")
    assert ratio.median == pytest.approx(0.8, rel=0.01) and ratio.low < 0.8 < ratio.high
    control = times.control()
    assert control.low <= 1 <= control.high and control.p10 < control.p90


def test_rounds_are_in_a_random_order_that_the_seed_decides():
    def order(seed):
        calls, clock = [], Clock()
        ways = {name: lambda name=name: (calls.append(name), clock.work(1.0)()) for name in "abc"}
        interleave(ways, Effort(seconds=0, least=20, most=20), seed=seed, warm_up=2, clock=clock)
        return calls[4 * 3:]     # three ways and the control, each warmed up twice and timed once

    first = order(0)
    assert first == order(0) and first != order(1)
    rounds = [first[i:i + 4] for i in range(0, len(first), 4)]
    assert len(rounds) == 20 and all(sorted(r) == ["a", "a", "b", "c"] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 5


def test_quick_calls_are_repeated_and_slow_ones_are_not():
    clock, calls = Clock(), {"quick": 0, "slow": 0}

    def way(name, seconds):
        def run():
            calls[name] += 1
            clock.now += seconds
        return run

    times = interleave({"quick": way("quick", 0.001), "slow": way("slow", 0.5)},
                       Effort(seconds=0, least=3, most=10, sample=0.01), warm_up=0, clock=clock)
    assert calls == {"quick": 2 + 3 * 2 * 10, "slow": 1 + 3}     # the control is the first way once more
    assert times.seconds["quick"] == pytest.approx([0.001] * 3)


def test_the_number_of_rounds_follows_the_time_allowed():
    def n(**effort):
        clock = Clock()
        return len(interleave({"a": clock.work(1.0)}, Effort(**effort), clock=clock).seconds["a"])

    assert n(seconds=100, least=5, most=1000) == 50      # a round is the way and its control
    assert n(seconds=1, least=5, most=1000) == 5 and n(seconds=1e6, least=5, most=30) == 30


def test_ratio_statistics_by_hand():
    ratio = Ratio.of([float(i) for i in range(1, 102)])
    assert (ratio.median, ratio.p10, ratio.p90) == (51, 11, 91)
    assert 41 <= ratio.low < 51 < ratio.high <= 61                    # ± 1.96 · 1.25 · σ/√n = ± 7.1 for a normal sample
    assert Ratio.of([2.0] * 9) == Ratio(2, 2, 2, 2, 2)
    with pytest.raises(ValueError, match="at least one round"):
        Ratio.of([])
    with pytest.raises(ValueError, match="at least one callable"):
        interleave({})


def test_the_bootstrap_interval_covers_the_median_about_95_times_in_100():
    draw = random.Random(0)
    covered = sum(r.low <= 1 <= r.high for r in (
        Ratio.of([draw.gauss(1, 0.1) for _ in range(31)], seed=i, resamples=300) for i in range(300)))
    assert 0.90 <= covered / 300 <= 0.99


def test_compare_turns_the_ratio_round_for_speed():
    times = harness.Times({"ours": [1.0, 1.0], "ours again": [1.0, 1.0], "peft": [4.0, 4.0]})
    less = harness.compare("row", times, "ours", "peft", bound=0.85)
    more = harness.compare("row", times, "ours", "peft", bound=3, faster=True)
    assert (less["value"], less["sense"], less["what"]) == (0.25, "≤", "ours / peft")
    assert (more["value"], more["sense"], more["what"]) == (4.0, "≥", "ours × as fast as peft")
    assert page.verdict(less) == "yes" and page.verdict(more) == "yes" and more["ms"]["peft"] == 4000


def test_rounds_of_several_processes_are_pooled():
    def process(ours, peft):
        times = harness.Times({"ours": ours, "ours again": ours, "peft": peft})
        return [harness.compare("row", times, "ours", "peft", bound=1.0, beside={"frozen": peft[0]}),
                {"row": "exact", "value": 3}]

    one = process([1.0] * 3, [2.0] * 3)
    [alone, exact] = harness.pooled([one])
    assert alone == {key: value for key, value in one[0].items() if key != harness.RAW} and exact == one[1]
    [both, exact] = harness.pooled([one, process([1.0] * 4, [0.5] * 4)])
    assert (both["value"], both["between"], both["rounds"], exact["value"]) == (2.0, [0.5, 2.0], 7, 3)
    assert both["beside"] == {"frozen": 1.25} and harness.RAW not in both and both["control"] == [1, 1]
    assert "medians of the processes 0.500 to 2.00" in page.line(both, 2)
    missing = {"row": "row", "missing": "ValueError: bits differ"}
    assert harness.pooled([one, [missing, exact]])[0] == missing


def test_a_failing_row_says_why_and_spoils_no_other():
    def broken():
        raise ValueError("bits differ (/home/me/x.py)\nsecond line")

    assert harness.attempt({"row": "x"}, broken) == {"row": "x", "missing": "ValueError: bits differ"}
    assert harness.attempt({"row": "x"}, lambda: {"value": 1}) == {"row": "x", "value": 1}


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's sums of processor time")
def test_a_busy_neighbour_is_noticed():
    spin = "import time\nend = time.time() + 20\nwhile time.time() < end: pass"
    # not our child: a child counts as ours, so its shell ends at once and leaves it behind
    shell = subprocess.run(["sh", "-c", f"{sys.executable} -c '{spin}' >/dev/null 2>&1 & echo $!"],
                           capture_output=True, text=True)
    try:
        with harness.watched() as seen:
            time.sleep(1.5)
        assert seen["others"] > 0.3 and 1.4 < seen["seconds"] < 30
    finally:
        import os
        os.kill(int(shell.stdout), signal.SIGKILL)


# ── memory ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def network(T=10, d=4, hidden=8, out=3):
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(d, hidden), nn.ReLU(), nn.Linear(hidden, out))
    return net, torch.randn(T, d, generator=generator)


def test_kept_bytes_of_a_small_network_by_hand():
    net, x = network()
    relu = 10 * 8 * 4                                             # saved by relu and by the second linear: one storage
    assert kept_bytes(lambda: net(x)) == relu == 320              # the docstring's number; x and the weights existed
    assert kept_bytes(lambda: net(x.clone())) == relu + 10 * 4 * 4        # now the input is made inside
    assert kept_bytes(lambda: torch.sigmoid(net(x))) == relu + 10 * 3 * 4  # sigmoid saves its result
    assert kept_bytes(lambda: net(x) * 2) == relu                 # times a number saves nothing
    [held] = kept(lambda: net(x))
    assert (held.op, held.shape, held.dtype, held.bytes) == ("aten.relu.default", (10, 8), torch.float32, 320)


def test_views_share_a_storage_and_a_saved_slice_holds_all_of_it():
    x = torch.randn(6, 5, requires_grad=True)

    def forward():
        y = x.exp()                               # saved by exp: 6 · 5 · 4
        return y[:2].t().reshape(2, 5) * y[2:4]   # saves two views of y, and a reshape that had to copy: 2 · 5 · 4

    assert kept_bytes(forward) == 6 * 5 * 4 + 2 * 5 * 4


def test_peak_of_a_step_by_hand():
    x = torch.randn(100, 50)
    weight = torch.randn(20, 50, requires_grad=True)

    def step():
        y = x @ weight.t()            # 100 · 20 · 4 = 8000; x and weight are older
        y.sum().backward()            # sum: 4, its gradient: 4 (expanded without a copy), then dW: 50 · 20 · 4 = 4000

    assert peak_bytes(step) == 8000 + 4 + 4 + 4000
    weight.grad = None
    assert peak_bytes(lambda: x.exp() + 1) == 2 * 100 * 50 * 4       # both alive at the moment the second is made


def test_what_is_freed_is_subtracted_and_a_resized_storage_counts_anew():
    with Trace() as trace:
        a = torch.empty(1000)
        b = a[10:]
        assert trace.live == 4000
        del a
        assert trace.live == 4000, "b still holds it"
        del b
        assert (trace.live, trace.peak) == (0, 4000)
        c = torch.empty(0)
        c.resize_(500)
        assert trace.live == 2000 and [h.bytes for h in trace.held()] == [2000]
        torch.add(torch.ones(3), torch.ones(3), out=torch.ones(3))
        assert trace.live == 2000 and trace.peak == 4000
        d = torch.tensor([1.0, 2.0])
        assert trace.live == 2008, d
    assert trace.held()


def test_a_function_that_hides_tensors_on_its_context_is_seen():
    """saved_tensors_hooks would miss this; the allocations do not."""
    class Hiding(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.secret = x.exp()
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * ctx.secret

    x = torch.randn(30, requires_grad=True)
    assert kept_bytes(lambda: Hiding.apply(x)) == 30 * 4


def test_no_graph_is_an_error_and_not_a_zero():
    net, x = network()
    with torch.no_grad(), pytest.raises(ValueError, match="require a gradient"):
        kept_bytes(lambda: net(x))


def test_fake_tensors_count_as_real_ones_without_memory():
    real_net, real_x = network(T=64, d=32, hidden=48)
    real = kept_bytes(lambda: real_net(real_x)), peak_bytes(lambda: real_net(real_x).sum().backward())
    with FakeTensorMode():
        net = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 3))
        x = torch.randn(64, 32)
        assert (kept_bytes(lambda: net(x)), peak_bytes(lambda: net(x).sum().backward())) == real
        # sizes that no machine here has
        giant, row = nn.Linear(100_000, 100_000), torch.randn(1 << 20, 100_000)       # 40 GB and 420 GB
        assert kept_bytes(lambda: giant(row).relu()) == (1 << 20) * 100_000 * 4
    real_net.zero_grad()
    meta_net, meta_x = real_net.to("meta"), real_x.to("meta")
    assert (kept_bytes(lambda: meta_net(meta_x)), peak_bytes(lambda: meta_net(meta_x).sum().backward())) == real


def test_the_trace_agrees_with_pytorchs_own_record_of_allocations():
    """An independent witness: the profiler's log of the CPU allocator."""
    from torch.profiler import ProfilerActivity, profile

    net, x = network(T=256, d=64, hidden=128, out=64)

    def step():
        net.zero_grad()
        net(x).pow(2).mean().backward()

    step()
    ours = peak_bytes(step)
    net.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    live = peak = 0
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert ours == pytest.approx(peak, rel=0.01) and ours > 100_000


# ── memory of a decoder layer ─────────────────────────────────────────────────────────────────────────────────────────
SMALL = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 16}


def full_kib(h, m, q, k, heads):
    """PERFORMANCE's formula for full fine-tuning, with the logsumexp of the attention and the rsqrt of two norms."""
    return (16 * h + 4 * q + 4 * k + 8 * m + 4 * heads + 2 * 4) / 1024


def test_a_decoder_layer_keeps_what_the_formula_says():
    value = layer_memory.kib_per_token_and_layer(lambda model: model, lengths=(8, 16, 32), **SMALL)
    assert value == full_kib(h=64, m=160, q=64, k=32, heads=4)
    assert full_kib(h=2048, m=8192, q=2048, k=512, heads=32) == pytest.approx(106.13, abs=0.005)


def test_what_grows_with_the_square_of_the_length_is_refused():
    def eager(model):
        model.set_attn_implementation("eager")
        return model

    with pytest.raises(ValueError, match="T × T"):
        layer_memory.kib_per_token_and_layer(eager, lengths=(8, 16, 32), **SMALL)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["LoRA", "DoRA"])
def test_ours_keeps_less_than_peft(name):
    ours, theirs, full = (layer_memory.kib_per_token_and_layer(layer_memory.METHODS[way], lengths=(8, 16, 32), **SMALL)
                          for way in (f"{name}, ours", f"{name}, peft", "full fine-tuning"))
    assert theirs > full, "peft saves the input of every layer again, in float32"
    assert ours < theirs


# ── layers, both sides ────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", layers.DTYPES, ids=layers.name_of)
@pytest.mark.parametrize("kind", layers.KINDS)
def test_both_sides_of_a_comparison_compute_the_same(kind, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 64, generator=generator).to(dtype).requires_grad_()
    gradient = torch.randn(6, 128, generator=generator).to(dtype)
    found = {name: layers.step(layer, x, gradient)() for name, layer in layers.layers(kind, 64, 128, 4, dtype).items()}
    assert layers.agree(found["ours"], found["peft"], layers.CLOSE[dtype]) <= layers.CLOSE[dtype]
    assert len(found["ours"]) == len(found["peft"]) == (5 if kind == "dora" else 4)      # y, x, A, B (and m)
    assert len(found["frozen"]) == 2
    with pytest.raises(ValueError, match="do not compute the same"):
        layers.agree(found["ours"], tuple(2 * t for t in found["peft"]), layers.CLOSE[dtype])


def test_the_bounds_are_those_of_the_issue():
    fp32, bf16 = layers.DTYPES
    assert [layers.bound(kind, 2048, dtype) for kind, dtype in
            (("lora", fp32), ("dora", bf16), ("qlora", fp32))] == [1.0] * 3
    assert layers.bound("qlora", 2048, bf16) == 1.2
    assert {layers.bound(kind, 256, dtype) for kind in layers.KINDS for dtype in layers.DTYPES} == {0.85}
    assert [s[:2] for s in layers.SHAPES] == [(2048, 2048), (2048, 512), (2048, 8192), (256, 256), (256, 1024)]


# ── the page ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(("value", "low", "high", "sense", "bound", "said"), [
    (0.9, 0.85, 0.95, "≤", 1.0, "yes"), (1.1, 1.05, 1.2, "≤", 1.0, "no"),
    (0.99, 0.9, 1.1, "≤", 1.0, "yes, within noise"), (1.01, 0.9, 1.1, "≤", 1.0, "no, within noise"),
    (24.0, 23.0, 25.0, "≥", 20.0, "yes"), (2.5, 2.4, 2.6, "≥", 3.0, "no"), (5.0, 4.0, 6.0, "≤", None, "")])
def test_verdicts(value, low, high, sense, bound, said):
    row = {"value": value, "low": low, "high": high, "sense": sense, "bound": bound}
    assert page.verdict(row) == said


def test_an_exact_figure_has_no_noise():
    assert page.verdict({"value": 100.0, "sense": "≤", "bound": 100.0}) == "yes"
    assert page.verdict({"value": 100.1, "sense": "≤", "bound": 100.0}) == "no"
    assert page.verdict({"missing": "no", "bound": 1.0}) == "missing"


def result(*rows, quick=False, others=0.01):
    return {"rows": list(rows), "seconds": 1.0, "others": others, "quick": quick, "files": {},
            "machine": {"processor": "P"}}


def test_every_figure_of_the_page_comes_from_the_rows():
    timed = {"row": "256→256", "what": "ours / peft", "value": 0.8125, "p10": 0.75, "p90": 0.875, "low": 0.8,
             "high": 0.82, "control": [0.96, 1.04], "beside": {"ours / frozen": 1.5}, "unit": "×", "sense": "≤",
             "bound": 0.85, "ms": {"ours": 8.1, "peft": 10.0}}
    exact = {"row": "LoRA, ours", "value": 101.0, "unit": "KiB", "sense": "≤", "bound": 100.0}
    gone = {"row": "a|b", "what": "ours / peft", "unit": "×", "sense": "≤", "bound": 1.0, "missing": "ValueError: a|b"}
    text = page.page({"lora/2": result(timed, gone), "memory/1": result(exact)})
    assert ("| 2 | 256→256 | ours / peft | **0.812 ×** | 0.750 to 0.875 | 0.800 to 0.820 | ≤ 0.85 | yes | "
            "0.960 to 1.04 | ours / frozen 1.50 | ours 8.10, peft 10.0 ms |") in text
    assert "**Bounds met: 1 of 3**" in text and "LoRA, ours: 101.0 KiB, bound ≤ 100: no" in text
    assert "missing: ValueError: a/b" in text and "Machine: processor P." in text
    assert "quick run" not in text and "earlier state" not in text and "was busy" not in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    text = page.page({"lora/2": result(timed, quick=True, others=1.7)}, stale=["lora/2"])
    assert "quick run" in text and "earlier state" in text and "was busy" in text and "1.7 with threads 2" in text
    assert {line.count("|") for line in tables if "a|b" not in line} == {12}


def test_the_committed_page_is_what_its_json_gives():
    kept_file = ROOT / "docs" / "benchmarks.json"
    assert kept_file.exists(), "make bench writes it"
    results = json.loads(kept_file.read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and EARLIER not in line]
    assert lines == [line for line in page.page(results).splitlines() if line]
    assert not any(r["quick"] for r in results.values())
    assert str(ROOT) not in text and str(ROOT) not in kept_file.read_text(encoding="utf-8")


def test_the_machine_is_named_without_its_host():
    import platform

    fields = machine.machine()
    assert {"processor", "cores", "memory", "instruction sets", "torch", "bitsandbytes", "Python"} <= set(fields)
    assert fields["torch"] == torch.__version__.replace("+cu", "+cu") and "GiB" in fields["memory"]
    assert len(platform.node()) < 4 or platform.node() not in json.dumps(fields)
    assert "/" not in json.dumps(fields) and machine.installed("no-such-package") == "not installed"


def test_the_files_that_a_figure_depends_on():
    files = machine.sources(["pefttools.lora", "pefttools.bench.harness", "pefttools.bench.page", "pefttools.none"])
    assert set(files) == {"lora.py", "bench/harness.py"} and machine.unchanged(files)
    assert not machine.unchanged({**files, "lora.py": "0"}) and not machine.unchanged({"none.py": "0"})
    everything = machine.sources()
    assert {"lora.py", "lab/training.py", "bench/memory.py"} <= set(everything) and "bench/page.py" not in everything


def test_groups_name_functions_that_exist():
    from importlib import import_module

    assert set(groups.GROUPS) >= {"quantize", "dequantize", "lora", "dora", "qlora", "step", "memory", "imports",
                                  "one_billion"}
    for group in groups.GROUPS.values():
        module, function = group.place.split(":")
        assert callable(getattr(import_module(f"pefttools.bench.{module}"), function)), group.name


# ── the command ───────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def fake(monkeypatch, tmp_path):
    """The command with groups that take no time: (what ran, names that interrupt the run, the page)."""
    ran, breaks = [], set()

    def apart(name, threads, quick):
        ran.append(f"{name}/{threads}")
        if name in breaks:
            breaks.discard(name)
            raise KeyboardInterrupt
        if name == "dora":
            return None
        row = {"row": name, "value": 0.5, "unit": "×", "sense": "≤", "bound": 1.0}
        return {"rows": [row], "others": 0.0, "seconds": 0.1, "files": machine.sources(["pefttools.lora"])}

    monkeypatch.setattr(command, "run_apart", apart)
    return ran, breaks, tmp_path / "page.md"


def run(target, *args):
    return command.main(["--to", str(target), "--threads", "1,2", *args])


def test_a_stopped_run_goes_on_where_it_was(fake):
    ran, breaks, target = fake
    breaks.add("qlora")
    with pytest.raises(KeyboardInterrupt):
        run(target, "--only", "lora", "qlora", "memory")
    assert ran == ["lora/1", "lora/2", "qlora/1"]
    assert set(json.loads(target.with_suffix(".json").read_text())) == {"lora/1", "lora/2"}
    ran.clear()
    assert run(target, "--only", "lora", "qlora", "memory") == 0
    assert ran == ["qlora/1", "qlora/2", "memory/1"], "what was kept is not measured again"
    assert "Bounds met: 5 of 5" in target.read_text()
    ran.clear()
    run(target, "--only", "lora", "--again")
    assert ran == ["lora/1", "lora/2"]
    ran.clear()
    assert run(target, "--page") == 0 and ran == []


def test_other_code_another_machine_and_quick_runs_are_measured_again(fake, monkeypatch):
    ran, _, target = fake
    run(target, "--only", "lora", "--quick")
    run(target, "--only", "lora", "--quick")
    assert len(ran) == 2
    run(target, "--only", "lora")
    assert len(ran) == 4, "a quick figure does not stand for a full one"
    run(target, "--only", "lora", "--quick")
    assert len(ran) == 4, "a full one stands for a quick one"
    changed = {**machine.sources(["pefttools.lora"]), "lora.py": "another"}
    kept_file = target.with_suffix(".json")
    results = json.loads(kept_file.read_text())
    kept_file.write_text(json.dumps({key: {**value, "files": changed} for key, value in results.items()}))
    run(target, "--page")
    assert EARLIER in target.read_text()
    run(target, "--only", "lora")
    assert len(ran) == 6 and EARLIER not in target.read_text()
    monkeypatch.setattr(command, "machine", lambda: {"processor": "another"})
    run(target, "--only", "lora")
    assert len(ran) == 8


def test_a_group_that_fails_leaves_the_others_their_page(fake, capsys):
    ran, _, target = fake
    assert run(target, "--only", "lora", "dora") == 1
    assert "No result: dora/1, dora/2" in capsys.readouterr().out and "A LoRA layer" in target.read_text()
    run(target, "--only", "dora")
    assert ran.count("dora/1") == 2, "tried again"


def test_quick_stays_away_from_the_page_of_the_docs(fake, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert command.main(["--to", "docs/benchmarks.md", "--only", "imports", "--quick"]) == 0
    assert (tmp_path / "build" / "benchmarks_quick.md").exists() and not (tmp_path / "docs").exists()


def test_wrong_arguments_are_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["--only", "lore"])
    assert "lora" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_for_real_in_processes_of_their_own_and_through_a_kill(tmp_path):
    """Two real groups; the first run is killed after the first result, the second does only the second."""
    target = tmp_path / "page.md"
    arguments = [sys.executable, "-m", "pefttools.bench", "--to", str(target), "--threads", "1", "--quick", "--only",
                 "quantize", "lora"]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               start_new_session=True)
    kept_file = target.with_suffix(".json")
    end = time.monotonic() + 120
    while not kept_file.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    import os
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first = json.loads(kept_file.read_text())
    assert list(first) == ["quantize/1"] and not target.exists()
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[1 of 1] A LoRA layer, 1 thread" in done.stdout
    results = json.loads(kept_file.read_text())
    assert results["quantize/1"] == first["quantize/1"] and set(results) == {"quantize/1", "lora/1"}
    assert {"nf4.py", "nf4.c", "bench/quantization.py"} <= set(first["quantize/1"]["files"])
    assert "lora.py" in results["lora/1"]["files"] and "prefix.py" not in results["lora/1"]["files"]
    assert all(row["rounds"] >= 5 and 0 < row["p10"] <= row["value"] <= row["p90"]
               for r in results.values() for row in r["rows"] if "missing" not in row)
    assert re.search(r"\| 1 \| 2048→512 fp32 \| ours, eager × as fast as bitsandbytes \| \*\*\d", target.read_text())
