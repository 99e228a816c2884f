"""A finished model, its rows by class name, and a folder for what it becomes: common to ``refit`` and ``extend``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader

from etf_adapt.data.long_tail import even_sample
from etf_adapt.data.text import EvenLengths, lengths_of
from etf_adapt.errors import OutputFolderError
from etf_adapt.heads.alignment import TrainingRows, read_rows
from etf_adapt.inference.head_statistics import HeadStatistics, save_statistics
from etf_adapt.inference.launch import choose_num_workers
from etf_adapt.results.card import write_short_card
from etf_adapt.results.card_metadata import read_base_card


def check_output(output: str | Path | None) -> None:
    """Refuse a folder that holds something."""
    path = None if output is None else Path(output)
    if path is not None and (path.is_file() or (path.is_dir() and any(path.iterdir()))):
        raise OutputFolderError(f"`output` (={str(output)!r}) holds something already: name a new or an empty folder.")


def read_classes(
    model: Any,
    rows: Any,
    collator: Any,
    classes: Sequence[int],
    num_classes: int,
    *,
    batch_size: int,
    num_workers: int | None,
    max_rows: int | None = None,
) -> TrainingRows:
    """Read what the heads are given of at most so many rows, evenly; label i of the data set is class ``classes[i]``."""

    def collate(batch: list[Any]) -> dict[str, Any]:
        made: dict[str, Any] = collator(batch)
        return made | {"labels": torch.tensor(classes)[made["labels"]]}

    labels = np.asarray(classes)[np.asarray(getattr(rows, "dataset", rows)["label"])]
    order = even_sample(labels, num_classes, len(labels) if max_rows is None else max_rows)
    counts = np.bincount(labels[order], minlength=num_classes)
    if (lengths := lengths_of(rows, "length")) is not None:
        order = order[[*EvenLengths(lengths[order], batch_size=batch_size)]]
    if num_workers is None:
        device = next(model.parameters()).device
        num_workers = choose_num_workers(len(order), getattr(rows, "row_bytes", 0), batch_size, device)
    loader = DataLoader(rows, batch_size, sampler=order.tolist(), num_workers=num_workers, collate_fn=collate)
    return read_rows(model, loader, counts, seed=0)


def move_to_device(model: Any) -> None:
    """Move a model to this process's device; a quantized one is where it was loaded."""
    if getattr(model, "hf_quantizer", None) is None:
        model.to(PartialState().device)


def write_folder(
    folder: str | Path,
    model: Any,
    heads: Mapping[str, HeadStatistics],
    lines: Sequence[str],
    *,
    location: str,
    task: str,
) -> None:
    """Write a stock folder, with the statistics of its heads if there are any, and a card that says what was done."""
    state = PartialState()
    if state.is_main_process:
        model.save_pretrained(folder, fold=True)
        save_statistics(folder, heads)
        library = model.etf_settings["library"]
        inherited = read_base_card(location)
        write_short_card(folder, Path(folder).name, library=library, task=task, lines=lines, inherited=inherited)
    state.wait_for_everyone()
