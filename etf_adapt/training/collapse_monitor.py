"""Neural collapse while a run trains: on fixed samples of rows, in feature space and in logit space."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader, Subset

from etf_adapt.data.long_tail import seeded_generator
from etf_adapt.data.splits import take_per_class
from etf_adapt.heads.in_model import evaluation_mode, head_modules, read_features, score_features, to_device
from etf_adapt.metrics.collapse import NeuralCollapse

MEASURES = ("nc1", "nc2", "nc3", "nc4")
_CLASS_STREAM, _ROWS_A_CLASS = 31, 2


class CollapseMonitor:
    """Measure collapse (``etf_adapt.metrics.collapse.NeuralCollapse``) on a fixed, seeded sample of rows of a data set.

    The sample has as many rows of each class as fit into its size, two at least; of more classes than fit, some are drawn.

    Args:
        dataset: Rows as evaluation transforms them, map-style.
        labels: Class of each row (rows,).
        num_classes: Number of classes.
        max_rows: Most rows of the sample, at least 4.
        collate: Makes a batch of rows, with ``labels`` (batch,).
        batch_size: Rows of a batch.
        seed: Of the sample.

    Example:
        >>> import timm
        >>> from etf_adapt import swap_head
        >>> rows = [{"x": torch.randn(3, 160, 160), "labels": row % 3} for row in range(12)]
        >>> monitor = CollapseMonitor(rows, np.arange(12) % 3, num_classes=3, max_rows=6)
        >>> list(monitor.measure(swap_head(timm.create_model("test_vit"), 3)))[:4]
        ['nc1', 'nc2', 'nc3', 'nc4']
    """

    def __init__(
        self,
        dataset: Any,
        labels: NDArray[np.int64],
        *,
        num_classes: int,
        max_rows: int,
        collate: Any = None,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        counts = np.bincount(labels, minlength=num_classes)
        quota = max(_ROWS_A_CLASS, max_rows // max(1, int((counts > 0).sum())))
        usable = np.flatnonzero(counts >= _ROWS_A_CLASS)
        drawn = seeded_generator(seed, _CLASS_STREAM).permutation(usable)[: max(_ROWS_A_CLASS, max_rows // quota)]
        wanted = np.zeros_like(counts)
        wanted[drawn] = np.minimum(counts[drawn], quota)
        self.rows = take_per_class(labels, wanted, seed=seed)
        self.is_measurable = len(drawn) >= 2
        self._loader = DataLoader(
            Subset(dataset, self.rows.tolist()),
            batch_size=batch_size,
            collate_fn=collate,
            generator=torch.Generator().manual_seed(seed),  # or each pass would draw from the run's own
        )

    @torch.no_grad()
    def measure(self, model: nn.Module, context: AbstractContextManager[Any] | None = None) -> dict[str, float | None]:
        """Measure a model; its mode and random state are left as they are.

        Args:
            model: A model with one head of ours.
            context: In which its forward runs, such as autocast.

        Returns:
            ``nc1`` to ``nc4`` of the features that the head reads, and ``logit_nc1`` to ``logit_nc4`` of the centred logits,
            with the vertices of the simplex as head; empty where fewer than two classes have two rows or the model has
            several heads.
        """
        heads = list(head_modules(model).values())
        if not self.is_measurable or len(heads) != 1:
            return {}
        with evaluation_mode(model), context or nullcontext():
            parts = [(read_features(model, inputs)[0], labels) for inputs, labels in self._batches(model)]
            logits = [score_features(model, features) for features, _ in parts]
        features = torch.cat([part.float().cpu() for part, _ in parts]).numpy()
        labels = torch.cat([part for _, part in parts]).numpy()
        scores = torch.cat([part.float().cpu() for part in logits]).double().numpy()
        weight, bias = heads[0].folded()
        spaces = {
            "": (NeuralCollapse(weight, bias), features),
            "logit_": (NeuralCollapse(np.eye(scores.shape[1])), scores - scores.mean(axis=1, keepdims=True)),
        }
        found = {prefix: metric.compute(features=rows, references=labels) for prefix, (metric, rows) in spaces.items()}
        return {f"{prefix}{name}": values[name] for prefix, values in found.items() for name in MEASURES}

    def _batches(self, model: nn.Module) -> Iterator[tuple[Mapping[str, Any], torch.Tensor]]:
        device = next(model.parameters()).device
        for batch in self._loader:
            inputs = {name: to_device(value, device) for name, value in batch.items() if name != "row_id"}
            yield inputs, inputs.pop("labels").cpu()
