"""Chapter 06: its exercises against the library and peft, its figures of other people's papers, its pictures."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from pefttools.adapters import bottleneck_forward, bottleneck_size
from pefttools.grading.check import verdict_on
from pefttools.grading.exercises import ch06_adapters as chapter
from pefttools.lab import adapter_places as places
from pefttools.widgets import adapters as pictures

SOURCE = (Path(__file__).parents[2] / "solutions" / "06_adapters.py").read_text(encoding="utf-8")
BY_NAME = {exercise.name: exercise for exercise in chapter.EXERCISES}


def test_exercises_and_questions_have_what_the_standard_asks():
    assert {"bottleneck", "houlsby-block", "parallel-adapter", "ia3", "hyper-adapter", "switch-tasks"} <= set(BY_NAME)
    for exercise in chapter.EXERCISES:
        assert len(exercise.mistakes) >= 5 and len(exercise.alternatives) >= 2
    assert chapter.EXERCISES[0].minutes <= 5 and chapter.EXERCISES[0].difficulty == 1
    assert 4 <= len(chapter.QUESTIONS) <= 6
    assert len({question.right for question in chapter.QUESTIONS}) >= 3, "the right letter must not be guessable"


KNOWN = {  # what is got wrong most often; a check that lets one of these through is no check
    "bottleneck": {"no way around", "no activation", "activation at the end", "no biases", "cannot learn"},
    "count-adapters": {"biases left out", "one adapter in a layer", "no norm", "IA³ d_model wide", "IA³ as a bottleneck"},
    "houlsby-block": {"after the sum", "after the feed-forward only", "parallel", "own way around taken out", "old h"},
    "parallel-adapter": {"its own way around", "sequential", "reads h", "no scale", "everything scaled"},
    "ia3": {"zero at the start", "one plus l", "merge forgets the bias", "merge along the other axis", "merged twice"},
    "switch-tasks": {"first task for all", "sorted", "None through an adapter", "averaged", "first row of each task"},
    "hyper-adapter": {"no activation", "added", "layer left out", "W_up turned", "task alone"},
}


@pytest.mark.parametrize("name", KNOWN)
def test_common_mistakes_are_known(name):
    assert KNOWN[name] <= set(BY_NAME[name].mistakes)


@pytest.mark.parametrize("seed", range(5))
def test_no_case_hides_a_mistake(seed):
    """Numbers that are easily taken for one another differ in some case, on any seed."""
    assert all(c["b_down"].abs().min() > 0 and c["b_up"].abs().min() > 0 for c in BY_NAME["bottleneck"].cases(seed))
    counts = BY_NAME["count-adapters"].cases(seed)
    assert any(len({c["d_model"], c["kv_width"], c["ff_width"], c["m"], c["layers"]}) == 5 for c in counts)
    assert all(c["s"] not in (0, 1) for c in BY_NAME["parallel-adapter"].cases(seed))
    ia3 = BY_NAME["ia3"].cases(seed)
    assert {(c["at_input"], c["bias"] is None) for c in ia3} >= {(False, False), (True, False), (False, True)}
    switch = BY_NAME["switch-tasks"].cases(seed)
    assert any(None in c["tasks"] and len(set(c["tasks"])) >= 3 for c in switch)
    for c in BY_NAME["hyper-adapter"].cases(seed):             # relu must have something to cut off, in some case
        assert c["G_down"].shape[0] % c["m"] == 0
    hidden = [c["W_1"] @ torch.cat([c["z"], c["l"], c["p"]]) + c["b_1"] for c in BY_NAME["hyper-adapter"].cases(seed)]
    assert any((h < 0).any() and (h > 0).any() for h in hidden)


# ------------------------------------------------------------------------------------------------ the library as student

def test_the_librarys_ia3_passes_as_the_students():
    from pefttools.ia3 import IA3Linear

    class Student(IA3Linear):
        def __init__(self, base, at_input):
            super().__init__(base, at_input)
            self.add("default")
            self.active = {"default": 1.0}

    verdict = verdict_on(BY_NAME["ia3"], Student, 4)
    assert verdict.passed, verdict.text


def test_the_librarys_routing_passes_as_the_students_switch():
    from pefttools.adapter_layers import AfterLayer
    from pefttools.adapters import BottleneckAdapter

    def switch(h, tasks, adapters):
        layer = AfterLayer(nn.Identity())
        for name, own in adapters.items():
            layer.bottleneck[name] = BottleneckAdapter(h.shape[-1], len(own["b_down"]))
            for linear, key in ((layer.bottleneck[name].down, "down"), (layer.bottleneck[name].up, "up")):
                for part, letter in (("weight", "W"), ("bias", "b")):
                    del linear._parameters[part]               # the tensors that are given, gradients and all
                    setattr(linear, part, own[f"{letter}_{key}"])
        layer.rows = list(tasks)
        return layer(h)

    verdict = verdict_on(BY_NAME["switch-tasks"], switch, 4)
    assert verdict.passed, verdict.text


def test_the_librarys_hypernetwork_writes_what_the_exercise_says():
    from pefttools.hyper import HyperAdapters
    from pefttools.hyper_config import HyperConfig

    config = HyperConfig(bottleneck=3, e=4, hidden=5, layer_norm=False)
    frame = HyperAdapters([(nn.Identity(), 0, 0), (nn.Identity(), 1, 1)], 6, config, torch.Generator().manual_seed(0))
    frame.add("task", config, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for p in frame.shared.values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
        s = frame.shared
        for name in ("down_weight_bias", "up_weight_bias"):
            s[name].zero_()
        own = frame.generated(1, {"task": 1.0})
        W_down, W_up = chapter.make_hyper()(frame.tasks["task"], s["layers"][1], s["positions"][1], s["W_1"], s["b_1"], s["W_2"],
                                            s["b_2"], s["down_weight_weight"], s["up_weight_weight"], 3)
    torch.testing.assert_close(own["down.weight"], W_down)
    torch.testing.assert_close(own["up.weight"], W_up)


def test_pefts_ia3_layer_is_the_exercises():
    peft = pytest.importorskip("peft")
    case = BY_NAME["ia3"].cases(3)[0]
    base = nn.Linear(*reversed(case["weight"].shape))
    with torch.no_grad():
        base.weight.copy_(case["weight"])
        base.bias.copy_(case["bias"])
    theirs = peft.get_peft_model(nn.Sequential(base), peft.IA3Config(target_modules=["0"], feedforward_modules=[]))
    with torch.no_grad():
        next(p for p in theirs.parameters() if p.requires_grad).copy_(case["l"][:, None])
        torch.testing.assert_close(theirs(case["x"]), case["l"] * (case["x"] @ case["weight"].T + case["bias"]))


@pytest.mark.parametrize("name, activation", [("DoubleSeqBnConfig", "silu"), ("SeqBnConfig", "relu"), ("ParBnConfig", "relu")])
def test_the_adapters_librarys_own_class_computes_the_same(name, activation, monkeypatch):
    """AdapterHub's `adapters` does not import beside transformers 5; the two files with its bottleneck do, by themselves."""
    import importlib
    import importlib.util
    import sys
    import types

    from pefttools.adapters import bottleneck_update

    spec = importlib.util.find_spec("adapters")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the files of the package `adapters` are not here (pip install --no-deps adapters)")
    root = spec.submodule_search_locations[0]

    def stand_in(module, path=None, **names):
        made = types.ModuleType(module)
        made.__dict__.update(names, **({"__path__": [path]} if path else {}))
        monkeypatch.setitem(sys.modules, module, made)
        return made

    stand_in("adapters", root)
    stand_in("adapters.methods", f"{root}/methods")
    stand_in("adapters.utils", resolve_adapter_config=None)
    stand_in("adapters.context", ForwardContext=object)
    package = stand_in("adapters.configuration", f"{root}/configuration")
    configs = importlib.import_module("adapters.configuration.adapter_config")
    package.BnConfig, package.AdapterFusionConfig = configs.BnConfig, object
    modeling = importlib.import_module("adapters.methods.modeling")
    config = getattr(configs, name)(reduction_factor=4)
    theirs = (modeling.ParallelAdapter if config.is_parallel else modeling.Adapter)("x", 32, 8, config)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape, generator=rng))
        x = torch.randn(3, 5, 32, generator=rng)
        down, up = theirs.adapter_down[0], theirs.adapter_up
        ours = bottleneck_update(x, down.weight, down.bias, up.weight, up.bias, activation, float(config.scaling))
        torch.testing.assert_close(theirs(x, x)[0], ours if config.is_parallel else x + ours, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------ figures of the prose

def test_worked_examples_by_hand():
    h = torch.tensor([1., 2., 3.])
    W_down, b_down = torch.tensor([[1., 0., -1.]]), torch.tensor([3.])
    W_up, b_up = torch.tensor([[2.], [0.], [1.]]), torch.tensor([0., 1., 0.])
    assert bottleneck_forward(h, W_down, b_down, W_up, b_up).tolist() == [3, 3, 4]
    assert bottleneck_forward(h, W_down, 0 * b_down, W_up, b_up).tolist() == [1, 3, 3]
    assert "y = (1, 2, 3) + (2, 1, 1) = (3, 3, 4)" in SOURCE
    W, b, l, x = torch.tensor([[1., 2.], [3., 4.]]), torch.ones(2), torch.tensor([2., 0.]), torch.ones(2)   # noqa: E741
    assert (l * (W @ x + b)).tolist() == [8, 0] == ((l[:, None] * W) @ x + l * b).tolist()


def test_counts_of_the_sources():
    assert bottleneck_size(2048, 64) == 264_256 == 262_144 + 2_112                             # 000
    assert 4 * 4096 * 64 * 32 == 33_554_432 and 64 * bottleneck_size(4096, 64) == 33_820_672   # 001
    model = {"layers": 16, "d_model": 2048, "kv_width": 512, "ff_width": 8192}
    expected = {"houlsby": 8_456_192, "pfeiffer": 4_228_096, "parallel": 4_228_096, "bapna": 4_293_632, "input_output": 528_512,
                "ia3": 147_456}
    for placement, n in expected.items():
        assert chapter.make_counts()(placement, model, 64) == n == chapter.counts_built(placement, model, 64)


@pytest.mark.parametrize("name", ["houlsby", "pfeiffer", "parallel", "bapna", "input and output", "IA³", "norms"])
def test_the_widget_counts_what_the_library_trains(name):
    from pefttools.ia3 import IA3Config
    from pefttools.inject import attach, count_parameters, detach
    from pefttools.lab import load_base
    from pefttools.ln_tuning import LNTuningConfig
    from pefttools.placements import AdapterConfig

    model, _ = load_base("tiny", quiet=True)
    config = {"IA³": IA3Config(), "norms": LNTuningConfig(), "input and output": AdapterConfig("input_output", 7)}.get(name) \
        or AdapterConfig(name, 7)
    attach(model, config)
    shape = pictures.MODELS["the bundled model"]
    assert count_parameters(model)[0] == pictures.facts(name, shape, 7)["trained"]
    detach(model)
    assert count_parameters(model)[1] == shape["total"]
    layers = model.model.layers
    assert sum(p.numel() for n, p in layers.named_parameters() if p.dim() == 2) == pytest.approx(
        2 * 7 * 256 * 6 / pictures.facts("pfeiffer", shape, 7)["extra"])


def test_the_lines_in_pefts_source_are_where_the_chapter_looks_for_them():
    layer = pytest.importorskip("peft.tuners.ia3.layer")
    import inspect

    source = inspect.getsource(layer.Linear.forward)
    marks = re.search(r"marks = \((.*?)\)\nfound", SOURCE, re.S)[1]
    assert re.findall(r'"([^"]+)"', marks) and all(mark in source for mark in re.findall(r'"([^"]+)"', marks))
    table = SOURCE.split("| the code asks | because |")[1].split("**Go and look**")[0]
    for quoted in re.findall(r"^# \| `(.+?)` \|", table, re.MULTILINE):
        assert quoted in source, f"the chapter explains {quoted!r}"
    assert "+ 1e-8" in inspect.getsource(layer.Linear.unmerge)


def test_what_the_prose_says_of_pefts_defaults():
    """ "the paper's for Llama, Mistral and T5 … with OPT queries and keys, and never the values" """
    constants = pytest.importorskip("peft.utils.constants")
    table = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    assert table["llama"] == table["mistral"] == ["k_proj", "v_proj", "down_proj"] and table["t5"] == ["k", "v", "wo"]
    assert table["opt"] == ["q_proj", "k_proj", "fc2"]


# ------------------------------------------------------------------------------------------------ what was run ahead

def test_results_are_there_for_every_way_and_small():
    rows = {row["name"]: row for row in places.table()}
    assert set(rows) == set(places.WAYS)
    assert all(row["seeds"] == len(places.SEEDS) for row in rows.values())
    assert places.RESULTS.stat().st_size < 50_000
    found = places.results()
    for name in places.WAYS:
        rates = [f"{lr:g}" for lr in places.RATES[places.WAYS[name][0]]]
        assert all(str(places.CHOOSE) in found[name][lr] for lr in rates)
    assert places.CHOOSE not in places.SEEDS and len(found["hyper"]) == 3
    assert f"{rows['houlsby']['lr']:g}" == f"{places.RATES['half'][0]:g}", "the halves are trained at Houlsby's own rate"


def test_what_the_prose_says_of_the_results():
    """Sentences that no cell prints, held to the file."""
    new = places.new_task()
    # "a network that never saw sorting already helps with it … 32 numbers add little … an adapter of its own"
    assert new["base"][0] > new["mean embedding"][0] + 0.5
    assert new["mean embedding"][0] > new["embedding trained"][0] > new["plain adapter"][0] + 0.3
    # "At the first rate it makes no difference … At the second the upper half gets better, and the lower half scatters"
    rows = {row["name"]: row for row in places.table()}
    upper, lower = rows["houlsby, upper half"], rows["houlsby, lower half"]
    assert abs(upper["end"] - lower["end"]) < (upper["sd"] ** 2 + lower["sd"] ** 2) ** 0.5
    hot = {name: [run["end"] for seed, run in places.results()[name]["0.03"].items() if int(seed) in places.SEEDS]
           for name in (upper["name"], lower["name"])}
    assert max(hot[upper["name"]]) < min(upper["ends"]) and sum(end > 2 for end in hot[lower["name"]]) == 1


def test_the_learning_rate_is_not_chosen_with_the_seeds_that_are_reported():
    made = {"houlsby": {"0.01": {"100": {"trained": 5, "end": 1.0}, "0": {"trained": 5, "end": 9.0}, "1": {"trained": 5, "end": 7.0}},
                        "0.03": {"100": {"trained": 5, "end": 2.0}, "0": {"trained": 5, "end": 0.1}}}}
    [row] = places.table(made)
    assert (row["lr"], row["end"], row["seeds"], row["trained"]) == (0.01, 8.0, 2, 5)


def test_one_small_run_and_the_model_is_as_it_was():
    from pefttools.lab import encoded, load_base, load_data

    base = load_base("tiny", quiet=True)
    data = load_data("train").select(range(200))
    rows = encoded(data, base.tokenizer)
    before = {name: parameter.clone() for name, parameter in base.model.named_parameters()}
    for name in ("bapna", "IA³"):
        run = places.run(base, rows, load_data("held_out").select(range(4)), name, 1e-2, 0, steps=2, batch=4)
        assert math.isfinite(run["end"]) and len(run["curve"]) == 2
    found = places.meet_a_new_task(base, list(data), list(load_data("held_out").select(range(60))), 0, first=3, then=2)
    assert all(map(math.isfinite, found.values()))
    assert all(torch.equal(parameter, before[name]) for name, parameter in base.model.named_parameters())


# ------------------------------------------------------------------------------------------------ pictures

def test_the_explorer_shows_what_it_says():
    explorer = pictures.block_explorer()
    frame = explorer.frame()
    assert "8,456,192 numbers" in frame["text/html"] and len(frame["image/png"]) > 5_000
    texts = {explorer.alt_text(placement=name) for name in pictures.PLACES}
    assert len(texts) == len(pictures.PLACES)
    assert pictures.facts("IA³", pictures.MODELS["Llama-3.2-1B"], 8)["merges"]
    assert not pictures.facts("houlsby", pictures.MODELS["Llama-3.2-1B"], 8)["merges"]
    with pytest.raises(ValueError, match="placement must be one of houlsby"):
        pictures.block_figure("houlby")
    with pytest.raises(ValueError, match="m must be 1 or more"):
        pictures.block_figure(m=0)


def test_the_explorers_controls_draw_anew():
    pytest.importorskip("ipywidgets")
    from pefttools.widgets.base import Slider, SliderFigure

    explorer = SliderFigure(pictures.block_figure, pictures.block_alt, "Where?", {
        "placement": list(pictures.PLACES), "model": list(pictures.MODELS), "m": Slider(64, 1, 256)})
    *_, placement, model, m, picture = explorer.controls().children
    assert "8,456,192 numbers" in picture.value
    m.value = 32
    assert "4,260,864 numbers" in picture.value                # 32 · (2 · 32 · 2048 + 2048 + 32)
    placement.value, model.value = "IA³", "the bundled model"
    assert "5,760 numbers of the bundled model" in picture.value


@pytest.mark.parametrize("placement", pictures.PLACES)
def test_the_diagram_has_as_many_orange_boxes_as_the_placement_has_parts(placement):
    from matplotlib.colors import to_hex
    from matplotlib.patches import Rectangle

    figure = pictures.block_figure(placement, "the bundled model", 8)
    orange = [p for p in figure.axes[0].patches if isinstance(p, Rectangle) and to_hex(p.get_facecolor()).upper() == pictures.TRAINED]
    assert len(orange) == {"houlsby": 2, "input and output": 2, "IA³": 3, "norms": 2}.get(placement, 1)
    assert all(p.get_hatch() is None for p in orange)


def test_figures_draw(tmp_path):
    rows = [{"name": "houlsby", "trained": 100, "ends": [1.0, 1.1], "end": 1.05, "sd": 0.07},
            {"name": "IA³", "trained": 10, "ends": [1.4], "end": 1.4, "sd": 0.0}]
    one = {"base again (A/A)": (1.0, 0.99, 1.01), "Houlsby": (1.2, 1.1, 1.3)}
    figures = [pictures.bottleneck_picture(), pictures.places_figure(rows), pictures.ablation_figure([[0.1, 0.3], [None, -0.01]]),
               pictures.latency_lines({"1 × 1": one, "8 × 64": one}), *(pictures.block_figure(name) for name in pictures.PLACES)]
    for number, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 5_000
