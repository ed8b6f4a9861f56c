"""What works on this machine, each finding with what to do about it.

    pefttools doctor            in a terminal; --json for programs
    doctor()                    in a notebook: a table

Nothing here can crash: a check that raises becomes a row that says so. What loads native code (torch, bitsandbytes)
runs in a process of its own with a time limit, since a broken build may take its process along. Under 15 seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from pefttools.doctor import bundle, device, hub, machine, packages
from pefttools.doctor.report import Diagnosis, Row

__all__ = ["Diagnosis", "Row", "doctor"]

PROBE_SECONDS = 12.0  # torch and bitsandbytes: 3 s with their files in the cache, 10 s from a cold disk
CHECKS: list[tuple[str, Callable[[], list[Row]]]] = [
    ("Python", machine.python_rows), ("machine", machine.machine_rows), ("disk", machine.disk_rows),
    ("packages", packages.package_rows), ("kernel", packages.kernel_rows), ("widgets", packages.widget_rows),
    ("sandbox", machine.sandbox_rows), ("bundled model", bundle.model_rows), ("bundled data", bundle.data_rows),
]


def doctor() -> Diagnosis:
    """Run every check. Never raises."""
    start = time.perf_counter()
    rows: list[Row] = []
    with device.Probe() as probe, hub.Background(hub.reach) as answer:  # both while the quick checks run
        for name, check in CHECKS:
            rows += guarded(name, check)
        rows += guarded("model hub", lambda: hub.rows(answer.result(hub.SECONDS + 1.0)))
        findings, end = probe.result(start + PROBE_SECONDS - time.perf_counter())
    rows += guarded("torch", lambda: device.torch_rows(findings, end))
    rows += guarded("bitsandbytes", lambda: device.bitsandbytes_rows(findings, end))
    return Diagnosis(rows, time.perf_counter() - start)


def guarded(name: str, check: Callable[[], list[Row]]) -> list[Row]:
    """The rows of a check; a check that raises becomes a row of its own."""
    try:
        return list(check())
    except Exception as e:  # whatever it is, the other checks are still of use
        return [Row(name, "note", f"could not be checked ({type(e).__name__}: {str(e)[:200]})")]
