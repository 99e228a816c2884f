"""Backbones from bare files of weights, without a configuration beside them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from timm.models import load_state_dict
from transformers import PreTrainedModel

from etf_adapt.models.swap import find_heads
from etf_adapt.models.weights import convert_state_dict, find_missing

logger = logging.getLogger(__name__)


def load_weight_file(model: PreTrainedModel, path: str | Path, *, head_path: str | Sequence[str] | None = None) -> None:
    """Load a backbone from a bare file of weights, as safetensors or as torch saves it; leave out a classifier in it."""
    argument = f"`checkpoint_path` (={str(path)!r})"
    if not Path(path).is_file():
        raise FileNotFoundError(f"{argument} is no file: give a file of weights.")
    try:  # timm's reader: averaged weights first, names without the prefixes of DistributedDataParallel and torch.compile
        converted = convert_state_dict(model, load_state_dict(str(path), weights_only=True))
    except Exception as error:  # whatever readers raise of files that are broken, or are none of weights
        reason = (str(error).split(". ")[0].splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"{argument} holds no state dict that can be read without running code ({reason}): save the tensors of "
            "model.state_dict() with safetensors."
        ) from error
    prefix = f"{model.base_model_prefix}."  # which names in a file may lack
    heads = tuple(f"{place.removeprefix(prefix)}." for place in find_heads(model, head=head_path))

    def of_backbone(names: Iterable[str]) -> list[str]:
        return [name for name in names if not name.removeprefix(prefix).startswith(heads)]

    # Files of old versions of torch do not count the batches of a BatchNorm.
    missing = [name for name in find_missing(model, converted.tensors) if not name.endswith(".num_batches_tracked")]
    names = {"lacks, or has in another shape,": of_backbone(missing), "has beside": of_backbone(converted.unexpected)}
    faults = [f"{fault} {found[0]} ({len(found)} in all)" for fault, found in names.items() if found]
    if faults:
        architecture = getattr(model.config, "architecture", None) or type(model).__name__
        raise ValueError(
            f"{argument} holds the weights of another model than {architecture}: it {'; it '.join(faults)}. Name the "
            "architecture and the image size that they were saved from."
        )
    taken = of_backbone(converted.tensors)
    model.load_state_dict({name: converted.tensors[name] for name in taken}, strict=False)
    logger.warning("%s: %d tensors of the backbone loaded, its classifier left out.", argument, len(taken))
