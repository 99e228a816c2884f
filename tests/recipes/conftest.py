"""A comparison whose runs train nothing."""

from __future__ import annotations

import compare
import pytest
from fake_runs import FakeRuns


@pytest.fixture
def runs(tmp_path, monkeypatch) -> FakeRuns:
    fake = FakeRuns()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare.Children, "launch", lambda children, command: fake(command))
    monkeypatch.setattr(compare, "environment", lambda: {"torch": "1.2.3"})
    return fake
