r"""What one change of the default does: a part of it exchanged, or fewer of the backbone's parameters trained.

    python recipes/variants_table.py --results recipes/results/variants --data $DATA --models $MODELS
    python recipes/variants_table.py --results recipes/results/variants --table_only     # of what is finished; runs nothing

Batch, epochs and rate are those of the rule in `etf_adapt/training/budget.py`, which raises the rate where fewer parameters
are trained. In the same ways a cosine head is trained and, at the end, refitted. Scores are those of validation rows; test
rows are not read. A finished run is one small file in `runs/`, and the same command goes on after any stop.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

from comparison import format_markdown, format_spread, mean_and_deviation
from refit_table import experiment, experiment_parser

from etf_adapt.results import run_folder

ADAPTERS = Path(__file__).with_name("adapters")
SETS = {
    "clinc150": "--model {models}/all-MiniLM-L6-v2 --dataset {data}/clinc150",
    "cifar100": "--model {models}/vit_tiny_patch16_224.timm --image_size 64 --dataset {data}/cifar100 "
    "--validation_before_long_tail true",
}
LAST_BLOCK = {"clinc150": r"embeddings|layer\.[0-4]\.", "cifar100": r"embed|cls_token|blocks\.([0-9]|10)\."}
TRAINED = {  # less of the backbone
    "lora": ("LoRA of rank 8 in all linear layers", f"--peft {ADAPTERS / 'lora_rank8.json'}"),
    "mlp": ("LoRA of rank 16 in the MLPs", f"--peft {ADAPTERS / 'mlp.json'}"),
    "biases": ("biases and norms alone", "--freeze ^(?!.*(bias|[nN]orm))"),
    "last": ("last block alone", "--freeze {last_block}"),
}
COSINE = "--head cosine --loss logit_adjusted --final_frame whitened"
VARIANTS = {
    "default": ("**the default**", ""),
    "epochs": ("aligned after each epoch alone", "--realign epochs"),
    "once": ("aligned once", "--realign never"),
    "dropout": ("with the backbone's dropout, so aligned after each epoch", "--dropout model"),
    "share": ("rows not left out", "--leave_one_out false"),
    "means": ("frame of class means", "--frame means"),
    "vertices": ("dot regression on vertices for the loss", "--loss dot_regression"),
    "adjusted": ("logit adjustment for the loss (not of the family)", "--loss logit_adjusted"),
    "sqrt": ("rows of rare classes drawn oftener (root sampling)", "--sampler sqrt"),
    "balanced": ("classes drawn alike", "--sampler balanced"),
    "pooling": ("mean of the tokens for the stock pooler's feature", "--pooling mean"),
    **TRAINED,
    "none": ("nothing trained: the head alone, in closed form", "--num_train_epochs 0"),
    "cosine": ("cosine head, logit-adjusted, then refitted", COSINE),
    **{
        f"cosine_{name}": (f"cosine head, refitted: {title}", f"{COSINE} {flags}")
        for name, (title, flags) in TRAINED.items()
    },
}
PLAIN = "--head etf --imbalance_factor 100 --prior_adjustment fit --torch_threads 1 --evaluate_test false --save_strategy no "
PLAIN += "--load_best_model_at_end false --eval_strategy no --overwrite_output_dir"


def main() -> None:
    """Run what is not finished, then write the table."""
    parser = experiment_parser(__doc__, SETS)
    parser.add_argument("--variants", nargs="+", default=[*VARIANTS], choices=[*VARIANTS])
    options = parser.parse_args()
    cases = [(name, variant) for name in options.sets for variant in options.variants]
    experiment(options, [case for case in cases if case != ("cifar100", "pooling")], run, make_table)


def run(name: str, variant: str, seed: int, options: argparse.Namespace) -> None:
    """Train once, and keep scores, seconds of the processor and peak memory of the whole process."""
    file = options.results / "runs" / f"{name}-{variant}-{seed}.json"
    if file.is_file():
        return
    folder = (options.scratch or options.results / "scratch") / f"{name}-{variant}-{seed}"
    flags = f"{SETS[name]} {PLAIN} {VARIANTS[variant][1]}".format(
        data=options.data, models=options.models, last_block=LAST_BLOCK[name]
    )
    command = [sys.executable, str(Path(__file__).with_name("finetune.py")), *flags.split()]
    process = subprocess.Popen([*command, "--seed", str(seed), "--output_dir", str(folder)], stdout=subprocess.PIPE)
    output = process.stdout.read().decode() if process.stdout else ""
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise SystemExit(f"{name}, {VARIANTS[variant][0]}: exit code {process.returncode}\n{output}")
    results = json.loads((folder / run_folder.RESULTS_FILE).read_text(encoding="utf-8"))
    trained = re.search(r"trained: ([\d,]+) of", output)
    record = {"set": name, "variant": variant, "seed": seed, "trained": trained[1] if trained else "0"}
    record |= {"rate": found[1] if (found := re.search(r"learning rate ([\d.e-]+)", output)) and trained else "-"}
    record |= {"seconds": used.ru_utime + used.ru_stime, "megabytes": used.ru_maxrss / 1024}
    record |= {key: results[f"eval_{key}"] for key in ("balanced_accuracy", "tail_third", "balanced_loss")}
    run_folder.write_json(file, record)
    print(record, flush=True)
    if options.scratch is None:
        shutil.rmtree(folder)


def make_table(results: Path) -> str:
    """Return scores and costs of each variant on each set, over its seeds."""
    found: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for file in sorted((results / "runs").glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        found[record["set"], record["variant"]].append(record)
    lines = []
    for name in SETS:
        for variant, (title, _) in VARIANTS.items():
            if not (runs := found[name, variant]):
                continue
            whole = {run["seed"]: run["balanced_accuracy"] for run in found[name, "default"]}
            changes = [run["balanced_accuracy"] - whole[run["seed"]] for run in runs if run["seed"] in whole]
            scores = [
                format_spread(mean_and_deviation(values))
                for values in (
                    [run["balanced_accuracy"] for run in runs],
                    changes if variant != "default" else [],
                    [run["tail_third"] for run in runs],
                )
            ]
            costs = [f"{fmean(run[key] for run in runs):,.0f}" for key in ("seconds", "megabytes")]
            lines.append([name, title, runs[0]["trained"], runs[0]["rate"], str(len(runs)), *scores, *costs])
    head = ["set", "variant", "trained parameters", "learning rate", "seeds", "balanced accuracy", "minus the default",
            "tail third",
            "seconds of one core", "peak memory, MB"]  # fmt: skip
    return format_markdown(head, lines)


if __name__ == "__main__":
    main()
