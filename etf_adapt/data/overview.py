"""What was taken of a data set, in a few lines to read before the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def describe_data(description: Mapping[str, Any]) -> str:
    """Return `ClassificationData.description` as lines: files, columns and their rules, classes, rows and origin of splits."""
    columns, names, counts = description["columns"], description["label_names"], description["class_counts"]
    files, tail = description["files"], description["long_tail"]
    pair = f" and `{columns['pair']}` (pairs)" if columns["pair"] else ""
    left_out = f"; left out: {_first(columns['left_out'])}" if columns["left_out"] else ""
    of_files = f": {files['number']:,} files, " if files["number"] > 1 else ": " if files["number"] else ""
    least, most = (names[counts.index(choose(counts))] for choose in (min, max))
    lines = [
        f"{description['name']} ({description['kind']}){of_files}{_first(files['first'], files['number'])}",
        f"{description['task']} `{columns['input']}`{pair}, label `{columns['label']}`{left_out}",
        *columns["rules"],
        f"{len(names):,} classes: {_first(names)}; training rows {min(counts):,} (`{least}`) to {max(counts):,} (`{most}`)",
    ]
    for split in filter(description["rows"].get, ("train", "validation", "test")):
        whole, own_name = description["rows_in_source"].get(split), description["split_names"].get(split)
        origin = description["validation_origin"] if whole is None else f"of {whole:,} in split {own_name or split}"
        cut = f", made long-tailed by a factor of {tail['imbalance_factor']:g}" if tail and split == "train" else ""
        lines.append(f"{split}: {description['rows'][split]:,} rows, {origin}{cut}")
    return "\n".join(f"data: {line}" for line in lines)


def _first(names: Sequence[str], number: int | None = None) -> str:
    listed = [f"`{name}`" for name in names[:10]]
    return ", ".join(listed) + (", ..." if (number or len(names)) > len(listed) else "")
