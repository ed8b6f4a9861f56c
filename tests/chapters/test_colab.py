"""Chapter 11 as Colab runs it, as far as that can be played: `google.colab` is there before the first cell, no token, a hub
that cannot be reached, the set-up cell twice. (Without `google.colab` it runs in test_run.py.)"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest

from pefttools.grading.build import run
from pefttools.grading.chapter import SETUP, dumps, read_chapter
from pefttools.grading.source import registry
from pefttools.grading.splice import check_name

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "solutions" / "11_capstone.py"
CODE = SETUP.format(repo="owner/name", branch="main")
SITE = """
import sys, types
from importlib.machinery import ModuleSpec


def module(name):
    made = types.ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    return made


google, colab, drive, files = map(module, ("google", "google.colab", "google.colab.drive", "google.colab.files"))


def mount(path):
    raise ValueError("mount failed: nobody answered")


drive.mount = mount
files.download = lambda path: print("downloaded", path)
colab.drive, colab.files = drive, files
google.colab, google.__path__ = colab, []
sys.modules.update({"google": google, "google.colab": colab, "google.colab.drive": drive, "google.colab.files": files})
"""


# ------------------------------------------------------------------------------------------ the set-up cell

@pytest.fixture
def colab(monkeypatch):
    """A Colab whose packages are `versions`; pip puts into `commands` what it was asked for, and installs it."""
    made = types.SimpleNamespace(versions={"torch": "2.9.0+cu126", "numpy": "2.0.2", "transformers": "4.57.1", "tokenizers": "0.22.1",
                                           "huggingface_hub": "0.36.0", "datasets": "4.0.0", "peft": "0.17.1", "accelerate": "1.11.0",
                                           "safetensors": "0.6.2"}, commands=[])

    def version(name):
        if name not in made.versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return made.versions[name]

    def find_spec(name, package=None):
        return None if name == "pefttools" and name not in made.versions else real(name, package)

    def pip(command, check):
        made.commands.append(command)
        made.versions |= {part.partition(" @")[0].partition(">=")[0]: part.partition(">=")[2] or "1.0" for part in command[6:]}

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    return made


def set_up():
    exec(compile(CODE, "setup", "exec"), {})


def test_set_up_installs_what_is_missing_or_too_old_and_a_second_time_nothing(colab, capsys):
    set_up()
    ((_, *rest),) = colab.commands
    assert rest[:5] == ["-m", "pip", "install", "--quiet", "--no-deps"]
    assert sorted(part.partition(">=")[0] for part in rest[5:]) == [
        "bitsandbytes", "huggingface_hub", "peft", "pefttools @ git+https://github.com/owner/name@main", "transformers"]
    set_up()
    assert len(colab.commands) == 1, "it is idempotent"


def test_set_up_never_touches_torch_or_numpy_even_if_they_are_old(colab, capsys):
    colab.versions |= {"torch": "2.1.0", "numpy": "1.23.5"}
    set_up()
    assert not any(part.startswith(("torch", "numpy")) for command in colab.commands for part in command)
    out = capsys.readouterr().out
    assert "torch 2.1.0 is older than 2.6; it is left as it is" in out and "numpy 1.23.5" in out


def test_set_up_says_when_an_old_version_is_loaded_already(colab, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", types.ModuleType("peft"))
    set_up()
    assert "Restart session" in capsys.readouterr().out


def test_set_up_does_nothing_where_there_is_no_colab(colab, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "google.colab")
    set_up()
    assert colab.commands == [] and capsys.readouterr().out == ""


@pytest.mark.parametrize("found, least, older", [("", "1.0", True), ("0.9", "0.10", True), ("0.10.1", "0.9", False), ("5.0.0rc1", "5.0", False),
                                                 ("2.9.0+cu126", "2.6", False), ("4.57.1", "5.0", True)])
def test_versions_are_compared_as_numbers(found, least, older):
    room: dict = {}
    exec(compile(CODE, "setup", "exec"), room)
    assert room["older"](found, least) == older


def test_what_it_asks_for_is_what_the_package_asks_for():
    import tomllib

    from packaging.requirements import Requirement

    wanted = {each.name.replace("-", "_"): each for each in map(Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])}
    room = {}
    exec(CODE[CODE.index("    least = {"):CODE.index("    wanted = [")].replace("    least", "least", 1), room)
    for name, number in room["least"].items():
        assert f">={number}" in str(wanted[name].specifier), name


# ------------------------------------------------------------------------------------------ without the graders' packages

def test_checks_need_nothing_that_colab_lacks(tmp_path):
    """Colab has no nbgrader, no jupytext, no pyseccomp; a check must not want them."""
    code = """
        import sys
        for name in ("nbgrader", "jupytext", "nbclient", "pyseccomp", "mistune", "nh3", "sqlalchemy", "jupyterlab"):
            sys.modules[name] = None
        from pefttools.grading import check
        from pefttools.grading.exercises.ch11_capstone import precision_reference
        assert check("pick-precision", precision_reference).passed
        import pefttools.lab.colab, pefttools.lab.python_codes, pefttools.lab.capstone, pefttools.widgets.capstone
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_widget_of_colabs_old_ipywidgets_is_shown():
    """7.7.1, which Colab has, displays itself and makes no MIME bundle."""
    from pefttools.widgets.base import widget_bundle

    class Old:
        model_id = "abc"

    assert widget_bundle(Old())["application/vnd.jupyter.widget-view+json"]["model_id"] == "abc"

    class New:
        def _repr_mimebundle_(self):
            return {"text/plain": "new"}

    assert widget_bundle(New()) == {"text/plain": "new"}


# ------------------------------------------------------------------------------------------ the notebook

def test_metadata_offers_a_t4():
    metadata = json.loads((ROOT / "course" / "11_capstone" / "capstone.ipynb").read_text(encoding="utf-8"))["metadata"]
    assert metadata["accelerator"] == "GPU" and metadata["colab"]["gpuType"] == "T4"


@pytest.mark.chapter
@pytest.mark.slow
def test_the_notebook_runs_on_a_colab_without_token_hub_and_gpu(tmp_path, monkeypatch):
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE)
    work = tmp_path / "work"
    work.mkdir()
    for name, value in {"PEFTTOOLS_QUICK": "1", "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "PIP_NO_INDEX": "1",
                        "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": f"{site}:{ROOT}"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    notebook = read_chapter(SOURCE).notebook
    for cell in notebook["cells"]:
        cell["source"] = cell["source"].replace("IN_DRIVE = None ", "IN_DRIVE = True ")
    (at,) = [number for number, cell in enumerate(notebook["cells"]) if cell["id"] == "setup"]
    notebook["cells"].insert(at + 1, {**notebook["cells"][at], "id": "setup-again"})
    made = json.loads(dumps(run(notebook, work, allow_errors=True)))

    def text_of(value):
        return value if isinstance(value, str) else "".join(value)

    outputs = {cell["id"]: cell.get("outputs", []) for cell in made["cells"]}
    assert [(cell, output["ename"], output["evalue"]) for cell, found in outputs.items() for output in found
            if output["output_type"] == "error"] == []
    assert outputs["setup"] == outputs["setup-again"] == []
    said = "".join(text_of(output.get("text", "")) for found in outputs.values() for output in found)
    assert "Colab, no GPU" in said and "Drive was not mounted (mount failed" in said
    assert "the hub does not answer" in said and "the bundled rows" in said
    assert f"downloaded {Path('runs') / 'capstone' / 'hand_in.zip'}" in said
    scores = {check_name(cell): [float(text_of(o["data"]["text/plain"])) for o in cell["outputs"] if o["output_type"] == "execute_result"]
              for cell in made["cells"] if check_name(cell)}
    assert scores == {name: [entry.points] for name, entry in registry("11_capstone").items()}
