"""Sending a finished folder to the Hub: checked on disk first, then in one commit, or not at all."""

from __future__ import annotations

import logging
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from etf_adapt.hub.check import UnfinishedFolderError, check_folder, file_state, is_weights

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

SECONDS = 120.0
"""How long the Hub may be silent; its client alone (2.4) would wait for an upload for ever."""

WAITS = (2.0, 8.0, 30.0)
"""Seconds before each further try; the Hub's own word (Retry-After) goes first, up to ``LONGEST_WAIT``."""

LONGEST_WAIT = 300.0

_XET_LIMITS = {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2", "HF_XET_CLIENT_READ_TIMEOUT": "60s"}
"""Without them `hf_xet` (1.8) gives up a storage that is away after seven minutes, and one that is silent not at all."""

_PASSING = (408, 429, 500, 502, 503, 504)


class HubError(OSError):
    """Raised where a folder cannot be published: names the value, the rule, and the command that carries on."""


def send_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    command: str | None = None,
    kept: Collection[str] = (),
    there: Collection[str] = (),
) -> str:
    """Send a finished folder as one commit of a repository on the Hub, which is made where it does not exist.

    The folder is checked first, and nothing in it is changed. Weights that an earlier publication left in the repository,
    and that the folder does not hold, are removed by the same commit: readers would find two models.

    What passes (no connection, a time-out, 429 and 5xx) is tried again a few times, what does not (401, 403, 409) is not.
    A commit whose answer was lost is not made twice. Called again after any failure it sends what is missing.

    Args:
        folder: A folder that ``save_pretrained`` or a finished run left.
        repo_id: ``user/name`` or ``organization/name``.
        private: Whether the repository is to be private; None leaves that to its owner's settings, or as it is.
        revision: Branch, made where it does not exist; None is the main one.
        commit_message: Title of the commit.
        token: None takes the one of the environment (HF_TOKEN) or of the login.
        command: What carries on after a failure; the one of ``carry_on_command`` where None.
        kept: Files that are not sent where the repository has some of that name.
        there: Names of files that the repository is known to have, which the card may show.

    Returns:
        Address of the commit. Where the repository held exactly these files already, that of its last commit.

    Raises:
        HubError: The folder is not complete, or the Hub has not taken it. The folder is as it was.
    """
    if command is None:
        command = carry_on_command(folder, repo_id, private=private, revision=revision, commit_message=commit_message)
    with telling(repo_id, command):
        sent = check_folder(folder, there=there)
        with _limited():
            return _send(Path(folder), repo_id, sent, kept, private, revision, commit_message, token)


@contextmanager
def telling(repo_id: str, command: str) -> Iterator[None]:
    """Say of what goes wrong the value, the rule and the command that carries on.

    Args:
        repo_id: The repository.
        command: The command.

    Raises:
        HubError: Whatever the user or time can mend; a bug stays what it is.
    """
    try:
        yield
    except Exception as error:
        if not (isinstance(error, (OSError, ValueError, RuntimeError)) or _is_transport(error)):
            raise
        if isinstance(error, UnfinishedFolderError):
            raise HubError(f"{error}\nThen: {command}") from error
        reason = str(error) if isinstance(error, HubError) else f"`repo_id` (={repo_id!r}): {_explain(error, repo_id)}"
        raise HubError(f"{reason}\nThe folder is whole. To carry on: {command}") from error


def read_repository(repo_id: str, *, revision: str | None, token: str | None) -> tuple[str | None, list[str]]:
    """Return the card of a repository, which a person may have edited there, and the names of its files.

    Args:
        repo_id: The repository.
        revision: Branch; the main one where None.
        token: None takes the one of the environment or of the login.

    Returns:
        The card, None where it has none, and the names; none where there is no such repository or branch yet.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    with _limited(), tempfile.TemporaryDirectory() as place:
        try:
            siblings = _try(lambda: HfApi(token=token).model_info(repo_id, revision=revision)).siblings or ()
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return None, []
        names = [file.rfilename for file in siblings]
        if "README.md" not in names:
            return None, names
        options: dict[str, Any] = {"revision": revision, "token": token, "local_dir": place}
        card = Path(_try(lambda: hf_hub_download(repo_id, "README.md", **options)))
        return card.read_text(encoding="utf-8"), names


def carry_on_command(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Return the command that publishes a folder, from the start or after a failure.

    Args:
        folder: As in ``send_folder``, and so are the others.
        repo_id: The same.
        private: The same.
        revision: The same.
        commit_message: The same.

    Example:
        >>> carry_on_command("out/my run", "me/net", private=True)
        "python -m etf_adapt.hub 'out/my run' me/net --private"
    """
    words = ["python", "-m", "etf_adapt.hub", str(folder), repo_id]
    words += [] if private is None else ["--private" if private else "--public"]
    words += [] if revision is None else ["--revision", revision]
    words += [] if commit_message is None else ["--commit_message", commit_message]
    return shlex.join(words)


def check_name_and_token(repo_id: str, token: str | None = None) -> str:
    """Refuse what no attempt at publishing can succeed with, as before a training that ends in one. The Hub is not asked.

    Args:
        repo_id: ``user/name`` or ``organization/name``.
        token: None takes the one of the environment (HF_TOKEN) or of the login.

    Returns:
        The token.

    Raises:
        HubError: No repository can have this name, or there is no token.
    """
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


def write_short_card(folder: str | os.PathLike[str], repo_id: str, *, library: str, task: str) -> None:
    """Write a card that says no more than what reads the model; a run's own is ``etf_adapt.card``'s.

    Args:
        folder: The model's folder.
        repo_id: Its name on the Hub.
        library: ``"transformers"``, ``"timm"`` or ``"sentence_transformers"``.
        task: ``"image"`` or ``"text"``.
    """
    from huggingface_hub import ModelCard, ModelCardData

    tag = (
        None
        if library == "sentence_transformers"
        else {"image": "image-classification", "text": "text-classification"}[task]
    )
    data = ModelCardData(library_name=library.replace("_", "-"), pipeline_tag=tag, tags=["etf_adapt"])
    reader = {"sentence_transformers": "sentence-transformers", "timm": "transformers and timm"}.get(library, library)
    factory = "ETFForImageClassification" if task == "image" else "ETFForSequenceClassification"
    text = (
        f"<!-- etf_adapt: short (renewed by etf_adapt) -->\n\n# {repo_id.split('/')[-1]}\n\nRead by {reader}; with its head "
        f"and loss by `etf_adapt.{factory}.from_pretrained`.\n\n<!-- /etf_adapt: short -->\n"
    )
    ModelCard(f"---\n{data}\n---\n{text}").save(Path(folder, "README.md"))


def _send(
    folder: Path,
    repo_id: str,
    sent: dict[str, tuple[int, int]],
    kept: Collection[str],
    private: bool | None,
    revision: str | None,
    commit_message: str | None,
    token: str | None,
) -> str:
    """Make the repository and the branch where they are missing, and the one commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    import etf_adapt

    token = check_name_and_token(repo_id, token)
    api = HfApi(token=token, library_name="etf_adapt", library_version=etf_adapt.__version__)

    _try(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    if private is not None and _try(lambda: api.model_info(repo_id)).private is not private:
        state = "public" if private else "private"
        raise HubError(
            f"`private` (={private}): {repo_id} exists and is {state}: change that on its page, or take another name."
        )
    if revision is not None:
        _try(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))

    def commit() -> str:
        # Not `upload_folder`: where Xet is installed it makes several commits. Made anew for each try, operations ask
        # what is there already: a commit whose answer was lost is found and not made again.
        there = [file.rfilename for file in api.model_info(repo_id, revision=revision).siblings or ()]
        stale = [name for name in there if name not in sent and is_weights(name)]
        new = [name for name in sent if name not in kept or name not in there]
        adds = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in new]
        done = api.create_commit(
            repo_id,
            [*adds, *(CommitOperationDelete(path_in_repo=name) for name in stale)],
            commit_message=commit_message or "Upload a fine-tuned classifier",
            revision=revision,
        )
        return done.commit_url

    url = _try(commit)
    changed = [
        name for name, state in sent.items() if not (folder / name).is_file() or file_state(folder / name) != state
    ]
    if changed:
        raise HubError(
            f"`folder` (={str(folder)!r}): {changed[0]} was changed while the folder went up: publish it again."
        )
    return url


@contextmanager
def _limited() -> Iterator[None]:
    """Let neither the client nor Xet wait for ever; what the user has set for Xet goes first."""
    from huggingface_hub import get_session

    set_here = {name: value for name, value in _XET_LIMITS.items() if name not in os.environ}
    before = get_session().timeout
    os.environ |= set_here
    try:
        yield
    finally:
        get_session().timeout = before
        for name in set_here:
            del os.environ[name]


def _try(step: Callable[[], _T]) -> _T:
    """Take a step, again after what passes."""
    from huggingface_hub import get_session

    for wait in (*WAITS, None):
        get_session().timeout = SECONDS  # each time: the client makes itself a new session where it could not connect
        try:
            return step()
        except Exception as error:
            status, asked = _status(error)
            passes = status in _PASSING or (status is None and _is_transport(_cause(error)))
            passes = passes and not _was_tried_again(error)
            seconds = wait if asked is None else asked
            if wait is None or seconds is None or not passes or seconds > LONGEST_WAIT:
                raise
            logger.warning("%s: trying again in %.0f s", _short(error), seconds)
            time.sleep(seconds)
    raise AssertionError("the last try returns or raises")


def _cause(error: BaseException) -> BaseException:
    """Return the error of the connection behind one of the client, which wraps those of uploads."""
    from huggingface_hub.errors import HfHubHTTPError

    while not isinstance(error, HfHubHTTPError) and error.__cause__ is not None and not _is_transport(error):
        error = error.__cause__
    return error


def _is_transport(error: BaseException) -> bool:
    """Say whether an error is of the connection; its library has another name in each major version of the client."""
    from huggingface_hub.errors import HfHubHTTPError

    return isinstance(error, HfHubHTTPError.__bases__[0]) and not isinstance(error, HfHubHTTPError)


def _was_tried_again(error: BaseException) -> bool:
    """Say whether the client itself has tried six times already, as it does with uploads."""
    cause: Any = _cause(error)
    try:
        url = str(getattr(cause, "response", cause).request.url)
    except (AttributeError, RuntimeError):  # not of a request
        url = ""
    return isinstance(error, RuntimeError) or re.search("/preupload/|/info/lfs/", url) is not None


def _status(error: BaseException) -> tuple[int | None, float | None]:
    """Return the status that the Hub answered, and for how long it asks to wait."""
    response = getattr(_cause(error), "response", None)
    if response is None:
        return None, None
    told = response.headers.get("Retry-After", "")
    return response.status_code, float(told) if told.isdigit() else None


def _explain(error: BaseException, repo_id: str) -> str:
    status, asked = _status(error)
    cause = _cause(error)
    if type(cause).__name__ == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set: publishing needs the Hub; unset it."
    if type(error) is ValueError:  # the client's own words, of a card or a file
        return " ".join(str(error).split())
    if status == 401:
        return "the Hub does not know this token (401): log in anew (`hf auth login`), or set a valid HF_TOKEN."
    if status == 403:
        return f"this token may not write to {repo_id} (403): take one with write access, or a name of your own."
    if status == 429:
        wait = "" if asked is None else f" for {asked:.0f} s"
        return f"the Hub asks for patience{wait} (429): too many requests; carry on later."
    if status is not None:
        return f"the Hub answered {status} ({_short(cause)})" + (": carry on later." if status >= 500 else ".")
    if "Timeout" in type(cause).__name__:
        return f"the Hub was silent for {SECONDS:.0f} s ({type(cause).__name__}): carry on later."
    if _is_transport(cause):
        return f"the connection to the Hub broke ({_short(cause)}): carry on when it is back."
    return f"the upload failed ({_short(cause)})."


def _short(error: BaseException) -> str:
    """Return what an error says, in one line and without addresses."""
    line = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {re.sub(r'https?://[^ )]+', '...', line)}"[:200].rstrip(".")
