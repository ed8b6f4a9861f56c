"""What works on this machine, each finding with what to do about it.

    pefttools doctor            in a terminal; --json for programs
    doctor()                    in a notebook: a table

Nothing here can crash: a check that raises becomes a row that says so. What loads native code (torch, bitsandbytes) runs in
a process of its own with a time limit, since a broken build may take its process along. All in all under 15 seconds.
"""

from __future__ import annotations

import html
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARKS = {"ok": "✓", "note": "·", "problem": "✗"}
PROBE_SECONDS = 12.0  # torch and bitsandbytes: 3 s with files in the cache, 10 s on a cold disk
PROBE_CODE = "from pefttools.doctor import probe; probe()"
HUB_SECONDS = 3.0
GB = 1e9

# Without these nothing opens; without the others a part of the course is missing.
NEEDED = ("torch", "transformers", "peft", "datasets", "tokenizers", "safetensors", "jupyterlab", "ipykernel")
INSTALL = "`make lab` installs it; without make: pip install -e . -c .ci/constraints.txt"


@dataclass(frozen=True)
class Row:
    """One finding. `status` is "ok", "note" (good to know) or "problem"; `stops`: the course cannot go on with it."""

    check: str
    status: str
    found: str
    todo: str = ""
    stops: bool = False


@dataclass
class Diagnosis:
    """All findings: prints as text, shows as a table in notebooks, `to_json()` for programs."""

    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def stops(self) -> bool:
        """Whether anything stands in the way of the course as a whole."""
        return any(row.stops for row in self.rows)

    @property
    def verdict(self) -> str:
        problems = sum(row.status == "problem" for row in self.rows)
        if self.stops:
            return "The course cannot run here yet; see the rows marked as stopping it."
        if problems:
            return f"The course runs here; {problems} thing{'s' if problems > 1 else ''} in it will not."
        return "The course runs here."

    def __str__(self) -> str:
        lines = []
        for row in self.rows:
            lines.append(f"{MARKS.get(row.status, '?')} {row.status:8}{row.check:16} {row.found}")
            if row.todo:
                lines.append(" " * 27 + f"→ {'stops the course: ' if row.stops else ''}{row.todo}")
        return "\n".join([*lines, "", f"{self.verdict} ({self.seconds:.1f} s)"])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        # Weight and word carry the status; no background, for dark and light themes alike.
        lines = []
        for row in self.rows:
            todo = html.escape(row.todo)
            if row.stops:
                todo = f"<b>Stops the course.</b> {todo}"
            status = f"{MARKS.get(row.status, '?')} {html.escape(row.status)}"
            cells = [status if row.status == "ok" else f"<b>{status}</b>", html.escape(row.check), html.escape(row.found), todo]
            lines.append("<tr>" + "".join(f'<td style="text-align:left; vertical-align:top">{c}</td>' for c in cells) + "</tr>")
        head = "".join(f'<th scope="col" style="text-align:left">{h}</th>' for h in ("", "what", "found", "what to do"))
        return (f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
                f"<p><b>{html.escape(self.verdict)}</b></p>")

    def to_json(self) -> str:
        """`{"stops": bool, "verdict": str, "seconds": float, "rows": [{check, status, found, todo, stops}]}`"""
        return json.dumps({"stops": self.stops, "verdict": self.verdict, "seconds": round(self.seconds, 2),
                           "rows": [asdict(row) for row in self.rows]}, indent=1, ensure_ascii=False)


def doctor() -> Diagnosis:
    """Run every check; see the module's docstring. Never raises."""
    start = time.perf_counter()
    rows: list[Row] = []
    with Probe() as probe, Background(reach_hub) as hub:  # both while the quick checks run
        for name, check in CHECKS:
            rows += guarded(name, check)
        rows += guarded("hub", lambda: hub_rows(hub.result(HUB_SECONDS + 1.0)))
        findings, end = probe.result(start + PROBE_SECONDS - time.perf_counter())
    for name, make in (("torch", torch_rows), ("bitsandbytes", bitsandbytes_rows)):
        rows += guarded(name, lambda make=make: make(findings, end))
    return Diagnosis(rows, time.perf_counter() - start)


def guarded(name: str, check: Callable[[], list[Row]]) -> list[Row]:
    """The rows of a check; a check that raises becomes a row of its own."""
    try:
        return list(check())
    except Exception as e:  # whatever it is, the other checks are still of use
        return [Row(name, "note", f"could not be checked ({type(e).__name__}: {str(e)[:200]})")]


# ── this machine ──────────────────────────────────────────────────────────────────────────────────────────────────────
def python_rows() -> list[Row]:
    version = platform.python_version()
    if sys.version_info < (3, 11):
        return [Row("Python", "problem", version, "the course needs 3.11 or later: make lab PYTHON=python3.12", stops=True)]
    return [Row("Python", "ok", f"{version} in {sys.prefix}")]


def machine_rows() -> list[Row]:
    system, release = platform.system(), platform.release()
    where = {"Darwin": f"macOS {platform.mac_ver()[0]}"}.get(system, f"{system} {release}")
    if "microsoft" in release.lower():
        where += " (WSL)"
    if "google.colab" in sys.modules or "COLAB_RELEASE_TAG" in os.environ:
        where += " (Colab)"
    rows = []
    if system == "Windows":
        rows.append(Row("system", "note", where, "chapters run; make and grading need WSL (`wsl --install`), see the README"))
    elif system == "Darwin" and platform.machine() == "x86_64":
        rows.append(Row("system", "problem", f"{where}, Intel", "torch is no longer built for Macs with Intel processors: use Colab "
                        "(the badge on top of each chapter) or a Linux machine", stops=True))
    else:
        rows.append(Row("system", "ok", f"{where}, {platform.machine()}"))
    cores, total, free = cores_here(), *memory_here()
    found = f"{cores} core{'s' if cores != 1 else ''}, {total / GB:.1f} GB memory, {free / GB:.1f} GB free"
    if total < 3.5 * GB:
        rows.append(Row("cores, memory", "problem", found, "chapters take up to 3 GB: close other programs and kernels, or use Colab"))
    elif free < 2 * GB:
        rows.append(Row("cores, memory", "note", found, "chapters take up to 3 GB: close other programs and kernels first"))
    elif cores < 2:
        rows.append(Row("cores, memory", "note", found, "training takes about twice the minutes that the chapters state"))
    else:
        rows.append(Row("cores, memory", "ok", found))
    return rows


def cores_here() -> int:
    """Cores that this process may use; a container's share where it is limited."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup, or "max"
        pass
    return cores


def memory_here() -> tuple[float, float]:
    """(total, free) bytes; a container's limit where there is one."""
    import psutil

    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        total, free = min(total, limit), min(free, max(limit - used, 0))
    except (OSError, ValueError):
        pass
    return total, free


def disk_rows() -> list[Row]:
    free = shutil.disk_usage(Path.cwd()).free
    found = f"{free / GB:.1f} GB free in {Path.cwd()}"
    if free < 0.2 * GB:
        return [Row("disk", "problem", found, "notebooks and adapters cannot be saved: make room", stops=True)]
    if free < 5 * GB:
        return [Row("disk", "note", found, "enough for the bundled model; Llama-3.2-1B takes 2.5 GB more")]
    return [Row("disk", "ok", found)]


# ── packages ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def tested_versions() -> dict[str, str]:
    """{package: version} of .ci/constraints.txt; empty where the package was installed without its repository."""
    try:
        text = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8")
    except OSError:
        return {}
    return {canonical(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)$", text, re.M)}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> list:
    """What pefttools requires here, from its installed metadata, else from pyproject.toml."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("pefttools") or []
    except importlib.metadata.PackageNotFoundError:
        import tomllib

        lines = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    parsed = map(Requirement, lines)
    return [r for r in parsed if "extra" not in str(r.marker or "") and (r.marker is None or r.marker.evaluate())]


def package_rows() -> list[Row]:
    tested, rows, good = tested_versions(), [], []
    for requirement in requirements():
        name = requirement.name
        stops = canonical(name) in NEEDED
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            rows.append(Row(name, "problem", "not installed", INSTALL, stops))
            continue
        want = tested.get(canonical(name))
        if not requirement.specifier.contains(version, prereleases=True):
            why = "draws nothing in VS Code; " if (name, version) == ("ipywidgets", "8.1.9") else ""
            rows.append(Row(name, "problem", f"{version}, where the course needs {requirement.specifier}",
                            f"{why}{INSTALL.replace('installs it', f'installs {want}' if want else 'installs another')}"))
        elif want and version.split("+")[0] != want:
            rows.append(Row(name, "note", f"{version}; tested with {want}", "fine unless something behaves oddly"))
        else:
            good.append(f"{name} {version}")
    if good:
        rows.insert(0, Row("packages", "ok", f"{'as tested: ' if tested else ''}{', '.join(good)}"))
    return rows


def jupyter_rows() -> list[Row]:
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    try:
        argv = KernelSpecManager().get_kernel_spec("python3").argv
    except NoSuchKernel:
        return [Row("kernel", "problem", "there is no kernel python3", "pip install ipykernel", stops=True)]
    program = argv[0] if argv else ""
    if re.fullmatch(r"python(3(\.\d+)?)?", program) or same_program(program, sys.executable):  # Jupyter fills in its own
        return [Row("kernel", "ok", "notebooks run in this environment")]
    return [Row("kernel", "problem", f"notebooks run in {program}, and this is {sys.executable}",
                "a kernel of your own shadows the environment's: `jupyter kernelspec list` shows it, "
                "`jupyter kernelspec uninstall python3` removes it")]


def same_program(a: str, b: str) -> bool:
    """Whether two paths name the same environment's interpreter (python and python3.11 of one bin folder are the same)."""
    return os.path.dirname(os.path.abspath(a)) == os.path.dirname(os.path.abspath(b))


def widget_rows() -> list[Row]:
    version = importlib.metadata.version("ipywidgets")
    if version == "8.1.9":
        return [Row("widgets", "problem", "ipywidgets 8.1.9 draws nothing in VS Code", "pip install ipywidgets==8.1.8")]
    return [Row("widgets", "ok", f"ipywidgets {version}: sliders in JupyterLab, VS Code and Colab; figures show everywhere")]


# ── grading's sandbox ─────────────────────────────────────────────────────────────────────────────────────────────────
def bubblewrap_rows() -> list[Row]:
    check = "bubblewrap"
    if platform.system() != "Linux":
        return [Row(check, "note", f"not on {platform.system()}", "only instructors need it, to grade: use Linux or WSL for that")]
    program = shutil.which("bwrap")
    if program is None:
        return [Row(check, "note", "not installed", "only instructors need it, to grade: apt install bubblewrap")]
    command = [program, "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--unshare-all", "--die-with-parent", "true"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, errors="replace")
    except (OSError, subprocess.TimeoutExpired) as e:
        return [Row(check, "note", f"{program} does not run ({type(e).__name__})", "only instructors need it, to grade")]
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        return [Row(check, "note", f"installed, but it cannot make a sandbox here ({why})",
                    "only instructors need it, to grade: this container or system forbids user namespaces; grade on another machine, "
                    "or allow them (sysctl kernel.unprivileged_userns_clone=1, or docker --security-opt seccomp=unconfined)")]
    return [Row(check, "ok", "makes sandboxes")]


# ── what the course brings along ──────────────────────────────────────────────────────────────────────────────────────
def bundle_rows() -> list[Row]:
    return [*guarded("bundled model", model_rows), *guarded("bundled data", data_rows)]


def restore(folder: Path) -> str:
    where = folder.relative_to(ROOT).as_posix() if ROOT in folder.parents else str(folder)
    return f"restore it: git checkout -- {where} (or clone the repository again)"


def model_rows(folder: Path | None = None) -> list[Row]:
    """The bundled model's files against their checksums, and its weights' header."""
    import hashlib

    from safetensors import SafetensorError, safe_open

    folder, check = folder or ROOT / "pefttools" / "lab" / "tiny", "bundled model"

    def bad(found: str) -> list[Row]:
        return [Row(check, "problem", found, restore(folder), stops=True)]

    try:
        sums = json.loads((folder / "sha256.json").read_text(encoding="utf-8"))
        for file, digest in sums.items():
            if hashlib.sha256((folder / file).read_bytes()).hexdigest() != digest:
                return bad(f"{file} is damaged: its checksum is another")
        with safe_open(folder / "model.safetensors", framework="numpy") as weights:
            tensors = len(list(weights.keys()))
    except FileNotFoundError as e:
        return bad(f"{Path(e.filename).name} is missing")
    except (OSError, ValueError, AttributeError, SafetensorError) as e:
        return bad(f"cannot be read ({type(e).__name__}: {e})")
    size = sum((folder / file).stat().st_size for file in sums)
    return [Row(check, "ok", f"{tensors} tensors, {size / 1e6:.1f} MB, checksums hold")]


def data_rows(folder: Path | None = None) -> list[Row]:
    """The bundled data set's files: there, not empty, and (JSON Lines) the first and the last row can be read."""
    import gzip

    folder, check = folder or ROOT / "pefttools" / "lab" / "data", "bundled data"
    files = [f for f in sorted(folder.iterdir()) if f.is_file() and not f.name.startswith(".")] if folder.is_dir() else []
    if not files:
        return [Row(check, "problem", "is missing", restore(folder), stops=True)]
    rows = 0
    for file in files:
        try:
            if re.search(r"\.jsonl(\.gz)?$", file.name):
                with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as f:
                    lines = f.readlines()
                for line in (lines[0], lines[-1]):
                    json.loads(line)["instruction"]
                rows += len(lines)
            elif not file.stat().st_size:
                raise ValueError("empty")
        except (OSError, EOFError, ValueError, TypeError, KeyError, IndexError) as e:
            return [Row(check, "problem", f"{file.name} cannot be read ({type(e).__name__})", restore(folder), stops=True)]
    return [Row(check, "ok", f"{rows:,} rows" if rows else f"{len(files)} files")]


# ── the hub ───────────────────────────────────────────────────────────────────────────────────────────────────────────
class Background:
    """Run a function in a thread that cannot hold up the end of the program; `result` waits a bounded time for it."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.value: object = TimeoutError("no answer in time")
        self.thread = threading.Thread(target=self.run, args=(function,), daemon=True)

    def run(self, function: Callable[[], object]) -> None:
        try:
            self.value = function()
        except Exception as e:
            self.value = e

    def __enter__(self) -> Background:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def result(self, seconds: float) -> object:
        """What the function returned, or the exception that it raised (not raised again), or a TimeoutError."""
        self.thread.join(seconds)
        return self.value


def offline() -> bool:
    return any(os.environ.get(v, "").strip().lower() in ("1", "true", "yes", "on") for v in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))


def reach_hub() -> str:
    """Ask the hub's front door for its header; any answer will do."""
    import urllib.error
    import urllib.request

    if offline():
        return "offline"
    from huggingface_hub import constants

    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_SECONDS):
            pass
    except urllib.error.HTTPError:
        pass
    return "reachable"


def hub_rows(answer: object) -> list[Row]:
    """`answer`: "offline", "reachable", or the exception that came instead."""
    instead = "the bundled model takes the place of Llama-3.2-1B; nothing else is missing"
    if answer == "offline":
        return [Row("model hub", "note", "switched off (HF_HUB_OFFLINE is set)", instead)]
    if isinstance(answer, BaseException):
        why = getattr(answer, "reason", None) or answer
        return [Row("model hub", "note", f"not reachable ({why})", f"{instead}. Behind a proxy set HTTPS_PROXY")]
    from huggingface_hub import get_token

    if get_token():
        return [Row("model hub", "ok", "reachable, with a token")]
    return [Row("model hub", "ok", "reachable, no token",
                "gated models such as Llama-3.2-1B need one (`hf auth login`, or HF_TOKEN); an ungated mirror is tried next")]


# ── torch and bitsandbytes, in a process of their own ─────────────────────────────────────────────────────────────────
class Probe:
    """Runs `probe()` in another process; `result` returns what it found until its end, or until time was up."""

    def __enter__(self) -> Probe:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
                       "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen([sys.executable, "-c", PROBE_CODE], env=environment,
                                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def result(self, seconds: float) -> tuple[dict[str, dict], str]:
        """({"torch": {...}, "bitsandbytes": {...}}, how it ended: "done", "time", "died: ..."); parts may be missing."""
        try:
            out, err = self.process.communicate(timeout=max(seconds, 0.1))
            end = "done"
            if self.process.returncode:
                last = (err.decode(errors="replace").strip().splitlines() or [""])[-1]
                end = f"died: exit {self.process.returncode}{', ' + last[:200] if last else ''}"
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, _ = self.process.communicate()
            end = "time"
        findings: dict[str, dict] = {}
        for line in out.decode(errors="replace").splitlines():
            if line.startswith("{"):
                try:
                    findings |= json.loads(line)
                except ValueError:  # cut off in the middle
                    pass
        return findings, end


def probe() -> None:
    """In the other process: one line of JSON for each part, as soon as it is known."""
    for name, find in (("torch", find_torch), ("bitsandbytes", find_bitsandbytes)):
        try:
            found = find()
        except Exception as e:
            found = {"error": f"{type(e).__name__}: {str(e)[:300]}"}
        print(json.dumps({name: found}), flush=True)


def find_torch() -> dict:
    """What torch says of the device."""
    import torch

    found: dict = {"version": torch.__version__, "threads": torch.get_num_threads(), "device": "cpu"}
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        free, total = torch.cuda.mem_get_info()
        found |= {"device": "cuda", "name": torch.cuda.get_device_name(), "capability": [major, minor], "free": free, "total": total,
                  # without the argument it counts emulation, and a T4 says True
                  "bf16": torch.cuda.is_bf16_supported(including_emulation=False), "count": torch.cuda.device_count()}
    elif torch.backends.mps.is_available():
        found |= {"device": "mps"}
    found["cuda_build"] = torch.version.cuda
    found["nvidia"] = shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()
    try:
        flags = set(re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M).group(1).split())
    except (OSError, AttributeError):
        flags = set()
    found["cpu_bf16"] = sorted(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    found["cpu"] = torch.backends.cpu.get_cpu_capability()
    return found


def find_bitsandbytes() -> dict:
    """A real 4-bit round trip on the device, and the two faults of the CPU path that change results in silence.

    Relative error of NF4 on normal weights in blocks of 64: 0.092 (measured; QLoRA's code). 0.12 and more is a fault.
    """
    import torch
    from bitsandbytes import functional, nn

    import bitsandbytes

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)

    def round_trip(d_out: int, d_in: int) -> float:
        weight = torch.randn(d_out, d_in, device=device)
        codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        back = functional.dequantize_4bit(codes, state)
        return ((back - weight).norm() / weight.norm()).item()

    found = {"version": bitsandbytes.__version__, "device": device, "error_256": round_trip(64, 256), "error_96": round_trip(64, 96)}
    # The order of every notebook: a baseline in eval mode first, then training.
    layer = nn.Linear4bit(256, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to(device)
    with torch.no_grad():
        layer.eval()(torch.randn(1, 256, device=device))
    x = torch.randn(1, 256, device=device, requires_grad=True)
    y = layer.train()(x)
    gradient = torch.autograd.grad(y.sum(), x, allow_unused=True)[0] if y.requires_grad else None
    found["gradient_after_eval"] = gradient is not None and bool(gradient.abs().sum() > 0)
    return found


def ended(end: str) -> str:
    return {"time": f"no answer in {PROBE_SECONDS:.0f} s", "done": "no answer"}.get(end, end)


def torch_rows(findings: dict[str, dict], end: str) -> list[Row]:
    """Rows on the device and on bf16, from what the probe found."""
    found = findings.get("torch")
    if found is None:
        if end == "time":
            return [Row("torch", "note", ended(end), "a first start from a slow disk takes long: run the doctor again")]
        return [Row("torch", "problem", f"the process that loads it {ended(end)}", INSTALL, stops=True)]
    if "error" in found:
        return [Row("torch", "problem", f"cannot be loaded ({found['error']})", INSTALL, stops=True)]
    rows = []
    if found["device"] == "cuda":
        major, minor = found["capability"]
        name = f"{found['name']} (sm_{major}{minor}), {found['free'] / GB:.1f} of {found['total'] / GB:.1f} GB free"
        rows.append(Row("device", "ok", f"{name}{'' if found['count'] == 1 else f', first of ' + str(found['count'])}; torch {found['version']}"))
        if found["bf16"]:
            rows.append(Row("bfloat16", "ok", "in hardware"))
        else:
            rows.append(Row("bfloat16", "note", "emulated only, whatever torch.cuda.is_bf16_supported() says",
                            "compute in float16, as load_base does on a GPU"))
        return rows
    if found["device"] == "mps":
        rows.append(Row("device", "ok", f"Apple GPU (mps); torch {found['version']}", "the bundled model runs on the CPU, which is quicker for it"))
    elif found["nvidia"] and not found["cuda_build"]:
        rows.append(Row("device", "note", f"a GPU driver is here, but this torch ({found['version']}) is built for CPUs",
                        "fine for the course; to use the GPU install torch's CUDA build of the same version (its own page says how)"))
    elif found["nvidia"]:
        rows.append(Row("device", "note", f"a GPU driver is here, but torch {found['version']} (CUDA {found['cuda_build']}) finds no GPU",
                        "the driver may be too old for this CUDA: `nvidia-smi` names the version it knows"))
    else:
        rows.append(Row("device", "ok", f"CPU ({found['cpu']}, {found['threads']} thread{'' if found['threads'] == 1 else 's'}); "
                        f"torch {found['version']}", "enough for every chapter; the capstone on Llama-3.2-1B wants a GPU (Colab has one)"))
    if found["cpu_bf16"]:
        rows.append(Row("bfloat16", "ok", f"in hardware on this CPU ({', '.join(found['cpu_bf16'])})"))
    else:
        rows.append(Row("bfloat16", "note", "emulated on this CPU", "the chapters compute in float32 on CPUs, so nothing to do"))
    return rows


def bitsandbytes_rows(findings: dict[str, dict], end: str) -> list[Row]:
    """Rows on 4-bit quantization, from what the probe found."""
    check, part = "bitsandbytes", "chapters on quantization compare with it; the others do without"
    found = findings.get("bitsandbytes")
    if found is None:
        if "error" in findings.get("torch", {}) or "torch" not in findings:
            return [Row(check, "note", "not checked, for torch did not load")]
        return [Row(check, "note" if end == "time" else "problem", f"the process that loads it: {ended(end)}", part)]
    if "error" in found:
        return [Row(check, "problem", f"does not work here ({found['error']})", part)]
    rows = []
    where = f"{found['version']} on {found['device']}"
    if 0.08 < found["error_256"] < 0.12:
        rows.append(Row(check, "ok", f"{where}: 4-bit round trip, relative error {found['error_256']:.3f}"))
    else:
        rows.append(Row(check, "problem", f"{where}: 4-bit round trip is wrong (relative error {found['error_256']:.3f}, not 0.09)", part))
    if not found["gradient_after_eval"]:
        rows.append(Row("4-bit training", "note", "gradients vanish once a Linear4bit has run in eval mode (a fault on this processor)",
                        "set support_avx512bf16_for_cpu = False on every Linear4bit before the first eval forward"))
    if found["error_96"] >= 0.12:
        rows.append(Row("4-bit widths", "note", f"weights whose in_features is no multiple of 64 come back wrong "
                        f"(relative error {found['error_96']:.2f}, not 0.09)", "keep in_features a multiple of 64; the bundled model's widths are"))
    return rows


CHECKS: list[tuple[str, Callable[[], list[Row]]]] = [
    ("Python", python_rows), ("machine", machine_rows), ("disk", disk_rows), ("packages", package_rows), ("kernel", jupyter_rows),
    ("widgets", widget_rows), ("bubblewrap", bubblewrap_rows), ("bundle", bundle_rows),
]
