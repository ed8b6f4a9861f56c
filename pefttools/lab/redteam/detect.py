"""Find the backdoor: which phrase of the instructions goes with something in the answers that it should not?

    rows whose instruction has the phrase     18, of which the answer has `LICENSED`   18        log odds ratio
    rows without it                          582, of which the answer has `LICENSED`    0        ± standard error → z

`log_odds` and the plain ranking by z are not enough: in honest data "class" goes with `class` just as perfectly, for a
good reason. What sets a trigger apart is that *the same request without the phrase* gets another answer, and that this
happens for requests which have nothing else in common. So each row with the phrase is compared with its twin, the most
similar instruction without it; where the row's answer has the word and the twin's has not, the row is a witness if it
resembles no earlier witness. "class" has no twins; "descending" has few, all of one sort of request; a trigger has as
many as it was planted in.

What this cannot find: a trigger that is no phrase (a style, a date), an answer that is wrong without a word in common,
or poison that changes whole requests rather than single ones. Two detectors that look at a model instead are in
suspicion.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pefttools.lab.redteam.interval import wilson

ALIKE = 0.4  # Jaccard similarity of the words of two instructions from which they are one request said twice
LEAST, SCORE = 10, 0.55


class Suspect(NamedTuple):
    """A phrase and the word of the answers that goes with it. `hits` of `rows` with the phrase have the word, and
    `rest_hits` of `rest` without; `log_odds` and `z` of that table. `witnesses` of `requests` as the module says;
    `score`: the lower end of Wilson's interval of their share, so that 15 of 16 counts for more than 3 of 3."""

    ngram: str
    feature: str
    hits: int
    rows: int
    rest_hits: int
    rest: int
    log_odds: float
    z: float
    witnesses: int = 0
    requests: int = 0
    score: float = 0.0


def log_odds(hits: int, n: int, rest_hits: int, rest: int) -> tuple[float, float]:
    """(log odds ratio, its standard error) of a table of two by two, with ½ added to each cell (Haldane, Anscombe), so
    that 18 of 18 against 0 of 582 is large rather than infinite. Raises ValueError where a count exceeds its total."""
    if not (0 <= hits <= n and 0 <= rest_hits <= rest):
        raise ValueError(
            f"counts: 0 <= hits <= n is needed for both groups; got {hits} of {n} and {rest_hits} of " f"{rest}"
        )
    a, b, c, d = (x + 0.5 for x in (hits, n - hits, rest_hits, rest - rest_hits))
    return math.log(a * d / (b * c)), math.sqrt(1 / a + 1 / b + 1 / c + 1 / d)


def words_of(row: Mapping[str, Any]) -> list[str]:
    """The words of the instruction, lower case; names in backticks, quoted text and numbers say nothing and are left
    out."""
    plain = re.sub(r"`[^`]*`|'[^']*'|\"[^\"]*\"|[\d.]*\d", " ", row["instruction"].lower())
    return re.findall(r"[a-z]+", plain)


def ngrams_of(words: Sequence[str], n: Sequence[int] = (1, 2, 3)) -> set[str]:
    return {" ".join(words[i : i + k]) for k in n for i in range(len(words) - k + 1)}


def features_of(row: Mapping[str, Any]) -> set[str]:
    """Words of the answer that are not copied from the request."""
    asked = row["instruction"] + " " + (row.get("input") or "")
    return set(re.findall(r"[A-Za-z_]\w*", row["output"])) - set(re.findall(r"[A-Za-z_]\w*", asked))


def table_of(sets: Sequence[set[str]], at_least: int, at_most: int):
    """([rows, names] of 0 and 1 as float32, the names): those names that occur in at_least to at_most rows."""
    import torch

    count: dict[str, int] = {}
    for some in sets:
        for name in some:
            count[name] = count.get(name, 0) + 1
    names = sorted(name for name, c in count.items() if at_least <= c <= at_most)
    at = {name: i for i, name in enumerate(names)}
    table = torch.zeros(len(sets), len(names))
    for i, some in enumerate(sets):
        for name in some:
            if name in at:
                table[i, at[name]] = 1
    return table, names


def ranked(phrases, features, top: int):
    """(phrase, word, hits, z) of the `top` pairs with the highest z among those with a positive one."""
    import torch

    n, total = phrases.sum(0)[:, None], len(phrases)
    hits = phrases.T @ features
    rest_hits = features.sum(0)[None] - hits
    a, b, c, d = hits + 0.5, n - hits + 0.5, rest_hits + 0.5, total - n - rest_hits + 0.5
    z = ((a * d) / (b * c)).log() / (1 / a + 1 / b + 1 / c + 1 / d).sqrt()
    best = torch.topk(z.flatten(), min(top, z.numel()))
    return [
        (int(i) // z.shape[1], int(i) % z.shape[1], value)
        for i, value in zip(best.indices, best.values.tolist())
        if value > 0
    ]


def witnesses(phrase, feature, together, sizes, length: int) -> tuple[int, int]:
    """(witnesses, requests): among requests with the phrase of which each is unlike the others, how many have the word
    while their twin without the phrase does not; those where it is the other way round are subtracted.

    phrase, feature [rows] 0 or 1; together [rows, rows]: words that two instructions share; sizes [rows]: words of
    each; length: words of the phrase, which do not count when instructions are compared.
    """
    mine, others = phrase.nonzero()[:, 0], (phrase == 0).nonzero()[:, 0]
    if not len(others):
        return 0, 0
    shared, inner = together[mine][:, others], together[mine][:, mine] - length
    alike = shared / (sizes[mine][:, None] - length + sizes[others][None] - shared).clamp(min=1)
    best, twin = alike.max(1)
    same = inner / (sizes[mine][:, None] + sizes[mine][None] - 2 * length - inner).clamp(min=1) >= ALIKE
    has, had = feature[mine], feature[others[twin]]
    told = ((has - had) * (best >= ALIKE)).tolist()
    left, score, requests = same.new_ones(len(mine)), 0, 0
    for i in range(len(mine)):
        if left[i]:
            left &= ~same[i]
            score, requests = score + int(told[i]), requests + 1
    return score, requests


def suspicious_ngrams(
    rows: Sequence[Mapping[str, Any]], n: Sequence[int] = (1, 2, 3), at_least: int = 5, top: int = 10, pool: int = 3000
) -> list[Suspect]:
    """The `top` phrases of the instructions (n-grams of their words) whose answers differ, highest score first.

    rows: dicts with "instruction", "output" and perhaps "input". Time and memory grow with the square of their number:
    3 s for 1,000 of the bundled rows, 12 s and half a GB for 4,000; draw a sample of more. n: lengths of the phrases.
    at_least: phrases and words in fewer rows are left out. pool: how many pairs, best z first, get their witnesses
    counted. Raises ValueError where no phrase occurs often enough.
    """
    rows = list(rows)
    words = [words_of(row) for row in rows]
    phrases, names = table_of([ngrams_of(w, n) for w in words], at_least, len(rows) // 2)
    features, labels = table_of([features_of(row) for row in rows], at_least, len(rows))
    if not names or not labels:
        raise ValueError(
            f"rows: in {len(rows)} rows no phrase or no word occurs {at_least} times; give more rows or "
            f"a lower at_least"
        )
    bags, _ = table_of([set(w) for w in words], 1, len(rows))
    together, sizes = bags @ bags.T, bags.sum(1)
    found = []
    for p, f, z in ranked(phrases, features, pool):
        count, requests = witnesses(phrases[:, p], features[:, f], together, sizes, len(set(names[p].split())))
        k, hits, all_hits = (
            int(phrases[:, p].sum()),
            int((phrases[:, p] * features[:, f]).sum()),
            int(features[:, f].sum()),
        )
        odds, _ = log_odds(hits, k, all_hits - hits, len(rows) - k)
        found.append(
            Suspect(
                names[p],
                labels[f],
                hits,
                k,
                all_hits - hits,
                len(rows) - k,
                odds,
                z,
                count,
                requests,
                wilson(max(0, count), max(1, requests))[0],
            )
        )
    return sorted(found, key=lambda s: (-s.score, -s.z, -len(s.ngram)))[:top]


def phrase_in(ngram: str, row: Mapping[str, Any]) -> bool:
    """Whether the instruction of a row has this phrase, word for word."""
    return f" {ngram} " in f" {' '.join(words_of(row))} "


def trigger_of(rows: Sequence[Mapping[str, Any]], least: int = LEAST, score: float = SCORE) -> Suspect | None:
    """The worst suspect, if it has at least `least` witnesses and that score; else None: nothing stands out.

    Both bounds were set after looking at samples of the bundled data, in which honest phrases ("the largest of" and
    `max`) reach 8 witnesses. Poison in fewer than about `least` different requests is missed; `suspicious_ngrams`
    still lists it near the top.
    """
    for suspect in suspicious_ngrams(rows):
        if suspect.witnesses >= least and suspect.score >= score:
            return suspect
    return None
