"""Errors for people: the nearest valid name for a wrong one, and one line in place of a traceback."""

from __future__ import annotations

import difflib
import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

TRACEBACK_VARIABLE = "ETF_ADAPT_TRACEBACK"
"""Environment variable that, set to anything, brings the tracebacks back."""


class DataError(ValueError):
    """Raised where a data set cannot be used as it is: says where, and the way on."""


class RowError(DataError):
    """Raised where a row cannot be read, in the one process that reads it."""


class OutputFolderError(ValueError):
    """Raised where results would mix with, or replace, what an output folder holds already."""


class DiskFullError(OSError):
    """Raised where a disk, or what a user may write to it, is full: says where, and how much is needed."""


def nearest_names(name: str, valid: Iterable[str], *, limit: int = 3) -> list[str]:
    """Return at most ``limit`` valid names that resemble a mistyped one, nearest first.

    Example:
        >>> nearest_names("vit_bse", ["vit_base", "bert_base"], limit=1)
        ['vit_base']
    """
    lower = {candidate.lower(): candidate for candidate in valid}
    near = difflib.get_close_matches(name.lower(), lower, n=limit, cutoff=0.5)
    near += [candidate for candidate in lower if name and name.lower() in candidate and candidate not in near]
    return [lower[match] for match in near[:limit]]


def quoted(names: Iterable[object]) -> str:
    """Return the first ten names for a message."""
    shown = [f"`{name}`" for name in names]
    return ", ".join(shown[:10]) + (", ..." if len(shown) > 10 else "")


def check_choice(argument: str, value: Any, valid: Iterable[str]) -> None:
    """Raise a ``ValueError`` that names the argument, its valid values and the nearest of them, unless ``value`` is valid.

    Example:
        >>> check_choice("head", "liner", ("etf", "linear"))
        Traceback (most recent call last):
        ValueError: `head` (='liner') must be one of 'etf', 'linear'; did you mean 'linear'?
    """
    choices = list(valid)
    if value not in choices:
        near = nearest_names(str(value), choices, limit=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"`{argument}` (={value!r}) must be one of {', '.join(map(repr, choices))}{hint}")


@contextmanager
def one_line_errors(
    stopped: str = "stopped; a run that left a checkpoint goes on by --resume_from_checkpoint last",
) -> Iterator[None]:
    """End the process with one line, without a traceback, for an error that the user can mend.

    Exit code 2 for a wrong value, a missing or unreadable file or a missing package, 1 for a loss that is not finite or memory
    or a disk that runs out, 130 for Ctrl-C, with the line ``stopped``; finetune adds 3 for a finished run that could not be
    published. Any other exception is a bug and keeps its traceback. Only process 0 prints what all of them meet.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(_print_error(stopped, 130)) from None
    except BrokenPipeError:  # whoever reads our output has left: no error of a file
        raise
    except (ValueError, KeyError, OSError, ImportError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        is_full = isinstance(error, DiskFullError) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        raise SystemExit(
            _print_error(message_of(error), 1 if is_full else 2, is_shared=not isinstance(error, RowError))
        ) from None
    except (ArithmeticError, MemoryError, RuntimeError) as error:
        # torch's errors of memory are RuntimeErrors, and so are its bugs.
        expected = isinstance(error, (ArithmeticError, MemoryError)) or "out of memory" in str(error).lower()
        if os.environ.get(TRACEBACK_VARIABLE) or not expected:
            raise
        raise SystemExit(_print_error(message_of(error), 1)) from None


def message_of(error: BaseException) -> str:
    """Return an error's message, without the traceback that a data loader's worker puts before it."""
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if "Original Traceback" in message:
        message = message.rstrip().splitlines()[-1].partition(": ")[2]
    return message.strip() or type(error).__name__


def _print_error(message: str, exit_code: int, *, is_shared: bool = True) -> int:
    if os.environ.get("RANK", "0") == "0" or not is_shared:
        print(f"error: {message}", file=sys.stderr, flush=True)
    return exit_code
