"""``etf-adapt publish FOLDER user/name``: a finished folder to the Hub."""

from __future__ import annotations

from collections.abc import Sequence

from etf_adapt.commands.parser import Parser
from etf_adapt.errors import one_line_errors


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
        options = vars(parser.parse(argv))

        from etf_adapt.hub.publish import publish

        print(publish(options.pop("folder"), options.pop("repo_id"), **options))
