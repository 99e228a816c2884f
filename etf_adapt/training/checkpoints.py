"""Checkpoint folders that are either complete or known not to be, and never mixed with anyone else's."""

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

STATE_NAME = "etf_state.json"
"""File of each checkpoint that holds our part of its state; written first, as incomplete, and again last."""

TENSORS_NAME = "etf_state.safetensors"

_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def begin_checkpoint(folder: str | Path) -> None:
    """Mark a folder as a checkpoint of ours that is not complete, before anything else is written into it.

    Args:
        folder: The checkpoint's folder; made where it does not exist.

    Raises:
        ValueError: The folder exists, is not empty and was not written here.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / STATE_NAME).exists():
        raise ValueError(f"`{folder}` holds something that this run did not write: move it, or use another output_dir.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / STATE_NAME, {"complete": False})


def complete_checkpoint(folder: str | Path, state: Mapping[str, Any]) -> None:
    """Mark a checkpoint as complete, with the names and sizes of its files, after all of them were written.

    Args:
        folder: A folder given to ``begin_checkpoint`` before.
        state: Our part of the training state: anything that JSON holds.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> begin_checkpoint(folder)
        >>> is_complete(folder)
        False
        >>> complete_checkpoint(folder, {"epoch": 3})
        >>> is_complete(folder), read_state(folder)
        (True, {'epoch': 3})
    """
    folder = Path(folder)
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    files.pop(STATE_NAME, None)
    write_json(folder / STATE_NAME, {"complete": True, "files": files, "state": dict(state)})


def is_complete(folder: str | Path) -> bool:
    """Say whether a checkpoint was written to its end: its mark says so and every file has the size noted there.

    Args:
        folder: A checkpoint's folder.

    Returns:
        False also for folders that are not there or were not written here.
    """
    folder = Path(folder)
    try:
        mark = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
        return mark["complete"] is True and all(
            (folder / name).stat().st_size == size for name, size in mark["files"].items()
        )
    except (OSError, ValueError, LookupError, TypeError):
        return False


def write_tensors(folder: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of our part of the training state into a checkpoint; no file where there are none."""
    if tensors:
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, Path(folder, TENSORS_NAME))


def read_tensors(folder: str | Path) -> dict[str, Tensor]:
    """Return what ``write_tensors`` wrote, by name; nothing where there is no file."""
    file = Path(folder, TENSORS_NAME)
    return load_file(file) if file.is_file() else {}


def read_state(folder: str | Path) -> dict[str, Any]:
    """Read our part of the training state from a complete checkpoint.

    Args:
        folder: A checkpoint's folder.

    Returns:
        What ``complete_checkpoint`` was given.
    """
    return dict(json.loads((Path(folder) / STATE_NAME).read_text(encoding="utf-8"))["state"])


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """List the folders named ``checkpoint-<step>``, complete or not, in rising order of steps.

    Args:
        output_dir: Folder of a run; it need not exist.

    Returns:
        Their paths.
    """
    if not Path(output_dir).is_dir():
        return []
    found = [path for path in Path(output_dir).iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=_step)


def find_last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """Find the newest checkpoint that was written to its end.

    Args:
        output_dir: Folder of a run.

    Returns:
        Its path; None where there is none. A newer one that is not complete is passed over, and left alone.
    """
    return next((path for path in reversed(list_checkpoints(output_dir)) if is_complete(path)), None)


def resolve_checkpoint(output_dir: str | Path, resume: str | Path | bool | None) -> Path | None:
    """Find the checkpoint to resume from, and refuse what would mix two runs in one folder.

    Args:
        output_dir: Folder of the run.
        resume: A checkpoint's path; True for the newest complete one in ``output_dir``; None or False to start anew.

    Returns:
        Path of a complete checkpoint, or None to start anew.

    Raises:
        FileNotFoundError: There is no complete checkpoint where one was asked for.
        ValueError: ``output_dir`` holds checkpoints that the run would mix with its own.
    """
    existing = list_checkpoints(output_dir)
    last = find_last_complete_checkpoint(output_dir)
    if not resume:
        if existing:
            way = "go on from it with resume_from_checkpoint=True" if last else "it is half written: remove it"
            raise ValueError(
                f"`output_dir` (={output_dir}) holds {(last or existing[-1]).name} of an earlier run: {way}, or choose "
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
        raise FileNotFoundError(
            f"`resume_from_checkpoint` (={folder}) is no checkpoint written to its end here: {remedy}"
        )
    for path in existing:
        if _step(path) > _step(folder) and (is_complete(path) or not (path / STATE_NAME).exists()):
            raise ValueError(
                f"`output_dir` (={output_dir}) holds {path.name}, which is newer than {folder.name} and would be mixed "
                "with what follows it: resume from it, or choose another output_dir."
            )
    return folder


def rotate_checkpoints(output_dir: str | Path, limit: int | None, *, keep: str | None = None) -> None:
    """Delete the oldest checkpoints over a limit; only those written here, never the newest and never the one kept.

    Args:
        output_dir: Folder of a run.
        limit: Checkpoints to leave; None or 0 deletes nothing.
        keep: Path of the best checkpoint.
    """
    own = [path for path in list_checkpoints(output_dir) if (path / STATE_NAME).exists()]
    if not limit or not own:
        return
    kept = {own[-1].name} | ({Path(keep).name} if keep else set())
    spare = [path for path in own if path.name not in kept]
    for path in spare[: max(0, len(own) - max(limit, len(kept)))]:
        _remove(path)


def remove_checkpoints(output_dir: str | Path) -> None:
    """Delete all checkpoints that were written here, complete or not, and nothing else.

    Args:
        output_dir: Folder of a run.
    """
    for path in list_checkpoints(output_dir):
        if (path / STATE_NAME).exists():
            _remove(path)


def _remove(folder: Path) -> None:
    begin_checkpoint(folder)  # One that is half deleted must be known as incomplete: its mark goes last.
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != STATE_NAME:
            path.unlink()
    shutil.rmtree(folder)


def _step(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    return int(match.group(1)) if match else -1
