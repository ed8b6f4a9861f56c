"""Load a base model and its tokenizer: the bundled small Llama, Llama-3.2-1B, or any causal LM of the hub.

For the real Llama the order is: the gated repository (needs a token that accepted the licence), an ungated mirror of
the same weights, the bundled model. What was taken, and why, is printed and kept in `Base.why`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TINY = Path(__file__).parent / "tiny"
LLAMA_1B = ("meta-llama/Llama-3.2-1B", "unsloth/Llama-3.2-1B")  # gated, ungated mirror; one licence
# Their commits as dozens of public repositories have them in their caches' paths; the hub could not be asked here. Where it
# does not know one of them, the message says so, and load_base("unsloth/Llama-3.2-1B", revision="main") takes the newest.
REVISIONS = {"meta-llama/Llama-3.2-1B": "4e20de362430cd3b72f300e6b0f18e50e7166e08",
             "unsloth/Llama-3.2-1B": "9535bd9b1d1dea6acafbdc4813b728796aeb28da"}
PAD = "<|finetune_right_pad_id|>"  # Llama-3's tokenizers reserve it; the base models name no pad token


@dataclass
class Base:
    """A base model: `model`, `tokenizer`, the `name` it was loaded from, and `why` that one. Unpacks to the first two."""

    model: object
    tokenizer: object
    name: str
    why: str = ""

    def __iter__(self) -> Iterator:
        return iter((self.model, self.tokenizer))

    def __repr__(self) -> str:
        n = sum(p.numel() for p in self.model.parameters())
        return f"Base({self.name}: {type(self.model).__name__}, {n:,} parameters, {len(self.tokenizer):,} tokens. {self.why})"


def load_base(name: str = "tiny", *, dtype=None, device=None, revision: str | None = None, quiet: bool = False,
              **kwargs) -> Base:
    """Load `name` ("tiny", "llama-3.2-1b", or a hub id or folder) in eval mode.

    dtype: torch dtype of the weights; float32 on a CPU by default, float16 on a GPU (a T4 has no bfloat16).
    kwargs go to `from_pretrained` (for instance `quantization_config`, `attn_implementation`).
    Raises ValueError where nothing could be loaded, with the reason for each place that was tried.
    """
    import torch

    from pefttools.bnb import make_safe

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None:
        dtype = torch.float16 if str(device).startswith("cuda") and name != "tiny" else torch.float32
    if name == "tiny":
        base = Base(*load_tiny(dtype, **kwargs), "tiny", "the bundled model")
    elif name.lower() == "llama-3.2-1b":
        base = first_of(LLAMA_1B, dtype, kwargs)
    else:
        base = Base(*from_hub(name, dtype, revision, kwargs), name, "as asked")
    if "quantization_config" not in kwargs:
        base.model.to(device)
    if str(device) == "cpu":
        make_safe(base.model)  # where bitsandbytes quantized it: its CPU path has faults on some processors
    base.model.eval()
    if not quiet and name != "tiny":
        print(base)
    return base


def load_tiny(dtype, **kwargs):
    """The bundled model, after its files were checked against their recorded SHA-256."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as logs

    sums = TINY / "sha256.json"
    if not sums.exists():
        raise ValueError(f"the bundled model is not in {TINY}: reinstall pefttools, or restore the folder from the repository")
    for file, digest in json.loads(sums.read_text()).items():
        path = TINY / file
        if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise ValueError(f"{path} is {'missing' if not path.exists() else 'damaged (its checksum is another)'}: "
                             "reinstall pefttools, or restore the file from the repository")
    shown = logs.is_progress_bar_enabled()
    logs.disable_progress_bar()  # for a tenth of a second a bar is noise, and it goes to stderr
    try:
        model = AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype, local_files_only=True, **kwargs)
    finally:
        if shown:
            logs.enable_progress_bar()
    return model, tokenizer_of(TINY, local_files_only=True)


def first_of(names, dtype, kwargs) -> Base:
    """The first of several repositories that loads; the bundled model if none does. Says what was refused and why."""
    reasons = []
    for name in names:
        try:
            return Base(*from_hub(name, dtype, REVISIONS.get(name), kwargs), name, "; ".join([*reasons, "loaded"]))
        except ValueError as e:
            reasons.append(str(e))
            print(f"{e}\n→ trying the next", flush=True)
    model, tokenizer = load_tiny(dtype, **kwargs)
    return Base(model, tokenizer, "tiny", "the bundled model, because " + "; ".join(reasons))


def from_hub(name: str, dtype, revision, kwargs):
    """(model, tokenizer) of a hub id or a local folder. Every way to fail becomes a ValueError that says what would do."""
    from transformers import AutoModelForCausalLM

    silent = "" if Path(name).is_dir() else hub_fault()
    where = {"revision": revision, "local_files_only": bool(silent)}  # a silent hub costs minutes of retries
    noisy = logging.getLogger("huggingface_hub")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        tokenizer = tokenizer_of(name, **where)  # small: a refusal comes before a download of gigabytes
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **where, **kwargs), tokenizer
    except Exception as e:
        raise ValueError(f"{name}: {f'{silent}, and the model is not in the local cache' if silent else reason(e)}") from e
    finally:
        noisy.setLevel(level)


def hub_fault(timeout: float = 5.0) -> str:
    """Why the model hub cannot be used now, in a few words; empty if it answers. Takes `timeout` seconds at the most."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "the hub is switched off (HF_HUB_OFFLINE is set)"
    try:
        status = get_session().head(constants.ENDPOINT, timeout=timeout).status_code
    except Exception as e:
        return f"the hub does not answer ({type(e).__name__}): check the network"
    return f"the hub has a fault (HTTP {status}): try again later" if status >= 500 else ""


def reason(error: BaseException) -> str:
    """What a failure to load means, in one sentence, and what would help. Looks through the chain of causes."""
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    chain, e = [], error
    while e is not None and e not in chain:
        chain.append(e)
        e = e.__cause__ or e.__context__
    status = next((s for c in chain if (s := getattr(getattr(c, "response", None), "status_code", None))), None)

    def seen(*kinds) -> bool:
        return any(isinstance(c, kinds) for c in chain)

    if seen(GatedRepoError) or status in (401, 403):
        return "the hub refuses it: accept the licence on the model's page and set HF_TOKEN to a token that may read it"
    if seen(RevisionNotFoundError):
        return "the hub has no such revision of it"
    if seen(RepositoryNotFoundError) or status == 404:
        return "the hub knows no such model (or it is private and no HF_TOKEN is set)"
    if status and status >= 500:
        return f"the hub has a fault (HTTP {status}): try again later"
    if seen(LocalEntryNotFoundError, ConnectionError, TimeoutError) or any("httpx" in type(c).__module__ for c in chain):
        return "the hub does not answer and the model is not in the local cache: check the network"
    if any(sign in repr(c) for c in chain for sign in ("Consistency check", "IncompleteRead", "peer closed connection")):
        return "the hub sent less of a file than it announced: try again"
    if any("safetensors" in type(c).__module__.lower() or "SafetensorError" in type(c).__name__ for c in chain):
        return "its weights file is damaged: delete it from the local cache and load again"
    return f"cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'})"


def tokenizer_of(name, **kwargs):
    """The tokenizer of a model, with a pad token that is not its end-of-text token wherever the vocabulary has one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = PAD if PAD in tokenizer.get_vocab() else tokenizer.eos_token
    return tokenizer
