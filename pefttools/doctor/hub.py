"""Whether the model hub answers, and with whose token. Nothing in the course needs it but the large models."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from pefttools.doctor.report import Row

SECONDS = 3.0


class Background:
    """Run a function in a thread that cannot hold up the end of the program; `result` waits a bounded time for it."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.function = function
        self.value: object = TimeoutError("no answer in time")
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self) -> None:
        try:
            self.value = self.function()
        except Exception as e:
            self.value = e

    def __enter__(self) -> Background:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def result(self, seconds: float) -> object:
        """What the function returned, or the exception that it raised (not raised again), or a TimeoutError."""
        self.thread.join(seconds)
        return self.value


def offline() -> bool:
    yes = ("1", "true", "yes", "on")
    return any(os.environ.get(v, "").strip().lower() in yes for v in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def reach() -> str:
    """Ask the hub's front door for its header; any answer will do."""
    import urllib.error
    import urllib.request

    if offline():
        return "offline"
    from huggingface_hub import constants

    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=SECONDS):
            pass
    except urllib.error.HTTPError:
        pass
    return "reachable"


def rows(answer: object) -> list[Row]:
    """`answer`: "offline", "reachable", or the exception that came instead."""
    instead = "the bundled model takes the place of Llama-3.2-1B; nothing else is missing"
    if answer == "offline":
        return [Row("model hub", "note", "switched off (HF_HUB_OFFLINE is set)", instead)]
    if isinstance(answer, BaseException):
        why = getattr(answer, "reason", None) or answer
        return [Row("model hub", "note", f"not reachable ({why})", f"{instead}. Behind a proxy set HTTPS_PROXY")]
    from huggingface_hub import get_token

    if get_token():
        return [Row("model hub", "ok", "reachable, with a token")]
    todo = "gated models such as Llama-3.2-1B need one (`hf auth login`, or HF_TOKEN); else an ungated mirror is tried"
    return [Row("model hub", "ok", "reachable, no token", todo)]
