"""A seccomp filter: system calls that no exercise needs, and through which one gets out of sandboxes.

A list of what is denied, in the manner of Flatpak's and Docker's (https://github.com/flatpak/flatpak, common/
flatpak-run.c; https://docs.docker.com/engine/security/seccomp/): what debugs or reads other processes, makes
namespaces or mounts, loads code into the kernel, and whole subsystems that most holes of the past years were in. The
namespaces would already stop most of it; this makes the kernel's surface smaller.

    denied with      because
    EPERM            no business of a submission's
    ENOSYS           programs try it first and know another way: clone3 (its flags lie in memory, out of a filter's
                     sight), io_uring, memfd_create (memory that belongs to no process, unseen by the watcher)
    EAFNOSUPPORT     every socket family but Unix's and the internet's; the namespace has no network but its own
                     loopback, which a Jupyter kernel needs for the output of its child processes (and
                     NETLINK_ROUTE, since libzmq asks for the addresses of interfaces before it binds there)
    0, undone        prctl(PR_SET_PDEATHSIG): bubblewrap's process 1 has it set and belongs to the same user; nobody
                     shall talk it into outliving a grader that is killed
    EOPNOTSUPP       fallocate: takes disk space without writing, unseen by the watcher

Made by libseccomp through `pyseccomp` (which has the interface of libseccomp's own binding, and is on PyPI). Without
it the sandbox runs unfiltered, and `status()` says so for the report.
"""

from __future__ import annotations

import errno
import functools
import platform
import tempfile
from types import ModuleType

EPERM = (
    # other processes
    "ptrace process_vm_readv process_vm_writev process_madvise pidfd_getfd kcmp perf_event_open lookup_dcookie "
    # namespaces and mounts
    "unshare setns mount umount umount2 pivot_root chroot open_tree open_tree_attr move_mount fsopen fsconfig fsmount "
    "fspick mount_setattr name_to_handle_at open_by_handle_at fanotify_init "
    # keys, kernel code, tracing
    "add_key request_key keyctl bpf userfaultfd init_module finit_module delete_module create_module kexec_load "
    "kexec_file_load memfd_secret "
    # the machine
    "acct swapon swapoff reboot settimeofday clock_settime clock_adjtime adjtimex syslog quotactl quotactl_fd iopl "
    "ioperm modify_ldt personality uselib ustat sysfs nfsservctl vm86 vm86old vhangup sethostname setdomainname "
    "migrate_pages move_pages "
    # memory that belongs to no process
    "shmget shmat msgget semget").split()
ENOSYS = "clone3 io_uring_setup io_uring_enter io_uring_register memfd_create".split()
NAMESPACES = {"NEWTIME": 0x80, "NEWNS": 0x20000, "NEWCGROUP": 0x2000000, "NEWUTS": 0x4000000, "NEWIPC": 0x8000000,
              "NEWUSER": 0x10000000, "NEWPID": 0x20000000, "NEWNET": 0x40000000}
PR_SET_PDEATHSIG = 1
TIOCSTI, TIOCLINUX = 0x5412, 0x541C  # type into a terminal
FAMILIES = {"AF_UNIX": 1, "AF_INET": 2, "AF_INET6": 10}
AF_NETLINK, NETLINK_ROUTE = 16, 0
LAST_FAMILY = 64  # Linux has 46
CURED = ("pip install pyseccomp, with libseccomp (Debian, Ubuntu: apt install libseccomp2; Fedora: dnf install "
         "libseccomp)")


@functools.lru_cache(maxsize=1)
def binding() -> tuple[ModuleType | None, str]:
    """(pyseccomp, "") or (None, why there is none)."""
    try:
        import pyseccomp
    except ImportError:
        return None, "pyseccomp is not installed"
    except (RuntimeError, OSError, AttributeError) as error:  # libseccomp itself is missing, or ancient
        return None, f"pyseccomp: {error}"
    return pyseccomp, ""


def status() -> str:
    """"" if system calls are filtered here, else a sentence for the report."""
    module, why = binding()
    if module is None:
        return f"System calls are not filtered ({why}): {CURED}."
    if not program():
        return f"System calls are not filtered: libseccomp makes no filter for {platform.machine()}."
    return ""


@functools.lru_cache(maxsize=1)
def program() -> bytes:
    """The filter as BPF, for `bwrap --seccomp`; empty where none can be made."""
    module, _ = binding()
    if module is None:
        return b""
    try:
        made = _rules(module)
        with tempfile.TemporaryFile() as file:
            made.export_bpf(file)
            file.seek(0)
            return file.read()
    except OSError:
        return b""


def _rules(seccomp: ModuleType):
    made = seccomp.SyscallFilter(seccomp.ALLOW)  # another architecture's calls (32 bits on 64) end the process

    def deny(number: int, name: str, *arguments) -> None:
        try:
            made.add_rule(seccomp.ERRNO(number), name, *arguments)
        except OSError:  # a name that this libseccomp does not know yet
            pass

    for name in EPERM:
        deny(errno.EPERM, name)
    for name in ENOSYS:
        deny(errno.ENOSYS, name)
    deny(errno.EOPNOTSUPP, "fallocate")
    deny(0, "prctl", seccomp.Arg(0, seccomp.MASKED_EQ, 0xFFFFFFFF, PR_SET_PDEATHSIG))
    flags = 1 if platform.machine() == "s390x" else 0  # where clone takes its flags
    for flag in NAMESPACES.values():
        if flag != 0x80:  # in clone, that bit belongs to the signal's number
            deny(errno.EPERM, "clone", seccomp.Arg(flags, seccomp.MASKED_EQ, flag, flag))
    for request in (TIOCSTI, TIOCLINUX):  # the kernel looks at the lower half only
        deny(errno.EPERM, "ioctl", seccomp.Arg(1, seccomp.MASKED_EQ, 0xFFFFFFFF, request))
    for name in ("socket", "socketpair"):
        for family in range(LAST_FAMILY):
            if family not in FAMILIES.values():
                only = [seccomp.Arg(2, seccomp.NE, NETLINK_ROUTE)] if family == AF_NETLINK else []
                deny(errno.EAFNOSUPPORT, name, seccomp.Arg(0, seccomp.MASKED_EQ, 0xFFFFFFFF, family), *only)
    return made
