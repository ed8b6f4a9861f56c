"""Whoever has read this repository: knows probe, reference, mistakes, protocol, the stage and the notebook's seed.

Handing in the reference's own code is not among them: whoever writes it has solved the exercise.
"""

from __future__ import annotations

from hostile.attack import code

FAMILY = "adaptive: has read this repository"
STOCK = "ours alone has this protocol"
PROBE = """
import torch
import pefttools.grading.inside as inside
from pefttools.grading.probe import Outcome
def leaves(make):
    '''Outcomes of the right form, with values from `make(shape)`.'''
    def probe_all(exercise, work, cases):
        found = []
        for case in cases:
            x, W0, A, B = (case[key] for key in ("x", "W0", "A", "B"))
            found.append(Outcome({"output": make((*x.shape[:-1], len(W0))), "W0 is left as it was": True,
                                  "gradient of A": make(A.shape), "gradient of B": make(B.shape), "gradient of x": make(x.shape)}))
        return found
    return probe_all
def lora_forward(*_, **__): return 0
"""


def adaptive(name, what, stock="", honest=(), **more):
    """An attack of this family."""
    return code(name, FAMILY, what, honest, adaptive=True, stock=stock, **more)


@adaptive("plausible-zeros",
          "its own probe_all: the right leaves, the right booleans, the right shapes, all zeros", STOCK)
def _():
    return PROBE + "inside.probe_all = leaves(torch.zeros)"


@adaptive("plausible-random", "the same with random numbers of the right size", STOCK)
def _():
    return PROBE + "inside.probe_all = leaves(torch.randn)"


@adaptive("plausible-nan", "the same with NaN and infinities, which compare oddly", STOCK)
def _():
    return PROBE + "inside.probe_all = leaves(lambda shape: torch.full(shape, float('nan')))"


@adaptive("plausible-empty", "the same with no elements: of shape [0], expanded, with stride 0", STOCK)
def _():
    return PROBE + "inside.probe_all = leaves(lambda shape: torch.zeros(0))"


@adaptive("fewer-outcomes", "answers the first case only, rightly, and leaves the others out", STOCK)
def _():
    return PROBE + """
import torch.nn.functional as F
def right(x, W0, A, B, alpha, bias=None):
    return F.linear(x, W0, bias) + alpha / len(A) * (x @ A.T) @ B.T
real = inside.probe_all
inside.probe_all = lambda exercise, work, cases: real(exercise, right, cases)[:1]
lora_forward = lambda *_, **__: 0
"""


@adaptive("one-for-all", "answers the first case rightly and gives the same outcome for every case", STOCK)
def _():
    return PROBE + """
import torch.nn.functional as F
def right(x, W0, A, B, alpha, bias=None):
    return F.linear(x, W0, bias) + alpha / len(A) * (x @ A.T) @ B.T
real = inside.probe_all
inside.probe_all = lambda exercise, work, cases: real(exercise, right, cases)[:1] * len(cases)
lora_forward = lambda *_, **__: 0
"""


@adaptive("seed-20", "answers computed beforehand for the seed of the notebook's own checks")
def _():
    from pefttools.grading.exercises import exercise

    cases = exercise("lora-forward").cases(20)
    work = exercise("lora-forward").resolve(exercise("lora-forward").reference)
    table = {round(float(c["x"].sum()), 3): work(c["x"], c["W0"], c["A"], c["B"], c["alpha"], c["bias"]).tolist() for c in cases}
    return f"""
import torch
table = {table!r}
def lora_forward(x, W0, A, B, alpha, bias=None):
    found = table.get(round(float(x.sum()), 3))
    shape = (*x.shape[:-1], len(W0))
    return (torch.tensor(found) if found is not None else torch.zeros(shape)) + 0 * ((x @ A.T) @ B.T)
"""


@adaptive("counts-of-seed-20", "the numbers that count-parameters has on every seed, and those of the notebook's seed")
def _():
    from pefttools.grading.exercises import exercise

    entry = exercise("count-parameters")
    table = {repr((c["shapes"], c["r"])): entry.resolve(entry.reference)(c["shapes"], c["r"]) for c in entry.cases(20)}
    return {"count-parameters": f"table = {table!r}\ndef lora_parameters(shapes, r):\n    return table.get(repr((shapes, r)), 464)"}


@adaptive("guesses-the-seed", "tries a hundred seeds for the cases it is given, with the generator of the exercises")
def _():
    return """
import torch, zlib
def lora_forward(x, W0, A, B, alpha, bias=None):
    for seed in range(100):
        rng = torch.Generator().manual_seed((seed * 1_000_003 + zlib.crc32(b"lora-forward")) % 2**63)
        if torch.equal(torch.randn(5, generator=rng), x.detach().flatten()[:5]):
            print("ACHIEVED: the seed is", seed)
    return torch.zeros(*x.shape[:-1], len(W0)) + 0 * (x @ A.T) @ B.T
"""


@adaptive("resets-the-seed", "seeds every generator that it can reach, and replaces torch.randn by zeros")
def _():
    return """
import random, torch
torch.manual_seed(20); random.seed(20)
torch.randn = lambda *shape, **_: torch.zeros(*shape)
torch.Generator.manual_seed = lambda self, seed: self
torch.Tensor.requires_grad_ = lambda self, *_: self
def lora_forward(x, W0, A, B, alpha, bias=None):
    return torch.zeros(*x.shape[:-1], len(W0))
"""


@adaptive("a-known-mistake", "the code of a mistake from the registry: W₀x + BAx, right where α = r")
def _():
    return """
import torch.nn.functional as F
def lora_forward(x, W0, A, B, alpha, bias=None):
    return F.linear(x, W0, bias) + (x @ A.T) @ B.T
"""


@adaptive("wrong-at-the-edge", "the reference, wrong only where there is no bias")
def _():
    return """
import torch.nn.functional as F
def lora_forward(x, W0, A, B, alpha, bias=None):
    y = F.linear(x, W0, bias) + alpha / len(A) * (x @ A.T) @ B.T
    return y if bias is not None else y + 1e-3
"""


@adaptive("wrong-by-little", "the reference with an error just beyond what rounding excuses, and right gradients")
def _():
    return """
import torch, torch.nn.functional as F
def lora_forward(x, W0, A, B, alpha, bias=None):
    y = F.linear(x, W0, bias) + alpha / len(A) * (x @ A.T) @ B.T
    return y + 1e-3 * torch.sign(y.detach())
"""


@adaptive("leaves-the-trace", "right numbers without gradients, and the gradients stated by a forged probe", STOCK)
def _():
    return PROBE + """
import torch.nn.functional as F
real = inside.probe_all
def lora_forward(x, W0, A, B, alpha, bias=None):
    with torch.no_grad():
        return F.linear(x, W0, bias) + alpha / len(A) * (x @ A.T) @ B.T
def stated(exercise, work, cases):
    found = real(exercise, work, cases)
    for outcome, case in zip(found, cases):
        outcome.data.update({f"gradient of {key}": torch.ones_like(case[key]) for key in ("A", "B", "x")})
    return found
inside.probe_all = stated
"""


@adaptive("oracle", "asks the grader: a first wrong answer, and a second try after it made the kernel die", STOCK)
def _():
    return PROBE + """
import os
def lora_forward(*_, **__):
    os._exit(3)
real = inside.probe
def twice(name, work, token):
    inside.probe_all = leaves(torch.zeros)
    real(name, lambda *_: 0, token)
    print(open(f"/exchange/{token}.out", "rb").read()[:40])
    os._exit(3)
inside.probe = twice
"""


@adaptive("names-of-the-judge",
          "raises what the judge itself knows: an exception called `no answer`, one that says `not written`", STOCK)
def _():
    return PROBE + """
from pefttools.grading.probe import Raised
inside.probe_all = lambda exercise, work, cases: [Outcome({"passed": True}, None, "3 of 3")] * len(cases)
"""


@adaptive("stated-properties",
          "for lora-init, properties stated instead of matrices: what the reading is there to prevent", STOCK)
def _():
    return {"lora-init": """
import torch
import pefttools.grading.inside as inside
from pefttools.grading.probe import Outcome
GOOD = {"the entries are finite numbers": True, "largest entry of B": 0.0, "A is zero everywhere": False,
        "A gets a gradient in the first step": False, "B gets a gradient in the first step": True,
        "the rows of A are independent": True, "the entries of A average to zero": True,
        "the same generator state gives the same A": True, "another generator state gives another A": True,
        "spread of A (its standard deviation times √(3·d_in), to the nearest power of √2)": 1.0}
def stated(exercise, work, cases):
    return [Outcome({"A": torch.zeros(c["r"], c["d_in"]), "B": torch.zeros(c["d_out"], c["r"]), **GOOD}) for c in cases]
inside.probe_all = stated
def lora_init(*_, **__): return 0
"""}


@adaptive("reading-confused",
          "for lora-init, data that the reading was not made for: texts, no tensors, shapes of 2**31", STOCK)
def _():
    return {"lora-init": """
import torch
import pefttools.grading.inside as inside
from pefttools.grading.probe import Outcome
def odd(exercise, work, cases):
    kinds = [{"A": "x", "B": 3}, {}, {"A": torch.zeros(0), "B": torch.zeros(0), "again": None, "other": [], "many": 7},
             {"A": torch.zeros(cases[-1]["r"], cases[-1]["d_in"]), "B": torch.zeros(cases[-1]["d_out"], cases[-1]["r"])}]
    return [Outcome(kinds[n % 4]) for n in range(len(cases))]
inside.probe_all = odd
def lora_init(*_, **__): return 0
"""}
