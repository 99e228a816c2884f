"""The output folder of a run: claimed before training, and what to type to go on with it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress

from etf_adapt.errors import OutputFolderError
from etf_adapt.results import claim, run_folder


def claim_output_dir(folder: str, *, is_named: bool, resume: bool, overwrite: bool) -> str:
    """Take an output folder, and empty it if asked for; return it, numbered where a default name is taken."""
    from etf_adapt.training.checkpoints import find_last_complete_checkpoint, read_run_of, remove_checkpoints

    if is_named:
        claim.claim(folder, resume=resume, run=read_run_of(find_last_complete_checkpoint(folder)))
        if overwrite:
            remove_checkpoints(folder)
            run_folder.remove_run_files(folder)
        return folder
    for path in run_folder.folders_of_name(folder):
        with suppress(OutputFolderError):
            run_folder.check_output_dir(path)
            claim.claim(path)
            run_folder.check_output_dir(path)  # another run may have ended in between
            break
        claim.release(path)
    if str(path) != folder:
        print(
            f"output_dir: {path}, as {folder} holds another run (--resume_from_checkpoint last goes on with the newest)"
        )
    return str(path)


def resume_command(argv: Sequence[str], output_dir: str) -> str:
    """Return the command that goes on with a run; of flags given twice the last wins."""
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    program = ["etf-adapt"] if processes == "1" else ["torchrun", "--nproc_per_node", processes, "-m", "etf_adapt"]
    if sys.argv[0].endswith("recipes/finetune.py"):
        program = ["python", sys.argv[0]] if processes == "1" else [*program[:3], sys.argv[0]]
    else:
        program.append("finetune")
    overwrite = ["--overwrite_output_dir", "false"] if any("overwrite" in word for word in argv) else []
    flags = [*argv, *overwrite, "--output_dir", output_dir, "--resume_from_checkpoint", "last"]
    return shlex.join([*program, *flags])
