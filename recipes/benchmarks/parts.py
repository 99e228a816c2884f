r"""Time single parts on synthetic rows, one thread; each line is printed as it is measured.

    python recipes/benchmarks/parts.py head --classes 1000 10000 100000
    python recipes/benchmarks/parts.py head --classes 1000000 --only ours --rounds 1
    python recipes/benchmarks/parts.py head --classes 1000 --profile
    python recipes/benchmarks/parts.py realign --classes 1000 10000 --width 768
    python recipes/benchmarks/parts.py alignment --rows 1000000 --classes 10000 --width 768
    python recipes/benchmarks/parts.py draw --rows 10000000 --classes 10000
    python recipes/benchmarks/parts.py calibration --rows 24426 --classes 8142
    python recipes/benchmarks/parts.py start

CPU seconds, medians of several rounds in turns; peak memory is of the process, so one case a process where that counts.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

BATCH = 128


def main() -> None:
    """Time the part that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["head", "realign", "alignment", "draw", "calibration", "start"])
    parser.add_argument("--classes", nargs="+", type=int, default=[1000])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["ours", "trained", "products"], help="one of `head`, for its memory")
    parser.add_argument(
        "--profile", action="store_true", help="of `head`: print where the time of ours goes, by operation"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = {"head": time_head, "realign": time_realign, "alignment": time_alignment}
    parts |= {"draw": time_draw, "calibration": time_calibration}
    for num_classes in options.classes:
        parts.get(options.part, time_start)(num_classes, options)


def cpu_seconds(call: Callable[[], Any], times: int = 1) -> float:
    """Return the CPU seconds of a call, the mean of several."""
    start = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - start) / times


def in_turns(rounds: int, times: int, **calls: Callable[[], Any]) -> dict[str, float]:
    """Return the median CPU seconds of calls that take turns, after one round that is not counted."""
    found = [{name: cpu_seconds(call, times) for name, call in calls.items()} for _ in range(rounds + 1)][1:]
    return {name: statistics.median(one[name] for one in found) for name in calls}


def peak_gb() -> float:
    """Return the peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def time_head(num_classes: int, options: argparse.Namespace) -> None:
    """Time head, loss and optimizer step: ours with rows left out, a linear layer with AdamW, the two products alone."""
    from etf_adapt.heads.alignment import keeps_rows
    from etf_adapt.heads.layers import LinearHead
    from etf_adapt.heads.seen_rows import Form, SeenRows
    from etf_adapt.heads.training_logits import TrainingLogits
    from etf_adapt.losses.registry import make_loss

    features, ids = torch.randn(BATCH, options.width), torch.arange(BATCH)
    labels = torch.randint(BATCH // 4, (BATCH,))  # of some rows each, so that they are left out
    fixed = LinearHead(options.width, num_classes, trainable=False)
    left_out = TrainingLogits({"head": fixed})
    if keeps_rows(fixed.weight):
        means = torch.randn(num_classes, options.width)
        left_out.rows["head"] = SeenRows.of(ids, labels, features, means, Form("whitened", 1.0, True, 1.0))
    left_out.notes = False  # which keep what is read until the head is set anew
    counts = torch.randint(1, 100, (num_classes,)).tolist()
    loss = make_loss({"name": "margin_dot_regression"}, class_counts=counts)

    def ours() -> None:
        inputs = features.clone().requires_grad_(True)
        with left_out.of(labels, ids):
            logits = fixed(inputs)
        loss(logits, labels).backward()

    linear = torch.nn.Linear(options.width, num_classes if options.only in (None, "trained") else 1)
    optimizer = torch.optim.AdamW(linear.parameters())

    def trained() -> None:
        inputs = features.clone().requires_grad_(True)
        optimizer.zero_grad()
        F.cross_entropy(linear(inputs), labels).backward()
        optimizer.step()

    weight, gradient = fixed.weight.detach(), torch.randn(BATCH, num_classes)

    def products() -> None:
        _ = features @ weight.T, gradient @ weight

    def layer() -> None:
        fixed(features.clone().requires_grad_(True)).backward(gradient)

    times = max(1, 100_000 // num_classes)
    if options.profile:
        profile(times, ours=ours, layer=layer, products=products)
        return
    calls = {"ours": ours, "trained": trained, "products": products}
    if options.only:
        milliseconds = 1e3 * in_turns(options.rounds, times, call=calls[options.only])["call"]
        print(num_classes, f"{options.only}: {milliseconds:.0f} ms, peak {peak_gb():.2f} GB", flush=True)
        return
    found = in_turns(options.rounds, times, **calls)
    print(num_classes, {name: f"{1e3 * value:.2f} ms" for name, value in found.items()}, end=" ")
    print(f"ours / products {found['ours'] / found['products']:.2f}", flush=True)


def profile(times: int, **calls: Callable[[], Any]) -> None:
    """Print the operations of ours, CPU microseconds a call and in shares of what the two products cost."""
    found = in_turns(5, times, **calls)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        for _ in range(times):
            calls["ours"]()
    rows = profiler.key_averages(group_by_input_shape=True)
    whole = found["products"] * 1e6
    print({name: f"{value * 1e6:.0f} ({value * 1e6 / whole:.2f})" for name, value in found.items()}, flush=True)
    for row in sorted(rows, key=lambda row: -row.self_cpu_time_total)[:20]:
        shapes = [shape for shape in row.input_shapes if shape]
        microseconds = row.self_cpu_time_total / times
        print(
            f"{microseconds:7.0f} {microseconds / whole:6.2f} {row.count / times:4.0f} x {row.key} {shapes}", flush=True
        )


def time_realign(num_classes: int, options: argparse.Namespace) -> None:
    """Time what an alignment without a pass costs a step: the rows noted, and the head set anew every so many steps."""
    from etf_adapt.heads.layers import ETFHead
    from etf_adapt.heads.seen_rows import Form, SeenRows

    steps = max(10, num_classes // 100)  # as AligningTrainer.realign_steps
    features, labels = torch.randn(options.rows, options.width), torch.arange(options.rows) % num_classes
    ids, form = torch.arange(options.rows), Form("whitened", 1.0, True, 1.0)
    rows = SeenRows.of(ids, labels, features, torch.zeros(num_classes, options.width), form)
    head, batches = ETFHead(options.width, num_classes), torch.randperm(options.rows).split(BATCH)

    def realign() -> None:
        for step in range(steps):
            rows.note(batches[step], features[: len(batches[step])])
        rows.realign(head)

    weight, gradient = head.weight.detach(), torch.randn(BATCH, num_classes)

    def products() -> None:
        for _ in range(steps):
            _ = features[:BATCH] @ weight.T, gradient @ weight

    found = in_turns(options.rounds, 1, realign=realign, products=products)
    milliseconds = {name: f"{1e3 * value / steps:.2f} ms" for name, value in found.items()}
    print(num_classes, f"a step, of {steps}:", milliseconds, f"{peak_gb():.2f} GB", flush=True)


def time_alignment(num_classes: int, options: argparse.Namespace) -> None:
    """Time an alignment of features that cost nothing."""
    from etf_adapt import align_head, swap_head

    class Identity(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(options.width, num_classes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.head(x)
            return logits

    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(num_classes, options.width, generator=generator)
    labels = torch.randint(num_classes, (options.rows // BATCH * BATCH,), generator=generator)
    labels[:num_classes] = torch.arange(num_classes)

    class Batches:
        def __len__(self) -> int:
            return len(labels) // BATCH

        def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
            for ids in torch.arange(len(labels)).split(BATCH):
                x = centers[labels[ids]] + 2 * torch.randn(len(ids), options.width)
                yield {"x": x, "labels": labels[ids], "row_id": ids}

    model = swap_head(Identity(), num_classes, head="head")
    before, walk = peak_gb(), cpu_seconds(lambda: list(map(len, Batches())))
    counts = torch.bincount(labels, minlength=num_classes)
    whole = cpu_seconds(lambda: align_head(model, Batches(), class_counts=counts))
    print(f"{len(labels):,} rows, {num_classes:,} classes, width {options.width}: {whole - walk:.1f} s, ", end="")
    print(f"peak {peak_gb():.2f} GB, {before:.2f} GB before", flush=True)


def time_draw(num_classes: int, options: argparse.Namespace) -> None:
    """Time the class counts and an epoch's balanced draw of a label column."""
    from etf_adapt import ClassBalancedSampler, class_counts

    labels = np.random.default_rng(0).integers(num_classes, size=options.rows)
    before = peak_gb()
    counted = cpu_seconds(lambda: class_counts(labels, num_classes=num_classes))
    sampler = ClassBalancedSampler(labels, batch_size=BATCH)
    drawn = cpu_seconds(lambda: sampler.rows(0))
    print(f"{options.rows:,} rows: counts {counted:.2f} s, an epoch's draw {drawn:.2f} s, ", end="")
    print(f"{(peak_gb() - before) / (labels.nbytes / 2**30):.1f} x the label column", flush=True)


def time_calibration(num_classes: int, options: argparse.Namespace) -> None:
    """Time the fit of logit scale and prior adjustment."""
    from etf_adapt.metrics.calibration import fit_prior_adjustment

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(num_classes, (options.rows,), generator=generator)
    logits = torch.randn(options.rows, num_classes, generator=generator)
    logits[torch.arange(options.rows), labels] += 4
    counts = (1000.0 * 100.0 ** (-torch.arange(num_classes) / num_classes)).int()
    before = peak_gb()
    seconds = cpu_seconds(lambda: fit_prior_adjustment(logits, labels, counts))
    print(f"{options.rows:,} rows, {num_classes:,} classes: {seconds:.1f} s, ", end="")
    print(f"{1 + (peak_gb() - before) / (logits.nbytes / 2**30):.2f} x the logits", flush=True)


def time_start(_: int, options: argparse.Namespace) -> None:
    """Time what runs before anything else does: wall seconds of whole processes, medians in turns."""
    commands = {
        "python": "pass",
        "import etf_adapt": "import etf_adapt",
        "finetune --help": "from etf_adapt.commands.finetune import main; main(['--help'])",
        "import torch, transformers.Trainer": "import torch; from transformers import Trainer",
        "import etf_adapt.ETFTrainer": "from etf_adapt import ETFTrainer",
        "finetune of digits, to the first step": """
import os, tempfile, etf_adapt
etf_adapt.ETFTrainer.training_step = lambda *inputs: os._exit(0)
with tempfile.TemporaryDirectory() as folder:
    etf_adapt.finetune(model='micro', dataset='digits', output_dir=folder)
""",
    }
    found: dict[str, list[float]] = {name: [] for name in commands}
    for _round in range(options.rounds):
        for name, code in commands.items():
            start = time.monotonic()
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
            found[name].append(time.monotonic() - start)
    for name, seconds in found.items():
        print(f"{name}: {statistics.median(seconds):.3f} s", flush=True)


if __name__ == "__main__":
    main()
