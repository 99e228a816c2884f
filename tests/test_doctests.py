"""The examples of the docstrings run, and every public name has one."""

from __future__ import annotations

import doctest
from importlib import import_module
from pkgutil import iter_modules

import pytest

import etf_adapt

MODULES = [module.name for module in iter_modules(etf_adapt.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_show(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = import_module(f"etf_adapt.{name}")
    failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert failed == 0
    assert list(tmp_path.iterdir()) == [], "an example leaves files behind"


@pytest.mark.parametrize("name", etf_adapt.__all__)
def test_every_public_name_shows_an_example(name):
    assert ">>> " in getattr(etf_adapt, name).__doc__
