r"""How well a finished model takes new classes from a few rows of each, without training and without the old rows.

    python recipes/grow_table.py --results recipes/results/grow --data $DATA --models $MODELS
    python recipes/grow_table.py --results recipes/results/grow --table_only          # of what is finished; runs nothing

A fifth of the classes, drawn by the seed, is kept back. The default trains on the long tail of the others (factor 100);
`etf_adapt.extend` then adds the new classes from 1, 5 and 20 rows of each, three draws of rows. Beside it, on the same
features: the nearest class mean, and the trained head with lines for the new classes that learns on from the new rows alone.
The ceiling is the default trained from scratch on all classes, old rows and new (the first draw). Test rows are those of all
classes; scores are balanced accuracy of the old classes, of the new ones, and their harmonic mean. A finished run is one small
file in `runs/`, and the same command goes on after any stop.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparison import format_markdown, format_spread, mean_and_deviation
from datasets import ClassLabel, Dataset, concatenate_datasets
from refit_table import experiment, experiment_parser, train
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from etf_adapt import ETFForImageClassification, ETFForSequenceClassification, extend, load_data
from etf_adapt.heads.in_model import head_modules
from etf_adapt.heads.layers import ClassifierHead
from etf_adapt.inference.finished_model import read_classes
from etf_adapt.inference.head_statistics import load_statistics
from etf_adapt.inference.rows import prepare_rows
from etf_adapt.results import run_folder
from etf_adapt.results.card import read_facts

SETS = {
    "clinc150": "--model {models}/all-MiniLM-L6-v2 --num_train_epochs 3 --learning_rate 2e-4",
    "cifar100": "--model {models}/vit_tiny_patch16_224.timm --image_size 64 --num_train_epochs 4 --learning_rate 1e-4",
}
SHOTS = (1, 5, 20)
DRAWS = 3
METHODS = {
    "extend": "**extend**",
    "nearest_mean": "nearest class mean",
    "trained_on": "head trained on the new rows",
    "ceiling": "trained from scratch on all",
}


def main() -> None:
    """Run what is not finished, then write the table."""
    parser = experiment_parser(__doc__, SETS)
    parser.add_argument("--new_share", type=float, default=0.2, help="of the classes")
    parser.add_argument("--ceilings", nargs="*", type=int, default=SHOTS, help="rows of a new class, of the ceilings")
    options = parser.parse_args()
    experiment(options, [(name,) for name in options.sets], run, make_table)


def run(name: str, seed: int, options: argparse.Namespace) -> None:
    """Make the data, train, extend, and keep the scores."""
    title = f"{name}-{options.new_share:g}-{seed}"
    place = (options.scratch or options.results / "scratch") / title
    file = options.results / "runs" / f"{title}.json"
    record = (
        json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"set": name, "seed": seed, "scores": {}}
    )
    record["new_share"] = options.new_share
    wanted = {f"ceiling-{shots}-0" for shots in options.ceilings}
    if wanted <= record["scores"].keys() and "extend-1-0" in record["scores"]:
        return
    if not (place / "test").is_dir():
        make_data(name, seed, options, place)
    flags = SETS[name].format(data=options.data, models=options.models).split()
    if "extend-1-0" not in record["scores"]:
        train(base := place / "model-base", [*flags, "--dataset", str(place / "base")], seed)
        record["scores"] |= measure(place, base)
    for shots in options.ceilings:
        if f"ceiling-{shots}-0" not in record["scores"]:
            model = place / f"model-all-{shots}"
            seconds = train(model, [*flags, "--dataset", str(place / f"all-{shots}")], seed)
            head = ClassifierHead.class_vectors(next(iter(head_modules(load(model)).values())))
            features, labels, names = read(model, place / "test")
            found = scored(linear(*head)(features), labels, names, new_names(place))
            record["scores"][f"ceiling-{shots}-0"] = found | {"seconds": seconds}
    run_folder.write_json(file, record)
    print(title, {case: round(100 * found["harmonic"], 1) for case, found in record["scores"].items()}, flush=True)
    if options.scratch is None:
        shutil.rmtree(place)


def make_data(name: str, seed: int, options: argparse.Namespace, place: Path) -> None:
    """Write old classes with a long tail, draws of rows of the new ones, both together, and the test rows."""
    own = Path(options.data, name)
    cut = {"validation_before_long_tail": True} if name == "cifar100" else {}
    tailed = load_data(str(own), imbalance_factor=100, seed=seed, **cut)
    whole = load_data(str(own), seed=seed)
    names, column = whole.label_names, next(c for c in whole.train.column_names if c in ("image", "text"))
    new = np.random.default_rng([7, seed]).permutation(len(names))[: round(len(names) * options.new_share)]
    kept = ClassLabel(names=names)

    def select(rows: Dataset, indices: Any) -> Dataset:
        return rows.select(np.asarray(indices).tolist()).select_columns([column, "label"]).cast_column("label", kept)

    def write(rows: Dataset, folder: str, split: str) -> None:
        # Labels as names: a part's classes are then those that it has.
        texts = [names[label] for label in rows["label"]]
        (place / folder).mkdir(parents=True, exist_ok=True)
        rows.remove_columns("label").add_column("label", texts).to_parquet(place / folder / f"{split}.parquet")

    def old_rows(rows: Dataset) -> Dataset:
        return select(rows, np.flatnonzero(~np.isin(rows["label"], new)))

    old, labels = old_rows(tailed.train), np.asarray(whole.train["label"])
    write(old, "base", "train")
    write(old_rows(tailed.validation), "base", "validation")
    for draw in range(DRAWS):
        generator = np.random.default_rng([8, seed, draw])
        picked = [generator.permutation(np.flatnonzero(labels == label))[: max(SHOTS)] for label in sorted(new)]
        for shots in SHOTS:
            rows = select(whole.train, np.concatenate([part[:shots] for part in picked]))
            write(rows, f"new-{shots}-{draw}", "train")
            if draw == 0:
                write(concatenate_datasets([old, rows]), f"all-{shots}", "train")
                write(select(tailed.validation, range(len(tailed.validation))), f"all-{shots}", "validation")
    write(select(tailed.test, range(len(tailed.test))), "test", "train")


def load(model: Path) -> Any:
    """Load a finished model, of images or texts."""
    facts = read_facts(model)
    is_image = facts is not None and facts.task == "image"
    return (ETFForImageClassification if is_image else ETFForSequenceClassification).from_pretrained(model)


def new_names(place: Path) -> set[str]:
    """Return the classes that were kept back."""
    return set(load_data(str(place / "new-1-0"), validation_fraction=0.0).label_names)


def read(model: Path, data: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Return what the head of a model reads of all rows of a folder, their labels, and the names of these."""
    found = load_data(str(data), validation_fraction=0.0)
    made = load(model)
    rows = prepare_rows(made, str(model), found, augment=False)
    names = found.label_names
    read_rows = read_classes(
        made, rows.alignment, rows.collator, range(len(names)), len(names), batch_size=32, num_workers=0
    )
    return read_rows.features[0].double(), read_rows.labels, names


def linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Return the logits of a linear layer."""
    return lambda features: features @ weight.T + (0 if bias is None else bias)


def measure(place: Path, base: Path) -> dict[str, dict[str, float]]:
    """Extend the base by each draw, try the other ways, and score all on the test rows."""
    features, labels, names = read(base, place / "test")
    (statistics,) = load_statistics(base).values()
    made = load(base)
    old = [made.config.id2label[index] for index in range(made.config.num_labels)]
    weight, bias = ClassifierHead.class_vectors(next(iter(head_modules(made).values())))
    new, found = new_names(place), {}
    for shots in SHOTS:
        for draw in range(DRAWS):
            start = time.monotonic()
            result = extend(base, str(place / f"new-{shots}-{draw}"))
            seconds = time.monotonic() - start
            columns = [[*result.class_counts].index(name) for name in names]
            (head,) = head_modules(result.model).values()
            logits = linear(*ClassifierHead.class_vectors(head))(features)[:, columns]
            x, y, own = read(base, place / f"new-{shots}-{draw}")
            order = [(old + own).index(name) for name in names]
            means = torch.stack([x[y == label].mean(dim=0) for label in range(len(own))])
            centers = normalize(torch.cat([statistics.rows.means, means]))
            more = trained_on(weight, bias, x, y + len(old), len(old) + len(own))
            ways = {
                "extend": logits,
                "nearest_mean": (normalize(features) @ centers.T)[:, order],
                "trained_on": linear(*more)(features)[:, order],
            }
            for way, scores in ways.items():
                found[f"{way}-{shots}-{draw}"] = scored(scores, labels, names, new) | {"seconds": seconds}
    return found


def trained_on(weight: Tensor, bias: Tensor | None, x: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Train a head on from the rows of new classes alone, whose lines begin at zero: 100 steps of AdamW at 1e-2."""
    lines = num_classes - len(weight)
    weight = torch.cat([weight, torch.zeros(lines, weight.shape[1]).double()]).requires_grad_(True)
    bias = torch.cat([torch.zeros(num_classes - lines).double() if bias is None else bias, torch.zeros(lines).double()])
    bias = bias.requires_grad_(True)
    optimizer = torch.optim.AdamW([weight, bias], lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        cross_entropy(x @ weight.T + bias, y).backward()
        optimizer.step()
    return weight.detach(), bias.detach()


def scored(logits: Tensor, labels: Tensor, names: list[str], new: set[str]) -> dict[str, float]:
    """Return balanced accuracy of old and new classes, and their harmonic mean."""
    right = (logits.argmax(dim=1) == labels).double()
    recalls = torch.stack([right[labels == label].mean() for label in range(len(names))])
    is_new = torch.tensor([name in new for name in names])
    old_score, new_score = float(recalls[~is_new].mean()), float(recalls[is_new].mean())
    harmonic = 2 * old_score * new_score / max(old_score + new_score, 1e-9)
    return {"old": old_score, "new": new_score, "harmonic": harmonic, "all": float(recalls.mean())}


def make_table(results: Path) -> str:
    """Write the table of the finished runs: mean ± deviation over seeds, each the mean of its draws."""
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((results / "runs").glob("*.json"))]
    lines = []
    for name in SETS:
        for share in sorted({run["new_share"] for run in runs if run["set"] == name}):
            found = [run for run in runs if (run["set"], run["new_share"]) == (name, share)]
            for shots in SHOTS:
                for way, title in METHODS.items():
                    cases = [f"{way}-{shots}-{draw}" for draw in range(DRAWS)]
                    drawn = [[run["scores"][case] for case in cases if case in run["scores"]] for run in found]
                    drawn = [scores for scores in drawn if scores]
                    if not drawn:
                        continue
                    cells = [
                        format_spread(
                            mean_and_deviation([float(np.mean([one[part] for one in scores])) for scores in drawn])
                        )
                        for part in ("old", "new", "harmonic", "all")
                    ]
                    seconds = np.mean([one["seconds"] for scores in drawn for one in scores])
                    time_of = f"{seconds:.0f}" if way in ("extend", "ceiling") else "-"
                    lines.append([name, f"{share:g}", str(shots), title, str(len(drawn)), *cells, time_of])
    head = ["data set", "share of new classes", "rows of each", "method", "seeds", "old classes", "new classes"]
    return format_markdown([*head, "harmonic mean", "all classes", "seconds"], lines) + "\n"


if __name__ == "__main__":
    main()
