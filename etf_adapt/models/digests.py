"""Digests of head layers, by which a change by another tool is known."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def describe_layers(layers: Sequence[tuple[Tensor, Tensor | None]]) -> dict[str, Any]:
    """Describe weight and bias of each head as they are saved: dtype, digest, and digest after rounding to half precision."""
    rounded = {name: layer_digest(layers, getattr(torch, name)) for name in ("bfloat16", "float16")}
    dtype = str(layers[0][0].dtype).removeprefix("torch.")
    return {"dtype": dtype, "sha256": layer_digest(layers), "rounded": rounded}


def is_changed(layers: Sequence[tuple[Tensor, Tensor | None]], entry: Mapping[str, Any]) -> bool:
    """Return whether layers differ from those that ``describe_layers`` described; False for the same ones rounded."""
    if layers[0][0].is_meta:  # spread over devices, which is refused elsewhere
        return False
    return layer_digest(layers) not in (entry["sha256"], *entry.get("rounded", {}).values())


def layer_digest(layers: Iterable[tuple[Tensor, Tensor | None]], precision: torch.dtype = torch.float32) -> str:
    """Hash weight and bias of each head, rounded, in float32: half-precision files loaded as float32 give the same digest."""
    digest = hashlib.sha256()
    for tensor in (part for layer in layers for part in layer if part is not None):
        values = tensor.detach().to(precision).float().cpu().contiguous()
        digest.update(values.numpy().astype(np.dtype("<f4")).tobytes())
    return digest.hexdigest()
