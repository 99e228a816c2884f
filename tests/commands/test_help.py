"""``--help``: every flag of ours once, in groups, with the defaults that a run has."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from etf_adapt.commands.help import GROUPS, OWNERS, STOCK_FLAGS, help_text
from etf_adapt.training.arguments import REFUSED, ETFTrainingArguments


def test_every_flag_of_ours_is_listed_once_and_no_refused_one():
    listed = " ".join(GROUPS.values()).split()
    own = (
        {entry.name for owner in OWNERS for entry in fields(owner) if entry.init}
        - {*REFUSED}
        - {"remove_unused_columns"}
    )
    assert len(listed) == len({*listed})
    assert {*listed} == own | {*STOCK_FLAGS}
    assert not {*listed} & {*REFUSED}


@pytest.mark.parametrize("name", [name for name in STOCK_FLAGS if name != "output_dir"])
def test_defaults_of_stock_flags_are_those_of_a_run(name, tmp_path):
    assert getattr(ETFTrainingArguments(str(tmp_path)), name) == STOCK_FLAGS[name][0]


def test_lines_fit_a_terminal_and_name_defaults_and_choices():
    text = help_text()
    assert max(map(len, text[text.index("data:") :].splitlines())) <= 100
    assert re.search(r"--head \[etf\]\n +Classifier.*One of etf, linear", text)
    assert "--shot_bounds [20 100]" in text and "--augment [true]" in text and "--mixup [0.0]" in text
