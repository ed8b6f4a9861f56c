"""A laboratory that fits a laptop: a real small Llama, instruction data with tests, training and evaluation.

    base = load_base("tiny")                       # or "llama-3.2-1b", or any hub id
    train(base.model, load_data("train"), base.tokenizer, steps=400)
    evaluate(base.model, base.tokenizer, load_data("held_out"))

Names are imported when they are first used: `import pefttools.lab` costs nothing.
"""

from __future__ import annotations

from importlib import import_module

WHERE = {
    "Base": "base", "load_base": "base",
    "load_data": "data", "prompt_of": "data", "answer_of": "data",
    "encode": "text", "encoded": "text", "collate": "text", "batches": "text", "steps": "text",
    "train": "training", "History": "training", "loss_sum": "training", "schedule": "training",
    "train_with_trainer": "trainer",
    "generate": "generation",
    "evaluate": "evaluation", "Report": "evaluation", "code_of": "programs", "run_programs": "programs",
    "held_out_loss": "losses", "row_losses": "losses", "perplexity": "losses", "pass_at_k": "passk",
    "Interval": "intervals", "bootstrap": "intervals", "paired_bootstrap": "intervals", "wilson": "intervals",
    "forgetting": "base_domain", "base_texts": "base_domain", "document_losses": "base_domain",
}
__all__ = sorted(WHERE)


def __getattr__(name: str):
    if name in WHERE:
        return getattr(import_module(f"pefttools.lab.{WHERE[name]}"), name)
    raise AttributeError(f"pefttools.lab has no {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
