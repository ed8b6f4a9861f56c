"""Pretrain the bundled model: a small Llama that reads and writes Python.

    python -m pefttools.lab.pretrain build  --packages DIR --work DIR     # corpus and tokenizer
    python -m pefttools.lab.pretrain train  --work DIR [--steps N]        # resumes where it stopped
    python -m pefttools.lab.pretrain finish --work DIR --to DIR           # evaluate, card, half-precision weights

The architecture is transformers' `LlamaForCausalLM`, everything of Llama-3.2-1B at a smaller size: RMSNorm, rotary
positions, grouped-query attention with heads of width 64, SwiGLU, input and output embeddings tied.

Optimizer: Muon on the matrices inside the blocks, AdamW on embeddings and norms. Learning rate: warm up, hold, decay
linearly over the last fifth ("trapezoid", Hägele et al. 2024, arXiv:2405.18392), during which the context is doubled.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch

from pefttools.lab import corpus

SHAPE = dict(hidden_size=256, num_hidden_layers=6, intermediate_size=704, num_attention_heads=4,
             num_key_value_heads=2, head_dim=64, max_position_embeddings=1024, rope_theta=10_000.0,
             tie_word_embeddings=True)
SEQ, BATCH, PEAK_LR, WARMUP, DECAY = 256, 32, 4e-3, 100, 0.2  # tokens, sequences a step, -, steps, share of steps


def new_model(tokenizer, seed: int = 0):
    """A `LlamaForCausalLM` of `SHAPE` with fresh weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **SHAPE))


def learning_rate(step: int, steps: int) -> float:
    """Trapezoid: linear warm-up, flat, linear to zero over the last `DECAY` of the steps."""
    left = (steps - step) / (DECAY * steps)
    return PEAK_LR * min(1.0, (step + 1) / WARMUP, left)


def batch_at(step: int, ids: np.ndarray, seq: int, batch: int, seed: int) -> torch.Tensor:
    """The batch of a step, [batch, seq]: windows without overlap, in an order reshuffled each epoch.

    A function of the step alone, so that a resumed run reads what the uninterrupted one would have read.
    """
    windows = (len(ids) - seq) // seq
    first = step * batch
    epoch, row = divmod(first, windows)
    order = np.random.default_rng([seed, seq, epoch]).permutation(windows)
    offset = np.random.default_rng([seed, epoch]).integers(seq)
    rows = [order[(row + i) % windows] * seq + offset for i in range(batch)]
    return torch.from_numpy(np.stack([ids[r:r + seq] for r in rows]).astype(np.int64))


def optimizers(model):
    """Muon for the matrices of the blocks, AdamW for the rest."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers" in n)]
    return [torch.optim.Muon(matrices, lr=PEAK_LR, weight_decay=0.05, momentum=0.95, nesterov=True,
                             adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


@torch.no_grad()
def bits_per_byte(model, tokenizer, texts: list[str], seq: int = 512) -> tuple[float, float]:
    """(bits per byte, mean loss in nats per token) over whole documents cut into windows of `seq` tokens.

    Each document starts with the begin token; a later window begins with the last token of the one before, so that
    every token but the first is predicted exactly once.
    """
    was_training = model.training
    model.eval()
    nats = tokens = 0
    windows = []
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        windows += [ids[i:i + seq + 1] for i in range(0, len(ids) - 1, seq)]
    windows.sort(key=len)
    for i in range(0, len(windows), 16):
        rows = windows[i:i + 16]
        width = max(map(len, rows))
        x = torch.full((len(rows), width), tokenizer.pad_token_id)
        y = torch.full((len(rows), width), -100)
        for j, row in enumerate(rows):
            x[j, :len(row)] = y[j, :len(row)] = torch.tensor(row)
        logits = model(input_ids=x).logits.float()
        nats += torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), y[:, 1:].flatten(), ignore_index=-100, reduction="sum").item()
        tokens += int((y[:, 1:] != -100).sum())
    model.train(was_training)
    size = sum(len(t.encode()) for t in texts)
    return nats / math.log(2) / size, nats / tokens


def train(work: Path, *, steps: int, seed: int = 0, save_every: int = 250, compile: bool = True) -> None:
    """Train from the last checkpoint in `work` to `steps`. Appends one row per 10 steps to `log.jsonl`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work)
    ids = np.load(work / "train.npy", mmap_mode="r")
    held_out = json.loads((work / "held_out.json").read_text())[:30]
    model = new_model(tokenizer, seed).train()
    opts = optimizers(model)
    start = tokens = 0
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for opt, s in zip(opts, state["optimizers"]):
            opt.load_state_dict(s)
        start, tokens = state["step"], state["tokens"]
        print(f"resuming at step {start}", flush=True)
    run = torch.compile(model) if compile else model
    began, seen = time.time(), 0
    decay_from = int(steps * (1 - DECAY))
    for step in range(start, steps):
        seq, batch = (SEQ, BATCH) if step < decay_from else (2 * SEQ, BATCH // 2)
        x = batch_at(step, ids, seq, batch, seed)
        lr = learning_rate(step, steps)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = lr
        with torch.autocast("cpu", torch.bfloat16):
            loss = run(input_ids=x, labels=x).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        tokens += x.numel()
        seen += x.numel()
        row = {"step": step + 1, "tokens": tokens, "loss": round(loss.item(), 4), "lr": lr, "norm": round(norm.item(), 3)}
        if not math.isfinite(row["loss"]):
            raise FloatingPointError(f"loss is {row['loss']} at step {step}: lower the learning rate and resume from {checkpoint}")
        last = step + 1 == steps
        if (step + 1) % 500 == 0 or last:
            row["held_out_bpb"], row["held_out_loss"] = bits_per_byte(model, tokenizer, held_out, SEQ)
        if (step + 1) % 10 == 0 or last:
            with open(work / "log.jsonl", "a") as f:
                f.write(json.dumps(row) + "\n")
            print(row, f"{seen / (time.time() - began):.0f} tok/s", flush=True)
        if (step + 1) % save_every == 0 or last:
            part = work / "checkpoint.part"
            torch.save({"model": model.state_dict(), "optimizers": [o.state_dict() for o in opts],
                        "step": step + 1, "tokens": tokens}, part)
            os.replace(part, checkpoint)  # a killed run leaves the old checkpoint whole


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["build", "train", "finish"])
    parser.add_argument("--packages", type=Path, help="folder of unpacked packages (build)")
    parser.add_argument("--work", type=Path, required=True, help="folder of corpus, tokenizer, log and checkpoint")
    parser.add_argument("--to", type=Path, help="folder to write the finished model to (finish)")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.what == "build":
        corpus.build(args.packages, args.work, seed=args.seed)
    elif args.what == "train":
        train(args.work, steps=args.steps, seed=args.seed)
    else:
        from pefttools.lab.card import finish

        finish(args.work, args.to)


if __name__ == "__main__":
    main()
