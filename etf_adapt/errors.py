"""Errors for people: the nearest valid name for a wrong one, and one line in place of a traceback."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

TRACEBACK_VARIABLE = "ETF_ADAPT_TRACEBACK"
"""Environment variable that, set to anything, brings the tracebacks back."""


class DataError(ValueError):
    """Raised where a data set cannot be used as it is: says where, and the way on."""


class OutputFolderError(ValueError):
    """Raised where results would mix with, or replace, what an output folder holds already."""


def nearest_names(name: str, valid: Iterable[str], *, limit: int = 3) -> list[str]:
    """Return at most ``limit`` valid names that resemble a mistyped one, nearest first.

    Example:
        >>> nearest_names("vit_bse", ["vit_base", "bert_base"], limit=1)
        ['vit_base']
    """
    lower = {candidate.lower(): candidate for candidate in valid}
    return [lower[match] for match in difflib.get_close_matches(name.lower(), lower, n=limit, cutoff=0.5)]


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
def one_line_errors() -> Iterator[None]:
    """End the process with one line, without a traceback, for an error that the user can mend.

    Exit code 2 for a wrong value, a missing or unreadable file or a missing package, 1 for a loss that is not finite or memory
    that runs out, 130 for Ctrl-C. (The recipe adds 3 for a finished run that could not be published.) Any other exception is a
    bug and keeps its traceback. Only process 0 prints.
    """
    try:
        yield
    except KeyboardInterrupt:
        message = "stopped; --resume_from_checkpoint last goes on from the newest checkpoint"
        raise SystemExit(_print_error(message, 130)) from None
    except (ValueError, KeyError, OSError, ImportError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        raise SystemExit(_print_error(_message_of(error), 2)) from None
    except (ArithmeticError, MemoryError, RuntimeError) as error:
        # torch's errors of memory are RuntimeErrors, and so are its bugs.
        expected = isinstance(error, (ArithmeticError, MemoryError)) or "out of memory" in str(error).lower()
        if os.environ.get(TRACEBACK_VARIABLE) or not expected:
            raise
        raise SystemExit(_print_error(_message_of(error), 1)) from None


def _message_of(error: BaseException) -> str:
    """Return an error's message, without the traceback that a data loader's worker puts before it."""
    message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if "Original Traceback" in message:
        message = message.rstrip().splitlines()[-1].partition(": ")[2]
    return message.strip() or type(error).__name__


def _print_error(message: str, exit_code: int) -> int:
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    return exit_code
