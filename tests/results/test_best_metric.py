"""Laws of the best checkpoint's metric: a name that evaluation gives, or an error before the first step."""

from __future__ import annotations

import pytest
from small_run import NoisyRows, make_trainer

from etf_adapt.commands.finetune_arguments import parse_training
from etf_adapt.results.best_metric import COLLAPSE, ERRORS, SCORES, more_is_better


@pytest.fixture
def labelled(monkeypatch):
    """Rows whose labels are known without reading them."""
    monkeypatch.setattr(NoisyRows, "targets", property(lambda rows: rows.labels), raising=False)


@pytest.mark.usefixtures("labelled")
def test_the_names_are_those_that_evaluation_gives(tmp_path):
    settings = {"counts": (60, 40, 20), "num_train_epochs": 1, "save_strategy": "no", "load_best_model_at_end": False}
    trainer = make_trainer(tmp_path, collapse_rows=12, **settings)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "eval_accuracy" in entry)
    times = {"runtime", "samples_per_second", "steps_per_second"}
    assert {name.removeprefix("eval_") for name in logged if name.startswith("eval_")} - times == {*SCORES, *COLLAPSE}


def test_less_is_better_for_errors_alone():
    for name in (*SCORES, *COLLAPSE):
        is_greater = name not in (*ERRORS, *COLLAPSE)
        assert more_is_better(name) is more_is_better(f"eval_{name}") is is_greater
    assert more_is_better("mine") is None


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("f1", "is no metric of evaluation: did you mean 'macro_f1'?"),
        ("eval_nc1", "measured with `collapse_rows` above 0 only"),
    ],
)
def test_a_metric_that_no_evaluation_gives_is_refused_unless_the_user_measures_it(metric, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, metric_for_best_model=metric)
    with pytest.raises(ValueError, match=message):
        parse_training(["--output_dir", str(tmp_path), "--metric_for_best_model", metric])
    make_trainer(tmp_path, metric_for_best_model=metric, compute_metrics=lambda rows: {metric: 0.0})


@pytest.mark.usefixtures("labelled")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"metric_for_best_model": "many"},
            r"'many'\) is not measured here, .* no class: classes have 7 to 60 .*more than 100",
        ),
        ({"metric_for_best_model": "eval_few", "eval_counts": (7, 7, 0)}, "none of its 1 classes has a validation row"),
        (
            {"metric_for_best_model": "tail_third", "eval_counts": (7, 7, 0)},
            "none of its 1 classes has a validation row",
        ),
        ({"metric_for_best_model": "middle_third", "counts": (9, 5)}, "'middle_third'.* it has no class"),
        ({"metric_for_best_model": "train_nc1", "collapse_rows": 3}, "'train_nc1'.* it needs four `collapse_rows`"),
    ],
)
def test_a_metric_that_no_evaluation_gives_is_known_before_the_first_step(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path / "run", **settings)
    unused = {"eval_strategy": "no", "save_strategy": "no"}
    make_trainer(tmp_path / "run", **settings | unused)  # where nothing is evaluated nothing is missing


@pytest.mark.usefixtures("labelled")
@pytest.mark.parametrize("metric", ["few", "many", "head_third", "ece", "logit_nc1"])
def test_a_metric_that_there_is_chooses_the_best_checkpoint(metric, tmp_path):
    trainer = make_trainer(tmp_path, metric_for_best_model=metric, shot_bounds=[20, 50], collapse_rows=8)
    trainer.train()
    scores = [entry[f"eval_{metric}"] for entry in trainer.state.log_history if f"eval_{metric}" in entry]
    assert trainer.state.best_metric == (max if metric in SCORES[:-2] else min)(scores)


def test_a_group_without_rows_ends_the_run_where_labels_are_known_by_reading_only(tmp_path):
    with pytest.raises(ValueError, match="`eval_few` is the best checkpoint's metric and no validation row tells it"):
        make_trainer(tmp_path, metric_for_best_model="few", eval_counts=(7, 7, 0)).train()
