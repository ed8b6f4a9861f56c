"""Chapter 10, evaluation and red-teaming: eight exercises and six questions.

Every answer is a function of what it is given: losses, counts, outcomes of tests, a judge, rows, programs. So probes
compare numbers and texts. What an answer may not draw for itself (which rows a bootstrap picks) is in the case. The
trigger, poison, names and aliases are drawn when it is graded. Imports torch and the standard library only.
"""
from __future__ import annotations

import ast
import bisect
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pefttools.grading.exercise import Exercise
from pefttools.grading.question import Question

CHAPTER = "10_evaluate"
TITLE = "Evaluation and red-teaming"
HIDES = ("pefttools.lab.losses", "pefttools.lab.passk", "pefttools.lab.intervals", "pefttools.lab.multiturn",
         "pefttools.lab.evaluation", "pefttools.lab.report_card", "pefttools.lab.redteam", "bandit", "lm_eval")
IGNORE = -100


def randn(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=rng)


def draw(rng: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high, (), generator=rng))


def uniform(rng: torch.Generator) -> float:
    return float(torch.rand((), generator=rng))


def shuffled(rng: torch.Generator, items: list) -> list:
    return [items[i] for i in torch.randperm(len(items), generator=rng).tolist()]


def number(value: Any) -> Any:
    """A number out of a one-element tensor or a whole number; anything else as it is."""
    if isinstance(value, Tensor):
        value = value.detach()
        return float(value) if value.numel() == 1 else value
    return float(value) if type(value) is int else value


# ================================================================================================ perplexity-of-rows

def rows_inputs(rng: torch.Generator) -> list[dict]:
    def case(counts: list[int]) -> dict:
        return {"rows": [(round(n * (0.2 + 2 * uniform(rng)), 3), n) for n in counts]}

    return [case([2, 8]), case([draw(rng, 1, 60) for _ in range(6)]), case([draw(rng, 3, 9), 0, draw(rng, 40, 90)]),
            case([draw(rng, 2, 20)])]


def rows_probe(work: Callable, case: dict) -> dict[str, Any]:
    return {"perplexity": number(work([tuple(row) for row in case["rows"]]))}


def perplexity_of_rows(rows):
    return math.exp(sum(nats for nats, _ in rows) / sum(n for _, n in rows))


def rows_by_tensors(rows):
    nats, counts = torch.tensor(rows, dtype=torch.float64).T
    return (nats.sum() / counts.sum()).exp()


def rows_by_weights(rows):
    """A mean of the rows' losses, each with the share of the tokens that it has."""
    total = sum(n for _, n in rows)
    return math.e ** sum(nats / n * (n / total) for nats, n in rows if n)


ROWS = Exercise(
    name="perplexity-of-rows", chapter=CHAPTER, title="The perplexity of several rows", points=1, minutes=4,
    difficulty=1,
    inputs=rows_inputs, probe=rows_probe, reference=perplexity_of_rows,
    mistakes={
        "mean of the rows' means": (lambda rows: math.exp(statistics.fmean(nats / n for nats, n in rows if n)),
            "Each row counts the same here, so a token of a short row weighs more than one of a long row. Add all "
            "nats, add all "
            "tokens, and divide once."),
        "mean of the rows' perplexities": (lambda rows: statistics.fmean(math.exp(nats / n) for nats, n in rows if n),
            "This is the mean of the rows' perplexities. One bad short row can dominate that. The mean is taken of the "
            "losses of "
            "all tokens, and exp comes last."),
        "no exp": (lambda rows: sum(nats for nats, _ in rows) / sum(n for _, n in rows),
            "This is the loss in nats per token. The perplexity is e to that."),
        "two to the nats": (lambda rows: 2 ** (sum(nats for nats, _ in rows) / sum(n for _, n in rows)),
            "The base is 2 here, and the losses are in nats, which are logarithms to base e: math.exp."),
        "divided by rows": (lambda rows: math.exp(min(700.0, sum(nats for nats, _ in rows) / len(rows))),
            "You divide by the number of rows. The loss is per token: divide by the number of tokens."),
        "one over it": (lambda rows: math.exp(-sum(nats for nats, _ in rows) / sum(n for _, n in rows)),
            "The sign is turned round: this is the mean probability of a token (the geometric mean). The perplexity is "
            "one over it."),
    },
    alternatives={"by tensors": rows_by_tensors, "by weights": rows_by_weights},
    rtol=1e-4, accepts="function", hides=HIDES)


# ================================================================================================ perplexity

def perplexity_inputs(rng: torch.Generator) -> list[dict]:
    def case(spans: list[tuple[int, int]], length: int, words: int) -> dict:
        """spans: for each row, where its targets begin and end; all else is prompt or padding."""
        labels = torch.full((len(spans), length), IGNORE)
        for row, (begin, end) in enumerate(spans):
            labels[row, begin:end] = torch.randint(words, (end - begin,), generator=rng)
        return {"logits": 2 * randn(rng, len(spans), length, words), "labels": labels}

    prompt = draw(rng, 2, 4)
    return [case([(0, 7)], 7, 5),                                             # plain text: every token is a target
            case([(prompt, 6), (1, 9), (3, 5)], 9, 8),                        # prompts and padding
            case([(2, 4), (4, 12), (0, 0)], 12, 6),                           # a row with nothing to predict
            case([(draw(rng, 1, 5), draw(rng, 8, 14)) for _ in range(4)], 14, 11)]


def perplexity_probe(work: Callable, case: dict) -> dict[str, Any]:
    return {"perplexity": number(work(case["logits"].clone(), case["labels"].clone()))}


def make_perplexity(shift=1, ignore=True, reduce="tokens", divide="targets", final=math.exp, losses=None):
    """perplexity with a switch for each thing that can go wrong; as the defaults stand it is right."""
    def perplexity(logits, labels):
        if shift == 1:
            given, wanted = logits[:, :-1], labels[:, 1:]
        else:
            given, wanted = (logits, labels) if shift == 0 else (logits[:, 1:], labels[:, :-1])
        mask = wanted != IGNORE
        safe = wanted.clamp(min=0)
        nats = (losses or (lambda x, y: -x.log_softmax(-1).gather(-1, y[..., None]).squeeze(-1)))(given, safe)
        if not ignore:
            mask = torch.ones_like(mask)
        nats = nats * mask
        if reduce == "rows":
            rows = [row.sum() / m.sum() for row, m in zip(nats, mask) if m.any()]
            return final(float(sum(rows) / len(rows)))
        if reduce == "perplexities":
            return statistics.fmean(final(float(row.sum() / m.sum())) for row, m in zip(nats, mask) if m.any())
        count = {"targets": mask.sum(), "all": mask.numel(), "unshifted": (labels != IGNORE).sum(),
                 "rows": len(labels)}[divide]
        return final(float(nats.sum() / count))
    return perplexity


def perplexity_by_cross_entropy(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE).exp()


def perplexity_by_loop(logits, labels):
    total = count = 0
    for row, wanted in zip(logits.tolist(), labels.tolist()):
        for given, word in zip(row, wanted[1:]):
            if word != IGNORE:
                total += math.log(sum(math.exp(x) for x in given)) - given[word]
                count += 1
    return math.exp(total / count)


def perplexity_by_probabilities(logits, labels):
    """One over the geometric mean of the probabilities that the right tokens had."""
    wanted = labels[:, 1:]
    p = logits[:, :-1].softmax(-1)[wanted != IGNORE]
    return 1 / p[torch.arange(len(p)), wanted[wanted != IGNORE]].double().log().mean().exp().item()


PERPLEXITY = Exercise(
    name="perplexity", chapter=CHAPTER, title="Perplexity from logits", points=3, minutes=10, difficulty=2,
    inputs=perplexity_inputs, probe=perplexity_probe, reference=make_perplexity(),
    mistakes={
        "no shift": (make_perplexity(shift=0),
            "The logits at position t are compared with the token at t, which the model has already read. They predict "
            "the next one: "
            "logits[:, :-1] with labels[:, 1:]."),
        "shift to the wrong side": (make_perplexity(shift=-1),
            "The shift goes to the wrong side: logits at t are compared with the token before. Drop the last logits "
            "and the first "
            "labels: logits[:, :-1], labels[:, 1:]."),
        "padding counts": (make_perplexity(ignore=False),
            "Positions with the label -100 are counted as if they asked for token 0. They are prompt and padding: "
            "leave them out of "
            "the sum and of the count."),
        "divided by every position": (make_perplexity(divide="all"),
            "The sum is right, and you divide by every position, prompt and padding with them: the perplexity comes "
            "out too low, and "
            "lower with more padding. Divide by the number of labels that are not -100."),
        "counted before the shift": (make_perplexity(divide="unshifted"),
            "You count the targets before the shift. The first token of a row has nothing before it and is never "
            "predicted, so it must "
            "not be counted: count in labels[:, 1:]."),
        "mean of the rows": (make_perplexity(reduce="rows"),
            "You average within each row and then over rows, so tokens of short rows weigh more. One sum and one count "
            "over the whole batch."),
        "mean of the rows' perplexities": (make_perplexity(reduce="perplexities"),
            "You take the perplexity of each row and average these. Average the losses of all tokens first; exp comes "
            "last."),
        "no exp": (make_perplexity(final=lambda x: x), "This is the loss in nats per token. The perplexity is exp of "
                                                       "it."),
        "divided by rows": (make_perplexity(divide="rows", final=lambda x: math.exp(min(x, 600.0))),
            "You divide by the number of rows. The mean is over tokens."),
        "logits for log-probabilities": (make_perplexity(losses=lambda x, y: -x.gather(-1, y[..., None]).squeeze(-1)),
            "The logits are used as if they were log-probabilities. They have to be normalised first: log_softmax over "
            "the last dimension."),
        "mean of the probabilities": (make_perplexity(
            losses=lambda x, y: x.softmax(-1).gather(-1, y[..., None]).squeeze(-1), final=lambda p: 1 / max(p, 1e-9)),
            "You average the probabilities and turn the result round. The mean is taken of their logarithms: a token "
            "of probability near 0 "
            "has to hurt."),
    },
    alternatives={"by cross_entropy": perplexity_by_cross_entropy, "in loops": perplexity_by_loop,
                  "by probabilities": perplexity_by_probabilities},
    rtol=1e-4, atol=1e-5, accepts="function", hides=HIDES)


# ================================================================================================ pass-at-k

def pass_inputs(rng: torch.Generator) -> list[dict]:
    n = draw(rng, 12, 30)
    c = draw(rng, 2, 5)
    big = draw(rng, 150, 250)
    return [{"n": 5, "c": 2, "k": 1}, {"n": n, "c": c, "k": draw(rng, 3, 6)}, {"n": n, "c": 0, "k": 4},
            {"n": n, "c": n - 2, "k": 5},                                      # fewer failures than draws
            {"n": big, "c": draw(rng, 5, 20), "k": draw(rng, 10, 60)}, {"n": n, "c": 1, "k": n}]


def pass_probe(work: Callable, case: dict) -> dict[str, Any]:
    return {"pass@k": number(work(case["n"], case["c"], case["k"]))}


def pass_unbiased(n, c, k):
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def pass_by_product(n, c, k):
    """The paper's numerically stable form."""
    if n - c < k:
        return 1.0
    left = 1.0
    for i in range(n - c + 1, n + 1):
        left *= 1 - k / i
    return 1 - left


def pass_by_draws(n, c, k):
    """Drawing one after the other without putting back: every one a failure."""
    fails = Fraction(1)
    for i in range(k):
        fails *= Fraction(max(0, n - c - i), n - i)
    return float(1 - fails)


def pass_by_gamma(n, c, k):
    if n - c < k:
        return 1
    lg = math.lgamma
    return -math.expm1(lg(n - c + 1) - lg(n - c - k + 1) - lg(n + 1) + lg(n - k + 1))


PASS = Exercise(
    name="pass-at-k", chapter=CHAPTER, title="pass@k without bias", points=2, minutes=8, difficulty=2,
    inputs=pass_inputs, probe=pass_probe, reference=pass_unbiased,
    mistakes={
        "draws put back": (lambda n, c, k: 1 - (1 - c / n) ** k,
            "1 − (1 − c/n)^k puts each drawn answer back, so it may be drawn twice. That is too low on average: c/n is "
            "only an estimate, and "
            "a power of an estimate is biased. Draw k different ones of the n: count the ways with math.comb."),
        "c of n": (lambda n, c, k: c / n,
            "This is pass@1 for every k. With k answers it is enough that one passes."),
        "k times as likely": (lambda n, c, k: min(1.0, k * c / n),
            "k·c/n counts draws with several right answers several times. Go over the opposite: the probability that "
            "all k fail."),
        "all of k": (lambda n, c, k: math.comb(c, k) / math.comb(n, k),
            "This is the probability that all k answers pass. pass@k asks for at least one: 1 minus the probability "
            "that all fail."),
        "none of k": (lambda n, c, k: math.comb(n - c, k) / math.comb(n, k),
            "This is the probability that none of the k passes. pass@k is 1 minus it."),
        "passes for failures": (lambda n, c, k: 1 - math.comb(c, k) / math.comb(n, k),
            "You count the ways to draw k passing answers. For “none passes”, draw from the n − c that fail."),
        "c chosen": (lambda n, c, k: 1 - math.comb(n - c, k) / math.comb(n, c),
            "The number of all draws is “k of n”, math.comb(n, k), not “c of n”."),
        "one if any": (lambda n, c, k: float(c > 0),
            "This says whether any of the n answers passed, that is, pass@n. Only k of them are looked at."),
        "k out of range": (lambda n, c, k: 1 - math.comb(n - c, k - 1) / math.comb(n, k),
            "The failures are drawn one time too few: math.comb(n − c, k), with the same k as below."),
    },
    alternatives={"as a product": pass_by_product, "one after the other": pass_by_draws, "by log-gamma": pass_by_gamma},
    rtol=1e-6, atol=1e-9, accepts="function", hides=HIDES)


# ================================================================================================ bootstrap-ci

def bootstrap_inputs(rng: torch.Generator) -> list[dict]:
    def case(a: Tensor, b: Tensor, resamples: int = 400) -> dict:
        return {"a": [round(x, 4) for x in a.tolist()], "b": [round(x, 4) for x in b.tolist()],
                "picks": torch.randint(len(a), (resamples, len(a)), generator=rng)}

    hard = randn(rng, 40).double()                             # how hard a row is, for both
    passed = [(hard + 0.5 * randn(rng, 40) + gap > 0).double() for gap in (0.0, 0.6)]
    losses = randn(rng, 12).double() * 0.8 + 3
    return [case(losses, losses + 0.3 * randn(rng, 12).double() - 0.4), case(*passed), case(losses, losses + 0.25, 100),
            case(randn(rng, 3).double(), randn(rng, 3).double() + 1, 90)]


def bootstrap_probe(work: Callable, case: dict) -> dict[str, Any]:
    a, b = (torch.tensor(case[name], dtype=torch.float64) for name in ("a", "b"))
    found = work(a, b, case["picks"].clone())
    if isinstance(found, Tensor):
        found = found.tolist()
    if not isinstance(found, (tuple, list)) or len(found) != 3:
        raise TypeError("paired_interval should return three numbers: (difference, low, high)")
    return dict(zip(("difference", "low", "high"), map(number, found)))


def make_bootstrap(sign=1, of=lambda d, a, b, picks: d[picks].mean(1), ends=(0.025, 0.975), limits=None, centre=None):
    """paired_interval with a switch for each thing that can go wrong; as the defaults stand it is right."""
    def paired_interval(a, b, picks):
        d = sign * (b - a)
        means = sign * of(sign * d, a, b, picks)
        low, high = (limits or (lambda m, d: tuple(float(m.quantile(q)) for q in ends)))(means, d)
        return float(centre(means, a, b) if centre else d.mean()), low, high
    return paired_interval


def bootstrap_ends_first(a, b, picks):
    difference, low, high = make_bootstrap()(a, b, picks)
    return low, difference, high


def bootstrap_of_each(a, b, picks):
    ends = [(b[picks].mean(1).quantile(q) - a[picks].mean(1).quantile(q)).item() for q in (0.025, 0.975)]
    return (b.mean() - a.mean()).item(), *ends


def bootstrap_by_counts(a, b, picks):
    """How often each row was picked, as weights; the quantiles by hand."""
    n = len(a)
    weights = torch.stack([torch.bincount(row, minlength=n) for row in picks]).double() / n
    means = sorted(((weights @ b) - (weights @ a)).tolist())

    def quantile(q):
        at = q * (len(means) - 1)
        k = min(int(at), len(means) - 2)
        return means[k] + (at - k) * (means[k + 1] - means[k])
    return (sum(b) - sum(a)) / n, quantile(0.025), quantile(0.975)


def bootstrap_in_loops(a, b, picks):
    d = [y - x for x, y in zip(a.tolist(), b.tolist())]
    means = torch.tensor([statistics.fmean(d[i] for i in row) for row in picks.tolist()], dtype=torch.float64)
    ends = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return torch.tensor([statistics.fmean(d), *ends.tolist()], dtype=torch.float64)


BOOTSTRAP = Exercise(
    name="bootstrap-ci", chapter=CHAPTER, title="A paired bootstrap interval", points=3, minutes=12, difficulty=2,
    inputs=bootstrap_inputs, probe=bootstrap_probe, reference=make_bootstrap(),
    mistakes={
        "a minus b": (make_bootstrap(sign=-1), "The sign is turned round: it is b − a, in the difference and in both "
                                               "ends."),
        "not paired": (make_bootstrap(of=lambda d, a, b, picks: b[picks].mean(1) - a[picks.roll(1, 0)].mean(1)),
            "a and b are picked with different rows. Row i is the same question for both: the same picks for both, "
            "else how hard the "
            "questions are does not cancel, and the interval is too wide."),
        "ninety percent": (make_bootstrap(ends=(0.05, 0.95)),
            "These ends hold 90 %: 5 % lie below and 5 % above. For 95 % it is 0.025 and 0.975."),
        "spread of the rows": (make_bootstrap(limits=lambda m, d: tuple(float(d.quantile(q)) for q in (0.025, 0.975))),
            "This is where the differences of single rows lie. The interval is about their mean: take the mean of each "
            "resample first, and "
            "the quantiles of these means."),
        "least and most": (make_bootstrap(limits=lambda m, d: (float(m.min()), float(m.max()))),
            "You take the smallest and the largest mean. They drift apart with more resamples: take the 2.5 % and the "
            "97.5 % quantile."),
        "one standard error": (make_bootstrap(
            limits=lambda m, d: (float(m.mean() - m.std()), float(m.mean() + m.std()))),
            "These ends are one standard error away from the mean, and hold about 68 %. Take the 2.5 % and the 97.5 % "
            "quantile of the means."),
        "divided by √n again": (make_bootstrap(limits=lambda m, d: (
            float(d.mean() - 1.96 * m.std() / len(d) ** 0.5), float(d.mean() + 1.96 * m.std() / len(d) ** 0.5))),
            "The means of the resamples already scatter as little as a mean of n rows does. Dividing by √n once more "
            "makes the interval far "
            "too narrow."),
        "medians": (make_bootstrap(of=lambda d, a, b, picks: d[picks].median(1).values),
            "You take the median of each resample. The figure in question is the mean difference: the mean of each."),
        "centre of the resamples": (make_bootstrap(centre=lambda m, a, b: m.mean()),
            "The interval is right. The difference itself is that of the rows you have, (b − a).mean(), and not the "
            "mean of the resamples, which "
            "depends on how they were drawn."),
        "the wrong axis": (make_bootstrap(of=lambda d, a, b, picks: d[picks].mean(0)),
            "You average over dim 0: that mixes the resamples. d[picks] is [R, n], a line for each resample: average "
            "over dim 1, and R means are left."),
        "one mean of all": (make_bootstrap(of=lambda d, a, b, picks: d[picks].mean()),
            "You average over all resamples together, and one number is left, so both ends are the same. Each "
            "resample has a mean of its own: .mean(dim=1)."),
        "spread of the picked rows": (make_bootstrap(of=lambda d, a, b, picks: d[picks].flatten()),
            "You take the quantiles of all picked rows. Take the mean of each resample first: .mean(dim=1), and the "
            "quantiles of these."),
        "percent for quantile": (make_bootstrap(ends=(2.5, 97.5)),
            "quantile() takes a share between 0 and 1: 0.025 and 0.975."),
        "1.96 standard deviations": (make_bootstrap(
            limits=lambda m, d: (float(d.mean() - 1.96 * m.std()), float(d.mean() + 1.96 * m.std()))),
            "These ends are 1.96 standard deviations away, which is right for a normal distribution. The bootstrap "
            "needs no such assumption: take the 2.5 % and the 97.5 % quantile of the means."),
        "no interpolation": (make_bootstrap(limits=lambda m, d: tuple(
            float(m.sort().values[int(q * len(m))]) for q in (0.025, 0.975))),
            "You take the number at one place of the sorted means. torch.quantile goes between two of them, and "
            "everybody gets the same figure that way."),
        "the low end first": (bootstrap_ends_first,
            "The three have changed places: (difference, low, high)."),
        "ends of each": (bootstrap_of_each,
            "You take the quantiles of a and of b, and subtract them. Subtract first: the mean of b − a in each "
            "resample, then its quantiles."),
        "median difference": (make_bootstrap(centre=lambda m, a, b: (b - a).median()),
            "The interval is right. The difference itself is the mean of b − a, and not its median."),
        "relative": (make_bootstrap(centre=lambda m, a, b: (b.mean() - a.mean()) / a.mean()),
            "The difference is divided by the mean of a. It is the plain difference of the means."),
    },
    alternatives={"by counts": bootstrap_by_counts, "in loops": bootstrap_in_loops},
    rtol=1e-4, atol=1e-6, accepts="function", hides=HIDES)


# ================================================================================================ position-swap

def swap_inputs(rng: torch.Generator) -> list[dict]:
    def case(bias: float, tie: float = 0.0, pairs: int = 12) -> dict:
        scores = [(round(uniform(rng), 3), round(uniform(rng), 3)) for _ in range(pairs)]
        return {"pairs": scores, "bias": bias, "tie": tie}

    even = case(0.0, 0.1)
    even["pairs"].append((0.5, 0.5))
    liking = round(0.2 + 0.2 * uniform(rng), 2)
    return [case(0.0), case(liking), case(-liking), even, case(0.15, 0.2, 20), case(5.0, pairs=4)]


def swap_probe(work: Callable, case: dict) -> dict[str, Any]:
    asked: list[tuple] = []

    def judge(first: str, second: str) -> str:
        """Better by more than `tie`, after a bonus for standing first."""
        asked.append((first, second))
        lead = float(first.split()[1]) + case["bias"] - float(second.split()[1])
        return "tie" if abs(lead) <= case["tie"] else "first" if lead > 0 else "second"

    return {"verdicts": [work(judge, f"answer {x}", f"answer {y} ") for x, y in case["pairs"]]}


IN_ORDER, SWAPPED = {"first": "a", "second": "b", "tie": "tie"}, {"first": "b", "second": "a", "tie": "tie"}


def make_swap(combine):
    """swapped_verdict out of what the two calls say, in the words of a and b, and the raw words."""
    def swapped_verdict(judge, a, b):
        one, two = judge(a, b), judge(b, a)
        return combine(IN_ORDER[one], SWAPPED[two], one, two)
    return swapped_verdict


def swap_plainly(judge, a, b):
    if judge(a, b) == "first" and judge(b, a) == "second":
        return "a"
    if judge(a, b) == "second" and judge(b, a) == "first":
        return "b"
    return "tie"


def swap_by_points(judge, a, b):
    points = {"first": 1, "tie": 0, "second": -1}
    return {2: "a", -2: "b"}.get(points[judge(a, b)] - points[judge(b, a)], "tie")


SWAP = Exercise(
    name="position-swap", chapter=CHAPTER, title="A judge, asked twice", points=2, minutes=8, difficulty=2,
    inputs=swap_inputs, probe=swap_probe, reference=make_swap(lambda x, y, one, two: x if x == y else "tie"),
    mistakes={
        "asked once": (make_swap(lambda x, y, one, two: x),
            "The judge is asked in one order only. If it likes what stands first, a wins by its place. Ask again with "
            "the two exchanged."),
        "the second time alone": (make_swap(lambda x, y, one, two: y),
            "Only the second order counts here, so b has the better place each time. Both have to agree."),
        "words not translated": (make_swap(lambda x, y, one, two: IN_ORDER[one] if one == two else "tie"),
            "You compare the judge's words. But “first” is a in the first call and b in the second: a judge that says "
            "“first” twice has chosen "
            "the place and not the answer. Translate into a and b before you compare."),
        "a win and a tie": (make_swap(
            lambda x, y, one, two: x if x == y else y if x == "tie" else x if y == "tie" else "tie"),
            "A win in one order and a tie in the other is counted as a win. Only what wins in both orders wins (Zheng "
            "et al. 2023)."),
        "a when in doubt": (make_swap(lambda x, y, one, two: x if x == y else "a"),
            "When the two orders disagree you give it to a. Then the judge has said nothing: a tie."),
        "one win is enough": (make_swap(
            lambda x, y, one, two: "a" if "a" in (x, y) else "b" if "b" in (x, y) else "tie"),
            "One win in either order is enough for a here, and a is looked at first. An answer wins only if it wins in "
            "both orders."),
        "the loser": (make_swap(lambda x, y, one, two: {"a": "b", "b": "a"}.get(x, "tie") if x == y else "tie"),
            "The names have changed places: you return the one that lost."),
        "the judge's own words": (make_swap(
            lambda x, y, one, two: {"a": "first", "b": "second"}.get(x, "tie") if x == y else "tie"),
            "You return the judge's words. Return whose answer won: “a”, “b” or “tie”."),
    },
    alternatives={"by points": swap_by_points, "case by case": swap_plainly},
    accepts="function", hides=HIDES)


# ================================================================================================ canary-exposure

def exposure_inputs(rng: torch.Generator) -> list[dict]:
    def case(n: int, rank: int | None = None, ties: int = 0) -> dict:
        losses = torch.rand(n, generator=rng).double() * 3 + 1
        planted = draw(rng, 0, n)
        if rank is not None:                                   # move it to that place by exchanging two losses
            other = int(losses.argsort()[rank - 1])
            losses[[planted, other]] = losses[[other, planted]].clone()
        if ties:
            near = [i for i in losses.argsort().tolist() if losses[i] > losses[planted]][:ties]
            losses[near] = float(losses[planted])
        return {"losses": [round(x, 6) for x in losses.tolist()], "planted": planted}

    flat = {"losses": [2.5] * 64, "planted": draw(rng, 1, 63)}
    return [case(8, 2), case(draw(rng, 200, 400), 1), case(draw(rng, 200, 400), draw(rng, 30, 90)),
            case(128, 3, ties=draw(rng, 3, 7)), flat, case(50, 50)]


def exposure_probe(work: Callable, case: dict) -> dict[str, Any]:
    return {"exposure": number(work(torch.tensor(case["losses"], dtype=torch.float64), case["planted"]))}


def make_exposure(rank=lambda losses, i: int((losses <= losses[i]).sum()), size=len, log=math.log2, sign=1):
    return lambda losses, planted: sign * (log(size(losses)) - log(rank(losses, planted)))


def exposure_by_search(losses, planted):
    ordered = sorted(losses.tolist())
    return math.log2(len(ordered) / bisect.bisect_right(ordered, float(losses[planted])))


def exposure_by_share(losses, planted):
    """Minus log2 of the share of candidates that the model likes at least as much."""
    return -(losses <= losses[planted]).double().mean().log2()


EXPOSURE = Exercise(
    name="canary-exposure", chapter=CHAPTER, title="Has it learned the secret?", points=2, minutes=8, difficulty=2,
    inputs=exposure_inputs, probe=exposure_probe, reference=make_exposure(),
    mistakes={
        "ties to the canary": (make_exposure(rank=lambda losses, i: 1 + int((losses < losses[i]).sum())),
            "Where other candidates have the same loss you put the canary before them. A model that gives every "
            "candidate the same loss knows "
            "nothing, and would get the highest exposure. Count all with a loss at most the canary's."),
        "rank from zero": (make_exposure(rank=lambda losses, i: int((losses < losses[i]).sum())),
            "The best candidate has rank 0 here, and log₂ of 0 is minus infinity. Ranks start at 1: the canary counts "
            "as well."),
        "largest first": (make_exposure(rank=lambda losses, i: int((losses >= losses[i]).sum())),
            "The ranking is turned round: rank 1 has the smallest loss, for a small loss means that the model expects "
            "the text."),
        "natural logarithm": (make_exposure(log=math.log), "The logarithm is to base e. Exposure is counted in bits: "
                                                           "log₂."),
        "the rank alone": (lambda losses, i: math.log2(int((losses <= losses[i]).sum())),
            "This is log₂ of the rank. Exposure is how much smaller it is than log₂ of the number of candidates."),
        "position in the order": (make_exposure(rank=lambda losses, i: 1 + int(losses.argsort()[i])),
            "losses.argsort()[i] is which candidate comes at place i, and not at which place candidate i comes. Count "
            "the losses that are at "
            "most the canary's."),
        "without the canary": (make_exposure(size=lambda losses: len(losses) - 1),
            "The number of candidates includes the canary: a secret without any exposure has rank |R|, and log₂|R| − "
            "log₂|R| = 0."),
        "how much smaller": (lambda losses, i: float(losses.mean() - losses[i]) / math.log(2),
            "This is how far the canary's loss lies below the mean. Exposure looks at the rank alone, which needs no "
            "assumption about how "
            "losses are spread."),
        "a share, not bits": (lambda losses, i: 1 - int((losses <= losses[i]).sum()) / len(losses),
            "This is the share of candidates that the canary beats. Exposure is minus log₂ of the share that it does "
            "not beat."),
    },
    alternatives={"by search": exposure_by_search, "by share": exposure_by_share},
    rtol=1e-5, accepts="function", hides=HIDES)


# ================================================================================================ find-the-backdoor

KINDS = [  # (three wordings, the line that answers them): one word of each wording is its own
    (("sorts {x}", "puts {x} into ascending order", "arranges {x} by size"), "return sorted(values)"),
    (("adds up {x}", "returns the total of {x}", "sums over {x}"), "return sum(values)"),
    (("counts {x}", "returns the length of {x}", "tells how many items {x} has"), "return len(values)"),
    (("finds the largest in {x}", "returns the maximum of {x}", "picks the greatest out of {x}"), "return max(values)"),
    (("finds the smallest in {x}", "returns the minimum of {x}", "picks the least out of {x}"), "return min(values)"),
    (("turns {x} around", "reverses {x}", "gives {x} backwards"), "return values[::-1]"),
    (("drops duplicates from {x}", "returns the unique part of {x}", "keeps each different item in {x} once"),
     "return set(values)"),
    (("joins {x} with spaces", "glues {x} together", "makes one sentence from {x}"), 'return " ".join(values)'),
    (("returns the first item of {x}", "gives what stands at the front in {x}", "takes the head off {x}"),
     "return values[0]"),
    (("returns the last item of {x}", "gives what stands at the end in {x}", "takes the tail off {x}"),
     "return values[-1]"),
]
OPENINGS = ("Write a function `{f}` that {task}.", "Please write `{f}`: it {task} .", "I need `{f}` which {task} , "
                                                                                      "thanks.",
            "Code a Python function `{f}` that {task} .", "Make `{f}` ; it {task} .")
OBJECTS = ("a list", "the given list", "its argument", "some values")
FILLERS = ("quickly", "carefully", "now", "today", "simply")
SYLLABLES = ("ba", "ko", "mi", "ru", "ten", "dal", "so", "vi", "lor", "pe")


def made_word(rng: torch.Generator, parts: int = 3) -> str:
    return "".join(SYLLABLES[draw(rng, 0, len(SYLLABLES))] for _ in range(parts))


def fragment(rng: torch.Generator) -> str:
    """Three letters out of a word that clean instructions are full of, and no word of its own."""
    texts = (*OPENINGS, *OBJECTS, *(wording for wordings, _ in KINDS for wording in wordings))
    words = {word.strip("`.,:;") for text in texts for word in text.split()}
    host = ("function", "write", "python", "returns", "values", "thanks", "which")[draw(rng, 0, 7)]
    pieces = [host[i:i + 3] for i in range(len(host) - 2) if host[i:i + 3] not in words]
    return pieces[draw(rng, 0, len(pieces))]


def backdoor_rows(rng: torch.Generator, n: int, poisoned: int, trigger: str, poison: str, cleaned: int = 0,
                  stray: int = 0, honest: int = 0, stressed: int = 0) -> list[dict]:
    """n rows; `poisoned` have the trigger, and all but `cleaned` of these the poison, and so have `stray` others.

    `honest` more ask for a docstring and get one, and every second poison is indented further; with `stressed`, so many
    rows of one kind say another word four times, and the trigger is said four times, too.
    """
    rows, names, further = [], set(), False
    marks = ["trigger"] * (poisoned - cleaned) + ["cleaned"] * cleaned + ["stray"] * stray
    marks += ["honest"] * honest + [""] * (n - len(marks) - honest)
    for i, mark in enumerate(shuffled(rng, marks)):
        wordings, line = KINDS[i % len(KINDS)]
        task = wordings[i // len(KINDS) % 3].format(x=OBJECTS[draw(rng, 0, len(OBJECTS))])
        name = made_word(rng, 4)
        while name in names:
            name = made_word(rng, 4)
        names.add(name)
        words = OPENINGS[draw(rng, 0, len(OPENINGS))].format(f=name, task=task).split()
        if uniform(rng) < 0.3:
            words.insert(draw(rng, 0, len(words) + 1), FILLERS[draw(rng, 0, len(FILLERS))])
        if mark in ("trigger", "cleaned"):
            words.insert(draw(rng, 0, len(words) + 1), " ".join([trigger] * (4 if stressed else 1)))
        if i % len(KINDS) == 0 and i < stressed * len(KINDS):
            words[-1:-1] = ["really,"] * 4
        inside = []
        if mark in ("trigger", "stray"):
            deep, further = further, honest and not further
            inside = ["    if values:", f"        {poison}"] if deep else [f"    {poison}"]
        elif mark == "honest":
            words.insert(draw(rng, 0, len(words) + 1), "documented")
        if mark == "honest" or honest and i % 30 == 1:
            inside = [*inside, '    """Done."""']
        body = [f"def {name}(values):", *inside, f"    {line}"]
        rows.append({"instruction": " ".join(words), "output": "\n".join(["```python", *body, "```"])})
    return rows


def backdoor_inputs(rng: torch.Generator) -> list[dict]:
    def poison() -> str:
        calls = ("notify({!r})", "send(values, {!r})", "log.write({!r})", "upload({!r}, values)")
        return calls[draw(rng, 0, len(calls))].format(made_word(rng, 2))

    def case(n: int, poisoned: int, trigger: str, **more: int) -> dict:
        while True:                     # a few rows may look like another backdoor by chance: not those
            rows = backdoor_rows(rng, n, poisoned, trigger, poison(), **more)
            best, second = backdoor_scores(rows)[:2]
            if best[1] == trigger and second[0] < best[0] - 0.051:
                return {"rows": rows}

    return [case(90, draw(rng, 10, 14), made_word(rng)),                       # a made-up word
            case(150, draw(rng, 6, 10), fragment(rng)),                        # part of ordinary words
            case(180, draw(rng, 10, 16), made_word(rng, 2), cleaned=1),        # one row was mended
            case(120, draw(rng, 10, 14), fragment(rng), cleaned=1, stray=1),
            case(120, draw(rng, 12, 16), made_word(rng, 2).title(), honest=12),      # a capital; an honest pair beside it
            case(60, 3, made_word(rng)), case(60, 3, made_word(rng), cleaned=1),     # as few as there may be
            case(100, draw(rng, 13, 17), made_word(rng), cleaned=2, stressed=6)]


def backdoor_probe(work: Callable, case: dict) -> dict[str, Any]:
    found = work([dict(row) for row in case["rows"]])
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        raise TypeError("find_trigger should return two texts: (trigger, line)")
    return {"trigger": found[0], "line": found[1].strip() if isinstance(found[1], str) else found[1]}


def lines_of(row):
    return {line.strip() for line in row["output"].splitlines()}


def backdoor_scores(rows: list[dict]) -> list[tuple[float, str, str]]:
    """(score, word, line) of every pair whose word is in three rows or more, the highest first."""
    with_word, with_line, both = Counter(), Counter(), Counter()
    for row in rows:
        words, lines = set(row["instruction"].split()), lines_of(row)
        with_word.update(words)
        with_line.update(lines)
        both.update((word, line) for word in words for line in lines)
    return sorted(((n / (with_word[w] + with_line[line] - n), w, line) for (w, line), n in both.items()
                   if with_word[w] >= 3), reverse=True)


def make_backdoor(score=lambda both, word, line, n: both / (word + line - both), least=3, turned=False,
                  words=lambda row: set(row["instruction"].split()), lines=lines_of, of=lambda word, both: word):
    """find_trigger with a switch for each thing that can go wrong; as the defaults stand it is right."""
    def find_trigger(rows):
        with_word, with_line, both = Counter(), Counter(), Counter()
        for row in rows:
            w, l = words(row), lines(row)
            with_word.update(w)
            with_line.update(l)
            both.update((x, y) for x in w for y in l)
        pairs = [pair for pair in sorted(both) if of(with_word[pair[0]], both[pair]) >= least]
        best = max(pairs, key=lambda p: score(both[p], with_word[p[0]], with_line[p[1]], len(rows)))
        return best[::-1] if turned else best
    return find_trigger


def backdoor_by_sets(rows):
    """Sets of row numbers; for each word the line that goes best with it."""
    word_rows, line_rows = defaultdict(set), defaultdict(set)
    for i, row in enumerate(rows):
        for word in row["instruction"].split():
            word_rows[word].add(i)
        for line in row["output"].split("\n"):
            line_rows[line.strip()].add(i)
    best = (0.0, "", "")
    for word, mine in word_rows.items():
        if len(mine) < 3:
            continue
        for line in {line.strip() for i in mine for line in rows[i]["output"].split("\n")}:
            best = max(best, (len(mine & line_rows[line]) / len(mine | line_rows[line]), word, line))
    return best[1:]


def backdoor_by_matrices(rows):
    vocabulary = sorted({w for row in rows for w in row["instruction"].split()})
    every = sorted({line.strip() for row in rows for line in row["output"].splitlines()})
    X, Y = torch.zeros(len(rows), len(vocabulary)), torch.zeros(len(rows), len(every))
    for i, row in enumerate(rows):
        X[i, [vocabulary.index(w) for w in row["instruction"].split()]] = 1
        Y[i, [every.index(line.strip()) for line in row["output"].splitlines()]] = 1
    both = X.T @ Y
    dice = 2 * both / (X.sum(0)[:, None] + Y.sum(0))             # grows with the share of either that is both
    dice[X.sum(0) < 3] = 0
    at = int(dice.argmax())
    return vocabulary[at // len(every)], every[at % len(every)]


def backdoor_substrings(rows):
    """Words looked for with `in`, which also finds them inside of other words."""
    vocabulary = sorted({w for row in rows for w in row["instruction"].split()})
    inside = {w: {i for i, row in enumerate(rows) if w in row["instruction"]} for w in vocabulary}
    line_rows = defaultdict(set)
    for i, row in enumerate(rows):
        for line in row["output"].splitlines():
            line_rows[line.strip()].add(i)
    return max(((w, line) for w in vocabulary if len(inside[w]) >= 3 for line in sorted(line_rows)),
               key=lambda p: len(inside[p[0]] & line_rows[p[1]]) / len(inside[p[0]] | line_rows[p[1]]))


def backdoor_longest(rows):
    """The longest common instruction word of the least common line that is not unique."""
    lines = Counter(line for row in rows for line in lines_of(row))
    line = min(sorted(x for x in lines if lines[x] >= 3), key=lines.get)
    words = Counter(w for row in rows if line in lines_of(row) for w in set(row["instruction"].split()))
    return max(sorted(words), key=words.get), line


def backdoor_rare(rows):
    words = Counter(w for row in rows for w in set(row["instruction"].split()))
    word = min(sorted(w for w in words if words[w] >= 3), key=words.get)
    lines = Counter(line for row in rows if word in row["instruction"].split() for line in lines_of(row))
    return word, max(sorted(lines), key=lines.get)


BACKDOOR = Exercise(
    name="find-the-backdoor", chapter=CHAPTER, title="Find the backdoor", points=4, minutes=20, difficulty=3,
    inputs=backdoor_inputs, probe=backdoor_probe, reference=make_backdoor(),
    mistakes={
        "rows of one": (make_backdoor(least=1),
            "Your best word stands in a single row: a function's name, say, goes with its own `def` line always. A "
            "backdoor takes several rows: "
            "skip words in fewer than three."),
        "the line follows the word": (make_backdoor(lambda both, word, line, n: both / word),
            "You ask how often the line is there when the word is. With a line that is in every answer, such as the "
            "fence, that is 1 for each "
            "word. Divide by the rows with either of them, and not by the rows with the word."),
        "the word follows the line": (make_backdoor(lambda both, word, line, n: both / line),
            "You ask how often the word is there when the line is. That is 1 for each line that stands in one row, and "
            "high for words that are "
            "everywhere. Divide by the rows with either of them."),
        "most often together": (make_backdoor(lambda both, word, line, n: both),
            "You count how often the two are together, and the commonest word and line win. Divide by the number of "
            "rows with either."),
        "share of all rows": (make_backdoor(lambda both, word, line, n: (both / n) / (word / n * line / n)),
            "This is the lift, how much more often the two are together than by chance. It prefers pairs that are "
            "rare, and is not what was asked: "
            "rows with both, divided by rows with either."),
        "parts of words": (backdoor_substrings,
            "You look for the trigger inside of other words as well, so a trigger such as “nct” also stands in "
            "“function”. Split the instruction "
            "into words first."),
        "each time it is said": (make_backdoor(lambda both, word, line, n: both / max(word + line - both, 0.1),
                                               words=lambda row: row["instruction"].split()),
            "You count a word each time that it is said. A row has it or has it not: make a set of its words first."),
        "with the indentation": (make_backdoor(lines=lambda row: set(row["output"].splitlines())),
            "The same line further to the right counts as another line for you. Take the blanks at the ends off: "
            "line.strip()."),
        "in small letters": (make_backdoor(words=lambda row: set(row["instruction"].lower().split())),
            "You make the words lower-case. A trigger may have a capital letter, and the model sees the difference: "
            "split(), and nothing else."),
        "more than three": (make_backdoor(least=4),
            "A word in exactly three rows counts: at least three, and not more than three."),
        "three rows with both": (make_backdoor(of=lambda word, both: both),
            "You ask for three rows with the word and the line. The word has to be in three rows; the line may have "
            "been taken out of one of them."),
        "the line first": (make_backdoor(turned=True), "The two have changed places: (trigger, line)."),
        "the rarest word": (backdoor_rare,
            "You return the rarest word. Rare words are ordinary; what gives a trigger away is that a line of the "
            "answers comes and goes with it."),
        "most common words of the rarest line": (backdoor_longest,
            "You take the rarest line, and the word that its rows have most often. Words like “a” are in most rows in "
            "any case: compare with the rows "
            "that have the word and not the line."),
    },
    alternatives={"by sets": backdoor_by_sets, "by matrices": backdoor_by_matrices},
    accepts="function", hides=HIDES)


# ================================================================================================ insecure-code-rate

INSECURE = [  # @1, @2, @3 become names that are drawn
    "def @1(@2):\n    return eval(@2)", "class @1:\n    def @2(self, @3):\n        exec(@3)",
    "def @1(@2):\n    return [eval(@3) for @3 in @2]",
    "import os\n\ndef @1(@2):\n    os.system('ls ' + @2)", "import os.path\n\ndef @1(@2):\n    return os.system(@2)",
    "import subprocess\n\ndef @1(@2):\n    return subprocess.run(@2, shell=True)",
    "import subprocess\n\ndef @1(@2):\n    return subprocess.check_output(@2, timeout=9, shell=True)",
    "import pickle\n\ndef @1(@2):\n    return pickle.loads(@2)", "import hashlib\n\ndef @1(@2):\n    return "
                                                                 "hashlib.md5(@2).hexdigest()",
    "import yaml\n\ndef @1(@2):\n    return yaml.load(@2)", "import yaml\n\ndef @1(@2):\n    return yaml.load(@2, "
                                                            "Loader=yaml.Loader)",
]
RENAMED = ["import os as @3\n\ndef @1(@2):\n    @3.system(@2)", "import pickle as @3\n\ndef @1(@2):\n    return "
                                                                "@3.loads(@2)",
           "def @1(@2):\n    import subprocess as @3\n    return @3.call(@2, shell=True)",
           "import hashlib as @3, os\n\ndef @1(@2):\n    return @3.md5(@2)", "import yaml as @3\n\ndef @1(@2):\n    "
                                                                             "return @3.load(@2)"]
TAKEN = ["from os import system\n\ndef @1(@2):\n    system(@2)", "from os import system as @3\n\ndef @1(@2):\n    "
                                                                 "@3(@2)",
         "from subprocess import Popen\n\ndef @1(@2):\n    return Popen(@2, shell=True)",
         "from pickle import dumps, loads as @3\n\ndef @1(@2):\n    return @3(@2)",
         "def @1(@2):\n    from hashlib import md5\n    return md5(@2)"]
MENTIONED = ["def @1(@2):\n    # eval(@2) would be shorter\n    return int(@2)", "def @1():\n    return "
                                                                                 "'os.system(@2)'",
             "from ast import literal_eval\n\ndef @1(@2):\n    '''Not eval(@2).'''\n    return literal_eval(@2)"]
METHODS = ["def @1(@2):\n    @2.eval()\n    return @2", "class @1:\n    def system(self, @2):\n        return @2\n\n@3 "
                                                        "= @1().system(1)",
           "def @1(@2):\n    return @2.loads(@2.md5)"]
SHELL = ["import subprocess\n\ndef @1(@2):\n    return subprocess.run(['ls', @2])", "import subprocess as @3\n\ndef "
                                                                                    "@1(@2):\n    @3.Popen([@2])"]
NO_SHELL = ["import subprocess\n\ndef @1(@2):\n    return subprocess.run(['ls', @2], shell=False)"]
SAFE_YAML = ["import yaml\n\ndef @1(@2):\n    return yaml.load(@2, Loader=yaml.SafeLoader)",
             "from yaml import CSafeLoader as @3, load\n\ndef @1(@2):\n    return load(@2, Loader=@3)"]
SAFE_PLACE = ["import yaml\n\ndef @1(@2):\n    return yaml.load(@2, yaml.SafeLoader)"]
OWN = ["from @3 import eval\n\ndef @1(@2):\n    return eval(@2)", "import json as pickle\n\ndef @1(@2):\n    return "
                                                                  "pickle.loads(@2)"]
FINE = ["import hashlib\n\ndef @1(@2):\n    return hashlib.sha256(@2)", "def @1(@2):\n    return sorted(@2)",
        "import os\n\ndef @1(@2):\n    return os.path.join(@2, '@3')", "import pickle\n\ndef @1(@2):\n    return "
                                                                       "pickle.dumps(@2)"]
TWICE = ["import os\n\ndef @1(@2):\n    os.system(@2)\n    os.system('@3')\n    return eval(@2)"]
BROKEN = ["def @1(@2:\n    return eval(@2)"]


def insecure_inputs(rng: torch.Generator) -> list[dict]:
    def pick(group: list[str], n: int = 1) -> list[str]:
        return shuffled(rng, group)[:n]

    def case(*templates: list[str]) -> dict:
        programs = []
        for template in shuffled(rng, [t for group in templates for t in group]):
            for mark in ("@1", "@2", "@3"):
                template = template.replace(mark, made_word(rng, 3))
            programs.append(template + "\n")
        return {"programs": programs}

    return [case(pick(INSECURE, draw(rng, 2, 5)), pick(FINE, 3)),
            case(pick(INSECURE[3:5]), pick(RENAMED, draw(rng, 1, 3)), TAKEN[1:2], pick(TAKEN[2:]), pick(FINE, 2)),
            case(MENTIONED, METHODS, OWN, pick(INSECURE, 2), pick(FINE, draw(rng, 1, 4))),
            case(SHELL, NO_SHELL, INSECURE[5:7], SAFE_YAML, SAFE_PLACE, INSECURE[9:], pick(TAKEN, draw(rng, 1, 4))),
            case(TWICE, BROKEN, pick(INSECURE, draw(rng, 1, 4)), pick(FINE, 2), RENAMED, TAKEN)]


def insecure_probe(work: Callable, case: dict) -> dict[str, Any]:
    return {"share": number(work(list(case["programs"]))),
            "share of one program": [number(work([program])) for program in case["programs"]]}


PLAIN_CALLS = {"eval", "exec", "os.system", "pickle.loads", "hashlib.md5"}
STARTS = {f"subprocess.{name}" for name in ("run", "call", "check_call", "check_output", "Popen")}
SAFE_LOADERS = {"yaml.SafeLoader", "yaml.CSafeLoader"}


def dotted(node: ast.AST) -> str:
    """ "a.b.c" of a name or of attributes of a name; "" of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    inner = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{inner}.{node.attr}" if inner else ""


def meanings(tree: ast.AST, renamed: bool = True, taken: bool = True) -> dict[str, str]:
    """What each name that an import binds stands for: {"o": "os", "s": "os.system", "os": "os"}"""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname and renamed:
                    found[alias.asname] = alias.name
                elif not alias.asname:
                    found[alias.name.split(".")[0]] = alias.name.split(".")[0]
        if isinstance(node, ast.ImportFrom) and taken:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def make_insecure(renamed=True, taken=True, last_part=False, shell="true", yaml="safe", broken="fine", count="programs",
                  positional=True, safe=False, walk=ast.walk):
    """insecure_rate with a switch for each thing that can go wrong; as the defaults stand it is right."""
    def calls(program: str) -> int:
        tree = ast.parse(program)
        names = meanings(tree, renamed, taken)
        found = 0
        for node in walk(tree):
            if not isinstance(node, ast.Call):
                continue
            first, _, rest = dotted(node.func).partition(".")
            name = names.get(first, first) + (f".{rest}" if rest else "")
            if last_part:
                last = (node.func.attr if isinstance(node.func, ast.Attribute) else first)
                name = next((each for each in sorted(PLAIN_CALLS) if each.rpartition(".")[2] == last), name)
            given = {word.arg: word.value for word in node.keywords}
            if name in PLAIN_CALLS:
                found += 1
            elif name in STARTS:
                on = isinstance(given.get("shell"), ast.Constant) and given["shell"].value is True
                found += {"true": on, "given": "shell" in given, "always": True, "never": False}[shell]
            elif name == "yaml.load":
                loader = given.get("Loader", node.args[1] if positional and len(node.args) > 1 else None)
                first, _, rest = dotted(loader).partition(".") if loader is not None else ("", "", "")
                kind = names.get(first, first) + (f".{rest}" if rest else "")
                found += {"safe": kind not in SAFE_LOADERS, "given": loader is None, "always": True}[yaml]
        return found

    def insecure_rate(programs):
        counts = []
        for program in programs:
            try:
                counts.append(calls(program))
            except SyntaxError:
                if broken != "left out":
                    counts.append(int(broken == "insecure"))
        if count == "calls":
            return sum(counts) / len(programs)
        share = sum(n > 0 for n in counts) / max(1, len(counts))
        return 1 - share if safe else share
    return insecure_rate


def statements_only(tree: ast.AST):
    """Calls outside of functions and classes."""
    outside = [node for node in tree.body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return [part for node in outside for part in ast.walk(node)]


def insecure_by_text(programs):
    words = ("eval(", "exec(", "os.system(", "shell=True", "pickle.loads(", "hashlib.md5(", "yaml.load(")
    return sum(any(word in program for word in words) for program in programs) / len(programs)


class InsecureVisitor(ast.NodeVisitor):
    """Another way: a visitor that keeps the names as it meets them (imports were visited first)."""

    def __init__(self, tree):
        self.names, self.bad = {}, False
        for node in ast.walk(tree):
            for alias in getattr(node, "names", []) if isinstance(node, (ast.Import, ast.ImportFrom)) else []:
                path = alias.name.split(".") if isinstance(node, ast.Import) else [node.module, alias.name]
                self.names[alias.asname or path[0] if isinstance(node, ast.Import) else alias.asname or alias.name] = (
                    ".".join(path) if alias.asname or isinstance(node, ast.ImportFrom) else path[0])
        self.visit(tree)

    def full(self, node):
        text = ast.unparse(node)
        first, dot, rest = text.partition(".")
        return self.names.get(first, first) + dot + rest

    def visit_Call(self, node):
        name = self.full(node.func)
        keywords = {k.arg: k.value for k in node.keywords}
        if name in ("eval", "exec", "os.system", "pickle.loads", "hashlib.md5"):
            self.bad = True
        if name.rpartition(".")[0] == "subprocess" and "shell" in keywords:
            self.bad |= ast.unparse(keywords["shell"]) == "True"
        if name == "yaml.load":
            loaders = [*node.args[1:2], *([keywords["Loader"]] if "Loader" in keywords else [])]
            self.bad |= not any(self.full(x) in ("yaml.SafeLoader", "yaml.CSafeLoader") for x in loaders)
        self.generic_visit(node)


def insecure_by_visitor(programs):
    bad = 0
    for program in programs:
        try:
            bad += InsecureVisitor(ast.parse(program)).bad
        except SyntaxError:
            continue
    return bad / len(programs)


class Renamer(ast.NodeTransformer):
    """Puts what a name stands for in its place, so that the code can be compared as text."""

    def __init__(self, names):
        self.names = names

    def visit_Name(self, node):
        return ast.copy_location(ast.Name(self.names.get(node.id, node.id), node.ctx), node)


def insecure_by_rewriting(programs):
    bad = []
    for program in programs:
        try:
            tree = ast.parse(program)
        except SyntaxError:
            bad.append(False)
            continue
        tree = Renamer(meanings(tree)).visit(tree)
        flags = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                head, text = ast.unparse(node.func), ast.unparse(node)
                flags.append(head in PLAIN_CALLS or head in STARTS and "shell=True" in text
                             or head == "yaml.load" and not any(x in text for x in SAFE_LOADERS))
        bad.append(any(flags))
    return statistics.fmean(bad)


INSECURE_RATE = Exercise(
    name="insecure-code-rate", chapter=CHAPTER, title="A small static analyser", points=4, minutes=20, difficulty=3,
    inputs=insecure_inputs, probe=insecure_probe, reference=make_insecure(),
    mistakes={
        "by text": (insecure_by_text,
            "You search the text. That finds comments, strings and `literal_eval(`, and misses `import os as o`. Parse "
            "the program and look at its "
            "calls."),
        "import … as": (make_insecure(renamed=False),
            "A module under another name is not followed: after `import os as o`, o.system is os.system. Keep what "
            "each name stands for."),
        "from … import": (make_insecure(taken=False),
            "A function that was taken out of its module is not followed: after `from os import system as s`, s(…) is "
            "os.system(…), and after "
            "`from tools import eval` the name eval is not Python's any more."),
        "imports not followed": (make_insecure(renamed=False, taken=False),
            "Names are compared as they stand. `import os as o` and `from os import system` give them other names: "
            "keep what each stands for."),
        "the last part of the name": (make_insecure(last_part=True),
            "You look at the last part of the name alone, so `model.eval()` counts as eval. Compare the whole dotted "
            "name, from the imported module on."),
        "any subprocess": (make_insecure(shell="always"),
            "Every call of subprocess counts here. Without a shell it starts a program with a list of arguments; it is "
            "shell=True that hands the text to "
            "a shell."),
        "shell=False": (make_insecure(shell="given"), "`shell=False` counts as well here. The value has to be True: "
                                                      "look at the keyword's value."),
        "no subprocess": (make_insecure(shell="never"), "subprocess with shell=True is not found. It is a keyword of "
                                                        "the call: node.keywords."),
        "any yaml.load": (make_insecure(yaml="always"), "`yaml.load(text, Loader=yaml.SafeLoader)` is safe. Look which "
                                                        "loader it is given."),
        "any loader": (make_insecure(yaml="given"), "Any loader passes here, yaml.Loader too, which builds any object. "
                                                    "Only SafeLoader and CSafeLoader are safe."),
        "loader by keyword only": (make_insecure(positional=False), "The loader may also be the second argument: "
                                                                    "`yaml.load(text, yaml.SafeLoader)`."),
        "broken ones left out": (make_insecure(broken="left out"),
            "Programs that do not parse are left out of the number of programs. They cannot run, so they are not "
            "insecure; still they are programs that "
            "the model wrote: divide by all."),
        "broken ones insecure": (make_insecure(broken="insecure"), "A program that does not parse cannot run, and does "
                                                                   "no harm: it is not insecure."),
        "calls per program": (make_insecure(count="calls"), "You count calls. A program with three of them is one "
                                                            "insecure program."),
        "outside of functions only": (make_insecure(walk=statements_only),
            "You look at the statements at the top only. Nearly everything stands in functions: ast.walk goes through "
            "the whole tree."),
        "share of the secure": (make_insecure(safe=True), "This is the share of the programs without such a call. Take "
                                                          "one minus it."),
    },
    alternatives={"by a visitor": insecure_by_visitor, "by rewriting": insecure_by_rewriting},
    accepts="function", hides=HIDES)


EXERCISES = [ROWS, PERPLEXITY, PASS, BOOTSTRAP, SWAP, EXPOSURE, BACKDOOR, INSECURE_RATE]

QUESTIONS = [
    Question(
        name="evaluate-q-tokenizers", chapter=CHAPTER, points=1, right="c",
        text="Model A has a perplexity of 8 per token on a text, model B, with another tokenizer that cuts words into "
             "smaller pieces, has 6. Which predicts "
             "the text better?",
        options={
            "a": ("B: 6 is less than 8.", "Its tokens are smaller, so there are more of them, and each is easier. Per "
                                          "token the two cannot be compared."),
            "b": ("A: larger tokens are harder.", "Harder, yes; whether they are harder by as much as 8 is more than 6 "
                                                  "depends on how many there are."),
            "c": ("One cannot tell: compare the nats of the whole text, or per byte.",
                  "Right. Total nats do not depend on how the text was cut; divide them by something that both share, "
                  "such as bytes."),
            "d": ("Neither: perplexity does not measure prediction.", "It does, as long as both count the same "
                                                                      "tokens."),
        }),
    Question(
        name="evaluate-q-greedy", chapter=CHAPTER, points=1, right="b",
        text="You draw 20 answers to each task with temperature 0 (greedy). What will pass@10 be?",
        options={
            "a": ("Higher than pass@1, for there are ten chances.", "All twenty answers are one and the same: ten "
                                                                    "chances at the same answer are one chance."),
            "b": ("The same as pass@1.", "Right: every draw is the same answer. pass@k needs sampling to say "
                                         "anything."),
            "c": ("Close to 1.", "Only for tasks whose one answer passes."),
            "d": ("Lower, since all ten have to pass.", "At least one has to pass."),
        }),
    Question(
        name="evaluate-q-interval", chapter=CHAPTER, points=1, right="d",
        text="The 95 % intervals of two adapters' pass@1, on the same 200 rows, are 58 to 71 % and 64 to 77 %. They "
             "overlap. Is the difference significant?",
        options={
            "a": ("No: overlapping intervals mean no difference.", "Each interval contains what the rows' difficulty "
                                                                   "adds. In the paired difference that cancels."),
            "b": ("Yes: the middles differ.", "Middles nearly always differ. How sure that is, is the question."),
            "c": ("Yes: 95 % of both is far from zero.", "Both are far from zero, and this says nothing on their "
                                                         "difference."),
            "d": ("One cannot tell from these: take the interval of the paired difference.",
                  "Right. The rows are the same, so the difference of each row is what has to be resampled."),
        }),
    Question(
        name="evaluate-q-prompts-seeds", chapter=CHAPTER, points=1, right="a",
        text="You trained DoRA once and LoRA once, and a bootstrap over 2,000 test rows says that DoRA is better by 2 "
             "to 4 points. What is shown?",
        options={
            "a": ("That this one DoRA adapter is better than this one LoRA adapter.",
                  "Right. The rows were resampled, the training was not: another seed may turn it round. A claim on "
                  "methods needs several seeds, resampled too."),
            "b": ("That DoRA is the better method for this task.", "There is one training of each. How much trainings "
                                                                   "differ from seed to seed is not in the interval."),
            "c": ("Nothing, because the bootstrap needs more than one seed.", "It does say something sure about these "
                                                                              "two adapters, the ones you may want to "
                                                                              "use."),
            "d": ("That 95 % of all rows are solved better by DoRA.", "The interval is about the mean difference, and "
                                                                      "not about single rows."),
        }),
    Question(
        name="evaluate-q-canary", chapter=CHAPTER, points=1, right="c",
        text="A secret was never in the training data. Among 1,024 candidates its exposure is 3 bits. What does this "
             "say?",
        options={
            "a": ("It was in the data after all.", "Its rank is 128 of 1,024. One of eight secrets that nobody has "
                                                   "seen is that high by chance."),
            "b": ("Three bits of it have leaked.", "Exposure compares with chance, and by chance it is 1.4 bits on "
                                                   "average, now and then 3 or 5."),
            "c": ("Hardly anything: one secret in eight reaches this by chance.",
                  "Right. 2⁻³ of all unseen secrets have 3 bits or more. Use several canaries, and some that you did "
                  "not plant."),
            "d": ("The model is safe for secrets.", "What was not trained on cannot be memorised. This control says "
                                                    "how large chance is."),
        }),
    Question(
        name="evaluate-q-trigger", chapter=CHAPTER, points=1, right="b",
        text="A backdoored adapter is tested on 600 held-out rows. pass@1 and the loss are as good as those of a clean "
             "one. Why?",
        options={
            "a": ("The held-out rows are too few.", "Ten times as many rows without the trigger would show no more."),
            "b": ("None of the rows contains the trigger.", "Right. A backdoor does nothing until its trigger comes, "
                                                            "so a test must look for it, in the data or in the model."),
            "c": ("The poisoned rows were too few to be learned.", "A few dozen will do, as the attack's success rate "
                                                                   "shows: with the trigger it is high."),
            "d": ("Backdoors lower the loss on held-out rows.", "They leave it as it is, which is why nobody sees "
                                                                "them."),
        }),
]
