"""``etf-adapt publish FOLDER user/name``: a finished folder to the Hub."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from etf_adapt.commands.parser import Parser
from etf_adapt.errors import one_line_errors

if TYPE_CHECKING:
    from etf_adapt.training.arguments import ETFTrainingArguments


def main(argv: Sequence[str]) -> None:
    """Publish the folder of the command line and print the address of the commit."""
    with one_line_errors(stopped="stopped: the same command carries on"):
        parser = Parser(
            "publish",
            description="Publish a finished folder on the Hub in one commit. The token is HF_TOKEN or that of `hf auth login`.",
        )
        parser.add_argument("folder", metavar="FOLDER", help="what a finished run left")
        parser.add_argument(
            "repo_id", metavar="NAME", help="user/name or organization/name; made where it does not exist"
        )
        shown = parser.add_mutually_exclusive_group()
        shown.add_argument("--private", action="store_true", default=None, help="for you alone")
        shown.add_argument("--public", action="store_false", dest="private", default=None, help="for everyone")
        parser.add_argument("--revision", help="branch, made where it does not exist; the main one by default")
        parser.add_argument("--commit_message", help="title of the commit")
        parser.add_argument(
            "--statistics",
            action="store_true",
            help="send the sums of each class's features too, by which others can extend the model; of a class of few rows "
            "they are nearly the rows, and the card says so",
        )
        options = vars(parser.parse(argv))

        from etf_adapt.hub.publish import publish

        print(publish(options.pop("folder"), options.pop("repo_id"), **options))


def publish_run(args: ETFTrainingArguments) -> None:
    """Publish the finished folder; exit code 3 where it cannot be."""
    from etf_adapt.hub.publish import publish
    from etf_adapt.hub.send import HubError

    options: dict[str, Any] = {"private": args.hub_private_repo, "revision": args.hub_revision}
    try:
        print(f"published: {publish(str(args.output_dir), str(args.hub_model_id), **options)}")
    except HubError as error:
        print(f"trained and saved, but not published: {error}", file=sys.stderr)
        raise SystemExit(3) from error
