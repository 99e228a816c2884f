"""Laws of a folder's claim: of two processes one has it, the death of a process frees it, and what it left is its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from etf_adapt.errors import OutputFolderError
from etf_adapt.results import claim as claims
from etf_adapt.results.claim import CLAIM_FILE, check_claim, claim, read_run, release

HOLD = "import sys, time; from etf_adapt.results.claim import claim; claim(sys.argv[1]); print('held', flush=True); {}"


def hold(folder, then="time.sleep(60)"):
    """Claim a folder in another process, which is then there, or has ended."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(then), str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_belongs_to_one_running_process_however_that_ends(tmp_path):
    # Its forked child outlives it, as workers of data loaders do for seconds, and holds nothing.
    child = hold(
        tmp_path, "import os; os.fork() or (print('forked', flush=True), time.sleep(20), exit()); time.sleep(60)"
    )
    try:
        assert child.stdout.readline() == "forked\n"
        with pytest.raises(OutputFolderError, match=rf"is being written by another run \(process {child.pid}\)"):
            claim(tmp_path)
        with pytest.raises(OutputFolderError, match="being written"):
            claim(tmp_path, resume=True)
        left = read_run(tmp_path)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert claim(tmp_path, resume=True) == left
    release(tmp_path)


@pytest.mark.slow
def test_of_processes_that_begin_at_once_one_has_the_folder(tmp_path):
    start = time.time() + 1.5
    program = (
        "import sys, time; from etf_adapt.results.claim import claim\n"
        f"time.sleep(max(0, {start} - time.time())); claim(sys.argv[1]); print('held', flush=True); time.sleep(1.5)"
    )
    several = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        for _ in range(4)
    ]
    assert [process.communicate()[0] for process in several].count(b"held\n") == 1


def test_a_new_run_is_another_and_a_resumed_one_the_same(tmp_path):
    first = claim(tmp_path)
    release(tmp_path)
    assert read_run(tmp_path) == first == claim(tmp_path, resume=True, run="other")
    assert claim(tmp_path) != first
    release(tmp_path)
    assert tmp_path not in claims._held
    (tmp_path / CLAIM_FILE).write_text("{")
    assert read_run(tmp_path) is None and claim(tmp_path, resume=True, run="theirs") == "theirs"
    release(tmp_path)


def test_a_folder_that_was_made_anew_under_a_run_is_not_written_to(tmp_path):
    run = claim(tmp_path / "run")
    check_claim(tmp_path / "run")
    (tmp_path / "run" / CLAIM_FILE).unlink()
    check_claim(tmp_path / "run")  # nobody else has taken it
    assert read_run(tmp_path / "run") == run
    (tmp_path / "run" / CLAIM_FILE).unlink()
    hold(tmp_path / "run", "pass").wait()
    with pytest.raises(OutputFolderError, match="was taken by another run since"):
        check_claim(tmp_path / "run")
    release(tmp_path / "run")


def test_without_locks_the_last_claim_holds_and_ends_the_run_before_it(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    run = claim(tmp_path)
    check_claim(tmp_path)
    first = claims._held.pop(tmp_path)  # as if by another process
    assert claim(tmp_path, resume=True) == run
    release(tmp_path)
    claims._held[tmp_path] = first
    with pytest.raises(OutputFolderError, match="was taken by another run since"):
        check_claim(tmp_path)
    release(tmp_path)


def test_a_claim_tells_no_machine_and_is_replaced_whole(tmp_path):
    claim(tmp_path)
    size = (tmp_path / CLAIM_FILE).stat().st_size
    assert set(json.loads((tmp_path / CLAIM_FILE).read_text())) == {"run", "claim", "process"}
    claim(tmp_path)
    release(tmp_path)
    assert (tmp_path / CLAIM_FILE).stat().st_size == size
