"""run.yaml: the settings of a fine-tune as a file; read with every mistake named, written so that a run repeats.

    pefttools finetune --config runs/a/run.yaml --out runs/b
"""
from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from pefttools.lab.finetune_config import HERE, Settings, WrongQuestion
from pefttools.vram.job import among

NAME = "run.yaml"
HEAD = """# Every setting of this fine-tune, as it was run. Again, into another folder:
#     pefttools finetune --config run.yaml --out FOLDER
"""


def read_config(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file, by name. WrongQuestion for a key that does not exist (with the nearest that do), one
    that stands there twice, and a file that is missing or no YAML."""
    import yaml

    class Once(yaml.SafeLoader):
        """YAML itself lets the last of two equal keys win, without a word."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            seen = set()
            for key, _ in node.value:
                if key.value in seen:
                    raise WrongQuestion(f"{path}, line {key.start_mark.line + 1}: {key.value!r} stands there twice.")
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    try:
        found = yaml.load(Path(path).read_text(encoding="utf-8"), Once)
    except OSError as error:
        raise WrongQuestion(f"--config {path} cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise WrongQuestion(f"--config {path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise WrongQuestion(f"--config {path} must hold settings such as \"method: lora\", one a line.")
    known = [each.name for each in fields(Settings)]
    for key in found:
        try:
            among("setting", str(key).replace("-", "_"), known)
        except ValueError as error:
            raise WrongQuestion(f"{path}: {error}") from None
    return {str(key).replace("-", "_"): value for key, value in found.items()}


def config_text(settings: Settings, data: str | None = None) -> str:
    """The file's text. `data`: where the rows are now, if they came from Python. Equal settings give equal bytes."""
    import yaml

    said = asdict(settings) | ({} if data is None else {"data": data})
    said["targets"] = list(said["targets"]) if isinstance(said["targets"], tuple) else said["targets"]
    said = {name: value for name, value in said.items() if name not in ("plan_only",)}
    return HEAD + yaml.safe_dump(said, sort_keys=False, allow_unicode=True)


def check_same(path: Path, text: str) -> None:
    """ValueError if the run.yaml at `path` describes another run than `text` does."""
    import yaml

    before, now = (yaml.safe_load(each) for each in (path.read_text(encoding="utf-8"), text))
    changed = [name for name in now if name not in HERE and before.get(name) != now[name]]
    if changed:
        said = ", ".join(f"{name} was {before.get(name)} and is {now[name]}" for name in changed)
        raise ValueError(f"{path.parent} belongs to another run ({said}): use another --out, or delete it to start "
                         "again")
