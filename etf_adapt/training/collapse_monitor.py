"""Neural collapse while a run trains: on fixed samples of rows, in feature space and in logit space."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import DataLoader, Subset

from etf_adapt.data.long_tail import seeded_generator
from etf_adapt.data.progress import progress
from etf_adapt.data.splits import take_per_class
from etf_adapt.heads.in_model import evaluation_mode, head_modules, read_features
from etf_adapt.metrics.collapse import NeuralCollapse
from etf_adapt.results.best_metric import MEASURES
from etf_adapt.training.arguments import ETFTrainingArguments

_CLASS_STREAM, _ROWS_A_CLASS = 31, 2


class CollapseMonitor:
    """Measure neural collapse on a fixed, seeded sample of the rows of a map-style data set.

    The sample has as many rows of each class as fit into ``max_rows``, at least two; where there are more classes than fit, a
    draw of them.
    """

    def __init__(
        self,
        dataset: Any,
        labels: NDArray[np.int64],  # (rows,)
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

    def measure(self, model: nn.Module, context: AbstractContextManager[Any] | None = None) -> dict[str, float | None]:
        """Return ``nc1`` to ``nc4`` of the features, and ``logit_nc1`` to ``logit_nc4`` of the centred logits.

        In logit space the vertices of the simplex are the head. Nothing where fewer than two classes have two rows, or the
        model has several heads. ``context`` is that of the forward pass, such as autocast.
        """
        heads = list(head_modules(model).values())
        if not self.is_measurable or len(heads) != 1:
            return {}
        device, parts = next(model.parameters()).device, []
        with evaluation_mode(model), context or nullcontext():
            for batch in progress(self._loader, "measuring neural collapse, batches"):
                inputs = send_to_device({name: batch[name] for name in batch if name != "row_id"}, device)
                labels = inputs.pop("labels")
                features = read_features(model, inputs)[0]
                positions = (1,) * (heads[0].weight.ndim - 2)  # of a head that is a convolution
                logits = heads[0](features.reshape(*features.shape, *positions)).flatten(1)
                parts.append((features.float().cpu(), logits.double().cpu(), labels.cpu()))
        rows, scores, references = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
        spaces = {
            "": (NeuralCollapse(*heads[0].folded()), rows),
            "logit_": (NeuralCollapse(np.eye(scores.shape[1])), scores - scores.mean(axis=1, keepdims=True)),
        }
        found = {name: metric.compute(features=data, references=references) for name, (metric, data) in spaces.items()}
        return {f"{space}{name}": values[name] for space, values in found.items() for name in MEASURES}


def make_monitors(
    samples: Mapping[str, tuple[Any, Any]], num_classes: int, args: ETFTrainingArguments, collate: Any
) -> dict[str, CollapseMonitor]:
    """Return a monitor for each data set with labels (rows,), by name; none without ``args.collapse_rows``."""
    train_labels = samples["train_"][1]
    size = min(args.collapse_rows, (0 if train_labels is None else len(train_labels)) // 10)
    options: dict[str, Any] = {"collate": collate, "batch_size": args.eval_batch_size, "seed": args.seed}
    return {
        name: CollapseMonitor(rows, labels, num_classes=num_classes, max_rows=size, **options)
        for name, (rows, labels) in samples.items()
        if labels is not None and size >= 2 * _ROWS_A_CLASS
    }
