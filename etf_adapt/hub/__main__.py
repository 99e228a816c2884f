"""Publish a finished folder from the command line: ``python -m etf_adapt.hub FOLDER user/name``."""

from __future__ import annotations

import argparse
import sys

from etf_adapt.errors import one_line_errors
from etf_adapt.hub.publish import publish


def main(argv: list[str] | None = None) -> None:
    """Publish the folder of the command line and print the address of the commit."""
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
    options = vars(parser.parse_args(argv))
    with one_line_errors():
        try:
            print(publish(options.pop("folder"), options.pop("repo_id"), **options))
        except KeyboardInterrupt:
            print("stopped: the same command carries on", file=sys.stderr)
            raise SystemExit(130) from None


if __name__ == "__main__":
    main()
