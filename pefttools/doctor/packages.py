"""The installed packages against the tested ones, the kernel that notebooks run in, and the widgets."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from pathlib import Path

from pefttools.doctor.report import Row

ROOT = Path(__file__).resolve().parents[2]
# Without these nothing opens; without the others a part of the course is missing.
NEEDED = ("torch", "transformers", "peft", "datasets", "tokenizers", "safetensors", "jupyterlab", "ipykernel")
INSTALL = "`make lab` installs {}; without make: pip install -e . -c .ci/constraints.txt"


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def tested_versions() -> dict[str, str]:
    """{package: version} of .ci/constraints.txt; empty where the package was installed without its repository."""
    try:
        text = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8")
    except OSError:
        return {}
    return {canonical(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)$", text, re.M)}


def requirements() -> list:
    """What pefttools requires here: of the checkout's pyproject.toml, else of its installed metadata."""
    from packaging.requirements import Requirement

    try:
        import tomllib

        lines = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    except OSError:
        lines = importlib.metadata.requires("pefttools") or []
    parsed = map(Requirement, lines)
    return [r for r in parsed if "extra" not in str(r.marker or "") and (r.marker is None or r.marker.evaluate())]


def package_rows() -> list[Row]:
    tested, rows, good = tested_versions(), [], []
    for requirement in requirements():
        name = requirement.name
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            rows.append(Row(name, "problem", "not installed", INSTALL.format("it"), stops=canonical(name) in NEEDED))
            continue
        want = tested.get(canonical(name))
        if not requirement.specifier.contains(version, prereleases=True):
            rows.append(Row(name, "problem", f"{version}, where the course needs {requirement.specifier}",
                            INSTALL.format(want or "another")))
        elif want and version.split("+")[0] != want:
            rows.append(Row(name, "note", f"{version}; tested with {want}", "fine unless something behaves oddly"))
        else:
            good.append(f"{name} {version}")
    if good:
        rows.insert(0, Row("packages", "ok", f"{'as tested: ' if tested else ''}{', '.join(good)}"))
    return rows


def kernel_rows() -> list[Row]:
    """Whether the kernel that notebooks name runs in this environment: one in the user's home may shadow it."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    try:
        argv = KernelSpecManager().get_kernel_spec("python3").argv
    except NoSuchKernel:
        return [Row("kernel", "problem", "there is no kernel python3", "pip install ipykernel", stops=True)]
    program = argv[0] if argv else ""
    ours = re.fullmatch(r"python(3(\.\d+)?)?", program)  # Jupyter puts its own interpreter there
    if ours or os.path.dirname(os.path.abspath(program)) == os.path.dirname(os.path.abspath(sys.executable)):
        return [Row("kernel", "ok", "notebooks run in this environment")]
    return [Row("kernel", "problem", f"notebooks run in {program}, and this is {sys.executable}",
                "a kernel of your own shadows the environment's: `jupyter kernelspec list` shows it, "
                "`jupyter kernelspec uninstall python3` removes it")]


def widget_rows() -> list[Row]:
    version = importlib.metadata.version("ipywidgets")
    if version == "8.1.9":
        todo = "pip install ipywidgets==8.1.8"
        return [Row("widgets", "problem", "ipywidgets 8.1.9 draws nothing in VS Code", todo)]
    found = f"ipywidgets {version}: sliders in JupyterLab, VS Code and Colab; figures show everywhere"
    return [Row("widgets", "ok", found)]
