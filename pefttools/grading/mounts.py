"""What of this machine's files a sandbox sees, as bubblewrap's arguments: folders in, secrets, hidden packages out.

    bound read-only      /usr /lib …, the Python that grades (sys.prefix, sys.base_prefix), site-packages elsewhere
    over it, empty       this checkout and the home folder, where they lie inside of something bound; conda's caches
    over it, a stub      every copy of a hidden package in any site-packages that is bound, and of this package itself

A mount lies on top of what was mounted before it, so they are sorted by depth: the checkout may lie in /usr/src, and
the environment in the checkout.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path

INNER = Path(__file__).resolve().parent / "inner"
CHECKOUT = Path(__file__).resolve().parents[2]
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/libx32", "/bin", "/sbin")
# What programs look up in /etc; nothing of it says who works on this machine.
ETC = ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "ssl/certs", "pki/tls/certs", "alternatives", "fonts")
OWN_ETC = ("passwd", "group", "hosts", "resolv.conf", "nsswitch.conf")  # ours instead of this machine's
# torch counts processors in there; without it, it complains on stderr
SYS = ("/sys/devices/system/cpu", "/sys/devices/system/node")
SITES = ("lib*/python3*/site-packages", "lib*/python3*/dist-packages", "local/lib*/python3*/dist-packages",
         "local/lib*/python3*/site-packages")
SUFFIXES = (".py", ".pyc", ".so", ".pyd")


def file_arguments(hidden: Iterable[str] = (), secret: Iterable[Path] = ()) -> list[str]:
    """bubblewrap's arguments for everything but the room's own folders.

    `hidden`: importable names, each a whole package or module; `secret`: folders not to be seen even where they lie
    inside of one that is. Raises ValueError for a hidden name with a dot: parts of a package cannot be left out.
    """
    system = [folder for folder in SYSTEM if Path(folder).is_dir() and not Path(folder).is_symlink()]
    every = python_folders()
    tops = [*system, *every]
    covered = masks(tops, (*own_secrets(), *secret))
    # a folder of the interpreter needs a mount of its own where no other holds it, or where a mask lies over it
    roots = [root for root in every if not _inside(root, [top for top in tops if top != root])
             or _inside(root, covered)]
    mounts = [(root, ["--ro-bind", root, root]) for root in roots]
    sealed = []
    for folder in covered:
        mounts.append((folder, ["--tmpfs", folder]))
        sealed += ["--remount-ro", folder]
    for path in hidden_paths(tuple(sorted({"pefttools", *hidden})), tuple(tops)):
        if Path(path).is_dir():
            stub = ["--tmpfs", path, "--ro-bind", f"{INNER}/absent.txt", f"{path}/__init__.py"]
            mounts.append((path, stub))
            sealed += ["--remount-ro", path]
        else:
            mounts.append((path, ["--ro-bind", f"{INNER}/absent.txt", path]))
    line = _system()
    for _, arguments in sorted(mounts, key=lambda mount: mount[0].count("/")):
        line += arguments
    return line + sealed


def own_secrets() -> tuple[Path, ...]:
    """The home folder, and the checkout that this package runs from; installed, it runs from site-packages instead."""
    return (Path.home(), *((CHECKOUT,) if (CHECKOUT / "pyproject.toml").is_file() else ()))


def python_folders() -> list[str]:
    """The folders of the interpreter and of what it imports."""
    # the real place of the interpreter too: a virtual environment's is a link
    found = {os.path.abspath(sys.prefix), os.path.abspath(sys.base_prefix)}
    found.add(str(Path(sys.executable).resolve().parents[1]))
    found |= {os.path.realpath(folder) for folder in found}
    found.update(extra_sites())
    return sorted(found - {"/"}, key=lambda folder: (len(folder), folder))


@functools.lru_cache(maxsize=1)
def extra_sites() -> tuple[str, ...]:
    """Folders of packages on this interpreter's path outside of its own, such as `pip install --user` makes them."""
    prefixes = (sys.prefix, sys.base_prefix, *SYSTEM)
    sites = (os.path.abspath(folder) for folder in sys.path
             if Path(folder).name in ("site-packages", "dist-packages") and Path(folder).is_dir())
    return tuple(dict.fromkeys(folder for folder in sites if not _inside(folder, prefixes)))


def masks(tops: Iterable[str], secret: Iterable[Path]) -> list[str]:
    """The folders among `secret` that would be seen because they lie inside of one of `tops`; conda's caches too.

    A folder that holds the interpreter itself stays: without it nothing runs.
    """
    tops = list(tops)
    wanted = [os.path.realpath(folder) for folder in secret]
    for root in tops:
        if Path(root, "conda-meta").is_dir():  # pkgs: unpacked copies of every package; envs: other environments
            wanted += [f"{root}/{name}" for name in ("pkgs", "envs") if Path(root, name).is_dir()]
    keep = [os.path.realpath(os.__file__), *map(os.path.realpath, SYSTEM)]
    return sorted({folder for folder in wanted if folder not in tops and _inside(folder, tops)
                   and Path(folder).is_dir()
                   # what the mask would cover is mounted again on top of it, unless it is no mount of its own
                   and not any(_inside(needed, [folder]) and not _rebound(needed, folder, tops) for needed in keep)})


@functools.lru_cache(maxsize=64)
def hidden_paths(names: tuple[str, ...], tops: tuple[str, ...]) -> tuple[str, ...]:
    """Every copy of these packages and modules below `tops`; what is not installed needs no hiding."""
    found: set[str] = set()
    sites = {str(site) for top in tops for pattern in SITES for site in Path(top).glob(pattern) if site.is_dir()}
    sites.update(extra_sites())
    for name in names:
        if not name.isidentifier():
            raise ValueError(f"hidden: {name!r} is not the name of a whole package or module; only those can be.")
        for site in sites:
            if os.path.isdir(f"{site}/{name}"):
                found.add(f"{site}/{name}")
            found.update(str(path) for path in Path(site).glob(f"{name}.*") if path.suffix in SUFFIXES)
        spec = importlib.util.find_spec(name) if name != "pefttools" else None
        if spec and spec.submodule_search_locations:
            found.update(spec.submodule_search_locations)
        elif spec and spec.has_location:
            found.add(str(spec.origin))
    real = {os.path.realpath(path) for path in found}
    return tuple(sorted(path for path in real if _inside(path, tops)))


def _system() -> list[str]:
    line: list[str] = []
    for folder in SYSTEM:
        path = Path(folder)
        if path.is_symlink():
            line += ["--symlink", os.readlink(path), folder]
        elif path.is_dir():
            line += ["--ro-bind", folder, folder]
    for name in ETC:
        line += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    for name in OWN_ETC:
        line += ["--ro-bind", f"{INNER}/{name}", f"/etc/{name}"]
    for folder in SYS:
        line += ["--ro-bind-try", folder, folder]
    return line


def _inside(path: str, folders: Iterable[str]) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders)


def _rebound(needed: str, mask: str, tops: Iterable[str]) -> bool:
    return any(top != mask and _inside(top, [mask]) and _inside(needed, [top]) for top in tops)
