"""Parser of flags from dataclasses, by transformers."""

from __future__ import annotations

from transformers import HfArgumentParser

from etf_adapt.commands.parser import RaisingParser


class Parser(RaisingParser, HfArgumentParser):
    """Parser of dataclasses that raises its errors, so that they look like all others."""
