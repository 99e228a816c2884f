"""One line for an error, and the nearest valid name for a wrong one."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


def nearest_names(name: str, valid: Iterable[str], *, limit: int = 3) -> list[str]:
    """Return the valid names most like a mistyped one, nearest first.

    Args:
        name: What was typed.
        valid: The names that would do.
        limit: Most names to return, at least 1.

    Returns:
        At most ``limit`` names; none where nothing is alike.

    Example:
        >>> nearest_names("vit_bse", ["vit_base", "bert_base"], limit=1)
        ['vit_base']
    """
    lower = {candidate.lower(): candidate for candidate in valid}
    return [lower[match] for match in difflib.get_close_matches(name.lower(), lower, n=limit, cutoff=0.5)]


def check_choice(argument: str, value: Any, valid: Iterable[str]) -> None:
    """Refuse a value that is none of the valid ones, naming the nearest.

    Args:
        argument: Name of the argument, for the message.
        value: What was given.
        valid: The values that would do.

    Raises:
        ValueError: ``value`` is not among them.

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


TRACEBACK_VARIABLE = "ETF_ADAPT_TRACEBACK"
"""Environment variable that, set to anything, shows where an error came from."""


class OutputFolderError(ValueError):
    """Raised where results would mix with, or replace, what an output folder holds already."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with one message, without a traceback, for what its user can mend.

    A wrong value, a missing or unreadable file and a missing package end it with exit code 2; a loss that is not finite and
    memory that runs out with 1; Ctrl-C with 130. Any other exception is a bug and keeps its traceback. Of several
    processes that find the same mistake, the first alone speaks.

    Example:
        >>> with one_line_errors():
        ...     raise SystemExit(0)
        Traceback (most recent call last):
        SystemExit: 0
    """
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(
            _say("stopped; --resume_from_checkpoint last goes on from the newest checkpoint", 130)
        ) from None
    except (ValueError, KeyError, OSError, ImportError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        raise SystemExit(_say(_message(error), 2)) from None
    except (ArithmeticError, MemoryError, RuntimeError) as error:
        # torch's errors of memory are RuntimeErrors, and so are its bugs.
        expected = isinstance(error, (ArithmeticError, MemoryError)) or "out of memory" in str(error).lower()
        if os.environ.get(TRACEBACK_VARIABLE) or not expected:
            raise
        raise SystemExit(_say(_message(error), 1)) from None


def _message(error: BaseException) -> str:
    """Return what an error says, without the traceback that a data loader's worker puts before it."""
    said = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if "Original Traceback" in said:
        said = said.rstrip().splitlines()[-1].partition(": ")[2]
    return said.strip() or type(error).__name__


def _say(message: str, code: int) -> int:
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    return code
