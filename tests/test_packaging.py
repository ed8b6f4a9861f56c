"""The two commands and what they install: constraints, conda, make, the wheel, and that the README tells the truth."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from pefttools import cli

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = (ROOT / ".ci" / "constraints.txt").read_text()
PINS = {
    canonicalize_name(name): Version(version) for name, version in re.findall(r"^([\w.-]+)==(\S+)$", CONSTRAINTS, re.M)
}
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = re.findall(r"^([a-z-]+):(?!=)", MAKEFILE, re.M)
needs_make = pytest.mark.skipif(not shutil.which("make"), reason="there is no make")


def direct() -> list[Requirement]:
    return [Requirement(line) for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]]


# ── what is installed ─────────────────────────────────────────────────────────────────────────────────────────────────
def test_constraints_are_plain_pins():
    for line in CONSTRAINTS.splitlines():
        assert not line or line.startswith("#") or re.fullmatch(r"[\w.-]+==\d[\w.]*", line), line
    assert PINS["torch"] == Version("2.13.0")  # exactly: a range takes several GB of CUDA packages


def test_every_range_allows_its_pin():
    for requirement in direct():
        pin = PINS[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), f"{requirement} does not allow {pin}"
        assert len(requirement.specifier) and "==" not in str(requirement.specifier), (
            f"{requirement}: a range, not a pin"
        )
    assert not Requirement(next(d for d in PROJECT["dependencies"] if d.startswith("ipywidgets"))).specifier.contains(
        "8.1.9"
    )


def test_everything_that_gets_installed_is_pinned():
    seen: set[str] = set()
    todo = [r for r in direct() if r.marker is None or r.marker.evaluate()]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in seen:
            continue
        seen.add(name)
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # an optional extra that nobody asked for
        for wanted in map(Requirement, lines):
            extras = requirement.extras or {""}
            if wanted.marker is None or any(wanted.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(wanted)
    gpu = {name for name in seen if re.match(r"nvidia-|cuda-|triton$", name)}  # torch itself pins these exactly
    assert seen - gpu - set(PINS) == set()


def test_conda_installs_the_same_through_pip():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    plain = [d for d in environment["dependencies"] if isinstance(d, str)]
    [pip] = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    assert plain == [f"python{PROJECT['requires-python']}", "pip"]
    assert environment["name"] == PROJECT["name"]
    installed = (ROOT / ".ci" / "environment").read_text().replace("'", "").replace("\\\n", " ")
    for line in pip:
        option, value = line.split()
        assert re.search(rf"{option}\s+{re.escape(value)}", installed), f"make installs something else than {line}"
        assert (ROOT / value.partition("[")[0]).exists()
    assert len(pip) == 2


def test_the_version_is_stated_once_and_python_agrees():
    import pefttools

    assert PROJECT["dynamic"] == ["version"] and re.fullmatch(r"\d+\.\d+\.\d+", pefttools.__version__)
    least = PROJECT["requires-python"].removeprefix(">=")
    assert f"Python {least}" in README
    assert f"({least.replace('.', ', ')})" in (ROOT / ".ci" / "environment").read_text()


def test_licence():
    text = (ROOT / "LICENSE").read_text()
    assert (
        "Apache License" in text
        and "Version 2.0" in text
        and "END OF TERMS AND CONDITIONS" in text
        and len(text) > 11_000
    )
    assert PROJECT["license"] == "Apache-2.0" and "Apache-2.0" in README


def test_a_wheel_holds_the_model_and_the_data(tmp_path):
    here = tmp_path / "source"
    here.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, here)
    shutil.copytree(ROOT / "pefttools", here / "pefttools", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "--wheel-dir",
            str(tmp_path),
            str(here),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        inside = {name for name in wheel.namelist() if name.startswith("pefttools/")}
        metadata = wheel.read(next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))).decode()
    expected = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "pefttools").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts and not p.name.startswith(".")
    }
    assert inside == expected
    assert "pefttools = pefttools.cli:main" in metadata


# ── make ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
# What the Makefile uses of Python is played by a script, so that its logic is tested without an installation.
PYTHON = """#!/bin/sh
me=$0
echo "$@" >> "$FAKE_LOG"
case "$1 $2" in
  "-c import sys"*) [ ! -f "$FAKE_DIR/old" ] ;;
  "-c import venv"*) [ ! -f "$FAKE_DIR/no_venv" ] ;;
  "-V "*) if [ -f "$FAKE_DIR/old" ]; then echo "Python 3.9.6"; else echo "Python 3.12.1"; fi ;;
  "-m venv") shift 3; rm -rf "$1"; mkdir -p "$1/bin"; cp "$me" "$1/bin/python" ;;
  "-m pip") [ "$3" = "--version" ] || [ ! -f "$FAKE_DIR/no_network" ] ;;
  "-m pytest") echo "==== 3 passed in 0.1s ===="; [ ! -f "$FAKE_DIR/fails" ] ;;
esac
"""


class Clone:
    """A clone with nothing but the files that make needs, and a Python that only writes down what it is asked."""

    def __init__(self, folder: Path) -> None:
        self.root, self.fake = folder / "a clone", folder / "fake"
        (self.root / ".ci").mkdir(parents=True)
        self.fake.mkdir()
        for name in ("Makefile", "pyproject.toml", ".ci/constraints.txt", ".ci/environment", ".ci/run"):
            shutil.copy(ROOT / name, self.root / name)
        self.python = self.fake / "python3"
        self.python.write_text(PYTHON)
        self.python.chmod(0o755)
        self.log = self.fake / "log"

    def run(self, *command: str) -> tuple[int, str, list[str]]:
        """(exit code, output, what Python was asked to do apart from telling about itself)"""
        self.log.write_text("")
        names = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON", "VENV", "ARGS", "PIP_INSTALL_ARGS")
        environment = {k: v for k, v in os.environ.items() if k not in names}
        environment |= {"PATH": f"{self.fake}:/usr/bin:/bin", "FAKE_LOG": str(self.log), "FAKE_DIR": str(self.fake)}
        done = subprocess.run(
            command,
            cwd=self.root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        asked = [line for line in self.log.read_text().splitlines() if not re.match(r"-c |-V|-m pip --version", line)]
        return done.returncode, done.stdout, asked

    def make(self, *args: str) -> tuple[int, str, list[str]]:
        return self.run("make", *args)

    def switch(self, name: str, on: bool = True) -> None:
        (self.fake / name).touch() if on else (self.fake / name).unlink()


@pytest.fixture
def clone(tmp_path) -> Clone:
    return Clone(tmp_path)


INSTALL = "-m pip install --disable-pip-version-check --constraint .ci/constraints.txt --editable .[test]"


@needs_make
def test_first_and_second_make_lab(clone):
    code, out, asked = clone.make("lab", "ARGS=--no-browser --port 9999")
    assert code == 0, out
    assert asked == ["-m venv --clear .venv", INSTALL, "-m pefttools lab --no-browser --port 9999"]
    code, out, asked = clone.make("lab")
    assert (code, out, asked) == (0, "", ["-m pefttools lab"])
    for target, call in {"doctor": "-m pefttools doctor", "build": "-m pefttools build"}.items():
        assert clone.make(target)[2] == [call]
    assert clone.make("build", "EXECUTE=1", "ARGS=lora")[2] == ["-m pefttools build --execute lora"]
    assert clone.make("grade", "SUBMISSIONS=from the class")[2] == ["-m pefttools grade from the class"]
    code, out, asked = clone.make("grade")
    assert code and "SUBMISSIONS=folder" in out and not asked
    [asked] = clone.make("test", "ARGS=-k lora")[2]
    assert asked.startswith("-m pytest ") and asked.endswith(" -k lora")


@needs_make
@pytest.mark.parametrize("file", ["pyproject.toml", ".ci/constraints.txt"])
def test_changed_requirements_install_again(clone, file):
    clone.make("lab")
    later = (clone.root / ".venv" / ".installed").stat().st_mtime + 5
    os.utime(clone.root / file, (later, later))
    assert clone.make("lab")[2] == [INSTALL, "-m pefttools lab"]
    os.utime(clone.root / file, (1, 1))
    assert clone.make("lab")[2] == ["-m pefttools lab"]


@needs_make
def test_interrupted_installation_goes_on(clone):
    clone.switch("no_network")
    code, out, asked = clone.make("lab")
    assert code and "did not finish" in out and "-m pefttools lab" not in asked
    assert not (clone.root / ".venv" / ".installed").exists()
    clone.switch("no_network", False)
    code, out, asked = clone.make("lab")
    assert code == 0 and asked == [INSTALL, "-m pefttools lab"], "the environment is there already"
    # killed while the environment was being made, or its Python was uninstalled: made anew
    (clone.root / ".venv" / "bin" / "python").unlink()
    (clone.root / ".venv" / ".installed").unlink()
    assert clone.make("lab")[2][0] == "-m venv --clear .venv"


@needs_make
def test_moved_clone_installs_again(clone):
    clone.make("lab")
    clone.root = clone.root.rename(clone.root.with_name("moved"))
    assert clone.make("lab")[2] == [INSTALL, "-m pefttools lab"]
    assert clone.make("lab")[2] == ["-m pefttools lab"]


@needs_make
def test_old_python_gets_a_sentence(clone):
    for name in ("python3.11", "python3.12", "python3.13", "python3.14"):  # hide the machine's own
        shutil.copy(clone.python, clone.fake / name)
    clone.switch("old")
    code, out, _ = clone.make("lab")
    assert code and "needs Python 3.11 or later; found: Python 3.9.6" in out and "apt install python3" in out
    code, out, _ = clone.make("lab", "PYTHON=python3.12")
    assert code and "PYTHON=python3.12 is Python 3.9.6" in out
    code, out, _ = clone.make("lab", "PYTHON=python4")
    assert code and "PYTHON=python4: there is no such program" in out
    assert not (clone.root / ".venv").exists()


@needs_make
def test_a_newer_python_is_found_by_itself_or_named(clone):
    (clone.fake / "python3.14").write_text("#!/bin/sh\nexit 127\n")  # as version managers leave them behind
    (clone.fake / "python3.14").chmod(0o755)
    shutil.copy(clone.python, clone.fake / "python3.13")
    clone.python.write_text("#!/bin/sh\nexit 1\n")
    code, out, asked = clone.make("lab")
    assert code == 0 and asked[0] == "-m venv --clear .venv", out
    shutil.rmtree(clone.root / ".venv")
    shutil.copy(clone.fake / "python3.13", clone.fake / "mypython")
    code, out, asked = clone.make(
        "lab", f"PYTHON={clone.fake / 'mypython'}", "VENV=elsewhere", "PIP_INSTALL_ARGS=--pre --find-links x"
    )
    assert code == 0 and asked[:2] == ["-m venv --clear elsewhere", f"{INSTALL} --pre --find-links x"], out


@needs_make
def test_missing_venv_gets_a_sentence(clone):
    clone.switch("no_venv")
    code, out, _ = clone.make("lab")
    assert code and "apt install python3-venv" in out and not (clone.root / ".venv").exists()


@needs_make
def test_ci_run_ends_with_the_closing_line(clone):
    code, out, asked = clone.run("bash", ".ci/run")
    assert code == 0 and asked[0] == "-m venv --clear .venv" and asked[-1].startswith("-m pytest")
    assert out.splitlines()[-1] == "==== 3 passed in 0.1s ====" and out.count("3 passed") == 1
    clone.switch("fails")
    code, out, _ = clone.run("bash", ".ci/run")
    assert code and out.splitlines()[-1] == "==== 3 passed in 0.1s ====" and "Error" in out.splitlines()[-2]
    (clone.root / ".venv" / ".installed").unlink()
    clone.switch("no_network")
    code, out, _ = clone.run("bash", ".ci/run")
    assert code and out.splitlines()[-1] == "The tests did not run."


@needs_make
def test_help_is_the_default_and_names_every_target(clone):
    code, out, asked = clone.make()
    assert code == 0 and not asked
    for target in set(TARGETS) - {"stale"}:
        assert re.search(rf"make {target}\s+\S", out), target
    assert out == clone.make("help")[1]


@needs_make
def test_clean_keeps_the_readers_work(clone):
    clone.make("lab")
    (clone.root / "my_course").mkdir()
    (clone.root / "my_course" / "lora.ipynb").touch()
    assert clone.make("clean")[0] == 0
    assert (clone.root / "my_course" / "lora.ipynb").exists() and not (clone.root / ".venv").exists()


def test_makefile_keeps_to_what_make_3_81_knows():
    assert not re.search(r"^\.ONESHELL|^\.RECIPEPREFIX|^define .*=|\s!=\s|\$\(file |::=", MAKEFILE, re.M)
    assert not re.search(
        r"^ +\S", "\n".join(line for line in MAKEFILE.splitlines() if not line.startswith("#")), re.M
    ), "tabs"


def test_git_ignores_what_is_made_and_nothing_of_ours(tmp_path):
    if not shutil.which("git"):
        pytest.skip("there is no git")
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    shutil.copy(ROOT / ".gitignore", tmp_path)
    made = [
        "my_course/02_lora/lora.ipynb",
        "grading/gradebook.db",
        ".venv/bin/python",
        "solutions/02_lora.ipynb",
        "pefttools/__pycache__/x.pyc",
    ]
    ours = [
        "pefttools/grading/judge.py",
        "tests/grading/test_judge.py",
        "solutions/02_lora.py",
        "course/02_lora/lora.ipynb",
        "pefttools/lab/tiny/model.safetensors",
        ".ci/run",
    ]
    done = subprocess.run(["git", "check-ignore", *made, *ours], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines() == made


# ── the README ────────────────────────────────────────────────────────────────────────────────────────────────────────
def commands() -> list[list[str]]:
    """Every command of the README's shell blocks and of its inline code, as words."""
    blocks = re.findall(r"```(?:bash|sh|console|powershell)\n(.*?)```", README, re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    lines += re.findall(r"(?<!`)`((?:make|pefttools|python -m|pip|jupytext|nbgrader|wsl|conda) [^`]+)`", README)
    return [shlex.split(part) for line in lines for part in line.split("&&") if part.strip()]


def test_readme_names_the_two_commands_first():
    assert README.index("make lab") < README.index("make test")
    assert ["make", "lab"] in commands() and ["make", "test"] in commands()


@pytest.mark.parametrize("words", [c for c in commands() if c[0] == "make"], ids=" ".join)
def test_make_targets_in_the_readme_exist(words):
    for word in words[1:]:
        if "=" in word:
            assert word.partition("=")[0] in {"ARGS", "PYTHON", "VENV", "SUBMISSIONS", "EXECUTE", "PIP_INSTALL_ARGS"}
        else:
            assert word in TARGETS


@pytest.mark.parametrize("words", [c for c in commands() if "pefttools" in c[:3] and c[0] != "conda"], ids=" ".join)
def test_pefttools_commands_in_the_readme_exist(words):
    args = words[words.index("pefttools") + 1 :]
    parsed, rest = cli.make_parser().parse_known_args(args)
    assert not rest or parsed.command == "lab"


def test_files_and_folders_in_the_readme_exist():
    made, examples = {"my_course", "grading", ".venv"}, {"alice.ipynb", "alice/02_lora/lora.ipynb"}
    for path in set(re.findall(r"`([\w./]+/|[\w./]+\.(?:py|txt|yml|toml|md|ipynb))`", README)) | set(
        re.findall(r"\]\((?!http|#)([^)]+)\)", README)
    ):
        assert path.split("/")[0] in made or path in examples or (ROOT / path).exists(), path
    for command in commands():
        for word in command:
            if word.startswith(".ci/"):
                assert (ROOT / word).exists()


def test_python_in_the_readme_runs(tmp_path):
    [code] = re.findall(r"```python\n(.*?)```", README, re.S)
    code += """
from peft import PeftModel
print(len(PeftModel.from_pretrained(load_base("tiny").model, "my_adapter").peft_config))
"""
    environment = {**os.environ, "PEFTTOOLS_QUICK": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "1" and (tmp_path / "my_adapter" / "adapter_config.json").exists()


def test_readme_lists_the_chapters_that_exist():
    present = {p.parent.name for p in ROOT.glob("course/*/*.ipynb")}
    listed = set(re.findall(r"\]\(course/(\d\d_\w+)/", README))
    assert not present or listed == present
