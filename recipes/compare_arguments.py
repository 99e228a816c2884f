"""Arguments of recipes/compare.py: parsed, checked, and kept in the folder of results."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compare_methods import METHODS, Method

from etf_adapt.commands.flags import translate
from etf_adapt.commands.parser import RaisingParser, with_underscores
from etf_adapt.errors import check_choice
from etf_adapt.results import run_folder

SETTINGS_FILE = "settings.json"
LISTS = ("rows", "seeds", "learning_rates", "head_rates")
OWN_FLAGS = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "evaluate_test", "seed", "learning_rate",
             "head_learning_rate")  # fmt: skip


def read_arguments(argv: list[str], description: str | None = None) -> argparse.Namespace:
    """Parse and check the arguments; those of finetune.py become `passed`, as given, and `flags`, by name, fit to publish."""
    parser = RaisingParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--results", type=Path, required=True, help="Folder of what this comparison finds.")
    add("--rows", nargs="+", default=[], help=f"Methods, any of {', '.join(METHODS)}.")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Each row's; the first chooses the rates. %(default)s")
    add("--learning_rates", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3], help="To choose from. %(default)s")
    add("--head_rates", nargs="+", type=float, default=[1.0, 10.0], help="Times learning_rate. %(default)s")
    add(
        "--widen",
        type=int,
        default=0,
        help="How many rates more a method tries, where its best is an outermost one. %(default)s",
    )
    add("--jobs", type=int, default=1, help="Runs at once, for a device or many cores that hold several. %(default)s")
    add("--launcher", help='What runs finetune.py, such as "accelerate launch"; python if not given.')
    add("--keep_models", action="store_true", help="Keep each run's folder, in scratch/; each trains anew.")
    add("--tuning_only", action="store_true", help="Choose the rates, and leave the test split alone.")
    add("--table_only", action="store_true", help="Run nothing; the settings are those in the folder.")
    end = argv.index("--") if "--" in argv else len(argv)
    options, further = parser.parse_known_args(list(map(with_underscores, argv[:end])))
    options.passed = translate([*further, *argv[end + 1 :]])
    options.flags = by_name(options.passed)
    begun = read_json(file).get("flags") if (file := options.results / SETTINGS_FILE).is_file() else None
    if options.table_only:
        if options.passed:
            raise ValueError(f"`table_only` (=True) takes its settings from the folder: leave out {options.passed[0]}.")
        vars(options).update({"widen": 0} | read_json(options.results / SETTINGS_FILE))
    # finetune.py's own choice adjusts ETF heads alone; a comparison that was begun with it goes on so.
    elif "prior_adjustment" not in options.flags and (begun is None or "prior_adjustment" in begun):
        options.passed += ["--prior_adjustment", "fit"]
        options.flags["prior_adjustment"] = "fit"
    if options.jobs < 1:
        raise ValueError(f"`jobs` (={options.jobs}) must be at least 1.")
    if options.widen < 0:
        raise ValueError(
            f"`widen` (={options.widen}) must be 0 or more: how many rates beyond the given ones may be tried."
        )
    if options.jobs > 1 and options.launcher and options.launcher.split()[0] in ("accelerate", "torchrun"):
        raise ValueError(
            f"`jobs` (={options.jobs}) and `launcher` (={options.launcher!r}) contradict each other: launchers that run at "
            "once fight for one port. Leave out one of them."
        )
    for name in options.rows:
        check_choice("rows", name, METHODS)
    for name in LISTS:
        values = vars(options)[name]
        if not values or len(set(values)) < len(values):
            raise ValueError(f"`{name}` (={values}) must be one or more, each once.")
        if name.endswith("rates") and not all(0 < rate < math.inf for rate in values):
            raise ValueError(f"`{name}` (={values}) must be positive.")
    if options.launcher and not options.table_only and shutil.which(shlex.split(options.launcher)[0]) is None:
        raise ValueError(f"`launcher` (={options.launcher!r}) is no command that can be found here.")
    taken = {name: f"row {method.name}" for method in chosen_methods(options) for name in by_name(method.flags)}
    for name in options.flags:
        if name in OWN_FLAGS or name in taken:
            instead = f", or give --{name}s" if f"{name}s" in LISTS else ""
            raise ValueError(f"`{name}` is set by {taken.get(name, 'this recipe')}: leave it out{instead}.")
    return options


def by_name(words: Sequence[str]) -> dict[str, str]:
    """Return flags by name with their values, without local paths and tokens."""
    flags: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            values = flags[name.replace("-", "_")] = [value] if equals else []
        elif flags:
            values.append(word)
        else:
            raise ValueError(f"{word!r} belongs to no flag: leave it out.")
    return {name: shlex.join(values) for name, values in run_folder.public_value(flags).items()}


def chosen_methods(options: argparse.Namespace) -> list[Method]:
    """Return the methods to compare."""
    return [METHODS[name] for name in options.rows]


def claim(options: argparse.Namespace) -> None:
    """Write the settings into the folder of results; it must be empty or of a comparison with the same flags."""
    file = options.results / SETTINGS_FILE
    if file.is_file():
        before, now = read_json(file).get("flags", {}), options.flags
        names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        differing = [f"--{name} ({flags.get(name, 'not given')})" for flags in (before, now) for name in names]
        runs = [*options.results.glob("runs/*.json"), *filter(Path.is_dir, options.results.glob("scratch/*"))]
        if names and runs:  # none where the flags were wrong
            raise ValueError(
                f"`results` (={str(options.results)!r}) was begun with {', '.join(differing[: len(names)])}, and now is "
                f"asked for {', '.join(differing[len(names) :])}: give the same flags, or another --results folder."
            )
    elif any(options.results.iterdir()):
        raise ValueError(f"`results` (={str(options.results)!r}) holds what no comparison wrote: give another folder.")
    kept = {name: vars(options)[name] for name in (*LISTS, "widen", "flags")}
    run_folder.write_json(file, kept | {"launcher": public_launcher(options)})


def public_launcher(options: argparse.Namespace) -> str:
    """Return the launcher without local paths; empty for python."""
    return shlex.join(map(run_folder.public_value, shlex.split(options.launcher or "")))


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file of this recipe."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is no JSON ({error}): remove it.") from error
