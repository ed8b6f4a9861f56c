"""The room in which works are probed: the same for all, quiet, and left as it was found."""

from __future__ import annotations

import contextlib
import io
import logging
import random
import sys
import warnings
from collections.abc import Iterator
from typing import Any

PRINTED = 2_000  # characters kept of what the work prints


@contextlib.contextmanager
def settled(seed: int) -> Iterator[None]:
    """The same random numbers, default dtype, device and gradient mode for every work; put back as they were.

    A notebook may have set its own (`torch.set_default_dtype`, a GPU as the default device, a `no_grad` around the
    check), and a work may set them: neither may change a verdict.
    """
    import torch

    python, dtype = random.getstate(), torch.get_default_dtype()
    numpy = sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy is not None else None
    try:
        with contextlib.ExitStack() as stack:
            for context in (torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad()):
                stack.enter_context(context)
            if torch.get_default_device().type != "cpu":
                stack.enter_context(torch.device("cpu"))
            # Not torch.manual_seed: that also queues a call, with its stack trace, for every GPU library not loaded.
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            if numpy is not None:
                numpy.random.seed(seed)
            torch.set_default_dtype(torch.float32)
            yield
    finally:
        torch.set_default_dtype(dtype)
        random.setstate(python)
        if state is not None:
            numpy.random.set_state(state)


class Beginning(io.TextIOBase):
    """A text stream that keeps its beginning and forgets the rest."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._room = PRINTED

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self._room > 0:
            self._parts.append(str(text)[: self._room])
            self._room -= len(self._parts[-1])
        return len(text)

    def getvalue(self) -> str:
        return "".join(self._parts) + ("…" if self._room <= 0 else "")


@contextlib.contextmanager
def quiet() -> Iterator[Beginning]:
    """Hold back prints, warnings, logging and notebook display; gives the stream with the beginning of the prints.

    nbgrader 0.9.6 takes all points of a cell that writes anything to stderr, so nothing of a work's noise may get out.
    """
    stream, shell, disabled = Beginning(), notebook_shell(), logging.root.manager.disable
    publisher = getattr(shell, "display_pub", None)
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)  # handlers keep the stderr they were made with; redirecting misses them
        if publisher is not None:
            from IPython.core.displaypub import CapturingDisplayPublisher

            shell.display_pub = CapturingDisplayPublisher()
        try:
            yield stream
        finally:
            logging.disable(disabled)
            if publisher is not None:
                shell.display_pub = publisher


def notebook_shell() -> Any:
    """IPython's shell if we are in one, without importing IPython for it; None elsewhere."""
    ipython = sys.modules.get("IPython")
    return ipython.get_ipython() if ipython is not None else None


def in_notebook() -> bool:
    """Whether a notebook front end (JupyterLab, VS Code, Colab, nbclient) will show the value of the cell."""
    return getattr(notebook_shell(), "kernel", None) is not None
