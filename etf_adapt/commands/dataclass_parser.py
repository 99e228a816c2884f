"""Parser of flags from dataclasses, by transformers."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from transformers import HfArgumentParser

from etf_adapt.errors import check_choice


class Parser(HfArgumentParser):
    """Parser that raises its errors, so that they look like all others."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print under its usage."""
        raise ValueError(message)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Check a choice; argparse's own check names no nearest one."""
        if action.choices is not None:
            check_choice(action.dest, value, action.choices)
