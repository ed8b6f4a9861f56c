"""nbgrader's configuration for this course: its words mapped onto our folders, and the cures for its traps.

    source_directory     grading/source        built from solutions/      release_directory   course/
    submitted_directory  grading/submitted     after the splice           gradebook           grading/gradebook.db
    autograded_directory grading/autograded                               feedback_directory  grading/feedback

`write_config()` writes `grading/nbgrader_config.py`, which calls `configure`, so that everybody who knows nbgrader
works as usual from that folder:

    cd grading && nbgrader autograde 02_lora
    cd grading && nbgrader export
    cd grading && jupyter lab --ServerApp.root_dir=..         Nbgrader ► Formgrader

`nbgrader autograde` grades one after the other, in the same sandbox and with the same judge as `pefttools grade`:
`JudgedExecute` stands where nbgrader has `Execute`; each time it draws a seed, and the graded notebook says which.
Limits: `c.JudgedExecute.limit = {"cell_seconds": 60}`.
Another gradebook: `c.CourseDirectory.db_url = "postgresql+psycopg://…"`, any URL of SQLAlchemy's.
"""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path
from typing import Any

CONFIG = """\
# Written by `pefttools grade` and `pefttools build`; run nbgrader's commands in this folder. Your own settings: below.
import sys
from pathlib import Path

root = {root}
sys.path.append(str(root))  # a checkout in which the package was not installed
from pefttools.grading.nbgrader_config import configure  # noqa: E402

c = get_config()  # noqa: F821  (traitlets gives it)
configure(c, root=root, out=Path(__file__).resolve().parent)
"""

JUDGED = "pefttools.grading.judged.JudgedExecute"
# Where somebody puts nbgrader's own Execute back: a cell may train on a slow machine, and 30 s fails honest work.
CELL_SECONDS = 600
KERNEL_ARGUMENTS = ["--HistoryManager.hist_file=:memory:", "--Application.log_level=40"]  # no word about TCP per kernel


def configure(c: Any, root: str | Path, out: str | Path) -> Any:
    """Fill a traitlets Config `c` for the course in `root` with its grading folder `out`; returns `c`."""
    from pefttools.grading.release import PREPROCESSORS

    root, out = Path(root).resolve(), Path(out).resolve()

    def step(folder: Path) -> str:
        return str(folder.relative_to(root)) if folder.is_relative_to(root) else str(folder)

    c.CourseDirectory.root = str(root)
    c.CourseDirectory.course_id = "peft"
    c.CourseDirectory.source_directory = step(out / "source")
    c.CourseDirectory.release_directory = step(root / "course")
    for name in ("submitted", "autograded", "feedback", "solution", "source_with_tests"):
        c.CourseDirectory[f"{name}_directory"] = step(out / name)
    c.CourseDirectory.db_url = f"sqlite:///{out / 'gradebook.db'}"
    c.Exchange.root = str(out / "exchange")  # on a shared server: the folder that students reach, see nbgrader's manual

    # The release: what `release.py` runs, and in addition what writes nbgrader's database.
    names = [f"{p.__module__}.{p.__name__}" for p in PREPROCESSORS]
    c.GenerateAssignment.preprocessors = [*names, "nbgrader.preprocessors.SaveCells"]

    # Grading. Submitted code runs in a sandbox and is judged outside; all else is nbgrader's.
    names = ("IgnorePattern", "LimitOutput", "SaveAutoGrades", "AssignLatePenalties", "CheckCellMetadata")
    c.Autograde.autograde_preprocessors = [JUDGED, *(f"nbgrader.preprocessors.{name}" for name in names)]
    c.GenerateFeedback.exporter_class = "pefttools.grading.feedback.FeedbackExporter"
    c.JudgedExecute.secret = [str(out), str(root / "solutions")]
    # Where stock Execute is put back: anything on stderr in a check cell costs all of its points, and every library
    # writes there (progress bars, warnings): it is dropped before scores are read. Errors are another kind and stay.
    c.IgnorePattern.enabled = True
    c.IgnorePattern.pattern = r"[\s\S]*"
    c.Execute.timeout = CELL_SECONDS
    # How long a cell's outputs may lag behind its end, and a kernel's start: by default 4 s and 60 s, and on a machine
    # that is busy with something else a whole hand-in then fails for it.
    c.Execute.iopub_timeout = 120
    c.Execute.startup_timeout = 300
    c.Execute.shutdown_kernel = "immediate"
    c.Execute.extra_arguments = KERNEL_ARGUMENTS
    c.OverwriteCells.add_missing_cells = True
    # One thread: on a busy machine, four that wait for each other took five times the processor time of one.
    quick = {"PEFTTOOLS_QUICK": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    quick["TOKENIZERS_PARALLELISM"] = "false"
    for name, value in quick.items():  # kernels inherit it, under the `nbgrader` command as well
        os.environ.setdefault(name, value)
    os.environ.update(paths())
    return c


def paths() -> dict[str, str]:
    """PATH and PYTHONPATH with which subprocesses find this environment's commands and this very package.

    nbgrader starts `alembic` by name when it makes the gradebook, and an environment that is not activated has it only
    in its scripts folder; kernels start in other folders than a checkout that was not installed.
    """

    def extend(name: str, folder: str) -> str:
        now = [part for part in os.environ.get(name, "").split(os.pathsep) if part]
        return os.pathsep.join(now if folder in now else [*now, folder])

    return {
        "PATH": extend("PATH", sysconfig.get_path("scripts")),
        "PYTHONPATH": extend("PYTHONPATH", str(Path(__file__).resolve().parents[2])),
    }


def write_config(root: str | Path, out: str | Path | None = None) -> Path:
    """Write `nbgrader_config.py` into the grading folder, unless one is there: it may hold an instructor's settings."""
    root = Path(root).resolve()
    out = Path(out).resolve() if out is not None else root / "grading"
    (out / "exchange").mkdir(parents=True, exist_ok=True)
    path = out / "nbgrader_config.py"
    if not path.exists():
        inside = out.is_relative_to(root)
        up = f"Path(__file__).resolve().parents[{len(out.relative_to(root).parts)}]" if inside else repr(str(root))
        path.write_text(CONFIG.format(root=up), encoding="utf-8")
    return path
