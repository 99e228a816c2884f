"""Whether a model's files can be had from the Hub, or lie in its cache."""

from __future__ import annotations

from pathlib import Path


class UnavailableError(OSError):
    """The files of a model cannot be fetched and are not cached."""


def ask_hub(location: str, revision: str | None = None) -> Exception | None:
    """Ask the Hub for a model's config.json by one HEAD request; return the error, None where it is found."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(location, "config.json", revision=revision), timeout=5.0)
    except Exception as error:  # the transport's errors have another base class in each major version of the client
        return error
    return None


def cached_folder(location: str, revision: str | None = None) -> str | None:
    """Return the newest cached snapshot that holds configuration and weights."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(location, revision=revision, local_files_only=True))
    except OSError:
        return None
    weights = [path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern)]
    return str(folder) if weights and (folder / "config.json").is_file() else None
