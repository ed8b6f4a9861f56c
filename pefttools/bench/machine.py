"""What the figures were measured on: processor, cores, memory, instruction sets, versions. No host name, no path."""
from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
VERSIONS = ("torch", "transformers", "peft", "bitsandbytes", "numpy")
LAYOUT = ("page", "__main__", "machine", "groups", "__init__")
SETS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16", "sve")


def machine() -> dict[str, str]:
    """A description that two runs share if, and only if, their figures may stand in one table."""
    import psutil
    import torch

    return {"processor": processor(), "cores": f"{psutil.cpu_count(logical=False) or '?'} ({os.cpu_count()} threads)",
            "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB", "instruction sets": instruction_sets(),
            "torch's kernels": torch.backends.cpu.get_cpu_capability(),
            "system": f"{platform.system()} {platform.machine()}", "Python": platform.python_version(),
            **{name: installed(name) for name in VERSIONS}}


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def processor() -> str:
    fields = cpuinfo()
    return fields.get("model name") or fields.get("Hardware") or platform.processor() or platform.machine()


def instruction_sets() -> str:
    fields = cpuinfo()
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return ", ".join(name for name in SETS if name in flags) or "unknown"


def cpuinfo() -> dict[str, str]:
    """The first processor's fields in Linux's /proc/cpuinfo; empty elsewhere."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def sources(modules: Iterable[str] | None = None) -> dict[str, str]:
    """{file: digest} of these modules of the library, or of every one: figures of other code are measured again.

    The files that only choose what runs and lay out the page do not count.
    """
    if modules is None:
        paths: Iterable[Path] = [*PACKAGE.rglob("*.py"), *PACKAGE.glob("*.c")]
    else:
        paths = [PACKAGE.parent / (name.replace(".", "/") + ".py") for name in modules]
        paths += [path.with_name("nf4.c") for path in paths if path.stem == "nf4_compiled"]
    return {path.relative_to(PACKAGE).as_posix(): digest_of(path) for path in sorted(paths)
            if path.exists() and not (path.parent.name == "bench" and path.stem in LAYOUT)}


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.exists() else "gone"


def unchanged(files: dict[str, str]) -> bool:
    """Whether the files are still those that `sources` noted."""
    return all(digest_of(PACKAGE / file) == digest for file, digest in files.items())
