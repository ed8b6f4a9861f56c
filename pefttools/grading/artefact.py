"""Files that a student's code wrote, probed where that code never was: in a second sandbox.

    student's sandbox ──bytes of the named files──► grader ──files──► another sandbox, with the probe and the whole
                                                                      package, without the student's code
                                                    judge() ◄──bytes───────┘

The probe loads what a stranger made (safetensors and JSON, never a pickle: that is for the exercise to keep to). A file
made to take all memory, or for ever, takes this sandbox's.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from pefttools.grading.conversation import Conversation
from pefttools.grading.exchange import NoAnswer, put
from pefttools.grading.marking import ANSWERS, Mishap
from pefttools.grading.sandbox import Limits
from pefttools.grading.stage import make_stage

FOLDER = "artefact"
PROBE = ('import os; from pefttools.grading import inside; '
         'inside.probe({name!r}, os.path.join(inside.EXCHANGE, {folder!r}), {token!r})')


async def probe_files(exercise: Any, files: dict[str, bytes], cases: bytes, stages: Path, limits: Limits, sandbox: bool,
                      secret: tuple[Path, ...] = ()) -> bytes | Mishap:
    """What the probe gave on a folder with these files, as `inside.probe` writes it; or what went wrong."""
    talk = Conversation(make_stage(stages, [exercise], hide=False), (), limits, sandbox, secret)
    token = secrets.token_hex(12)
    try:
        await talk.start()
        folder = talk.room.exchange / FOLDER
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        put(talk.room.exchange, token, cases)
        ran = await talk.run(PROBE.format(name=exercise.name, folder=FOLDER, token=token), limits.cell_seconds)
        try:
            return talk.answer(token, ANSWERS)
        except NoAnswer as missing:
            error = ": ".join(ran.outputs.error or ())
            return Mishap(ran.end, f"your files were written, but {ran.words or error or missing}")
    finally:
        await talk.close()
