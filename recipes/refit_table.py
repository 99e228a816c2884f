r"""What one pass over the training rows makes of trained classifiers, beside the usual remedies without training.

    python recipes/refit_table.py --results recipes/results/refit --data $DATA --models $MODELS
    python recipes/refit_table.py --results recipes/results/refit --table_only        # of what is finished; runs nothing

For each data set, kind of classifier and seed: trained by finetune.py (transformers' Trainer, at the rates that `linear_ce`
and `cosine_la` chose on validation rows in the tables of README.md), then `etf_adapt.refit`, and the remedies on the same
features. All that a remedy chooses it chooses on the validation rows, as the refit does. Here the head is not set from them,
as `etf_adapt.refit` does at last where they were cut from the training rows. Test rows are scored once. A finished run is one
small file in `runs/`, and the same command goes on after any stop.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparison import (
    format_difference,
    format_markdown,
    format_spread,
    mean_and_deviation,
    pack_rows,
    paired_bootstrap,
    unpack_rows,
)
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

import etf_adapt.inference.refit as refit_module
from etf_adapt import load_data, refit
from etf_adapt.heads.alignment import TrainingRows
from etf_adapt.heads.in_model import head_modules
from etf_adapt.heads.layers import ClassifierHead
from etf_adapt.inference.finished_model import read_classes
from etf_adapt.inference.head_statistics import HeadStatistics
from etf_adapt.inference.rows import prepare_rows
from etf_adapt.losses.terms import log_prior
from etf_adapt.metrics.calibration import fit_balanced
from etf_adapt.metrics.shots import classification_scores, pooled_class_mean
from etf_adapt.results import run_folder

SETS = {
    "digits": "--model micro --dataset digits",
    "bccd_cells": "--model {models}/mobilenetv2_100.timm --dataset {data}/bccd_cells --image_size 64 --num_train_epochs 6",
    "clinc150": "--model {models}/all-MiniLM-L6-v2 --dataset {data}/clinc150 --imbalance_factor 100 --num_train_epochs 3",
    "cifar100": "--model {models}/vit_tiny_patch16_224.timm --dataset {data}/cifar100 --imbalance_factor 100 "
    "--validation_before_long_tail true --image_size 64 --num_train_epochs 4",
    "goemotions": "--model {models}/all-MiniLM-L6-v2 --dataset {data}/goemotions_single --max_train_rows 4000 "
    "--num_train_epochs 2",
}
KINDS = {
    "linear": ("linear, cross-entropy", "--head linear --loss cross_entropy"),
    "weighted": ("linear, class-weighted", "--head linear --loss cross_entropy --class_weights balanced"),
    "oversampled": ("linear, oversampled", "--head linear --loss cross_entropy --sampler balanced"),
    "cosine": ("cosine, logit-adjusted", "--head cosine --loss logit_adjusted"),
}
RATES = {  # of the backbone, and the head's over it: linear, cosine
    "digits": ((1e-3, 10), (1e-3, 10)),
    "bccd_cells": ((1e-3, 10), (2e-4, 1)),
    "clinc150": ((4e-4, 10), (2e-4, 10)),
    "cifar100": ((2e-4, 10), (4e-4, 10)),
    "goemotions": ((2e-4, 10), (2e-4, 10)),
}
REMEDIES = {
    "before": "as trained",
    "adjusted": "logit adjustment",
    "tau": "τ-normalised",
    "retrained": "classifier re-trained",
    "nearest_mean": "nearest class mean",
    "refit": "**refit**",
}
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # of the re-trained classifier's squared weights


def main() -> None:
    """Run what is not finished, then write the table."""
    options = experiment_parser(__doc__, SETS).parse_args()
    experiment(options, [(name, kind) for name in options.sets for kind in KINDS], run, make_table)


def experiment_parser(description: str | None, sets: Mapping[str, str]) -> argparse.ArgumentParser:
    """Return the flags that the experiments on the closed form share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--data", help="folder of the data sets")
    parser.add_argument("--models", help="folder of the backbones")
    parser.add_argument("--sets", nargs="+", default=[*sets], choices=[*sets])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scratch", type=Path, help="for what is made; by default within the results, and removed")
    parser.add_argument("--table_only", action="store_true")
    return parser


def experiment(
    options: argparse.Namespace, cases: Sequence[Any], run: Callable[..., None], make_table: Callable[[Path], str]
) -> None:
    """Run each case with each seed, then write and print the table of what is finished."""
    torch.set_num_threads(1)
    for seed in () if options.table_only else options.seeds:
        for case in cases:
            run(*case, seed, options)
    table = make_table(options.results)
    (options.results / "table.md").write_text(table, encoding="utf-8")
    print(table)


def train(folder: Path, flags: Sequence[str], seed: int) -> float:
    """Fine-tune once, unless the folder holds the finished model; return the seconds of training."""
    file = folder / run_folder.RESULTS_FILE
    if not file.is_file():
        plain = "--torch_threads 1 --evaluate_test false --eval_strategy no --save_strategy no --load_best_model_at_end false"
        command = [sys.executable, str(Path(__file__).with_name("finetune.py")), *flags, *plain.split()]
        command += ["--seed", str(seed), "--output_dir", str(folder), "--overwrite_output_dir"]
        subprocess.run(command, check=True)
    return float(json.loads(file.read_text(encoding="utf-8"))["train_runtime"])


def run(name: str, kind: str, seed: int, options: argparse.Namespace) -> None:
    """Train a classifier, refit it, and keep the scores."""
    file = options.results / "runs" / f"{name}-{kind}-{seed}.json"
    if file.is_file():
        return
    folder = (options.scratch or options.results / "scratch") / f"{name}-{kind}-{seed}"
    rate, factor = RATES[name][kind == "cosine"]
    flags = [*SETS[name].format(data=options.data, models=options.models).split(), *KINDS[kind][1].split()]
    flags += [
        "--learning_rate",
        f"{rate:g}",
        "--head_learning_rate",
        f"{rate * factor:g}",
        "--prior_adjustment",
        "none",
    ]
    train_seconds = train(folder, flags, seed)
    scores, correct, labels, seconds, penalty = measure(folder)
    record = {"set": name, "kind": kind, "seed": seed, "scores": scores, "refit_seconds": seconds, "penalty": penalty}
    record["train_seconds"] = train_seconds
    record["correct"] = {remedy: pack_rows(rows) for remedy, rows in correct.items()}
    run_folder.write_json(file, record)
    (options.results / f"labels_{name}.json").write_text(json.dumps(labels), encoding="utf-8")  # the same in all runs
    print(
        name,
        kind,
        seed,
        {remedy: round(100 * found["balanced_accuracy"], 1) for remedy, found in scores.items()},
        flush=True,
    )
    if options.scratch is None:
        shutil.rmtree(folder)


def measure(folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[int], float, float]:
    """Refit a model and try the remedies; return scores, right rows, labels, seconds of the refit, and its penalty."""
    arguments = json.loads((folder / run_folder.ARGUMENTS_FILE).read_text())
    passes: list[TrainingRows] = []

    def noting(*args: Any, **options: Any) -> TrainingRows:
        passes.append(read_classes(*args, **options))
        return passes[-1]

    refit_module.read_classes = noting  # the same features serve the remedies
    start = time.monotonic()
    result = refit(folder, arguments["dataset"], force=True)
    seconds = time.monotonic() - start
    refit_module.read_classes = read_classes
    train, validation = passes
    data = load_data(arguments["dataset"], seed=arguments["seed"])
    rows = prepare_rows(result.model, str(folder), data, augment=False)
    num_classes = len(data.label_names)
    same = list(range(num_classes))
    test = read_classes(result.model, rows.test, rows.collator, same, num_classes, batch_size=32, num_workers=0)
    counts = train.statistics[0].counts

    stock: Any = AutoModelForImageClassification if data.task == "image" else AutoModelForSequenceClassification
    (path,) = head_modules(result.model)
    old = ClassifierHead.class_vectors(stock.from_pretrained(folder).get_submodule(path))
    # Of the training rows alone, as the remedies are.
    scale, strength = result.calibration or (1.0, 0.0)
    new = HeadStatistics(train.statistics[0], "whitened", result.penalty, True, scale, strength).class_vectors()
    x, y = train.features[0].double(), train.labels
    held_out, truth = validation.features[0].double(), validation.labels

    def best_on_validation(heads: Sequence[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
        return max(
            heads,
            key=lambda head: pooled_class_mean(
                (head(held_out).argmax(dim=1) == truth).numpy(), truth.numpy(), min_rows=1
            ),
        )

    def linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        return lambda features: features @ weight.T + (0 if bias is None else bias)

    before = linear(*old)
    fitted = fit_balanced(before(held_out), truth, counts)
    means = torch.stack([x[y == label].mean(dim=0) for label in range(num_classes)])
    taus = [step / 10 for step in range(21)]
    heads: dict[str, Callable[[Tensor], Tensor]] = {
        "before": before,
        # Menon et al. 2021, its strength fitted: https://arxiv.org/abs/2007.07314
        "adjusted": lambda features: fitted[0] * before(features) - fitted[1] * log_prior(counts, before(features)),
        # The next three: Kang et al. 2020, https://arxiv.org/abs/1910.09217
        "tau": best_on_validation([linear(old[0] / old[0].norm(dim=1, keepdim=True) ** tau, None) for tau in taus]),
        "retrained": best_on_validation([linear(*retrained(x, y, counts, penalty)) for penalty in PENALTIES]),
        "nearest_mean": best_on_validation(
            [lambda features: normalize(features) @ normalize(means).T, lambda features: -torch.cdist(features, means)]
        ),
        "refit": linear(*new),
    }
    scores, correct = {}, {}
    for remedy, head in heads.items():
        predicted = head(test.features[0].double()).argmax(dim=1)
        correct[remedy] = (predicted == test.labels).numpy()
        scores[remedy] = classification_scores(
            predicted.numpy(), test.labels.numpy(), class_counts=counts.int().numpy()
        )
    return scores, correct, test.labels.tolist(), seconds, result.penalty


def retrained(x: Tensor, y: Tensor, counts: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Train a linear classifier on fixed features to its optimum, each class counting alike."""
    center, scale = x.mean(dim=0), x.std(dim=0).mean()
    inputs = (x - center) / scale
    weight = torch.zeros(len(counts), x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(len(counts), dtype=x.dtype, requires_grad=True)
    by_class = 1 / counts.clamp_min(1)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(inputs @ weight.T + bias, y, weight=by_class) + penalty * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    weight, bias = weight.detach() / scale, bias.detach()
    return weight, bias - weight @ center


def make_table(results: Path) -> str:
    """Write the table of the finished runs: mean ± deviation over seeds, and the refit's gain with its interval."""
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((results / "runs").glob("*.json"))]
    parts = []
    for score, title in (("balanced_accuracy", "balanced accuracy"), ("tail_third", "tail third")):
        lines = []
        for name in SETS:
            for kind, (words, _) in KINDS.items():
                found = [one for one in runs if (one["set"], one["kind"]) == (name, kind)]
                if not found:
                    continue
                cells = [
                    format_spread(mean_and_deviation([one["scores"][remedy][score] for one in found]))
                    for remedy in REMEDIES
                ]
                if score == "balanced_accuracy":
                    labels = np.array(json.loads((results / f"labels_{name}.json").read_text(encoding="utf-8")))
                    rows = {
                        remedy: np.stack([unpack_rows(one["correct"][remedy], len(labels)) for one in found])
                        for remedy in ("before", "refit")
                    }
                    cells.append(format_difference(paired_bootstrap(rows["refit"], rows["before"], labels)))
                    minutes = [np.mean([one[f"{part}_seconds"] for one in found]) for part in ("train", "refit")]
                    cells.append(f"{minutes[0]:.0f} + {minutes[1]:.0f}")
                lines.append([name, words, str(len(found)), *cells])
        head = ["data set", "trained", "seeds", *REMEDIES.values()]
        head += ["gain of the refit [95 %]", "seconds: training + refit"] if score == "balanced_accuracy" else []
        parts.append(f"{title}\n\n{format_markdown(head, lines)}")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    main()
