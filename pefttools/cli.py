"""One command for the course: `pefttools lab | doctor | build | grade | data | vram | finetune | evaluate | version`.

Each subcommand imports what it needs when it runs, so that `pefttools --help` answers at once. Exit codes: 0 done, 1 it
was tried and something is wrong, 2 it was called wrongly.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

FIRST = "00_start/start.ipynb"  # the chapter that `lab` opens


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's); returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not getattr(args, "passes_on", False):
        parser.error(f"unknown arguments: {' '.join(rest)} (pefttools {args.command} --help lists the known ones)")
    args.rest = rest
    try:
        code = args.run(args) or 0
        sys.stdout.flush()
        return code
    except ValueError as e:  # the course's own errors are ValueErrors with a message made for people
        if os.environ.get("PEFTTOOLS_TRACEBACK"):
            raise
        print(f"pefttools {args.command}: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `pefttools ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as e:
        if os.environ.get("PEFTTOOLS_TRACEBACK"):
            raise
        print(f"pefttools {args.command}: {e}", file=sys.stderr)
        return 1


def make_parser() -> argparse.ArgumentParser:
    """The parser; `run` in its result is the subcommand's function."""
    parser = argparse.ArgumentParser(
        prog="pefttools",
        allow_abbrev=False,
        description="A course on parameter-efficient fine-tuning.",
        epilog="PEFTTOOLS_TRACEBACK=1 shows where an error came from.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, run, help: str, **kwargs) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=help, description=help[0].upper() + help[1:] + ".", allow_abbrev=False, **kwargs
        )
        sub.set_defaults(run=run)
        return sub

    lab = command(
        "lab",
        run_lab,
        "open the course in JupyterLab, on your own copies of the chapters",
        epilog="All further arguments go to JupyterLab: --no-browser, --port 9999, --ip 0.0.0.0 ...",
    )
    lab.add_argument("--course", type=Path, help="the folder with the chapters (default: course/ of the repository)")
    lab.add_argument("--mine", type=Path, help="the folder of your copies (default: my_course/ beside it)")
    lab.add_argument("--sync-only", action="store_true", help="bring your copies up to date and stop")
    lab.set_defaults(passes_on=True)

    doctor = command("doctor", run_doctor, "say what works on this machine, and what to do about the rest")
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")

    build = command("build", run_build, "make the chapters in course/ from their sources in solutions/")
    build.add_argument("chapters", nargs="*", metavar="CHAPTER", help="such as 02_lora, lora or 02 (default: all)")
    build.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 where a chapter differs from its source"
    )
    build.add_argument("--execute", action="store_true", help="also run the instructors' notebooks (minutes)")

    grade = command(
        "grade",
        run_grade,
        "grade a class: submitted code runs in a sandbox, verdicts are made outside of it",
        epilog="Killed or stopped, the same command goes on. What has not changed is not graded again.",
    )
    grade.add_argument(
        "what",
        metavar="FOLDER|CHAPTER",
        help="a folder or a learning platform's zip of hand-ins, or a chapter, whose hand-ins nbgrader collected",
    )
    grade.add_argument("--chapter", help="such as 02_lora; only this one")
    grade.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where gradebook, grades.csv and feedback go (default: grading/)"
    )
    grade.add_argument("--force", action="store_true", help="also grade again what has not changed")
    grade.add_argument("--workers", type=int, metavar="N", help="hand-ins at a time (default: one for each core)")
    grade.add_argument("--scheduler", metavar="tcp://...", help="judge on the workers of this Dask cluster")
    seeds = grade.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, help="for the exercises' inputs (default: the one kept in the folder)")
    seeds.add_argument("--new-seed", action="store_true", help="draw another one; everybody is graded again")
    grade.add_argument("--db", metavar="URL", help="the gradebook, as SQLAlchemy names it (default: as configured)")
    grade.add_argument(
        "--unsafe-no-sandbox",
        action="store_true",
        help="run submitted code as you, with your files and your network; every report says so",
    )

    data = command("data", run_data, "show rows of the bundled data set, or write it out as JSON Lines")
    data.add_argument("--split", default="train", help="train, held_out or new_kinds (default: %(default)s)")
    data.add_argument("-n", type=int, default=3, help="how many rows (default: %(default)s)")
    data.add_argument("--seed", type=int, default=0, help="which rows (default: %(default)s)")
    data.add_argument(
        "--write", type=Path, metavar="FILE", help="write the whole split to FILE, one JSON object a line"
    )

    from pefttools.lab import evaluate_command, finetune
    from pefttools.vram import command as vram

    memory = command("vram", vram.run, "compute the GPU memory of a fine-tune before it is run, and what fits")
    vram.add_arguments(memory)

    tune = command(
        "finetune",
        finetune.run,
        "fine-tune a model with any method of the library, its memory planned first",
        epilog="Killed or stopped, the same command goes on from its last checkpoint in --out.",
    )
    finetune.add_arguments(tune)

    card = command(
        "evaluate",
        evaluate_command.run,
        "measure an adapter before it is released: quality, forgetting, safety, memory, speed, and a gate",
        epilog="Exit status 0: the gate is passed; 1: it is not; 2: the question was wrong.",
    )
    evaluate_command.add_arguments(card)

    command("version", run_version, "print the version")
    return parser


def repository() -> Path:
    """The checkout that this package runs from; where it was installed from elsewhere, the working directory's."""
    for folder in (Path(__file__).resolve().parents[1], Path.cwd(), *Path.cwd().parents):
        if (folder / "course").is_dir() or (folder / "solutions").is_dir():
            return folder
    raise ValueError(
        "there is no course/ folder here: run this in a clone of the course's repository, or name it with --course"
    )


def run_lab(args: argparse.Namespace) -> int:
    from pefttools.workspace import sync

    course = (args.course or repository() / "course").resolve()
    mine = (args.mine or course.parent / "my_course").resolve()
    changes = sync(course, mine)
    for change in changes:
        print(change)
    print(f"Your copies: {mine}", flush=True)
    if args.sync_only:
        return 0
    command = jupyter_command(course, mine, args.rest)
    # JupyterLab's settings of the course: without its pop-up that asks about news, which news_url=None alone leaves standing
    ours = str(Path(__file__).parent / "jupyter")
    os.environ["JUPYTER_CONFIG_PATH"] = os.pathsep.join(filter(None, [ours, os.environ.get("JUPYTER_CONFIG_PATH")]))
    os.chdir(mine)
    if os.name == "nt":  # there exec gives the console back before JupyterLab has ended
        import subprocess

        return subprocess.run(command).returncode
    os.execv(command[0], command)


def jupyter_command(course: Path, mine: Path, rest: list[str]) -> list[str]:
    """JupyterLab on the reader's folder, the first chapter open. Run by this interpreter: a moved environment works."""
    first = (
        FIRST
        if (mine / FIRST).is_file()
        else next(
            (
                p.relative_to(course).as_posix()
                for p in sorted(course.rglob("*.ipynb"))
                if ".ipynb_checkpoints" not in p.parts
            ),
            "",
        )
    )
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        f"--ServerApp.root_dir={mine}",
        f"--LabApp.default_url=/lab/tree/{first}",
        # no question about news on the first start, no request to the network on any
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    if hasattr(os, "geteuid") and os.geteuid() == 0 and "--allow-root" not in rest:
        command.append("--allow-root")  # containers; without it the server refuses to start
    return command + rest


def run_doctor(args: argparse.Namespace) -> int:
    from pefttools.doctor import doctor

    report = doctor()
    print(report.to_json() if args.json else report)
    return 1 if report.stops else 0


def run_build(args: argparse.Namespace) -> int:
    from pefttools.grading.build import build

    changed = build(names=args.chapters, check=args.check, execute=args.execute)
    if not changed:
        print("course/ is what solutions/ gives.")
    return 1 if args.check and changed else 0


def run_grade(args: argparse.Namespace) -> int:
    folder, chapter = Path(args.what), args.chapter
    if not folder.exists():
        from pefttools.grading.build import find_root, sources

        root = find_root()
        names = {name for path in sources(root) for name in (path.stem, path.stem[3:], path.stem[:2])}
        if args.what not in names:
            raise ValueError(
                f"FOLDER|CHAPTER={args.what!r} is not a folder and not a chapter; name the folder that holds the "
                f"submissions, or one of {', '.join(path.stem for path in sources(root))}"
            )
        folder, chapter = None, args.what
    from pefttools.grading import grade

    grade(
        folder, chapter, args.out, force=args.force, workers=args.workers, scheduler=args.scheduler, seed=args.seed,
        new_seed=args.new_seed, db=args.db, sandbox=not args.unsafe_no_sandbox,
    )
    return 0


def run_data(args: argparse.Namespace) -> int:
    import json

    from pefttools.lab import load_data

    rows = load_data(args.split)
    if args.write:
        with open(args.write, "w", encoding="utf-8") as f:
            for row in rows:
                f.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(f"{len(rows)} rows of {args.split} written to {args.write}")
        return 0
    import random

    if args.n < 0:
        raise ValueError(f"-n {args.n}: the number of rows cannot be negative")
    for i in random.Random(args.seed).sample(range(len(rows)), min(args.n, len(rows))):
        print(f"── row {i} of {len(rows)}, kind {rows[i]['kind']} " + "─" * 40)
        print(rows[i]["text"])
    return 0


def run_version(args: argparse.Namespace) -> int:
    from pefttools import __version__

    print(__version__)
    return 0
