"""Checks before publishing: complete, loadable, no tokens, no local paths."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from etf_adapt.results.run_folder import MODEL_FILES, RESULTS_FILE, STATISTICS_FILE

PUBLISHED = (*MODEL_FILES, "README.md", "LICENSE*", RESULTS_FILE)  # where they exist, beside the pictures of the card

_PICTURE = re.compile(r"!\[[^\]]*\]\(\s*<?([^)\s>]+)|<img\b[^>]*\bsrc=[\"']([^\"']+)")
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")


class UnfinishedFolderError(ValueError):
    """Raised where a folder is not fit to be published."""


def check_folder(folder: str | os.PathLike[str], *, statistics: bool = False) -> list[str]:
    """Return the names of the files to publish; refuse a folder that lacks something or shows a token or a local path."""
    path = Path(folder)
    try:
        if not path.is_dir():
            raise UnfinishedFolderError("is no folder: name the one that a finished run left.")
        if re.fullmatch(r"checkpoint-\d+", path.resolve().name):
            raise UnfinishedFolderError("is a checkpoint in the middle of a run: name the finished folder.")
        if not {"architectures", "architecture", "model_type"} & set(_read_json(path, "config.json")):
            raise UnfinishedFolderError("has a config.json that names no architecture: nothing can load it.")
        found = [file for pattern in PUBLISHED for file in path.glob(pattern) if file.is_file()]
        if statistics and not Path(path, STATISTICS_FILE).is_file():
            raise UnfinishedFolderError(
                f"holds no {STATISTICS_FILE} to publish: leave `statistics` (--statistics) out, or set the head by refit."
            )
        # Only if asked for: sums over the features of a class of few rows are nearly the rows.
        found = [file for file in found if statistics or file.name != STATISTICS_FILE]
        names = [file.relative_to(path).as_posix() for file in found]
        _check_weights(path, names)
        _check_modules(path, names)
        names += _check_card(path) if "README.md" in names else []
        for name in names:
            _check_privacy(path, name)
    except UnfinishedFolderError as error:
        raise UnfinishedFolderError(f"`folder` (={str(folder)!r}) {error}") from error.__cause__
    return sorted({*names})


def _read_json(folder: Path, name: str) -> Any:
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnfinishedFolderError(f"holds no {name}: name the folder of a finished run.") from None
    except ValueError as error:
        raise UnfinishedFolderError(f"holds a {name} that is no JSON ({error}): save the model again.") from error


def _check_weights(folder: Path, names: list[str]) -> None:
    """Read the header of each file of weights, which fails for a truncated file, and compare with the index."""
    from safetensors import SafetensorError, safe_open

    keys: dict[str, set[str]] = {}
    for name in names:
        if name.endswith(".safetensors"):
            try:
                with safe_open(folder / name, framework="np") as file:
                    keys[name] = set(file.keys())
            except SafetensorError as error:
                fault = f"holds {name}, which is not whole ({error}): save the model again."
                raise UnfinishedFolderError(fault) from error
    indexed = {"model.safetensors"}
    if "model.safetensors.index.json" in names:
        weight_map = _read_json(folder, "model.safetensors.index.json")["weight_map"]
        indexed = set(weight_map.values())
        if lost := [key for key, name in weight_map.items() if key not in keys.get(name, {key})]:
            raise UnfinishedFolderError(f"lacks {lost[0]}, which is in the index: save the model again.")
    if missing := sorted(indexed - set(keys)):
        raise UnfinishedFolderError(f"lacks {missing[0]}: only finished safetensors weights are published.")


def _check_modules(folder: Path, names: list[str]) -> None:
    """Find the files of all modules of a sentence-transformers folder."""
    for module in _read_json(folder, "modules.json") if "modules.json" in names else ():
        parts = ["config.json", *(["model.safetensors"] if str(module.get("type")).endswith("Dense") else [])]
        for part in (f"{module['path']}/{part}" for part in parts if module.get("path")):
            if part not in names:
                raise UnfinishedFolderError(f"lacks {part}, which modules.json names.")


def _check_card(folder: Path) -> list[str]:
    """Return the names of the pictures that the card shows."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    card = folder / "README.md"
    try:
        metadata_load(card)
    except (YAMLError, ValueError) as error:
        fault = f"holds a README.md whose head is no YAML ({' '.join(str(error).split())}): mend it."
        raise UnfinishedFolderError(fault) from error
    found = [first or second for first, second in _PICTURE.findall(card.read_text(encoding="utf-8"))]
    names = [unquote(name) for name in found if not re.match(r"[a-z][a-z0-9+.-]*:|/|#", name, re.IGNORECASE)]
    for name in names:
        file = (folder / name).resolve()
        if not (file.is_file() and file.is_relative_to(folder.resolve())):
            raise UnfinishedFolderError(f"lacks {name}, which README.md shows.")
    return [Path(os.path.normpath(name)).as_posix() for name in names]


def _check_privacy(folder: Path, name: str) -> None:
    """Refuse a text with a token or a local path."""
    is_vocabulary = name.startswith(("tokenizer.json", "vocab", "merges"))  # whose words may look like paths
    if is_vocabulary or Path(name).suffix not in (".json", ".md", ".txt", ".jinja", ""):
        return
    text = (folder / name).read_bytes()
    if _TOKEN.search(text):
        raise UnfinishedFolderError(f"holds what looks like a token of the Hub, in {name}: remove it.")
    for place in (Path.home(), Path.cwd(), folder.resolve()):
        forms = {os.fsencode(place), place.as_posix().encode(), json.dumps(str(place))[1:-1].encode()}
        found = [form for form in forms if re.search(rb"(?<![\w.])" + re.escape(form) + rb"(?![\w.-])", text)]
        if len(place.parts) > 1 and found:
            raise UnfinishedFolderError(f"holds {str(place)!r}, a path of this machine, in {name}: remove it.")
