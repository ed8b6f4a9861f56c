"""A hub that refuses, does not know, has a fault, says nothing, or sends half a file: a sentence each time, no rows.

A real client in a fresh process (it reads its settings at import) against a local server that plays the hub, for data
sets and for models. What is wrong with a repository is in its name.
"""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROWS = [{"instruction": f"Add {i}.", "input": "", "output": f"x + {i}"} for i in range(50)]
LINES = "\n".join(map(json.dumps, ROWS)).encode()
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROOT = Path(__file__).resolve().parents[2]


class Hub(http.server.BaseHTTPRequestHandler):
    """Repositories: owner/<status> answers with it, owner/silent never; owner/half announces a file and sends half of
    it, owner/cut holds half of it; all others have `files` whole ({kind: {path: bytes}})."""

    files: dict[str, dict[str, bytes]] = {}
    over = threading.Event()

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path == "/":
            return self.answer(200, b"")
        kind = "rows" if "datasets/" in path else "model"
        parts = path.removeprefix("/api").removeprefix("/datasets").removeprefix("/models").strip("/").split("/")
        name, rest = parts[1], parts[2:]
        if name.isdigit():
            more = (
                {"X-Error-Code": "GatedRepo"}
                if name in ("401", "403")
                else {"X-Error-Code": "RepoNotFound"}
                if name == "404"
                else {}
            )
            return self.answer(int(name), b"", more)
        if name == "silent":
            return self.over.wait(30)  # longer than any client here waits
        files = self.files[kind] if name != "several" else {"a.csv": b"", "b.csv": b""}
        if path.startswith("/api"):
            tree = [
                {"type": "file", "path": each, "size": len(content), "oid": "0" * 40} for each, content in files.items()
            ]
            return self.answer(
                200,
                json.dumps(
                    tree
                    if "tree" in rest
                    else {"id": f"o/{name}", "sha": COMMIT, "siblings": [{"rfilename": each} for each in files]}
                ).encode(),
                {"Content-Type": "application/json"},
            )
        if rest[0] == "resolve" and rest[1] not in ("main", COMMIT):
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        file = "/".join(rest[2:])
        if file not in files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        short = file.endswith((".jsonl", ".safetensors")) and (
            name == "cut" or name == "half" and self.command == "GET"
        )
        content = files[file][: len(files[file]) // 2] if short else files[file]
        self.answer(200, content, {"ETag": f'"{name}{file}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def answer(self, status: int, content: bytes, more: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in (more or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """(address, environment of a client with a cache of its own)"""
    from pefttools.lab import load_base

    base, folder = load_base("tiny"), tmp_path_factory.mktemp("model")
    base.tokenizer.save_pretrained(folder)
    base.model.save_pretrained(folder)
    files = {
        "model": {path.name: path.read_bytes() for path in folder.iterdir()},
        "rows": {"README.md": b"", "data/rows.jsonl": LINES},
    }
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("H", (Hub,), {"files": files}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cache = tmp_path_factory.mktemp("cache")
    yield {
        **os.environ,
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(cache),
        "HF_HUB_ETAG_TIMEOUT": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    Hub.over.set()
    server.shutdown()
    shutil.rmtree(cache, ignore_errors=True)


PROGRAM = """
import json, sys, time
from huggingface_hub import file_download
time.sleep = lambda seconds: None          # the client waits between its tries, and a minute in the later ones:
file_download._ETAG_RETRY_TIMEOUT = 1      # right in life, not in a test
found = {}
for what in json.loads(sys.argv[1]):
    try:
        if what.startswith("hub:"):
            from pefttools.lab.rows import read_rows
            found[what] = len(read_rows(what))
        else:
            from pefttools.lab import load_base
            found[what] = load_base(what, quiet=True).name
    except ValueError as error:
        found[what] = str(error)
print(json.dumps(found))
"""


def ask(environment: dict, *what: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(what)], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_data_set_of_the_hub(hub):
    """Every fault is a sentence that names the data set; a good one is read, and read again without a network."""
    good = f"hub:owner/good@{COMMIT}"
    wanted = {
        "hub:owner/401": "accept the licence on the data set's page",
        "hub:owner/403": "accept the licence on the data set's page",
        "hub:owner/404": "knows no such data set",
        "hub:owner/503": "has a fault (HTTP 503)",
        "hub:owner/silent:data/rows.jsonl": "does not answer and the data set is not in the local cache",
        "hub:owner/half": "sent less of a file than it announced",
        "hub:owner/cut": "ends in the middle of line 26: it was cut off",
        "hub:owner/good@v9": "no such revision",
        "hub:owner/good:none.csv": "no such file",
        "hub:owner/several": "several files with rows, name one: hub:owner/several:a.csv",
        "hub:owner good": "it is hub:owner/name",
        good: len(ROWS),
        "hub:owner/good:data/rows.jsonl": len(ROWS),
    }
    found = ask(hub, *wanted)
    for what, said in wanted.items():
        assert said == found[what] if isinstance(said, int) else said in found[what], (what, found[what])
    offline = ask({**hub, "HF_HUB_OFFLINE": "1"}, good, "hub:owner/half", "hub:owner/good:data/rows.jsonl")
    assert offline[good] == offline["hub:owner/good:data/rows.jsonl"] == len(ROWS)
    assert "switched off" in offline["hub:owner/half"] and "not in the local cache" in offline["hub:owner/half"]


def test_a_model_of_the_hub(hub):
    """Half a file of a model, sent or held. (test_base.py has the hub that answers everything with one status.)"""
    wanted = {
        "owner/good": "owner/good",
        "owner/404": "knows no such model",
        "owner/half": "sent less of a file than it announced",
        "owner/cut": "its weights file is damaged",
    }
    found = ask(hub, *wanted)
    assert all(said in found[what] for what, said in wanted.items()), found


def test_a_hub_that_says_nothing(hub, monkeypatch):
    from huggingface_hub import constants

    from pefttools.lab.base import hub_fault

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub["HF_ENDPOINT"])
    assert hub_fault() == ""
    monkeypatch.setattr(constants, "ENDPOINT", f"{hub['HF_ENDPOINT']}/owner/silent")
    assert "does not answer (ReadTimeout)" in hub_fault(timeout=0.3)


def test_which_file_has_the_rows():
    from pefttools.lab.rows_hub import Ambiguous, rows_in

    assert rows_in("o/n", ["README.md", "x.jsonl", "x.json"]) == ["x.jsonl"], "the same rows in two forms"
    assert rows_in("o/n", ["test.csv", "train.csv"]) == ["train.csv"]
    parts = [f"data/train-0000{i}-of-00002.parquet" for i in range(2)]
    assert rows_in("o/n", ["data/test-00000-of-00001.parquet", *parts]) == parts
    with pytest.raises(Ambiguous, match="no file of it ends in"):
        rows_in("o/n", ["a.txt"])
