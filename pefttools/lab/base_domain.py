"""Forgetting: how much worse a fine-tuned model is at what its base was pretrained for.

    before   loss per token of the base on text of its pretraining's kind that it never trained on
    after    the same with the adapter acting; change = after − before, paired over documents

`kept_out.jsonl.gz` holds the beginnings of the twelve standard-library files among the 150 that the bundled model's
pretraining kept out (`tiny/training.json` lists them). For another base they are text that it has in all likelihood
seen: the change says as much about forgetting, the level does not say how well it generalises.

An adapter on frozen weights can forget like any other fine-tune; what it cannot lose is the way back, for with the
adapter off the base is what it was, bit for bit (chapter 00).
"""

from __future__ import annotations

import contextlib
import gzip
import json
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from pefttools.lab.intervals import Interval, bootstrap, paired_bootstrap
from pefttools.lab.text import IGNORE

KEPT_OUT = Path(__file__).with_name("kept_out.jsonl.gz")
BYTES = 3000  # of each file, whole lines
BATCH = 16


@dataclass(frozen=True)
class Forgetting:
    """Losses in nats per token, and their change. `rows`: name, tokens, before, after of each document."""

    before: Interval
    after: Interval
    change: Interval
    rows: tuple[dict, ...]

    def __str__(self) -> str:
        return (f"{self.before.value:.3f} → {self.after.value:.3f} nats per token, {self.change} over {len(self.rows)} "
                "documents")


def base_texts(files: int | None = None) -> dict[str, str]:
    """{name: text} of the documents that were kept out of pretraining, the first `files` of them (all by default).

    Raises ValueError for fewer than one, FileNotFoundError or ValueError where the bundled file is missing or damaged.
    """
    if files is not None and files < 1:
        raise ValueError(f"files must be at least 1, got {files}")
    if not KEPT_OUT.is_file():
        raise FileNotFoundError(f"{KEPT_OUT} is missing: reinstall pefttools, or restore it from the repository")
    try:
        _, *rows = map(json.loads, gzip.decompress(KEPT_OUT.read_bytes()).decode().splitlines())
        texts = {row["name"]: row["text"] for row in rows}
    except Exception as error:  # zlib.error, OSError, EOFError, ValueError, KeyError
        raise ValueError(f"{KEPT_OUT} is damaged ({error}): restore it from the repository") from None
    return dict(list(texts.items())[:files])


@torch.no_grad()
def document_losses(model, tokenizer, texts: Sequence[str] | Mapping[str, str],
                    seq: int = 512) -> list[tuple[float, int]]:
    """(sum of the loss in nats, tokens) of each whole document, cut into windows of `seq` tokens, in order.

    As `pretrain.bits_per_byte`: a later window begins with the last token of the one before, so that every token but
    the first is predicted exactly once. Padding is neither read nor predicted.
    """
    texts = list(texts.values()) if isinstance(texts, Mapping) else list(texts)
    if not texts or seq < 1:
        raise ValueError("there are no documents" if not texts else f"seq must be at least 1, got {seq}")
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    windows = []
    for number, text in enumerate(texts):
        ids = [begin, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]
        windows += [(number, ids[i:i + seq + 1]) for i in range(0, len(ids) - 1, seq)]
    windows.sort(key=lambda window: len(window[1]))
    nats, tokens = [0.0] * len(texts), [0] * len(texts)
    for start in range(0, len(windows), BATCH):
        part = windows[start:start + BATCH]
        width = max(len(ids) for _, ids in part)
        x = torch.full((len(part), width), tokenizer.pad_token_id)
        y, mask = torch.full_like(x, IGNORE), torch.zeros_like(x)
        for row, (_, ids) in enumerate(part):
            x[row, :len(ids)] = y[row, :len(ids)] = torch.tensor(ids)
            mask[row, :len(ids)] = 1
        logits = model(input_ids=x.to(device), attention_mask=mask.to(device)).logits[:, -width:].float()
        each = F.cross_entropy(logits[:, :-1].transpose(1, 2), y[:, 1:].to(device), ignore_index=IGNORE,
                               reduction="none")
        for (number, ids), total in zip(part, each.sum(1).tolist()):
            nats[number] += total
            tokens[number] += len(ids) - 1
    model.train(was_training)
    return list(zip(nats, tokens))


def forgetting(model, tokenizer, texts: Mapping[str, str] | None = None, *,
               before: Sequence[tuple[float, int]] | None = None, seq: int = 512, seed: int = 0) -> Forgetting:
    """Loss on base-domain text before and after, with intervals over documents.

    model: with its adapter acting. Before is the same model with the adapter off, or, for a full fine-tune,
    before=document_losses(base_model, tokenizer, texts). texts: {name: document}; the bundled ones by default.
    Raises ValueError where there is no adapter to switch off and no `before`, or `before` is of other documents.
    """
    texts = base_texts() if texts is None else dict(texts)
    after = document_losses(model, tokenizer, texts, seq)
    if before is None:
        with without_adapter(model):
            before = document_losses(model, tokenizer, texts, seq)
    if [count for _, count in before] != [count for _, count in after]:
        raise ValueError(f"before must be document_losses of the same {len(texts)} documents with the same tokenizer: "
                         "the tokens differ")
    a, b, counts = [nats for nats, _ in after], [nats for nats, _ in before], [count for _, count in after]
    rows = tuple({"name": name, "tokens": count, "before": x / count, "after": y / count}
                 for name, count, x, y in zip(texts, counts, b, a))
    return Forgetting(bootstrap(b, counts, seed=seed), bootstrap(a, counts, seed=seed),
                      paired_bootstrap(a, b, counts, seed=seed), rows)


def without_adapter(model) -> contextlib.AbstractContextManager:
    """The base for the duration of a `with`: ours (`inject.disabled`) or peft's (`disable_adapter`)."""
    from pefttools.attached import adapter_layers
    from pefttools.inject import disabled

    if next(adapter_layers(model), None) is not None:
        return disabled(model)
    if callable(getattr(model, "disable_adapter", None)):
        return model.disable_adapter()
    raise ValueError("the model has no adapter that could be switched off to see the base: pass "
                     "before=document_losses(base_model, tokenizer, texts)")


def write(to: Path = KEPT_OUT) -> list[str]:
    """Make the bundled file from the running Python's library (3.11 has all twelve files); returns the names."""
    from pefttools.lab.base import TINY
    from pefttools.lab.corpus import readable

    library = Path(sysconfig.get_paths()["stdlib"])
    kept_out = json.loads((TINY / "training.json").read_text())["corpus"]["held_out_files"]
    licence = (library / "LICENSE.txt").read_text()
    first = licence.index("PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2")
    psf = licence[first:licence.index("BEOPEN.COM LICENSE AGREEMENT")]
    lines = [json.dumps({"licence": psf, "from": f"Python {sys.version.split()[0]}"})]
    names = []
    for name in kept_out:
        if name.startswith("python/") and (text := readable(library / name.removeprefix("python/"))):
            part = text.encode()[:BYTES].decode(errors="ignore")
            lines.append(json.dumps({"name": name, "text": part[:part.rindex("\n") + 1]}))
            names.append(name)
    to.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
    return names


if __name__ == "__main__":
    print("\n".join(write()))
