"""Classifiers on an encoder's pooled features, where no stock class has them; in sentence-transformers' folders.

For texts the mean of the tokens, for encoders that were trained so; for images the pooled output of encoders that
transformers has no classification class for.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from etf_adapt.errors import check_choice
from etf_adapt.models.folders import NOT_STOCK, find_file, hub_options, load_config
from etf_adapt.models.names import ENTRY
from etf_adapt.models.positions import max_positions
from etf_adapt.models.weights import load_noting_new, named_if_broken
from etf_adapt.results.run_folder import write_json

POOLINGS = ("stock", "mean")  # of a text's tokens: as in the stock class, or their mean
_POOLING_FOLDER = "1_Pooling"
_DENSE_FOLDERS = {"mean": "2_Dense", "pooler_output": "1_Dense"}


class PooledEncoder(PreTrainedModel):
    """An encoder, a pooled feature, and a linear layer; a random encoder where only a configuration is given."""

    pooling: str  # "mean" of the tokens, or "pooler_output"
    _count_features: Callable[[PreTrainedConfig], int]
    lacks_layer: bool = False  # another tool has saved the encoder of such a model alone
    _unread: tuple[str, ...] = ()  # weights of the encoder on which the feature does not depend, by their beginning
    _new_weights: tuple[str, ...] = ()
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # the encoder has resolved it for both

    def __init__(self, config: PreTrainedConfig, encoder: PreTrainedModel | None = None) -> None:
        encoder = AutoModel.from_config(deepcopy(config)) if encoder is None else encoder
        in_features = self._count_features(encoder.config)
        super().__init__(encoder.config)
        self.num_labels = encoder.config.num_labels
        self.encoder = encoder
        self.supports_gradient_checkpointing = encoder.supports_gradient_checkpointing
        self.classifier = nn.Linear(in_features, cast(int, self.num_labels)).to(encoder.device, encoder.dtype)

    @classmethod
    def from_folder(cls, location: str | Path, **options: Any) -> PooledEncoder:
        """Load an encoder, with its linear layer where ``write_sentence_folder`` wrote one, else with a random one."""
        if options.get("config") is None:
            config, options = load_config(str(location), fetch=True, **options)
            options["config"] = config
        encoder: Any = load_noting_new(AutoModel, location, **options)
        model = cls(encoder.config, encoder)
        model._new_weights = tuple(f"encoder.{key}" for key in encoder._new_weights if not key.startswith(cls._unread))
        if (getattr(encoder.config, ENTRY, None) or {}).get("pooling") == cls.pooling:  # written by this library
            dense = f"{_DENSE_FOLDERS[cls.pooling]}/model.safetensors"
            file = find_file(location, dense, is_needed=True, **hub_options(options))
            model.lacks_layer = file is None
            if file is not None:
                with named_if_broken(location):
                    tensors = {name.removeprefix("linear."): tensor for name, tensor in load_file(file).items()}
                model.classifier.load_state_dict(tensors)
        return model.eval()


class MeanPoolingForSequenceClassification(PooledEncoder):
    r"""A text encoder, the mean of its tokens (last hidden states z, mask a) and a linear layer.

    .. math:: h = \frac{\sum_t a_t\, z_t}{\sum_t a_t}, \qquad u = W h + b

    h is the sentence embedding of Reimers and Gurevych (2019), Sentence-BERT, https://arxiv.org/abs/1908.10084.
    """

    # Stock classification classes of most encoders read the first token instead, many through a layer and a hyperbolic tangent
    # that a sentence encoder was not trained with. A pooler that the encoder brings along is kept as it is, not trained.
    pooling = "mean"
    _unread = ("pooler.",)

    def __init__(self, config: PreTrainedConfig, encoder: PreTrainedModel | None = None) -> None:
        super().__init__(config, encoder)
        if isinstance(getattr(self.encoder, "pooler", None), nn.Module):
            self.encoder.pooler.requires_grad_(False)

    @classmethod
    def _count_features(cls, config: PreTrainedConfig) -> int:
        if config.is_encoder_decoder:
            raise ValueError(
                f"A {config.model_type!r} model has an encoder and a decoder, of which none is read by the mean of its tokens: "
                "use pooling='stock'."
            )
        return cast(int, cast(Any, config).hidden_size)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the logits (batch, num_labels) of texts (batch, tokens), and the loss where labels (batch,) are given."""
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        inputs |= {"token_type_ids": token_type_ids, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        inputs |= {**kwargs, "return_dict": True}
        states = self.encoder(**{name: value for name, value in inputs.items() if value is not None})
        tokens = states.last_hidden_state
        mask = tokens.new_ones(tokens.shape[:2]) if attention_mask is None else attention_mask.to(tokens.dtype)
        mean = (tokens * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp_min(1e-9)
        return _output(states, self.classifier(mean), labels)


class PooledOutputForImageClassification(PooledEncoder):
    """An image encoder without a classification class, such as DINOv3: its pooled output and a linear layer."""

    pooling = "pooler_output"
    main_input_name = "pixel_values"

    @classmethod
    def _count_features(cls, config: PreTrainedConfig) -> int:
        in_features = pooled_features(config)
        if in_features is None:
            raise ValueError(f"A {config.model_type!r} model makes no pooled output of images alone: use another.")
        return in_features

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """Return the logits (batch, num_labels) of images, and the loss where labels (batch,) are given."""
        states = self.encoder(pixel_values=pixel_values, **{**kwargs, "return_dict": True})
        return _output(states, self.classifier(states.pooler_output), labels)


ENCODER_CLASSES = {"mean": MeanPoolingForSequenceClassification, "pooler_output": PooledOutputForImageClassification}


def pooled_features(config: PreTrainedConfig) -> int | None:
    """Return the width of the pooled output that ``AutoModel`` makes of images alone, None where it makes none."""
    kinds = AutoModel._model_mapping.get(type(config), ())
    kind = kinds[0] if isinstance(kinds, (list, tuple)) and kinds else kinds
    if getattr(kind, "main_input_name", None) != "pixel_values":
        return None
    side = getattr(config, "image_size", None) or 224
    size = (side, side) if isinstance(side, int) else tuple(side)
    try:  # a forward on the meta device
        with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
            encoder = AutoModel.from_config(deepcopy(config)).eval()
            images = torch.empty(2, getattr(config, "num_channels", 3), *size, dtype=encoder.dtype)
            pooled = encoder(pixel_values=images).pooler_output
    except Exception:  # whatever one of hundreds of models raises that needs more than images
        return None
    return int(pooled.shape[1]) if isinstance(pooled, Tensor) and pooled.ndim == 2 else None


def choose_encoder_class(
    auto_model: Any, config: PreTrainedConfig, location: str, *, pooling: str | None, saved: Mapping[str, Any] | None
) -> type[PooledEncoder] | None:
    """Return the class that stands in for a stock classification class, None where none has to.

    Where the stock class can be set to the pooling, ``config`` is; ``saved`` is our entry in ``config.json``.
    """
    is_text = "Sequence" in auto_model.__name__
    if pooling is None and saved is not None and saved.get("pooling", "stock") != "stock":
        return ENCODER_CLASSES[saved["pooling"]]
    if pooling is not None:
        check_choice("pooling", pooling, POOLINGS)
    if pooling == "mean":
        if not is_text:
            raise ValueError(f"`pooling` (={pooling!r}) is for texts: leave it out, the image model has its own.")
        if not hasattr(config, "classifier_pooling"):
            return MeanPoolingForSequenceClassification
        config.classifier_pooling = pooling
    if type(config) in auto_model._model_mapping or auto_model.__name__ in getattr(config, "auto_map", {}):
        return None
    if not is_text and pooled_features(config) is not None:
        _warn_of_encoder(config, location)
        return PooledOutputForImageClassification
    name = f"`pretrained_model_name_or_path` (={location!r})"
    is_a = f"{name} is a {config.model_type!r} model, of which transformers has no class for"
    if is_text:
        ways = "pooling='mean' for an encoder of texts, or ETFForImageClassification for images"
        raise ValueError(f"{is_a} text classification: choose another model, {ways}.")
    ways = "choose another model, or ETFForSequenceClassification for texts"
    raise ValueError(f"{is_a} image classification, and which makes no pooled output of images alone: {ways}.")


def warn_of_pooling(location: str, config: PreTrainedConfig, options: Mapping[str, Any]) -> None:
    """Warn where a sentence encoder was trained to be read by the mean of its tokens, and its stock class does not do so."""
    if getattr(config, "classifier_pooling", None) == "mean":
        return
    file = find_file(location, f"{_POOLING_FOLDER}/config.json", **hub_options(options))
    settings = {} if file is None else json.loads(file.read_text(encoding="utf-8"))
    modes = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value is True]
    if modes == ["pooling_mode_mean_tokens"] or settings.get("pooling_mode") == "mean":  # of older and newer versions
        warnings.warn(
            f"{location} was trained to be read by the mean of its tokens (1_Pooling/config.json), which its class for "
            "classification does not do: pooling='mean' (--pooling mean) does, and leaves a folder for SentenceTransformer and "
            "etf_adapt, which pipeline and AutoModel refuse; pooling='stock' keeps the class.",
            stacklevel=3,
        )


def _warn_of_encoder(config: PreTrainedConfig, location: str) -> None:
    """Warn that a model's architecture has no stock class, with the libraries that read it and timm's stock checkpoints."""
    words = [word for word in config.model_type.split("_") if word not in ("vision", "model")]
    known = [name for name in timm.list_pretrained(f"*{words[0]}*") if all(word in name for word in words)]
    hint = f" timm has it too (timm.list_pretrained('*{words[0]}*')): from timm/<name> it is a stock checkpoint."
    warnings.warn(
        f"{location} is a {config.model_type!r} model, of which transformers has no class for image classification: the head "
        "reads its pooled output, and what is saved is read by etf_adapt and by sentence-transformers, and its encoder alone "
        f"by AutoModel.{hint if known else ''}",
        stacklevel=4,
    )


def _output(states: Any, logits: Tensor, labels: Tensor | None) -> SequenceClassifierOutput:
    loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
    further = {name: states.get(name) for name in ("hidden_states", "attentions")}
    return SequenceClassifierOutput(loss=cast(Any, loss), logits=cast(Any, logits), **further)


def refuse_stock_classes(folder: str | Path) -> None:
    """Make transformers' classes, which would load a saved folder with a classifier of random weights, refuse it."""
    file = Path(folder, "config.json")
    config = {**json.loads(file.read_text(encoding="utf-8")), "transformers_weights": NOT_STOCK}
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_sentence_folder(folder: str | Path, model: Any, state_dict: Mapping[str, Tensor]) -> None:
    """Write a model so that ``SentenceTransformer(folder).encode(rows)`` are its logits.

    The encoder lies at the top; linear layer and, for texts, pooling in folders of their own. Stock classes of texts, which
    would put a random classifier on the encoder, refuse the folder.
    """
    encoder = {name.removeprefix("encoder."): state_dict[name] for name in state_dict if name.startswith("encoder.")}
    model.encoder.save_pretrained(folder, state_dict=encoder, max_shard_size="1TB")
    weight, bias = (state_dict[f"classifier.{name}"].detach().cpu().contiguous() for name in ("weight", "bias"))
    dense = _DENSE_FOLDERS[model.pooling]
    sizes = {"in_features": weight.shape[1], "out_features": weight.shape[0]}
    places = {"Transformer": "", **({"Pooling": _POOLING_FOLDER} if model.pooling == "mean" else {}), "Dense": dense}
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": index, "name": str(index), "path": place, "type": f"sentence_transformers.models.{kind}"}
            for index, (kind, place) in enumerate(places.items())
        ],
        f"{dense}/config.json": {**sizes, "bias": True, "activation_function": "torch.nn.modules.linear.Identity"},
    }
    if model.pooling == "mean":
        # The number of tokens that tokenizer and position embeddings both have room for.
        limits = (getattr(model.processor, "model_max_length", None), max_positions(model))
        max_length = min((int(limit) for limit in limits if limit is not None and limit > 0), default=None)
        pooling = {"word_embedding_dimension": weight.shape[1], "pooling_mode_mean_tokens": True}
        settings = {"max_seq_length": max_length, "config_args": {"transformers_weights": None}}
        files |= {f"{_POOLING_FOLDER}/config.json": pooling, "sentence_bert_config.json": settings}
        refuse_stock_classes(folder)
    else:
        files["sentence_bert_config.json"] = {
            "transformer_task": "feature-extraction",
            "modality_config": {"image": {"method": "forward", "method_output_name": model.pooling}},
            "module_output_name": "sentence_embedding",
        }
    for name, contents in files.items():
        write_json(Path(folder, name), contents)
    save_file({"linear.weight": weight, "linear.bias": bias}, Path(folder, dense, "model.safetensors"))
