"""Publishing a finished run on the Hub: its card under the name that it has there, then the folder in one commit."""

from __future__ import annotations

import dataclasses
import os

from etf_adapt.hub.send import carry_on_command, check_name_and_token, read_repository, send_folder, telling
from etf_adapt.results.card import note_published, read_facts, write_card


def publish(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Publish a finished run's folder, or any that ``save_pretrained`` left, as one commit of a repository on the Hub.

    The card of a run is first renewed under the name that the model has there. What a person wrote into it stays: here, or
    in the repository where the card here is as the run left it. All else is that of ``etf_adapt.hub.send.send_folder``.

    Args:
        folder: The folder.
        repo_id: ``user/name`` or ``organization/name``; made where it does not exist.
        private: Whether the repository is to be private; None leaves that to its owner's settings, or as it is.
        revision: Branch, made where it does not exist; None is the main one.
        commit_message: Title of the commit.
        token: None takes the one of the environment (HF_TOKEN) or of the login.

    Returns:
        Address of the commit.

    Raises:
        HubError: The folder is not complete, or the Hub has not taken it; names the command that carries on.
    """
    command = carry_on_command(folder, repo_id, private=private, revision=revision, commit_message=commit_message)
    found = read_facts(folder)
    names: list[str] = []
    if found is not None:
        facts, is_edited = found
        with telling(repo_id, command):
            check_name_and_token(repo_id, token)
            card, names = read_repository(repo_id, revision=revision, token=token)
            write_card(
                folder,
                dataclasses.replace(facts, model_id=repo_id, on_hub=True),
                there=None if is_edited else card,
            )
    url = send_folder(
        folder,
        repo_id,
        private=private,
        revision=revision,
        commit_message=commit_message,
        token=token,
        there=names,
    )
    note_published(folder)
    return url
