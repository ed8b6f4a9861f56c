"""`pefttools lab` as a reader starts it: JupyterLab answers, chapter 00 is in its file browser and opens."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FIRST = ROOT / "course" / "00_start" / "start.ipynb"
assert FIRST.exists(), "course/ lacks chapter 00: make build"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(URL that was printed, the reader's folder) of a running `pefttools lab`, apart from the user's own Jupyter."""
    home = tmp_path_factory.mktemp("home")
    mine, log, port = home / "my course", home / "log.txt", free_port()  # a space in the path, as on many machines
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    environment = {**os.environ, **{name: str(home / name) for name in names}, "no_proxy": "*"}
    with open(log, "w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "pefttools", "lab", "--mine", str(mine), "--no-browser", "--port", str(port)],
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
    url = None
    try:
        for _ in range(1800):  # 2 s on a quiet machine
            found = re.search(rf"http://(?:localhost|127\.0\.0\.1):{port}/\S*token=\w+", log.read_text())
            if found or process.poll() is not None:
                break
            time.sleep(0.1)
        assert found, f"no URL was printed:\n{log.read_text()}"
        url = found.group(0).replace("localhost", "127.0.0.1")
        yield url, mine
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def get(url: str) -> tuple[int, bytes]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(100):  # the URL is printed a moment before the port listens
        try:
            with opener.open(url, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as e:
            return e.code, e.read()
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"{url} does not answer")


def test_the_printed_url_opens_chapter_00(server):
    url, _ = server
    assert "/lab/tree/00_start/start.ipynb?token=" in url
    status, page = get(url)
    assert status == 200 and b"jupyter-config-data" in page


def test_every_chapter_is_in_the_file_browser(server):
    url, mine = server
    base, token = re.match(r"(http://[^/]+)/.*token=(\w+)", url).groups()

    def listing(path: str) -> list[str]:
        status, body = get(f"{base}/api/contents/{path}?token={token}")
        assert status == 200
        return [entry["path"] for entry in json.loads(body)["content"]]

    for chapter in sorted(ROOT.glob("course/*/*.ipynb")):
        name = chapter.relative_to(ROOT / "course").as_posix()
        assert chapter.parent.name in listing("")
        assert name in listing(chapter.parent.name)
        assert (mine / name).read_bytes() == chapter.read_bytes()
    assert not any(name.startswith(".") for name in listing(""))
    status, body = get(f"{base}/api/contents/00_start/start.ipynb?token={token}")
    assert status == 200 and json.loads(body)["content"]["cells"]


def test_strangers_are_kept_out(server):
    url, _ = server
    status, _ = get(re.match(r"http://[^/]+", url).group(0) + "/api/contents")
    assert status == 403
