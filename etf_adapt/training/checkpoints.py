"""Checkpoint folders that are complete or known not to be, and never mixed with those of another run."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from huggingface_hub.utils.sha import sha_fileobj
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from etf_adapt.errors import DiskFullError
from etf_adapt.results.claim import read_run
from etf_adapt.results.run_folder import plain_value, write_json

STATE_NAME = "etf_state.json"  # of each checkpoint; written first, as incomplete, and again last
TENSORS_NAME = "etf_state.safetensors"
UNFINISHED = "it was not finished"
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")


def begin_checkpoint(folder: str | Path) -> None:
    """Mark a folder as an incomplete checkpoint, before anything else is written into it."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not _is_own(folder):
        raise ValueError(f"`{folder}` holds something that this run did not write: move it, or use another output_dir.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / STATE_NAME, {"complete": False})


def complete_checkpoint(folder: str | Path, state: Mapping[str, Any], *, run: str | None = None) -> None:
    """Mark a checkpoint as complete, with our state, its run, and the size and hash of each file, after all were written."""
    folder = Path(folder)
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    files = {name: [path.stat().st_size, _hash(path)] for name, path in paths.items() if name != STATE_NAME}
    mark = plain_value({"complete": True, "run": run, "files": files, "state": dict(state)})
    write_json(folder / STATE_NAME, mark | {"hash": _hash_of_mark(mark)})


def find_damage(folder: str | Path, *, hashes: bool = True) -> str | None:
    """Return what is wrong with a checkpoint, None where its files are as written; without ``hashes`` by their sizes alone."""
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    try:
        mark = _read_mark(folder)
        if mark["complete"] is False:
            return UNFINISHED
        is_sound = mark.pop("hash") == _hash_of_mark(mark)
    except FileNotFoundError:
        return UNFINISHED if _is_own(folder) else f"{STATE_NAME} is missing"
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        is_sound = False
    if not is_sound:
        return f"{STATE_NAME} is damaged"
    for name, (size, noted_hash) in mark["files"].items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (folder / name).stat().st_size != size or (hashes and _hash(folder / name) != noted_hash):
            return f"{name} is damaged or was changed"
    return None


def read_run_of(folder: str | Path | None) -> str | None:
    """Return the identity of the run that wrote a complete checkpoint; None without a checkpoint."""
    return None if folder is None else _read_mark(Path(folder))["run"]


def find_flaw(folder: str | Path, run: str | None) -> str | None:
    """Return why the run of an identity cannot use a checkpoint; None where it can, or has no identity."""
    flaw = find_damage(folder)
    if flaw is None and run is not None and read_run_of(folder) not in (None, run):
        flaw = "it belongs to another run"
    return flaw


def read_state(folder: str | Path) -> dict[str, Any]:
    """Return the state that ``complete_checkpoint`` was given."""
    return dict(_read_mark(Path(folder))["state"])


def write_tensors(folder: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write our tensors into a checkpoint."""
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, Path(folder, TENSORS_NAME))


def read_tensors(folder: str | Path) -> dict[str, Tensor]:
    """Return what ``write_tensors`` was given."""
    return load_file(Path(folder, TENSORS_NAME))


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """List the folders ``checkpoint-STEP`` of a run, complete or not, in ascending order of steps."""
    folders = Path(output_dir).iterdir() if Path(output_dir).is_dir() else ()
    return sorted((path for path in folders if path.is_dir() and _NAME.fullmatch(path.name)), key=_step)


def find_last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """Return the newest complete checkpoint of a run, if there is one, by the sizes of its files."""
    newest_first = reversed(list_checkpoints(output_dir))
    return next((path for path in newest_first if find_damage(path, hashes=False) is None), None)


def resolve_checkpoint(
    output_dir: str | Path, resume: str | Path | bool | None, *, tell: Callable[[str], object] = print
) -> Path | None:
    """Return the checkpoint to resume from, or None to start anew; refuse what would mix two runs in one folder.

    ``resume`` is a checkpoint's path, or True for the newest sound one of the run in ``output_dir``: others are passed over,
    each with a sentence. A run that ended before it finished a checkpoint starts anew.
    """
    existing = list_checkpoints(output_dir)
    if not resume:
        if existing:
            raise ValueError(
                f"`output_dir` (={output_dir}) holds {existing[-1].name} of an earlier run: go on with it by "
                "resume_from_checkpoint=True, or choose another output_dir."
            )
        return None
    run, last, flaws = read_run(output_dir), None, {}
    for path in reversed(existing):
        if not _is_own(path) and not (path / TRAINER_STATE_NAME).exists():
            raise ValueError(
                f"`output_dir` (={output_dir}) holds {path.name}, which no run wrote and which this one would come to: move "
                "it, or choose another output_dir."
            )
        if (flaw := find_flaw(path, run)) is None:
            last = path
            break
        flaws[path] = flaw
    if resume is not True:
        _check_named(Path(resume), output_dir, last, run)
        return Path(resume)
    for path, flaw in flaws.items():
        tell(f"{path.name} is passed over: {flaw}{_set_aside(path, flaw)}.")
    if last is None:
        if set(flaws.values()) - {UNFINISHED} or (run is None and not flaws):
            raise FileNotFoundError(
                f"`output_dir` (={output_dir}) holds no sound checkpoint to resume from: name the folder of one, begin anew "
                "in another output_dir, or replace this run (--overwrite_output_dir)."
            )
        tell(f"the run in {output_dir} ended before it finished a checkpoint: it starts anew.")
    return last


def rotate_checkpoints(newest: str | Path, limit: int | None, *, keep: str | None = None) -> None:
    """Delete our oldest checkpoints over a limit (None or 0: none), but never the ``newest``, nor the path ``keep``.

    Those of later steps were passed over when the run was resumed: they go first.
    """
    newest = Path(newest)
    own = [path for path in list_checkpoints(newest.parent) if _is_own(path)]
    if not limit:
        return
    kept = {newest.name} | ({Path(keep).name} if keep else set())
    spare = [path for path in own if path.name not in kept]
    spare.sort(key=lambda path: _step(path) < _step(newest))
    for path in spare[: max(0, len(own) - max(limit, len(kept)))]:
        _remove(path)


def remove_checkpoints(output_dir: str | Path) -> None:
    """Delete all checkpoints that were written here, complete or not, and nothing else."""
    for path in filter(_is_own, list_checkpoints(output_dir)):
        _remove(path)


@contextmanager
def room_for(folder: str | Path, *, output_dir: str | Path, count_bytes: Callable[[], int]) -> Iterator[None]:
    """Say in one line that the disk is full, by whatever error each library says it; remove what was begun in ``folder``."""
    try:
        yield
    except Exception as error:
        is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        # torch's own writer names no cause, only that a write failed or that a position is not the expected one.
        if not is_full and not (isinstance(error, RuntimeError) and re.search("write|unexpected pos", str(error))):
            raise
        if find_damage(folder) == UNFINISHED:
            shutil.rmtree(folder, ignore_errors=True)
        last, free = find_last_complete_checkpoint(output_dir), shutil.disk_usage(output_dir).free
        raise DiskFullError(
            f"{folder} cannot be written: it takes about {count_bytes():,} bytes; {free:,} are free (a quota may allow "
            f"fewer). {f'{last.name} is whole' if last else 'No checkpoint was finished'}: make room, then resume."
        ) from error


def _check_named(folder: Path, output_dir: str | Path, last: Path | None, run: str | None) -> None:
    """Refuse to resume from a named checkpoint that is not sound, or older than the run's newest."""
    is_inside = folder.resolve().parent == Path(output_dir).resolve()
    if flaw := find_flaw(folder, run if is_inside else None):
        remedy = f"the newest complete one is {last}." if last else "start the run anew."
        raise FileNotFoundError(f"`resume_from_checkpoint` (={folder}) is no complete checkpoint: {flaw}; {remedy}")
    if last is not None and _step(last) > _step(folder):
        raise ValueError(
            f"`output_dir` (={output_dir}) holds {last.name}, which is newer than {folder.name} and would be mixed with what "
            "follows it: resume from it, or choose another output_dir."
        )


def _set_aside(folder: Path, flaw: str) -> str:
    """Rename a checkpoint that the run will come to and must not overwrite: of another run, or without our mark."""
    if _is_own(folder) and "another run" not in flaw:
        return ""
    number = next(number for number in count(1) if not folder.with_name(f"aside-{number}-{folder.name}").exists())
    return f"; it is kept as {folder.rename(folder.with_name(f'aside-{number}-{folder.name}')).name}"


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
    """Return whether a folder bears our mark, or nothing else was written yet."""
    return (folder / STATE_NAME).exists() or all(path.name.startswith(f".{STATE_NAME}") for path in folder.iterdir())


def _hash(file: Path) -> str:
    with open(file, "rb") as stream:
        return sha_fileobj(stream).hex()


def _hash_of_mark(mark: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(mark, sort_keys=True).encode()).hexdigest()


def _step(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    return int(match.group(1)) if match else -1
