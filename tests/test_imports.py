"""What an import brings along: torch at most; transformers, peft, bitsandbytes and pictures only where they are used.

Structure is tested here; the seconds are measured by `make bench`, where nothing else runs.
"""
from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import pefttools
from pefttools.bench import imports

ROOT = Path(__file__).resolve().parents[1]
# by the seconds that each costs on top of torch: bitsandbytes and peft 2 to 4, datasets and transformers about 1
HEAVY = ("accelerate", "bitsandbytes", "datasets", "huggingface_hub", "ipywidgets", "jupyter_client", "matplotlib",
         "nbclient", "nbgrader", "pandas", "peft", "scipy", "sklearn", "tokenizers", "transformers")
# what a chapter's header may bring: IPython shows text; jupyter's client comes with it
HEADERS = set(HEAVY) - {"jupyter_client"}
# Extensions of other programs, which those programs import (nbgrader's builder of chapters, Jupyter's sandboxed kernel),
# and what grades a class with them. A reader's notebook imports none of these.
NEEDS = {f"pefttools.grading.{name}": {"nbgrader", "jupyter_client", "nbclient"}
         for name in ("release", "provisioner", "judged", "gradebook", "warm", "classroom", "feedback", "entrance", "pool",
                      "exports", "report", "run", "drill", "judging")}

WATCH = """
import importlib, json, sys
names, heavy = json.loads(sys.argv[1])

class Watch:                                   # an import of a heavy package is noted, and fails
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in heavy:
            asked.append(name.partition(".")[0])
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

asked, found = [], {}
if "torch" not in heavy:
    import torch
sys.meta_path.insert(0, Watch())
for name in names:
    asked.clear()
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not asked:
            raise
    found[name] = sorted(set(asked))
print(json.dumps(found))
"""


def python(code: str, *args: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *args], env=environment, capture_output=True, text=True,
                          timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1] if done.stdout else ""


def asked_for(names: list[str], heavy: tuple[str, ...]) -> dict[str, set[str]]:
    """{module: the heavy packages that it asks for when it is imported}, without those that ask for none."""
    found = json.loads(python(WATCH, json.dumps([names, heavy])))
    assert set(found) == set(names)
    return {name: set(asked) for name, asked in found.items() if asked}


def every_module() -> list[str]:
    return [module.name for module in pkgutil.walk_packages(pefttools.__path__, "pefttools.")
            if not module.name.endswith("__main__")]


def test_no_module_brings_more_than_torch():
    names = every_module()
    assert len(names) > 60 and {"pefttools.lora", "pefttools.lab.training", "pefttools.bench.memory"} <= set(names)
    asked = asked_for(names, HEAVY)
    assert {name: packages - NEEDS.get(name, set()) for name, packages in asked.items()} == {n: set() for n in asked}


def test_what_answers_at_once_brings_not_even_torch():
    names = ["pefttools", "pefttools.cli", "pefttools.workspace", "pefttools.lab", "pefttools.lab.data",
             "pefttools.grading", "pefttools.bench", "pefttools.bench.harness", "pefttools.bench.groups",
             "pefttools.bench.imports", "pefttools.methods"]
    assert asked_for(names, ("torch", "numpy", *HEAVY)) == {}


def test_the_watch_sees_what_it_should():
    """The two tests above would pass if the watch saw nothing."""
    assert asked_for(["json"], HEAVY) == {}
    assert asked_for(["peft"], HEAVY) == {"peft": {"peft"}}
    assert asked_for(["transformers.models.llama.modeling_llama"], HEAVY)
    assert asked_for(["pefttools.lora"], ("torch",)) == {"pefttools.lora": {"torch"}}


def test_the_headers_are_found():
    headers = imports.headers()
    assert set(headers) == {path.parent.name for path in ROOT.glob("course/*/*.ipynb")}
    assert all("from pefttools" in code and "import torch" in code for code in headers.values())


@pytest.mark.parametrize("chapter", sorted(imports.headers()))
def test_a_chapters_header_brings_what_it_uses(chapter):
    code = imports.headers()[chapter]
    brought = json.loads(python(f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"))
    heavy = {name.partition(".")[0] for name in brought} & HEADERS
    assert not heavy
    assert "pefttools.grading" in brought and "torch" in brought


def test_imports_of_a_cell():
    cell = ("%matplotlib inline\nimport os\n!pip list\nfrom math import (pi,\n                  tau)\n"
            "x = 1\nif x:\n    import json\n")
    assert imports.imports_of(cell) == "import os\nfrom math import pi, tau"


def test_cold_imports_are_timed_and_failures_told():
    assert 0.005 < imports.cold("import json") < 20
    inner = imports.cold("import time\nstart = time.time()\ntime.sleep(0.05)\nprint(time.time() - start)")
    assert 0.05 <= inner < 0.5
    with pytest.raises(RuntimeError, match="no_such_module"):
        imports.cold("import no_such_module")
    seconds = imports.rounds({"a": "print(1.5)", "b": "print(2.5)"}, 3)
    assert seconds == {"a": [1.5] * 3, "b": [2.5] * 3}


def test_the_whole_library_over_torch_within_a_generous_bound():
    """0.1 s is the aim and is measured by `make bench`; a package that slips in costs seconds."""
    assert imports.cold(imports.after_torch("\n".join(f"import {name}" for name in imports.modules()))) < 3
