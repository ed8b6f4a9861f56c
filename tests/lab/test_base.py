"""Loading: the bundled model is what its card says; a hub that fails is a sentence, not a traceback."""

import http.server
import json
import shutil
import threading

import pytest
import torch

from pefttools.lab import base as lab_base
from pefttools.lab import load_base
from pefttools.lab.base import PAD, TINY, reason


def test_bundled_model_is_a_llama_of_the_stated_size(tiny):
    config = tiny.model.config
    n = sum(p.numel() for p in tiny.model.parameters())
    assert type(tiny.model).__name__ == "LlamaForCausalLM" and 5e6 <= n <= 8e6 and config.hidden_size >= 256
    assert config.num_key_value_heads < config.num_attention_heads and config.tie_word_embeddings
    assert tiny.model.dtype == torch.float32 and not tiny.model.training
    assert sum(f.stat().st_size for f in TINY.iterdir()) <= 25 * 2**20
    card = json.loads((TINY / "training.json").read_text())
    assert card["parameters"] == n and f"{n:,}" in (TINY / "README.md").read_text()


def test_tokenizer_round_trip(tiny):
    tok = tiny.tokenizer
    text = 'def f(x):\n\tif x:\n        return "é ∑ 12345 <|x|>"\n\n\n# end  \n'
    assert tok.decode(tok(text, add_special_tokens=False)["input_ids"]) == text
    assert tok("a")["input_ids"][0] == tok.bos_token_id
    assert tok.pad_token == PAD and len({tok.pad_token_id, tok.eos_token_id, tok.bos_token_id}) == 3
    assert len(tok("12345", add_special_tokens=False)["input_ids"]) == 5


def test_bundled_model_knows_python(tiny):
    """Held-out figure of the card, and on text no corpus holds: far better than bytes at random (8 bits)."""
    from pefttools.lab.pretrain import bits_per_byte

    held = json.loads((TINY / "training.json").read_text())["held_out"]["all held-out files"]
    assert held["bits_per_byte"] <= 1.3
    mine = open(__file__).read()
    assert bits_per_byte(tiny.model, tiny.tokenizer, [mine])[0] < 2.0


def test_unpacks_and_says_what_it_is():
    base = load_base()
    model, tokenizer = base
    assert model is base.model and tokenizer is base.tokenizer and "LlamaForCausalLM" in repr(base)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damaged_bundle_is_refused(tmp_path, monkeypatch, damage):
    folder = tmp_path / "tiny"
    shutil.copytree(TINY, folder)
    monkeypatch.setattr(lab_base, "TINY", folder)
    file = folder / "model.safetensors"
    raw = bytearray(file.read_bytes())
    if damage == "flip":
        raw[len(raw) // 2] ^= 1
        file.write_bytes(raw)
    elif damage == "cut":
        file.write_bytes(raw[:1000])
    else:
        file.unlink()
    with pytest.raises(ValueError, match="missing" if damage == "gone" else "damaged"):
        load_base()
    (folder / "sha256.json").unlink()
    with pytest.raises(ValueError, match="reinstall pefttools"):
        load_base()


def test_a_folder_of_ones_own(tmp_path, small, tiny):
    small.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    base = load_base(str(tmp_path))
    assert base.name == str(tmp_path) and base.model.config.hidden_size == 16
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(ValueError, match="damaged"):
        load_base(str(tmp_path))


def test_offline_llama_falls_back_to_the_bundled_model_and_says_so(capsys):
    base = load_base("llama-3.2-1b")
    said = capsys.readouterr().out
    assert base.name == "tiny" and "switched off" in base.why
    for name in lab_base.LLAMA_1B:
        assert name in said and name in base.why


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that answers everything with one status."""

    status = 503

    def do_GET(self):
        self.send_response(self.status)
        if self.status in (401, 403):
            self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("status, expected", [
    (401, "accept the licence"), (403, "accept the licence"), (404, "no such model"), (503, "has a fault"), (None, "does not answer")])
def test_a_hub_that_fails(status, expected, tmp_path):
    """A real client against a local hub, in a fresh process (the client reads its settings at import)."""
    import os
    import subprocess
    import sys

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("H", (Hub,), {"status": status or 503}))
    if status is not None:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_address[1]
    if status is None:
        server.server_close()  # nobody listens there now
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path),
           "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", "from pefttools.lab import load_base\nprint(load_base('llama-3.2-1b').why)"],
                          capture_output=True, text=True, env=env, timeout=240)
    if status is not None:
        server.shutdown()
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("the bundled model, because") and expected in last


def test_reason_of_an_unknown_failure_names_it():
    assert "RuntimeError: odd" in reason(RuntimeError("odd"))
