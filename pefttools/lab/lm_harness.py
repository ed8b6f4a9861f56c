"""Our adapters in EleutherAI's lm-evaluation-harness (`pip install "pefttools[lm-eval]"`): a second opinion on figures.

    lm_eval_model("my_adapter")                    the harness's own model, the adapter loaded by peft
    print(lm_eval_command("my_adapter", "hellaswag"))      the same as a command line, for its many tasks

An adapter folder is peft's format, so the harness needs nothing of ours. Its tasks come from the hub; `lab.evaluate`
needs no network. The harness counts in nats too: `loglikelihood` of a row's answer is minus our `row_losses`.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any


def lm_eval_model(adapter: str | Path, base: str | None = None, batch_size: int = 16, **options: Any) -> Any:
    """`lm_eval.models.huggingface.HFLM` of the base with the adapter in `adapter` loaded through peft.

    base: as in `report_card`; by default the one that the adapter names. options go to HFLM (device, dtype, …).
    Raises ImportError with what to install, NotAnAdapter for a folder that holds none.
    """
    where, folder = _places(adapter, base)
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        missing = error.name or error
        raise ImportError(f'lm-eval is not installed ({missing}): pip install "pefttools[lm-eval]"') from error
    return HFLM(pretrained=where, peft=folder, batch_size=batch_size, **{"device": "cpu", **options})


def lm_eval_command(adapter: str | Path, tasks: str, base: str | None = None) -> str:
    """The command line of the harness for this adapter; `tasks` as it names them, separated by commas."""
    where, folder = _places(adapter, base)
    given = shlex.quote(f"pretrained={where},peft={folder}")
    return f"lm_eval --model hf --model_args {given} --tasks {shlex.quote(tasks)}"


def _places(adapter: str | Path, base: str | None) -> tuple[str, str]:
    from pefttools.lab.base import LLAMA_1B, TINY
    from pefttools.lab.card_files import base_named, files_of

    name = base_named(files_of(Path(adapter))["config"]) if base is None else base
    known = {"tiny": str(TINY), "llama-3.2-1b": LLAMA_1B[0]}
    return known.get(name.lower(), name), str(Path(adapter).resolve())
