"""Chapter 09: what its exercises judge, the figures of its prose, its pictures and its page."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pefttools.grading.check import verdict_on
from pefttools.grading.exercises import ch09_vram as chapter
from pefttools.grading.judge import judge
from pefttools.grading.probe import Outcome, probe_all
from pefttools.widgets import vram, vram_page
from pefttools.widgets import vram_pictures as pictures
from pefttools.widgets.base import render

DESIGN = chapter.DESIGN
LLAMA_1B = {"h": 2048, "q": 2048, "k": 512, "m": 8192}


# ------------------------------------------------------------------------------------------------ the exercises

@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.2-3b", "llama-2-13b", "llama-3.1-70b"])
def test_the_sizes_that_a_design_is_given_are_the_models(name):
    """Against the model itself, built without memory, and LoRA as the library counts it."""
    from pefttools.vram import estimate
    from pefttools.vram.presets import config_of, meta_model

    facts = chapter.facts_of(name)
    model = meta_model(config_of(name))
    linear = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and p.dim() == 2)
    assert (facts["linear"], facts["other"]) == (linear, sum(p.numel() for p in model.parameters()) - linear)
    assert 3 * facts["lora"] == estimate(name, "lora", r=3, targets="all-linear").trainable


@pytest.mark.parametrize("kind", ["TIGHT", "MIDDLE", "WITHOUT_BFLOAT16", "QUANTIZED", "LARGE", "ROOMY"])
def test_every_case_can_be_solved_and_the_closed_form_is_near_the_formula(kind):
    """For each combination that may be drawn: both find a design that passes; their peaks differ by less than 9 %."""
    for name, gpu, seq in getattr(chapter, kind):
        model, card = chapter.facts_of(name), chapter.gpu_of(gpu)
        job = {"seq": seq, "examples": 16, "rank": 16, "tasks": 3, "storage": 3 * 17 * model["lora"] * 2}
        case = {"model": model, "gpu": card, "job": job}
        for work in (chapter.design_reference, chapter.design_in_closed_form):
            design = chapter.design_probe(work, case)
            assert chapter.design_reading(design, case) == {
                "examples in one optimizer step": 16, "this GPU computes in the dtype": True,
                "rank is at least the one asked for": True, "all adapters fit into the storage": True,
                "cards that the peak would fill": 1, "pays for savings it does not need": "no"}, (name, gpu, design)
            ratio = chapter.EVERYTHING(model, job, design) / chapter.peak_of(case, **design)
            assert 0.91 < ratio < 1.09, (name, gpu, design, ratio)


def test_alternatives_pass_whatever_is_drawn():
    for seed in range(100, 112):
        for name, work in DESIGN.alternatives.items():
            verdict = verdict_on(DESIGN, work, seed)
            assert verdict.passed, f"{seed}, {name}: {verdict.text}"


@pytest.mark.parametrize(("change", "said"), [
    ({"batch": 0}, "batch is 0"), ({"batch": True}, "batch is True"), ({"r": 2.0}, "r is 2.0"),
    ({"quantize": 1}, "quantize is 1"),
    ({"dtype": "int4"}, "dtype is 'int4'"), ({"accumulate": 10**9}, "accumulate is"),
    ({"dtype": None}, "dtype is None"),
])
def test_a_design_with_a_senseless_setting_is_told_which(change, said):
    verdict = verdict_on(DESIGN, lambda model, gpu, job: chapter.design_reference(model, gpu, job) | change, 4)
    assert verdict.points == 0 and said in verdict.message, verdict.message


@pytest.mark.parametrize(("work", "said"), [
    (lambda model, gpu, job: None, "did nothing fit"),
    (lambda model, gpu, job: {"batch": 1}, "says nothing about dtype"),
])
def test_a_design_that_is_none_is_told_what_is_wanted(work, said):
    verdict = verdict_on(DESIGN, work, 4)
    assert verdict.points == 0 and said in verdict.message


def test_a_stated_effect_is_not_believed():
    """The student's process sends six settings; whatever else it sends counts for nothing."""
    cases = DESIGN.cases(9)
    right = probe_all(DESIGN, DESIGN.reference, cases)
    assert judge(DESIGN, right, cases, 9).passed
    forged = [Outcome({**outcome.data, "batch": 2 * case["job"]["examples"], "cards that the peak would fill": 1})
              for outcome, case in zip(right, cases)]
    assert not judge(DESIGN, forged, cases, 9).passed


def test_no_single_design_fits_all_cases():
    """One design for everything, of all that there are with these values, never passes: the cases pull apart."""
    cases = DESIGN.cases(3)
    for quantize in (False, True):
        for checkpointing in (False, True):
            for batch in (1, 2, 4, 8, 16):
                design = {"dtype": "float16", "quantize": quantize, "checkpointing": checkpointing, "batch": batch,
                          "accumulate": 16 // batch, "r": 16}
                assert not judge(DESIGN, [Outcome(dict(design))] * len(cases), cases, 3).passed


def test_fits_turns_round_where_gb_is_taken_for_gib():
    wrong = chapter.FITS.mistakes["GiB for GB"][0]
    turned = [case for case in chapter.FITS.cases(5) if chapter.fits_reference(**case)[0] != wrong(**case)[0]]
    assert turned


# ------------------------------------------------------------------------------------------------ figures of the prose

def test_kept_by_hand():
    """106 KiB for full fine-tuning at the 1B shapes; the picture's rows and the exercise say the same."""
    assert pictures.kept_bytes_of(LLAMA_1B) == 108_544 == chapter.activation_reference(LLAMA_1B, 1, 1, "all", False)
    with_lora = chapter.activation_reference(LLAMA_1B, 1, 1, "lora", False)
    assert pictures.kept_bytes_of(LLAMA_1B, ("pass", "linear")) == with_lora
    assert pictures.kept_bytes_of(LLAMA_1B, ("pass",)) == chapter.activation_reference(LLAMA_1B, 1, 1, "none", False)


@pytest.mark.parametrize(("trained", "measured"), [("all", "full fine-tuning"), ("lora", "LoRA, ours")])
def test_kept_is_what_a_real_layer_keeps(trained, measured):
    """Up to 4 bytes a head, 4 a norm, and LoRA's 4·r for each of seven layers."""
    from pefttools.bench.layer_memory import METHODS, kib_per_token_and_layer

    sizes = {"h": 256, "q": 256, "k": 64, "m": 1024}
    kept = 1024 * kib_per_token_and_layer(METHODS[measured], hidden_size=256, intermediate_size=1024, head_dim=8)
    more = 4 * 32 + 2 * 4 + (4 * 16 * 7 if trained == "lora" else 0)
    assert kept == chapter.activation_reference(sizes, 1, 1, trained, False) + more


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("holds", [True, False])
def test_logits_are_what_transformers_allocates(dtype, holds, small_model):
    from pefttools.bench.memory import Trace

    model = small_model("llama", dtype=str(dtype).removeprefix("torch.")).requires_grad_(False)
    vocab, tokens = model.config.vocab_size, 64
    hidden = torch.zeros(1, tokens, 32, dtype=dtype).requires_grad_()
    with Trace() as trace:
        logits = model.lm_head(hidden)
        loss = model.loss_function(logits=logits, labels=torch.zeros(1, tokens, dtype=torch.long), vocab_size=vocab)
        if not holds:
            del logits
        trace.peak = trace.live
        loss.backward()
    wanted = chapter.logits_reference(vocab, tokens, dtype.itemsize, holds)
    assert wanted <= trace.peak <= wanted + 16 * tokens * 32            # and gradients as wide as the model


def test_a_simulation_is_what_a_real_step_on_this_machine_allocates():
    """The chapter's promise: a real step of the bundled model, on the CPU, within a tenth of a percent."""
    from pefttools import inject, lab
    from pefttools.bench.memory import Trace
    from pefttools.lora import LoRAConfig
    from pefttools.vram import simulate

    model = lab.load_base("tiny").model.to(torch.bfloat16)
    inject.attach(model, LoRAConfig(r=16, target_modules="all-linear")).train()
    adapter = [p for p in model.parameters() if p.requires_grad]
    optimizer, ids = torch.optim.AdamW(adapter, lr=1e-4), torch.arange(2 * 64).reshape(2, 64)

    def step():
        optimizer.zero_grad(set_to_none=True)
        out = model(input_ids=ids, labels=ids, use_cache=False)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter, 1.0)
        optimizer.step()

    step()
    optimizer.zero_grad(set_to_none=True)
    with Trace() as trace:
        step()
    terms = simulate("tiny", "lora", 2, 64, r=16, targets="all-linear").terms
    predicted = sum(n for term, n in terms.items() if term not in ("weights", "adapter", "optimizer", "temporary"))
    assert abs(trace.peak / predicted - 1) < 1e-3


# ------------------------------------------------------------------------------------------------ pictures

def test_the_explorer_draws_its_first_frame_and_follows(capsys):
    figure = vram.explorer()
    assert "[figure] Stacked bars" in capsys.readouterr().out
    first, more = (figure.frame(**values)["text/plain"] for values in ({}, {"batch": 8, "checkpointing": True}))
    assert first != more and "with checkpointing" in more
    for method in vram.METHODS:
        assert "GiB" in figure.frame(method=method)["text/plain"]


def test_a_t4_is_judged_with_its_own_kernels():
    """For grouped queries torch has no fused attention there: what an L4 takes easily does not fit."""
    values = ("llama-3.2-1b", "lora", 1, 3072, 16, False, "adamw", "sdpa")
    assert vram.estimated(*values, "t4").terms["activations"] > 2 * vram.estimated(*values, "l4").terms["activations"]
    assert "T4" not in vram._fitting(*values) and "L4" in vram._fitting(*values)


def test_timelines_and_their_phases():
    from pefttools.vram import estimate, simulate

    memory = simulate("tiny", "lora", 2, 64)
    names = [name for name, _, _ in vram.phases_of(memory)]
    assert [name for name in names if name != "before"] == ["forward", "backward", "optimizer"]
    cuts = vram.phases_of(memory)
    assert cuts[0][1] == 0 and cuts[-1][2] == len(memory.timeline) and all(a[2] == b[1] for a, b in zip(cuts, cuts[1:]))
    viewer = vram.timeline_viewer({"a": memory, "b": memory})
    assert "peaks at" in viewer.frame(configuration="b")["text/plain"]
    with pytest.raises(ValueError, match="no timeline"):
        vram.timeline_figure(type(memory)(**{**vars(estimate("tiny")), "timeline": ()}))


@pytest.mark.parametrize("figure", [
    lambda: pictures.card_picture({"T4": 16 * 2**30}, {"T4": 15 * 2**30}, {"T4": 2**29}),
    pictures.block_picture,
    lambda: pictures.trained_picture({"a": {"weight": 4, "gradient": 4, "moments": 8}}),
    lambda: pictures.layer_picture(LLAMA_1B, "x"),
    lambda: pictures.logits_picture(2048, 128_256, 16),
    lambda: pictures.growth_figure([1, 2], {"x": [1, 2]}, {"T4": 1.5}, "tokens"),
    lambda: pictures.error_figure({"x": [1.0, -3.0], "y": [-95.0, 1400.0], "z": [0.5]}),
    lambda: pictures.fit_table(["a"], ["b", "c"], {("a", "b"): 1, ("a", "c"): 3}, {("a", "b"): 2, ("a", "c"): 2}),
], ids=["card", "block", "trained", "layer", "logits", "growth", "errors", "table"])
def test_pictures_draw(figure):
    assert render(figure(), "a picture")["image/png"]


# ------------------------------------------------------------------------------------------------ the page

def test_the_page_is_a_notebook_of_the_widgets(tmp_path):
    import nbformat

    path = vram_page.write(tmp_path / "page.ipynb")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert "vram.explorer()" in code[0] and "vram.simulated()" in code[1]
    for cell in code:
        compile(cell, "page", "exec")
    with pytest.raises(ValueError, match="ends in .ipynb"):
        vram_page.write(tmp_path / "page.html")


def test_without_voila_the_page_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(vram_page.importlib.util, "find_spec", lambda name: None)
    assert vram_page.main(["--no-browser"]) == 1
    assert "pip install voila" in capsys.readouterr().err


def test_the_page_is_given_to_voila(monkeypatch):
    called = []
    monkeypatch.setattr(vram_page.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(vram_page.subprocess, "call", lambda command: called.append(command) or 0)
    assert vram_page.main(["--no-browser", "--port", "9001", "--Voila.ip=0.0.0.0"]) == 0
    (command,) = called
    assert command[:3] == [sys.executable, "-m", "voila"] and command[3].endswith("vram.ipynb")
    assert {"--port=9001", "--no-browser", "--Voila.ip=0.0.0.0"} <= set(command)


def test_the_page_can_be_written_from_the_command_line(tmp_path):
    done = subprocess.run([sys.executable, "-m", "pefttools.widgets.vram_page", "--write", str(tmp_path / "p.ipynb")],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and (tmp_path / "p.ipynb").exists() and "voila" in done.stdout


def test_drawing_needs_no_torch_to_be_imported():
    code = ("import sys, pefttools.widgets.vram, pefttools.widgets.vram_pictures; "
            "print([n for n in ('torch', 'matplotlib', 'ipywidgets', 'transformers') if n in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
