"""Kill, signal and damage small runs at random, resume each, and compare its final weights with those of an untouched run.

    OMP_NUM_THREADS=1 PYTHONPATH=.:tests python tests/survive.py --kills 100 --signals 50 --flips 1000

Runs are those of ``small_run`` with a checkpoint after every step, so that most kills fall into a save; half of them run on
two processes (gloo), of which one or both are killed, and one gets the signal. A run is hit several times before it ends. Of
the flipped bits, spread over the files of a newest checkpoint, each must be noticed, and every hundredth is resumed from.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file, save_file
from small_run import make_trainer, same, weights

from etf_adapt.results.claim import CLAIM_FILE
from etf_adapt.training import aligning
from etf_adapt.training.checkpoints import UNFINISHED, find_damage, list_checkpoints

SETTINGS = {
    "num_train_epochs": 3,
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "per_device_eval_batch_size": 4,
    "sampler": "sqrt",
    "disable_tqdm": True,
}
SIGNALS = (signal.SIGTERM, signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def start(folder: Path, processes: int) -> list[int]:
    """Fork the processes of a run, new or resumed; return their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [fork(folder, rank, processes, port) for rank in range(processes)]


def fork(folder: Path, rank: int, processes: int, port: int) -> int:
    """Train in a child, which shares the imports; it exits as a program would."""
    if child := os.fork():
        return child
    code = 1
    try:
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if processes > 1:
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            os.environ |= {name: str(value) for name, value in places.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        aligning.MIN_READ_ROWS = 1
        trainer = make_trainer(folder, **SETTINGS, per_device_train_batch_size=16 // processes)
        trainer.train(resume_from_checkpoint=(folder / CLAIM_FILE).exists())
        if rank == 0:
            save_file(weights(trainer), folder.with_suffix(".safetensors"))
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(children: list[int]) -> list[int]:
    """Wait for the end of the processes; return their exit codes.

    As a launcher does: where one process failed, such as by a signal before it joined the others, the rest are ended.
    """
    codes: dict[int, int] = {}
    deadline = float("inf")
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
                deadline = min(deadline, time.monotonic() + 20) if codes[child] else deadline
            elif time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[child] for child in children]


def run_to_end(folder: Path, processes: int) -> None:
    """Run or resume until the end, which must be reached."""
    codes = finish(start(folder, processes))
    assert codes == [0] * processes, f"{folder} ended with {codes}: see its log"


def hit(folder: Path, processes: int, seconds: float, kind: str, chance: random.Random) -> list[int]:
    """Start a run, send it a signal after so many seconds, and wait for its end; return the exit codes."""
    children = start(folder, processes)
    time.sleep(seconds)
    targets = children if kind == "kill" and chance.random() < 0.5 else [chance.choice(children)]
    for child in targets:
        os.kill(child, signal.SIGKILL if kind == "kill" else chance.choice(SIGNALS))
    if kind == "kill":  # as torchrun does where one process failed
        time.sleep(0.05)
        for child in children:
            os.kill(child, signal.SIGKILL)
    return finish(children)


def survive(work: Path, kind: str, count: int, processes: int, whole: float, chance: random.Random) -> None:
    """Hit runs ``count`` times, about six times each, and compare where they end."""
    hits = unfinished = runs = 0
    codes: list[int] = []
    while hits < count:
        folder = work / f"{kind}-{processes}-{runs}"
        runs += 1
        for _ in range(min(6, count - hits)):
            codes += hit(folder, processes, chance.uniform(0.2, 0.6) * whole, kind, chance)
            hits += 1
            newest = list_checkpoints(folder)[-1:] if folder.exists() else []
            unfinished += any(find_damage(path) == UNFINISHED for path in newest)
            if codes[-1] == 0:
                break  # it was faster
        run_to_end(folder, processes)
        final = load_file(folder.with_suffix(".safetensors"))
        assert same(load_file(work / f"whole-{processes}.safetensors"), final), folder
        shutil.rmtree(folder)
    by_code = ", ".join(f"{codes.count(code)} x {code}" for code in sorted({*codes}))
    print(
        f"{kind}, {processes} processes: {hits} hits on {runs} runs, {unfinished} in a save; exit codes {by_code}; all equal"
    )


def flip_bits(work: Path, count: int, chance: random.Random) -> None:
    """Flip bits of the newest checkpoint of a finished run, one at a time; each is noticed."""
    folder, resumed = work / "whole-1", 0
    final = load_file(work / "whole-1.safetensors")
    for number in range(count):
        newest = list_checkpoints(folder)[-1]
        file = chance.choice(sorted(path for path in newest.iterdir() if path.is_file()))
        sound = file.read_bytes()
        place = chance.randrange(len(sound))
        file.write_bytes(sound[:place] + bytes([sound[place] ^ 1 << chance.randrange(8)]) + sound[place + 1 :])
        assert find_damage(newest) is not None, f"{file}, byte {place}"
        if number % 100 == 0:
            run_to_end(folder, 1)
            assert same(final, load_file(work / "whole-1.safetensors")), file
            resumed += 1
        else:
            file.write_bytes(sound)
    print(f"{count} flipped bits: all noticed; {resumed} resumed from, all equal")


def main() -> None:
    """Run the hits that the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("kills", "signals", "flips", "seed"):
        parser.add_argument(f"--{name}", type=int, default=0)
    options = parser.parse_args()
    chance, began = random.Random(options.seed), time.monotonic()
    work = Path(tempfile.mkdtemp())
    for processes in (1, 2):
        begin = time.monotonic()
        run_to_end(work / f"whole-{processes}", processes)
        whole = time.monotonic() - begin
        survive(work, "kill", options.kills // 2, processes, whole, chance)
        survive(work, "signal", options.signals // 2, processes, whole, chance)
    flip_bits(work, options.flips, chance)
    print(f"{time.monotonic() - began:.0f} s")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
