"""Where a notebook runs, and what becomes of it when Colab, Drive or a GPU is there or not."""

from __future__ import annotations

import sys
import types
import zipfile

import pytest
import torch

from pefttools.lab import colab
from pefttools.lab.colab import Place


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """google.colab as a module; `fake.mounts`: what drive.mount does; `fake.downloads`: what the browser got."""
    module, drive, files = types.ModuleType("google.colab"), types.ModuleType("google.colab.drive"), types.ModuleType("google.colab.files")
    made = types.SimpleNamespace(mounts=lambda path: (colab.DRIVE / "MyDrive").mkdir(parents=True), downloads=[])
    drive.mount = lambda path: made.mounts(path)
    files.download = made.downloads.append
    module.drive, module.files = drive, files
    parent = types.ModuleType("google")
    parent.colab = module
    for name, each in (("google", parent), ("google.colab", module), ("google.colab.drive", drive), ("google.colab.files", files)):
        monkeypatch.setitem(sys.modules, name, each)
    monkeypatch.setattr(colab, "DRIVE", tmp_path / "content" / "drive")
    monkeypatch.chdir(tmp_path)
    return made


@pytest.mark.parametrize("gpu, capability, dtype", [("T4", (7, 5), torch.float16), ("A100", (8, 0), torch.bfloat16),
                                                    ("H100", (9, 0), torch.bfloat16), ("B200", (10, 0), torch.bfloat16),
                                                    ("", (0, 0), torch.float32)])
def test_the_dtype_is_what_the_hardware_has(gpu, capability, dtype):
    here = Place(True, gpu, capability, 15 * 2**30 if gpu else 0)
    assert here.dtype == dtype and here.attention == "sdpa"
    assert ("float16" in str(here)) == (gpu == "T4") or dtype == torch.bfloat16
    assert ("no flash attention" in str(here)) == (gpu == "T4")


def test_what_torch_claims_of_a_t4_is_not_asked(monkeypatch):
    about = types.SimpleNamespace(name="Tesla T4", major=7, minor=5, total_memory=15_637_086_208)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    here = colab.place()
    assert here == Place(False, "Tesla T4", (7, 5), 15_637_086_208) and here.dtype == torch.float16


def test_without_colab_files_lie_beside_the_notebook(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    folder = colab.run_folder("capstone", drive=True)
    assert folder.resolve() == tmp_path / "runs" / "capstone" and folder.is_dir() and not colab.on_colab()
    assert "beside the notebook" in capsys.readouterr().out


def test_on_colab_drive_is_taken_if_it_is_mounted(fake, tmp_path, capsys):
    assert colab.on_colab()
    assert colab.run_folder("capstone").resolve() == tmp_path / "runs" / "capstone"
    assert "lost when this session ends" in capsys.readouterr().out
    folder = colab.run_folder("capstone", drive=True)
    assert folder == colab.DRIVE / "MyDrive" / "pefttools" / "capstone" and "in your Drive" in capsys.readouterr().out
    assert colab.run_folder("capstone") == folder                       # it is mounted now
    assert colab.run_folder("capstone", drive=False).resolve() == tmp_path / "runs" / "capstone"


@pytest.mark.parametrize("mounts, said", [(lambda path: (_ for _ in ()).throw(ValueError("mount failed\nmore")), "mount failed"),
                                          (lambda path: None, "no MyDrive")])
def test_a_drive_that_is_refused_is_no_reason_to_stop(fake, tmp_path, capsys, mounts, said):
    fake.mounts = mounts
    assert colab.run_folder("capstone", drive=True).resolve() == tmp_path / "runs" / "capstone"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("name", ["", "a/b", "../up"])
def test_a_folder_has_one_name(name):
    with pytest.raises(ValueError, match="one folder's name"):
        colab.run_folder(name)


def adapter(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(name.encode() * 9)
    return folder


def test_what_is_handed_in_is_one_zip_with_the_adapters_files(fake, tmp_path, capsys):
    folder = adapter(tmp_path / "hand_in", *colab.FILES, "checkpoint.pt", "llama_1b_config.json", "llama_1b_model.safetensors")
    packed = colab.hand_in(folder)
    with zipfile.ZipFile(packed) as archive:
        assert sorted(archive.namelist()) == sorted([*colab.FILES, *colab.LARGE_FILES])
        assert archive.testzip() is None
    assert fake.downloads == [str(packed)] and "To hand in" in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob(".*.part")] == []


def test_an_adapter_that_is_not_there_yet_is_said(fake, tmp_path, capsys):
    assert colab.hand_in(adapter(tmp_path / "hand_in", colab.FILES[0])) is None
    assert "nothing to hand in" in capsys.readouterr().out and fake.downloads == []


def test_a_browser_that_does_not_take_it_is_no_error(fake, tmp_path, capsys, monkeypatch):
    def broken(path):
        raise RuntimeError("no browser")

    monkeypatch.setattr(sys.modules["google.colab.files"], "download", broken)
    assert colab.hand_in(adapter(tmp_path / "hand_in", *colab.FILES)).is_file()
    assert "did not take it" in capsys.readouterr().out
