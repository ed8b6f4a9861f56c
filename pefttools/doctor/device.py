"""torch and bitsandbytes: what they find and whether they work, in a process of their own, and what that means here."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from pefttools.doctor.machine import GB
from pefttools.doctor.packages import INSTALL, ROOT
from pefttools.doctor.report import Row

PROBE_CODE = "from pefttools.doctor.device import probe; probe()"
QUANTIZED = "the chapters on quantization compare with it; the others do without"


class Probe:
    """Runs `probe()` in another process; `result` returns what it found until its end, or until time was up."""

    def __enter__(self) -> Probe:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
        try:
            self.process = subprocess.Popen([sys.executable, "-c", PROBE_CODE], env=environment,
                                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        except OSError as e:  # no memory for another process, or no such interpreter
            self.process, self.failure = None, f"cannot be started ({e.strerror})"
        return self

    def __exit__(self, *_: object) -> None:
        if self.process:
            self.process.kill()
            self.process.communicate()

    def result(self, seconds: float) -> tuple[dict[str, dict], str]:
        """({"torch": {...}, "bitsandbytes": {...}}, how it ended); parts may be missing.

        How it ended: "done", "time" where time was up, or in words that follow "the process that loads it".
        """
        if not self.process:
            return {}, self.failure
        try:
            out, err = self.process.communicate(timeout=max(seconds, 0.1))
            end = "done"
            if self.process.returncode:
                last = (err.decode(errors="replace").strip().splitlines() or [""])[-1]
                end = f"died (exit {self.process.returncode}{', ' + last[:200] if last else ''})"
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, _ = self.process.communicate()
            end = "time"
        findings: dict[str, dict] = {}
        for line in out.decode(errors="replace").splitlines():
            try:
                found = json.loads(line)
            except ValueError:  # cut off in the middle, or somebody else's word
                continue
            if isinstance(found, dict):
                findings |= found
        return findings, end


# ── in the other process ──────────────────────────────────────────────────────────────────────────────────────────────
def probe() -> None:
    """Print one line of JSON for each part, as soon as it is known."""
    for name, find in (("torch", find_torch), ("bitsandbytes", find_bitsandbytes)):
        try:
            found = find()
        except Exception as e:
            found = {"error": f"{type(e).__name__}: {str(e)[:300]}"}
        print(json.dumps({name: found}), flush=True)


def find_torch() -> dict:
    """What torch says of the device."""
    import torch

    found: dict = {"version": torch.__version__, "threads": torch.get_num_threads(), "device": "cpu",
                   "cpu": torch.backends.cpu.get_cpu_capability(), "cpu_bf16": [], "cuda_build": torch.version.cuda,
                   "nvidia": bool(shutil.which("nvidia-smi")) or Path("/proc/driver/nvidia/version").exists()}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found |= {"device": "cuda", "name": torch.cuda.get_device_name(), "count": torch.cuda.device_count(),
                  "capability": list(torch.cuda.get_device_capability()), "free": free, "total": total,
                  # without the argument it counts emulation, and a T4 says True
                  "bf16": torch.cuda.is_bf16_supported(including_emulation=False)}
    elif torch.backends.mps.is_available():
        found |= {"device": "mps"}
    try:
        flags = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        flags = None
    if flags:
        found["cpu_bf16"] = sorted({"avx512_bf16", "amx_bf16", "bf16"} & set(flags.group(1).split()))
    return found


def find_bitsandbytes() -> dict:
    """A real 4-bit round trip on the device, and the three faults of the CPU path that change results in silence.

    Relative error of NF4 on normal weights in blocks of 64: 0.092, measured. 0.12 and more is a fault.
    """
    import bitsandbytes
    import torch
    from bitsandbytes import functional

    from pefttools.bnb import find_faults

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).to(device)
    back = functional.dequantize_4bit(*functional.quantize_4bit(weight, blocksize=64, quant_type="nf4"))
    faults = find_faults(device)
    return {"version": bitsandbytes.__version__, "device": device,
            "error_256": ((back - weight).norm() / weight.norm()).item(), "error_96": faults.width_error,
            "gradient_after_eval": not faults.gradients_lost, "eval_difference": faults.eval_difference}


# ── what it means ─────────────────────────────────────────────────────────────────────────────────────────────────────
def torch_rows(findings: dict[str, dict], end: str) -> list[Row]:
    """Rows on the device and on bf16, from what the probe found."""
    found, install = findings.get("torch"), INSTALL.format("it")
    if found is None and end == "time":
        todo = "a first start from a slow disk takes long: run the doctor again"
        return [Row("torch", "note", "did not load in time", todo)]
    if found is None:
        return [Row("torch", "problem", f"the process that loads it {end}", install, stops=True)]
    if "error" in found:
        return [Row("torch", "problem", f"cannot be loaded ({found['error']})", install, stops=True)]
    return gpu_rows(found) if found["device"] == "cuda" else cpu_rows(found)


def gpu_rows(found: dict) -> list[Row]:
    memory = f"{found['free'] / GB:.1f} of {found['total'] / GB:.1f} GB free"
    several = "" if found["count"] == 1 else f", first of {found['count']}"
    name = f"{found['name']} (sm_{''.join(map(str, found['capability']))})"
    rows = [Row("device", "ok", f"{name}, {memory}{several}; torch {found['version']}")]
    if found["bf16"]:
        return [*rows, Row("bfloat16", "ok", "in hardware")]
    return [*rows, Row("bfloat16", "note", "emulated only, whatever torch.cuda.is_bf16_supported() says",
                       "compute in float16, as load_base does on a GPU")]


def cpu_rows(found: dict) -> list[Row]:
    version = found["version"]
    if found["device"] == "mps":
        found_here = f"Apple GPU (mps); torch {version}"
        rows = [Row("device", "ok", found_here, "load_base uses the CPU unless told otherwise")]
    elif found["nvidia"] and not found["cuda_build"]:
        rows = [Row("device", "note", f"a GPU driver is here, but this torch ({version}) is built for CPUs",
                    "fine for the course; to use the GPU install torch's CUDA build (its own page says how)")]
    elif found["nvidia"]:
        build = f"torch {version} (CUDA {found['cuda_build']})"
        rows = [Row("device", "note", f"a GPU driver is here, but {build} finds no GPU",
                    "the driver may be too old for this CUDA: `nvidia-smi` names the version it knows")]
    else:
        threads = f"{found['threads']} thread{'' if found['threads'] == 1 else 's'}"
        rows = [Row("device", "ok", f"CPU ({found['cpu']}, {threads}); torch {version}",
                    "enough for the chapters; Llama-3.2-1B wants a GPU (Colab has one)")]
    if found["cpu_bf16"]:
        return [*rows, Row("bfloat16", "ok", f"in hardware on this CPU ({', '.join(found['cpu_bf16'])})")]
    return [*rows, Row("bfloat16", "note", "emulated on this CPU", "load_base uses float32 on a CPU: nothing to do")]


def bitsandbytes_rows(findings: dict[str, dict], end: str) -> list[Row]:
    """Rows on 4-bit quantization, from what the probe found."""
    check, found = "bitsandbytes", findings.get("bitsandbytes")
    if found is None and "version" not in findings.get("torch", {}):
        return [Row(check, "note", "not checked, for torch did not load")]
    if found is None and end == "time":
        return [Row(check, "note", "did not load in time", "run the doctor again")]
    if found is None:
        return [Row(check, "problem", f"the process that loads it {end}", QUANTIZED)]
    if "error" in found:
        return [Row(check, "problem", f"does not work here ({found['error']})", QUANTIZED)]
    where, error = f"{found['version']} on {found['device']}", found["error_256"]
    if 0.08 < error < 0.12:
        rows = [Row(check, "ok", f"{where}: 4-bit round trip, relative error {error:.3f}")]
    else:
        wrong = f"the 4-bit round trip is wrong (relative error {error:.3f}, not 0.09)"
        rows = [Row(check, "problem", f"{where}: {wrong}", QUANTIZED)]
    todo = ("call pefttools.bnb.make_safe(model) before its first eval forward (it sets "
            "support_avx512bf16_for_cpu = False)")
    if not found["gradient_after_eval"]:
        rows.append(Row("4-bit training", "note", "gradients vanish once a Linear4bit has run in eval mode (a fault on "
                        "processors with AVX-512 bf16)", todo))
    if found["eval_difference"] > 1e-4:
        rows.append(Row("4-bit eval", "note", "eval mode computes in bfloat16 even with compute_dtype=float32 (relative "
                        f"difference {found['eval_difference']:.3f}; AVX-512 bf16)", todo))
    if found["error_96"] >= 0.12:
        rows.append(Row("4-bit widths", "note", "weights whose in_features is a multiple of 16 but not of 64 come back "
                        f"wrong (relative error {found['error_96']:.2f}, not 0.09; AVX-512)",
                        "make_safe(model) cures the layers, pefttools.bnb.dequantize reads the weights; the bundled "
                        "model's widths are right"))
    return rows
