"""Sending a finished folder to the Hub: checked on disk first, then in one commit, by huggingface_hub's own client."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from etf_adapt.data.progress import announced
from etf_adapt.hub.check import UnfinishedFolderError, check_folder
from etf_adapt.results.run_folder import CARD_FILE, STATISTICS_FILE

SECONDS = 120.0  # for which the Hub may be silent; its client alone (2.4) waits for an upload for ever

# Without them `hf_xet` (1.8) gives up a storage that is away after seven minutes, and one that is silent not at all.
_XET_LIMITS = {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2", "HF_XET_CLIENT_READ_TIMEOUT": "60s"}

# What no repetition mends, by the status of the Hub's answer or by the class of the client's error.
_REMEDIES = {
    "401": " Log in anew (`hf auth login`), or set a valid HF_TOKEN.",
    "403": " Take a token with write access, or a name of your own.",
    "OfflineModeIsEnabled": " Publishing needs the Hub: unset HF_HUB_OFFLINE.",
}

# Readers would find two models where weights of an earlier commit stayed beside the new ones.
_WEIGHTS = ["model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json", STATISTICS_FILE]


class HubError(OSError):
    """Raised where a folder cannot be published: names the value, the rule, and the command that carries on."""


def send_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    statistics: bool = False,
    token: str | None = None,
    command: str,
    kept: Collection[str] = (),
) -> str:
    """Send a finished folder as one commit, which also removes stale weights, and return the commit's address.

    ``command`` carries on after a failure, with what is missing; ``kept`` files are not sent where the repository has them.
    """
    from huggingface_hub import HfApi

    with explained_errors(repo_id, command):
        names = check_folder(folder, statistics=statistics)
        api = HfApi(token=check_name_and_token(repo_id, token), library_name="etf_adapt")
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private is not None and api.model_info(repo_id).private is not private:
            state = f"{repo_id} exists and is {'public' if private else 'private'}"
            raise HubError(f"`private` (={private}): {state}: change that on its page, or take another name.")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        names = [name for name in names if name not in kept or not api.file_exists(repo_id, name, revision=revision)]
        # One commit, with Xet too: its pipeline commits again only past 256 files or 100 MB that are no large files (2.4).
        with announced(f"publishing {len(names)} files"):
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=Path(folder),
                revision=revision,
                commit_message=commit_message or "Upload a fine-tuned classifier",
                allow_patterns=[escape(name) for name in names],
                delete_patterns=_WEIGHTS,
            )
    return commit.commit_url


@contextmanager
def explained_errors(repo_id: str, command: str) -> Iterator[None]:
    """Limit the client's waiting, and raise what the user or time can mend as ``HubError``; a bug stays what it is."""
    from huggingface_hub.errors import HfHubHTTPError

    transport_error: type[Exception] = HfHubHTTPError.__bases__[0]  # of httpx, or of httpx2 from version 2 on
    try:
        with _time_limits():
            yield
    except UnfinishedFolderError as error:
        raise HubError(f"{error}\nThen: {command}") from error
    except (OSError, ValueError, RuntimeError, transport_error) as error:
        reason = str(error) if isinstance(error, HubError) else f"`repo_id` (={repo_id!r}): {_reason(error)}"
        raise HubError(f"{reason}\nThe folder is whole. To carry on: {command}") from error


@contextmanager
def _time_limits() -> Iterator[None]:
    """Let neither the client nor Xet wait for ever; what the user has set for Xet stays."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    # Of the factory, not of one client: where a connection broke, the library makes itself another client.
    factory = _http._GLOBAL_CLIENT_FACTORY
    added = {name: _XET_LIMITS[name] for name in _XET_LIMITS.keys() - os.environ.keys()}

    def patient_client() -> Any:
        client = factory()
        client.timeout = SECONDS
        return client

    set_client_factory(patient_client)
    os.environ |= added
    try:
        yield
    finally:
        set_client_factory(factory)
        for name in added:
            del os.environ[name]


def fetch_card(repo_id: str, folder: str, *, revision: str | None, token: str | None) -> Path | None:
    """Fetch the card of a repository into a folder and return its file; None where there is none yet."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return Path(hf_hub_download(repo_id, CARD_FILE, revision=revision, token=token, local_dir=folder))
    except (RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return None


def carry_on_command(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    statistics: bool = False,
) -> str:
    """Return the command that publishes a folder, from the start or after a failure; arguments as in ``send_folder``."""
    words = ["etf-adapt", "publish", str(folder), repo_id]
    words += [] if private is None else ["--private" if private else "--public"]
    words += [] if revision is None else ["--revision", revision]
    words += [] if commit_message is None else ["--commit_message", commit_message]
    words += ["--statistics"] if statistics else []
    return shlex.join(words)


def check_name_and_token(repo_id: str, token: str | None = None) -> str:
    """Return the token; raise ``HubError`` where there is none or the name is invalid. The Hub is not asked."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
        if "/" not in repo_id:
            raise HFValidationError("it lacks the owner")
    except HFValidationError as error:
        raise HubError(f"`repo_id` (={repo_id!r}) must be user/name: {error}.") from error
    token = token or get_token()
    if token is None:
        raise HubError(f"`repo_id` (={repo_id!r}): no token was found: log in (`hf auth login`) or set HF_TOKEN.")
    return token


def _reason(error: BaseException) -> str:
    """Return the words of the Hub or of its client in one line, without addresses and tokens."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # "Error while uploading ..."
        error = error.__cause__
    kind, text, response = type(error).__name__, str(error), getattr(error, "response", None)
    remedy = _REMEDIES.get(kind if response is None else str(response.status_code), "")
    if response is not None:
        kind = f"{response.status_code} {response.reason_phrase}"
        text = str(getattr(error, "server_message", None) or "no message")
    return f"{kind}: " + re.sub(r"https?://\S+|\bhf_\w+", "...", " ".join(text.split()))[:300] + remedy
