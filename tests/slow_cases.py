"""Cases of a test of which the first are run by default, and all with `-m slow` too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def rest_slow(cases: Iterable[Any], *, fast: int) -> list[Any]:
    """Return the cases of `pytest.mark.parametrize`, all but the first `fast` marked slow."""
    return [case if index < fast else _slow(case) for index, case in enumerate(cases)]


def _slow(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
