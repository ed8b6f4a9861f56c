"""A class: in parallel, one writer, killed and going on, nothing twice and nothing lost."""

from __future__ import annotations

import copy
import json
import multiprocessing.forkserver
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest

from pefttools.grading import entrance, grade
from pefttools.grading import run as grading
from pefttools.grading.chapter import dumps
from pefttools.grading.classroom import Classroom, GradeError
from pefttools.grading.drill import make_class, rows
from pefttools.grading.judging import JudgedResult, entries_of, entries_spec, judge_one
from pefttools.grading.pool import Pool, WorkerLost, default_workers
from pefttools.grading.sandbox import available

ROOT = Path(grading.__file__).resolve().parents[2]
boxed = pytest.mark.skipif(available() is not None, reason=f"no sandbox here: {available()}")
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


# ------------------------------------------------------------------------------------------ workers


def nap(seconds=0.0, answer=None):
    time.sleep(seconds)
    return answer


def die(code):
    os._exit(code) if code >= 0 else os.kill(os.getpid(), -code)


class Unsendable(Exception):
    def __init__(self):
        super().__init__("cannot be pickled")
        self.lock = threading.Lock()


def fail(kind):
    raise kind


def fail_unsendable():
    raise Unsendable


@pytest.mark.slow
def test_a_worker_that_dies_or_hangs_or_fails_costs_its_own_job_only():
    started = time.monotonic()
    with Pool(2, seconds=25) as pool:
        killed, exited = pool.submit(die, -9), pool.submit(die, 3)
        hung, wrong, unsendable = pool.submit(nap, 3600), pool.submit(fail, KeyError("x")), pool.submit(fail_unsendable)
        good = [pool.submit(nap, 0, number) for number in range(20)]
        assert [future.result() for future in good] == list(range(20))
        with pytest.raises(WorkerLost, match=r"SIGKILL.*memory"):
            killed.result()
        with pytest.raises(WorkerLost, match="exit code 3"):
            exited.result()
        with pytest.raises(KeyError):
            wrong.result()
        with pytest.raises(RuntimeError, match="Unsendable: cannot be pickled"):
            unsendable.result()
        with pytest.raises(WorkerLost, match="25 seconds"):
            hung.result()
    assert time.monotonic() - started < 120


@pytest.mark.slow
def test_how_a_worker_ended_is_told_right_while_another_starts(monkeypatch):
    read, reads, first_looks, both_look = multiprocessing.forkserver.read_signed, {}, threading.Event(), threading.Event()

    def slowly(fd):  # a pipe's first number is the process's id, the second how it ended
        reads[fd] = reads.get(fd, 0) + 1
        if reads[fd] == 2:
            first_looks.set()
            both_look.wait(2)
        elif reads[fd] == 3:
            value = read(fd)
            both_look.set()
            return value
        return read(fd)

    monkeypatch.setattr(multiprocessing.forkserver, "read_signed", slowly)
    with Pool(2, seconds=120) as pool:
        ended = pool.submit(die, 3)
        assert first_looks.wait(60)
        assert pool.submit(nap, 0, "started").result() == "started"
        assert "exit code 3" in str(ended.exception())


def test_giving_up_ends_what_runs_and_starts_nothing_more():
    pool = Pool(1, seconds=600)
    first, waiting = pool.submit(nap, 3600), pool.submit(nap, 3600)
    while not first.running():
        time.sleep(0.05)
    time.sleep(0.5)
    started = time.monotonic()
    pool.shutdown(wait=False, cancel_futures=True)
    assert time.monotonic() - started < 60
    assert waiting.cancelled() and isinstance(first.exception(timeout=10), WorkerLost)


def test_workers_are_a_core_each_and_fewer_where_memory_is_short():
    assert default_workers(1) >= 1
    assert default_workers(2**60) == 1


# ------------------------------------------------------------------------------------------ one writer, without kernels


class Inline(Executor):
    """Judges at once, in this process."""

    def __init__(self):
        self.students = []

    def submit(self, fn, /, *args, **kwargs):
        future = Future()
        self.students.append(args[0].student)
        try:
            future.set_result(fn(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)
        return future


def judged_blindly(job):
    """Full marks for every answer that has "return" or "sum" in it: enough to tell hand-ins apart, and no kernel."""
    notebook = nbformat.reads(job.text, as_version=4)
    answers = {cell.id: cell.source for cell in notebook.cells}
    for cell in notebook.cells:
        name = cell.id.removeprefix("check-")
        if cell.id.startswith("check-"):
            good = "return" in answers[name] or "sum(" in answers[name]
            points = cell.metadata.nbgrader.points * good
            cell.outputs = [nbformat.v4.new_output("execute_result", {"text/plain": f"{points:g}"})]
    notebook.metadata["pefttools"] = {"seed": job.seed, "sandbox": job.sandbox, "limits": []}
    return JudgedResult(job.student, job.chapter, job.digest, dumps(notebook), 0.5)


@pytest.fixture
def course(tiny, monkeypatch):
    """The tiny course with a class of three, judged without kernels; `course.judged` tells who was judged."""
    inline = Inline()

    @contextmanager
    def executor(workers, seconds, scheduler=None):
        yield inline

    monkeypatch.setattr(grading, "executor", executor)
    monkeypatch.setattr(grading, "judge_one", judged_blindly)
    monkeypatch.setattr(entrance, "available", lambda: None)
    monkeypatch.setattr(grading, "definitions", lambda entries: "as they are")
    tiny.folder, tiny.out, tiny.lines, tiny.inline = tiny.root / "in", tiny.root / "grading", [], inline
    tiny.folder.mkdir()
    for student, notebook in (("alice", tiny.solved()), ("bob", tiny.pristine()), ("carol", tiny.solved())):
        (tiny.folder / f"{student}.ipynb").write_text(json.dumps(notebook))

    def run(**options):
        inline.students.clear()
        found = grade(tiny.folder, root=tiny.root, entries=tiny.entries, log=tiny.lines.append, **options)
        tiny.judged = sorted(inline.students)
        return {result.student: result for result in found}

    tiny.grade = run
    tiny.db = f"sqlite:///{tiny.out / 'gradebook.db'}"
    return tiny


EVERYBODY = ["alice", "bob", "carol"]


@pytest.mark.nbgrader
def test_nobody_is_judged_twice_and_only_what_changed(course):
    first = course.grade()
    assert {s: r.status for s, r in first.items()} == dict.fromkeys(EVERYBODY, "graded")
    before = rows(course.db)
    again = course.grade()
    assert course.judged == [] and {r.status for r in again.values()} == {"unchanged"}
    assert rows(course.db) == before
    (course.folder / "bob.ipynb").write_text(json.dumps(course.solved()))
    assert course.grade()["bob"].score > first["bob"].score and course.judged == ["bob"]
    course.grade(force=True)
    assert course.judged == EVERYBODY


@pytest.mark.nbgrader
def test_one_seed_for_the_class_until_a_new_one_is_drawn(course):
    first = course.grade()
    seed = int((course.out / "seed").read_text())
    assert {r.seed for r in first.values()} == {seed}
    course.grade(new_seed=True)
    assert course.judged == EVERYBODY and int((course.out / "seed").read_text()) != seed
    course.grade(seed=seed)
    assert course.judged == EVERYBODY and int((course.out / "seed").read_text()) == seed
    course.grade()
    assert course.judged == []


@pytest.mark.nbgrader
def test_changed_exercises_and_limits_grade_everybody_anew(course, monkeypatch):
    course.grade()
    monkeypatch.setattr(grading, "definitions", lambda entries: "other")
    course.grade()
    assert course.judged == EVERYBODY
    with (course.out / "nbgrader_config.py").open("a") as file:
        file.write("c.JudgedExecute.limit = {'cell_seconds': 7}\n")
    course.grade()
    assert course.judged == EVERYBODY


class Killed(BaseException):
    """Stands for SIGKILL: nothing that handles errors catches it."""


@pytest.mark.nbgrader
@pytest.mark.parametrize("step", ["put", "keep", "write", "put_graded", "feedback", "note"])
def test_killed_at_any_step_it_goes_on_and_ends_with_the_same_gradebook(course, tmp_path, monkeypatch, step):
    from pefttools.grading.gradebook import Writer

    course.grade(out=tmp_path / "undisturbed", seed=1)
    course.out = tmp_path / "killed"
    owner = Classroom if step in ("put", "keep", "put_graded", "note") else Writer
    honest, calls = getattr(owner, step), []

    def dies(self, *args, **kwargs):
        calls.append(step)
        if len(calls) == 2:
            raise Killed
        return honest(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, dies)
        with pytest.raises(Killed):
            course.grade(out=course.out, seed=1)
    kept = {path.stem: path.stat().st_mtime_ns for path in (course.out / "judged").glob("*/*.json")}
    course.grade(out=course.out)
    assert not set(course.judged) & set(kept)
    assert {path.stem for path in (course.out / "reports").glob("*/*.json")} == set(EVERYBODY)
    assert {name: (course.out / "judged" / "01_tiny" / f"{name}.json").stat().st_mtime_ns for name in kept} == kept
    assert rows(f"sqlite:///{course.out / 'gradebook.db'}") == rows(f"sqlite:///{tmp_path / 'undisturbed' / 'gradebook.db'}")


@pytest.mark.nbgrader
def test_a_students_grades_are_written_all_or_none(course, monkeypatch):
    from nbgrader.preprocessors import SaveAutoGrades

    course.grade()
    before = rows(course.db)
    (course.folder / "bob.ipynb").write_text(json.dumps(course.solved()))
    honest, calls = SaveAutoGrades._add_score, []

    def fails_at_the_third(self, cell, resources):
        calls.append(cell)
        if len(calls) == 3:
            raise RuntimeError("in the middle")
        return honest(self, cell, resources)

    with monkeypatch.context() as patch:
        patch.setattr(SaveAutoGrades, "_add_score", fails_at_the_third)
        assert course.grade()["bob"].problem == "RuntimeError: in the middle"
    assert rows(course.db) == before
    assert course.grade()["bob"].score == 7 - 1 and course.judged == []  # judged before: only written


@pytest.mark.nbgrader
def test_a_lost_gradebook_is_written_again_without_judging(course):
    course.grade()
    before = rows(course.db)
    (course.out / "gradebook.db").unlink()
    again = course.grade()
    assert {r.status for r in again.values()} == {"graded"} and course.judged == []
    assert rows(course.db) == before


@pytest.mark.nbgrader
def test_a_second_grader_is_turned_away_and_a_dead_ones_lock_is_free(course):
    code = ("import sys, time; from pathlib import Path; from pefttools.grading.classroom import Classroom\n"
            "with Classroom(Path('.'), Path(sys.argv[1])).lock(): print('held', flush=True); time.sleep(600)")
    holder = subprocess.Popen([sys.executable, "-c", code, str(course.out)], stdout=subprocess.PIPE, text=True, env=ENV)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(GradeError, match=rf"process {holder.pid} .* is grading into .*: wait"):
            course.grade()
        assert course.judged if hasattr(course, "judged") else True
    finally:
        holder.kill()
        holder.wait()
    assert len(course.grade()) == 3


@pytest.mark.nbgrader
def test_two_folders_with_one_sqlite_gradebook_keep_each_other_out(course, tmp_path):
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    with Classroom(course.root, tmp_path / "one").lock(url):
        with pytest.raises(GradeError, match="is grading into"):
            course.grade(out=tmp_path / "two", db=url)
    assert len(course.grade(out=tmp_path / "two", db=url)) == 3
    assert (tmp_path / "shared.db").is_file() and not (tmp_path / "two" / "gradebook.db").exists()


@pytest.mark.nbgrader
def test_a_held_database_is_waited_for(course):
    course.grade()
    held = sqlite3.connect(course.out / "gradebook.db", check_same_thread=False)
    held.execute("BEGIN EXCLUSIVE")
    timer = threading.Timer(8.0, held.rollback)
    timer.start()
    started = time.monotonic()
    (course.folder / "bob.ipynb").write_text(json.dumps(course.solved()))
    assert course.grade()["bob"].status == "graded"
    assert time.monotonic() - started > 6
    assert sum("in use by another program" in line for line in course.lines) == 1
    timer.join()
    held.close()


@pytest.mark.nbgrader
def test_one_failing_judge_is_one_row(course, monkeypatch):
    def judge(job):
        if job.student == "bob":
            raise WorkerLost("The process that graded it was ended by SIGKILL.")
        return judged_blindly(job)

    with monkeypatch.context() as patch:
        patch.setattr(grading, "judge_one", judge)
        found = course.grade()
    assert {s: r.status for s, r in found.items()} == {"alice": "graded", "bob": "failed", "carol": "graded"}
    assert "SIGKILL" in found["bob"].problem and "SIGKILL" in (course.out / "report.html").read_text()
    assert course.grade()["bob"].status == "graded" and course.judged == ["bob"]


@pytest.mark.nbgrader
def test_ctrl_c_says_how_to_go_on(course, monkeypatch):
    honest = grading.Run._finish

    def stops(self, task):
        honest(self, task)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(grading.Run, "_finish", stops)
        with pytest.raises(KeyboardInterrupt):
            course.grade()
    assert "Stopped." in course.lines[-1] and "the same command goes on" in course.lines[-1]
    assert {r.status for r in course.grade().values()} == {"graded", "unchanged"}


@pytest.mark.nbgrader
def test_late_penalties_are_nbgraders(course):
    from nbgrader.api import Gradebook

    course.grade()
    with Gradebook(course.db) as book:
        book.update_or_create_assignment("01_tiny", duedate="2026-01-01 00:00:00")
    (course.folder / "dan" / "01_tiny").mkdir(parents=True)
    (course.folder / "dan" / "01_tiny" / "tiny.ipynb").write_text(json.dumps(course.solved()))
    (course.folder / "dan" / "01_tiny" / "timestamp.txt").write_text("2026-01-01 02:30:00 UTC\n")
    with (course.out / "nbgrader_config.py").open("a") as file:
        file.write("c.LateSubmissionPlugin.penalty_method = 'zero'\n")
    course.grade()
    penalties = {row[1]: row[3] for row in rows(course.db) if row[0] == "notebook"}
    assert penalties["dan"] == 6 and not penalties["alice"]


# ------------------------------------------------------------------------------------------ with and without a sandbox


@pytest.mark.nbgrader
def test_without_a_sandbox_nothing_is_run_unless_asked_for(course, monkeypatch):
    monkeypatch.setattr(entrance, "available", lambda: "bubblewrap is not installed: apt install bubblewrap.")
    monkeypatch.setattr("pefttools.grading.sandbox.available", entrance.available)
    with pytest.raises(GradeError, match="bubblewrap is not installed.*--unsafe-no-sandbox"):
        course.grade()
    assert not course.out.joinpath("gradebook.db").exists()
    found = course.grade(sandbox=False)
    assert not any(r.sandbox for r in found.values())
    assert "WITHOUT a sandbox" in course.lines[-2] and "WITHOUT a sandbox" in (course.out / "report.html").read_text()
    monkeypatch.setattr(entrance, "available", lambda: None)
    course.grade()
    assert course.judged == EVERYBODY  # what ran without one is graded again with one


def test_how_workers_find_a_registry(tiny):
    assert entries_of(entries_spec(tiny.entries))("01_tiny").keys() == tiny.entries().keys()
    with pytest.raises(ValueError, match="top of a module"):
        entries_spec(lambda chapter: {})


# ------------------------------------------------------------------------------------------ other gradebooks, other machines


@pytest.mark.nbgrader
@pytest.mark.slow
def test_postgresql(course, tmp_path):
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    if not shutil.which("initdb") or not shutil.which("pg_ctl"):
        pytest.skip("PostgreSQL's initdb and pg_ctl are not here")
    import tempfile

    course.grade(seed=1)
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as folder:
        with postgres(Path(folder)) as url:
            course.grade(out=tmp_path / "pg", db=url, seed=1)
            assert rows(url) == rows(course.db)
            assert not (tmp_path / "pg" / "gradebook.db").exists()
            course.grade(out=tmp_path / "pg", db=url)
            assert course.judged == []


@contextmanager
def postgres(folder):
    """A server of its own on a Unix socket; as another user where this one is root, whom PostgreSQL refuses."""
    user = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
    if user:
        os.chown(folder, 65534, 65534)
    folder.chmod(0o755)
    run = lambda *line: subprocess.run(line, check=True, capture_output=True, cwd=folder, timeout=120, **user)  # noqa: E731
    run("initdb", "-D", str(folder / "data"), "-U", "grader", "-A", "trust", "--no-sync")
    run("pg_ctl", "-D", str(folder / "data"), "-w", "-l", str(folder / "log"),
        "-o", f"-c listen_addresses='' -c unix_socket_directories='{folder}'", "start")
    try:
        yield f"postgresql+psycopg://grader@/postgres?host={folder}"
    finally:
        run("pg_ctl", "-D", str(folder / "data"), "-m", "immediate", "stop")


@boxed
@pytest.mark.nbgrader
@pytest.mark.slow
def test_a_dask_cluster_gives_the_same_grades(tiny, tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed", reason="distributed is not installed")
    monkeypatch.setattr(grading, "definitions", lambda entries: "as they are")
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(4):
        (folder / f"s{number}.ipynb").write_text(json.dumps(tiny.solved() if number else tiny.pristine()))
    run = lambda **options: grade(folder, root=tiny.root, entries=tiny.entries, seed=3, log=lambda text: None, **options)  # noqa: E731
    with distributed.LocalCluster(n_workers=2, threads_per_worker=2, processes=True, dashboard_address=None,
                                  env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}) as cluster:
        there = run(scheduler=cluster.scheduler_address, out=tmp_path / "there")
    here = run(workers=2, out=tmp_path / "here")
    assert [(r.student, r.status, r.score) for r in there] == [(r.student, r.status, r.score) for r in here]
    assert [r.score for r in here] == [0, 7, 7, 7]
    assert rows(f"sqlite:///{tmp_path / 'there' / 'gradebook.db'}") == rows(f"sqlite:///{tmp_path / 'here' / 'gradebook.db'}")


def test_no_cluster_is_said(tiny, tmp_path):
    pytest.importorskip("distributed", reason="distributed is not installed")
    (tmp_path / "s.ipynb").write_text(json.dumps(tiny.solved()))
    from pefttools.grading.pool import executor

    with pytest.raises(ValueError, match="no Dask scheduler answers at 'tcp://127.0.0.1:9'"):
        with executor(1, 10, "tcp://127.0.0.1:9"):
            pass


# ------------------------------------------------------------------------------------------ the drill


def test_the_drills_class_has_its_share_of_trouble(tiny, tmp_path):
    kinds = make_class(tmp_path / "a", tiny.solved(), tiny.pristine(), 100, seed=4)
    honest = {"solved", "in part", "blank", "without metadata"}
    assert sum(kinds.values()) == 100 == len(list((tmp_path / "a").iterdir()))
    assert sum(count for kind, count in kinds.items() if kind not in honest) == 15
    make_class(tmp_path / "b", tiny.solved(), tiny.pristine(), 100, seed=4)
    assert all((tmp_path / "b" / p.name).read_bytes() == p.read_bytes() for p in (tmp_path / "a").iterdir())


@boxed
@pytest.mark.nbgrader
@pytest.mark.slow
def test_killed_at_random_moments_a_class_ends_with_the_same_gradebook(tmp_path):
    """The real thing, small: 12 hand-ins of the LoRA chapter, two of them broken or hostile, two SIGKILLs."""
    from pefttools.grading.drill import drill

    outcome = drill(tmp_path, students=12, kills=2, seed=7, workers=2, root=ROOT, log=print)
    assert outcome.faults == []
    assert outcome.rows > 100


@boxed
@pytest.mark.nbgrader
def test_judging_is_a_function_of_its_job(tiny):
    """Same job, same judged notebook, but for the times that are measured."""
    from pefttools.grading.judging import Job
    from pefttools.grading.splice import splice

    spliced, _ = splice(tiny.pristine(), tiny.solved())
    job = Job("a", "01_tiny", dumps(spliced), "d", seed=5, entries=entries_spec(tiny.entries))
    made = [nbformat.reads(judge_one(copy.deepcopy(job)).text, as_version=4) for _ in range(2)]
    for notebook in made:
        notebook.metadata.pop("pefttools")
    assert made[0] == made[1]
