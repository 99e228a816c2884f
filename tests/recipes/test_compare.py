"""The comparison: which runs, in which order, chosen by what; stopped and gone on with; refused in one message."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import threading
import time
from pathlib import Path

import compare
import compare_methods
import numpy as np
import pytest
from comparison import unpack_rows
from fake_runs import ADJUSTED, LABELS, REAL_LAUNCH, SHARED, TWO_ROWS, files, refused

from etf_adapt.commands.finetune_arguments import parse_training, read_arguments
from etf_adapt.results import run_folder


class TestMethod:
    def test_all_tuning_comes_first_and_only_the_final_runs_see_the_test_split(self, runs):
        compare.main([*TWO_ROWS, *SHARED])
        stages = [call["evaluate_test"] for call in runs.calls]
        assert stages == ["false"] * 6 + ["true"] * 4, "2 rates x 2 head rates and 2 rates; 2 rows x 2 seeds"
        assert {call["seed"] for call in runs.calls[:6]} == {"0"}
        assert [call["head"] for call in runs.calls] == ["linear"] * 4 + ["etf"] * 2 + ["linear"] * 2 + ["etf"] * 2
        assert all(call["dataset"] == "pets" and call["num_train_epochs"] == "2" for call in runs.calls)
        linear = {(call["learning_rate"], call["head_learning_rate"]) for call in runs.calls[:4]}
        assert linear == {("0.0001", "0.0001"), ("0.0001", "0.001"), ("0.001", "0.001"), ("0.001", "0.01")}
        assert not any("head_learning_rate" in call for call in runs.calls if call["head"] == "etf")

    def test_rates_are_the_best_in_validation(self, runs):
        compare.main([*TWO_ROWS, *SHARED])
        final = [(call["learning_rate"], call.get("head_learning_rate")) for call in runs.calls[6:]]
        assert final == [("0.0001", "0.001")] * 2 + [("0.0001", None)] * 2

    def test_of_equally_good_rates_the_highest_is_taken(self, runs, monkeypatch):
        monkeypatch.setattr(runs, "score", lambda **_: 0.5)
        compare.main([*TWO_ROWS, *SHARED])
        final = [(call["learning_rate"], call.get("head_learning_rate")) for call in runs.calls[6:]]
        assert final == [("0.001", "0.01")] * 2 + [("0.001", None)] * 2

    def test_a_method_that_is_not_tuned_names_no_rate_and_sees_the_test_split_once_a_seed(self, runs):
        compare.main(["--results", "r", "--rows", "linear_ce", "etf_untuned", *TWO_ROWS[5:], *SHARED])
        untuned = [call for call in runs.calls if call["head"] == "etf"]
        assert [(call["evaluate_test"], call["seed"]) for call in untuned] == [("true", "0"), ("true", "1")]
        assert not any("learning_rate" in name for call in untuned for name in call)
        assert "| by the rule | - | 0 | - |" in Path("r/table.md").read_text()
        compare.main(["--results", "r", "--table_only"])
        assert len(files()) == 4 + 2 + 2

    def test_every_head_is_adjusted_for_the_prior_unless_asked_otherwise(self, runs):
        compare.main([*TWO_ROWS, *SHARED])
        assert {call["prior_adjustment"] for call in runs.calls} == {"fit"}
        compare.main(["--results", "q", *TWO_ROWS[2:], *SHARED, "--prior_adjustment", "none"])
        assert {call["prior_adjustment"] for call in runs.calls[10:]} == {"none"}

    def test_a_method_that_is_not_tuned_may_stand_alone(self, runs, capsys):
        compare.main(["--results", "r", "--rows", "etf_untuned", "--seeds", "0", "1", *SHARED])
        assert "| ETF (default, untuned) | 75.0 ± 7.1 |" in Path("r/table.md").read_text()
        assert not Path("r/validation.md").exists()
        assert capsys.readouterr().out.splitlines()[-1].endswith("--prior_adjustment fit --head etf --seed 0")

    def test_one_that_was_begun_without_the_adjustment_goes_on_without(self, runs):
        run_folder.write_json("r/settings.json", {"flags": compare.by_name(SHARED)})
        Path("r/scratch/begun").mkdir(parents=True)
        compare.main([*TWO_ROWS, *SHARED])
        assert not any("prior_adjustment" in call for call in runs.calls)

    def test_nothing_to_tune_is_told(self, runs, capsys):
        said = refused(["--results", "r", "--rows", "etf_untuned", *SHARED, "--tuning_only"], capsys)
        assert "no method of `rows` has a rate to tune" in said and not runs.calls

    @pytest.mark.parametrize("words", [["--lr", "1e-3"], ["--lr=1e-3"], ["--config", "flags.yaml"]])
    def test_flags_that_a_row_sets_are_refused_by_any_of_their_names(self, runs, capsys, words):
        Path("flags.yaml").write_text("lr: 0.001\n")
        said = refused(["--results", "r", "--rows", "etf_untuned", *SHARED, *words], capsys)
        assert "`learning_rate` is set by this recipe" in said and not runs.calls

    def test_every_row_is_one_that_finetune_understands(self):
        options = compare.read_arguments(["--results", "r", "--rows", *compare_methods.METHODS, "--"])
        for row in compare.chosen_methods(options):
            runs = compare.tuning_runs(row, options) if row.is_tuned else compare.final_runs(row, options)
            model, data, _, rest = read_arguments([*runs[0].flags, "--output_dir", "unused"])
            args = parse_training(rest)
            assert data.evaluate_test is not row.is_tuned and args.learning_rate == runs[0].learning_rate
            assert row.trains_head == (model.head in ("linear", "cosine") or model.head_trainable)
            assert (row.kind == "baseline") == (model.head in ("linear", "cosine"))
            assert row.kind != "family" or model.loss in (None, "dot_regression", "margin_dot_regression")


class TestFiles:
    def test_each_run_leaves_one_small_file_and_no_folder(self, runs):
        compare.main([*TWO_ROWS, *SHARED])
        assert len(files()) == 10
        assert {"linear_ce-tuning-lr0.001-head10x-seed0.json", "etf_dr-final-lr0.0001-seed1.json"} <= files()
        assert {path.name for path in Path("r").iterdir()} == {
            "runs",
            "settings.json",
            "test_labels.json",
            "table.md",
            "table.json",
            "validation.md",
        }
        left = json.loads(Path("r/runs/etf_dr-final-lr0.0001-seed1.json").read_text())
        assert left["collapse"] == {"nc1": 3.0, "train_logit_nc2": 0.25}
        assert (
            "| linear, cross-entropy | - / - / - / - | - / 0.25 / - / - | 3.00 / - / - / - |"
            in Path("r/table.md").read_text()
        )
        assert left["history"] == [[1.0, 0.5], [2.0, 0.9]] and left["all_results"]["test_balanced_accuracy"] == 0.8
        assert unpack_rows(left["correct"], 10).tolist() == [True] * 6 + [False] * 4
        assert json.loads(Path("r/test_labels.json").read_text())["labels"] == LABELS
        tuned = json.loads(Path("r/runs/etf_dr-tuning-lr0.0001-seed0.json").read_text())
        assert "correct" not in tuned and tuned["all_results"]["test_balanced_accuracy"] is None

    def test_nothing_written_tells_where_it_ran(self, runs, tmp_path):
        flags = ["--model", "/home/me/models/vit", "--hub_token", "hf_secret"]
        compare.main(["--results", str(tmp_path / "r"), *TWO_ROWS[2:], *SHARED, *flags])
        assert runs.calls[0]["model"] == "/home/me/models/vit" and runs.calls[0]["hub_token"] == "hf_secret"
        for path in Path("r").rglob("*.*"):
            text = path.read_text()
            assert "/home/me" not in text and "hf_secret" not in text and str(tmp_path) not in text, path

    def test_models_are_kept_on_request(self, runs):
        compare.main([*TWO_ROWS, "--keep_models", *SHARED])
        assert len([*Path("r/scratch").iterdir()]) == 10


class TestGoingOn:
    @pytest.mark.parametrize("stop_at", [1, 3, 7, 10])
    def test_nothing_finished_is_run_again(self, stop_at, runs, capsys):
        runs.stop_at = stop_at
        with pytest.raises(SystemExit) as stop:
            compare.main([*TWO_ROWS, *SHARED])
        assert stop.value.code == 130 and "the same command goes on" in capsys.readouterr().err
        assert len(files() if stop_at > 1 else ()) == stop_at - 1
        compare.main([*TWO_ROWS, *SHARED])
        done = [(call["output_dir"], call["evaluate_test"]) for call in runs.calls]
        assert len(done) == 11 and len(set(done)) == 10, "only the stopped one is run twice"
        table = Path("r/table.md").read_text()
        compare.main([*TWO_ROWS, *SHARED])
        assert len(runs.calls) == 11 and Path("r/table.md").read_text() == table

    def test_an_interrupted_run_goes_on_from_its_checkpoint_and_begins_anew_without(self, runs):
        from etf_adapt.training.checkpoints import begin_checkpoint, complete_checkpoint

        unfinished = {rate: f"head_etf-loss_dot_regression-learning_rate_{rate}-seed_0" for rate in ("0.001", "0.0001")}
        for rate, name in unfinished.items():
            begin_checkpoint(Path("r/scratch", name, "checkpoint-5"))
            if rate == "0.001":
                complete_checkpoint(Path("r/scratch", name, "checkpoint-5"), {})
        run_folder.write_json("r/settings.json", {"flags": compare.by_name(ADJUSTED)})
        compare.main([*TWO_ROWS, *SHARED])
        how = {Path(call["output_dir"]).name: call.get("resume_from_checkpoint") for call in runs.calls}
        assert how.pop(unfinished["0.001"]) == "last"
        assert set(how.values()) == {None} and all(
            "overwrite_output_dir" in call for call in runs.calls if "resume_from_checkpoint" not in call
        )
        assert json.loads(Path("r/runs/etf_dr-tuning-lr0.001-seed0.json").read_text())["resumed"]

    def test_more_rows_seeds_and_rates_add_runs(self, runs):
        compare.main([*TWO_ROWS, *SHARED])
        more = ["--rows", "linear_ce", "etf_dr", "etf_la", "--seeds", "0", "1", "2", "--learning_rates", "1e-3", "1e-4"]
        compare.main(["--results", "r", *more, *SHARED])
        assert len(runs.calls) == 10 + 2 + (2 + 3), "a seed for two rows; tuning and three seeds of the third"

    def test_other_flags_are_refused_by_name(self, runs, capsys):
        compare.main([*TWO_ROWS, *SHARED])
        before = {path: path.read_bytes() for path in Path("r").rglob("*.json")}
        said = refused([*TWO_ROWS, "--dataset", "pets", "--num_train_epochs", "3", "--augment", "0"], capsys)
        assert "--num_train_epochs (2)" in said and "--num_train_epochs (3)" in said and "--augment (0)" in said
        assert "--dataset" not in said and "another --results folder" in said
        assert len(runs.calls) == 10 and before == {path: path.read_bytes() for path in Path("r").rglob("*.json")}
        for typed in (["--", "--num-train-epochs=2", "--dataset", "pets"], ["--num-train-epochs=2", "--", *SHARED[:2]]):
            compare.main([*TWO_ROWS, *typed])  # the same
        hyphens = [word.replace("_", "-") if word.startswith("--") else word for word in TWO_ROWS]
        compare.main([*SHARED[:2], *hyphens, *SHARED[2:]])
        assert len(runs.calls) == 10

    def test_flags_that_no_run_could_take_do_not_bind_the_folder(self, runs, capsys, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(compare.Children, "launch", lambda *_: (2, ["error: There is no argument '--sedes'"]))
            refused([*TWO_ROWS, *SHARED, "--sedes", "3"], capsys)
        compare.main([*TWO_ROWS, *SHARED])
        assert len(runs.calls) == 10

    def test_a_row_that_was_changed_is_not_mixed_with_what_it_was(self, runs, capsys, monkeypatch):
        compare.main([*TWO_ROWS, *SHARED])
        changed = compare_methods.Method("etf_dr", "ETF", "family", ("--head", "etf", "--sampler", "balanced"))
        monkeypatch.setitem(compare_methods.METHODS, "etf_dr", changed)
        assert "other flags than row etf_dr" in refused([*TWO_ROWS, *SHARED], capsys)

    def test_other_test_rows_are_refused(self, runs, capsys):
        compare.main([*TWO_ROWS[:6], "1", "--learning_rates", "1e-3", *SHARED])
        runs.labels = [*LABELS[1:], "dog"]
        said = refused([*TWO_ROWS[:6], "1", "0", "--learning_rates", "1e-3", *SHARED], capsys)
        assert "test rows" in said and "another --results folder" in said

    def test_two_comparisons_do_not_share_a_folder(self, runs, capsys):
        Path("r").mkdir()
        other = os.open("r", os.O_RDONLY)
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "is in use" in refused([*TWO_ROWS, *SHARED], capsys) and not runs.calls
        os.close(other)
        compare.main([*TWO_ROWS, *SHARED])


class TestTable:
    def test_it_tells_rates_effort_and_the_best_baseline(self, runs):
        compare.main([*TWO_ROWS, *SHARED])
        table = Path("r/table.md").read_text()
        lines = [line.split(" | ") for line in table.splitlines() if line.startswith(("| linear", "| ETF"))]
        lines = lines[:4]  # the third table is of the measures of collapse
        assert [line[1] for line in lines[:2]] == ["75.0 ± 7.1"] * 2 and lines[0][2] == "best baseline"
        assert [line[3:7] for line in lines[2:]] == [["0.0001", "x 10", "4", "90.0"], ["0.0001", "-", "2", "90.0"]]
        told = ("--dataset pets --num_train_epochs 2", "torch 1.2.3", "same tuning effort", "Epochs to 90.0")
        assert all(words in table for words in told)
        row = json.loads(Path("r/table.json").read_text())["rows"][1]
        assert row["difference"] == [0.0, 0.0, 0.0] and row["epochs"] == [2.0, 2.0]

    def test_the_terminal_shows_columns_and_the_command_that_trains_the_best_method(self, runs, capsys):
        assert max(map(len, compare_methods.METHODS)) < 24, "the width of the first column"
        long = ["--learning_rates", "1e-3", "1e-4", "--rows", "linear_focal", *TWO_ROWS[3:5], "--seeds", "0"]
        compare.main(["--results", "r", *long, "1", *SHARED])
        *lines, title, last = capsys.readouterr().out.partition("\n\n")[2].splitlines()  # behind those of the runs
        assert max(map(len, lines)) <= 100 and any("r/table.md" in line for line in lines)
        assert any(line.startswith("linear_ce ") and "75.0 ± 7.1" in line for line in lines)
        assert title.endswith("of the best validation score, linear_focal:")
        flags = "--head linear --loss focal --learning_rate 0.0001 --seed 0"
        begin = "python recipes/finetune.py --dataset pets --num_train_epochs 2 --prior_adjustment fit"
        assert last == f"{begin} {flags} --head_learning_rate 0.001"
        compare.main(["--results", "r", "--table_only"])
        assert capsys.readouterr().out.splitlines()[-1] == last
        compare.main(["--results", "q", *long, "--tuning_only", *SHARED])
        *lines, _, tuned = capsys.readouterr().out.partition("\n\n")[2].splitlines()
        assert tuned == last and max(map(len, lines)) <= 100 and any("q/validation.md" in line for line in lines)

    def test_one_seed_is_not_ranked(self, runs):
        compare.main([*TWO_ROWS[:6], "0", "--learning_rates", "1e-3", *SHARED])
        table = Path("r/table.md").read_text()
        assert "not ranked" in table and "**" not in table and "±" not in table.split("Test rows")[0]
        assert json.loads(Path("r/table.json").read_text())["best_baseline"] is None

    def test_it_is_made_again_without_running_anything(self, runs):
        compare.main([*TWO_ROWS, *SHARED])
        made = {name: Path("r", name).read_bytes() for name in ("table.md", "table.json")}
        for name in made:
            Path("r", name).unlink()
        compare.main(["--results", "r", "--table_only"])
        assert len(runs.calls) == 10 and made == {name: Path("r", name).read_bytes() for name in made}

    def test_unfinished_rows_are_left_out_by_name(self, runs):
        runs.stop_at = 10
        with pytest.raises(SystemExit):
            compare.main([*TWO_ROWS, *SHARED])
        compare.main(["--results", "r", "--table_only"])
        table = Path("r/table.md").read_text()
        assert "left out: etf_dr" in table and "| ETF" not in table

    def test_tuning_alone_leaves_the_test_rows_and_says_what_each_rate_gave(self, runs):
        compare.main([*TWO_ROWS, "--tuning_only", *SHARED])
        assert [call["evaluate_test"] for call in runs.calls] == ["false"] * 6
        table = Path("r/validation.md").read_text()
        assert not Path("r/table.md").exists()
        linear, etf = [line for line in table.splitlines() if line.startswith(("| linear", "| ETF"))]
        assert "| 90.0 | 0.0001 (head x 10) | 0.0001 (head x 1): 85.0; 0.0001 (head x 10): 90.0; " in linear
        assert "| 90.0 | 0.0001 | 0.0001: 90.0; 0.001: 80.0 |" in etf
        assert "--tuning_only --dataset pets --num_train_epochs 2" in table and "torch 1.2.3" in table
        compare.main([*TWO_ROWS, *SHARED])
        assert len(runs.calls) == 10 and Path("r/table.md").exists() and Path("r/validation.md").read_text() == table


class TestMistakes:
    @pytest.mark.parametrize(
        ("argv", "said"),
        [
            ([*TWO_ROWS[:3], "linear_cee", *SHARED], "did you mean 'linear_ce'?"),
            (["--results", "r", "--table_only", "--seedz", "1"], "`table_only`"),
            ([*TWO_ROWS, "--seeds", "1", "0", "1", *SHARED], "`seeds` (=[1, 0, 1])"),
            ([*TWO_ROWS, "--widen", "-1", *SHARED], "`widen` (=-1) must be 0 or more"),
            ([*TWO_ROWS, "--learning_rates", "0.1", "-1", *SHARED], "`learning_rates` (=[0.1, -1.0]) must be positive"),
            ([*TWO_ROWS, "--head_rates", "nan", *SHARED], "`head_rates`"),
            ([*TWO_ROWS, "--learning-rate", "1", *SHARED], "leave it out, or give --learning_rates"),
            ([*TWO_ROWS[:2], *SHARED], "`rows` (=[])"),
            ([*TWO_ROWS, *SHARED, "--seed", "1"], "`seed` is set by this recipe"),
            ([*TWO_ROWS, *SHARED, "--head=cosine"], "`head` is set by row"),
            ([*TWO_ROWS, "--", "settings.yaml"], "There is no file of settings"),
            ([*TWO_ROWS, "--", "pets"], "belongs to no flag"),
            ([*TWO_ROWS, "--jobs", "2", "--launcher", "accelerate launch", *SHARED], "contradict each other"),
            ([*TWO_ROWS, "--jobs", "0", *SHARED], "`jobs`"),
            ([*TWO_ROWS, "--launcher", "no_such_program -x", *SHARED], "`launcher`"),
            (["--results", "r", "--table_only"], "settings.json"),
        ],
        ids=lambda value: value[:24] if isinstance(value, str) else None,
    )
    def test_one_message_and_nothing_on_disk(self, argv, said, runs, capsys):
        assert said in refused(argv, capsys)
        assert not runs.calls and not Path("r").exists()

    def test_a_folder_of_something_else_is_left_alone(self, runs, capsys):
        Path("r").mkdir()
        Path("r/table.md").write_text("years of work")
        assert "holds what no comparison wrote" in refused([*TWO_ROWS, *SHARED], capsys)
        assert [path.name for path in Path("r").iterdir()] == ["table.md"]

    def test_no_validation_rows_is_said_after_one_run(self, runs, capsys):
        runs.has_validation = False
        assert "validation_fraction" in refused([*TWO_ROWS, *SHARED], capsys) and len(runs.calls) == 1

    def test_a_run_that_fails_stops_it_with_its_own_last_words(self, runs, capsys, monkeypatch):
        def fail_third(children, command):
            return (1, ["Traceback", "  line 7", "loss is not finite"]) if len(runs.calls) == 2 else runs(command)

        monkeypatch.setattr(compare.Children, "launch", fail_third)
        said = refused([*TWO_ROWS, *SHARED], capsys)
        assert (
            "tuning linear_ce, learning rate 0.001 (head x 1), seed 0 failed (exit code 1): loss is not finite" in said
        )
        assert len(files()) == 2
        kept = Path("r/scratch/linear_ce-tuning-lr0.001-head1x-seed0.log")
        assert str(kept) in said and kept.read_text() == "Traceback\n  line 7\nloss is not finite\n"

    def test_of_several_runs_at_once_one_that_fails_ends_the_others(self, runs, capsys, monkeypatch):
        both = threading.Barrier(2)

        def launch(children, command):
            both.wait(timeout=30)  # two run at once
            if not runs.calls:
                runs.calls.append({})
                return 1, ["loss is not finite"]
            return REAL_LAUNCH(children, [sys.executable, "-c", "import time; time.sleep(60)"])

        monkeypatch.setattr(compare.Children, "launch", launch)
        start = time.monotonic()
        assert "loss is not finite" in refused([*TWO_ROWS, "--jobs", "2", *SHARED], capsys)
        assert time.monotonic() - start < 30 and not files()

    def test_several_at_once_find_what_one_after_another_does(self, runs):
        compare.main([*TWO_ROWS, *SHARED])
        one = Path("r/table.json").read_text()
        compare.main(["--results", "q", *TWO_ROWS[2:], "--jobs", "3", *SHARED])
        assert Path("q/table.json").read_text() == one


@pytest.mark.slow
def test_a_method_on_the_digits(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = ["--results", "r", "--rows", "linear_ce", "--seeds", "0", "--learning_rates", "1e-3"]
    shared = ["--", "--max_train_rows", "90", "--num_train_epochs", "1", "--torch_threads", "1"]
    compare.main([*own, "--head_rates", "10", *shared])
    said = capsys.readouterr().out
    assert (
        said.startswith("2 runs: 1 to choose rates, 1 with the test split; 0 finished")
        and "1 run to go, at most about" in said
    )
    labels = np.array(json.loads(Path("r/test_labels.json").read_text())["labels"])
    for file in Path("r/runs").glob("*-final-*.json"):
        left = json.loads(file.read_text())
        correct = unpack_rows(left["correct"], len(labels))
        recalls = [correct[labels == label].mean() for label in np.unique(labels)]
        assert np.mean(recalls) == pytest.approx(left["all_results"]["test_balanced_accuracy"], abs=1e-12)
    assert len(files()) == 2 and not Path("r/scratch").exists()
    print(Path("r/table.md").read_text())
