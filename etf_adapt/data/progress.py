"""Steps that take long say what they do and how far they are: a bar in a terminal, elsewhere a line now and then."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import length_hint
from typing import TypeVar

from tqdm.auto import tqdm

FIRST_SECONDS = 10.0  # before which nothing is said
POLL_SECONDS = 1.0
LEAST_SECONDS, MOST_SECONDS = 30.0, 600.0  # between two lines; in between they come as late again as the step is old

T = TypeVar("T")

_bars: bool | None = None


def use_bars(enabled: bool | None) -> None:
    """Choose between bars and lines in this process; None is the default, bars in terminals."""
    global _bars
    _bars = enabled


class ProgressLines:
    """Print how far a step is, on the first process: after ten seconds, then less and less often."""

    def __init__(self, what: str, total: int | None = None) -> None:
        self.what, self.total = what, total
        self._start, self._due = time.monotonic(), FIRST_SECONDS

    def update(self, done: int | None = None) -> None:
        """Print a line if one is due; ``done`` of ``total`` is behind, where it is known."""
        seconds = time.monotonic() - self._start
        if seconds < self._due or os.environ.get("RANK", "0") != "0":
            return
        self._due = seconds + min(max(seconds, LEAST_SECONDS), MOST_SECONDS)
        known = "" if done is None else f"{done:,}{'' if self.total is None else f' of {self.total:,}'}, "
        tqdm.write(f"{self.what}: {known}{seconds:.0f} s", file=sys.stderr)


def progress(steps: Iterable[T], what: str, *, total: int | None = None) -> Iterator[T]:
    """Yield the steps, and show how many are done of ``total`` (by default their number, where they have one)."""
    total = total or length_hint(steps) or None
    if (sys.stderr.isatty() if _bars is None else _bars) and os.environ.get("RANK", "0") == "0":
        yield from tqdm(steps, desc=what, total=total, delay=FIRST_SECONDS, leave=False)
        return
    lines = ProgressLines(what, total)
    for done, step in enumerate(steps, start=1):
        yield step
        lines.update(done)


@contextmanager
def announced(what: str) -> Iterator[None]:
    """Say now and then that the block, one long call, still runs."""
    lines, ended = ProgressLines(what), threading.Event()

    def watch() -> None:
        while not ended.wait(POLL_SECONDS):
            lines.update()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
