"""Chapter 07, prefix and prompt tuning: seven exercises and six questions.

Every answer is a function of what it is given (also the MLP's weights), so probes compare values: outputs, gradients,
and how many numbers train. Cases keep apart what is easily mixed up: P ≠ T, P ≠ H, H ≠ H_kv, d ≠ H·d_h. Imports only
torch and the standard library; references resolve when they are first used.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pefttools.grading.exercise import Exercise
from pefttools.grading.leaves import gradients, plain, randn
from pefttools.grading.question import Question

CHAPTER = "07_prefix"
TITLE = "Prefix and prompt tuning"
HIDES = ("pefttools.prefix", "pefttools.prefix_cache", "pefttools.prompt", "pefttools.ptuning",
         "pefttools.llama_adapter", "pefttools.virtual", "pefttools.virtual_config", "pefttools.virtual_inputs",
         "pefttools.prefix_config", "peft")


def several(value: Any, count: int, names: str, function: str) -> list:
    """The parts of what a function returned; TypeError, for the student to read, unless there are `count`."""
    if not isinstance(value, (tuple, list)) or len(value) != count:
        got = f"{len(value)} things" if isinstance(value, (tuple, list)) else f"a {type(value).__name__}"
        raise TypeError(f"{function} should return {names}; it returned {got}")
    return list(value)


# ================================================================================================ soft-prompt

def soft_inputs(rng: torch.Generator) -> list[dict]:
    def case(B: int, T: int, d: int, P: int, pad_left: bool = False) -> dict:
        lengths = torch.randint(1, T + 1, (B,), generator=rng)
        lengths[0] = T
        places = torch.arange(T).expand(B, T)
        mask = (places < lengths[:, None]).long()
        labels = torch.randint(3, 60, (B, T), generator=rng)
        labels[:, 0] = -100
        labels[mask == 0] = -100
        if pad_left:
            mask, labels = mask.flip(1), labels.flip(1)
        return {"embeds": randn(rng, B, T, d), "attention_mask": mask, "labels": labels, "prompt": randn(rng, P, d)}

    return [case(2, 5, 4, 3), case(1, 4, 6, 1), case(3, 2, 5, 7), case(4, 6, 3, 2, pad_left=True)]


def soft_probe(work: Callable, case: dict) -> dict[str, Any]:
    given = {name: tensor.clone() for name, tensor in case.items()}
    prompt, embeds = given["prompt"].requires_grad_(), given["embeds"].requires_grad_()
    found = several(work(embeds, given["attention_mask"], given["labels"], prompt), 3,
                    "three tensors, (embeds, attention_mask, labels)", "soft_prompt")
    return {"embeds": plain(found[0]), "attention_mask": plain(found[1]), "labels": plain(found[2]),
            "what was given is left as it was": all(torch.equal(given[name].detach(), case[name]) for name in case),
            **gradients(found[0], prompt=prompt, embeds=embeds)}


def soft_reference(embeds, attention_mask, labels, prompt):
    from pefttools.prompt import soft_prompt
    from pefttools.virtual_inputs import widen

    return soft_prompt(embeds, prompt), widen(attention_mask, len(prompt), 1), widen(labels, len(prompt), -100)


def make_soft(mask: int = 1, label: int = -100, behind: bool = False, mask_widens: bool = True,
              labels_widen: bool = True, detached: bool = False, labels_behind: bool = False):
    """soft_prompt with a switch for each thing that can go wrong; as the defaults stand it is right."""
    def soft_prompt(embeds, attention_mask, labels, prompt):
        B, P = len(embeds), len(prompt)
        rows = (prompt.detach() if detached else prompt).expand(B, -1, -1)

        def join(first, rest, turned=False):
            return torch.cat([rest, first] if behind or turned else [first, rest], dim=1)
        return (join(rows, embeds),
                join(attention_mask.new_full((B, P), mask), attention_mask) if mask_widens else attention_mask,
                join(labels.new_full((B, P), label), labels, labels_behind) if labels_widen else labels)
    return soft_prompt


def soft_overwrites(embeds, attention_mask, labels, prompt):
    P = len(prompt)
    return torch.cat([prompt[:embeds.shape[1]].expand(len(embeds), -1, -1), embeds[:, P:]],
                     dim=1), attention_mask, labels


def soft_one_row(embeds, attention_mask, labels, prompt):
    P = len(prompt)
    return (torch.cat([prompt, embeds], dim=1), F.pad(attention_mask, (P, 0), value=1),
            F.pad(labels, (P, 0), value=-100))


def soft_in_the_batch(embeds, attention_mask, labels, prompt):
    rows = prompt[:, None].expand(-1, embeds.shape[1], -1)
    return (torch.cat([rows, embeds]), torch.cat([attention_mask.new_ones(len(prompt), embeds.shape[1]),
                                                  attention_mask]),
            torch.cat([labels.new_full((len(prompt), embeds.shape[1]), -100), labels]))


def soft_floats(embeds, attention_mask, labels, prompt):
    B, P = len(embeds), len(prompt)
    return (torch.cat([prompt.expand(B, -1, -1), embeds], dim=1), torch.cat([torch.ones(B, P), attention_mask], dim=1),
            torch.cat([torch.full((B, P), -100.0), labels], dim=1))


def soft_float_mask(embeds, attention_mask, labels, prompt):
    embeds, mask, labels = make_soft()(embeds, attention_mask, labels, prompt)
    return embeds, mask.float(), labels


def soft_by_rows(embeds, attention_mask, labels, prompt):
    P = len(prompt)
    return (torch.stack([torch.cat([prompt, row]) for row in embeds]),
            torch.stack([torch.cat([torch.ones(P, dtype=row.dtype), row]) for row in attention_mask]),
            torch.stack([torch.cat([torch.full((P,), -100), row]) for row in labels]))


def soft_by_padding(embeds, attention_mask, labels, prompt):
    P = len(prompt)
    made = F.pad(embeds, (0, 0, P, 0))
    made = made + F.pad(prompt, (0, 0, 0, embeds.shape[1]))
    return made, F.pad(attention_mask, (P, 0), value=1), F.pad(labels, (P, 0), value=-100)


SOFT_PROMPT = Exercise(
    name="soft-prompt", chapter=CHAPTER, title="A soft prompt", points=2, minutes=5, difficulty=1,
    inputs=soft_inputs, probe=soft_probe, reference=soft_reference,
    mistakes={
        "prompt behind": (make_soft(behind=True),
            "The virtual tokens stand behind the words. In a causal model a word sees only what stands before it, so "
            "a prompt at the end would be seen by nobody. Put it first in torch.cat."),
        "prompt hidden": (make_soft(mask=0),
            "The attention mask is 0 over the virtual tokens, so no word may look at them: they would train nothing. "
            "Put ones in front."),
        "mask as it was": (make_soft(mask_widens=False),
            "The attention mask still has T columns, and the input now has P + T positions. Put P ones in front of "
            "it."),
        "labels as they were": (make_soft(labels_widen=False),
            "The labels still have T columns. The model gives P + T outputs, and each needs a label: put P times "
            "−100 in front."),
        "neither widened": (make_soft(mask_widens=False, labels_widen=False),
            "embeds is right, and mask and labels are still T wide. All three describe the same P + T positions."),
        "labels 0": (make_soft(label=0),
            "The label of a virtual token is 0 here, and 0 is a real token: the model would be trained to predict "
            "it. “Nothing to predict at this place” is written −100."),
        "labels 1": (make_soft(label=1),
            "The labels were widened like the mask, with ones; 1 is a real token. “Nothing to predict at this place” "
            "is written −100."),
        "labels −1": (make_soft(label=-1),
            "−1 is not the number that the loss ignores: F.cross_entropy leaves out targets of −100."),
        "floats": (soft_floats,
            "The numbers are right, and mask and labels have become floats: torch.ones and torch.full make floats when "
            "they are not told otherwise. attention_mask.new_ones(…) and labels.new_full(…) keep the dtype."),
        "a mask of floats": (soft_float_mask,
            "The numbers are right, and the mask has become one of floats: torch.ones makes floats when it is not told "
            "otherwise. attention_mask.new_ones(B, P) keeps the dtype."),
        "labels behind": (make_soft(labels_behind=True),
            "The −100s stand behind the labels and the prompt stands in front of the words: every label has moved "
            "away from its word by P places."),
        "overwrites words": (soft_overwrites,
            "The prompt has taken the place of the first words. It is put in front of them: P + T positions come "
            "out."),
        "along the batch": (soft_in_the_batch,
            "You joined along the batch, so the virtual tokens are rows of their own. They are positions: "
            "torch.cat(…, dim=1)."),
        "one prompt, many rows": (soft_one_row,
            "The prompt is [P, d], without a batch dimension, and torch.cat needs one row of it for each row of "
            "embeds: prompt.expand(B, -1, -1)."),
        "no gradient": (make_soft(detached=True),
            "The numbers are right, and the prompt cannot learn from them: .detach(), .data or no_grad has cut it "
            "off."),
    },
    alternatives={"row by row": soft_by_rows, "by padding": soft_by_padding},
    accepts="function", hides=HIDES)


# ================================================================================================ count

def counts_inputs(rng: torch.Generator) -> list[dict]:
    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=rng))

    cases = [{"layers": 16, "d_model": 2048, "heads": 32, "kv_heads": 8, "head_dim": 64, "P": 20, "hidden": 512},
             {"layers": 6, "d_model": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "P": draw(3, 40), "hidden": 100}]
    for _ in range(2):
        kv_heads, head_dim = draw(2, 5), draw(5, 40)
        cases.append({"layers": draw(2, 9), "d_model": 3 * kv_heads * head_dim + draw(1, 50), "heads": 3 * kv_heads,
                      "kv_heads": kv_heads, "head_dim": head_dim, "P": draw(2, 30), "hidden": draw(3, 60)})
    return cases


def counts_probe(work: Callable, case: dict) -> dict[str, Any]:
    model = {name: case[name] for name in ("layers", "d_model", "heads", "kv_heads", "head_dim")}

    def count(method, *hidden):
        found = work(method, case["P"], dict(model), *hidden)
        if isinstance(found, Tensor) and found.numel() == 1:
            found = found.item()
        return int(found) if isinstance(found, float) and found.is_integer() else found

    return {"prompt tuning": count("prompt"), "prefix tuning": count("prefix"),
            "prefix tuning through an MLP": count("prefix", case["hidden"])}


def counts_reference(method, P, model, hidden=None):
    from pefttools.prefix import prefix_count

    if method == "prompt":
        return P * model["d_model"]
    return prefix_count(P, model["layers"], model["kv_heads"], model["head_dim"], hidden)


def make_counts(width="kv", both=2, prompt_layers=False, all_layers=True, biases=True, inputs=True, mlp=True,
                mlp_in="kv",
                prefix_too=False, tokens=True, prompt_width="d_model", per_layer_mlp=False):
    """virtual_parameters with a switch for each thing that can go wrong; as the defaults stand it is right."""
    def virtual_parameters(method, P, model, hidden=None):
        L, d = model["layers"], model["d_model"]
        k = {"kv": model["kv_heads"] * model["head_dim"], "heads": model["heads"] * model["head_dim"], "d_model": d}
        P = P if tokens else 1
        if method == "prompt":
            return P * k.get(prompt_width, d) * (L if prompt_layers else 1)
        out = both * k[width] * (L if all_layers else 1)
        if hidden is None or not mlp:
            return P * out
        d_in = k[mlp_in]
        b = 1 if biases else 0
        last = (hidden + b) * out if not per_layer_mlp else (hidden + b) * out * L
        return P * d_in * inputs + (d_in + b) * hidden + last + P * out * prefix_too
    return virtual_parameters


def counts_built(method, P, model, hidden=None):
    """On the meta device: shapes without numbers."""
    k = model["kv_heads"] * model["head_dim"]
    out = 2 * k * model["layers"]
    with torch.device("meta"):
        parts = [nn.Embedding(P, model["d_model"])] if method == "prompt" else [nn.Embedding(
            P, out)] if not hidden else [
            nn.Embedding(P, k), nn.Linear(k, hidden), nn.Linear(hidden, out)]
    return sum(p.numel() for part in parts for p in part.parameters())


def counts_summed(method, P, model, hidden=None):
    k, total = model["kv_heads"] * model["head_dim"], 0
    if method == "prompt":
        return P * model["d_model"]
    if hidden is not None:
        total = P * k + k * hidden + hidden
    for _ in range(model["layers"]):
        for _ in ("keys", "values"):
            total += P * k if hidden is None else k * hidden + k
    return total


COUNT_VIRTUAL = Exercise(
    name="count-virtual-parameters", chapter=CHAPTER, title="Count the virtual parameters", points=2, minutes=6,
    difficulty=1, inputs=counts_inputs, probe=counts_probe, reference=counts_reference,
    mistakes={
        "query heads": (make_counts(width="heads", mlp_in="heads"),
            "You count a prefix with as many heads as there are queries. With grouped-query attention there are fewer "
            "heads for keys and values, and the prefix consists of keys and values: kv_heads · head_dim columns."),
        "d_model wide": (make_counts(width="d_model", mlp_in="d_model"),
            "You take d_model for the width of a key, as in 2·p·d·L (sources 000 and 001). With grouped-query "
            "attention a layer's keys are kv_heads · head_dim wide."),
        "keys alone": (make_counts(both=1),
            "One of the two is missing: each layer gets P keys and P values."),
        "one layer": (make_counts(all_layers=False),
            "This is the prefix of one layer. Prefix tuning gives every layer its own."),
        "prompt in every layer": (make_counts(prompt_layers=True),
            "You give every layer a soft prompt. Prompt tuning puts its P vectors in front of the embedded words, "
            "once; what the layers make of them is computed and not trained."),
        "prompt as wide as the keys": (make_counts(prompt_width="kv"),
            "A soft prompt stands among the embedded words, so its vectors are d_model wide, and not as wide as "
            "keys."),
        "no P": (make_counts(tokens=False),
            "This is the count of a single virtual token: P is missing."),
        "MLP left out": (make_counts(mlp=False),
            "With `hidden` you count the prefix that the MLP computes. That is what the file holds after folding; what "
            "*trains* is the MLP's input, P · kv_heads · head_dim numbers, and the MLP's two layers."),
        "MLP and prefix": (make_counts(prefix_too=True),
            "You count the MLP and the prefix that comes out of it. With the MLP the prefix is a result, and no "
            "parameter; the parameters are the MLP's input and its two layers."),
        "no biases": (make_counts(biases=False),
            "The MLP's two linear layers have biases: hidden numbers for the first, and as many as it has outputs for "
            "the second."),
        "MLP's input left out": (make_counts(inputs=False),
            "The MLP alone is counted. Its input trains too: one vector of kv_heads · head_dim for each of the P "
            "virtual tokens."),
        "MLP's input d_model wide": (make_counts(mlp_in="d_model"),
            "The vectors that go into the MLP are kv_heads · head_dim wide here (as in peft), and not d_model."),
        "MLP in every layer": (make_counts(per_layer_mlp=True),
            "L is counted twice in the MLP's last layer: there is one MLP, and its output is the prefix of all layers "
            "at once, layers · 2 · kv_heads · head_dim numbers for each virtual token."),
    },
    alternatives={"built and counted": counts_built, "layer by layer": counts_summed},
    accepts="function", hides=HIDES)


# ================================================================================================ prefix-attention

def attention_inputs(rng: torch.Generator) -> list[dict]:
    def case(B: int, H: int, T: int, P: int, d_h: int) -> dict:
        return {"q": randn(rng, B, H, T, d_h), "k": randn(rng, B, H, T, d_h), "v": randn(rng, B, H, T, d_h),
                "prefix_k": randn(rng, P, H, d_h), "prefix_v": randn(rng, P, H, d_h)}

    return [case(1, 1, 3, 2, 4), case(2, 3, 5, 4, 6), case(2, 2, 4, 7, 3), case(1, 4, 2, 5, 8), case(3, 2, 6, 1, 5)]


def attention_probe(work: Callable, case: dict) -> dict[str, Any]:
    given = {name: tensor.clone().requires_grad_() for name, tensor in case.items()}
    output = work(**given)
    return {"output": plain(output), **gradients(output, prefix_k=given["prefix_k"], prefix_v=given["prefix_v"],
                                                 q=given["q"], v=given["v"])}


def causal(T: int, P: int = 0) -> Tensor:
    """[T, P + T], True where a word must not look: at what stands after it. The prefix is in front."""
    return F.pad(torch.ones(T, T, dtype=torch.bool).triu(1), (P, 0))


def make_attention(scale=lambda d_h, P: d_h ** -0.5, mask="right", fill=-math.inf, softmax=-1, order="front", keys=None,
                   after=False, swap=False, layout="right", heads_in_scale=False):
    """prefix_attention with a switch for each thing that can go wrong; as the defaults stand it is right."""
    def prefix_attention(q, k, v, prefix_k, prefix_v):
        B, H, T, d_h = q.shape
        P = len(prefix_k)
        turn = (lambda t: t.transpose(0, 1)) if layout == "right" else (lambda t: t.reshape(H, P, d_h))
        P_k, P_v = (turn(t).expand(B, -1, -1, -1) for t in (prefix_k, prefix_v))
        if swap:
            P_k, P_v = P_v, P_k
        parts = lambda first, rest: torch.cat([first, rest] if order == "front" else [rest, first], dim=2)  # noqa: E731
        K, V = parts(P_k, k), parts(P_v, v)
        scores = q @ K.mT * (scale(d_h, P) if heads_in_scale is False else (d_h * H) ** -0.5)
        hidden = {"right": causal(T, P), "none": torch.zeros(T, P + T, dtype=torch.bool),
                  "not itself": F.pad(torch.ones(T, T, dtype=torch.bool).triu(), (P, 0)),
                  "over both": torch.ones(T, P + T, dtype=torch.bool).triu(1),
                  "prefix hidden": causal(T, P).index_fill(1, torch.arange(P), True),
                  "upside down": F.pad(torch.ones(T, T, dtype=torch.bool).tril(-1), (P, 0))}[mask]
        if after:
            return scores.softmax(softmax).masked_fill(hidden, 0.0) @ V
        return scores.masked_fill(hidden, fill).softmax(softmax) @ V
    return prefix_attention


def attention_two_softmaxes(q, k, v, prefix_k, prefix_v):
    s = q.shape[-1] ** -0.5
    words = (q @ k.mT * s).masked_fill(causal(q.shape[2]), -math.inf).softmax(-1) @ v
    return words + (q @ prefix_k.transpose(0, 1).mT * s).softmax(-1) @ prefix_v.transpose(0, 1)


def attention_with_queries(q, k, v, prefix_k, prefix_v):
    """P more queries as well: the prefix's keys, asked."""
    P, T = len(prefix_k), q.shape[2]
    K, V = (torch.cat([p.transpose(0, 1).expand(len(q), -1, -1, -1), t], dim=2)
            for p, t in ((prefix_k, k), (prefix_v, v)))
    Q = torch.cat([K[:, :, :P], q], dim=2)
    return (Q @ K.mT * q.shape[-1] ** -0.5).masked_fill(causal(P + T), -math.inf).softmax(-1) @ V


def attention_keys_only(q, k, v, prefix_k, prefix_v):
    K = torch.cat([prefix_k.transpose(0, 1).expand(len(q), -1, -1, -1), k], dim=2)
    return (q @ K.mT * q.shape[-1] ** -0.5).masked_fill(causal(q.shape[2], len(prefix_k)), -math.inf).softmax(-1) @ v


def attention_shapes_as_given(q, k, v, prefix_k, prefix_v):
    K, V = torch.cat([prefix_k, k], dim=2), torch.cat([prefix_v, v], dim=2)
    return (q @ K.mT).softmax(-1) @ V


def attention_no_prefix(q, k, v, prefix_k, prefix_v):
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(causal(q.shape[2]), -math.inf)
    return scores.softmax(-1) @ v + 0 * (prefix_k.sum() + prefix_v.sum())


def attention_detached(q, k, v, prefix_k, prefix_v):
    return make_attention()(q, k, v, prefix_k.detach(), prefix_v.detach())


def attention_by_torch(q, k, v, prefix_k, prefix_v):
    K, V = (torch.cat([p.permute(1, 0, 2).expand(len(q), -1, -1, -1), t], dim=2)
            for p, t in ((prefix_k, k), (prefix_v, v)))
    return F.scaled_dot_product_attention(q, K, V, attn_mask=~causal(q.shape[2], len(prefix_k)))


def attention_prefix_last(q, k, v, prefix_k, prefix_v):
    """The prefix behind the words, with its mask: a softmax does not care for the order of its columns."""
    K, V = (torch.cat([t, p.permute(1, 0, 2).expand(len(q), -1, -1, -1)], dim=2)
            for p, t in ((prefix_k, k), (prefix_v, v)))
    scores = torch.einsum("bhtd,bhsd->bhts", q, K) / math.sqrt(q.shape[-1])
    hidden = F.pad(causal(q.shape[2]), (0, len(prefix_k)))
    return torch.einsum("bhts,bhsd->bhtd", scores.masked_fill(hidden, -1e9).softmax(-1), V)


def attention_word_by_word(q, k, v, prefix_k, prefix_v):
    out = []
    for t in range(q.shape[2]):
        K = torch.cat([prefix_k.transpose(0, 1).expand(len(q), -1, -1, -1), k[:, :, :t + 1]], dim=2)
        V = torch.cat([prefix_v.transpose(0, 1).expand(len(q), -1, -1, -1), v[:, :, :t + 1]], dim=2)
        weights = (K @ q[:, :, t, :, None]).squeeze(-1).div(q.shape[-1] ** 0.5).softmax(-1)
        out.append((weights[..., None] * V).sum(2))
    return torch.stack(out, dim=2)


def attention_as_a_mixture(q, k, v, prefix_k, prefix_v):
    s = q.shape[-1] ** -0.5
    of_words, of_prefix = (q @ k.mT * s).masked_fill(causal(q.shape[2]), -math.inf), q @ prefix_k.transpose(0, 1).mT * s
    share = (of_prefix.logsumexp(-1) - of_words.logsumexp(-1)).sigmoid()[..., None]
    return (1 - share) * (of_words.softmax(-1) @ v) + share * (of_prefix.softmax(-1) @ prefix_v.transpose(0, 1))


PREFIX_ATTENTION = Exercise(
    name="prefix-attention", chapter=CHAPTER, title="Attention with a prefix", points=4, minutes=12, difficulty=2,
    inputs=attention_inputs, probe=attention_probe, reference="pefttools.prefix:prefix_attention",
    mistakes={
        "no prefix": (attention_no_prefix,
            "This is plain causal attention, without the prefix: either it is never joined in front of k and v, or the "
            "mask hides it (the first P columns of the mask must stay open)."),
        "mask over both": (make_attention(mask="over both"),
            "The causal triangle begins at the first column, which now belongs to the prefix: the first word sees one "
            "virtual token, and words see other words only P places later. Every word sees the whole prefix; the "
            "triangle lies over the T columns of the words."),
        "no causal mask": (make_attention(mask="none"),
            "Words see the words that come after them. The prefix is open to all, but the T columns of the words need "
            "the causal triangle."),
        "mask upside down": (make_attention(mask="upside down"),
            "The causal mask is upside down: it hides what stands before a word and shows what comes after. Hide "
            "where the key's place is greater than the query's: triu(1)."),
        "not itself": (make_attention(mask="not itself"),
            "A word does not see itself: the triangle begins one column too early. Hide what comes *after* a word: "
            "triu(1) over the words' columns, not triu(0)."),
        "scale by the model's width": (make_attention(heads_in_scale=True),
            "The scores are divided by √(H · d_h), the width of all heads together. Each head's own are divided by "
            "√d_h."),
        "no scale": (make_attention(scale=lambda d_h, P: 1.0),
            "The scores are not divided by √d_h."),
        "scale d_h": (make_attention(scale=lambda d_h, P: 1 / d_h),
            "The scores are divided by d_h; it is the square root of d_h."),
        "scale by the keys": (make_attention(scale=lambda d_h, P: (d_h + P) ** -0.5),
            "The prefix's length went into the scale. √d_h is the width of one key; how many keys there are does not "
            "matter."),
        "masked with 0": (make_attention(fill=0.0),
            "Masked scores are set to 0, and e⁰ = 1 is a weight like any other. Before a softmax, “not at all” is "
            "−infinity."),
        "masked after the softmax": (make_attention(after=True),
            "You mask after the softmax: what is left no longer adds up to 1. Mask the scores, then take the softmax."),
        "softmax over queries": (make_attention(softmax=-2),
            "The softmax runs over the queries (dim=-2). For each query it is the weights of its *keys* that add up to "
            "1: dim=-1."),
        "two softmaxes": (attention_two_softmaxes,
            "You attend to the words and to the prefix separately and add the two. In prefix tuning both share one "
            "softmax, so what the prefix gets the words lose. (Two softmaxes and a gate are LLaMA-Adapter, later in "
            "this chapter.)"),
        "prefix at the back": (make_attention(order="back"),
            "The prefix stands behind the words and the mask is made for a prefix in front. Join the prefix first: "
            "torch.cat([prefix, words], dim=2)."),
        "keys and values swapped": (make_attention(swap=True),
            "prefix_k and prefix_v have changed places: keys are what a query is compared with, values are what is "
            "averaged."),
        "heads mixed up": (make_attention(layout="view"),
            "The prefix is stored as [P, H, d_h], and reshape (or view) to [H, P, d_h] mixes the heads: it only "
            "renames the axes. transpose(0, 1) swaps them."),
        "queries too": (attention_with_queries,
            "The prefix got queries as well, so P more outputs come back. Nobody reads them: only the T words ask. "
            "Leave q as it is."),
        "keys without values": (attention_keys_only,
            "You joined the prefix to the keys and not to the values, so P + T weights meet T values. Every key needs "
            "its value."),
        "no batch dimension": (attention_shapes_as_given,
            "The prefix is [P, H, d_h] and the keys are [B, H, T, d_h]: they cannot be joined like that. First "
            "transpose(0, 1) gives [H, P, d_h], then expand(B, -1, -1, -1) a copy for every row."),
        "no gradient": (attention_detached,
            "The numbers are right, and the prefix cannot learn from them: .detach(), .data or no_grad has cut it "
            "off."),
    },
    alternatives={"torch's own attention": attention_by_torch, "prefix last, with its mask": attention_prefix_last,
                  "word by word": attention_word_by_word, "as a mixture": attention_as_a_mixture},
    rtol=1e-4, atol=1e-5, accepts="function", hides=HIDES)


# ================================================================================================ prefix-for-gqa

def gqa_inputs(rng: torch.Generator) -> list[dict]:
    def case(P: int, L: int, H_kv: int, groups: int, d_h: int, B: int, layer: int) -> dict:
        return {"flat": randn(rng, P, L * 2 * H_kv * d_h), "layer": layer, "layers": L, "heads": H_kv * groups,
                "kv_heads": H_kv, "batch": B}

    return [case(5, 3, 2, 2, 4, 2, 1), case(3, 2, 2, 3, 5, 1, 0), case(4, 4, 3, 2, 2, 3, 3), case(6, 5, 3, 1, 4, 2, 2),
            case(1, 3, 2, 4, 6, 2, 2)]


def gqa_probe(work: Callable, case: dict) -> dict[str, Any]:
    flat = case["flat"].clone().requires_grad_()
    K, V = several(work(flat, case["layer"], case["layers"], case["heads"], case["kv_heads"], case["batch"]), 2,
                   "two tensors, (K, V)", "prefix_for_gqa")
    both = torch.cat([K, 2 * V]) if isinstance(K, Tensor) and isinstance(V, Tensor) and K.shape == V.shape else None
    return {"keys": plain(K), "values": plain(V), **gradients(both, flat=flat)}


def gqa_reference(flat, layer, layers, heads, kv_heads, batch):
    from pefttools.prefix import split_prefix

    d_h = flat.shape[1] // (2 * layers * kv_heads)
    return tuple(t.transpose(0, 1).repeat_interleave(heads // kv_heads, dim=0).expand(batch, -1, -1, -1)
                 for t in split_prefix(flat, layers, kv_heads, d_h)[layer])


def make_gqa(view="right", share="interleave", batch_first=True, turn="transpose", swap=False, which=lambda i, L: i,
             expand=True, batch=True):
    """prefix_for_gqa with a switch for each thing that can go wrong; as the defaults stand it is right."""
    def prefix_for_gqa(flat, layer, layers, heads, kv_heads, batch_size):
        P, d_h = len(flat), flat.shape[1] // (2 * layers * kv_heads)
        i = which(layer, layers)
        if view == "right":
            pair = [flat.view(P, layers, 2, kv_heads, d_h)[:, i, j] for j in (0, 1)]
        elif view == "keys first":
            pair = [flat.view(P, 2, layers, kv_heads, d_h)[:, j, i] for j in (0, 1)]
        elif view == "d_h first":
            pair = [flat.view(P, layers, 2, d_h, kv_heads)[:, i, j].mT for j in (0, 1)]
        elif view == "head by head":
            pair = [flat.view(P, layers, kv_heads, 2, d_h)[:, i, :, j] for j in (0, 1)]
        elif view == "P inside":
            pair = [flat.reshape(layers, 2, kv_heads, P, d_h)[i, j].transpose(0, 1) for j in (0, 1)]
        else:
            pair = [flat.view(P, layers, kv_heads, d_h, 2)[:, i, ..., j] for j in (0, 1)]
        out = []
        for t in reversed(pair) if swap else pair:
            t = t.transpose(0, 1) if turn == "transpose" else t.reshape(kv_heads, P, d_h) if turn == "reshape" else t
            axis = 1 if turn == "no" else 0
            if expand:
                n = heads // kv_heads
                t = t.repeat_interleave(n, dim=axis) if share == "interleave" else torch.cat([t] * n, dim=axis)
            out.append(t.expand(batch_size, *t.shape) if batch else t)
        return tuple(out)
    return prefix_for_gqa


def gqa_query_heads(flat, layer, layers, heads, kv_heads, batch):
    d_h = flat.shape[1] // (2 * layers * heads)
    pair = flat.view(len(flat), layers, 2, heads, d_h)[:, layer]
    return tuple(pair[:, j].transpose(0, 1).expand(batch, -1, -1, -1) for j in (0, 1))


def gqa_detached(flat, *sizes):
    return make_gqa()(flat.detach(), *sizes)


def gqa_by_slices(flat, layer, layers, heads, kv_heads, batch):
    width = flat.shape[1] // layers // 2
    d_h, begin = width // kv_heads, 2 * layer * width
    halves = flat[:, begin:begin + width], flat[:, begin + width:begin + 2 * width]
    return tuple(torch.stack([half[:, (h * kv_heads // heads) * d_h:(h * kv_heads // heads + 1) * d_h]
                              for h in range(heads)]).repeat(batch, 1, 1, 1) for half in halves)


def gqa_as_peft(flat, layer, layers, heads, kv_heads, batch):
    """As peft_model.py does it (view, permute, split), and repeat_kv as transformers has it."""
    d_h = flat.shape[1] // (2 * layers * kv_heads)
    past = flat.expand(batch, -1, -1).reshape(batch, len(flat), layers * 2, kv_heads, d_h).permute(2, 0, 3, 1, 4)
    K, V = past.split(2)[layer]
    n = heads // kv_heads
    return tuple(t[:, :, None].expand(-1, -1, n, -1, -1).reshape(batch, heads, len(flat), d_h) for t in (K, V))


PREFIX_FOR_GQA = Exercise(
    name="prefix-for-gqa", chapter=CHAPTER, title="A prefix out of a file, for grouped queries", points=4, minutes=12,
    difficulty=2, inputs=gqa_inputs, probe=gqa_probe, reference=gqa_reference,
    mistakes={
        "heads in the wrong order": (make_gqa(share="tile"),
            "The shapes are right and the heads are in the wrong order: 0, 1, 0, 1 where it should be 0, 0, 1, 1. "
            "Neighbouring query heads share a key head, so repeat each one: repeat_interleave, not repeat (or cat)."),
        "not repeated": (make_gqa(expand=False),
            "These are kv_heads heads. Each serves heads / kv_heads query heads, so repeat it that often "
            "(repeat_interleave along the heads)."),
        "query heads in the file": (gqa_query_heads,
            "You read the file as if it held one key head for every query head, so each head is cut too short and "
            "columns of different heads and layers get mixed up. It holds kv_heads heads; from them d_h follows."),
        "all keys first": (make_gqa(view="keys first"),
            "You read all layers' keys first, then all values. The columns go layer by layer: keys of layer 0, values "
            "of layer 0, keys of layer 1, …: view(P, layers, 2, kv_heads, d_h)."),
        "d_h before heads": (make_gqa(view="d_h first"),
            "Within the keys of a layer the columns go head by head, d_h columns each: the last two axes of the view "
            "are kv_heads, d_h, in this order."),
        "head by head": (make_gqa(view="head by head"),
            "You read key and value of one head, then of the next. Within a layer first come all keys, head by head, "
            "and then all values: view(P, layers, 2, kv_heads, d_h)."),
        "P inside": (make_gqa(view="P inside"),
            "The table has a row for each virtual token, so P is the first axis of the view: view(P, layers, 2, "
            "kv_heads, d_h). With another axis first the numbers of different tokens get mixed up."),
        "keys and values in turn": (make_gqa(view="in turn"),
            "You take every other column for a key. Within a layer all the keys come first and then all the values: "
            "the 2 stands right after the layers in the view."),
        "reshaped": (make_gqa(turn="reshape"),
            "reshape (or view) from [P, kv_heads, d_h] to [kv_heads, P, d_h] mixes virtual tokens and heads: it only "
            "renames the axes. transpose(0, 1) swaps them."),
        "P before heads": (make_gqa(turn="no"),
            "You return [B, P, H, d_h]. Attention wants the heads before the positions, [B, H, P, d_h]: one "
            "transpose is missing."),
        "swapped": (make_gqa(swap=True),
            "Keys and values have changed places: index 0 of the 2 is the keys."),
        "always layer 0": (make_gqa(which=lambda i, L: 0),
            "You always give the first layer's prefix. Every layer has its own: use `layer`."),
        "from the last layer": (make_gqa(which=lambda i, L: L - 1 - i),
            "The layers are counted from the back here. Layer 0 comes first in the file."),
        "no batch": (make_gqa(batch=False),
            "The batch dimension is missing: every row of the batch gets the same prefix, expand(batch, -1, -1, -1)."),
        "no gradient": (gqa_detached,
            "The numbers are right, and the prefix cannot learn from them: .detach(), .data or no_grad has cut it "
            "off."),
    },
    alternatives={"by slices": gqa_by_slices, "as peft and transformers do": gqa_as_peft},
    accepts="function", hides=HIDES)


# ================================================================================================ prefix-share

def share_inputs(rng: torch.Generator) -> list[dict]:
    return [{name: t for name, t in case.items() if name in ("q", "k", "prefix_k")} for case in attention_inputs(rng)]


def share_probe(work: Callable, case: dict) -> dict[str, Any]:
    given = {name: tensor.clone().requires_grad_() for name, tensor in case.items()}
    output = work(**given)
    return {"share of the prefix": plain(output), **gradients(output, prefix_k=given["prefix_k"])}


def all_weights(q, k, prefix_k, scale: bool = True, mask: bool = True) -> Tensor:
    K = torch.cat([prefix_k.transpose(0, 1).expand(len(q), -1, -1, -1), k], dim=2)
    scores = q @ K.mT * (q.shape[-1] ** -0.5 if scale else 1)
    return (scores.masked_fill(causal(q.shape[2], len(prefix_k)), -math.inf) if mask else scores).softmax(-1)


def make_share(read=lambda w, P: w[..., :P].sum(-1), **switches):
    """prefix_share with a switch for each thing that can go wrong; as the defaults stand it is right."""
    def prefix_share(q, k, prefix_k):
        return read(all_weights(q, k, prefix_k, **switches), len(prefix_k))
    return prefix_share


def share_by_count(q, k, prefix_k):
    P, T = len(prefix_k), q.shape[2]
    return (P / (P + torch.arange(1.0, T + 1))).expand(*q.shape[:3]) + 0 * prefix_k.sum()


def share_separate(q, k, prefix_k):
    s = q.shape[-1] ** -0.5
    return (q @ prefix_k.transpose(0, 1).mT * s).softmax(-1).sum(-1)


def share_by_logsumexp(q, k, prefix_k):
    s = q.shape[-1] ** -0.5
    of_words = (q @ k.mT * s).masked_fill(causal(q.shape[2]), -math.inf).logsumexp(-1)
    return torch.sigmoid((q @ prefix_k.transpose(0, 1).mT * s).logsumexp(-1) - of_words)


def share_by_values(q, k, prefix_k):
    """Attention with values 1 on the prefix and 0 on the words."""
    B, H, T, d_h = q.shape
    P = len(prefix_k)
    marks = torch.cat([torch.ones(P), torch.zeros(T)]).expand(B, H, -1)[..., None]
    K = torch.cat([prefix_k.permute(1, 0, 2).expand(B, -1, -1, -1), k], dim=2)
    return F.scaled_dot_product_attention(q, K, marks, attn_mask=~causal(T, P)).squeeze(-1)


PREFIX_SHARE = Exercise(
    name="prefix-share", chapter=CHAPTER, title="What the prefix gets, the words lose", points=2, minutes=8,
    difficulty=2,
    inputs=share_inputs, probe=share_probe, reference=make_share(),
    mistakes={
        "the words' share": (make_share(lambda w, P: w[..., P:].sum(-1)),
            "This is 1 − λ, the share of the words. λ is the sum over the first P columns."),
        "mean": (make_share(lambda w, P: w[..., :P].mean(-1)),
            "You take the mean over the virtual tokens; the share of the prefix is the sum of their weights."),
        "largest": (make_share(lambda w, P: w[..., :P].max(-1).values),
            "This is the largest single weight. The share of the prefix is the sum of its P weights."),
        "first alone": (make_share(lambda w, P: w[..., 0]),
            "This is the weight of the first virtual token. Add up all P of them."),
        "averaged over heads": (make_share(lambda w, P: w[..., :P].sum(-1).mean(1)),
            "The heads are averaged away. Each head looks in its own way: return [B, H, T]."),
        "weights themselves": (make_share(lambda w, P: w[..., :P]),
            "These are the P weights of each word. λ is their sum: one number for each word and head."),
        "by counting": (share_by_count,
            "This is P/(P + t), what the prefix would get if every key counted the same. The weights depend on the "
            "queries and the keys: take the softmax."),
        "its own softmax": (share_separate,
            "A softmax over the prefix alone always adds up to 1. The words have to be in it too: one softmax over "
            "all P + T keys."),
        "no scale": (make_share(scale=False), "The scores are not divided by √d_h."),
        "no causal mask": (make_share(mask=False),
            "Words that come later are in the softmax, too, and take some of the weight. Mask them first."),
    },
    alternatives={"by log-sum-exp": share_by_logsumexp, "attention over ones and zeros": share_by_values},
    rtol=1e-4, atol=1e-5, accepts="function", hides=HIDES)


# ================================================================================================ reparametrise

def fold_inputs(rng: torch.Generator) -> list[dict]:
    def case(P: int, d: int, hidden: int, width: int) -> dict:
        return {"E": randn(rng, P, d), "W1": randn(rng, hidden, d) * 0.5, "b1": randn(rng, hidden) * 0.5,
                "W2": randn(rng, width, hidden) * 0.5, "b2": randn(rng, width)}

    return [case(3, 4, 6, 10), case(4, 5, 3, 5), case(5, 2, 3, 7), case(1, 6, 4, 9)]


def fold_probe(work: Callable, case: dict) -> dict[str, Any]:
    prefix = work(*(case[name].clone() for name in ("E", "W1", "b1", "W2", "b2")))
    if not isinstance(prefix, nn.Module):
        raise TypeError(f"ReparametrisedPrefix makes a {type(prefix).__name__}, which is no nn.Module")

    def look(when: str) -> None:
        leaves[f"prefix, {when}"] = plain(prefix())
        leaves[f"numbers that train, {when}"] = sum(p.numel() for p in prefix.parameters() if p.requires_grad)
        leaves[f"numbers in the file, {when}"] = sum(t.numel() for t in prefix.state_dict().values())

    def step() -> None:
        """One step of plain gradient descent on everything that trains, for a fixed loss."""
        trained = [p for p in prefix.parameters() if p.requires_grad]
        output = prefix()
        if not trained or not isinstance(output, Tensor) or not output.requires_grad:
            return
        weights = torch.cos(torch.arange(output.numel(), dtype=output.dtype)).reshape(output.shape)
        found = torch.autograd.grad((output * weights).sum(), trained, allow_unused=True)
        with torch.no_grad():
            for p, g in zip(trained, found):
                p -= 0 if g is None else 0.1 * g

    leaves: dict[str, Any] = {}
    look("at the start")
    step()
    leaves["prefix, after a step"] = plain(prefix())
    prefix.fold()
    look("folded")
    prefix.fold()
    look("folded twice")
    step()
    leaves["prefix, folded and after another step"] = plain(prefix())
    return leaves


class Fold(nn.Module):
    """ReparametrisedPrefix with a switch for each thing that can go wrong; as the defaults stand it is right."""

    between = staticmethod(torch.tanh)
    at_the_end = staticmethod(lambda t: t)
    biases = True
    trains = ("E", "W1", "b1", "W2", "b2")
    parameters_at_all = True

    def __init__(self, E, W1, b1, W2, b2):
        super().__init__()
        for name, value in (("E", E), ("W1", W1), ("b1", b1), ("W2", W2), ("b2", b2)):
            if self.parameters_at_all:
                setattr(self, name, nn.Parameter(value, requires_grad=name in self.trains))
            else:
                setattr(self, name, value)
        self.folded = False

    def mlp(self):
        b1, b2 = (self.b1, self.b2) if self.biases else (None, None)
        return self.at_the_end(F.linear(self.between(F.linear(self.E, self.W1, b1)), self.W2, b2))

    def forward(self):
        return self.E if self.folded else self.mlp()

    def forget(self):
        for name in ("W1", "b1", "W2", "b2"):
            delattr(self, name)

    def fold(self):
        if not self.folded:
            self.E, self.folded = nn.Parameter(self.mlp().detach()), True
            self.forget()


def fold_like(**changes) -> type:
    return type("Fold", (Fold,), changes)


class FoldForgetsTheMLP(Fold):
    """Folding throws the MLP away without having asked it."""

    def fold(self):
        if not self.folded:
            self.folded = True
            self.forget()


class FoldInto(Fold):
    """Folds by a flag; the MLP stays in the module."""

    def fold(self):
        if not self.folded:
            self.E, self.folded = nn.Parameter(self.mlp().detach()), True


class FoldFreezesTheMLP(FoldInto):
    def fold(self):
        super().fold()
        for p in (self.W1, self.b1, self.W2, self.b2):
            p.requires_grad_(False)


class FoldFrozen(Fold):
    def fold(self):
        super().fold()
        self.E.requires_grad_(False)


class FoldStillRuns(Fold):
    """Stores the result, and forward runs the MLP on it again."""

    def fold(self):
        self.E = nn.Parameter(self.mlp().detach())


class FoldWithHistory(Fold):
    def fold(self):
        if not self.folded:
            self.E = self.mlp()


class FoldTwice(Fold):
    """The second fold has no MLP to ask any more."""

    def fold(self):
        self.E, self.folded = nn.Parameter(self.mlp().detach()), True
        self.forget()


FoldTwice.__name__ = FoldTwice.__qualname__ = "ReparametrisedPrefix"      # the error that it raises names its class


class FoldOwnWeights(Fold):
    """Fresh layers of the right sizes; the numbers that were given are not used."""

    def __init__(self, E, W1, b1, W2, b2):
        layers = nn.Linear(*W1.T.shape), nn.Linear(*W2.T.shape)
        super().__init__(E, *(t.detach() for layer in layers for t in (layer.weight, layer.bias)))


class FoldNothing(Fold):
    def fold(self):
        pass


class FoldKeepsInput(Fold):
    """The prefix becomes a parameter beside E, which stays and trains on for nothing."""

    def forward(self):
        return self.P if self.folded else self.mlp()

    def fold(self):
        if not self.folded:
            self.P, self.folded = nn.Parameter(self.mlp().detach()), True
            self.forget()


class FoldWrongWay(Fold):
    def mlp(self):
        return torch.tanh(self.E @ self.W1 + self.b1) @ self.W2 + self.b2


class FoldSequential(nn.Module):
    def __init__(self, E, W1, b1, W2, b2):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(E, freeze=False)
        self.transform = nn.Sequential(nn.Linear(*W1.T.shape), nn.Tanh(), nn.Linear(*W2.T.shape))
        with torch.no_grad():
            for layer, W, b in ((self.transform[0], W1, b1), (self.transform[2], W2, b2)):
                layer.weight.copy_(W)
                layer.bias.copy_(b)

    def forward(self):
        return self.transform(self.embedding.weight)

    @torch.no_grad()
    def fold(self):
        self.embedding = nn.Embedding.from_pretrained(self(), freeze=False)
        self.transform = nn.Identity()


class FoldOptional(nn.Module):
    """Parameters set to None when they are no longer needed."""

    def __init__(self, *given):
        super().__init__()
        self.prefix, self.parts = None, nn.ParameterList([nn.Parameter(t) for t in given])

    def forward(self):
        if self.prefix is not None:
            return self.prefix
        E, W1, b1, W2, b2 = self.parts
        return (E @ W1.mT + b1).tanh() @ W2.mT + b2

    def fold(self):
        if self.prefix is None:
            value = self().clone().detach()
            self.prefix, self.parts = nn.Parameter(value), nn.ParameterList()


def fold_reference(E, W1, b1, W2, b2):
    """pefttools.prefix.PrefixTuning, with these weights put in."""
    from types import SimpleNamespace

    from pefttools.prefix import PrefixTuning

    # Any config whose prefix has the width of this MLP's input; the last layer is then given the width of the case.
    config = SimpleNamespace(num_attention_heads=1, hidden_size=E.shape[1], num_hidden_layers=1)
    prefix = PrefixTuning(config, len(E), hidden=len(W1))
    prefix.transform[2] = nn.Linear(*W2.T.shape)
    with torch.no_grad():
        for parameter, value in zip(prefix.parameters(), (E, W1, b1, W2, b2), strict=True):
            parameter.copy_(value)
    return prefix


REPARAMETRISE = Exercise(
    name="reparametrise", chapter=CHAPTER, title="Through an MLP, and folded away", points=4, minutes=12, difficulty=2,
    inputs=fold_inputs, probe=fold_probe, reference=fold_reference,
    mistakes={
        "no tanh": (fold_like(between=staticmethod(lambda t: t)),
            "There is no tanh between the two layers, so they are one linear map and nothing is gained by having "
            "two."),
        "ReLU": (fold_like(between=staticmethod(torch.relu)),
            "There is a ReLU between the two layers. P-tuning has one there; prefix tuning (and peft) has a tanh."),
        "tanh at the end": (fold_like(at_the_end=staticmethod(torch.tanh)),
            "There is a tanh behind the second layer as well. Then no key and no value could be larger than 1; the "
            "second layer is plain."),
        "no biases": (fold_like(biases=False), "The biases b1 and b2 are not used."),
        "weights the wrong way round": (FoldWrongWay,
            "Two shapes do not meet. W1 is [hidden, d], outputs × inputs, as in nn.Linear, so it is E @ W1.T (or "
            "F.linear(E, W1, b1))."),
        "E frozen": (fold_like(trains=("W1", "b1", "W2", "b2")),
            "The MLP's input E does not train. It is what tells the P virtual tokens apart: make it a parameter, too."),
        "MLP frozen": (fold_like(trains=("E",)),
            "Only E trains. The MLP is there to be trained: W1, b1, W2 and b2 are parameters, too."),
        "plain tensors": (fold_like(parameters_at_all=False),
            "Nothing trains: a tensor in an attribute is no parameter. Wrap each one in nn.Parameter."),
        "does nothing": (FoldNothing,
            "fold() changes nothing. Afterwards the P × width numbers that the MLP gives are the one parameter, and "
            "the MLP is gone."),
        "MLP thrown away unasked": (FoldForgetsTheMLP,
            "fold() throws the MLP away, and what is left is its input E. What has to be kept is what the MLP *says* "
            "of E: compute that first."),
        "MLP stays": (FoldInto,
            "After fold() the prefix is right, and the MLP is still in the module: it trains for nothing and is "
            "written into the file. Delete its parameters (del self.W1, …)."),
        "MLP frozen and kept": (FoldFreezesTheMLP,
            "After fold() the MLP no longer trains, but it is still in the module and in the file. Delete its "
            "parameters (del self.W1, …)."),
        "E stays": (FoldKeepsInput,
            "After fold() the MLP's input E is still a parameter beside the prefix, of no use to anybody. Put the "
            "prefix in its place, or delete it."),
        "folded and frozen": (FoldFrozen,
            "After fold() nothing trains: the prefix is frozen, or a buffer. It should be a plain nn.Parameter, for "
            "one may want to train it on."),
        "MLP on the result": (FoldStillRuns,
            "After fold() your forward sends the folded prefix through the MLP once more. Once folded, forward gives "
            "the parameter as it is."),
        "with its history": (FoldWithHistory,
            "PyTorch refuses: what the MLP gives is a result with a history, and a parameter may not have one. Take "
            "its value: nn.Parameter(value.detach())."),
        "folding twice": (FoldTwice,
            "A matrix of the MLP is asked for when it is gone: either a second fold() looks for it, or the first one "
            "deletes it before it has asked it. Compute, keep, delete, in this order, and only if it has not been done "
            "yet."),
        "layers of its own": (FoldOwnWeights,
            "nn.Linear draws numbers of its own, and W1, b1, W2 and b2 are not used. Wrap the tensors that you are "
            "given, nn.Parameter(W1), or copy them into your layers."),
    },
    alternatives={"values by hand": Fold, "nn.Sequential": FoldSequential, "a list that is emptied": FoldOptional},
    rtol=1e-4, atol=1e-5, accepts="class", hides=HIDES)


# ================================================================================================ zero-init-gate

def gate_inputs(rng: torch.Generator) -> list[dict]:
    return [{**case, "gate": randn(rng, case["q"].shape[1])} for case in attention_inputs(rng)]


def gate_probe(work: Callable, case: dict) -> dict[str, Any]:
    given = {name: tensor.clone().requires_grad_() for name, tensor in case.items()}
    output = work(**given)
    leaves = {"output": plain(output)}
    at_zero = {name: tensor.clone().requires_grad_() for name, tensor in case.items()}
    with torch.no_grad():
        at_zero["gate"].zero_()
    start = work(**at_zero)
    leaves["output with gate = 0"] = plain(start)
    found = gradients(output, **{name: given[name] for name in ("gate", "prefix_k", "prefix_v", "q")})
    first = gradients(start, **{name: at_zero[name] for name in ("gate", "prefix_v")})
    return {**leaves, **{f"gradient {name[9:]} with gate = 0": value for name, value in first.items()}, **found}


def gate_reference(q, k, v, prefix_k, prefix_v, gate):
    from pefttools.llama_adapter import gated_prefix
    from pefttools.prefix import prefix_attention

    none = prefix_k[:0]
    return prefix_attention(q, k, v, none, none) + gated_prefix(q, prefix_k, prefix_v, gate[:, None, None])


def make_gate(gates=lambda g: g, words_gate=lambda g: 1, scale=True, hide=False, on_scores=False, per_head=True,
              of_words=None, masked=True):
    """gated_attention with a switch for each thing that can go wrong; as the defaults stand it is right."""
    def gated_attention(q, k, v, prefix_k, prefix_v, gate):
        s, T, P = q.shape[-1] ** -0.5, q.shape[2], len(prefix_k)
        g = gate[:, None, None] if per_head else gate.mean()
        scores = q @ k.mT * s
        words = (scores.masked_fill(causal(T), -math.inf) if masked else scores).softmax(-1) @ v
        scores = q @ prefix_k.transpose(0, 1).mT * (s if scale else 1)
        if hide:
            scores = scores.masked_fill(torch.ones(T, P, dtype=torch.bool).triu(1), -math.inf)
        if on_scores:
            return words + (g * scores).softmax(-1) @ prefix_v.transpose(0, 1)
        return words_gate(g) * words + gates(g) * (scores.softmax(-1) @ prefix_v.transpose(0, 1))
    return gated_attention


def gate_one_softmax(q, k, v, prefix_k, prefix_v, gate):
    """Weights of one softmax over everything; the gate on those of the prefix."""
    w = all_weights(q, k, prefix_k)
    P = len(prefix_k)
    return w[..., P:] @ v + gate[:, None, None] * (w[..., :P] @ prefix_v.transpose(0, 1))


def gate_ignored(q, k, v, prefix_k, prefix_v, gate):
    return make_attention()(q, k, v, prefix_k, prefix_v) + 0 * gate.sum()


def gate_along_the_width(q, k, v, prefix_k, prefix_v, gate):
    s, T = q.shape[-1] ** -0.5, q.shape[2]
    words = (q @ k.mT * s).masked_fill(causal(T), -math.inf).softmax(-1) @ v
    return words + gate * ((q @ prefix_k.transpose(0, 1).mT * s).softmax(-1) @ prefix_v.transpose(0, 1))


def gate_switch(q, k, v, prefix_k, prefix_v, gate):
    """An if in place of a product: right where the gate is zero, and then nothing can learn."""
    if not gate.any():
        return make_gate()(q, k, v, prefix_k, prefix_v, gate.detach())
    return make_gate()(q, k, v, prefix_k, prefix_v, gate)


def gate_prefix_only(q, k, v, prefix_k, prefix_v, gate):
    return make_gate(words_gate=lambda g: 0)(q, k, v, prefix_k, prefix_v, gate)


def gate_detached(q, k, v, prefix_k, prefix_v, gate):
    return make_gate()(q, k, v, prefix_k, prefix_v, gate.detach())


def gate_on_the_values(q, k, v, prefix_k, prefix_v, gate):
    V = gate[:, None, None] * prefix_v.transpose(0, 1)
    words = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return words + F.scaled_dot_product_attention(q, prefix_k.permute(1, 0, 2).expand(len(q), -1, -1, -1),
                                                  V.expand(len(q), -1, -1, -1))


def gate_as_the_authors(q, k, v, prefix_k, prefix_v, gate):
    """Two softmaxes side by side, the one of the prefix times the gate; then one product with all values."""
    s, P = q.shape[-1] ** -0.5, len(prefix_k)
    K, V = (torch.cat([p.permute(1, 0, 2).expand(len(q), -1, -1, -1), t], dim=2)
            for p, t in ((prefix_k, k), (prefix_v, v)))
    scores = (q @ K.mT * s).masked_fill(causal(q.shape[2], P), -math.inf)
    weights = torch.cat([gate.view(1, -1, 1, 1) * scores[..., :P].softmax(-1), scores[..., P:].softmax(-1)], dim=-1)
    return weights @ V


def gate_head_by_head(q, k, v, prefix_k, prefix_v, gate):
    heads = []
    for h in range(q.shape[1]):
        s = 1 / math.sqrt(q.shape[-1])
        words = (s * q[:, h] @ k[:, h].mT).masked_fill(causal(q.shape[2]), -math.inf).softmax(-1) @ v[:, h]
        heads.append(words + gate[h] * ((s * q[:, h] @ prefix_k[:, h].T).softmax(-1) @ prefix_v[:, h]))
    return torch.stack(heads, dim=1)


ZERO_INIT_GATE = Exercise(
    name="zero-init-gate", chapter=CHAPTER, title="The gate of LLaMA-Adapter", points=4, minutes=12, difficulty=2,
    inputs=gate_inputs, probe=gate_probe, reference=gate_reference,
    mistakes={
        "one softmax": (gate_one_softmax,
            "Prefix and words share one softmax here, and the gate comes after it: with the gate at 0 the words have "
            "already lost the weight that the prefix took, so this is not the base model. Each part has its own "
            "softmax."),
        "gate ignored": (gate_ignored,
            "This is prefix tuning, with one softmax over prefix and words; the gate has no part in it."),
        "no gate": (make_gate(gates=lambda g: 1),
            "The prefix's part is added in full, whatever the gate says. Multiply it by the gate."),
        "one minus": (make_gate(words_gate=lambda g: 1 - g),
            "You mix: (1 − g) times the words plus g times the prefix. The words' part stays as it is; only the "
            "prefix's part is gated."),
        "gate on the words": (make_gate(words_gate=lambda g: g, gates=lambda g: 1),
            "The gate stands before the words' part. It belongs to the prefix's: with the gate at 0 the words are left "
            "as they were."),
        "gate on everything": (make_gate(words_gate=lambda g: g),
            "The gate multiplies the words' part as well, so with the gate at 0 the layer gives nothing at all."),
        "sigmoid": (make_gate(gates=torch.sigmoid),
            "A sigmoid of 0 is 0.5: half of the prefix gets in from the start. The gate multiplies as it is."),
        "tanh": (make_gate(gates=torch.tanh),
            "You multiply by tanh(gate). The authors' code does that, too; asked for here is the gate itself, as in "
            "peft, so that the numbers can be compared."),
        "one plus": (make_gate(gates=lambda g: 1 + g),
            "The factor is 1 + gate: at the start the prefix's part is fully open. With the gate at 0 it has to be "
            "shut."),
        "inside the softmax": (make_gate(on_scores=True),
            "The gate multiplies the scores, before the softmax. With the gate at 0 all scores are equal, and the "
            "plain mean of the prefix's values gets in. Multiply the result."),
        "gates averaged": (make_gate(per_head=False),
            "All heads have one gate here, the mean of the gates. Each head has its own: gate[:, None, None]."),
        "gate along the width": (gate_along_the_width,
            "The gate meets the last dimension, which is d_h and not the heads. It is [H], and the result "
            "[B, H, T, d_h]: gate[:, None, None] puts it where the heads are."),
        "causal prefix": (make_gate(hide=True),
            "You put a causal mask over the prefix as well, so early words see only a part of it. Every word sees the "
            "whole prefix."),
        "words see later words": (make_gate(masked=False),
            "The causal mask over the words is missing."),
        "no scale": (make_gate(scale=False),
            "The prefix's scores are not divided by √d_h."),
        "prefix alone": (gate_prefix_only,
            "The words' own attention is missing from the output: add the gated part to it."),
        "shut for ever": (gate_switch,
            "With the gate at 0 no gradient reaches it: an if (or .detach()) has cut it off, and the gate stays shut "
            "for ever. Multiply, also by zero: the product's gradient is not zero."),
        "gate cannot learn": (gate_detached,
            "The numbers are right, and the gate cannot learn from them: .detach(), .data or .item() has cut it off."),
    },
    alternatives={"gate on the values": gate_on_the_values, "as the authors do": gate_as_the_authors,
                  "head by head": gate_head_by_head},
    rtol=1e-4, atol=1e-5, accepts="function", hides=HIDES)


EXERCISES: list[Exercise] = [SOFT_PROMPT, COUNT_VIRTUAL, PREFIX_ATTENTION, PREFIX_SHARE, PREFIX_FOR_GQA, REPARAMETRISE,
                             ZERO_INIT_GATE]


# ================================================================================================ questions

QUESTIONS: list[Question] = [
    Question(
        name="prefix-q-labels", chapter=CHAPTER, points=1, right="c",
        text="You put a soft prompt of 20 vectors in front of a text and give the model `labels` with −100 at those 20 "
             "places. Where does the gradient come from that trains the prompt?",
        options={
            "a": ("From nowhere: what has the label −100 gets no gradient.",
                  "−100 says that nothing is asked of the *output* at that place. The prompt is an input, and inputs "
                  "get their gradient from every output that looks at them."),
            "b": ("From the 20 outputs above the prompt.",
                  "Those have no target (−100), so they are not in the loss."),
            "c": ("From the words behind it: their outputs depend on the prompt through attention.",
                  "Right. The loss is over the answer's tokens, and each of them has looked at the prompt."),
            "d": ("From the embedding matrix, whose nearest rows it is pulled towards.",
                  "Nothing pulls it towards real words: a soft prompt may be any vectors, and after training its "
                  "nearest words often make no sense."),
        }),
    Question(
        name="prefix-q-why-not-q", chapter=CHAPTER, points=1, right="a",
        text="Suppose that the prefix also had queries, $[P_q; Q]$, beside its keys and values. What would change in "
             "the outputs at the words?",
        options={
            "a": ("Nothing at all.",
                  "Right: each query gives one output, its own. The prefix's outputs would stand above positions that "
                  "nobody reads; what words take from the prefix comes from its keys and values."),
            "b": ("They would attend more sharply, because more queries take part.",
                  "Queries do not compete with one another: the softmax runs over the keys, one query at a time."),
            "c": ("They would look for something else, because the words' queries are changed.",
                  "The words' queries are computed from the words and stay as they are; P more of them would only "
                  "stand beside them."),
            "d": ("It would be prompt tuning.",
                  "In prompt tuning the virtual tokens do pass through the layers with queries of their own, but those "
                  "serve to compute *their own* keys and values further up. Here keys and values are given in every "
                  "layer."),
        }),
    Question(
        name="prefix-q-gqa", chapter=CHAPTER, points=1, right="d",
        text="Two models have 32 layers, d_model = 4096 and 32 query heads of 128. The first has 32 heads for keys and "
             "values, the second has 8. A prefix of length 20 has 5,242,880 numbers in the first. And in the second?",
        options={
            "a": ("As many: d_model is the same.",
                  "2·p·d·L takes d_model for the width of a key. In the second model a layer's keys are 8 · 128 wide."),
            "b": ("Four times as many, because every group of queries needs its own copy.",
                  "The copies are made while computing, and are not trained: four query heads share one key head."),
            "c": ("Half: keys are shared, values are not.",
                  "Grouped-query attention shares both, keys and values."),
            "d": ("A quarter.", "Right: 20 · 32 · 2 · 8 · 128 = 1,310,720."),
        }),
    Question(
        name="prefix-q-file", chapter=CHAPTER, points=1, right="b",
        text="You train a prefix through an MLP: 500,000 numbers of the MLP and its input, and a prefix of 40,000 "
             "numbers comes out. You save the adapter as peft does. What is in the file, and what does it cost at "
             "inference?",
        options={
            "a": ("540,000 numbers; the MLP runs once for every token.",
                  "The MLP does not see the text at all. Its input is E, which is the same for every token."),
            "b": ("40,000 numbers; the MLP costs nothing any more.",
                  "Right: after training, what the MLP says is a constant. It is folded into the prefix and thrown "
                  "away."),
            "c": ("500,000 numbers; the MLP runs once when the adapter is loaded.",
                  "One could do it like that, and neither the paper nor peft does: only what the MLP says is kept."),
            "d": ("Nothing: the prefix is merged into the weights.",
                  "Virtual tokens are input and not weights: there is no weight that they could be added to."),
        }),
    Question(
        name="prefix-q-gate", chapter=CHAPTER, points=1, right="c",
        text="LLaMA-Adapter starts with the gate at 0 and the prompt random. In the **first** training step, which of "
             "the two gets a gradient that is not zero?",
        options={
            "a": ("Neither: zero times anything is zero.",
                  "The *output* is zero times something. The gate's gradient is that something itself."),
            "b": ("Both.", "The prompt's gradient is multiplied by the gate, and that is 0 in the first step."),
            "c": ("The gate alone.",
                  "Right, as with B and A in LoRA: the factor that is zero learns first, and the other follows."),
            "d": ("The prompt alone: the gate is switched off.",
                  "It is the other way round: what the prompt gives is multiplied by the gate, so its gradient is "
                  "zero, and the gate's is multiplied by what the prompt gives."),
        }),
    Question(
        name="prefix-q-cost", chapter=CHAPTER, points=1, right="b",
        text="A model with a trained prefix of length 100 serves a batch of 32 conversations. What does the prefix "
             "cost, compared with the base model?",
        options={
            "a": ("Nothing: it is merged into the weights.",
                  "LoRA can be merged. A prefix is not a change of a weight, and no weight does the same."),
            "b": ("100 more columns in every attention, and room for 100 more positions in the cache of each row.",
                  "Right. (The 100 positions are the same for all rows, and a server may keep them once; the library's "
                  "plain cache keeps them for each row.)"),
            "c": ("100 more positions in every layer: attention and feed-forward.",
                  "That is prompt tuning, once, when the text is read. A prefix enters as keys and values: nothing is "
                  "computed *at* its positions."),
            "d": ("100 more tokens for every new word that is generated.",
                  "They go into the cache once, at the first step; each new word only looks at them."),
        }),
]
