"""Publishing a finished run on the Hub: its card under its name there, then the folder in one commit."""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from etf_adapt.hub.send import carry_on_command, check_name_and_token, explained_errors, fetch_card, send_folder
from etf_adapt.results.card import is_edited, is_edited_on_hub, note_published, note_statistics, read_facts, write_card
from etf_adapt.results.run_folder import CARD_FILE, STATISTICS_FILE

logger = logging.getLogger(__name__)


def publish(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    statistics: bool = False,
    token: str | None = None,
) -> str:
    """Publish the folder of a finished run, or of ``save_pretrained``, as one commit, and return the commit's address.

    The card of a run is first written anew under the model's name; one that was edited here is published as it is, one that
    was edited there stays.

    Args:
        folder: The finished folder.
        repo_id: Repository, ``user/name``; made where it does not exist.
        private: Whether a new repository is private; None: as the owner's settings say.
        revision: Branch, made where it does not exist; the main one where None.
        commit_message: Title of the commit.
        statistics: Whether to send the statistics of the head's rows too, for ``extend``; the card then says so.
        token: Token of the Hub; by default that of ``hf auth login`` or HF_TOKEN.

    Raises:
        HubError: The folder is not whole, the name or token is not valid, or the Hub refuses; it names the way on.

    Example:
        >>> publish("out/nothing", "me/digits")
        Traceback (most recent call last):
        etf_adapt.hub.send.HubError: `folder` (='out/nothing') is no folder: name the one that a finished run left.
        Then: etf-adapt publish out/nothing me/digits
    """
    options: dict[str, Any] = {"private": private, "revision": revision, "commit_message": commit_message}
    options["statistics"] = statistics
    command = carry_on_command(folder, repo_id, **options)
    facts, own, kept = read_facts(folder), Path(folder, CARD_FILE), []
    if facts is not None:
        with explained_errors(repo_id, command), tempfile.TemporaryDirectory() as place:
            check_name_and_token(repo_id, token)
            card = fetch_card(repo_id, place, revision=revision, token=token)
            if card is not None and is_edited_on_hub(folder, card):
                logger.warning("%s was edited in %s and stays there as it is.", CARD_FILE, repo_id)
                kept = [CARD_FILE]
            elif is_edited(own):
                logger.warning("%s was edited and is published as it is.", CARD_FILE)
            if not is_edited(own):
                write_card(folder, dataclasses.replace(facts, model_id=repo_id, on_hub=True))
    note_statistics(folder, are_published=statistics and Path(folder, STATISTICS_FILE).is_file())
    url = send_folder(folder, repo_id, **options, token=token, command=command, kept=kept)
    if not kept:
        note_published(folder)
    return url
