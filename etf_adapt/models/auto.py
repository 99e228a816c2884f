"""Loading: any stock classification model with a new head and loss, or one saved here with its own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
)

from etf_adapt.heads.in_model import head_modules, seeded_torch
from etf_adapt.losses.registry import make_loss
from etf_adapt.models.digests import is_changed
from etf_adapt.models.etf_model import ETFModel, is_live
from etf_adapt.models.folders import HUB_OPTIONS, find_processor, load_config, locate, read_weights, resolve_dtype
from etf_adapt.models.names import ENTRY, is_timm_elsewhere
from etf_adapt.models.pooling import PooledEncoder, choose_encoder_class, warn_of_pooling
from etf_adapt.models.quantization import spare_heads
from etf_adapt.models.stock_subclass import factory_of, made_class
from etf_adapt.models.swap import find_heads, label_names, require_plain_weight, swap_head
from etf_adapt.models.timm_layout import timm_weights
from etf_adapt.models.weight_files import load_weight_file
from etf_adapt.models.weights import load_noting_new

_Model = TypeVar("_Model", bound=PreTrainedModel)


class _Factory(ETFModel):
    """Loading, common to both tasks."""

    _auto_model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(f"{type(self).__name__} is not instantiated: use {type(self).__name__}.from_pretrained(...).")

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        num_labels: int | None = None,
        id2label: Mapping[int, str] | Sequence[str] | None = None,
        label2id: Mapping[str, int] | None = None,
        head: str | None = None,
        trainable: bool | None = None,
        loss: Mapping[str, Any] | str | None = None,
        class_counts: Sequence[int] | None = None,
        head_path: str | Sequence[str] | None = None,
        pooling: str | None = None,
        pretrained: bool = True,
        checkpoint_path: str | Path | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> ETFModel:
        """Load a pretrained model and give it a head and a loss; or load a folder saved here with its own.

        A folder saved here comes back with its head, loss and settings, unless other labels or another head are asked
        for. Any other model gets a new head. Weights are loaded as float32 whatever their file holds: half-precision weights
        would be trained in half precision. An image encoder without a classification class (DINOv3) is read by its pooled
        output.

        Args:
            pretrained_model_name_or_path: Folder in transformers' or timm's layout, Hub id, timm name or short name.
            num_labels: Number of classes; that of ``id2label``, or the model's own, where None.
            id2label: Names of the classes, by number or in their order.
            label2id: Their inverse, where that is at hand.
            head: ``"etf"``, ``"linear"``, ``"cosine"`` or ``"paper"``; as saved, or ``"etf"``, where None.
            trainable: Whether the head learns; as saved, or the kind's default, where None.
            loss: Arguments of ``losses.registry.make_loss``, or its name; as saved, or the kind's default, where None.
            class_counts: Training rows of each class (num_classes,), for losses that need them.
            head_path: Module path or paths of the layer to replace, for models in which it is not found.
            pooling: Feature of a text: ``"stock"``, as in the stock class, or ``"mean"`` of the tokens, as most sentence
                encoders were trained (``models.pooling``); as saved, or ``"stock"``, where None.
            pretrained: Whether to load weights; otherwise they are random.
            checkpoint_path: Bare file of weights for the architecture of this name; its classifier is left out.
            seed: Seed of the random frame and of weights that are not in the file.
            kwargs: Passed on to the stock class's ``from_pretrained``; to its ``from_config`` without weights.

        Returns:
            The model, an instance of its stock class and of this one; with ``output_loading_info=True`` a tuple of it and
            the stock class's loading info, as in transformers.

        Raises:
            OSError: The model is not on this machine and cannot be fetched.
            ValueError: No model has this name, it does not do this task, or arguments do not fit each other.
        """
        if "num_classes" in kwargs:
            raise ValueError(f"`num_classes` (={kwargs['num_classes']}) is `num_labels` here, as in transformers.")
        factory = factory_of(cls)
        head_path = [head_path] if isinstance(head_path, str) else head_path and list(head_path)
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", torch.float32))
        if checkpoint_path is not None and not pretrained:
            raise ValueError(f"`checkpoint_path` (={str(checkpoint_path)!r}) and pretrained=False: leave out one.")
        pretrained = pretrained and checkpoint_path is None
        location = locate(pretrained_model_name_or_path, fetch=pretrained, options=kwargs)
        config = kwargs.pop("config", None)
        if config is None:
            config, kwargs = load_config(location, fetch=pretrained, **kwargs)
        names = _label_names(id2label, label2id)
        if names is not None and num_labels not in (None, len(names)):
            raise ValueError(f"`num_labels` (={num_labels}) must be the number of names in `id2label` (={len(names)}).")
        count = len(names) if num_labels is None and names is not None else num_labels
        saved = getattr(config, ENTRY, None) if pretrained else None
        if saved is not None and saved.get("adapters"):
            raise ValueError(
                f"`pretrained_model_name_or_path` (={location!r}) is a training checkpoint with adapters apart from the "
                "backbone: go on from it with --resume_from_checkpoint, or load the finished folder, in which they are merged."
            )
        if pooling is None and saved is None and pretrained and factory._task == "text":
            warn_of_pooling(location, config, kwargs)
        encoder_class = choose_encoder_class(factory._auto_model, config, location, pooling=pooling, saved=saved)
        has_own_class = getattr(encoder_class, "__name__", None) in (config.architectures or ())
        is_checkpoint = saved is not None and (is_live(saved) or has_own_class)
        wants_info = kwargs.pop("output_loading_info", False)
        if wants_info and (is_checkpoint or encoder_class is not None or not pretrained):
            raise ValueError("`output_loading_info` (=True) is for weights that a stock class reads: leave it out.")
        options = {"encoder_class": encoder_class, "dtype": dtype, **kwargs}
        with seeded_torch(seed):
            if saved is not None and is_checkpoint:
                model = factory._load_checkpoint(location, config, saved, **options)
            else:
                path = head_path or (saved["head"]["paths"] if saved is not None else None)
                model = factory._load_stock(location, config, count, pretrained=pretrained, head_path=path, **options)
            if checkpoint_path is not None:
                load_weight_file(model, checkpoint_path, head_path=head_path)
        info = vars(model).pop("_loading_info", None)
        lacks_layer = getattr(model, "lacks_layer", False)
        asked = {"num_labels": count, "id2label": names, "kind": head, "paths": head_path}
        asked["pooling"] = getattr(encoder_class, "pooling", "stock")
        if saved is not None and not lacks_layer and _is_saved(asked, saved, model.config):
            if not isinstance(model, ETFModel):
                model = _restore(factory, model, saved)
            if trainable is not None:
                for layer in head_modules(model).values():
                    layer.trainable = trainable
                    layer.fix()
            if loss is not None or class_counts is not None:
                model.set_loss(model._loss_settings if loss is None else loss, class_counts)
        else:
            before = cast(int, model.config.num_labels)
            if saved is not None:
                other = "other labels or another head were asked for"
                why = "another tool has saved the encoder without it" if lacks_layer else other
                warnings.warn(
                    f"The head saved in {location} ({saved['head']['kind']!r}, {before} classes) is replaced by a new one "
                    f"({head or 'etf'!r}, {count or before} classes): {why}.",
                    stacklevel=2,
                )
            settings: dict[str, Any] = {"trainable": trainable, "loss": loss, "class_counts": class_counts}
            settings |= {"head": head or "etf", "head_path": head_path, "seed": seed}
            model = adapt(model, count or before, id2label=names, factory=factory, **settings)
        model.processor = find_processor(location, factory._task, model.config, kwargs)
        model.trusts_code = kwargs.get("trust_remote_code")
        if factory._task == "text":
            _set_padding(model)
        return cast(ETFModel, (model, info) if wants_info else model)

    @classmethod
    def _load_stock(
        cls,
        location: str,
        config: PreTrainedConfig,
        num_labels: int | None,
        *,
        pretrained: bool,
        dtype: Any,
        encoder_class: type[PooledEncoder] | None = None,
        head_path: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Load the stock model with its own head, so that no part of ours was ever on the meta device."""
        if encoder_class is not None and pretrained:
            return encoder_class.from_folder(location, config=config, dtype=dtype, **kwargs)
        if encoder_class is not None:
            return cast(Any, encoder_class(config)).to(resolve_dtype(dtype, config)).eval()
        if isinstance(config, TimmWrapperConfig) and config.num_labels == 0:
            if num_labels is None:
                raise ValueError(f"`num_labels` (=None) is needed: {location} is a backbone without classes.")
            config.num_labels = num_labels
        is_by_timm = pretrained and is_timm_elsewhere(location)
        if pretrained and not is_by_timm:
            if (settings := kwargs.get("quantization_config")) is not None:
                kwargs["quantization_config"] = spare_heads(settings, cls._auto_model, config, head_path=head_path)
            return load_noting_new(cls._auto_model, location, config=config, dtype=dtype, **kwargs)
        options = {name: value for name, value in kwargs.items() if name not in (*HUB_OPTIONS, "code_revision")}
        options["dtype"] = resolve_dtype(dtype, config)
        model = cast(PreTrainedModel, cls._auto_model.from_config(config, **options)).eval()
        if isinstance(config, TimmWrapperConfig):  # the wrapper draws all weights alike; timm knows better
            name = location.removeprefix("timm/") if is_by_timm else config.architecture
            model.timm_model.load_state_dict(timm_weights(name, config, pretrained=is_by_timm))
        return model

    @classmethod
    def _load_checkpoint(
        cls, location: str, config: PreTrainedConfig, saved: Mapping[str, Any], **options: Any
    ) -> ETFModel:
        """Load a training checkpoint that no stock class reads: build the model as it was, then load its weights."""
        kind = {name: options.pop(name) for name in ("encoder_class", "dtype")}
        model = cls._load_stock(location, config, None, pretrained=False, **kind)
        model = _restore(cls, model, {**saved, "head": {**saved["head"], "sha256": None}})
        try:
            model.load_state_dict(read_weights(location, **options), strict=False)
            model._require_complete()
        except RuntimeError as error:
            raise ValueError(f"The checkpoint {location} cannot be loaded: {error} Take another one.") from error
        heads = head_modules(model).values()
        is_stock = all(head.is_stock_layer for head in heads)  # as under a pooling of our own
        was_changed = is_stock and _was_changed([(head.weight, head.bias) for head in heads], saved["head"])
        for head in heads:
            head.frame = "changed" if was_changed else saved["head"]["frame"]
        if was_changed:
            model.reset_calibration()
        return model


class ETFForImageClassification(_Factory):
    """Make image classification models with an ETF head and its loss, by ``from_pretrained``.

    It returns the stock model of transformers, or timm's in transformers' wrapper, with its last layer replaced: an instance
    of its stock class and of this one.

    Example:
        >>> model = ETFForImageClassification.from_pretrained("timm/test_vit.r160_in1k", num_labels=3, pretrained=False)
        >>> model(pixel_values=torch.randn(2, 3, 160, 160), labels=torch.tensor([0, 2])).logits.shape
        torch.Size([2, 3])
        >>> type(model).__name__, isinstance(model, ETFForImageClassification)
        ('TimmWrapperForImageClassification', True)
    """

    _auto_model = AutoModelForImageClassification
    _task = "image"


class ETFForSequenceClassification(_Factory):
    """Make text classification models with an ETF head and its loss, as ``ETFForImageClassification`` does for images.

    Decoders need ``config.pad_token_id``: it is taken from the tokenizer beside the model.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        >>> folder = tempfile.mkdtemp()  # any Hub id would do
        >>> BertForSequenceClassification(BertConfig(**sizes, vocab_size=20)).save_pretrained(folder)
        >>> model = ETFForSequenceClassification.from_pretrained(folder, num_labels=3)
        >>> model(input_ids=torch.tensor([[1, 2], [3, 4]]), labels=torch.tensor([0, 2])).logits.shape
        torch.Size([2, 3])
    """

    _auto_model = AutoModelForSequenceClassification
    _task = "text"


def adapt(
    model: _Model,
    num_labels: int,
    *,
    id2label: Mapping[int, str] | Sequence[str] | None = None,
    label2id: Mapping[str, int] | None = None,
    head: str = "etf",
    trainable: bool | None = None,
    loss: Mapping[str, Any] | str | None = None,
    class_counts: Sequence[int] | None = None,
    head_path: str | Sequence[str] | None = None,
    seed: int = 0,
    factory: type[_Factory] | None = None,
) -> _Model:
    """Give a stock classification model of transformers, or timm's in its TimmWrapper, a head and a loss, in place.

    Arguments are those of ``from_pretrained``; the factory is that of the model's task where None.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"`model` is a {type(model).__name__}, not a model of transformers: etf_adapt.swap_head replaces the head of any "
            "timm model, and ETFForImageClassification.from_pretrained('timm/<name>') loads one."
        )
    if factory is None:
        is_image = "ImageClassification" in type(model).__name__ or model.main_input_name == "pixel_values"
        factory = ETFForImageClassification if is_image else ETFForSequenceClassification
    if isinstance(model, ETFModel):
        model.fold_heads()  # so that the new layer has the bias of the stock one
    elif "forward" in vars(model):
        raise ValueError(
            f"The forward of this {type(model).__name__} was replaced on the object, as `device_map` over several devices "
            "does, and would pass by our loss: load the model on one device."
        )
    paths = find_heads(model, head=head_path)
    names = _label_names(id2label, label2id)
    has_bias = {path: getattr(model.get_submodule(path), "bias", None) is not None for path in paths}
    with seeded_torch(seed):
        generator = torch.Generator().manual_seed(seed)
        swap_head(model, num_labels, head=paths, kind=head, trainable=trainable, id2label=names, generator=generator)
    if not isinstance(model, ETFModel):
        model.__class__ = made_class(factory, type(model))
    made = cast(ETFModel, model)
    made._has_bias = {**has_bias, **made._has_bias}
    made._class_counts, made._has_trained = None, False
    made.reset_calibration()
    made.set_loss(loss, class_counts)
    return cast(_Model, made)


def _restore(factory: type[_Factory], model: PreTrainedModel, saved: Mapping[str, Any]) -> Any:
    """Give a model that was loaded with its saved layer the head, loss and settings that it was saved with."""
    if (version := saved.get("version")) != 1:
        raise ValueError(f"The folder was written by a newer etf_adapt (entry version {version}): upgrade it.")
    entry, paths = saved["head"], saved["head"]["paths"]
    layers = {path: model.get_submodule(path) for path in paths}
    for path, layer in layers.items():
        require_plain_weight(layer, path)
    tensors = [(cast(Tensor, layer.weight), cast("Tensor | None", layer.bias)) for layer in layers.values()]
    was_changed = _was_changed(tensors, entry)
    num_labels = cast(int, model.config.num_labels)
    counts = saved["class_counts"] if len(saved["class_counts"] or ()) == num_labels else None
    kind = "linear" if entry["folded"] else entry["kind"]
    settings = {"trainable": entry["trainable"], "loss": _known_loss(saved["loss"], counts), "class_counts": counts}
    model = adapt(model, num_labels, head=kind, head_path=paths, factory=factory, **settings)
    for head, (weight, bias) in zip(head_modules(model).values(), tensors, strict=True):
        if not is_live(saved):
            head.set_class_vectors(weight, bias)
        head.frame = "changed" if was_changed else entry["frame"]
        if entry["folded"]:
            head.folded_from = entry["kind"]
    if not was_changed:
        model._logit_scale, model._prior_adjustment = saved["logit_scale"], saved["prior_adjustment"]
    return model


def _was_changed(layers: Sequence[tuple[Tensor, Tensor | None]], entry: Mapping[str, Any]) -> bool:
    """Return whether the layers of the heads are others than those that were saved, and warn if so."""
    if entry.get("sha256") is None or not is_changed(layers, entry):
        return False
    warnings.warn(
        f"The head's layer is not the one that etf_adapt saved: another tool has changed it since. It is loaded as it "
        f"stands, without its calibration, and is {'trained' if entry['trainable'] else 'fixed'}.",
        stacklevel=4,
    )
    return True


def _known_loss(saved: Mapping[str, Any], class_counts: Sequence[int] | None) -> dict[str, Any] | None:
    """Return the loss settings of a folder; None, with a warning, for a loss or an option that this version lacks."""
    try:
        make_loss(saved, class_counts=class_counts)
    except (TypeError, ValueError) as error:
        warnings.warn(f"The folder's loss {dict(saved)} is replaced by its head's default loss: {error}", stacklevel=4)
        return None
    return dict(saved)


def _is_saved(asked: Mapping[str, Any], saved: Mapping[str, Any], config: PreTrainedConfig) -> bool:
    """Return whether labels, kind of head, its place and the pooling that were asked for are the saved ones."""
    entry = saved["head"]
    own = {"num_labels": config.num_labels, "id2label": dict(config.id2label or {}), "paths": entry["paths"]}
    own |= {"kind": None if entry["folded"] else entry["kind"], "pooling": saved.get("pooling", "stock")}
    return all(value is None or value == own[name] for name, value in asked.items())


def _label_names(
    id2label: Mapping[int, str] | Sequence[str] | None, label2id: Mapping[str, int] | None
) -> dict[int, str] | None:
    if id2label is None:
        return None if label2id is None else label_names({index: name for name, index in label2id.items()})
    return label_names(id2label)


def _set_padding(model: ETFModel) -> None:
    """Give a decoder the padding token that it needs to find the last token of each text."""
    text_config = model.config.get_text_config()
    if getattr(text_config, "pad_token_id", None) is not None:
        return
    pad_token_id = getattr(model.processor, "pad_token_id", None)
    if pad_token_id is None:
        warnings.warn(
            "`config.pad_token_id` (=None) is needed by decoders for batches of more than one text, and no tokenizer with a "
            "padding token lies beside the model: set model.config.pad_token_id to your tokenizer's.",
            stacklevel=3,
        )
    text_config.pad_token_id = model.config.pad_token_id = pad_token_id
