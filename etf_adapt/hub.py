"""Publishing a finished run on the Hub: its card under the name that it has there, then the folder in one commit.

As a program: ``python -m etf_adapt.hub FOLDER user/name``. The token is that of ``hf auth login`` or HF_TOKEN, not an argument.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys

from etf_adapt.card import note_published, read_facts, write_card
from etf_adapt.report import one_line_errors
from etf_adapt.upload import carry_on_command, check_name_and_token, read_repository, send_folder, telling


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
    in the repository where the card here is as the run left it. All else is that of ``etf_adapt.upload.send_folder``.

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


def main(argv: list[str] | None = None) -> None:
    """Publish a folder as the command line says, and print the address of the commit.

    Args:
        argv: The arguments; None takes those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m etf_adapt.hub",
        description="Publish a finished folder on the Hub, in one commit. The token is that of `hf auth login` or HF_TOKEN.",
    )
    parser.add_argument("folder", help="what a finished run left")
    parser.add_argument("repo_id", help="user/name or organization/name; made where it does not exist")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--private", action="store_true", default=None, help="for you alone")
    shown.add_argument("--public", action="store_false", dest="private", default=None, help="for everyone")
    parser.add_argument("--revision", help="branch, made where it does not exist; the main one by default")
    parser.add_argument("--commit_message", help="title of the commit")
    wish = vars(parser.parse_args(argv))
    with one_line_errors():
        try:
            print(publish(wish.pop("folder"), wish.pop("repo_id"), **wish))
        except KeyboardInterrupt:
            print("stopped: the same command carries on", file=sys.stderr)
            raise SystemExit(130) from None


if __name__ == "__main__":
    main()
