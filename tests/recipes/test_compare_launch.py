"""The comparison's runs as processes: their last words, and what becomes of them when it is stopped."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes"))

import compare  # noqa: E402
import compare_methods  # noqa: E402
import compare_runs  # noqa: E402


class TestLaunch:
    def test_the_last_words_are_the_message_even_if_a_launcher_speaks_after_it(self, tmp_path):
        said = "import sys; print('error: bad flag', file=sys.stderr, flush=True); print('Traceback'); sys.exit(2)"
        programs = {said: (2, "bad flag"), "print('one'); print('two')": (0, "two"), "exit(3)": (3, "it said nothing")}
        run, file = (
            compare_runs.Run(compare_methods.METHODS["etf"], "final", 0.1, None, 0),
            tmp_path / "scratch" / "run.log",
        )
        lock = os.open(tmp_path, os.O_RDONLY)
        for program, (code, last) in programs.items():
            left, lines = compare.Children(lock).launch([sys.executable, "-c", program])
            assert left == code
            assert f"(exit code {code}): {last}\n" in compare.why_it_failed(run, code, lines, file)
        os.close(lock)

    @pytest.mark.skipif(
        not Path("/proc/self/task").is_dir(), reason="needs Linux, which tells the children of a process"
    )
    @pytest.mark.parametrize("jobs", [1, 2])
    def test_runs_left_behind_keep_the_folder_and_those_that_are_stopped_do_not(self, jobs, tmp_path):
        program = f"""
import argparse, signal, sys
sys.path.insert(0, {str(ROOT / "recipes")!r})
from pathlib import Path
import compare
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
compare.finish = lambda run, options, children: children.launch([sys.executable, "-c", "import time; time.sleep(60)"])
with compare.alone_in(Path({str(tmp_path / "r")!r})) as children:
    print("ready", flush=True)
    list(compare.finish_all("abc", argparse.Namespace(jobs={jobs}), children))
"""
        for kill, held in ((signal.SIGTERM, False), (signal.SIGKILL, True)):
            with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
                parent.stdout.readline()
                children, start = self.children_of(parent.pid, jobs), time.monotonic()
                parent.send_signal(kill)
            assert time.monotonic() - start < 30, "it waits for the run instead of ending it"
            lock = os.open(tmp_path / "r", os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                assert not held
            except BlockingIOError:
                assert held
                for child in children:
                    os.kill(child, signal.SIGKILL)
            finally:
                os.close(lock)

    @staticmethod
    def children_of(parent: int, number: int) -> list[int]:
        for _ in range(200):
            tasks = Path(f"/proc/{parent}/task").glob("*/children")  # each thread has its own
            found = [int(child) for task in tasks for child in task.read_text().split()]
            if len(found) == number:
                time.sleep(0.1)
                return found
            time.sleep(0.05)
        raise AssertionError(f"{number} children were expected")
