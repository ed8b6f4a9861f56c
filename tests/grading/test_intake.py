"""Taking hand-ins in: whose, which, from anything; and nothing of it hangs, escapes, or hides somebody."""

from __future__ import annotations

import gzip
import io
import json
import os
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from pefttools.grading import archives, found, intake
from pefttools.grading.intake import HandIn, collect, read_people, recognise
from pefttools.grading.people import LENGTH, apart, person, readable, safe

NAMES = ["lora-a", "lora-b"]


def notebook(names=NAMES, answer="x = 1"):
    cells = []
    for name in names:
        cells.append(
            {
                "cell_type": "code",
                "id": name,
                "source": f"# exercise: {name}\n{answer}",
                "metadata": {"nbgrader": {"grade_id": name, "solution": True, "grade": False}},
            }
        )
        cells.append(
            {
                "cell_type": "code",
                "id": f"check-{name}",
                "source": f'check("{name}", x)',
                "metadata": {"nbgrader": {"grade_id": f"check-{name}", "solution": False, "grade": True}},
            }
        )
    return {"cells": cells, "nbformat": 4, "nbformat_minor": 5, "metadata": {}}


START = ["start-a", "start-b"]
PRISTINE = {"00_start": notebook(START), "02_lora": notebook()}
LORA, OTHER = json.dumps(notebook()).encode(), json.dumps(notebook(START)).encode()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "grading"


def put(path, data=LORA, when=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    if when:
        os.utime(path, (when, when))
    return path


def zipped(path, entries, compression=zipfile.ZIP_DEFLATED):
    """A zip of {name or ZipInfo: bytes}; returns its bytes, and writes them where a path is given."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in entries.items() if isinstance(entries, dict) else entries:
            archive.writestr(name, data)
    if path is not None:
        put(path, buffer.getvalue())
    return buffer.getvalue()


def people(hand_ins):
    return {(h.student, h.chapter): h.problem for h in hand_ins}


def everything_under(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} if folder.exists() else set()


# ------------------------------------------------------------------------------------------ whose


@pytest.mark.parametrize(
    ("name", "student", "lms", "number", "late", "rest"),
    [
        ("doejane_12345_67890_lora.ipynb", "doejane-12345", "canvas", "12345", False, "lora.ipynb"),
        ("doejane_LATE_12345_67890_lora-1.ipynb", "doejane-12345", "canvas", "12345", True, "lora-1.ipynb"),
        (
            "doejane_12345_67890_my_02_lora_final.ipynb",
            "doejane-12345",
            "canvas",
            "12345",
            False,
            "my_02_lora_final.ipynb",
        ),
        ("Jane Doe_12345_assignsubmission_file_", "Jane Doe", "moodle", "12345", False, ""),
        ("Jane Doe_12345_assignsubmission_file", "Jane Doe", "moodle", "12345", False, ""),
        ("Jane_van Doe_12345_assignsubmission_file_lora.ipynb", "Jane_van Doe", "moodle", "12345", False, "lora.ipynb"),
        ("Participant_77_assignsubmission_file_x.ipynb", "Participant 77", "moodle", "77", False, "x.ipynb"),
        ("Müller, Jörg_5_assignsubmission_onlinetext_", "Müller  Jörg", "moodle", "5", False, ""),
    ],
)
def test_what_platforms_put_into_names(name, student, lms, number, late, rest):
    who, left = person(name)
    assert (who.student, who.lms, who.lms_id, who.late, left) == (student, lms, number, late, rest)


@pytest.mark.parametrize(
    "name", ["alice_lora.ipynb", "alice_2024_01_lora.ipynb", "02_lora", "a_b_c_d.ipynb", "_1_222_x", "x" * 5000]
)
def test_what_is_no_platforms_name(name):
    assert person(name) is None


HOSTILE = [
    "",
    ".",
    "..",
    "../../etc/passwd",
    "a/b",
    "a\\b",
    "con",
    "NUL.txt",
    "aux.",
    "a\x00b",
    "a\nb",
    "-rf",
    "@SUM(A1)",
    "=1+1",
    "*?[x]",
    "a,b",
    "'; DROP TABLE student; --",
    "<script>",
    "x" * 400,
    "é" * 200,
    "\udcff\udcfe",
    "\u202egnp.exe",
    " . ",
    "~",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_safe_names(name, tmp_path):
    made = safe(name)
    assert made and len(made.encode()) <= LENGTH + 1 and made == safe(made)
    assert not set(made) & set("/\\*?[],\"'<>|:;=\n\x00") and made[0] not in "-@. " and made[-1] not in ". "
    assert Path(made).name == made and made.split(".")[0].lower() not in ("con", "nul", "aux")
    (tmp_path / made).mkdir()
    assert len(apart(made, "key").encode()) <= LENGTH and apart(made, "a") != apart(made, "b")


def test_names_that_are_shown_are_one_line_without_formula():
    assert readable("=cmd|' /C calc'!A0") == "cmd|' /C calc'!A0"
    assert readable("Jane\nDoe, Dr.") == "Jane_Doe  Dr."


def test_two_people_of_the_same_safe_name_are_told_apart_and_stay_so(folder, out):
    put(folder / "a*b.ipynb")
    first = people(collect(folder, PRISTINE, out))
    put(folder / "a!b.ipynb")  # sorts before
    put(folder / "Alice.ipynb")
    put(folder / "alice.ipynb", OTHER)
    hand_ins = collect(folder, PRISTINE, out)
    names = {h.path.name: h.student for h in hand_ins}
    assert first == {("a_b", "02_lora"): ""} and names["a*b.ipynb"] == "a_b"
    assert names["a!b.ipynb"].startswith("a_b-") and len({n.casefold() for n in names.values()}) == 4
    assert names == {h.path.name: h.student for h in collect(folder, PRISTINE, out)}
    assert any("kept apart" in note for h in hand_ins if h.path.name == "a!b.ipynb" for note in h.notes)


def test_a_broken_list_of_people_does_not_matter(folder, out):
    put(folder / "alice.ipynb")
    put(out / "received" / "people.json", b'{"x": {"student": 1}, "y": 2')
    assert people(collect(folder, PRISTINE, out)) == {("alice", "02_lora"): ""}
    assert read_people(out / "received" / "people.json")["name alice"]["student"] == "alice"


# ------------------------------------------------------------------------------------------ folders and platforms

LAYOUTS = {
    "nbgrader": ["alice/02_lora/lora.ipynb", "bob/02_lora/lora.ipynb"],
    "a pile": ["alice_lora.ipynb", "bob (2).ipynb"],
    "in a folder": ["submissions/alice/lora.ipynb", "submissions/bob.ipynb"],
    "odd": ["alice.IPYNB", "bob-Copy1.ipynb"],
    "renamed": ["alice/lora.json", "bob.ipynb.txt"],
    "by chapter": ["lora/alice.ipynb", "02_lora/bob/x.ipynb"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_folders_and_of_zips_of_them(layout, folder, out):
    for name in LAYOUTS[layout]:
        put(folder / name)
    put(folder / "class.csv", b"a,b")  # not a hand-in
    wanted = {("alice", "02_lora"): "", ("bob", "02_lora"): ""}
    assert people(collect(folder, PRISTINE, out)) == wanted
    zipped(out.parent / "all.zip", {name: LORA for name in LAYOUTS[layout]})
    assert people(collect(out.parent / "all.zip", PRISTINE, out)) == wanted


CANVAS = {
    "doejane_12345_67890_lora.ipynb": LORA,
    "doejane_777_67891_lora-1.ipynb": LORA,
    "muellerjoerg_LATE_22_67892_start.ipynb": OTHER,
    "pdf_33_67893_essay.pdf": b"%PDF",
    "packed_44_67894_homework.zip": zipped(None, {"homework/lora.ipynb": LORA, "homework/start.ipynb": OTHER}),
}


@pytest.mark.parametrize("as_zip", [True, False])
def test_canvas(as_zip, folder, out):
    if as_zip:
        path = folder / "submissions.zip"
        zipped(path, CANVAS)
    else:
        path = folder
        for name, data in CANVAS.items():
            put(folder / name, data)
    hand_ins = collect(path, PRISTINE, out)
    found = people(hand_ins)
    assert {key for key, problem in found.items() if not problem} == {
        ("doejane-12345", "02_lora"),
        ("doejane-777", "02_lora"),
        ("muellerjoerg-22", "00_start"),
        ("packed-44", "02_lora"),
        ("packed-44", "00_start"),
    }
    assert found["pdf-33", ""] == "There is no notebook: essay.pdf was handed in, not an .ipynb file."
    assert next(h for h in hand_ins if h.student == "muellerjoerg-22").notes == ["It was handed in late."]
    known = {entry["student"]: entry for entry in read_people(out / "received" / "people.json").values()}
    assert known["doejane-777"] == {
        "student": "doejane-777",
        "name": "doejane",
        "lms": "canvas",
        "ids": {"02_lora": "777"},
    }


@pytest.mark.parametrize("form", ["folders", "flat"])
@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_moodle(form, kind, folder, out):
    joint = "/" if form == "folders" else ""
    entries = {
        f"Jane Doe_11_assignsubmission_file_{joint}lora.ipynb": LORA,
        f"Jörg Müller_12_assignsubmission_file_{joint}abgabe.ipynb": LORA,
        f"Al Bo_13_assignsubmission_file_{joint}abgabe.zip": zipped(None, {"lora.ipynb": LORA}),
        "Al Bo_13_assignsubmission_onlinetext_/onlinetext.html": b"<p>done</p>",
    }
    path = folder / f"course.{kind}"
    if kind == "zip":
        zipped(path, entries)
    else:
        with tarfile.open(path, "w:gz") as archive:
            for name, data in entries.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    hand_ins = collect(path, PRISTINE, out)
    assert people(hand_ins) == {("Jane Doe", "02_lora"): "", ("Jörg Müller", "02_lora"): "", ("Al Bo", "02_lora"): ""}
    assert hand_ins[0].person.columns == {"first_name": "Jane", "last_name": "Doe"}
    assert all(h.path.is_relative_to(out / "received") for h in hand_ins)


def test_moodles_numbers_are_an_assignments_and_namesakes_are_told_apart(folder, out):
    put(folder / "Jane Doe_11_assignsubmission_file_" / "lora.ipynb")
    put(folder / "Jane Doe_95_assignsubmission_file_" / "start.ipynb", OTHER)
    assert people(collect(folder, PRISTINE, out)) == {("Jane Doe", "02_lora"): "", ("Jane Doe", "00_start"): ""}
    assert read_people(out / "received" / "people.json")["moodle jane doe"]["ids"] == {
        "02_lora": "11",
        "00_start": "95",
    }
    put(folder / "Jane Doe_12_assignsubmission_file_" / "lora.ipynb")
    names = {h.student for h in collect(folder, PRISTINE, None)}
    assert {"Jane Doe-11", "Jane Doe-12"} <= names


def test_names_inside_of_somebodys_folder_or_zip_make_nobody_else(folder, out):
    victim = "victim_12345_67890_lora.ipynb"
    put(folder / "mallory" / "02_lora" / victim)
    put(folder / "eve_1_99999_x.zip", zipped(None, {victim: LORA, "Vic Tim_5_assignsubmission_file_/a.ipynb": LORA}))
    assert {h.student for h in collect(folder, PRISTINE, out)} == {"mallory", "eve-1"}


@pytest.mark.parametrize("name", ["Mu\u0308ller", "M\u00fcller"])
def test_one_spelling_of_an_umlaut(name, folder):
    put(folder / name / "lora.ipynb")
    assert people(collect(folder, PRISTINE)) == {("M\u00fcller", "02_lora"): ""}


def test_a_file_alone(folder, out):
    assert people(collect(put(folder / "alice_lora.ipynb"), PRISTINE, out)) == {("alice", "02_lora"): ""}


def test_names_that_are_not_utf8(folder, out):
    raw = os.fsencode(folder) + b"/J\xf6rg.ipynb"
    Path(os.fsdecode(raw)).write_bytes(LORA)
    (hand_in,) = collect(folder, PRISTINE, out)
    assert hand_in.student == "J_rg" and not hand_in.problem
    str(hand_in.path).encode() and json.loads(hand_in.path.read_bytes())


def test_zip_names_in_utf8_without_saying_so_and_with_backslashes(folder, out):
    data = zipped(None, {"J\u00f6rg/02_lora/lora.ipynb": LORA}).replace(b"/02_lora/", b"\\02_lora\\")
    data = bytearray(data)
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # take the flag away that says UTF-8
        at = data.index(mark) + offset
        data[at : at + 2] = struct.pack("<H", struct.unpack("<H", data[at : at + 2])[0] & ~0x800)
    put(folder / "all.zip", bytes(data))
    assert people(collect(folder / "all.zip", PRISTINE, out)) == {("J\u00f6rg", "02_lora"): ""}


# ------------------------------------------------------------------------------------------ which file


def test_the_newest_readable_counts(folder):
    put(folder / "alice" / "old.ipynb", json.dumps(notebook(answer="x = 'old'")).encode(), 1000)
    put(folder / "alice" / "new.ipynb", json.dumps(notebook(answer="x = 'new'")).encode(), 3000)
    put(folder / "alice" / "lora.ipynb", b"{", 4000)
    put(folder / "alice" / "start.ipynb", OTHER, 500)
    hand_ins = {h.chapter: h for h in collect(folder, PRISTINE)}
    assert "'new'" in hand_ins["02_lora"].notebook["cells"][0]["source"] and hand_ins["00_start"].problem == ""
    assert sum("was not graded" in note for note in hand_ins["02_lora"].notes) == 2


def test_what_came_instead_of_a_notebook_is_said(folder):
    put(folder / "alice" / "lora.py", b"print()")
    (folder / "bob").mkdir()
    put(folder / "carl.ipynb", b'{"cells": []}')
    put(folder / "dora_1_2222_lora.html", b"<html>")
    put(folder / "empty.ipynb", b"")
    found = people(collect(folder, PRISTINE))
    assert found["alice", "02_lora"] == "There is no notebook: lora.py was handed in, not an .ipynb file."
    assert found["bob", ""] == "bob is an empty folder."
    assert found["carl", ""].startswith("No exercise of 00_start, 02_lora was found")
    assert found["empty", ""] == "empty.ipynb is empty."
    assert any(key[0] == "dora-1" for key in found)


def test_the_chapter_is_read_from_the_cells():
    assert recognise(notebook(), PRISTINE) == "02_lora"
    assert recognise({"cells": [None, 1, {"source": "x"}]}, PRISTINE) is None
    assert recognise({"cells": []}, {}) is None


def test_artefacts_are_taken_and_nothing_else(folder, out):
    adapter = {"adapter_model.safetensors": b"\0" * 8, "adapter_config.json": b"{}", "evil.py": b"x", "numpy.py": b"x"}
    put(folder / "alice" / "lora.ipynb")
    for name, data in adapter.items():
        put(folder / "alice" / "adapter" / name, data)
    put(folder / "bob.zip", zipped(None, {"w/lora.ipynb": LORA, **{f"w/adapter/{n}": d for n, d in adapter.items()}}))
    hand_ins = collect(folder, PRISTINE, out)
    for hand_in in hand_ins:
        assert set(hand_in.artefacts) == {"adapter_model.safetensors", "adapter_config.json"}
        assert all(p.is_relative_to(out / "received") and p.name == n for n, p in hand_in.artefacts.items())
    assert not [name for name in everything_under(out) if "evil" in name or "numpy" in name]


# ------------------------------------------------------------------------------------------ things that are no files


def test_pipes_sockets_devices_links_and_loops_are_reported_and_hang_nothing(folder, monkeypatch):
    (folder / "alice").mkdir()
    os.mkfifo(folder / "alice" / "lora.ipynb")
    os.mkfifo(folder / "bob.ipynb")
    monkeypatch.chdir(folder)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("carl.ipynb")
        (folder / "dora.ipynb").symlink_to("/dev/zero")
        (folder / "eve").symlink_to("/")
        (folder / "fay").mkdir()
        (folder / "fay" / "loop").symlink_to("..")
        (folder / "gus.ipynb").symlink_to("gus.ipynb")
        put(folder / "zoe.ipynb")
        start = time.monotonic()
        found = {h.student: h.problem for h in collect(folder, PRISTINE)}
    assert time.monotonic() - start < 5
    assert found["zoe"] == ""
    assert found["alice"] == "lora.ipynb is no ordinary file but a pipe; it was not opened." and "pipe" in found["bob"]
    assert "socket" in found["carl"] and all("is a link" in found[name] for name in ("dora", "eve", "fay", "gus"))


def test_a_file_that_becomes_a_pipe_after_it_was_looked_at(folder, monkeypatch):
    (folder / "lora.ipynb").touch()
    os.unlink(folder / "lora.ipynb")
    os.mkfifo(folder / "lora.ipynb")
    from pefttools.grading.splice import BadSubmission, read_notebook

    with pytest.raises(BadSubmission, match="is not a file"):
        read_notebook(folder / "lora.ipynb")


@pytest.mark.skipif(not hasattr(os, "mknod") or os.geteuid() != 0, reason="only root makes devices")
def test_devices(folder):
    try:
        os.mknod(folder / "alice.ipynb", 0o600 | stat.S_IFCHR, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("devices cannot be made here")
    assert "a device" in collect(folder, PRISTINE)[0].problem


def test_unreadable_files_and_folders(folder):
    put(folder / "alice.ipynb").chmod(0)
    put(folder / "bob" / "lora.ipynb")
    (folder / "bob").chmod(0)
    put(folder / "zoe.ipynb")
    code = (
        "import os, sys, json; sys.path[:0] = json.loads(sys.argv[2]); from pathlib import Path\n"
        "from pefttools.grading.intake import collect\n"
        "import importlib.util as u; s = u.spec_from_file_location('t', sys.argv[3])\n"
        "t = u.module_from_spec(s); s.loader.exec_module(t)\n"
        "import codecs; codecs.lookup('utf-8-sig'); os.geteuid() or os.seteuid(65534)\n"
        "print(json.dumps({h.student: h.problem for h in collect(Path('.'), t.PRISTINE)}))"
    )
    for parent in [folder, *folder.parents][:4]:  # so that nobody can come by
        os.access(parent, os.X_OK) and parent.owner() and parent != Path("/") and parent.chmod(
            parent.stat().st_mode | 0o5
        )
    done = subprocess.run(
        [sys.executable, "-c", code, "", json.dumps([p for p in sys.path if p]), __file__],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    (folder / "bob").chmod(0o700)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == {
        "zoe": "",
        "alice": "alice.ipynb cannot be read: Permission denied.",
        "bob": "The folder bob cannot be read: Permission denied.",
    }


def test_huge_and_sparse_files(folder):
    with (folder / "alice.ipynb").open("wb") as file:
        file.truncate(2**40)
    put(folder / "bob.ipynb", b"[" + b"{}," * 2_000_000 + b"{}]")
    put(folder / "zoe.ipynb")
    found = {h.student: h.problem for h in collect(folder, PRISTINE)}
    assert "the limit is 50 MiB" in found["alice"] and found["bob"] and found["zoe"] == ""


def test_deep_and_many(folder, monkeypatch):
    deep = folder / "alice"
    for _ in range(40):
        deep = deep / "d"
    put(deep / "lora.ipynb")
    monkeypatch.setattr(found, "FILES", 30)
    for n in range(60):
        put(folder / "bob" / f"{n}.csv", b"")
    put(folder / "zoe.ipynb")
    problems = {h.student: h.problem for h in collect(folder, PRISTINE)}
    assert "folders deep" in problems["alice"] and "more than 30 files" in problems["bob"] and problems["zoe"] == ""


def test_many_notebooks_of_one_person(folder):
    for n in range(30):
        put(folder / "alice" / f"lora{n}.ipynb", when=1000 + n)
    (hand_in,) = collect(folder, PRISTINE)
    assert hand_in.path.name == "lora29.ipynb" and any("only the newest 12" in note for note in hand_in.notes)


# ------------------------------------------------------------------------------------------ archives


def link(name, target=b"/etc/passwd"):
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return {info: target}


def encrypted():
    data = bytearray(zipped(None, {"lora.ipynb": LORA}))
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + offset] |= 1
    return bytes(data)


def corrupt():
    data = bytearray(zipped(None, {"lora.ipynb": os.urandom(5000)}, zipfile.ZIP_STORED))
    data[1000] ^= 255
    return bytes(data)


def lying():
    """A small size in the headers, a large one in the data."""
    data = bytearray(zipped(None, {"lora.ipynb": b" " * 80 * 2**20}))
    for mark, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = data.index(mark) + offset
        data[at : at + 4] = struct.pack("<I", 1000)
    return bytes(data)


def long_list():
    """An end record that says the list of names is a gigabyte."""
    data = bytearray(zipped(None, {"lora.ipynb": LORA}))
    at = data.rindex(b"PK\x05\x06")
    return (
        bytes(data[:at]) + b"\0" * (20 * 2**20) + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, 20 * 2**20, 0, 0)
    )


def tarred(*members, compressed=True):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz" if compressed else "w") as archive:
        for name, kind, data in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                info.linkname, data = data, b""
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


BAD = {
    "bomb.zip": (zipped(None, {"lora.ipynb": b" " * 40 * 2**20}), "unpacks to more than 200 times its size"),
    "total.zip": (
        zipped(None, {f"{n}.ipynb": os.urandom(1000) * 10**5 for n in range(2)}, zipfile.ZIP_DEFLATED),
        "more than",
    ),
    "lying.zip": (lying(), "damaged|more than|is empty|JSON is broken"),
    "list.zip": (long_list(), "too long a list of names"),
    "encrypted.zip": (encrypted(), "lora.ipynb is encrypted; pack it again without a password."),
    "outside.zip": (zipped(None, {"../../evil.ipynb": LORA}), "evil.ipynb is to be unpacked outside of its folder"),
    "absolute.zip": (zipped(None, {"/tmp/evil.ipynb": LORA}), "outside of its folder"),
    "drive.zip": (zipped(None, {"C:\\Windows\\evil.ipynb": LORA}), "outside of its folder"),
    "link.zip": (zipped(None, link("lora.ipynb")), "is a link inside the archive"),
    "corrupt.zip": (corrupt(), "damaged inside the archive"),
    "nested.zip": (zipped(None, {"a.zip": zipped(None, {"lora.ipynb": LORA})}), "a.zip is an archive in an archive"),
    "nothing.zip": (b"not a zip", "nothing.zip is a broken zip archive"),
    "empty.zip": (b"", "is a broken zip archive"),
    "lzma.zip": (zipped(None, {"lora.ipynb": LORA}, zipfile.ZIP_LZMA), "packed in an unusual way"),
    "nothing.tar.gz": (b"\x1f\x8b" + b"x" * 50, "nothing.tar.gz"),
    "link.tar.gz": (tarred(("lora.ipynb", tarfile.SYMTYPE, "/etc/passwd")), "is a link or device inside the archive"),
    "hard.tar.gz": (tarred(("lora.ipynb", tarfile.LNKTYPE, "../../../etc/passwd")), "is a link or device"),
    "fifo.tar": (tarred(("lora.ipynb", tarfile.FIFOTYPE, b""), compressed=False), "is a link or device"),
    "outside.tgz": (tarred(("../evil.ipynb", tarfile.REGTYPE, LORA)), "outside of its folder"),
    "cut.tar.gz": (tarred(("lora.ipynb", tarfile.REGTYPE, os.urandom(10**6)))[:5000], "cut.tar.gz is a broken archive"),
    "pdf.zip": (zipped(None, {"a.pdf": b"%PDF"}), "There is no notebook: a.pdf was handed in"),
    "random.zip": (b"PK\x03\x04" + os.urandom(3000) + b"PK\x05\x06" + os.urandom(18), "random.zip"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_archives_are_one_persons_trouble(name, folder, out, monkeypatch):
    data, message = BAD[name]
    if name == "total.zip":
        monkeypatch.setattr(found, "BOUNDS", archives.Bounds(total=2**20, ratio=10**6))
    put(folder / f"mallory-{name}", data)
    put(folder / "zoe.ipynb")
    before = everything_under(folder.parent)
    hand_ins = {h.student: h for h in collect(folder, PRISTINE, out)}
    said = " ".join(
        [hand_ins[f"mallory-{name.split('.')[0]}"].problem, *hand_ins[f"mallory-{name.split('.')[0]}"].notes]
    )
    assert hand_ins["zoe"].problem == "" and len(hand_ins) == 2
    import re

    assert re.search(message, said), said
    new = everything_under(folder.parent) - before
    assert all(path.startswith("grading/received/") for path in new) and not [p for p in new if "evil" in p]
    assert not Path("/tmp/evil.ipynb").exists()


def test_a_tar_of_endless_headers_and_a_gzip_of_zeros(folder, out, monkeypatch):
    monkeypatch.setattr(found, "BOUNDS", archives.Bounds(stream=2**20, entries=50))
    put(folder / "a.tar.gz", gzip.compress(b"\0" * 50 * 2**20))
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 2**40
    put(folder / "b.tar.gz", gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + b"1" * 5 * 2**20))
    put(folder / "c.tar.gz", tarred(*[(f"{n}.txt", tarfile.REGTYPE, b"") for n in range(100)]))
    put(folder / "d.zip", zipped(None, {f"{n}.txt": b"" for n in range(100)}))
    start = time.monotonic()
    problems = {h.student: h.problem for h in collect(folder, PRISTINE, out)}
    assert time.monotonic() - start < 20
    assert all(problems[name] for name in "abcd")
    assert (
        "more than 1 MiB" in problems["b"] and "more than 50 entries" in problems["c"] and "50 entries" in problems["d"]
    )


def test_one_persons_bomb_in_the_class_archive_costs_nobody_else(folder, out):
    entries = {
        "zoe_1_1001_lora.ipynb": LORA,
        "mal_2_1002_lora.ipynb": b" " * 60 * 2**20,
        "bad_3_1003_x.zip": b"PK",
        "../../../evil_4_1004_lora.ipynb": LORA,
        "con_5_1005_con.ipynb": LORA,
        "zoe_1_1006_LORA.ipynb": LORA,
        "__MACOSX/._zoe_1_1001_lora.ipynb": b"x",
    }
    zipped(folder / "all.zip", entries)
    found = people(collect(folder / "all.zip", PRISTINE, out))
    assert found["zoe-1", "02_lora"] == "" and found["con-5", "02_lora"] == ""
    assert any(s == "mal-2" and "200 times" in p for (s, _), p in found.items())
    assert any(s == "bad-3" and "broken zip" in p for (s, _), p in found.items())
    assert any(s == "evil-4" and "outside" in p for (s, _), p in found.items()) and len(found) == 5
    assert not [p for p in everything_under(folder.parent) if not p.startswith(("in/", "grading/received/"))]


def test_collecting_the_same_archive_again_gives_the_same(folder, out):
    zipped(folder / "all.zip", CANVAS)
    first = [(h.student, h.chapter, h.path) for h in collect(folder / "all.zip", PRISTINE, out)]
    files = everything_under(out)
    assert [(h.student, h.chapter, h.path) for h in collect(folder / "all.zip", PRISTINE, out)] == first
    assert everything_under(out) == files


def test_what_breaks_unexpectedly_is_one_persons(folder, monkeypatch):
    put(folder / "alice.ipynb")
    put(folder / "zoe.ipynb")
    real = intake._read
    monkeypatch.setattr(intake, "_read", lambda who, *rest: 1 / 0 if who.student == "alice" else real(who, *rest))
    found = {h.student: h.problem for h in collect(folder, PRISTINE)}
    assert "ZeroDivisionError" in found["alice"] and found["zoe"] == ""


def test_hand_ins_keep_their_fields():
    hand_in = HandIn("alice", Path("x"), "02_lora", None, "", [])
    assert (hand_in.artefacts, hand_in.person) == ({}, None)
