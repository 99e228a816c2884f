"""Laws of long steps: nothing for ten seconds, then lines that grow rarer, from one process, and a bar only where asked for."""

from __future__ import annotations

import itertools
import sys
import time

import pytest

from etf_adapt.data import progress as module
from etf_adapt.data.progress import announced, progress, use_bars


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless a test moves it on."""
    now = [0.0]
    monkeypatch.setattr(module, "time", type("Clock", (), {"monotonic": staticmethod(lambda: now[0])}))
    return now


def lines_after(clock, steps, seconds, capsys, **options):
    for _ in progress(steps, "reading rows", **options):
        clock[0] += seconds
    return capsys.readouterr().err.splitlines()


def test_a_short_step_says_nothing(clock, capsys):
    assert lines_after(clock, range(9), 1.0, capsys) == []


def test_a_long_one_says_what_it_does_and_how_far_it_is_less_and_less_often(clock, capsys):
    said = lines_after(clock, range(4_000), 1.0, capsys)
    assert said[:3] == [f"reading rows: {n} of 4,000, {n} s" for n in (10, 40, 80)]
    times = [int(line.split()[-2]) for line in said]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert gaps == sorted(gaps) and max(gaps) == 600 and len(said) < 15


def test_steps_of_unknown_number_are_counted(clock, capsys):
    assert lines_after(clock, (n for n in range(3)), 6.0, capsys) == ["reading rows: 2, 12 s"]
    assert lines_after(clock, (n for n in range(3)), 6.0, capsys, total=3) == ["reading rows: 2 of 3, 12 s"]


def test_one_process_speaks_for_all(clock, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert lines_after(clock, range(3), 60.0, capsys) == []


@pytest.mark.parametrize(
    ("in_terminal", "asked", "has_bar"), [(True, None, True), (True, False, False), (False, None, False)]
)
def test_a_bar_is_for_terminals_that_want_one(clock, capsys, monkeypatch, in_terminal, asked, has_bar):
    bars = []
    monkeypatch.setattr(sys.stderr, "isatty", lambda: in_terminal)
    monkeypatch.setattr(module, "tqdm", type("Bar", (), {"__new__": lambda _, steps, **__: bars.append(1) or steps,
                                                         "write": staticmethod(print)}))  # fmt: skip
    use_bars(asked)
    assert list(progress([5, 6], "reading rows")) == [5, 6] and len(bars) == has_bar
    use_bars(None)


def test_what_is_read_is_passed_on_and_closed(clock):
    assert list(progress((n for n in (3, 1, 2)), "reading rows")) == [3, 1, 2]
    with pytest.raises(ZeroDivisionError):
        list(progress((1 // n for n in (1, 0)), "reading rows"))


def test_one_long_call_is_announced_while_it_runs_and_not_after(monkeypatch, capsys):
    monkeypatch.setattr(module, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    with announced("loading the model"):
        time.sleep(0.2)
    assert capsys.readouterr().err == "loading the model: 0 s\n"
    with pytest.raises(KeyError), announced("loading the model"):
        raise KeyError
