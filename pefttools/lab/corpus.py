"""The text the bundled model is pretrained on: Python source under permissive licences.

Two kinds of source are read, nothing is downloaded:

* the standard library of the running Python (PSF licence), and
* unpacked packages of `PACKAGES`, each a folder of `.py` files (a wheel unzipped) under one directory.

A file is kept if it is text, of moderate size, parses as Python, and is not a near copy of a file already kept
(vendored copies are common, and a copy in both parts would make the held-out loss a lie). Held-out files are drawn
uniformly from all kept files with a seed; no line of training is spent on them.
"""

from __future__ import annotations

import ast
import json
import random
import re
import sysconfig
import warnings
from pathlib import Path

import numpy as np

# Package: licence. Only these are read; tests and data tables are left out (see `wanted`).
PACKAGES = {
    "aiohttp": "Apache-2.0", "algorithms": "MIT", "arrow": "Apache-2.0", "attrs": "MIT", "babel": "BSD-3-Clause",
    "beautifulsoup4": "MIT", "black": "MIT", "bokeh": "BSD-3-Clause", "boltons": "BSD-3-Clause",
    "celery": "BSD-3-Clause", "click": "BSD-3-Clause", "cryptography": "Apache-2.0 OR BSD-3-Clause",
    "dask": "BSD-3-Clause", "distributed": "BSD-3-Clause", "django": "BSD-3-Clause", "fastapi": "MIT",
    "flake8": "MIT", "flask": "BSD-3-Clause", "httpx": "BSD-3-Clause", "hypothesis": "MPL-2.0",
    "ipython": "BSD-3-Clause", "jedi": "MIT", "jinja2": "BSD-3-Clause", "lxml": "BSD-3-Clause", "matplotlib": "PSF",
    "more_itertools": "MIT", "mpmath": "BSD-3-Clause", "mypy": "MIT", "networkx": "BSD-3-Clause",
    "nltk": "Apache-2.0", "numpy": "BSD-3-Clause", "pandas": "BSD-3-Clause", "parso": "MIT", "pendulum": "MIT",
    "pip": "MIT", "pydantic": "MIT", "pydash": "MIT", "pygments": "BSD-2-Clause", "pyparsing": "MIT", "pytest": "MIT",
    "python_dateutil": "Apache-2.0 OR BSD-3-Clause", "requests": "Apache-2.0", "rich": "MIT", "rope": None,
    "scikit_image": "BSD-3-Clause", "scikit_learn": "BSD-3-Clause", "scipy": "BSD-3-Clause", "scrapy": "BSD-3-Clause",
    "seaborn": "BSD-3-Clause", "setuptools": "MIT", "sortedcontainers": "Apache-2.0", "sphinx": "BSD-2-Clause",
    "sqlalchemy": "MIT", "starlette": "BSD-3-Clause", "statsmodels": "BSD-3-Clause", "sympy": "BSD-3-Clause",
    "toolz": "BSD-3-Clause", "tornado": "Apache-2.0", "twisted": "MIT", "werkzeug": "BSD-3-Clause",
    "xarray": "Apache-2.0", "torch": "BSD-3-Clause", "transformers": "Apache-2.0",
}
COPYLEFT = ("hypothesis", "rope")  # weak or full copyleft: never read, whatever is unpacked
MAX_FILE = 60_000  # bytes; longer files are mostly tables
MAX_SOURCE = 12_000_000  # bytes of one package, so that no package is the corpus
SMALL_AND_CLEAR = ("algorithms", "boltons", "more_itertools", "pydash", "toolz")  # short functions: seen twice


def wanted(path: Path, source: str) -> bool:
    """Whether a file is worth reading: no test suites outside the standard library, no generated tables."""
    parts = {p.lower() for p in path.parts}
    if source == "transformers" and "models" in parts:
        return False  # generated near copies of one another
    if source != "python" and parts & {"tests", "test", "testing", "_vendor", "extern", "locale", "locale-data"}:
        return False
    return not parts & {"lib2to3", "idlelib", "site-packages"} or source != "python"


def line_hashes(text: str) -> set[int]:
    """Hashes of the lines long enough to be telling."""
    return {hash(s) for line in text.splitlines() if len(s := line.strip()) > 24}


def readable(path: Path) -> str | None:
    """The text of a Python file that is worth training on, or None."""
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None
    size = len(text.encode())
    if not 200 <= size <= MAX_FILE or sum(c.isdigit() for c in text) > 0.2 * len(text) or max(map(len, text.split("\n"))) > 600:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return None
    text = text.replace("\r\n", "\n").expandtabs(4)
    # A licence header says the same thing ten thousand times.
    text = re.sub(r"\A(?:#!.*\n)?(?:#.*\n)*(?=#.*(?:[Cc]opyright|[Ll]icen[sc]e))(?:#.*\n)+", "", text)
    return text.strip() + "\n"


def sources(packages: Path) -> dict[str, Path]:
    """Name → folder of every source that is here."""
    found = {"python": Path(sysconfig.get_paths()["stdlib"])}
    for name in sorted(PACKAGES):
        if name not in COPYLEFT and (packages / name).is_dir():
            found[name] = packages / name
    return found


def collect(packages: Path, *, held_out: int = 150, seed: int = 0) -> tuple[dict[str, list[str]], dict]:
    """Read all sources. Returns {"train": texts, "held_out": texts} and a description of what was read.

    `held_out` files are drawn uniformly from all files that were kept.
    """
    rng = random.Random(seed)
    files = []
    for source, folder in sources(packages).items():
        paths = sorted(p for p in folder.rglob("*.py") if wanted(p.relative_to(folder), source))
        rng.shuffle(paths)
        size = 0
        for path in paths:
            text = readable(path)
            if text is None:
                continue
            size += len(text)
            if size > MAX_SOURCE:
                break
            files.append((source, f"{source}/{path.relative_to(folder)}", text))
    rng.shuffle(files)
    seen: set[int] = set()
    kept = []
    for source, name, text in files:
        lines = line_hashes(text)
        if lines and len(lines & seen) > 0.5 * len(lines):
            continue
        seen |= lines
        kept.append((source, name, text))
    chosen = set(rng.sample(range(len(kept)), held_out))
    parts: dict[str, list[str]] = {"train": [], "held_out": []}
    about: dict = {"files_read": len(files), "files_kept": len(kept), "sources": {}, "held_out_files": []}
    for i, (source, name, text) in enumerate(kept):
        row = about["sources"].setdefault(
            source, {"licence": PACKAGES.get(source, "PSF"), "files": 0, "bytes": 0})
        row["files"] += 1
        row["bytes"] += len(text.encode())
        if i in chosen:
            parts["held_out"].append(text)
            about["held_out_files"].append(name)
        else:
            parts["train"] += [text] * (2 if source in SMALL_AND_CLEAR else 1)
    rng.shuffle(parts["train"])
    return parts, about


def train_tokenizer(texts: list[str], folder: Path, vocab_size: int = 4096) -> None:
    """Byte-level BPE with Llama-3's names for the special tokens, saved as a `PreTrainedTokenizerFast`.

    Digits are single tokens, so that a number can be copied digit by digit.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bos, eos, pad = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"
    tok = Tokenizer(models.BPE())
    # Words with their leading space; single digits; runs of punctuation; newlines with their indentation.
    pattern = r" ?[A-Za-z]+|\d| ?[^\sA-Za-z\d]+|\s*\n[ ]*(?=\S)|\s+(?!\S)|\s+"
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[bos, eos, pad], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tok.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tok.token_to_id(bos))])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token=bos, eos_token=eos, pad_token=pad, padding_side="right",
        clean_up_tokenization_spaces=False, model_max_length=1024)
    fast.save_pretrained(folder)


def encode(texts: list[str], tokenizer) -> np.ndarray:
    """All documents as one row of ids, each between a begin and an end token; `uint16`, shape [N]."""
    rows = []
    for i in range(0, len(texts), 512):
        for ids in tokenizer(texts[i:i + 512], add_special_tokens=False)["input_ids"]:
            rows.append(np.array([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id], dtype=np.uint16))
    return np.concatenate(rows)


def build(packages: Path, out: Path, *, vocab_size: int = 4096, seed: int = 0) -> dict:
    """Collect, train the tokenizer, encode. Writes tokenizer files, `train.npy`, `held_out.json`, `corpus.json`."""
    from transformers import AutoTokenizer

    out.mkdir(parents=True, exist_ok=True)
    parts, about = collect(packages, seed=seed)
    sample = random.Random(seed).sample(parts["train"], min(4000, len(parts["train"])))
    train_tokenizer(sample, out, vocab_size)
    ids = encode(parts["train"], AutoTokenizer.from_pretrained(out))
    np.save(out / "train.npy", ids)
    (out / "held_out.json").write_text(json.dumps(parts["held_out"]))
    about["train_bytes"] = sum(len(t.encode()) for t in parts["train"])
    about["train_tokens"] = int(ids.size)
    (out / "corpus.json").write_text(json.dumps(about, indent=1))
    return about
