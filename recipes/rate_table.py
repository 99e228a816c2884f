r"""What the learning rate that follows from rows and parameters loses against a sweep, on validation rows.

    python recipes/rate_table.py --results recipes/results/rates --data $DATA --models $MODELS
    python recipes/rate_table.py --results recipes/results/rates --table_only          # of what is finished; runs nothing

Batch and epochs follow the rule of `etf_adapt/training/budget.py` in every run; the rate is the rule's, then that times each
factor. A finished run is one small file in `runs/`, and the same command goes on after any stop. Test rows are not read.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from comparison import format_markdown
from refit_table import experiment, experiment_parser, train

from etf_adapt.results import run_folder

CLINC150 = "--model {models}/all-MiniLM-L6-v2 --dataset {data}/clinc150"
CIFAR100 = "--model {models}/vit_tiny_patch16_224.timm --image_size 64 --dataset {data}/cifar100"
CIFAR100 += " --validation_before_long_tail true"
SETS = {
    "digits": ("digits, 286 rows", "--validation_fraction 0.3"),
    "clinc150_1000": ("CLINC150, 1,000 rows", f"{CLINC150} --max_train_rows 1000"),
    "cifar100_1000": ("CIFAR-100, 1,000 rows", f"{CIFAR100} --max_train_rows 1000"),
    "clinc150": ("CLINC150, factor 100", f"{CLINC150} --imbalance_factor 100"),
    "cifar100": ("CIFAR-100, factor 100", f"{CIFAR100} --imbalance_factor 100"),
    "cifar100_epoch": (
        "the same, one epoch",
        f"{CIFAR100} --imbalance_factor 100 --num_train_epochs 1",
    ),
    "clinc150_10000": ("CLINC150, 10,000 rows", f"{CLINC150} --max_train_rows 10000"),
}
FACTORS = (0.5, 1.0, 2.0)


def main() -> None:
    """Run what is not finished, then write the table."""
    parser = experiment_parser(__doc__, SETS)
    parser.set_defaults(seeds=[0])
    options = parser.parse_args()
    experiment(options, [(name,) for name in options.sets], run, make_table)


def run(name: str, seed: int, options: argparse.Namespace) -> None:
    """Train with the rule's rate and with its multiples, and keep the scores."""
    flags = SETS[name][1].format(data=options.data, models=options.models).split()
    for factor in FACTORS:
        title = f"{name}-{factor:g}-{seed}"
        file = options.results / "runs" / f"{title}.json"
        if not file.is_file():
            folder = (options.scratch or options.results / "scratch") / title
            rate, budget = by_rule(flags, seed)
            train(folder, [*flags, *([] if factor == 1.0 else ["--learning_rate", f"{factor * rate:.6g}"])], seed)
            results = json.loads((folder / run_folder.RESULTS_FILE).read_text(encoding="utf-8"))
            record = {"set": name, "seed": seed, "factor": factor, "rate": rate, "budget": budget}
            record |= {key: results[f"eval_{key}"] for key in ("balanced_accuracy", "balanced_loss")}
            run_folder.write_json(file, record)
            print(title, record, flush=True)
            if options.scratch is None:
                shutil.rmtree(folder)


def by_rule(flags: list[str], seed: int) -> tuple[float, str]:
    """Return the rate that a run takes by itself, and its steps and batch in words."""
    command = [sys.executable, str(Path(__file__).with_name("finetune.py")), *flags, "--dry_run", "--seed", str(seed)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    rate, rows, budget = (
        re.search(pattern, output)[1]  # type: ignore[index]
        for pattern in (r"learning rate (\S+) \(by", r"(\S+) rows a step", r"steps: ([^;]+);")
    )
    return float(rate), f"{budget}, of {rows} rows"


def make_table(results: Path) -> str:
    """Return the scores of each set at each rate, means over its seeds, and what the rule loses against the best."""
    found: dict[str, dict[float, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for file in sorted((results / "runs").glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        found[record["set"]][record["factor"]].append(record)
    lines, losses = [], []
    for name, (title, _) in SETS.items():
        runs = {factor: found[name][factor] for factor in FACTORS}
        if not all(runs.values()):
            continue
        scores = {factor: 100 * fmean(run["balanced_accuracy"] for run in part) for factor, part in runs.items()}
        losses.append(max(scores.values()) - scores[1.0])
        (chosen, *_) = runs[1.0]
        cells = [f"{scores[factor]:.1f}" for factor in FACTORS]
        lines.append([title, str(len(runs[1.0])), chosen["budget"], f"{chosen['rate']:g}", *cells, f"{losses[-1]:.1f}"])
    header = ["set", "seeds", "steps", "rule's rate", *(f"x {factor:g}" for factor in FACTORS), "lost"]
    mean = f"\nMean loss against the best of each line: {fmean(losses):.2f} points.\n" if losses else ""
    return format_markdown(header, lines) + mean


if __name__ == "__main__":
    main()
