"""The part of our Trainer that evaluates and predicts: each row once, and logits kept only where they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import EvalPrediction
from transformers.trainer_utils import EvalLoopOutput, denumpify_detensorize

from etf_adapt.data.batches import met_by
from etf_adapt.data.progress import progress
from etf_adapt.inference.predictions import UNLABELLED, RowPredictions, predict_rows, score_rows
from etf_adapt.metrics.shots import pooled_class_mean
from etf_adapt.training.collapse_monitor import CollapseMonitor
from etf_adapt.training.parameters import require_finite
from etf_adapt.training.resumable import ResumableTrainer


class EvaluatingTrainer(ResumableTrainer):
    """Score rows by a few numbers each; keep logits for ``predict`` and ``compute_metrics`` only."""

    class_counts: NDArray[np.int64] | None = None
    _monitors: Mapping[str, CollapseMonitor] = {}
    # Of the last evaluation: its step, its data set, and what the head read of it.
    _evaluated: tuple[int, Any, RowPredictions] | None = None
    # Keeps what the head reads of the rows of a data set, if their features are wanted after it.
    _reading: Callable[[Any], AbstractContextManager[Callable[[Tensor, Tensor], Tensor] | None]]

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Predict each row once, in row order, over all processes; rows without labels are predicted and not scored."""
        require_finite(self.model, step=self.state.global_step)
        model = self._wrap_model(self.model, training=False)
        if not self.accelerator._models and model is self.model:  # evaluation without training: autocast, device
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        self.callback_handler.eval_dataloader = dataloader
        # As in the stock class: true of an evaluation without `compute_metrics` alone.
        keep = None if prediction_loss_only else (self.preprocess_logits_for_metrics or (lambda logits, _: logits))
        batches, num_rows = self._with_progress(dataloader, description), len(dataloader.dataset)  # type: ignore[arg-type]
        wait = met_by(partial(self.poll, leaves=True))
        with wait, self._reading(dataloader.dataset) if keep is None else nullcontext() as read:
            rows = predict_rows(model, batches, num_rows=num_rows, keep=keep or read)
        if read is not None:
            self._evaluated = self.state.global_step, dataloader.dataset, rows
            rows = replace(rows, kept=None)
        is_labelled = bool((rows.labels != UNLABELLED).any())
        if not is_labelled and description != "Prediction":
            raise ValueError(
                "The rows to evaluate have no `labels`: let `data_collator` give them, or call predict instead."
            )
        metrics = self._score(rows, metric_key_prefix) if is_labelled else {}
        return EvalLoopOutput(
            predictions=rows.kept,  # type: ignore[arg-type]
            label_ids=rows.labels if is_labelled else None,
            metrics={f"{metric_key_prefix}_{name}": value for name, value in metrics.items()},
            num_samples=len(rows.row_ids),
        )

    def _score(self, rows: RowPredictions, prefix: str) -> dict[str, Any]:
        """Return our metrics, and those of ``compute_metrics``, which win where both have a name."""
        metrics: dict[str, Any] = score_rows(rows, self.class_counts, self.args.shot_bounds)
        least, is_right = self.args.min_validation_rows, rows.predictions == rows.labels
        metrics["balanced_accuracy_pooled"] = pooled_class_mean(is_right, rows.labels, min_rows=least)
        if self.is_in_train and prefix == "eval":
            for sample, monitor in self._monitors.items():
                collapse = monitor.measure(self.model, self.compute_loss_context_manager())
                metrics |= {f"{sample}{name}": value for name, value in collapse.items()}
        if self.compute_metrics is not None:
            own = self.compute_metrics(EvalPrediction(predictions=rows.kept, label_ids=rows.labels))  # type: ignore[arg-type]
            metrics |= {name.removeprefix(f"{prefix}_"): value for name, value in denumpify_detensorize(own).items()}
        return metrics

    def _with_progress(self, batches: Iterable[Any], description: str) -> Iterator[Any]:
        # The bar of a terminal is that of the callbacks.
        shown = progress(batches, f"{description.lower()}, batches") if self.args.disable_tqdm else batches
        for batch in shown:
            self.poll()
            yield batch
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
