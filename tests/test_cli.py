"""The command line: every subcommand reaches its function, mistakes get a sentence, nothing heavy is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pefttools import cli

ROOT = Path(cli.__file__).parents[1]
COMMANDS = ["lab", "doctor", "build", "grade", "data", "vram", "finetune", "evaluate", "version"]


def run(*args: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pefttools", *args], capture_output=True, text=True, cwd=ROOT, timeout=60, **kwargs
    )


def test_help_lists_the_commands_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom pefttools.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print('HEAVY', sorted({m.split('.')[0] for m in sys.modules} & "
        "{'torch', 'numpy', 'transformers', 'jupyter_core', 'nbformat', 'datasets', 'packaging'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert "HEAVY []" in done.stdout
    assert all(f"\n    {command} " in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0 and f"pefttools {command}" in capsys.readouterr().out


def test_version():
    import pefttools

    done = run("version")
    assert (done.returncode, done.stdout) == (0, pefttools.__version__ + "\n")


@pytest.mark.parametrize(
    "args, said",
    [
        ([], "COMMAND"),
        (["frobnicate"], "invalid choice"),
        (["doctor", "--jason"], "unknown arguments: --jason"),
        (["grade"], "FOLDER|CHAPTER"),
        (["grade", ".", "--seed", "1", "--new-seed"], "not allowed with"),
        (["data", "-n", "many"], "invalid int value"),
        (["version", "--no-browser"], "unknown arguments"),
    ],
)
def test_wrong_calls_end_with_2_and_a_sentence(args, said, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(args)
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_errors_are_sentences_not_tracebacks(tmp_path):
    done = run("grade", str(tmp_path / "nowhere"))
    assert done.returncode == 1 and "is not a folder" in done.stderr and "Traceback" not in done.stderr
    assert "not a chapter" in done.stderr and "02_lora" in done.stderr
    done = run("lab", "--course", str(tmp_path), "--sync-only")
    assert done.returncode == 1 and "holds no chapters" in done.stderr and "Traceback" not in done.stderr
    done = run("lab", "--course", str(tmp_path), "--sync-only", env={**os.environ, "PEFTTOOLS_TRACEBACK": "1"})
    assert "Traceback" in done.stderr


def test_outside_of_a_clone(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "site-packages" / "pefttools" / "cli.py"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["lab"]) == 1
    assert "no course/ folder" in capsys.readouterr().err


@pytest.fixture
def little_course(tmp_path) -> Path:
    for name in ("00_start/start.ipynb", "02_lora/lora.ipynb"):
        (tmp_path / "course" / name).parent.mkdir(parents=True)
        (tmp_path / "course" / name).write_text('{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}\n')
    return tmp_path / "course"


def started(monkeypatch, *args: str) -> list[str]:
    """The command line that `pefttools lab ARGS` becomes."""
    seen = []
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", "of_the_reader")  # `lab` adds to it; undone after the test
    monkeypatch.setattr(os, "execv", lambda program, command: seen.append(command) or 0)
    monkeypatch.chdir(Path.cwd())  # so that the chdir of `lab` is undone after the test
    cli.main(["lab", *args])
    return seen[0]


@pytest.mark.skipif(os.name == "nt", reason="there a subprocess takes the place of exec")
def test_lab_brings_its_own_settings_and_keeps_the_readers(little_course, monkeypatch, capsys):
    started(monkeypatch, "--course", str(little_course))
    ours, theirs = os.environ["JUPYTER_CONFIG_PATH"].split(os.pathsep)
    settings = json.loads((Path(ours) / "labconfig" / "page_config.json").read_text())
    assert settings["disabledExtensions"]["@jupyterlab/apputils-extension:announcements"] is True
    assert theirs == "of_the_reader"


@pytest.mark.skipif(os.name == "nt", reason="there a subprocess takes the place of exec")
def test_lab_opens_the_first_chapter_of_the_readers_copies(little_course, monkeypatch, capsys):
    command = started(monkeypatch, "--course", str(little_course), "--no-browser", "--port", "9999", "--ip=0.0.0.0")
    mine = little_course.parent / "my_course"
    assert command[:3] == [sys.executable, "-m", "jupyterlab"]
    assert command[-4:] == ["--no-browser", "--port", "9999", "--ip=0.0.0.0"]
    assert (
        f"--ServerApp.root_dir={mine}" in command and "--LabApp.default_url=/lab/tree/00_start/start.ipynb" in command
    )
    assert (mine / "00_start" / "start.ipynb").is_file()
    out = capsys.readouterr().out
    assert "02_lora/lora.ipynb: new" in out and str(mine) in out


@pytest.mark.skipif(os.name == "nt", reason="there is no root")
@pytest.mark.parametrize("uid, given, times", [(0, [], 1), (0, ["--allow-root"], 1), (1000, [], 0)])
def test_lab_starts_as_root_in_containers(little_course, monkeypatch, uid, given, times):
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    assert started(monkeypatch, "--course", str(little_course), *given).count("--allow-root") == times


def test_lab_sync_only_and_mine(little_course, tmp_path, capsys):
    assert cli.main(["lab", "--course", str(little_course), "--mine", str(tmp_path / "elsewhere"), "--sync-only"]) == 0
    assert (tmp_path / "elsewhere" / "02_lora" / "lora.ipynb").is_file()
    assert not (tmp_path / "my_course").exists()


@pytest.mark.parametrize(
    "changed, args, code", [([], [], 0), (["course/x"], [], 0), (["course/x"], ["--check"], 1), ([], ["--check"], 0)]
)
def test_build(monkeypatch, changed, args, code):
    seen = {}
    monkeypatch.setattr("pefttools.grading.build.build", lambda **kwargs: seen.update(kwargs) or changed)
    assert cli.main(["build", *args, "lora"]) == code
    assert seen == {"names": ["lora"], "check": bool(args), "execute": False}
    cli.main(["build", "--execute"])
    assert seen == {"names": [], "check": False, "execute": True}


def test_grade(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("pefttools.grading.entrance.grade", lambda *args, **kwargs: seen.append((args, kwargs)))
    assert cli.main(["grade", str(tmp_path), "--chapter", "lora", "--force", "--out", "elsewhere"]) == 0
    plain = {"workers": None, "scheduler": None, "seed": None, "new_seed": False, "db": None, "sandbox": True}
    assert seen.pop() == ((tmp_path, "lora", Path("elsewhere")), {**plain, "force": True})
    assert cli.main(["grade", "02_lora", "--unsafe-no-sandbox", "--seed", "3", "--workers", "2"]) == 0
    assert seen.pop() == ((None, "02_lora", None), {**plain, "force": False, "sandbox": False, "seed": 3, "workers": 2})


def test_doctor_exit_code_and_json(monkeypatch, capsys):
    from pefttools.doctor import Diagnosis, Row

    for stops in (False, True):
        monkeypatch.setattr(
            "pefttools.doctor.doctor",
            lambda stops=stops: Diagnosis([Row("disk", "problem", "full", "make room", stops)]),
        )
        assert cli.main(["doctor"]) == int(stops)
        assert "make room" in capsys.readouterr().out
        assert cli.main(["doctor", "--json"]) == int(stops)
        assert json.loads(capsys.readouterr().out)["rows"][0]["check"] == "disk"


def test_data_shows_and_writes_rows(monkeypatch, tmp_path, capsys):
    rows = [{"kind": f"k{i}", "text": f"text {i}", "instruction": "é"} for i in range(5)]
    monkeypatch.setattr("pefttools.lab.load_data", lambda split: rows, raising=False)
    assert cli.main(["data", "-n", "2"]) == 0
    assert capsys.readouterr().out.count("── row") == 2
    assert cli.main(["data", "-n", "99"]) == 0
    assert capsys.readouterr().out.count("── row") == 5
    assert cli.main(["data", "-n", "-1"]) == 1
    assert cli.main(["data", "--write", str(tmp_path / "rows.jsonl")]) == 0
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()] == rows
    assert cli.main(["data", "--write", str(tmp_path / "no" / "rows.jsonl")]) == 1
    assert "No such file" in capsys.readouterr().err


def test_a_terminal_that_lacks_a_character_is_no_reason_to_stop():
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    code = "from pefttools import cli; cli.run_version = lambda _: print('→ ✓'); exit(cli.main(['version']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env, timeout=60)
    assert (done.returncode, done.stdout) == (0, "? ?\n")
