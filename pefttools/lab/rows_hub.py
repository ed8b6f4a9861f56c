"""The files of a data set of the model hub: hub:owner/name[@revision][:file]

    hub:flytech/python-codes-25k@0123abc…         a revision is a branch, a tag or a commit; a commit never changes
    hub:owner/name:data/train.jsonl               one file of it

Without a file it takes the only one with rows, or the one (or the numbered parts) whose path says "train". Downloads
land in the hub's cache, so that the second run needs no network; a file that was cut off is refused and fetched again.
"""
from __future__ import annotations

import logging
import re
from pathlib import Path

from pefttools.lab.rows_files import ENDINGS

FORM = re.compile(r"hub:(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[^:@\s]+))?(?::(?P<file>\S+))?")


def fetch(address: str) -> list[Path]:
    """The files that hold the rows of `address`, in the local cache. Every way to fail is a ValueError that says what
    would do."""
    found = FORM.fullmatch(address)
    if not found:
        raise ValueError(f"--data {address}: it is hub:owner/name, hub:owner/name@revision, or with :file behind it.")
    name, revision, file = found["name"], found["revision"], found["file"]
    from pefttools.lab.base import hub_fault

    silent = hub_fault()
    noisy = logging.getLogger("huggingface_hub")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        if silent:
            return in_cache(name, revision, file)
        from huggingface_hub import HfApi, hf_hub_download

        files = [file] if file else rows_in(name, HfApi().list_repo_files(name, repo_type="dataset", revision=revision))
        return [Path(hf_hub_download(name, each, repo_type="dataset", revision=revision)) for each in files]
    except Ambiguous as error:
        raise ValueError(f"{address}: {error}") from None
    except Exception as error:
        why = f"{silent}, and the data set is not in the local cache" if silent else reason(error)
        raise ValueError(f"{address}: {why}") from error
    finally:
        noisy.setLevel(level)


class Ambiguous(ValueError):
    """Which file is meant cannot be told."""


def in_cache(name: str, revision: str | None, file: str | None) -> list[Path]:
    """The same files where the hub does not answer: from an earlier download."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True))
    if file:
        if not (folder / file).is_file():
            raise FileNotFoundError(file)
        return [folder / file]
    there = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    if not any(each.lower().endswith(ENDINGS) for each in there):
        raise FileNotFoundError(name)
    found = rows_in(name, there)
    if (parts := re.search(r"-of-(\d+)", found[0])) and len(found) != int(parts[1]):
        raise FileNotFoundError(f"{len(found)} of {int(parts[1])} parts")    # half of a data set is not taken for it
    return [folder / each for each in found]


def rows_in(name: str, files: list[str]) -> list[str]:
    """Which of a repository's files hold the rows to train on."""
    files = sorted(each for each in files if each.lower().endswith(ENDINGS) and Path(each).name != "dataset_infos.json")
    if not files:
        raise Ambiguous(f"no file of it ends in {', '.join(ENDINGS)}.")
    for ending in ENDINGS:                                     # the same rows may be there in several forms
        of_kind = [each for each in files if each.lower().endswith(ending)]
        train = [each for each in of_kind if "train" in each.lower()]
        for some in (of_kind, train):
            if len(some) == 1 or some and len({re.sub(r"\d+", "0", each) for each in some}) == 1:
                return some
    raise Ambiguous(f"it has several files with rows, name one: {', '.join(f'hub:{name}:{each}' for each in files[:6])}"
                    + (" …" if len(files) > 6 else ""))


def reason(error: BaseException) -> str:
    """As for a model, in the words of a data set."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    from pefttools.lab import base

    chain = [error]
    while (e := chain[-1].__cause__ or chain[-1].__context__) is not None and e not in chain:
        chain.append(e)
    if any(isinstance(e, EntryNotFoundError) and not isinstance(e, LocalEntryNotFoundError) for e in chain):
        return "it has no such file"
    return base.reason(error).replace("model's page", "data set's page").replace("no such model", "no such data set") \
        .replace("the model is", "the data set is")
