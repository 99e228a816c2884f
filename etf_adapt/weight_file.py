"""Files of weights with nothing beside them, into models whose architecture the user names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from timm.models import load_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from etf_adapt.state_dict import convert_state_dict, find_missing
from etf_adapt.swap import find_heads

_NAMED = 3


def load_weight_file(model: PreTrainedModel, path: str | Path, *, head_path: str | Sequence[str] | None = None) -> None:
    """Load the backbone of a model from a file of weights; the classifier that the file may hold is passed over.

    Args:
        model: A classification model of transformers, or timm's in transformers' wrapper.
        path: A state dict as ``.safetensors``, or as torch saves it, in which nothing but tensors is unpickled. It may lie
            inside a training checkpoint of timm, whose averaged weights are then preferred, as by timm itself.
        head_path: Module path or paths of the classifier, where it is not found.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no state dict, or it is another architecture's. The model is then as it was.
    """
    tensors = read_state_dict(path)
    heads = tuple(f"{place}." for place in find_heads(model, head=head_path))
    converted = convert_state_dict(model, tensors)
    prefix = f"{model.base_model_prefix}."

    def of_backbone(names: Sequence[str]) -> list[str]:
        return [name for name in names if not name.startswith(heads) and not f"{prefix}{name}".startswith(heads)]

    # Files of old versions of torch do not count the batches of a BatchNorm.
    passed_over = {*converted.unfit, *(name for name in model.state_dict() if name.endswith(".num_batches_tracked"))}
    faults = {
        "lacks": of_backbone([name for name in find_missing(model, converted.tensors) if name not in passed_over]),
        "has beside": of_backbone(converted.unexpected),
        "has in another shape": of_backbone(converted.unfit),
    }
    if any(faults.values()):
        said = "; ".join(f"{what} {_listed(names)}" for what, names in faults.items() if names)
        raise ValueError(
            f"`checkpoint_path` (={str(path)!r}) holds the weights of another model than {_architecture(model)}: it {said}. "
            "Name the architecture and the image size that they were saved from."
        )
    own = {name: tensor for name, tensor in converted.tensors.items() if not name.startswith(heads)}
    model.load_state_dict(own, strict=False)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a file of weights.

    Args:
        path: As for ``load_weight_file``.

    Returns:
        Tensors by name, without what ``DistributedDataParallel`` and ``torch.compile`` put before them.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds no state dict that can be read without running code.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"`checkpoint_path` (={str(path)!r}) is no file: give a file of weights.")
    try:
        tensors = load_state_dict(str(path), weights_only=True)
        if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise ValueError("it is no mapping of names to tensors")
    except Exception as error:  # whatever readers raise of files that are broken, or are none of weights
        reason = str(error).split(". ")[0].splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise ValueError(
            f"`checkpoint_path` (={str(path)!r}) holds no state dict that can be read without running code ({reason}): save "
            "the tensors of model.state_dict() with safetensors."
        ) from error
    return tensors


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _architecture(model: PreTrainedModel) -> str:
    return getattr(model.config, "architecture", None) or type(model).__name__
