"""The planner against an exhaustive search, its bisection against a scan, its sentences against what they claim."""
from __future__ import annotations

import itertools
import random

import pytest

from pefttools.vram.job import Job
from pefttools.vram.largest import edge, largest
from pefttools.vram.lengths import lengths_of, share_cut, worst_batch
from pefttools.vram.memory import TERMS, Memory
from pefttools.vram.planner import CRITERIA, OBJECTIVES, option_of, plan
from pefttools.vram.reasons import changes, distance, in_steps, nearest, too_much
from pefttools.vram.serving import fits_by, serving
from pefttools.vram.space import Space, divisors
from pefttools.vram.verdict import Budget, Judge

GiB = 2**30
MODEL = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}
PARAMETERS = {"small": 1_000_000_000, "middle": 3_000_000_000, "large": 8_000_000_000}


def truth(job: Job) -> Memory:
    """A simulator's answer in a world of simple sums: every dimension of the space moves it."""
    n = PARAMETERS.get(job.model if isinstance(job.model, str) else "small", 10**9)
    trained = {"full": n, "prompt": job.length * 64}.get(job.method, job.r * 2_000_000)
    terms = dict.fromkeys(TERMS, 0)
    terms["weights"] = int(n * (0.52 if job.quantization else 2)) // job.gpus
    terms["constants"] = int(n * 0.016) if job.quantization else 0
    terms["adapter"] = 0 if job.method == "full" else 4 * trained
    terms["gradients"] = (2 if job.method == "full" else 4) * trained // job.gpus
    terms["optimizer"] = {"adamw": 8, "adamw_8bit": 2}.get(job.optimizer, 0) * trained // job.gpus
    tokens = job.batch * job.seq
    terms["activations"] = tokens * (100_000 if job.checkpointing else 900_000) + (
        200_000 * tokens * ("dora" in job.method)
    )
    terms["logits"] = tokens * 1_000_000
    total = sum(terms.values())
    return Memory(job, "simulator", terms, "loss: cross entropy", total + total // 50, GiB // 2, trained,
                  n + (0 if job.method == "full" else trained))


def formula(error: float = 0.08):
    """A formula that misses the truth by up to `error`: differently for every job, the same each time."""
    def estimate(job: Job) -> Memory:
        true = truth(job)
        factor = 1 + error * random.Random(repr(job)).uniform(-1, 1)
        terms = {
            **true.terms,
            "activations": true.terms["activations"] + int(true.total * (factor - 1)),
        }  # weights are exact
        return Memory(job, "formula", terms, true.peak_at, int(true.reserved * factor), true.context, true.trainable,
                      true.parameters)
    return estimate


def judge(usable: int = 24 * GiB, error: float = 0.08, **more) -> Judge:
    return Judge(Budget("the test's GPU", usable, None), estimate=formula(error), simulate=truth, **more)


@pytest.fixture(autouse=True)
def shapes_without_transformers(monkeypatch):
    """The names of PARAMETERS are no presets: costs and bounds take MODEL's shapes."""
    from pefttools.vram import plain_config, presets

    for module, name in ((presets, "config_of"), (plain_config, "plain_config")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda model, real=real: real(MODEL if model in list(PARAMETERS) else model))


# ------------------------------------------------------------------------------------------------ the search

SMALL = {"methods": ("full", "lora", "qlora", "dora"), "effective_batch": 8, "r": (8, 64), "gpus": (1, 2),
         "optimizers": ("adamw", "adamw_8bit")}


@pytest.mark.parametrize("objective", [*OBJECTIVES, ("needs", "gpus"), ("passes",)], ids=str)
@pytest.mark.parametrize("usable", [3, 6, 9, 14, 40])
def test_the_planner_finds_what_an_exhaustive_search_finds(objective, usable):
    found = plan("small", None, seq=1024, objective=objective, decide="all", judge=judge(usable * GiB), **SMALL)
    everything = judge(usable * GiB, error=0)
    options = [option_of(everything, job, 1, everything.by_simulator(job)) for job in
               Space(**SMALL).jobs("small", 1024, gpu=None, dtype="bfloat16")]
    fitting = sorted((o for o in options if o.fits), key=lambda o: o.key(found.order))
    assert {o.job for o in found.fitting} == {o.job for o in fitting}
    assert not fitting or [o.job.method for o in found.fitting[:1]] == [fitting[0].job.method]
    order = [name for name in found.order if name != "needs"]
    if found.order[-1] == "needs":              # exact keys throughout: the whole order is the exhaustive one
        assert [o.key(order) for o in found.fitting] == [o.key(order) for o in fitting]
    if found.best:
        assert truth(found.best.job).device == truth(fitting[0].job).device
        assert found.best.key(order) == fitting[0].key(order)


@pytest.mark.parametrize("usable", [3, 6, 9, 14, 40])
def test_simulating_less_gives_the_same_best_of_every_method(usable):
    for objective in OBJECTIVES:
        less = plan("small", None, seq=1024, objective=objective, judge=judge(usable * GiB), **SMALL)
        all_ = plan("small", None, seq=1024, objective=objective, decide="all", judge=judge(usable * GiB), **SMALL)
        assert {m: o.job for m, o in less.by_method.items()} == {m: o.job for m, o in all_.by_method.items()}
        assert less.judge.simulations <= all_.judge.simulations < len(all_.options)


def test_who_decided_is_said_and_true():
    found = plan("small", None, seq=1024, judge=judge(9 * GiB), **SMALL)
    assert {o.by for o in found.options} == {"formula", "simulator"}
    for option in found.options:
        true = truth(option.job).device <= 9 * GiB
        assert option.fits is None or option.fits == true
        assert option.verdict.low <= truth(option.job).device <= option.verdict.high
        if option.fits is None:
            assert option.by == "formula" and option.verdict.low <= 9 * GiB < option.verdict.high
            assert "not simulated" in found.why(option)
    assert found.best.by == "simulator"          # verify=True
    sure = plan("small", None, seq=64, judge=judge(80 * GiB), verify=False, **{**SMALL, "methods": ("lora", "full")})
    assert sure.judge.simulations == 0 and all(o.fits and o.by == "formula" for o in sure.options)


def test_a_formula_outside_of_its_bound_is_caught_at_the_best():
    def lies(job):
        return formula(0)(job) if job.method != "lora" else truth(job.but(batch=1, checkpointing=True))

    liar = Judge(Budget("x", 9 * GiB), estimate=lies, simulate=truth)
    found = plan("small", None, seq=1024, judge=liar, **SMALL)
    assert truth(found.best.job).device <= 9 * GiB


def test_the_criteria_mean_what_they_say():
    found = plan("small", None, seq=512, judge=judge(80 * GiB), **SMALL)
    best = found.best.job
    assert (best.method, best.checkpointing, best.optimizer, best.gpus, best.accumulate) == (
        "lora",
        False,
        "adamw",
        1,
        1,
    )
    assert found.by_method["qlora"].criterion("approximations") == 1
    by = {
        (o.job.method, o.job.checkpointing, o.job.optimizer, o.job.batch, o.job.gpus, o.job.r): o for o in found.options
    }
    plain, again = by["full", False, "adamw", 8, 1, 8], by["full", True, "adamw", 8, 1, 8]
    assert again.cost.flops - plain.cost.flops == again.cost.recomputed > 0
    assert "runs the layers twice" in found.why(again) or "16" in found.why(again) or "bfloat16" in found.why(again)
    assert "its best" not in found.why(found.best) and "the best" in found.why(found.best)
    for name in CRITERIA:
        assert isinstance(found.best.criterion(name), int | float)


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"seq": None}, "seq is missing"),
        ({"methods": ("lorra",)}, "did you mean 'lora'"),
        ({"methods": ()}, "methods is empty"),
        ({"effective_batch": 0}, "at least 1"),
        ({"effective_batch": 6, "gpus": (1, 4)}, "such as 8"),
        ({"objective": "speedy"}, "objective='speedy'"),
        ({"objective": ("flop",)}, "did you mean 'flops'"),
        ({"decide": "some"}, "decide='some'"),
        ({"tasks": 0}, "tasks=0"),
        ({"lengths": []}, "lengths is empty"),
        ({"lengths": [5, 6]}, "there are 2 rows"),
        ({"targets": "all", "colour": 1}, "colour"),
        ({"bound": 1.5}, "bound=1.5"),
    ],
    ids=lambda x: x if isinstance(x, str) else next(iter(x)),
)
def test_wrong_input_is_named(wrong, said):
    arguments = {"seq": 128, "methods": ("lora",), "effective_batch": 4, **wrong}
    bound = {"bound": arguments.pop("bound")} if "bound" in arguments else {}
    with pytest.raises((ValueError, TypeError), match=said.replace("(", r"\(")):
        plan("small", None, judge=judge(**bound), **arguments)


def test_what_makes_no_sense_is_refused_with_its_reason():
    def estimate(job):
        if job.r > 64:
            raise ValueError(f"r={job.r} is above a dimension, 64")
        return truth(job)

    found = plan(
        "small",
        None,
        seq=64,
        r=(8, 128),
        methods=("lora",),
        judge=Judge(Budget("x", 80 * GiB), estimate=estimate, simulate=truth),
    )
    assert {job.r for job, _ in found.refused} == {128} and "above a dimension" in found.refused[0][1]
    assert {o.job.r for o in found.options} == {8} and "Refused" in str(found)
    with pytest.raises(ValueError, match="no configuration makes sense.*above a dimension"):
        plan(
            "small",
            None,
            seq=64,
            r=128,
            methods=("lora",),
            judge=Judge(Budget("x", GiB), estimate=estimate, simulate=truth),
        )


# ------------------------------------------------------------------------------------------------ the largest

@pytest.mark.parametrize("usable", [3.0, 4.5, 7.25, 11.0, 23.9])
@pytest.mark.parametrize("what, fields", [("batch", {"seq": 512}), ("seq", {"batch": 2}), ("r", {"batch": 1}),
                                          ("seq", {"batch": 2, "multiple": 64})], ids=["batch", "seq", "r", "seq64"])
def test_the_largest_is_the_largest(usable, what, fields):
    its = judge(int(usable * GiB))
    found = largest(what, "small", judge=its, method="lora", **fields)
    multiple = fields.pop("multiple", 1)
    start = Job("small", "lora", **fields)

    def fits(n):
        return truth(start.but(**{what: n})).device <= its.budget.usable

    if found.value is None:
        assert not fits(multiple)
    else:
        assert fits(found.value) and found.value % multiple == 0 and found.fits.by == "simulator"
        if found.above:
            assert found.above == found.value + multiple and not fits(found.above) and found.too_much.by == "simulator"
        else:
            assert what in ("seq", "r") and found.limit
    assert its.simulations <= 16, "the formula's bound makes the search short"


def test_edge_survives_a_formula_that_is_wrong():
    rng = random.Random(0)
    for _ in range(300):
        last = rng.randint(1, 200)
        true, believed, width = rng.randint(0, last + 20), rng.randint(0, last + 20), rng.randint(0, 10)
        asked = []

        def exact(n):
            assert 1 <= n <= last
            asked.append(n)
            return n <= true

        def guess(n):
            assert 1 <= n <= last
            return True if n <= believed - width else False if n > believed + width else None

        assert edge(guess, exact, last) == min(true, last)
        assert len(set(asked)) < 40
        found = min(true, last)
        assert (found in asked or not found) and (found + 1 in asked or found == last)


def test_the_largest_model():
    its = judge(5 * GiB)
    found = largest("model", gpu=None, judge=its, models=PARAMETERS, method="qlora", seq=512)
    assert found.value == "middle" and found.above == "large" and "large needs" in found.limit
    assert largest("model", judge=judge(GiB), models=PARAMETERS, method="full").value is None
    assert largest("model", judge=judge(800 * GiB), models=PARAMETERS).value == "large"
    with pytest.raises(ValueError, match="did you mean 'batch'"):
        largest("batsch", "small", judge=its)
    with pytest.raises(ValueError, match="of which model"):
        largest("batch", judge=its)
    with pytest.raises(ValueError, match="multiple=0"):
        largest("batch", "small", judge=its, multiple=0)


# ------------------------------------------------------------------------------------------------ reasons

@pytest.mark.parametrize("job, usable, term, words", [
    (Job("small", "lora", 8, 2048, checkpointing=True), 12, "logits", "the logits of 8 × 2048 tokens"),
    (Job("small", "lora", 4, 2048), 6, "logits", "logits"),
    (Job("small", "dora", 4, 2048), 10, "activations", "what the layers keep of 4 × 2048 tokens"),
    (Job("small", "full", 1, 64), 10, "optimizer", "adamw's state of 1,000,000,000 trained parameters"),
    (Job("large", "lora", 1, 64), 12, "weights", "the weights of the model"),
], ids=["logits", "logits-unchecked", "activations", "optimizer", "weights"])
def test_the_reason_names_the_term_that_is_too_much(job, usable, term, words):
    verdict = judge(usable * GiB).by_simulator(job)
    assert verdict.fits is False
    said = too_much(verdict, Budget("T4", usable * GiB))
    size = verdict.memory.terms[term] + (verdict.memory.terms["constants"] if term == "weights" else 0)
    assert words in said and f"{size / GiB:.1f} GiB" in said and f"T4 has {usable}.0 GiB usable" in said
    assert f"needs {truth(job).device / GiB:.1f} GiB" in said


def test_the_proposed_change_is_the_smallest_that_fits():
    its = judge(12 * GiB, error=0)
    job = Job("small", "lora", 8, 2048, checkpointing=True)
    found = nearest(job, its)
    assert found.fits and in_steps(job, found.job) == ["halve the batch (4 rows, 2 passes a step)"]
    for usable in (3, 4, 6, 9):
        its = judge(usable * GiB, error=0)
        found = nearest(job, its)
        if found is None:
            continue
        assert truth(found.job).device <= usable * GiB and found.job.batch * found.job.accumulate == 8
        everything = [
            dict(item for c in combo for item in c.items())
            for n in (1, 2, 3)
            for combo in itertools.combinations([c for c in changes(job) if "gpus" not in c], n)
            if len({k for c in combo for k in c}) == sum(map(len, combo))
        ]
        fitting = [other for fields in everything if truth(other := job.but(**fields)).device <= usable * GiB]
        assert distance(job, found.job) == min(distance(job, other) for other in fitting)
    assert nearest(Job("large", "full", 8, 2048), judge(GiB)) is None


def test_every_row_of_a_plan_has_a_sentence():
    found = plan("small", None, seq=1024, judge=judge(9 * GiB), **SMALL)
    for option in found.options:
        said = found.why(option)
        assert said and "None" not in said and "  " not in said
        if option.fits is False:
            assert "needs" in said and ("that needs" in said or "Nothing within" in said)
    text = str(found)
    assert "Best of each method" in text and "✓" in text and "✗" in text and "not computed" in text
    data = found.to_dict()
    assert len(data["options"]) == len(found.options) and data["usable_bytes"] == 9 * GiB
    nothing = plan("large", None, seq=4096, methods=("full",), judge=judge(GiB))
    assert nothing.best is None and "Nothing fits" in str(nothing) and nothing.by_method == {}


# ------------------------------------------------------------------------------------------------ tasks, lengths

def test_serving_counts_bytes():
    job = Job("small", "lora")
    memory = truth(job)
    adapters, one, copies = sorted(serving(job, memory, 20), key=lambda way: (way.disk, way.gpu))
    assert adapters.gpu == adapters.disk == 2 * 10**9 + 20 * 4 * memory.trainable and adapters.switch == 0
    assert copies.gpu == copies.disk == 20 * 2 * 10**9 and copies.switch == 0
    assert (one.gpu, one.disk, one.switch) == (2 * 10**9, 40 * 10**9, 2 * 10**9)
    assert fits_by((adapters, one, copies), 80 * 10**9) == adapters
    full = serving(Job("small", "full"), truth(Job("small", "full")), 20)
    assert {way.way for way in full} == {"a copy for each task", "one copy at a time"}
    assert (
        fits_by(full, 24 * 10**9).way == "one copy at a time"
        and fits_by(full, 80 * 10**9).way == "a copy for each task"
    )
    assert {way.way for way in serving(Job("small", "prefix"), memory, 3)} == {"adapters on one base"}
    quantized = serving(Job("small", "qlora"), truth(Job("small", "qlora")), 2)
    assert quantized[0].gpu < 10**9 and quantized[-1].gpu == 4 * 10**9, "merged weights are 16-bit ones"
    with pytest.raises(ValueError, match="tasks=0"):
        serving(job, memory, 0)


def test_many_tasks_can_turn_the_order():
    its = {"seq": 256, "objective": "serving", "methods": ("full", "lora", "qlora")}
    assert plan("small", None, tasks=50, judge=judge(80 * GiB), **its).best.job.method == "qlora"
    found = plan("small", None, tasks=50, judge=judge(80 * GiB), **its)
    assert "To serve 50 tasks" in str(found)


def test_the_longest_row_counts():
    known = lengths_of([90, 400, 512, 2048, 3000], max_length=2048)
    assert (known.rows, known.seq, known.shortest, known.p50, known.p99, known.padded) == (5, 2048, 90, 512, 2048, True)
    job = worst_batch(Job("small", "lora", batch=2), [90, 400, 512, 2048])
    assert (job.seq, job.batch, job.padded) == (2048, 2, True)
    assert worst_batch(Job("small", "lora", batch=8), [7, 7, 7], multiple=8).but(batch=1) == Job(
        "small", seq=8, padded=True
    )
    assert (
        not worst_batch(Job("small", "lora", batch=1), [5, 9]).padded
        and not worst_batch(Job("small", batch=2), [9, 9]).padded
    )
    assert share_cut([1, 2, 3, 4], 2) == 0.5
    for wrong in ([0], [1.5], [True]):
        with pytest.raises(ValueError, match="lengths holds"):
            lengths_of(wrong)
    found = plan("small", None, lengths=[100, 900] * 8, methods=("lora",), judge=judge(80 * GiB))
    assert all(o.job.seq == 900 and o.job.padded == (o.job.batch > 1) for o in found.options)


def test_budgets():
    assert Budget.of("24GiB").usable == 24 * GiB and Budget.of(10**9).usable == 10**9
    t4 = Budget.of("t4")
    assert t4.usable < 15 * GiB and not t4.bf16 and t4.gpu == "t4"
    assert Budget.of("RTX 4090").gpu == "rtx-4090" and Budget.of(t4) is t4
    for wrong, said in (("t5", "t4"), ("24G", "24 GB or 24 GiB"), (0, "positive"), ("4080", "There are")):
        with pytest.raises(ValueError, match=said):
            Budget.of(wrong)


def test_spaces():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    jobs = list(Space(methods=("lora", "full"), effective_batch=8, r=(4, 8), gpus=(1, 4)).jobs("small", 32))
    assert len(jobs) == len(set(map(repr, jobs))) and all(j.batch * j.accumulate * j.gpus == 8 for j in jobs)
    assert {j.r for j in jobs if j.method == "full"} == {4}


@pytest.mark.parametrize(
    "fields", [{"gpus": 2}, {"model": "falcon-7b"}, {"model": "phi-2"}], ids=lambda f: "-".join(map(str, f.values()))
)
def test_where_the_formula_ends_the_simulator_is_asked(fields):
    """The formula says so by naming simulate(): `beyond_formula` reads that."""
    from pefttools.vram.formula import estimate
    from pefttools.vram.verdict import beyond_formula

    job = Job(**{"model": "llama-3.2-1b", **fields})
    with pytest.raises(ValueError) as told:
        estimate(job)
    assert beyond_formula(told.value)
    asked = []

    def simulate(job):
        asked.append(job)
        return truth(job)

    its = Judge(Budget("x", 24 * GiB), simulate=simulate)
    unknown = its.by_formula(job)
    assert (unknown.fits, unknown.memory, unknown.low) == (None, None, 0) and not asked
    assert its(job).by == "simulator" and asked == [job]
    with pytest.raises(ValueError, match="r=") as told:
        estimate(Job("llama-3.2-1b", r=10**6))
    assert not beyond_formula(told.value)


def test_planning_over_gpus_that_only_the_simulator_knows():
    def estimate(job):
        if job.gpus > 1:
            raise ValueError("the formula is for one GPU; simulate() follows FSDP")
        return formula()(job)

    space = {"methods": ("full",), "effective_batch": 8, "gpus": (1, 2, 4)}
    for usable in (4, 8, 12, 40):
        its = Judge(Budget("x", usable * GiB), estimate=estimate, simulate=truth)
        found = plan("small", None, seq=512, judge=its, **space)
        all_ = plan("small", None, seq=512, judge=judge(usable * GiB), decide="all", **space)
        assert (found.best and found.best.job) == (all_.best and all_.best.job)
        assert [found.why(option) for option in found.options] and str(found)


def test_a_preset_without_transformers_has_the_same_shape():
    from pefttools.vram.plain_config import plain_config
    from pefttools.vram.preset_data import PRESETS
    from pefttools.vram.presets import config_of
    from pefttools.vram.shape import FAMILIES, shape_of

    known = [name for name, (fields, *_) in PRESETS.items() if fields["model_type"] in FAMILIES]
    assert len(known) > 25
    for name in known:
        assert shape_of(plain_config(name)) == shape_of(config_of(name)), name
    for wrong in ("llama-9", "no/such.json"):
        with pytest.raises(ValueError):
            plain_config(wrong)


def test_with_the_real_formula_and_simulator_the_best_is_the_exhaustive_best():
    from pefttools.vram.simulator import simulate

    model = {**MODEL, "hidden_size": 128, "intermediate_size": 256, "vocab_size": 8192}
    space = {"methods": ("lora", "full"), "effective_batch": 2, "optimizers": "adamw"}
    jobs = list(Space(**space).jobs(model, 256, gpu="t4", dtype="float16"))
    known = {repr(job): simulate(job) for job in jobs}
    needs = sorted(memory.device for memory in known.values())
    for usable in (needs[0] - 1, needs[len(needs) // 2], needs[-1]):
        exact = Judge(Budget("x", usable, "t4", False), simulate=lambda job: known[repr(job)])
        options = [option_of(exact, job, 1, exact.by_simulator(job)) for job in jobs]
        wanted = sorted((o for o in options if o.fits), key=lambda o: o.key(OBJECTIVES["exact"]))
        its = Judge(Budget("x", usable, "t4", False), simulate=lambda job: known[repr(job)])
        found = plan(model, None, seq=256, judge=its, **space)
        assert (found.best and found.best.job) == (wanted[0].job if wanted else None)
