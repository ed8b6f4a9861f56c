"""The doctor: what it says of machines that are not this one, and that nothing can make it fall."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import time
import urllib.error
from pathlib import Path

import pytest

from pefttools import doctor as module
from pefttools.doctor import Diagnosis, Row, device, doctor, guarded, hub, machine, packages
from pefttools.doctor.bundle import LAB, data_rows, model_rows
from pefttools.doctor.device import bitsandbytes_rows, torch_rows

CPU = {
    "version": "2.13.0",
    "threads": 2,
    "device": "cpu",
    "cuda_build": None,
    "nvidia": False,
    "cpu_bf16": [],
    "cpu": "AVX2",
}
T4 = {
    **CPU,
    "device": "cuda",
    "name": "Tesla T4",
    "capability": [7, 5],
    "free": 14.5e9,
    "total": 15.8e9,
    "bf16": False,
    "count": 1,
    "cuda_build": "13.0",
    "nvidia": True,
}
GOOD = {
    "version": "0.50.2",
    "device": "cpu",
    "error_256": 0.0919,
    "error_96": 0.0921,
    "gradient_after_eval": True,
    "eval_difference": 0.0,
}


def by_check(rows: list[Row]) -> dict[str, Row]:
    found = {row.check: row for row in rows}
    assert len(found) == len(rows)
    return found


def test_the_real_thing_here(monkeypatch):
    monkeypatch.setattr(module, "PROBE_SECONDS", 120.0)  # the tests run beside each other
    report = doctor()
    rows = by_check(report.rows)
    for check in (
        "Python",
        "disk",
        "packages",
        "kernel",
        "sandbox",
        "bundled model",
        "bundled data",
        "model hub",
        "device",
        "bitsandbytes",
    ):
        assert check in rows, check
    assert not any("could not be checked" in row.found for row in report.rows)
    assert rows["model hub"].found.startswith("switched off")  # the tests set HF_HUB_OFFLINE
    assert {row.status for row in report.rows} <= {"ok", "note", "problem"}
    assert all(row.todo for row in report.rows if row.status == "problem")
    read = json.loads(report.to_json())
    assert read["stops"] == report.stops and len(read["rows"]) == len(report.rows)
    words = " ".join(str(report).split())  # long lines are wrapped
    assert all(" ".join(row.found.split()) in words for row in report.rows)
    assert max(map(len, str(report).splitlines())) <= 120
    assert report._repr_html_().count("<tr>") == len(report.rows) + 1


def test_a_check_that_raises_becomes_a_row(monkeypatch):
    def broken():
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(module, "CHECKS", [(name, broken) for name, _ in module.CHECKS])
    monkeypatch.setattr(device, "PROBE_CODE", "raise SystemExit('no torch here')", raising=True)
    monkeypatch.setattr(hub, "reach", broken)
    report = doctor()
    assert sum("ZeroDivisionError: oh" in row.found for row in report.rows) == len(module.CHECKS)
    rows = {row.check: row for row in report.rows}
    assert rows["torch"].stops and "died (exit 1, no torch here" in rows["torch"].found
    assert rows["bitsandbytes"].status == "note" and rows["model hub"].status == "note"


def test_what_hangs_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(module, "CHECKS", [])
    monkeypatch.setattr(device, "PROBE_CODE", "import time; time.sleep(600)")
    monkeypatch.setattr(module, "PROBE_SECONDS", 1.0)
    monkeypatch.setattr(hub, "SECONDS", -0.5)  # plus the second that `doctor` adds
    monkeypatch.setattr(hub, "reach", lambda: time.sleep(600))
    report = doctor()
    assert report.seconds < 10
    assert [row.status for row in report.rows] == ["note"] * 3 and not report.stops


def test_a_process_that_dies_hangs_or_babbles_is_survived(monkeypatch):
    def result(code: str, seconds: float = 10.0):
        monkeypatch.setattr(device, "PROBE_CODE", code)
        with device.Probe() as probe:
            return probe.result(seconds)

    findings, end = result('print(\'{"torch": {"version": "1"}}\', flush=True); import os; os.kill(os.getpid(), 11)')
    assert findings == {"torch": {"version": "1"}} and end.startswith("died")
    [row] = bitsandbytes_rows(findings, end)
    assert row.status == "problem" and not row.stops
    findings, end = result("print('{\"torch\": {}}', flush=True); import time; time.sleep(60)", 1.5)
    assert findings == {"torch": {}} and end == "time"
    assert bitsandbytes_rows(findings, end)[0].status == "note"
    findings, end = result('print(\'hello\'); print(\'{"torch": \'); print(\'{"torch": {"error": "x"}}\')')
    assert findings == {"torch": {"error": "x"}} and end == "done"
    assert torch_rows(findings, end)[0].stops
    assert torch_rows({}, "time")[0].status == "note"


def test_t4_tells_the_truth_about_bf16():
    rows = by_check(torch_rows({"torch": T4}, "done"))
    assert "Tesla T4 (sm_75), 14.5 of 15.8 GB free" in rows["device"].found
    assert (
        rows["bfloat16"].status == "note"
        and "emulated" in rows["bfloat16"].found
        and "float16" in rows["bfloat16"].todo
    )
    rows = by_check(torch_rows({"torch": {**T4, "capability": [9, 0], "bf16": True, "count": 8}}, "done"))
    assert rows["bfloat16"].status == "ok" and "first of 8" in rows["device"].found


def test_other_devices():
    def on(**changes) -> Row:
        return by_check(torch_rows({"torch": {**CPU, **changes}}, "done"))["device"]

    assert on().status == "ok" and "CPU (AVX2, 2 threads)" in on().found
    assert "Apple GPU" in on(device="mps").found
    assert "built for CPUs" in on(nvidia=True).found
    assert (
        "finds no GPU" in on(nvidia=True, cuda_build="13.0").found
        and "nvidia-smi" in on(nvidia=True, cuda_build="13.0").todo
    )
    assert (
        "avx512_bf16" in by_check(torch_rows({"torch": {**CPU, "cpu_bf16": ["avx512_bf16"]}}, "done"))["bfloat16"].found
    )


def test_faults_of_bitsandbytes_are_named():
    def rows(**changes) -> dict[str, Row]:
        return by_check(bitsandbytes_rows({"torch": CPU, "bitsandbytes": {**GOOD, **changes}}, "done"))

    assert list(rows()) == ["bitsandbytes"] and rows()["bitsandbytes"].status == "ok"
    lost = rows(gradient_after_eval=False)
    assert list(lost) == ["bitsandbytes", "4-bit training"] and "make_safe" in lost["4-bit training"].todo
    assert "support_avx512bf16_for_cpu = False" in lost["4-bit training"].todo
    rounded = rows(eval_difference=0.0029)
    assert list(rounded) == ["bitsandbytes", "4-bit eval"] and "difference 0.003;" in rounded["4-bit eval"].found
    assert list(rows(eval_difference=3e-7)) == ["bitsandbytes"]  # float32 on two paths
    wide = rows(error_96=0.28)
    assert list(wide) == ["bitsandbytes", "4-bit widths"] and "not of 64" in wide["4-bit widths"].found
    assert all("AVX-512" in row.found for some in (lost, rounded, wide) for row in list(some.values())[1:])
    assert rows(error_256=float("nan"))["bitsandbytes"].status == "problem"
    [row] = bitsandbytes_rows({"torch": CPU, "bitsandbytes": {"error": "ModuleNotFoundError: no"}}, "done")
    assert row.status == "problem" and not row.stops


def test_the_doctor_measures_what_find_faults_measures():
    from pefttools.bnb import find_faults

    faults, found = find_faults(), device.find_bitsandbytes()
    if found["device"] != "cpu":
        pytest.skip("the faults are on the CPU path, and here it measures a GPU")
    assert 0.08 < found["error_256"] < 0.12
    assert found["gradient_after_eval"] is not faults.gradients_lost
    rows = by_check(bitsandbytes_rows({"torch": CPU, "bitsandbytes": found}, "done"))
    assert ("4-bit training" in rows) == faults.gradients_lost
    assert ("4-bit eval" in rows) == faults.eval_in_bf16
    assert ("4-bit widths" in rows) == faults.widths_wrong


def test_hub_answers(monkeypatch):
    [row] = hub.rows(urllib.error.URLError("Name or service not known"))
    assert row.status == "note" and "Name or service not known" in row.found and "bundled model" in row.todo
    [row] = hub.rows(TimeoutError("no answer in time"))
    assert "no answer in time" in row.found
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    [row] = hub.rows("reachable")
    assert row.status == "ok" and "hf_secret" not in row.found + row.todo
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "HF_TOKEN" in hub.rows("reachable")[0].todo


@pytest.mark.parametrize("status", [200, 403, 503])
def test_any_answer_of_the_hub_counts_and_silence_does_not(monkeypatch, status):
    import http.server
    import threading

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.handle_request, daemon=True).start()
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert hub.reach() == "reachable"
    server.server_close()
    with pytest.raises(OSError):
        hub.reach()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.reach() == "offline"


def test_background_never_waits_longer_than_told():
    with hub.Background(lambda: time.sleep(30)) as slow:
        start = time.perf_counter()
        assert isinstance(slow.result(0.1), TimeoutError)
        assert time.perf_counter() - start < 5


def test_packages(monkeypatch):
    real = packages.importlib.metadata.version
    known = by_check(packages.package_rows())
    assert known["packages"].status == "ok"

    def pretend(**versions: str | None) -> dict[str, Row]:
        def version(name: str) -> str:
            found = versions.get(name, real(name))
            if found is None:
                raise packages.importlib.metadata.PackageNotFoundError(name)
            return found

        monkeypatch.setattr(packages.importlib.metadata, "version", version)
        return by_check(packages.package_rows())

    assert pretend(torch=None)["torch"].stops
    assert pretend(nbgrader=None)["nbgrader"].status == "problem" and not pretend(nbgrader=None)["nbgrader"].stops
    row = pretend(ipywidgets="8.1.9")["ipywidgets"]
    assert row.status == "problem" and "8.1.8" in row.todo
    row = pretend(transformers="4.40.0")["transformers"]
    assert row.status == "problem" and ">=5" in row.found and not row.stops
    row = pretend(tqdm="4.99.0")["tqdm"]
    assert row.status == "note" and "tested with" in row.found
    assert "torch" not in pretend(torch=packages.tested_versions()["torch"] + "+cu130")
    monkeypatch.setattr(packages, "tested_versions", dict)
    assert list(pretend()) == ["packages"]


def copy_of_model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(LAB / "tiny", tmp_path / "tiny"))


def test_damaged_model(tmp_path):
    folder = copy_of_model(tmp_path)
    assert model_rows(folder)[0].status == "ok"
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    [row] = model_rows(folder)
    assert row.stops and "model.safetensors is damaged" in row.found and "git checkout" in row.todo
    weights.unlink()
    assert "model.safetensors is missing" in model_rows(folder)[0].found
    (folder / "sha256.json").write_text("[]")
    assert model_rows(folder)[0].stops
    assert model_rows(tmp_path / "nowhere")[0].stops


def test_damaged_data(tmp_path):
    good = '{"instruction": "a"}\n{"instruction": "b"}\n'
    folder = tmp_path / "data"
    assert data_rows(folder)[0].stops
    folder.mkdir()
    assert "missing" in data_rows(folder)[0].found
    (folder / "train.jsonl").write_text(good)
    assert data_rows(folder) == [Row("bundled data", "ok", "2 rows in 1 file")]
    for damage in ("", good[:-10], "[1]\n", "null\n"):
        (folder / "train.jsonl").write_text(damage)
        [row] = data_rows(folder)
        assert row.stops and "train.jsonl cannot be read" in row.found
    (folder / "train.jsonl").unlink()
    (folder / "train.jsonl.gz").write_bytes(b"\x1f\x8b nonsense")
    assert data_rows(folder)[0].stops


def test_disk(monkeypatch):
    def free(gigabytes: float) -> Row:
        usage = shutil._ntuple_diskusage(1e12, 1e12, gigabytes * 1e9)
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage)
        return machine.disk_rows()[0]

    assert free(0.1).stops and free(2).status == "note" and free(100).status == "ok"


def test_machines(monkeypatch):
    def on(system="Linux", release="6.1", chip="x86_64", cores=8, total=16e9, free=8e9) -> dict[str, Row]:
        for name, value in {"system": system, "release": release, "machine": chip}.items():
            monkeypatch.setattr(platform, name, lambda value=value: value)
        monkeypatch.setattr(platform, "mac_ver", lambda: ("15.1", ("", "", ""), chip))
        monkeypatch.setattr(machine, "cores_here", lambda: cores)
        monkeypatch.setattr(machine, "memory_here", lambda: (total, free))
        monkeypatch.setenv("CC", "gcc")
        return by_check(machine.machine_rows())

    assert all(row.status == "ok" for row in on().values())
    assert "WSL" in on(release="5.15.0-microsoft-standard-WSL2")["system"].found
    assert "wsl --install" in on("Windows")["system"].todo
    assert on("Darwin")["system"].stops and "Intel" in on("Darwin")["system"].found
    assert on("Darwin", chip="arm64")["system"].status == "ok"
    assert on(total=2e9, free=1e9)["cores, memory"].status == "problem"
    assert on(free=1e9)["cores, memory"].status == "note"
    assert on(cores=1)["cores, memory"].status == "note"


def test_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    row = machine.compiler_row()
    assert (row.status, row.stops, row.found) == ("note", False, "none") and "same result" in row.todo
    (tmp_path / "clang").write_text("")
    (tmp_path / "clang").chmod(0o755)
    assert machine.compiler_row().found.startswith(str(tmp_path / "clang")) and machine.compiler_row().status == "ok"


def test_sandbox(monkeypatch, tmp_path):
    from pefttools.grading import sandbox, syscalls

    def found(script: str | None, system: str = "Linux", filtered: str = "") -> Row:
        program = None
        if script is not None:
            program = tmp_path / "bwrap"
            program.write_text(f"#!/bin/sh\n{script}\n")
            program.chmod(0o755)
        monkeypatch.setattr(platform, "system", lambda: system)
        monkeypatch.setattr(sandbox.shutil, "which", lambda _: program and str(program))
        monkeypatch.setattr(syscalls, "status", lambda: filtered)
        try:
            return machine.sandbox_rows()[0]
        finally:
            sandbox.available.cache_clear()

    if sys.platform == "linux":
        assert "apt install bubblewrap" in found(None).todo
        assert found("echo inside").status == "ok"
        row = found("echo inside", filtered="System calls are not filtered (no pyseccomp): pip install pyseccomp.")
        assert row.status == "note" and "not filtered" in row.found and "pip install" in row.todo
        row = found("echo 'bwrap: No permissions to create new namespace' >&2; exit 1")
        assert row.status == "note" and "No permissions" in row.found and "user namespaces" in row.todo
        assert "too old" in found("echo 'bwrap: Unknown option --disable-userns' >&2; exit 1").found
        assert found("exit 3").status == "note"
    assert "not on Darwin" in found(None, "Darwin").found


def test_a_foreign_kernel_is_noticed(monkeypatch):
    class Spec:
        argv = ["/usr/bin/python3", "-m", "ipykernel_launcher"]

    monkeypatch.setattr("jupyter_client.kernelspec.KernelSpecManager.get_kernel_spec", lambda *_: Spec)
    [row] = packages.kernel_rows()
    assert row.status == "problem" and "/usr/bin/python3" in row.found and "jupyter kernelspec" in row.todo
    for program in ("python", "python3.12", sys.executable):
        Spec.argv = [program]
        assert packages.kernel_rows()[0].status == "ok"


def test_html_escapes_what_was_found():
    page = Diagnosis([Row("x", "problem", "<script>alert(1)</script>", "do <b>", True)])._repr_html_()
    assert "<script>" not in page and "&lt;script&gt;" in page and "Stops the course." in page


def test_verdicts():
    assert Diagnosis([Row("a", "ok", "")]).verdict == "The course runs here."
    assert "1 thing in it" in Diagnosis([Row("a", "problem", "")]).verdict
    assert "cannot run" in Diagnosis([Row("a", "problem", "", "", True)]).verdict


def test_guarded_cuts_long_messages():
    def broken():
        raise ValueError("x" * 10_000)

    [row] = guarded("a", broken)
    assert len(row.found) < 300
