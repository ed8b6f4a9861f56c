"""Files handed in beside a notebook: they are what an artefact's check is about, and the code that made them is not run."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
import torch
from safetensors.torch import save as to_safetensors

sys.path.insert(0, str(Path(__file__).parent))  # pytest imports test modules by path, so helpers beside them need this

from judging import ENTRIES, RIGHT, judged, notebook, points, shown

from pefttools.grading import sandbox as sandboxes

pytestmark = pytest.mark.skipif(sandboxes.available() is not None, reason=f"no sandbox: {sandboxes.available()}")
FILES = {"weights.safetensors": to_safetensors({"w": torch.eye(4) * 3}), "settings.json": b'{"r": 2}'}
DEAR = "raise RuntimeError('an hour of training')\nsaved = 'out'"


def test_they_are_judged_and_the_code_need_not_run():
    nb = judged({"saved": DEAR, "letter": RIGHT["letter"]}, handed_in=FILES)
    assert points(nb) == {"saved": 4, "letter": 1}
    assert "Passed" in shown(nb, "saved")


def test_without_them_it_is_what_the_code_writes():
    assert points(judged({"saved": DEAR})) == {"saved": 0}
    nb = judged({"saved": "saved = 'nowhere'"})
    assert "Hand them in beside the notebook" in shown(nb, "saved") and "weights.safetensors" in shown(nb, "saved")


@pytest.mark.parametrize("files, said", [
    ({**FILES, "weights.safetensors": to_safetensors({"w": torch.eye(4) * 2})}, "output"),
    ({**FILES, "weights.safetensors": b"\x80\x04."}, "header"),
    ({"settings.json": b'{"r": 2}'}, "weights.safetensors"),
])
def test_wrong_and_damaged_ones_get_no_points(files, said):
    nb = judged({"saved": "saved = 'out'"}, handed_in=files)
    assert points(nb) == {"saved": 0} and said in shown(nb, "saved").lower()


def test_files_of_other_names_are_none_of_its_business():
    nb = judged({"saved": "saved = 'nowhere'", "twice": RIGHT["twice"]}, handed_in={"other.bin": b"1"})
    assert points(nb) == {"saved": 0, "twice": 2}


def test_a_worker_takes_them_as_paths_or_as_bytes(tmp_path):
    """Paths on this machine, bytes for a worker on another."""
    from pefttools.grading import found
    from pefttools.grading.judging import Job, judge_one

    assert {"adapter_model.safetensors", "adapter_config.json", "llama_1b_model.safetensors",
            "llama_1b_config.json"} == set(found.ARTEFACTS)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(FILES["weights.safetensors"])
    text = nbformat.writes(notebook({"saved": DEAR}))
    spec = f"{Path(__file__)}:entries"
    for given in (str(path), FILES["weights.safetensors"]):       # a path here, bytes for a worker elsewhere
        files = {"weights.safetensors": given, "settings.json": FILES["settings.json"]}
        done = judge_one(Job("ann", "01_small", text, "d", 3, entries=spec, files=files))
        assert points(nbformat.reads(done.text, as_version=4)) == {"saved": 4}


def test_intake_finds_them_beside_the_notebook_loose_or_zipped(tmp_path):
    from pefttools.grading.intake import collect

    pristine = {"01_small": json.loads(nbformat.writes(notebook({"saved": "saved = ..."})))}
    for who in ("ann", "bob"):
        folder = tmp_path / "in" / who
        folder.mkdir(parents=True)
        (folder / "small.ipynb").write_text(nbformat.writes(notebook({"saved": "saved = 'out'"})))
        if who == "ann":
            with zipfile.ZipFile(folder / "hand_in.zip", "w") as packed:
                for name in ("adapter_config.json", "adapter_model.safetensors", "llama_1b_config.json", "llama_1b_model.safetensors"):
                    packed.writestr(name, name)
        else:
            (folder / "adapter_config.json").write_text("{}")
    found = {each.student: set(each.artefacts) for each in collect(tmp_path / "in", pristine, tmp_path / "out")}
    assert found["bob"] == {"adapter_config.json"} and len(found["ann"]) == 4


def entries(chapter):
    return ENTRIES
