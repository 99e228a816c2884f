"""sentence-transformers' folders: an encoder at the top, how it is pooled, and a linear layer in a folder of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from etf_adapt.folders import find_file

_POOLING_FOLDER = "1_Pooling"
_DENSE_FOLDERS = {"mean": "2_Dense", "pooler_output": "1_Dense"}


def trained_pooling(location: str | Path, **options: Any) -> str | None:
    """Return the pooling that a sentence encoder was trained with, as its folder tells.

    Args:
        location: Folder or Hub id.
        options: Where on the Hub and in its cache files are.

    Returns:
        ``"mean"``, ``"cls"``, ``"max"``, ...; None where the folder is not one of sentence-transformers.
    """
    settings = _read_json(location, f"{_POOLING_FOLDER}/config.json", **options) or {}
    modes = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value is True]
    named = {"mean_tokens": "mean", "cls_token": "cls", "max_tokens": "max"}
    if len(modes) == 1:
        mode = modes[0].removeprefix("pooling_mode_")
        return named.get(mode, mode)
    mode = settings.get("pooling_mode")
    return mode if isinstance(mode, str) else None


def write_sentence_folder(folder: str | Path, model: Any, state_dict: Mapping[str, Tensor]) -> None:
    """Write a model as sentence-transformers reads it: ``SentenceTransformer(folder).encode(rows)`` are its logits.

    The encoder lies at the top, where ``AutoModel`` finds it; the linear layer and, for texts, the pooling in folders of
    their own.

    Args:
        folder: Made where it does not exist.
        model: An ``etf_adapt.pooling.PooledEncoder`` whose head is a stock layer.
        state_dict: Its weights.
    """
    prefix = "encoder."
    encoder = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    model.encoder.save_pretrained(folder, state_dict=encoder, max_shard_size="1TB")
    weight, bias = (state_dict[f"classifier.{name}"].detach().cpu().contiguous() for name in ("weight", "bias"))
    dense = _DENSE_FOLDERS[model.pooling]
    places = {"Transformer": "", **({"Pooling": _POOLING_FOLDER} if model.pooling == "mean" else {}), "Dense": dense}
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": index, "name": str(index), "path": place, "type": f"sentence_transformers.models.{kind}"}
            for index, (kind, place) in enumerate(places.items())
        ],
        f"{dense}/config.json": {
            "in_features": weight.shape[1],
            "out_features": weight.shape[0],
            "bias": True,
            "activation_function": "torch.nn.modules.linear.Identity",
        },
    }
    if model.pooling == "mean":
        modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
        files["sentence_bert_config.json"] = {"max_seq_length": _max_length(model), "do_lower_case": False}
        files[f"{_POOLING_FOLDER}/config.json"] = {
            "word_embedding_dimension": weight.shape[1],
            **{f"pooling_mode_{mode}": mode == "mean_tokens" for mode in modes},
        }
    else:
        files["sentence_bert_config.json"] = {
            "transformer_task": "feature-extraction",
            "modality_config": {"image": {"method": "forward", "method_output_name": model.pooling}},
            "module_output_name": "sentence_embedding",
        }
    for name, contents in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    save_file({"linear.weight": weight, "linear.bias": bias}, Path(folder, dense, "model.safetensors"))


def read_dense(location: str | Path, pooling: str, **options: Any) -> dict[str, Tensor] | None:
    """Read the linear layer of a folder that ``write_sentence_folder`` wrote.

    Args:
        location: Folder or Hub id.
        pooling: ``"mean"`` or ``"pooler_output"``.
        options: Where on the Hub and in its cache files are.

    Returns:
        ``weight`` (num_classes, in_features) and ``bias`` (num_classes,); None where another tool has saved the encoder alone.

    Raises:
        OSError: The Hub cannot be asked, and the layer is not cached.
    """
    file = find_file(location, f"{_DENSE_FOLDERS[pooling]}/model.safetensors", is_needed=True, **options)
    if file is None:
        return None
    return {name.removeprefix("linear."): tensor for name, tensor in load_file(file).items()}


def _max_length(model: Any) -> int | None:
    """Return the tokens of a text that tokenizer and positions both have room for; None where neither has a limit."""
    limits = (
        getattr(model.processor, "model_max_length", None),
        getattr(model.config, "max_position_embeddings", None),
    )
    return min((int(limit) for limit in limits if limit is not None and limit > 0), default=None)


def _read_json(location: str | Path, name: str, **options: Any) -> Any:
    file = find_file(location, name, **options)
    return None if file is None else json.loads(file.read_text(encoding="utf-8"))
