"""Checkpoint folders that are complete or known not to be, and never mixed with those of another run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from etf_adapt.results.run_folder import write_json

STATE_NAME = "etf_state.json"  # of each checkpoint; written first, as incomplete, and again last
TENSORS_NAME = "etf_state.safetensors"
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def begin_checkpoint(folder: str | Path) -> None:
    """Mark a folder as an incomplete checkpoint, before anything else is written into it."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not _is_own(folder):
        raise ValueError(f"`{folder}` holds something that this run did not write: move it, or use another output_dir.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / STATE_NAME, {"complete": False})


def complete_checkpoint(folder: str | Path, state: Mapping[str, Any]) -> None:
    """Mark a checkpoint as complete, with our state and the sizes of its files, after all of them were written."""
    folder = Path(folder)
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    files.pop(STATE_NAME, None)
    write_json(folder / STATE_NAME, {"complete": True, "files": files, "state": dict(state)})


def is_complete(folder: str | Path) -> bool:
    """Return whether a folder is marked as complete and every file has the size noted in the mark."""
    folder = Path(folder)
    try:
        mark = _read_mark(folder)
        return mark["complete"] is True and all(
            (folder / name).stat().st_size == size for name, size in mark["files"].items()
        )
    except (OSError, ValueError, LookupError, TypeError):
        return False


def read_state(folder: str | Path) -> dict[str, Any]:
    """Return the state that ``complete_checkpoint`` was given."""
    return dict(_read_mark(Path(folder))["state"])


def write_tensors(folder: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write our tensors into a checkpoint; no file where there are none."""
    if tensors:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, Path(folder, TENSORS_NAME))


def read_tensors(folder: str | Path) -> dict[str, Tensor]:
    """Return what ``write_tensors`` was given."""
    file = Path(folder, TENSORS_NAME)
    return load_file(file) if file.is_file() else {}


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """List the folders ``checkpoint-STEP`` of a run, complete or not, in ascending order of steps."""
    folders = Path(output_dir).iterdir() if Path(output_dir).is_dir() else ()
    return sorted((path for path in folders if path.is_dir() and _NAME.fullmatch(path.name)), key=_step)


def find_last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the newest complete checkpoint of a run, if there is one."""
    return next((path for path in reversed(list_checkpoints(output_dir)) if is_complete(path)), None)


def resolve_checkpoint(output_dir: str | Path, resume: str | Path | bool | None) -> Path | None:
    """Return the checkpoint to resume from, or None to start anew; refuse what would mix two runs in one folder.

    ``resume`` is a checkpoint's path, or True for the newest complete one in ``output_dir``.
    """
    existing = list_checkpoints(output_dir)
    last = find_last_complete_checkpoint(output_dir)
    if not resume:
        if existing:
            remedy = "go on from it with resume_from_checkpoint=True" if last else "it is half written: remove it"
            raise ValueError(
                f"`output_dir` (={output_dir}) holds {(last or existing[-1]).name} of an earlier run: {remedy}, or choose "
                "another output_dir."
            )
        return None
    folder = last if resume is True else Path(resume)
    if folder is None:
        raise FileNotFoundError(
            f"`output_dir` (={output_dir}) holds no complete checkpoint to resume from: start without "
            "resume_from_checkpoint, or name the checkpoint's folder."
        )
    if not is_complete(folder):
        remedy = f"the newest complete one is {last}." if last else "start the run anew."
        raise FileNotFoundError(f"`resume_from_checkpoint` (={folder}) is no complete checkpoint: {remedy}")
    for path in existing:
        if _step(path) > _step(folder) and (is_complete(path) or not _is_own(path)):
            raise ValueError(
                f"`output_dir` (={output_dir}) holds {path.name}, which is newer than {folder.name} and would be mixed "
                "with what follows it: resume from it, or choose another output_dir."
            )
    return folder


def rotate_checkpoints(output_dir: str | Path, limit: int | None, *, keep: str | None = None) -> None:
    """Delete our oldest checkpoints over a limit (None or 0: none), but never the newest, nor the path ``keep``."""
    own = [path for path in list_checkpoints(output_dir) if _is_own(path)]
    if not limit or not own:
        return
    kept = {own[-1].name} | ({Path(keep).name} if keep else set())
    spare = [path for path in own if path.name not in kept]
    for path in spare[: max(0, len(own) - max(limit, len(kept)))]:
        _remove(path)


def remove_checkpoints(output_dir: str | Path) -> None:
    """Delete all checkpoints that were written here, complete or not, and nothing else."""
    for path in filter(_is_own, list_checkpoints(output_dir)):
        _remove(path)


def _remove(folder: Path) -> None:
    begin_checkpoint(folder)  # One that is half deleted must be known as incomplete: its mark goes last.
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != STATE_NAME:
            path.unlink()
    shutil.rmtree(folder)


def _read_mark(folder: Path) -> Any:
    return json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))


def _is_own(folder: Path) -> bool:
    return (folder / STATE_NAME).exists()


def _step(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    return int(match.group(1)) if match else -1
