"""Files beside, instead of, and inside of the notebook: modules, configuration, links, pipes, archives."""

from __future__ import annotations

import io
import json
import os
import zipfile

from hostile.attack import folder, put

FAMILY = "files and archives"
FORGE = """
try:
    import pefttools.grading as grading
    grading.check = lambda name, *_, **__: {"lora-forward": 3, "count-parameters": 2, "lora-init": 3, "lora-q-scale": 1}[name]
except ImportError:
    pass
"""


def beside(name, what, files, stock=""):
    """An attack that is a blank notebook with files beside it."""
    @folder(name, FAMILY, what, stock=stock)
    def _(course, where):
        put(where, course.pristine())
        for path, text in files.items():
            (where / path).parent.mkdir(parents=True, exist_ok=True)
            (where / path).write_text(text)


beside("shadow-launcher", "a file ipykernel_launcher.py: `python -m` finds it first, and it runs instead of the kernel",
       {"ipykernel_launcher.py": FORGE + "\nfrom ipykernel import kernelapp\nkernelapp.launch_new_instance()"})
beside("shadow-numpy", "files numpy.py, torch.py, random.py and typing.py: imported in place of the real ones",
       {"numpy.py": FORGE + "raise SystemExit", "torch.py": FORGE, "random.py": FORGE, "typing.py": FORGE})
beside("shadow-pefttools", "a folder pefttools/ with a `check` that gives all points",
       {"pefttools/__init__.py": "", "pefttools/grading/__init__.py":
        "def check(name, *_, **__):\n    return {'lora-forward': 3, 'count-parameters': 2, 'lora-init': 3, 'lora-q-scale': 1}[name]"})
beside("sitecustomize", "sitecustomize.py, usercustomize.py, a .pth and a conftest.py",
       {"sitecustomize.py": FORGE, "usercustomize.py": FORGE, "x.pth": "import os; os._exit(0)\n", "conftest.py": FORGE})
beside("configuration", "nbgrader_config.py, jupyter_config.py, a .jupyter folder and an IPython start-up file",
       {"nbgrader_config.py": "c = get_config()\nc.Autograde.autograde_preprocessors = []\nopen('hostile-config', 'w')",
        "jupyter_config.py": "raise SystemExit('hostile')", "jupyter_nbconvert_config.py": "raise SystemExit('hostile')",
        ".jupyter/jupyter_config.py": "raise SystemExit('hostile')",
        ".ipython/profile_default/startup/00.py": FORGE, "kernel.json": '{"argv": ["sh", "-c", "touch hostile-kernel"]}'})


@folder("link-to-solution", FAMILY, "instead of the notebook a link to the instructor's solutions")
def _(course, where):
    where.mkdir(parents=True)
    (where / "lora.ipynb").symlink_to(f"{course.root}/solutions/02_lora.ipynb")


@folder("link-to-neighbour", FAMILY, "instead of the notebook a link to a neighbour's, and a folder that is one")
def _(course, where):
    where.mkdir(parents=True)
    (where / "lora.ipynb").symlink_to("../../zoe/02_lora/lora.ipynb")
    (where / "more").symlink_to("../../zoe")


@folder("hard-link", FAMILY, "instead of the notebook a hard link to a neighbour's")
def _(course, where):
    # whoever can make one on the same disk can read the neighbour's file: what it must not do is change it
    put(where, course.pristine())
    (where / "copy.txt").hardlink_to(where / "lora.ipynb")


@folder("link-to-gradebook", FAMILY,
        "files named as nbgrader's, linked to the gradebook, to /dev/zero and to /etc/shadow")
def _(course, where):
    put(where, course.pristine())
    for name, target in (("gradebook.db", f"{course.root}/grading/gradebook.db"), ("timestamp.txt", "/etc/shadow"),
                         ("zero.ipynb", "/dev/zero"), ("loop", ".")):
        (where / name).symlink_to(target)


@folder("pipe", FAMILY, "instead of the notebook a named pipe: whoever opens it waits for ever", stock="waits for ever")
def _(course, where):
    where.mkdir(parents=True)
    os.mkfifo(where / "lora.ipynb")


@folder("time-stamp", FAMILY,
        "a timestamp.txt that says it was handed in a thousand years ago, then a megabyte of text")
def _(course, where):
    put(where, course.pristine())
    (where / "timestamp.txt").write_text("1026-01-01 00:00:00 UTC\n" + "x" * 2**20)


@folder("folder-for-notebook", FAMILY, "a folder called lora.ipynb, with folders in it")
def _(course, where):
    (where / "lora.ipynb" / "lora.ipynb").mkdir(parents=True)


@folder("not-json", FAMILY, "a notebook that ends in the middle, with a byte-order mark and NUL bytes")
def _(course, where):
    put(where, "")
    (where / "lora.ipynb").write_bytes(b"\xef\xbb\xbf" + json.dumps(course.solved()).encode()[:5000] + b"\x00" * 99)


@folder("deep-json", FAMILY, "a hundred thousand brackets, one in the other")
def _(course, where):
    put(where, '{"cells": ' + "[" * 100_000 + "]" * 100_000 + "}")


@folder("large-file", FAMILY, "a notebook of 200 MB, all blanks (sparse)", stock="takes this machine's memory")
def _(course, where):
    put(where, json.dumps(course.pristine()))
    with (where / "lora.ipynb").open("r+b") as file:
        file.truncate(200 * 2**20)


@folder("impersonate", FAMILY,
        "a neighbour's name on folders and files inside of its own, on its zip's, in Canvas's and Moodle's form")
def _(course, where):
    put(where, course.pristine())
    mine = where.parent
    for path in ("zoe/02_lora/lora.ipynb", "zoe.ipynb", "zoe_lora.ipynb", "02_lora/zoe/lora.ipynb", "zoe_12345_67890_lora.ipynb",
                 "zoe_12345_assignsubmission_file_/lora.ipynb"):
        (mine / path).parent.mkdir(parents=True, exist_ok=True)
        (mine / path).write_text(json.dumps(course.pristine()))
    with zipfile.ZipFile(mine / "zoe.zip", "w") as made:
        made.writestr("zoe/02_lora/lora.ipynb", json.dumps(course.pristine()))


@folder("odd-names", FAMILY,
        "files with names of 255 bytes, line ends, terminal codes, bytes that are no text, formulas")
def _(course, where):
    put(where, course.pristine())
    for name in (b"x" * 249 + b".ipynb", b"two\nlines.ipynb", b"\x1b[2J.ipynb", b"\xff\xfe.ipynb", b"=cmd|' C calc'!A1.ipynb",
                 "\u202egnp.ipynb".encode(), b"<img src=x onerror=HOSTILE=1>.ipynb", b"`$(touch hostile)`.ipynb", b"-rf.ipynb",
                 b"%s%n{0}.ipynb", b"'; drop table grade; --.ipynb"):
        with open(os.path.join(os.fsencode(where), name), "w") as file:
            json.dump(course.pristine(), file)


@folder("many-handed-in", FAMILY, "twelve thousand files and folders in one hand-in, some very deep, some closed")
def _(course, where):
    put(where, course.pristine())
    for n in range(6000):
        (where / f"f{n}.txt").touch()
    deep = where
    for n in range(60):
        deep = deep / "d"
        deep.mkdir()
    (deep / "lora.ipynb").write_text(json.dumps(course.solved()))
    closed = where / "closed"
    closed.mkdir()
    (closed / "lora.ipynb").write_text("{}")
    closed.chmod(0)


def archive(name, what, fill, stock="stock nbgrader takes no archives"):
    """An attack that is a zip in the student's folder."""
    @folder(name, FAMILY, what, stock=stock)
    def _(course, where):
        where.mkdir(parents=True)
        with zipfile.ZipFile(where / "lora.zip", "w", zipfile.ZIP_DEFLATED) as made:
            fill(made, course)


def _climbs(made, course):
    solved = json.dumps(course.solved())
    for path in ("../../zoe/02_lora/lora.ipynb", f"{course.root}/grading/gradebook.db", "..\\..\\zoe\\02_lora\\lora.ipynb",
                 "../../../course/02_lora/lora.ipynb"):
        made.writestr(path, solved.replace("return frozen", "return 0 * frozen"))


def _bomb(made, course):
    with made.open("lora.ipynb", "w", force_zip64=True) as file:
        for _ in range(1000):
            file.write(b" " * 2**20)


def _links(made, course):
    link = zipfile.ZipInfo("lora.ipynb")
    link.external_attr = 0o120777 << 16
    made.writestr(link, f"{course.root}/solutions/02_lora.ipynb")


def _nested(made, course):
    inner = json.dumps(course.solved()).encode()
    for n in range(30):
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as box:
            box.writestr("lora.ipynb" if n == 0 else "lora.zip", inner)
        inner = content.getvalue()
    made.writestr("lora.zip", inner)


def _lies(made, course):
    """Sizes that are not true: the list says a few bytes, the data goes on."""
    with made.open("lora.ipynb", "w", force_zip64=True) as file:
        for _ in range(100):
            file.write(os.urandom(2**20))
    made.filelist[0].file_size = made.filelist[0].compress_size = 10


archive("zip-climbs", "a zip with ../, absolute and Windows paths onto a neighbour's notebook and the gradebook", _climbs)
archive("zip-bomb", "a zip of 1 MB that unpacks to 1 GB", _bomb)
archive("zip-links", "a zip that holds a link to the solutions", _links)
archive("zip-in-zip", "thirty zips, one in the other", _nested)
archive("zip-lies", "a zip whose list of contents gives false sizes", _lies)
