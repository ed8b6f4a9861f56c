"""JupyterLab as a reader starts it, and a browser that opens notebooks in it, runs them and moves their controls.

One server and one browser for all tests of the module; a notebook and a kernel for each. (With one kernel for all,
JupyterLab on a busy machine sometimes did not find it again, started another, and complained of the first one's end.)
Where something is missing the tests skip, and say what to install. LIMIT is for a busy machine: a move takes less than
a second on a quiet one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 120  # seconds
TOKEN = "only-for-this-test"
# --no-sandbox: Chromium refuses to run as root with its own, and the only pages it sees are ours
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-proxy-server",
         "--window-size=1400,1600")
STATE, CONTROL = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("state.js", "control.js"))


def ask(url: str, method: str = "GET") -> bytes:
    """What a server on this machine answers."""
    request = urllib.request.Request(url, method=method, headers={"Authorization": f"token {TOKEN}"})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=LIMIT) as answer:
        return answer.read()


def answers(url: str) -> bool:
    """Whether a server answers there, with whatever status."""
    try:
        ask(url)
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def serve():
    """serve(folder, *arguments) → URL of `python arguments --port …`, with Jupyter's folders apart from the user's."""
    started = []

    def start(folder: Path, *arguments: str) -> str:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, **{name: str(folder / name) for name in names}, "PYTHONPATH": path,
                       "no_proxy": "*", "OMP_NUM_THREADS": "1"}
        environment.pop("MPLBACKEND", None)  # the reader's kernel has its own
        log = folder / "log.txt"
        with open(log, "w") as out:
            started.append(psutil.Popen([sys.executable, *arguments, "--port", str(port)], cwd=ROOT, env=environment,
                                        stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL))
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + LIMIT
        while not answers(f"{url}/api/status"):
            alive = started[-1].poll() is None and time.monotonic() < until
            assert alive, f"{arguments}: no answer:\n{log.read_text()}"
            time.sleep(0.1)
        return url

    yield start
    for process in started:
        everybody = [*process.children(recursive=True), process] if process.is_running() else []
        for one in everybody:
            with contextlib.suppress(psutil.Error):
                one.terminate()
        for one in psutil.wait_procs(everybody, timeout=30)[1]:
            with contextlib.suppress(psutil.Error):
                one.kill()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium without a window, driven by selenium."""
    pytest.importorskip("selenium", reason="there is no selenium: pip install selenium")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("there is no Chromium with its driver: apt install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        chrome.set_script_timeout(LIMIT)
        yield chrome
    finally:
        chrome.quit()


class Page:
    """A page with widgets in the browser."""

    def __init__(self, browser) -> None:
        self.browser = browser

    def wait(self, condition, what: str):
        """Wait until condition(state) is true, and return that state; trouble on the page ends the wait at once."""
        until = time.monotonic() + LIMIT
        while True:
            state = self.browser.execute_script(STATE)
            assert not state["trouble"], f"{what}: the page shows\n" + "\n".join(state["trouble"])
            if condition(state):
                return state
            assert time.monotonic() < until, f"{what}: not after {LIMIT} s. {self._seen(state)}"
            time.sleep(0.2)

    def _seen(self, state) -> str:
        pictures = [picture["alt"] for picture in state["pictures"]]
        return f"Cells {state['numbers']}, pictures {pictures}, console {self.console_errors()}"

    def picture(self, index: int = 0, after: str = "", what: str = "the first picture") -> dict:
        """The picture of a widget, as soon as its checksums are others than `after`.

        "kind", "sum": the source's start and its end with the checksums; "alt": its text; "wide", "shown": its width in
        pixels, as drawn and on the page.
        """
        found = self.wait(lambda state: len(state["pictures"]) > index and state["pictures"][index]["wide"]
                          and state["pictures"][index]["sum"] != after, what)["pictures"][index]
        assert found["kind"] == "data:image/png;base64," and found["shown"] > 300
        return found

    def control(self, label: str, index: int = 0, part: str = ""):
        """The control with that label."""
        found = self.browser.execute_script(CONTROL, index, label, part)
        assert found is not None, f"there is no single control labelled {label!r}"
        return found

    def move(self, label: str, how: str, index: int = 0) -> dict:
        """Move a control as `how` says and return the next picture.

        how: for a drop-down the start of an option's text, for a check box "click"; for a slider an arrow key ("left",
        "right"), "drag" (the mouse takes it to its right end) or what is typed over the slider's number.
        """
        from selenium.webdriver import ActionChains, Keys

        before, control = self.picture(index), self.control(label, index)
        if control.tag_name == "select":
            options = control.find_elements("tag name", "option")
            (option,) = [each for each in options if each.text.replace("\xa0", " ").startswith(how)]
            option.click()
        elif how == "click":
            control.click()
        elif how in ("left", "right"):
            control.send_keys(getattr(Keys, f"ARROW_{how.upper()}"))
        elif how == "drag":
            width = self.control(label, index, "box").size["width"]
            ActionChains(self.browser).drag_and_drop_by_offset(control, width, 0).perform()
        else:
            readout = self.control(label, index, "box").find_element("class name", "widget-readout")
            readout.click()
            ActionChains(self.browser).key_down(Keys.CONTROL).send_keys("a").key_up(Keys.CONTROL).perform()
            readout.send_keys(how, Keys.ENTER)
        return self.picture(index, before["sum"], f"another picture after {label}: {how}")

    def console_errors(self) -> list[str]:
        """What the page complained of since the last call."""
        return [entry["message"] for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]


class Lab(Page):
    """A running JupyterLab on a reader's folder."""

    def __init__(self, browser, url: str, mine: Path) -> None:
        super().__init__(browser)
        self.url, self.mine, self.opened = url, mine, 0

    def run(self, *cells: str) -> None:
        """Write a notebook of these cells, open it, and run it with Shift+Enter in one cell after the other."""
        kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
        notebook = new_notebook(cells=list(map(new_code_cell, cells)), metadata={"kernelspec": kernelspec})
        self.browser.get("about:blank")  # the page before does not see its kernel end
        for session in json.loads(ask(f"{self.url}/api/sessions")):
            ask(f"{self.url}/api/sessions/{session['id']}", "DELETE")
        self.opened += 1  # a workspace each: nothing of the page before is restored
        name = f"widget-{self.opened}.ipynb"
        nbformat.write(notebook, self.mine / name)
        self.console_errors()
        self.browser.get(f"{self.url}/lab/workspaces/{self.opened}/tree/{name}?token={TOKEN}")
        self.wait(lambda state: len(state["numbers"]) == len(cells), "the notebook's cells")
        ready = "return document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle'"
        self.wait(lambda state: self.browser.execute_script(ready), "a kernel that is ready")
        for i in range(len(cells)):
            self.wait(lambda state: self._started(state, i), f"cell {i + 1} runs")
        self.wait(lambda state: all(n.strip("[]: ").isdigit() for n in state["numbers"][:len(cells)]), "the cells' end")

    def _started(self, state: dict, i: int) -> bool:
        """Whether cell i runs or has run; if not, press Shift+Enter in it. (A page that is still busy loses keys.)"""
        from selenium.common.exceptions import WebDriverException
        from selenium.webdriver import ActionChains, Keys

        if state["numbers"][i].strip("[]: "):
            return True
        try:
            self.browser.find_elements("css selector", ".jp-CodeCell .cm-content")[i].click()
            ActionChains(self.browser).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
        except WebDriverException:  # something lies over it, or it was drawn anew
            return False
        until = time.monotonic() + 3
        while time.monotonic() < until:
            if self.browser.execute_script(STATE)["numbers"][i].strip("[]: "):
                return True
        return False


@pytest.fixture
def page(browser):
    """Whatever the browser shows."""
    return Page(browser)


@pytest.fixture(scope="module")
def lab(browser, serve, tmp_path_factory):
    """`pefttools lab` in the browser."""
    folder = tmp_path_factory.mktemp("lab")
    mine = folder / "my course"  # a space in the path, as on many machines
    command = ("-m", "pefttools", "lab", "--mine", str(mine), "--no-browser", f"--IdentityProvider.token={TOKEN}")
    return Lab(browser, serve(folder, *command), mine)
