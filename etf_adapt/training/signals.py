"""Requests to stop: signals are noted until a step or a batch is finished, and agreed on by all processes."""

from __future__ import annotations

import mmap
import os
import random
import signal
import threading
import time
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather

from etf_adapt.data.batches import LeftTogether

NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")  # Ctrl-C; schedulers and launchers; Slurm's `--signal` before the time is over
_REPEATED = 1.0  # seconds in which a signal that came twice is one: launchers pass on what reached the whole group
_LEAVES = 1 << 16  # in place of a signal's number
_GRACE = 30  # seconds that workers of data loaders serve on after a signal; as long as launchers wait before they kill


class Stopped(SystemExit):
    """Raised where a signal ends a run after its state was saved; exit code 128 + the signal's number, no traceback."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal_name = signal.Signals(number).name


class StopSignals:
    """Context in which a signal to stop is noted, and a second one ends the process at once.

    Handlers are installed in the main thread only, where nobody else has: those of the caller stay.
    """

    def __init__(self) -> None:
        self.number = 0
        self._time = 0.0
        self._process = os.getpid()
        self._is_over = mmap.mmap(-1, 1)  # shared with forked workers
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over[0] = 1
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def poll(self, *, leaves: bool = False) -> None:
        """Raise ``Stopped`` if any process got a signal; all processes must call this equally often.

        A process that leaves a pass over data, as it cannot read its rows, says so instead: the others raise ``LeftTogether``.
        """
        number = _LEAVES if leaves else self.number
        if PartialState().num_processes > 1:
            number = int(gather(torch.tensor([number], device=PartialState().device)).max())
        if number == _LEAVES:
            if not leaves:
                raise LeftTogether("another process cannot read its rows")
        elif number:
            raise Stopped(number)

    def _note(self, number: int, _: Any) -> None:
        if os.getpid() != self._process:
            # A data loader's worker, forked under this handler. A signal to the whole group must not end it before the step
            # that it serves; its parent's `terminate()` after the run must.
            if self._is_over[0]:
                os._exit(128 + number)
            signal.alarm(_GRACE)
        elif not self.number:
            self.number, self._time = number, time.monotonic()
            name = signal.Signals(number).name
            with suppress(OSError):  # nobody may read it any more; and print is not safe here
                if os.environ.get("RANK", "0") == "0":
                    os.write(2, f"\n{name}: this step is finished and saved; a second signal leaves at once\n".encode())
        elif time.monotonic() - self._time > _REPEATED:
            os._exit(128 + number)


class RandomStates:
    """The states of all generators of random numbers of this process, to go back to."""

    def __init__(self) -> None:
        self._states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def restore(self) -> None:
        """Set the generators back."""
        python, numpy, cpu = self._states
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)
