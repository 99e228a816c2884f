"""The examples of the docstrings run, and every public name has one."""

from __future__ import annotations

import doctest
from importlib import import_module
from pkgutil import walk_packages

import pytest

import etf_adapt

MODULES = [
    module.name for module in walk_packages(etf_adapt.__path__, "etf_adapt.") if not module.name.endswith("__main__")
]


@pytest.mark.parametrize("name", [*MODULES, "export_onnx", "comparison"])
def test_examples_give_what_they_show(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert failed == 0
    assert list(tmp_path.iterdir()) == [], "an example leaves files behind"


def test_modules_of_every_folder_are_among_them():
    folders = {name.split(".")[1] for name in MODULES if name.count(".") == 2}
    assert folders == {
        "commands",
        "data",
        "geometry",
        "heads",
        "hub",
        "losses",
        "metrics",
        "models",
        "results",
        "training",
        "sources",
        "inference",
    }


@pytest.mark.parametrize("name", etf_adapt.__all__)
def test_every_public_name_shows_an_example(name):
    assert ">>> " in getattr(etf_adapt, name).__doc__
