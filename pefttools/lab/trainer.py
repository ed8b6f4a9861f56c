"""The same training through transformers' `Trainer`: same batches, same optimizer, same schedule, same loss."""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path

import torch

from pefttools.lab.text import batches, collate, encoded
from pefttools.lab.training import History


def train_with_trainer(model, data, tokenizer, *, steps: int, lr: float = 1e-3, batch_size: int = 16,
                       grad_accum: int = 1, warmup: float = 0.05, clip: float = 1.0, weight_decay: float = 0.0,
                       seed: int = 0, max_length: int = 256, folder: str | Path | None = None,
                       progress: bool = True) -> History:
    """`lab.train` with `transformers.Trainer` doing the work; arguments and result as there.

    Only two things are ours: which rows make a batch (so that both loops see the same ones) and the padding.
    `model` may be a PeftModel. Without `folder` nothing is written.
    """
    from transformers import Trainer, TrainingArguments

    rows = encoded(data, tokenizer, max_length)
    plan = batches(rows, batch_size, steps * grad_accum, seed)

    class SameBatches(Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(
                rows, batch_sampler=plan, collate_fn=lambda picked: collate(picked, tokenizer.pad_token_id))

    on_gpu = next(model.parameters()).is_cuda
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SameBatches(
            model=model, processing_class=tokenizer, train_dataset=rows,
            args=TrainingArguments(
                output_dir=str(folder or scratch), max_steps=steps, learning_rate=lr, per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=grad_accum, lr_scheduler_type="linear", warmup_steps=math.ceil(warmup * steps),
                max_grad_norm=clip, weight_decay=weight_decay, seed=seed, optim="adamw_torch", logging_steps=1,
                save_strategy="steps" if folder else "no", report_to="none", disable_tqdm=not progress,
                use_cpu=not on_gpu, remove_unused_columns=False))
        if not progress:
            from transformers import PrinterCallback

            trainer.remove_callback(PrinterCallback)
        began = time.perf_counter()
        trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    model.eval()
    return History(loss=[row["loss"] for row in logs], lr=[row["learning_rate"] for row in logs],
                   tokens=sum(sum(x != -100 for x in rows[i]["labels"][1:]) for batch in plan for i in batch),
                   seconds=time.perf_counter() - began)
