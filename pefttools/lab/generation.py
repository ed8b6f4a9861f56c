"""Generate continuations for many prompts at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pefttools.lab.text import collate


@torch.no_grad()
def generate(model, tokenizer, prompts: str | Sequence[str], max_new_tokens: int = 160, temperature: float = 0.0,
             seed: int = 0, batch_size: int = 64) -> list[str] | str:
    """The continuation of each prompt (without the prompt), up to the end-of-text token or `max_new_tokens`.

    temperature: 0 takes the likeliest token each time (greedy); above, samples with that temperature from `seed`.
    One prompt in gives one string out; a list gives a list, in order. Prompts of a batch are padded on the left, so
    that every row goes on from its last token.
    """
    if isinstance(prompts, str):
        return generate(model, tokenizer, [prompts], max_new_tokens, temperature, seed)[0]
    if temperature < 0:
        raise ValueError(f"temperature must be 0 (greedy) or above, got {temperature}")
    was_training = model.training
    model.eval()
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    rows = [{"input_ids": begin + tokenizer(p, add_special_tokens=False)["input_ids"]} for p in prompts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    device = next(model.parameters()).device
    sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None} if temperature == 0 else {
        "do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    out: list[str] = [""] * len(rows)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, len(order), batch_size):
            picked = order[start:start + batch_size]
            batch = collate([rows[i] for i in picked], tokenizer.pad_token_id, side="left")
            ids = model.generate(input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device),
                                 max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id,
                                 eos_token_id=tokenizer.eos_token_id, **sampling)
            for i, row in zip(picked, ids[:, batch["input_ids"].shape[1]:]):
                out[i] = tokenizer.decode(row, skip_special_tokens=True)
    model.train(was_training)
    return out
