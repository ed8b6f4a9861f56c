"""Where does this notebook run, what can its GPU do, and where will its files still be tomorrow?

    here = place()                    Colab or not; GPU, its capability, its memory; a sentence about each
    here.dtype                        bfloat16 from compute capability 8.0, float16 on older GPUs (a T4), float32 on a CPU
    runs = run_folder("capstone")     in Drive where that is mounted (a Colab session ends without warning), else here
    hand_in(runs / "hand_in")         one zip with the adapter's files, downloaded on Colab

Nothing here needs Colab: `google.colab` is looked for, never required.
"""

from __future__ import annotations

import os
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DRIVE = Path("/content/drive")           # where Colab's own examples mount it
FILES = ("adapter_config.json", "adapter_model.safetensors")
LARGE_FILES = ("llama_1b_config.json", "llama_1b_model.safetensors")     # beside them, where Llama was trained as well


@dataclass(frozen=True)
class Place:
    """The machine, as far as a fine-tune cares. `capability` is (0, 0) without a GPU, `memory` then 0 bytes."""

    colab: bool
    gpu: str
    capability: tuple[int, int]
    memory: int

    @property
    def dtype(self) -> Any:
        """The torch dtype to load a base in. Emulated bfloat16, which torch calls supported on a T4, does not count."""
        import torch

        if not self.gpu:
            return torch.float32
        return torch.bfloat16 if self.capability >= (8, 0) else torch.float16

    @property
    def attention(self) -> str:
        """transformers' `attn_implementation`. sdpa picks the best kernel that there is: no flash attention before
        8.0."""
        return "sdpa"

    def __str__(self) -> str:
        where = "Colab" if self.colab else "this machine (no Colab)"
        if not self.gpu:
            return f"{where}, no GPU: the bundled model trains here, in float32"
        number = ".".join(map(str, self.capability))
        flash = "flash attention" if self.capability >= (8, 0) else "no flash attention"
        return (f"{where}, {self.gpu} with {self.memory / 2**30:.2f} GiB, compute capability {number}: "
                f"{str(self.dtype).removeprefix('torch.')}, {flash}")


def on_colab() -> bool:
    """Whether this Python is a Colab kernel: those have imported google.colab before the first cell runs."""
    return "google.colab" in sys.modules


def place() -> Place:
    """What is here. Imports torch; touches the GPU only to ask for its name and sizes."""
    import torch

    if not torch.cuda.is_available():
        return Place(on_colab(), "", (0, 0), 0)
    about = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Place(on_colab(), about.name, (about.major, about.minor), about.total_memory)


# ------------------------------------------------------------------------------------------------ files that stay

def run_folder(name: str, drive: bool | None = None, local: str | Path = "runs") -> Path:
    """A folder for checkpoints, made if need be, and a line about where it is.

    drive: True mounts Google Drive on Colab (it asks you), False stays local, None takes Drive only if it is mounted
    already. Where there is no Colab, or Drive is refused, it is `local`/name beside the notebook.
    """
    if not name or Path(name).name != name:
        raise ValueError(f"name={name!r}: one folder's name is needed, such as 'capstone'.")
    mine, why = DRIVE / "MyDrive", "beside the notebook"
    if on_colab() and drive is not False:
        if drive and not mine.is_dir():
            why = mount()
        if mine.is_dir():
            folder, why = mine / "pefttools" / name, "in your Drive: a later session goes on from there"
        else:
            folder = Path(local) / name
            why += ", lost when this session ends (run_folder(…, drive=True) keeps it in Drive)" if not drive else ""
    else:
        folder = Path(local) / name
    folder.mkdir(parents=True, exist_ok=True)
    print(f"Files of this run: {folder} ({why}).")
    return folder


def mount() -> str:
    """Ask Colab to mount Drive. Returns what to say where that did not work; a refusal is no reason to stop."""
    try:
        from google.colab import drive

        drive.mount(str(DRIVE))
    except Exception as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][:120]
        return f"Drive was not mounted ({said}), so it is beside the notebook and lost when this session ends"
    return "Drive was mounted, but has no MyDrive folder, so it is beside the notebook and lost when this session ends"


def hand_in(folder: str | Path, to: str | Path | None = None, download: bool = True) -> Path | None:
    """Put an adapter's files into one zip, to be handed in beside the notebook; on Colab your browser gets it.

    Returns the zip, or None (with a line that says so) where the adapter is not there yet.
    """
    folder = Path(folder)
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        print(f"There is no {missing[0]} in {folder} yet: nothing to hand in.")
        return None
    names = [name for name in (*FILES, *LARGE_FILES) if (folder / name).is_file()]
    target = Path(to) if to else folder.with_suffix(".zip")
    part = target.with_name(f".{target.name}.part")
    with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.write(folder / name, name)
    os.replace(part, target)
    print(f"To hand in: this notebook and {target} ({target.stat().st_size / 1e6:.2f} MB: {', '.join(names)}).")
    if download and on_colab():
        try:
            from google.colab import files

            files.download(str(target))
        except Exception as error:
            print(f"The browser did not take it ({type(error).__name__}): download it from the folder icon at the left.")
    return target
