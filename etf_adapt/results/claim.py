"""Which run an output folder belongs to: one process writes to it at a time, and what it leaves bears the run's identity."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from etf_adapt.errors import OutputFolderError

CLAIM_FILE = ".etf_run.json"  # locked while a run writes to the folder; stays, and names the folder's run
_LENGTH = 160  # of its text, always: it is replaced by one write, so that no reader and no kill finds half of it

# The claims of this process: descriptors of the locked files, and what was written into them. The system drops a lock when
# its process ends, however it ends: a folder is never left locked by a run that was killed.
_held: dict[Path, tuple[int, bytes]] = {}


def claim(folder: str | os.PathLike[str], *, resume: bool = False, run: str | None = None) -> str:
    """Take a folder until ``release`` or the end of this process, refuse one that another process holds; return its run.

    With ``resume`` the folder keeps its run, or becomes that of ``run`` where it has none; without, it is a new one's.
    """
    path = Path(folder).resolve()
    path.mkdir(parents=True, exist_ok=True)
    descriptor = _held[path][0] if path in _held else _lock(path / CLAIM_FILE)
    identity = (resume and (read_run(path) or run)) or uuid4().hex
    mark = json.dumps({"run": identity, "claim": uuid4().hex, "process": os.getpid()}).ljust(_LENGTH).encode()
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, mark)
    _held[path] = descriptor, mark
    return identity


def release(folder: str | os.PathLike[str]) -> None:
    """Let other processes have a folder; its identity stays."""
    if (path := Path(folder).resolve()) in _held:
        os.close(_held.pop(path)[0])


@contextmanager
def released() -> Iterator[None]:
    """Release at the end of a block what it claimed."""
    before = {*_held}
    try:
        yield
    finally:
        for path in {*_held} - before:
            release(path)


def read_run(folder: str | os.PathLike[str]) -> str | None:
    """Return the identity of the run that a folder belongs to, None if there is none or it cannot be read."""
    run = read_object(Path(folder, CLAIM_FILE)).get("run")
    return run if isinstance(run, str) else None


def check_claim(folder: str | os.PathLike[str]) -> None:
    """Refuse to write on where another run has the claimed folder: it was removed and made anew, or has no locks."""
    path = Path(folder).resolve()
    if path not in _held:
        return
    file, mark = path / CLAIM_FILE, _held[path][1]
    if not file.exists():  # removed: what is left to write goes into a folder of the same name
        release(path)
        claim(path, resume=True, run=json.loads(mark)["run"])
    elif file.read_bytes() != mark:
        raise OutputFolderError(
            f"`output_dir` (={str(folder)!r}) was taken by another run since this one began: start it again in another folder."
        )


def _lock(file: Path) -> int:
    """Open and lock the file of a claim; make it if there is none."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise OutputFolderError(
            f"`output_dir` (={str(file.parent)!r}) is being written by another run (process "
            f"{read_object(file).get('process', 'unknown')}): wait for its end, or choose another folder (--output_dir)."
        ) from None
    except (ImportError, OSError):
        pass  # Windows, or a file system without locks: the last claim holds, and ends the run before it at its next save
    return descriptor


def read_object(file: Path) -> dict[str, Any]:
    """Return the object of a JSON file; an empty one where it cannot be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _forget() -> None:
    for descriptor, _ in _held.values():
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    # A lock is shared with forked children: a data loader's worker would hold it after its parent was killed.
    os.register_at_fork(after_in_child=_forget)
