r"""Compare heads, losses and samplers on one data set: same backbone, budget and tuning effort for every method.

    python recipes/compare.py --results results/digits --rows linear_ce etf_untuned --num_train_epochs 10
    python recipes/compare.py --results results/clinc150 --rows linear_ce cosine_la etf_untuned --seeds 0 1 2 \
        --learning_rates 2e-5 5e-5 1e-4 --head_rates 1 10 --model $MODELS/all-MiniLM-L6-v2 --dataset $DATA/clinc150
    python recipes/compare.py --results results/clinc150 --table_only       # of what is finished; runs nothing
    python recipes/compare.py --results results/first --rows etf cosine_la --tuning_only --dataset $DATA/clinc150

`--rows` names the methods (compare_methods.py): `etf_untuned` is the default as it stands, `etf` the same with rates tuned. All
other flags go to recipes/finetune.py in every run, with `--prior_adjustment fit` unless another is given, so that all heads are
adjusted for the prior. First each method is run at every rate with the first seed, without the test split; then, at the rates
of the least validation log loss, with every seed, and the test split is scored once. Where a method's best rate is the lowest
or the highest, the tables say so, and `--widen 2` tries up to two more in that direction. The same command continues after any
stop: a finished run is one small file in `runs/` and is never run again, an interrupted one resumes from its newest checkpoint.
Runs that train the same train once: the first seed at a method's best rate, and a method with the same one refitted. More
methods, seeds or rates may be added later. The tables are written to `table.md` and `table.json`, the scores that chose the
rates to `validation.md`; `--tuning_only` stops there, before any run sees the test split. What is printed ends with the command
that trains the method of the best validation score.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import fcntl
import functools
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import comparison
import numpy as np
from compare_arguments import LISTS, by_name, chosen_methods, claim, public_launcher, read_arguments, read_json
from compare_methods import METHODS
from compare_runs import Run, final_runs, read_run, spent_trainings, tuning_runs, validation_score
from compare_table import (
    at_edges,
    caption,
    collapse_table,
    command,
    cost_table,
    score_table,
    terminal_scores,
    terminal_validation,
    validation_table,
)

from etf_adapt import errors
from etf_adapt.results import run_folder, tables

FINETUNE = Path(__file__).with_name("finetune.py")
LABELS_FILE = "test_labels.json"


class Children:
    """The running runs, each a process of its own; after ``stop`` none is started."""

    def __init__(self, lock: int) -> None:
        self.lock = lock  # of the results; children inherit it, so that one that outlives us still keeps others out
        self.stopped = False
        self._running: set[subprocess.Popen[str]] = set()
        self._starting = threading.Lock()
        self.alone = threading.Lock()  # for what all runs share
        self.trainings: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)  # by name

    def launch(self, command: Sequence[str]) -> tuple[int, list[str]]:
        """Run a command to its end; return its exit code and last lines of output."""
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        options |= {"text": True, "errors": "replace", "start_new_session": True, "pass_fds": (self.lock,)}
        with self._starting:
            if self.stopped:
                raise InterruptedError("stopped before it began")
            process = subprocess.Popen(command, **options)
            self._running.add(process)
        with process:
            lines = deque((line.rstrip() for line in process.stdout or () if line.strip()), maxlen=100)
            code = process.wait()
        with self._starting:
            self._running.discard(process)
        return code, [*lines]

    def stop(self) -> None:
        """End all running processes."""
        with self._starting:
            self.stopped = True
            for process in self._running:
                with suppress(ProcessLookupError):  # it ended by itself
                    os.killpg(process.pid, signal.SIGTERM)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the recipe on command-line arguments."""
    with errors.one_line_errors(stopped="stopped; the same command goes on"):
        try:
            options = read_arguments(list(sys.argv[1:] if argv is None else argv), __doc__)
            if not options.table_only:
                with alone_in(options.results) as children:
                    claim(options)
                    run_all(options, children)
            leave_table(options)
        except KeyboardInterrupt:
            print("stopped; the same command goes on", file=sys.stderr)
            raise SystemExit(130) from None


def run_all(options: argparse.Namespace, children: Children) -> None:
    """Do the unfinished runs, `--jobs` at once: all tuning first, then the final runs."""
    methods = chosen_methods(options)
    tested = 0 if options.tuning_only else len(methods) * len(options.seeds)

    def count_tuning() -> int:
        return sum(len(tuning_runs(method, options)) for method in methods)

    stages = [
        tuning_runs,
        *([] if options.tuning_only else [final_runs]),
    ]  # rates of the second are known after the first
    tuned = count_tuning()
    done = sum(
        read_run(run, options) is not None for runs in stages for method in methods for run in runs(method, options)
    )
    print(
        f"{counted(tuned + tested)}: {tuned} to choose rates, {tested} with the test split; {done} finished", flush=True
    )
    timed = False
    remove_spent(options)  # of a comparison that ended before it did so
    for runs in stages:
        while unfinished := [
            run for method in methods for run in runs(method, options) if read_run(run, options) is None
        ]:
            for run, found in finish_all(unfinished, options, children):
                done += 1
                remove_spent(options)
                left, seconds = tuned + tested - done, found["seconds"]
                print(f"[{done}/{tuned + tested}] {run}: {outcome(found)}; {duration(seconds)}", flush=True)
                if left and not timed and not found["resumed"]:
                    print(f"{counted(left)} to go, at most about {duration(seconds * left / options.jobs)}", flush=True)
                    timed = True
            if (now := count_tuning()) > tuned:
                print(
                    f"{counted(now - tuned)} more: the best rate of a method is the lowest or highest of its own",
                    flush=True,
                )
                tuned = now
    with suppress(OSError):  # there is none, or it holds kept models
        (options.results / "scratch").rmdir()


def outcome(found: Mapping[str, Any]) -> str:
    """Return the scores of a run in words."""
    scores = f"balanced accuracy {tables.percent(validation_score(found))} in validation"
    if found["stage"] == "final":
        scores += f", {tables.percent(found['all_results']['test_balanced_accuracy'])} in test"
    return scores


def finish_all(
    runs: Sequence[Run], options: argparse.Namespace, children: Children
) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Do runs, `--jobs` at once, and yield each with its record; a failed one stops all."""

    def finish_or_stop(run: Run) -> dict[str, Any]:
        if children.stopped:
            raise InterruptedError("stopped before it began")
        try:
            return finish(run, options, children)
        except BaseException:
            children.stop()
            raise

    with ThreadPoolExecutor(options.jobs) as pool:
        futures = {pool.submit(finish_or_stop, run): run for run in runs}
        try:
            interrupted: BaseException | None = None
            for future in as_completed(futures):
                error = future.exception()
                if isinstance(
                    error, InterruptedError
                ):  # of a run that another's failure ended: that one has the reason
                    interrupted = error
                    continue
                yield futures[future], future.result()
            if interrupted is not None:
                raise interrupted
        except BaseException:
            children.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def finish(run: Run, options: argparse.Namespace, children: Children) -> dict[str, Any]:
    """Do one run, and keep its record as one small file."""
    with children.alone:
        training = children.trainings[run.training]
    with training:
        return finish_alone(run, options, children)


def finish_alone(run: Run, options: argparse.Namespace, children: Children) -> dict[str, Any]:
    """Do one run, while no other trains the same; where one has trained it before, its last checkpoint is the trained model."""
    folder = options.results / "scratch" / (run.name if options.keep_models else run.training)
    resumed = has_checkpoint(folder)
    trained_file = folder.with_name(f"{folder.name}.json")  # there once the training has come to its end
    trained = read_json(trained_file) if resumed and trained_file.is_file() else None
    begin = ["--resume_from_checkpoint", "last"] if resumed else ["--overwrite_output_dir"]
    start = time.monotonic()
    program = [*(shlex.split(options.launcher) if options.launcher else [sys.executable]), str(FINETUNE)]
    code, lines = children.launch([*program, *options.passed, *run.flags, "--output_dir", str(folder), *begin])
    failed = options.results / "scratch" / f"{run.name}.log"
    if code != 0:
        raise ChildProcessError(why_it_failed(run, code, lines, failed))
    failed.unlink(missing_ok=True)
    log = [json.loads(line) for line in (folder / run_folder.LOG_FILE).read_text(encoding="utf-8").splitlines()]
    scored = [entry for entry in log if entry.get("eval_balanced_accuracy") is not None]
    with children.alone:
        versions = environment()
    results = read_json(folder / run_folder.RESULTS_FILE)
    if trained is None:
        times = {name: value for name, value in results.items() if name.startswith("train_")}
        trained = {"resumed": resumed, "times": times}
        if not options.keep_models:
            run_folder.write_json(trained_file, trained)
    found = {
        "row": run.method.name,
        **{name: getattr(run, name) for name in ("stage", "learning_rate", "head_rate", "seed")},
        "flags": options.flags | by_name(run.flags),
        "all_results": results | trained["times"],
        "history": [[entry["epoch"], entry["eval_balanced_accuracy"]] for entry in scored],
        "collapse": last_collapse(log),
        "seconds": time.monotonic() - start,
        "resumed": trained["resumed"],  # its times are then those of the last part alone
        "jobs": options.jobs,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "versions": versions,
    }
    if validation_score(found) is None:
        raise ValueError(f"{run} had no validation rows, on which rates are chosen: set `validation_fraction`.")
    if run.stage == "final":
        with children.alone:
            found |= test_rows(run, folder, options.results)
    run_folder.write_json(options.results / "runs" / f"{run.name}.json", found)
    return found


def remove_spent(options: argparse.Namespace) -> None:
    """Remove the trained models from which no run will go on."""
    for name in set() if options.keep_models else spent_trainings(options):
        folder = options.results / "scratch" / name
        folder.with_name(f"{name}.json").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def why_it_failed(run: Run, code: int, lines: Sequence[str], file: Path) -> str:
    """Write the last lines of a failed run to a file; return a message with its error."""
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]  # launchers go on
    reason = (errors or [*lines] or ["it said nothing"])[-1].strip()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{run} failed (exit code {code}): {reason}\nIts last lines are in {file}. What is finished stays."


def last_collapse(log: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the last measures of neural collapse in a log, by sample, space and measure."""
    names = {f"{prefix}{name}" for prefix in comparison.COLLAPSE for name in comparison.COLLAPSE_MEASURES}
    measured = [{name: entry[f"eval_{name}"] for name in names if f"eval_{name}" in entry} for entry in log]
    return next((found for found in reversed(measured) if found), {})


def test_rows(run: Run, folder: Path, results: Path) -> dict[str, Any]:
    """Return which test rows a run had right; their labels are kept once, and must be the same in all runs."""
    if not (folder / run_folder.PREDICTIONS_FILE).is_file():
        raise ValueError(f"{run} left no predictions of test rows: the data set must have a test split.")
    with open(folder / run_folder.PREDICTIONS_FILE, newline="", encoding="utf-8") as stream:
        rows = sorted(csv.DictReader(stream), key=lambda row: int(row["row_id"]))
    labels = [row["label"] for row in rows]
    digest = hashlib.sha256(json.dumps(labels).encode()).hexdigest()[:12]
    file = results / LABELS_FILE
    if not file.is_file():
        run_folder.write_json(file, {"hash": digest, "labels": labels})
    elif (known := read_json(file))["hash"] != digest:
        raise ValueError(
            f"{run} has {len(rows)} test rows with labels of hash {digest}, and the runs before it {len(known['labels'])} with "
            f"hash {known['hash']}: did the data set change? Compare on the same rows, or in another --results folder."
        )
    correct = np.array([row["prediction"] == row["label"] for row in rows])
    return {"correct": comparison.pack_rows(correct), "test_labels": digest}


def has_checkpoint(folder: Path) -> bool:
    """Return whether an interrupted run can be resumed."""
    if not folder.is_dir():
        return False
    from etf_adapt.training.checkpoints import find_last_complete_checkpoint

    return find_last_complete_checkpoint(folder) is not None


@functools.cache
def environment() -> dict[str, Any]:
    """Return versions and hardware."""
    # By another process: one that asks for a device keeps part of it in use.
    program = (
        "import json; from etf_adapt.results import run_folder; print(json.dumps(run_folder.describe_environment()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {name: value for name, value in json.loads(done.stdout).items() if name != "processes"}  # of that process


def leave_table(options: argparse.Namespace) -> None:
    """Print the tables of the finished methods, and write them as Markdown and JSON."""
    finished, unfinished, validated = [], [], []
    for method in chosen_methods(options):
        both = ([read_run(run, options) for run in runs(method, options)] for runs in (tuning_runs, final_runs))
        tuned, final = ([found for found in runs if found is not None] for runs in both)
        if tuned and len(tuned) == len(tuning_runs(method, options)):
            validated.append((method, tuned))
        if options.tuning_only or len(final) < len(options.seeds):
            unfinished.append(method.name)
            continue
        labels = read_json(options.results / LABELS_FILE)["labels"]
        for found in final:
            found["correct"] = comparison.unpack_rows(found["correct"], len(labels))
        fixed = {name: getattr(method, name) for name in ("name", "title", "kind", "flags")}
        chosen = {name: final[0][name] for name in ("learning_rate", "head_rate")}
        tuning = {
            "tuning_runs": len(tuned),
            "tuning_validation": validation_score(tuned[comparison.best_of(tuned)]) if tuned else None,
        }
        finished.append({**fixed, **chosen, **tuning, "runs": final})
    if not (validated or finished):
        if options.tuning_only:
            raise ValueError("`tuning_only` (=True): no method of `rows` has a rate to tune: leave it out.")
        raise ValueError(
            f"`results` (={str(options.results)!r}) holds no finished method: run it without --table_only."
        )
    lists = {name: vars(options)[name] for name in LISTS} | ({"widen": [options.widen]} if options.widen else {})
    results = run_folder.public_value(str(options.results))
    made_by = command(results, lists, options.flags, public_launcher(options))
    first = command(results, lists, options.flags, public_launcher(options), tuning_only=True)
    if validated:
        versions = versions_of([run for _, runs in validated for run in runs])
        table = validation_table(validated, options.seeds[0], first, versions)
        (options.results / "validation.md").write_text(table, encoding="utf-8")
    if not finished:
        print(f"\n{terminal_validation(validated, str(options.results / 'validation.md'))}")
        scores = {method.name: validation_score(runs[comparison.best_of(runs)]) for method, runs in validated}
        print(f"\n{training_command(max(scores, key=scores.__getitem__), options)}")
        return
    summary = comparison.summarize(finished, np.unique(labels, return_inverse=True)[1])
    summary |= {
        "unfinished": unfinished,
        "edges": at_edges(validated),
        "versions": versions_of([run for method in finished for run in method["runs"]]),
    }
    below = caption(summary, lists, made_by)
    table = "\n\n".join([score_table(summary), cost_table(summary), *collapse_table(summary), below]) + "\n"
    run_folder.write_json(options.results / "table.json", summary)
    (options.results / "table.md").write_text(table, encoding="utf-8")
    print(f"\n{terminal_scores(summary, str(options.results / 'table.md'))}")
    best = max(summary["rows"], key=lambda method: method["validation"][0])
    print(f"\n{training_command(best['name'], options)}")


def training_command(name: str, options: argparse.Namespace) -> str:
    """Return the command that trains a method at its best rates, with a title; paths are as given, or public without."""
    run = final_runs(METHODS[name], options)[0]
    given = shlex.join(options.passed) or " ".join(
        f"--{flag} {values}".strip() for flag, values in options.flags.items()
    )
    words = [options.launcher or "python", "recipes/finetune.py", given, shlex.join(run.settings)]
    return f"To train the method of the best validation score, {name}:\n{' '.join(filter(None, words))}"


def versions_of(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the dates, versions and hardware of runs: by name all values."""
    known = [{"date": run["date"], **run["versions"]} for run in runs]
    names = dict.fromkeys(name for of_run in known for name in of_run)
    return {name: sorted({str(of_run[name]) for of_run in known if name in of_run}) for name in names}


@contextmanager
def alone_in(folder: Path) -> Iterator[Children]:
    """Lock a folder against other comparisons and the runs that they left behind."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"`results` (={str(folder)!r}) is in use by a comparison or a run that it left: wait, or end it."
            ) from error
        yield Children(lock)
    finally:
        os.close(lock)


def counted(runs: int) -> str:
    """Write a number of runs."""
    return f"{runs} run{'' if runs == 1 else 's'}"


def duration(seconds: float) -> str:
    """Format a time in the unit that suits it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the run ends too
    main()
