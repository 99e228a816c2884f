"""Which runs a comparison does: rates beyond the given ones, and one training for all that train the same."""

from __future__ import annotations

import json
from pathlib import Path

import compare
import pytest
from fake_runs import ADJUSTED, SHARED, TWO_ROWS, FakeRuns, files

from etf_adapt.training.checkpoints import begin_checkpoint, complete_checkpoint


class TestRates:
    def test_rates_are_widened_until_the_best_is_an_inner_one(self, runs, capsys):
        narrow = [*TWO_ROWS[:2], "--rows", "etf_dr", "linear_ce", "--seeds", "0", "--head_rates", "10"]
        narrow += ["--learning_rates", "1e-3", "3.16e-4"]
        compare.main([*narrow, "--tuning_only", *SHARED])
        assert len(runs.calls) == 4 and "lowest or highest tried for etf_dr, linear_ce" in capsys.readouterr().out
        assert "lowest or highest tried for etf_dr, linear_ce" in Path("r/validation.md").read_text()
        compare.main([*narrow, "--widen", "5", *SHARED])  # the best is 1e-4, and for the head ten times it
        tried = {call["learning_rate"] for call in runs.calls if call["head"] == "etf"}
        assert tried == {"0.001", "0.000316", "9.99e-05", "3.16e-05"}
        assert [call["evaluate_test"] for call in runs.calls] == ["false"] * 8 + ["true"] * 2
        assert [call["learning_rate"] for call in runs.calls[-2:]] == ["9.99e-05"] * 2
        said = capsys.readouterr().out
        assert "2 runs more" in said and "[6/8]" in said and "[10/10]" in said and "lowest or highest tried" not in said
        table = Path("r/table.md").read_text()
        assert "up to 5 more" in table and "--widen 5" in table and "tries further" not in table
        compare.main(["--results", "r", "--table_only"])
        assert len(runs.calls) == 10 and Path("r/table.md").read_text() == table

    def test_widening_ends(self, runs):
        compare.main(
            [*TWO_ROWS[:6], "0", "--learning_rates", "0.01", "0.001", "--head_rates", "10", "--widen", "1", *SHARED]
        )
        assert sum(call["head"] == "linear" and call["evaluate_test"] == "false" for call in runs.calls) == 3
        compare.main(["--results", "q", *TWO_ROWS[2:6], "0", "--learning_rates", "0.01", "--widen", "3", *SHARED])
        assert not compare.read_json(Path("q/table.json"))["edges"], "one rate alone has no direction"


WITH_REFIT = ["--results", "r", "--rows", "cosine_la", "cosine_la_refit", "--seeds", "0", "1", "--head_rates", "10"]
RATES = ["--learning_rates", "1e-3", "1e-4"]


def trained(runs: FakeRuns) -> list[str]:
    """Return where runs trained from the start."""
    return [Path(call["output_dir"]).name for call in runs.calls if "resume_from_checkpoint" not in call]


class TestTraining:
    @pytest.fixture(autouse=True)
    def leave_checkpoints(self, runs):
        runs.leaves_checkpoints = True

    def test_what_trains_the_same_trains_once(self, runs):
        compare.main([*WITH_REFIT, *RATES, *SHARED])
        assert len(runs.calls) == len(files()) == 8
        assert len(trained(runs)) == len(set(trained(runs))) == 3, "two rates, and the second seed"

    def test_times_are_those_of_the_training(self, runs):
        compare.main([*WITH_REFIT, *RATES, *SHARED])
        records = [json.loads(file.read_text()) for file in Path("r/runs").iterdir()]
        assert {record["all_results"]["train_runtime"] for record in records} == {3.0}
        assert not any(record["resumed"] for record in records)

    def test_no_trained_model_is_left(self, runs):
        compare.main([*WITH_REFIT, *RATES, *SHARED])
        assert not Path("r/scratch").exists()

    def test_of_a_tuned_method_only_the_best_model_is_kept(self, runs):
        runs.stop_at = 5  # the first with the test split
        with pytest.raises(SystemExit):
            compare.main(["--results", "r", "--rows", "etf", "etf_dr", "--seeds", "0", *RATES, *SHARED])
        kept = [folder.name for folder in Path("r/scratch").iterdir() if folder.is_dir()]
        assert len(kept) == 2 and all("learning_rate_0.0001" in name for name in kept)

    def test_an_interrupted_training_is_whole_only_at_its_end(self, runs):
        runs.stop_at = 1
        with pytest.raises(SystemExit):
            compare.main([*WITH_REFIT, *RATES, *SHARED])
        first = Path(runs.calls[0]["output_dir"])
        begin_checkpoint(first / "checkpoint-5")
        complete_checkpoint(first / "checkpoint-5", {})
        compare.main([*WITH_REFIT, *RATES, *SHARED])
        records = {file.stem: json.loads(file.read_text()) for file in Path("r/runs").iterdir()}
        partly = {name for name, record in records.items() if record["resumed"]}
        rate = runs.calls[0]["learning_rate"]
        assert partly == {name for name in records if f"lr{rate}-" in name and "seed0" in name}

    def test_kept_models_train_by_themselves(self, runs):
        compare.main([*WITH_REFIT, *RATES, "--keep_models", *SHARED])
        kept = {path.name for path in Path("r/scratch").iterdir()}
        assert len(trained(runs)) == 8 and kept == {name.removesuffix(".json") for name in files()}

    def test_without_checkpoints_each_trains(self, runs):
        runs.leaves_checkpoints = False
        compare.main([*WITH_REFIT, *RATES, *SHARED])
        assert len(trained(runs)) == 8 and not Path("r/scratch").exists()

    def test_several_at_once_do_not_train_the_same_side_by_side(self, runs):
        compare.main([*WITH_REFIT, *RATES, "--jobs", "3", *SHARED])
        assert len(trained(runs)) == len(set(trained(runs))) == 3

    def test_models_of_other_rows_are_left_alone(self, runs):
        other = Path("r/scratch/head_linear-loss_focal-learning_rate_0.001-seed_0-head_learning_rate_0.01")
        begin_checkpoint(other / "checkpoint-5")
        Path("r/settings.json").write_text(json.dumps({"flags": compare.by_name(ADJUSTED)}))
        compare.main([*WITH_REFIT, *RATES, *SHARED])
        assert [path.name for path in Path("r/scratch").iterdir()] == [other.name]


@pytest.mark.slow
def test_a_shared_training_gives_what_two_give(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = [*WITH_REFIT[2:5], "--seeds", "0", "--head_rates", "10", "--learning_rates", "1e-3"]
    shared = [
        "--",
        "--max_train_rows",
        "90",
        "--num_train_epochs",
        "2",
        "--torch_threads",
        "1",
        "--prior_adjustment",
        "fit",
    ]
    compare.main(["--results", "r", *own, *shared])
    compare.main(["--results", "q", "--rows", "cosine_la_refit", *own[3:], "--keep_models", *shared])
    assert len(files()) == 4
    for name in (path.name for path in Path("q/runs").iterdir()):
        one, two = (json.loads(Path(folder, "runs", name).read_text()) for folder in "rq")
        for record in (one, two):
            del record["seconds"]
            for time in [time for time in record["all_results"] if time.startswith("train_")]:
                del record["all_results"][time]
        assert one == two, name
