"""Laws of checkpoint folders: complete or known not to be; and nothing is deleted or overwritten that was not written here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from etf_adapt.errors import DiskFullError
from etf_adapt.results.claim import claim, read_run, release
from etf_adapt.training import checkpoints
from etf_adapt.training.checkpoints import (
    STATE_NAME,
    begin_checkpoint,
    complete_checkpoint,
    find_damage,
    find_last_complete_checkpoint,
    list_checkpoints,
    read_state,
    remove_checkpoints,
    resolve_checkpoint,
    rotate_checkpoints,
)


def write(run, step, *, complete=True):
    folder = run / f"checkpoint-{step}"
    begin_checkpoint(folder)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "shards").mkdir(exist_ok=True)
    (folder / "shards" / "0").write_bytes(b"shard")
    if complete:
        complete_checkpoint(folder, {"step": step})
    return folder


def is_complete(folder):
    return find_damage(folder) is None


def flip(file, *, byte=3):
    content = bytearray(file.read_bytes())
    content[byte] ^= 1
    file.write_bytes(content)


def names(run):
    return [path.name for path in list_checkpoints(run)]


def test_a_checkpoint_is_complete_only_between_its_end_and_the_next_beginning(tmp_path):
    folder = write(tmp_path, 5, complete=False)
    assert not is_complete(folder)
    complete_checkpoint(folder, {"misses": 2})
    assert is_complete(folder) and read_state(folder) == {"misses": 2}
    begin_checkpoint(folder)
    assert not is_complete(folder)
    assert not is_complete(tmp_path / "absent")


@pytest.mark.parametrize("file", ["model.safetensors", "shards/0"])
@pytest.mark.parametrize("harm", ["missing", "cut off"])
def test_a_harmed_checkpoint_is_not_complete(tmp_path, file, harm):
    folder = write(tmp_path, 5)
    if harm == "missing":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(b"w")
    assert not is_complete(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "shards/0", STATE_NAME])
def test_each_flipped_bit_is_noticed_and_the_file_named(tmp_path, file):
    folder = write(tmp_path, 5)
    assert find_damage(folder) is None
    size = (folder / file).stat().st_size
    for place in range(0, 8 * size, 1 if size < 10 else 7):
        sound = (folder / file).read_bytes()
        (folder / file).write_bytes((int.from_bytes(sound, "big") ^ 1 << place).to_bytes(size, "big"))
        assert file in (find_damage(folder) or ""), place
        (folder / file).write_bytes(sound)


def test_what_is_damaged_is_passed_over_by_name(tmp_path):
    said = []
    for step in (5, 10, 15, 20, 25):
        write(tmp_path, step)
    flip(tmp_path / "checkpoint-10" / "model.safetensors")
    (tmp_path / "checkpoint-15" / "trainer_state.json").touch()
    (tmp_path / "checkpoint-15" / STATE_NAME).unlink()
    (tmp_path / "checkpoint-20" / "shards" / "0").unlink()
    begin_checkpoint(tmp_path / "checkpoint-25")
    with pytest.raises(
        FileNotFoundError, match=r"checkpoint-20\) is .*: shards/0 is missing; the newest .* is .*-5\.$"
    ):
        resolve_checkpoint(tmp_path, str(tmp_path / "checkpoint-20"))
    assert resolve_checkpoint(tmp_path, True, tell=said.append) == tmp_path / "checkpoint-5"
    assert said == [
        "checkpoint-25 is passed over: it was not finished.",
        "checkpoint-20 is passed over: shards/0 is missing.",
        "checkpoint-15 is passed over: etf_state.json is missing; it is kept as aside-1-checkpoint-15.",
        "checkpoint-10 is passed over: model.safetensors is damaged or was changed.",
    ]
    write(tmp_path, 15)  # the run comes to it again


def test_nothing_of_another_run_is_taken(tmp_path):
    claim(tmp_path / "mine")
    complete_checkpoint(write(tmp_path / "mine", 5, complete=False), {}, run=read_run(tmp_path / "mine"))
    complete_checkpoint(write(tmp_path / "mine", 10, complete=False), {}, run="another")
    shutil.copytree(tmp_path / "mine", tmp_path / "copy")
    for folder in (tmp_path / "mine", tmp_path / "copy"):
        said = []
        with pytest.raises(FileNotFoundError, match=r"checkpoint-10\) .* belongs to another run"):
            resolve_checkpoint(folder, folder / "checkpoint-10")
        assert resolve_checkpoint(folder, True, tell=said.append) == folder / "checkpoint-5"
        assert said == ["checkpoint-10 is passed over: it belongs to another run; it is kept as aside-1-checkpoint-10."]
    release(tmp_path / "mine")


@pytest.mark.parametrize("left", ["nothing", "an empty folder", "a draft of the mark", "half a checkpoint"])
def test_a_run_that_was_killed_before_it_finished_a_checkpoint_starts_anew(tmp_path, left):
    claim(tmp_path)
    release(tmp_path)
    folder = tmp_path / "checkpoint-5"
    if left == "half a checkpoint":
        write(tmp_path, 5, complete=False)
    elif left != "nothing":
        folder.mkdir()
    if left == "a draft of the mark":
        (folder / f".{STATE_NAME}.123").touch()
    said = []
    assert resolve_checkpoint(tmp_path, True, tell=said.append) is None
    assert "ended before it finished a checkpoint: it starts anew" in said[-1]
    write(tmp_path, 5)


def test_rotation_after_a_fallback_keeps_what_is_newly_written(tmp_path):
    for step in (1, 2, 3, 9):
        write(tmp_path, step)
    flip(tmp_path / "checkpoint-9" / "model.safetensors")
    rotate_checkpoints(tmp_path / "checkpoint-3", 1)
    assert names(tmp_path) == ["checkpoint-3"]


def test_only_a_folder_of_a_run_is_resumed(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no sound checkpoint"):
        resolve_checkpoint(tmp_path, True)
    flip(write(tmp_path, 5) / "model.safetensors")
    with pytest.raises(
        FileNotFoundError, match=r"no sound .*--overwrite_output_dir"
    ):  # what is left of it may be worth days
        resolve_checkpoint(tmp_path, True)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"complete": true}', '{"complete": true, "files": {"absent": 1}}'])
def test_a_mark_that_says_nothing_is_no_mark(tmp_path, content):
    folder = write(tmp_path, 5)
    (folder / STATE_NAME).write_text(content)
    assert not is_complete(folder)


def test_the_newest_complete_one_is_found_by_number(tmp_path):
    for step in (9, 100, 20):
        write(tmp_path, step)
    write(tmp_path, 300, complete=False)
    assert names(tmp_path) == ["checkpoint-9", "checkpoint-20", "checkpoint-100", "checkpoint-300"]
    assert find_last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    assert resolve_checkpoint(tmp_path, True) == tmp_path / "checkpoint-100"
    assert resolve_checkpoint(tmp_path, str(tmp_path / "checkpoint-100")) == tmp_path / "checkpoint-100"
    assert find_last_complete_checkpoint(tmp_path / "absent") is None


def test_a_run_does_not_begin_in_anothers_folder(tmp_path):
    assert resolve_checkpoint(tmp_path, None) is None
    for step, complete in ((5, False), (6, True)):
        write(tmp_path, step, complete=complete)
        with pytest.raises(ValueError, match=f"holds checkpoint-{step} of an earlier run: go on with it"):
            resolve_checkpoint(tmp_path, None)


def test_a_run_goes_on_from_its_newest_checkpoint_only(tmp_path):
    write(tmp_path, 5)
    write(tmp_path, 10)
    with pytest.raises(ValueError, match="holds checkpoint-10, which is newer than checkpoint-5"):
        resolve_checkpoint(tmp_path, tmp_path / "checkpoint-5")
    with pytest.raises(
        FileNotFoundError,
        match=r"checkpoint-7\) is no complete checkpoint: there is no such folder; the newest complete one is .*-10",
    ):
        resolve_checkpoint(tmp_path, tmp_path / "checkpoint-7")
    (tmp_path / "checkpoint-15").mkdir()
    (tmp_path / "checkpoint-15" / "mine.txt").touch()
    with pytest.raises(ValueError, match="holds checkpoint-15"):
        resolve_checkpoint(tmp_path, True)


def test_what_was_not_written_here_is_neither_written_over_nor_deleted(tmp_path):
    foreign = tmp_path / "checkpoint-2"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("mine")
    (tmp_path / "checkpoint-best").mkdir()
    with pytest.raises(ValueError, match="holds something that this run did not write"):
        begin_checkpoint(foreign)
    for step in (1, 3, 4):
        write(tmp_path, step)
    rotate_checkpoints(tmp_path / "checkpoint-4", 1)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    remove_checkpoints(tmp_path)
    assert names(tmp_path) == ["checkpoint-2"]
    assert (foreign / "mine.txt").read_text() == "mine" and (tmp_path / "checkpoint-best").is_dir()


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in (1, 2, 3, 4, 5):
        write(tmp_path, step)
    rotate_checkpoints(tmp_path / "checkpoint-5", None)
    rotate_checkpoints(tmp_path / "checkpoint-5", 0)
    assert len(names(tmp_path)) == 5
    rotate_checkpoints(tmp_path / "checkpoint-5", 3, keep=str(tmp_path / "checkpoint-2"))
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    rotate_checkpoints(tmp_path / "checkpoint-5", 1, keep=str(tmp_path / "checkpoint-2"))
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-5"]


def test_a_half_deleted_checkpoint_is_known_as_incomplete(tmp_path, monkeypatch):
    folder = write(tmp_path, 1)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        remove_checkpoints(tmp_path)
    assert json.loads((folder / STATE_NAME).read_text())["complete"] is False


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_is_full_is_known_by_what_torch_says_of_it(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    with (
        pytest.raises(DiskFullError, match="checkpoint-1 cannot be written"),
        checkpoints.room_for(tmp_path / "checkpoint-1", output_dir=tmp_path, count_bytes=lambda: 9),
    ):
        torch.save({"a": torch.zeros(2**20)}, "/dev/full")
