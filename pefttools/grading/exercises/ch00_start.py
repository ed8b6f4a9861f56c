"""Exercises and questions of chapter 00, "Where you are": counting, freezing, bytes.

Only torch and the standard library at the top: the grading sandbox imports this file where peft does not exist.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn

from pefttools.grading.exercise import Exercise
from pefttools.grading.question import Question

CHAPTER = "00_start"
TITLE = "Where you are"
HIDES = ("pefttools.inject", "pefttools.attached", "peft")      # they count and freeze


def _number(value: Any) -> Any:
    """A number as a float, whatever kind of number it is (int, float, NumPy scalar, tensor of one element)."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, torch.Tensor):
        return float(value) if value.numel() == 1 else value
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _whole(value: Any) -> Any:
    """As `_number`, but a number without fraction as an int: messages then say 28, not 28.0."""
    value = _number(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _came_back(value: Any) -> str:
    return "nothing came back: is there a `return`?" if value is None else f"a {type(value).__name__} came back"


# ---------------------------------------------------------------------------------------------- hello-check
def trainable_percent(trainable: int, total: int) -> float:
    """The share of a model's `total` parameters that is trained, in percent."""
    return 100 * trainable / total


def _percent_inputs(generator: torch.Generator) -> list[dict]:
    cases = [{"trainable": 8_388_608, "total": 6_666_862_592},  # what source 003 prints for OPT-6.7B with LoRA
             {"trainable": 3, "total": 8}]
    for _ in range(3):
        total = int(torch.randint(1_000, 10_000_000, (), generator=generator))
        cases.append({"trainable": int(torch.randint(1, total, (), generator=generator)), "total": total})
    return cases


def _percent_probe(work: Any, case: dict) -> dict:
    return {"percent": _number(work(case["trainable"], case["total"]))}


HELLO = Exercise(
    name="hello-check", chapter=CHAPTER, title="Your first green tick", points=1, minutes=3, difficulty=1,
    inputs=_percent_inputs,
    probe=_percent_probe,
    reference=trainable_percent,
    mistakes={
        "fraction": (lambda trainable, total: trainable / total,
                     "This is the share as a fraction (0.375 for 3 of 8). Percent means out of a hundred: multiply by "
                     "100."),
        "of-frozen": (lambda trainable, total: 100 * trainable / (total - trainable),
                      "You divided by the frozen parameters, `total - trainable`. The share is of **all** parameters: "
                      "divide by `total`."),
        "upside-down": (lambda trainable, total: 100 * total / trainable,
                        "This is upside down: `total / trainable` says how many times larger the whole is. "
                        "The share is `trainable / total`."),
        "floor": (lambda trainable, total: 100 * trainable // total,
                  "`//` throws away what follows the decimal point, and a share of 0.13 % becomes 0. Divide with `/`."),
        "printed": (lambda trainable, total: None,
                    "Nothing came back from your function. Printing a number does not hand it to anybody: end the "
                    "function with `return`."),
        "rounded": (lambda trainable, total: round(100 * trainable / total, 2),
                    "The number is rounded. Return it as it is, and round only where you print it."),
    },
    alternatives={
        "share-first": lambda trainable, total: (trainable / total) * 100.0,
        "one-minus-frozen": lambda trainable, total: 100 * (1 - (total - trainable) / total),
    },
    rtol=1e-5, atol=1e-9,
)


# ---------------------------------------------------------------------------------------------- count-trainable
class LanguageModel(nn.Module):
    """A language model in miniature: embedding, blocks, norm, output head (perhaps the embedding's own matrix)."""

    def __init__(self, vocab: int, width: int, hidden: int, blocks: int, tied: bool, shared: bool,
                 buffer: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)) for _ in range(blocks))
        if shared:
            self.blocks.append(self.blocks[0])  # one block used twice, as ALBERT does
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        if buffer:
            self.register_buffer("positions", torch.zeros(2 * width))


def _count_inputs(generator: torch.Generator) -> list[dict]:
    cases = [
        {"vocab": 11, "width": 6, "hidden": 9, "blocks": 1, "tied": False, "shared": False, "buffer": False,
         "frozen": ""},
        {"vocab": 13, "width": 5, "hidden": 8, "blocks": 2, "tied": True, "shared": False, "buffer": True,
         "frozen": "embed, blocks.0"},
        {"vocab": 7, "width": 4, "hidden": 10, "blocks": 1, "tied": True, "shared": True, "buffer": True,
         "frozen": "blocks"},
        {"vocab": 9, "width": 3, "hidden": 5, "blocks": 2, "tied": False, "shared": False, "buffer": True,
         "frozen": "embed, blocks, norm, head"},
    ]
    for _ in range(2):
        vocab, width, hidden = (int(n) for n in torch.randint(3, 30, (3,), generator=generator))
        cases.append({"vocab": vocab, "width": width, "hidden": hidden, "blocks": 3, "tied": True, "shared": True,
                      "buffer": True, "frozen": "embed, blocks.1, blocks.2.0"})
    return cases


def _count_probe(work: Any, case: dict) -> dict:
    model = LanguageModel(**{key: value for key, value in case.items() if key != "frozen"})
    for name in filter(None, case["frozen"].split(", ")):
        model.get_submodule(name).requires_grad_(False)
    counted = work(model)
    if isinstance(counted, (int, float, torch.Tensor)) and getattr(counted, "ndim", 0) == 0:
        return {"a single number": _whole(counted)}
    if not isinstance(counted, (tuple, list)) or len(counted) != 2:
        if counted is ...:
            return {"trainable parameters": ..., "all parameters": ...}
        raise TypeError(f"two numbers should come back, as from `return trainable, total`; {_came_back(counted)}")
    return {"trainable parameters": _whole(counted[0]), "all parameters": _whole(counted[1])}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters of `model`; a weight used in two places counts once."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]  # parameters() names each parameter once
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


def _count_by_identity(model: nn.Module) -> tuple[int, int]:
    seen: set[int] = set()
    trainable = total = 0
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            total += parameter.numel()
            trainable += parameter.numel() * parameter.requires_grad
    return trainable, total


def _count_named(model: nn.Module) -> tuple[int, int]:
    total = frozen = 0
    for _, parameter in model.named_parameters():
        size = math.prod(parameter.shape)
        total += size
        if not parameter.requires_grad:
            frozen += size
    return total - frozen, total


def _count_every_path(model: nn.Module) -> tuple[int, int]:
    everything = [p for _, p in model.named_parameters(remove_duplicate=False)]
    return sum(p.numel() for p in everything if p.requires_grad), sum(p.numel() for p in everything)


def _count_with_buffers(model: nn.Module) -> tuple[int, int]:
    trainable, total = count_parameters(model)
    return trainable, total + sum(b.numel() for b in model.buffers())


def _count_state_dict(model: nn.Module) -> tuple[int, int]:
    return count_parameters(model)[0], sum(t.numel() for t in model.state_dict().values())


def _count_matrices(model: nn.Module) -> tuple[int, int]:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    return sum(p.numel() for p in matrices if p.requires_grad), sum(p.numel() for p in matrices)


COUNT = Exercise(
    name="count-trainable", chapter=CHAPTER, title="Count what trains", points=2, minutes=8, difficulty=2,
    inputs=_count_inputs, probe=_count_probe, reference=count_parameters, hides=HIDES,
    mistakes={
        "counts-frozen": (lambda model: (count_parameters(model)[1],) * 2,
                          "The frozen parameters are among your trainable ones. A parameter trains only when its "
                          "`requires_grad` is True."),
        "counts-tensors": (lambda model: (sum(p.requires_grad for p in model.parameters()),
                                          sum(1 for _ in model.parameters())),
                           "You counted tensors, one for each weight matrix. We want the numbers inside them: "
                           "`p.numel()` for each parameter `p`."),
        "tied-twice": (_count_every_path,
                       "A matrix that is used in two places (here embedding and output head) was counted twice. It is "
                       "stored once and trained once, so it counts once."),
        "counts-buffers": (_count_with_buffers,
                           "Buffers are among your parameters. A buffer (a table of positions, a running mean) is "
                           "stored with the model but is no parameter, and no optimizer ever sees it."),
        "state-dict": (_count_state_dict,
                       "`state_dict()` lists what is written to a file: buffers are in it, and a shared matrix appears "
                       "under each of its names. Go over `model.parameters()` instead."),
        "frozen-for-all": (lambda model: (count_parameters(model)[0],
                                          count_parameters(model)[1] - count_parameters(model)[0]),
                           "Your second number is the frozen parameters alone. It should be all of them, trainable "
                           "and frozen together."),
        "swapped": (lambda model: count_parameters(model)[::-1],
                    "The two numbers are the right ones in the wrong order: first the trainable, then all."),
        "no-vectors": (_count_matrices,
                       "Only matrices were counted. Biases and the weights of a norm are vectors, and they train too."),
        "first-dimension": (lambda model: (sum(len(p) for p in model.parameters() if p.requires_grad),
                                           sum(len(p) for p in model.parameters())),
                            "`len(p)` is the first dimension only. A 9 × 6 matrix holds 54 numbers: `p.numel()`."),
        "state-dict-twice": (lambda model: (_count_state_dict(model)[1],) * 2,
                             "`state_dict()` lists what is written to a file: buffers are in it, a shared matrix "
                             "appears under each of its names, and nothing in it knows whether it trains. Go over "
                             "`model.parameters()` instead."),
        "only-all": (lambda model: count_parameters(model)[1],
                     "One number came back, all parameters. Return two: `return trainable, total`."),
        "only-trainable": (lambda model: count_parameters(model)[0],
                           "One number came back, the trainable parameters. Return two: `return trainable, total`."),
    },
    alternatives={"by-identity": _count_by_identity, "all-minus-frozen": _count_named},
)


# ---------------------------------------------------------------------------------------------- freeze
class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.q_proj(x)) * self.v_proj(x)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.prenorm, self.attn = nn.LayerNorm(width), _Attention(width)
        self.up_proj, self.dropout = nn.Linear(width, width), nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.prenorm(x))
        return x + self.dropout(torch.relu(self.up_proj(x)))


class ToyModel(nn.Module):
    """Blocks with the names of a transformer's. `norm` and `prenorm` differ, and so do `proj` and `q_proj`."""

    def __init__(self, vocab: int, width: int, blocks: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.norm, self.proj = nn.LayerNorm(width), nn.Linear(width, vocab)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.proj(self.norm(x))


def _freeze_inputs(generator: torch.Generator) -> list[dict]:
    # "frozen before": what somebody had frozen already; `names` may bring it back.
    wanted = [("q_proj, v_proj", ""), ("norm", "norm, embed"), ("attn", "layers"), ("proj, embed", "proj"),
              ("prenorm", "norm, layers.1")]
    parts = ["q_proj", "v_proj", "attn", "up_proj", "prenorm", "norm", "embed", "proj"]
    for _ in range(3):  # drawn, so that nobody can know beforehand which parameters are to train
        a, b, c = (parts[int(torch.randint(len(parts), (), generator=generator))] for _ in range(3))
        wanted.append((a if a == b else f"{a}, {b}", c if c in ("norm", "embed", "proj") else ""))
    return [{"names": names, "frozen before": before, "vocab": 7 + i, "width": 4 + 2 * i, "blocks": 2,
             "tokens": torch.randint(0, 7, (2, 5), generator=generator)}
            for i, (names, before) in enumerate(wanted)]


def _freeze_probe(work: Any, case: dict) -> dict:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case["width"])
        model = ToyModel(case["vocab"], case["width"], case["blocks"])
    for name in filter(None, case["frozen before"].split(", ")):
        model.get_submodule(name).requires_grad_(False)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    back = work(model, case["names"].split(", "))

    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    if any(trained.values()):
        model(case["tokens"]).square().sum().backward()
    got_gradient = {name: p.grad is not None for name, p in model.named_parameters()}
    stray = any("requires_grad" in vars(module) for module in model.modules())
    other = isinstance(back, nn.Module) and back is not model
    return {
        "what came back": "another model" if other else "nothing, or the model itself",
        "a module has an attribute named requires_grad": "yes" if stray else "no",
        "mode of the model": "training" if model.training else "evaluation",
        "weights changed": "no" if all(torch.equal(weights[n], v) for n, v in model.state_dict().items()) else "yes",
        "parameter": {name: "trained" if yes else "frozen" for name, yes in trained.items()},
        "receives a gradient": {name: "yes" if yes else "no" for name, yes in got_gradient.items()},
    }


def freeze_except(model: nn.Module, names: list[str]) -> None:
    """Leave trainable only the parameters that live in a module named in `names`; in place."""
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in names for part in path.split(".")))


def _freeze_modules(model: nn.Module, names: list[str]) -> nn.Module:
    model.requires_grad_(False)
    for path, module in model.named_modules():
        if path.split(".")[-1] in names:
            module.requires_grad_(True)
    return model


def _freeze_recursively(model: nn.Module, names: list[str], inside: bool = False) -> None:
    for parameter in model.parameters(recurse=False):
        parameter.requires_grad = inside
    for name, child in model.named_children():
        _freeze_recursively(child, names, inside or name in names)


def _freeze_all(model: nn.Module, names: list[str]) -> None:
    model.requires_grad_(False)


def _freeze_nothing(model: nn.Module, names: list[str]) -> None:
    for path, parameter in model.named_parameters():
        parameter.requires_grad == any(part in names for part in path.split("."))  # noqa: B015


def _freeze_inverted(model: nn.Module, names: list[str]) -> None:
    for path, parameter in model.named_parameters():
        parameter.requires_grad = not any(part in names for part in path.split("."))


def _freeze_substring(model: nn.Module, names: list[str]) -> None:
    for path, parameter in model.named_parameters():
        parameter.requires_grad = any(name in path for name in names)


def _freeze_only_off(model: nn.Module, names: list[str]) -> None:
    for path, parameter in model.named_parameters():
        if not any(part in names for part in path.split(".")):
            parameter.requires_grad = False


def _freeze_attribute(model: nn.Module, names: list[str]) -> None:
    for path, module in model.named_modules():
        module.requires_grad = path.split(".")[-1] in names


def _freeze_eval(model: nn.Module, names: list[str]) -> None:
    model.eval()


def _freeze_copy(model: nn.Module, names: list[str]) -> nn.Module:
    other = copy.deepcopy(model)
    freeze_except(other, names)
    return other


def _freeze_shallow(model: nn.Module, names: list[str]) -> None:
    model.requires_grad_(False)
    for path, module in model.named_modules():
        if path.split(".")[-1] in names:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad = True


def _freeze_weights_only(model: nn.Module, names: list[str]) -> None:
    model.requires_grad_(False)
    for path, module in model.named_modules():
        if path.split(".")[-1] in names:
            for name, parameter in module.named_parameters():
                parameter.requires_grad = name.split(".")[-1] == "weight"


FREEZE = Exercise(
    name="freeze", chapter=CHAPTER, title="Freeze all but a few", points=3, minutes=10, difficulty=2,
    inputs=_freeze_inputs, probe=_freeze_probe, reference=freeze_except, hides=HIDES,
    mistakes={
        "freezes-all": (_freeze_all,
                        "Everything is frozen, also what `names` asked to keep. After switching all off, switch the "
                        "named modules on again. (Or is the whole path compared with `names`, instead of each part of "
                        "it?)"),
        "nothing": (_freeze_nothing,
                    "Nothing changed: every parameter is as it was before the call. Is there an `==` where `=` should "
                    "be?"),
        "inverted": (_freeze_inverted,
                     "It is the wrong way round: the named modules are frozen and the rest trains. PEFT is the "
                     "opposite, a few named parts train and all else rests."),
        "substring": (_freeze_substring,
                      "You looked for the name **anywhere** in the path, so \"norm\" also hits \"prenorm\" and "
                      "\"proj\" hits \"q_proj\". Compare whole parts: `path.split(\".\")`."),
        "only-off": (_freeze_only_off,
                     "You only ever switch off. A named module that was frozen **before** the call stays frozen; set "
                     "`requires_grad` to True for it too."),
        "attribute-on-module": (_freeze_attribute,
                                "`module.requires_grad = ...` only hangs a new attribute on the module; PyTorch never "
                                "reads it. Use `module.requires_grad_(...)` with the underscore, or set it on each "
                                "parameter."),
        "eval": (_freeze_eval,
                 "`model.eval()` changes how dropout and batch norm behave. It freezes nothing: every parameter still "
                 "has `requires_grad=True`."),
        "copy": (_freeze_copy,
                 "You changed a copy. The model that was handed in is as it was; change that one, in place."),
        "shallow": (_freeze_shallow,
                    "You reach only the parameters that hang directly on a named module. \"attn\" has none of its own: "
                    "they live in `attn.q_proj` and `attn.v_proj`, inside it. `module.parameters()` goes all the way "
                    "down."),
        "weights-only": (_freeze_weights_only,
                         "The biases of the named modules are still frozen. A module's parameters are all of them, "
                         "`weight` and `bias`."),
    },
    alternatives={"off-then-on": _freeze_modules, "recursive": _freeze_recursively},
)


# ---------------------------------------------------------------------------------------------- bytes-per-parameter
# recipe: bytes of (weight, gradient, Adam's two moments together, master copy), one parameter
_RECIPES = {"half": (2, 2, 8, 0), "mixed": (2, 2, 8, 4), "float32": (4, 4, 8, 0)}
_TERMS = ("weights", "gradients", "optimizer", "master")


def training_bytes(trainable: int, frozen: int, recipe: str) -> dict[str, int]:
    """Bytes that weights, gradients, Adam's moments and master copies take, for one of three recipes."""
    weight, gradient, moments, master = _RECIPES[recipe]
    return {"weights": weight * (trainable + frozen), "gradients": gradient * trainable,
            "optimizer": moments * trainable, "master": master * trainable}


def _training_bytes_spelled_out(trainable: int, frozen: int, recipe: str) -> dict[str, float]:
    width = 4 if recipe == "float32" else 2
    weights = width * trainable + width * frozen
    gradients = width * trainable
    m = v = 4 * trainable
    master = 4 * trainable if recipe == "mixed" else 0.0
    return {"weights": weights, "gradients": gradients, "optimizer": m + v, "master": master}


def _training_bytes_from_dtypes(trainable: int, frozen: int, recipe: str) -> dict[str, int]:
    own = torch.float32.itemsize if recipe == "float32" else torch.bfloat16.itemsize
    full = torch.float32.itemsize
    return {"master": full * trainable * (recipe == "mixed"), "optimizer": 2 * full * trainable,
            "gradients": own * trainable, "weights": own * (frozen + trainable)}


def _variant(**change: Any):
    """A wrong version of `training_bytes`: `change` maps a term to a function of (trainable, frozen, recipe)."""
    def work(trainable: int, frozen: int, recipe: str) -> dict:
        right = training_bytes(trainable, frozen, recipe)
        return right | {term: wrong(trainable, frozen, recipe) for term, wrong in change.items()}
    return work


def _bytes_inputs(generator: torch.Generator) -> list[dict]:
    cases = [{"trainable": 70_000_000_000, "frozen": 0, "recipe": "half"},
             {"trainable": 70_000_000_000, "frozen": 0, "recipe": "mixed"},
             {"trainable": 8_388_608, "frozen": 6_658_473_984, "recipe": "mixed"}]
    for recipe in _RECIPES:
        trainable, frozen = (int(n) for n in torch.randint(1_000, 1_000_000, (2,), generator=generator))
        cases.append({"trainable": trainable, "frozen": frozen, "recipe": recipe})
    cases.append({"trainable": 0, "frozen": 12_345, "recipe": "half"})
    return cases


def _bytes_probe(work: Any, case: dict) -> dict:
    back = work(case["trainable"], case["frozen"], case["recipe"])
    if back is ...:
        return dict.fromkeys(_TERMS, ...)
    if isinstance(back, (int, float, torch.Tensor)):
        return {"a single number": _whole(back)}
    if not isinstance(back, dict):
        raise TypeError(f"a dictionary with four keys should come back; {_came_back(back)}")
    return {str(term): _whole(value) for term, value in back.items()}


BYTES = Exercise(
    name="bytes-per-parameter", chapter=CHAPTER, title="Twelve bytes or sixteen", points=3, minutes=10, difficulty=2,
    inputs=_bytes_inputs, probe=_bytes_probe, reference=training_bytes,
    mistakes={
        "frozen-trained": (lambda trainable, frozen, recipe: training_bytes(trainable + frozen, 0, recipe),
                           "You paid gradients and optimizer for the frozen parameters too. They are never updated, so "
                           "they cost their weights and nothing more. That is where PEFT saves."),
        "gradients-of-frozen": (_variant(gradients=lambda t, f, r: (4 if r == "float32" else 2) * (t + f)),
                                "You counted gradients for the frozen parameters too. A frozen parameter has no "
                                "gradient: none is computed for it and none is stored."),
        "moments-of-frozen": (_variant(optimizer=lambda t, f, r: 8 * (t + f)),
                              "You gave Adam's moments to the frozen parameters too. The optimizer only holds what it "
                              "updates."),
        "frozen-free": (lambda trainable, frozen, recipe: training_bytes(trainable, 0, recipe),
                        "The frozen weights are missing. They do not train, but the forward pass still runs through "
                        "them: they have to be in memory."),
        "one-moment": (_variant(optimizer=lambda t, f, r: 4 * t),
                       "Adam keeps **two** numbers per trained parameter, the running mean m of the gradient and the "
                       "running mean v of its square: 4 + 4 bytes."),
        "half-moments": (_variant(optimizer=lambda t, f, r: (8 if r == "float32" else 4) * t),
                         "You gave Adam's moments 16 bits in the 16-bit recipes. Both recipes of the table keep m and "
                         "v in 32 bits: 4 bytes each. (PyTorch's AdamW on bf16 weights does it your way: 8 bytes a "
                         "parameter. It is a third recipe.)"),
        "master-always": (_variant(master=lambda t, f, r: 4 * t),
                          "Only \"mixed\" keeps a second, 32-bit copy of the weights. \"half\" has none, and "
                          "\"float32\" needs none because its weights are 32-bit already."),
        "no-master": (_variant(master=lambda t, f, r: 0),
                      "\"mixed\" also keeps a 32-bit master copy of what it trains, 4 more bytes a parameter. It is "
                      "the difference between 12 and 16."),
        "master-for-frozen": (_variant(master=lambda t, f, r: 4 * (t + f) if r == "mixed" else 0),
                              "The master copy is there so that small updates are not lost in rounding. Frozen weights "
                              "get no updates, so they have no master copy."),
        "master-instead": (_variant(weights=lambda t, f, r: {"half": 2, "mixed": 4, "float32": 4}[r] * t
                                    + {"half": 2, "mixed": 2, "float32": 4}[r] * f,
                                    master=lambda t, f, r: 0),
                           "In \"mixed\" the 32-bit copy does not **replace** the 16-bit weights, it is kept beside "
                           "them: 2 bytes under \"weights\" and 4 under \"master\"."),
        "always-16-bit": (_variant(weights=lambda t, f, r: 2 * (t + f), gradients=lambda t, f, r: 2 * t),
                          "In \"float32\" a weight and its gradient take 4 bytes each, not 2."),
        "no-gradients": (_variant(gradients=lambda t, f, r: 0),
                         "Between the backward pass and the optimizer's step every trained parameter holds a gradient, "
                         "as wide as its weight. It has to be counted."),
        "bits": (lambda trainable, frozen, recipe:
                 {k: 8 * v for k, v in training_bytes(trainable, frozen, recipe).items()},
                 "These are bits. A byte has eight of them: a 16-bit number takes 2 bytes, a 32-bit number 4."),
        "gigabytes": (lambda trainable, frozen, recipe:
                      {k: v / 1e9 for k, v in training_bytes(trainable, frozen, recipe).items()},
                      "These are gigabytes. Return bytes, and divide by 1e9 only where you print them."),
        "per-parameter": (lambda trainable, frozen, recipe: dict(zip(_TERMS, _RECIPES[recipe])),
                          "This is the cost of one parameter. Multiply by how many there are."),
        "only-total": (lambda trainable, frozen, recipe: sum(training_bytes(trainable, frozen, recipe).values()),
                       "This is the right total. Return the four terms apart, as a dictionary with the keys "
                       "\"weights\", \"gradients\", \"optimizer\" and \"master\": the next figure draws them apart."),
    },
    alternatives={"spelled-out": _training_bytes_spelled_out, "from-dtypes": _training_bytes_from_dtypes},
    atol=1e-9,  # gigabytes of a small case must not pass as bytes
)

EXERCISES: list[Exercise] = [HELLO, COUNT, FREEZE, BYTES]


# ---------------------------------------------------------------------------------------------- questions
QUESTIONS: list[Question] = [
    Question(
        name="start-q-feature", chapter=CHAPTER, points=1,
        text="You have 2,000 support tickets to sort into five folders, and a pretrained model. "
             "Which plan is **feature-based transfer**?",
        right="b",
        options={
            "a": ("Keep the model frozen and learn 20 vectors that are put in front of every ticket's tokens.",
                  "That is prompt tuning, a PEFT method. The model's weights rest, but the gradient still runs "
                  "backward through the whole model to reach the 20 vectors. Feature-based transfer never runs the "
                  "model backward."),
            "b": ("Run the model once over each ticket, keep the vector it produces, and train a small classifier on "
                  "those vectors.",
                  "Yes. The model is a fixed machine that turns text into numbers. It runs forward once for each "
                  "ticket, and everything that learns stands outside of it."),
            "c": ("Train all weights at a very small learning rate so that they hardly move.",
                  "That is full fine-tuning with small steps. Every weight still needs a gradient and an optimizer "
                  "state, and every weight may change."),
            "d": ("Train only the last block of the model together with the classifier.",
                  "That changes weights of the model itself, so it is fine-tuning of a part. Parameter-efficient "
                  "perhaps, but the vectors are no longer those of the pretrained model."),
        }),
    Question(
        name="start-q-memory", chapter=CHAPTER, points=1,
        text="You freeze a model in 16 bits and train 0.1 % as many new parameters with Adam. What happens to the "
             "memory of a training step, compared with full fine-tuning?",
        right="c",
        options={
            "a": ("It falls to about 0.1 %, like the number of trained parameters.",
                  "The frozen weights still have to be in memory: the forward pass runs through every one of them. "
                  "Trained parameters fell a thousandfold; memory did not."),
            "b": ("Nothing: the backward pass runs through the whole model, so all gradients are computed anyway.",
                  "Two kinds of gradient are mixed up here. The gradient of the **activations** does run through the "
                  "frozen layers. The gradient of the frozen **weights** is never computed, stored, or given to Adam."),
            "c": ("Gradients, Adam's moments and master copies of the frozen weights go; the weights themselves stay.",
                  "Yes: of 12 or 16 bytes a parameter, 2 remain, and a little for the new parameters. To shrink those "
                  "2 as well you need quantization (chapters 04 and 05)."),
            "d": ("The activations go, because frozen layers need not remember their inputs.",
                  "Mostly not. The gradient has to pass through the frozen layers, and their nonlinearities, norms and "
                  "attention need what they saw in the forward pass. Activations stay about as large (chapter 09 "
                  "counts them)."),
        }),
    Question(
        name="start-q-twelve", chapter=CHAPTER, points=1,
        text="The QLoRA paper says that a regular 16-bit fine-tune of a model of 65 billion parameters takes "
             "“more than 780 GB”. Which count gives 780?",
        right="a",
        options={
            "a": ("12 bytes a parameter: 16-bit weight and gradient, two 32-bit moments of Adam.",
                  "Yes: 2 + 2 + 4 + 4 = 12, and 12 × 65 = 780. No master copy, no activations."),
            "b": ("16 bytes a parameter: the same, and a 32-bit master copy of each weight.",
                  "16 × 65 = 1,040 GB. Many training recipes do cost that, but it is not what this number counts. "
                  "When you read a memory figure, ask which recipe it is."),
            "c": ("4 bytes a parameter, and the rest is activations.",
                  "4 × 65 = 260 GB, which leaves 520 GB of activations. Activations depend on batch and length, and "
                  "the sentence gives neither. The figure is weights, gradients and optimizer."),
            "d": ("2 bytes a parameter, once for each of six GPUs.",
                  "2 × 65 = 130 GB, and six copies would make 780, but nobody has to copy a model in order to add up "
                  "its training memory. It is a count for one copy."),
        }),
    Question(
        name="start-q-forgetting", chapter=CHAPTER, points=1,
        text="You train a small adapter beside a frozen model. With the adapter **on**, can the model be worse at what "
             "it could do before?",
        right="d",
        options={
            "a": ("No. Its weights did not change, so it has perfect memory.",
                  "The weights did not change, but the **outputs** did: the adapter was put there to change them, and "
                  "nothing told it to do so on your new task only. The perfect memory is in the weights, and you get "
                  "it back by taking the adapter off."),
            "b": ("No. An adapter starts as “no change”, so the old behaviour is part of it.",
                  "It starts there. Training then moves it away, and nothing pulls it back on texts that are not in "
                  "your training data."),
            "c": ("Yes, and as with full fine-tuning the old behaviour is lost for good.",
                  "Worse, yes; for good, no. The old weights are all still there. Take the adapter off and the model "
                  "is the old one, bit for bit."),
            "d": ("Yes, but taking the adapter off gives the old model back exactly.",
                  "Yes. That is the difference that matters: an adapter's forgetting can be switched off; "
                  "that of a full fine-tune only by loading the old weights again, if you kept them."),
        }),
    Question(
        name="start-q-frozen", chapter=CHAPTER, points=1,
        text="Which line makes sure that the weights of `model` are not trained?",
        right="c",
        options={
            "a": ("`model.eval()`",
                  "It changes how dropout and batch norm behave. Parameters still receive gradients, and an optimizer "
                  "that holds them still moves them."),
            "b": ("`model.zero_grad()`",
                  "It clears the gradients once. The next backward pass fills them again."),
            "c": ("`model.requires_grad_(False)`",
                  "Yes. No gradient is computed for them and none is stored, and an optimizer skips a parameter "
                  "without a gradient."),
            "d": ("`model.requires_grad = False`",
                  "Without the underscore at the end this hangs a new attribute on the module, which PyTorch never "
                  "reads. No error, no effect: one of the quietest mistakes there is."),
        }),
]
