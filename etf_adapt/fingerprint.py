"""Fingerprints of the layers that were saved as heads, by which they are known again after other tools had the folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def describe_layers(layers: Sequence[tuple[Tensor, Tensor | None]]) -> dict[str, Any]:
    """Describe the layers of a model's heads, so that ``is_changed`` knows them again.

    Args:
        layers: Weight and bias of each head, as they are saved.

    Returns:
        ``dtype``; ``sha256``, their ``layer_digest``; ``rounded``, that digest after rounding to each half-precision type.
    """
    halves = {
        name: [(weight.to(half), None if bias is None else bias.to(half)) for weight, bias in layers]
        for name, half in _HALVES.items()
    }
    return {
        "dtype": str(layers[0][0].dtype).removeprefix("torch."),
        "sha256": layer_digest(layers),
        "rounded": {name: layer_digest(rounded) for name, rounded in halves.items()},
    }


def is_changed(layers: Sequence[tuple[Tensor, Tensor | None]], entry: Mapping[str, Any]) -> bool:
    """Return whether layers are others than those that were saved; the same ones rounded are not.

    Args:
        layers: Weight and bias of each head, as they were loaded.
        entry: What ``describe_layers`` said of them when they were saved. Without ``rounded``, as in folders of its first
            versions, nothing is known of layers in a lower precision.

    Returns:
        Whether they differ; False where that is unknown.

    Example:
        >>> weight = torch.tensor([[0.1, 0.2]])
        >>> entry = describe_layers([(weight, None)])
        >>> is_changed([(weight.bfloat16(), None)], entry), is_changed([(weight.bfloat16() * 2, None)], entry)
        (False, True)
    """
    weight = layers[0][0]
    if weight.is_meta:  # spread over devices, which is refused elsewhere
        return False
    if "rounded" not in entry and torch.finfo(weight.dtype).bits < torch.finfo(getattr(torch, entry["dtype"])).bits:
        return False
    return layer_digest(layers) not in (entry["sha256"], *entry.get("rounded", {}).values())


def layer_digest(layers: Iterable[tuple[Tensor, Tensor | None]]) -> str:
    """Hash the rows and biases of a model's heads.

    Args:
        layers: Weight and bias of each head. They are hashed in float32, so that half-precision files loaded as float32
            give the same digest.

    Returns:
        SHA-256 in hexadecimal.

    Example:
        >>> weight = torch.ones(2, 3, dtype=torch.bfloat16)
        >>> layer_digest([(weight, None)]) == layer_digest([(weight.float(), None)])
        True
    """
    digest = hashlib.sha256()
    for tensor in (part for layer in layers for part in layer if part is not None):
        digest.update(tensor.detach().float().cpu().contiguous().numpy().astype(np.dtype("<f4")).tobytes())
    return digest.hexdigest()
