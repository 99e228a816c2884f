"""Stock classification models with a head and a loss of ours: loading, training-time forward, and saving as stock folders."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import timm
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)
from transformers.utils import ModelOutput

from etf_adapt.folders import (
    ENTRY,
    is_training_checkpoint,
    layer_digest,
    load_config,
    load_processor,
    locate,
    read_weights,
    write_timm_folder,
)
from etf_adapt.head import ClassifierHead, fold_head
from etf_adapt.losses import Loss, make_loss
from etf_adapt.state_dict import convert_state_dict, find_missing
from etf_adapt.swap import head_modules, logits_of, swap_head

__all__ = ["ETFForImageClassification", "ETFForSequenceClassification", "adapt", "load_processor"]

DEFAULT_LOSSES: dict[str, dict[str, Any]] = {
    "etf": {"name": "dot_regression"},
    "linear": {"name": "cross_entropy"},
    "cosine": {"name": "cross_entropy"},
    # As in the published code: on the sphere, by the length of the feature, the classes of a batch weighted equally.
    "paper": {"name": "dot_regression", "form": "sphere", "balance": "in_batch", "unit_features": True},
}
"""Settings of the loss that goes with each kind of head."""

_STOCK_SHAPED = ("etf", "linear")
_TIMM_PREFIX = "timm_model."
_Model = TypeVar("_Model", bound=PreTrainedModel)

# For type checkers only: at run time a base of transformers' own would hide the stock class's attributes.
_Base = PreTrainedModel if TYPE_CHECKING else object


class ETFModel(_Base):
    """What a stock classification model gains: our loss in its forward, and folders and checkpoints that read back exactly.

    Classes with these methods are made on the fly, as subclasses of the stock class with its name; see ``adapt``.

    Attributes:
        accepts_loss_kwargs: False, so that ``Trainer`` averages the loss over accumulated batches. (True by a ``**kwargs``
            in the signature would multiply the gradients by their number.)
        processor: Tokenizer or image processor that ``save_pretrained`` writes beside the model; None where there is none.
    """

    accepts_loss_kwargs = False
    processor: Any = None
    _stock_class: type[PreTrainedModel]
    _loss: Loss | None = None
    _loss_settings: dict[str, Any]
    _class_counts: list[int] | None = None
    _temperature: float = 1.0
    _prior_adjustment: list[float] | None = None
    _shards: dict[str, Tensor] | None = None
    _unlabelled_steps: int = 0
    _has_warned_of_frame: bool = False

    # Settings and loss

    @property
    def etf_settings(self) -> dict[str, Any]:
        """Head, loss and calibration of the model, as they stand in ``config.json``.

        ``head``: ``kind``, ``frame``, ``trainable``, ``folded`` (the layer was folded from a head of that kind) and
        ``paths``; ``loss``: arguments of ``etf_adapt.losses.make_loss``; ``class_counts``; ``temperature`` and
        ``prior_adjustment``: what ``set_temperature`` folded into the head.
        """
        heads = head_modules(self)
        first = next(iter(heads.values()), None)
        head = {
            "kind": getattr(first, "folded_from", getattr(first, "kind", None)),
            "frame": getattr(first, "frame", None),
            "trainable": getattr(first, "trainable", None),
            "folded": hasattr(first, "folded_from"),
            "paths": list(heads),
        }
        return {
            "version": 1,
            "library": "timm" if isinstance(self, TimmWrapperForImageClassification) else "transformers",
            "head": head,
            "loss": dict(self._loss_settings),
            "class_counts": self._class_counts,
            "temperature": self._temperature,
            "prior_adjustment": self._prior_adjustment,
        }

    def set_loss(
        self, settings: Mapping[str, Any] | str | None = None, class_counts: Sequence[int] | None = None
    ) -> None:
        """Choose the loss that ``forward`` returns.

        Args:
            settings: Arguments of ``etf_adapt.losses.make_loss``, or the loss's name; the default of the head's kind where
                None.
            class_counts: Training rows of each class (num_classes,); those known so far where None.

        Raises:
            ValueError: The settings are not those of a loss, or class counts are missing or of another number.
        """
        heads = list(head_modules(self).values())
        chosen = DEFAULT_LOSSES[heads[0].kind] if settings is None else settings
        chosen = {"name": chosen} if isinstance(chosen, str) else dict(chosen)
        counts = self._class_counts if class_counts is None else [int(count) for count in class_counts]
        if counts is not None and len(counts) != heads[0].num_classes:
            raise ValueError(
                f"`class_counts` has {len(counts)} entries, but the head has {heads[0].num_classes} classes: give one a class."
            )
        self._loss = make_loss(chosen, class_counts=counts)
        self._loss_settings, self._class_counts = chosen, counts

    def set_temperature(self, temperature: float, prior_adjustment: Sequence[float] | None = None) -> None:
        r"""Fold a factor s of the logits, and offsets a, into the head, in place of those folded before.

        .. math:: W \leftarrow s W, \qquad b \leftarrow s b + a

        The stock layer then gives calibrated confidences. The loss of ``forward`` takes both out again, so that training
        goes on as before. The factor changes no argmax; offsets do.

        Args:
            temperature: The factor s, above 0 (1 / T in the terms of temperature scaling).
            prior_adjustment: The offsets a (num_classes,); none where None.

        Raises:
            ValueError: s is not positive, a has another length or the layer no bias, or the head is not a stock layer yet.
        """
        if not temperature > 0.0:
            raise ValueError(f"`temperature` (={temperature}) must be above 0.")
        heads = list(head_modules(self).values())
        for head in heads:
            if head.kind not in _STOCK_SHAPED:
                raise ValueError(f"A {head.kind!r} head is no stock layer: call fold_heads() first, and calibrate after it.")
            if prior_adjustment is not None and head.bias is None:
                raise ValueError("`prior_adjustment` needs a bias, and this model's classifier has none.")
            if prior_adjustment is not None and len(prior_adjustment) != head.num_classes:
                raise ValueError(
                    f"`prior_adjustment` has {len(prior_adjustment)} entries, but the head has {head.num_classes} classes."
                )
        if prior_adjustment is not None and len(heads) > 1:
            raise ValueError("`prior_adjustment` cannot be split over several heads: calibrate with the temperature alone.")
        factor = temperature / self._temperature
        old = torch.tensor(self._prior_adjustment or [0.0], dtype=torch.float64)
        new = torch.tensor(list(prior_adjustment or [0.0]), dtype=torch.float64)
        for head in heads:
            weight, bias = head.rows()
            head.set_rows(factor * weight, None if bias is None else factor * (bias - old) + new)
        self._temperature = float(temperature)
        self._prior_adjustment = None if prior_adjustment is None else [float(offset) for offset in prior_adjustment]

    def reset_temperature(self) -> None:
        """Forget what was folded into the head, after its rows were set anew."""
        self._temperature, self._prior_adjustment = 1.0, None

    def fold_heads(self) -> None:
        """Replace cosine and paper heads by the stock layer with the same argmax, as ``save_pretrained`` would.

        Other heads stay. The confidences change: calibrate afterwards.
        """
        for path, head in head_modules(self).items():
            folded = _folded(self, head, path)
            if folded is not head:
                parent, _, name = path.rpartition(".")
                setattr(self.get_submodule(parent), name, folded)
                self.set_loss(_without_unit_features(self._loss_settings))

    def compute_loss_from_logits(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the model's loss.

        Args:
            logits: Tensor (batch, num_classes), as ``forward`` returns them.
            labels: Tensor (batch,) of class indices, or (batch, num_classes) of probabilities.

        Returns:
            Scalar tensor, float32.
        """
        self._unlabelled_steps = 0
        if self._loss is None:  # a copy: functions are not pickled
            self._loss = make_loss(self._loss_settings, class_counts=self._class_counts)
        if self._prior_adjustment is not None:
            logits = logits - logits.new_tensor(self._prior_adjustment)
        if self._temperature != 1.0:
            logits = logits.float() / self._temperature
        return self._loss(logits, labels.to(logits.device))

    def _warn_in_training(self, labels: Tensor | None) -> None:
        """Say once what would train on in silence: an unaligned head, and a loss that is not the model's."""
        if not self._has_warned_of_frame and any(
            head.kind == "etf" and head.frame == "random" for head in head_modules(self).values()
        ):
            self._has_warned_of_frame = True
            warnings.warn(
                "The ETF head is a random frame, to which the features of a pretrained model have to turn first. "
                "etf_adapt.align_head(model, dataloader) sets it from the training rows before the first step and learns the "
                "rare classes better; ETFTrainer does so by itself.",
                stacklevel=3,
            )
        if labels is None:
            self._unlabelled_steps += 1
            if self._unlabelled_steps == 2:  # Whoever calls compute_loss_from_logits has done so by now.
                warnings.warn(
                    f"This model is trained without its labels, so that its loss ({self._loss_settings['name']}) is not used. "
                    "Trainer does that for `label_smoothing_factor` and applies a cross-entropy: set it to 0 and call "
                    f"model.set_loss({self._loss_settings | {'label_smoothing': 0.1}}).",
                    stacklevel=3,
                )

    # Saving and loading

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        *,
        fold: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a folder that stock transformers reads, and for timm's backbones timm too, and this library in full.

        Args:
            save_directory: Folder.
            is_main_process: Whether this process writes.
            state_dict: The model's weights, where they have to be gathered; its own otherwise.
            fold: Whether cosine and paper heads are folded into the stock layer with the same argmax. Where None, all
                folders but ``Trainer``'s ``checkpoint-<step>`` are folded: a checkpoint must hold the head as it trains,
                and those of the two kinds are read here only.
            kwargs: Passed on to transformers' ``save_pretrained``. Timm's layout has one weight file and takes
                ``push_to_hub`` and its arguments only.
        """
        self._require_complete()
        fold = not is_training_checkpoint(save_directory) if fold is None else fold
        tensors: dict[str, Tensor] = dict(self.state_dict() if state_dict is None else state_dict)
        self.config.__dict__[ENTRY] = self._entry(tensors, fold=fold)
        if is_main_process and self.processor is not None and not is_training_checkpoint(save_directory):
            self.processor.save_pretrained(save_directory)
        if not isinstance(self, TimmWrapperForImageClassification):
            super().save_pretrained(
                cast(str, save_directory), is_main_process=is_main_process, state_dict=tensors, **kwargs
            )
        elif is_main_process:
            names = {name.removeprefix(_TIMM_PREFIX): tensor for name, tensor in tensors.items()}
            write_timm_folder(save_directory, self.config, self.timm_model, names)
            kwargs.pop("max_shard_size", None)
            if kwargs.pop("push_to_hub", False):
                self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).resolve().name), **kwargs)

    def _entry(self, tensors: dict[str, Tensor], *, fold: bool) -> dict[str, Any]:
        """Return the entry of ``config.json``; heads that are to be folded are folded in ``tensors``."""
        settings = self.etf_settings
        for path, head in head_modules(self).items():
            own = {name: tensors[f"{path}.{name}"] for name in head.state_dict() if f"{path}.{name}" in tensors}
            if fold and head.kind not in _STOCK_SHAPED:
                copy = deepcopy(head)
                copy.load_state_dict(own)
                stock = _folded(self, copy, path)
                for name in own:
                    del tensors[f"{path}.{name}"]
                tensors.update({f"{path}.{name}": tensor for name, tensor in stock.state_dict().items()})
                settings["head"]["folded"] = True
                settings["loss"] = _without_unit_features(settings["loss"])
        layers = [(tensors[f"{path}.weight"], tensors.get(f"{path}.bias")) for path in settings["head"]["paths"]]
        settings["dtype"] = str(layers[0][0].dtype).removeprefix("torch.") if layers else None
        settings["sha256"] = layer_digest(layers)
        return settings

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights under the model's names or under those of its files (``etf_adapt.state_dict``).

        ``Trainer`` calls this with the contents of a checkpoint's file, or of one shard after another, and
        ``strict=False``. Nothing is loaded before all of the backbone is there, so that a half-loaded model can be neither
        run nor saved.

        Args:
            state_dict: Tensors by name: all of them, those of the head, or those of one shard.
            strict: Whether missing and unexpected names are an error.
            assign: As in ``torch.nn.Module.load_state_dict``.

        Returns:
            Names that are missing and unexpected.

        Raises:
            RuntimeError: Names are missing or unexpected and ``strict`` is set, or the weights are those of another model
                or of another kind of head.
        """
        if getattr(self, "hf_quantizer", None) is not None:
            return super().load_state_dict(state_dict, strict, assign)
        collected = {**(self._shards or {}), **state_dict}
        converted, unexpected = convert_state_dict(self, collected)
        if strict:
            self._shards = None
            return super().load_state_dict({**converted, **{name: collected.get(name) for name in unexpected}}, True, assign)
        heads = head_modules(self)
        of_heads = tuple(f"{path}." for path in heads)
        missing = find_missing(self, converted)
        self._require_same_heads(converted, missing, unexpected, of_heads)
        holds_backbone = any(not name.startswith(of_heads) for name in (*converted, *unexpected))
        if holds_backbone and any(not name.startswith(of_heads) for name in missing):
            self._shards = collected
            if unexpected and not converted:
                self._require_complete()
            return torch.nn.modules.module._IncompatibleKeys(missing, unexpected)
        self._shards = None
        before = [head.rows()[0] for head in heads.values()]
        super().load_state_dict(converted, False, assign)
        for head, rows in zip(heads.values(), before, strict=True):
            if head.frame == "random" and not torch.equal(head.rows()[0], rows):
                head.frame = "loaded"
        return torch.nn.modules.module._IncompatibleKeys(missing, unexpected)

    def _require_same_heads(
        self, converted: Mapping[str, Tensor], missing: Sequence[str], unexpected: Sequence[str], of_heads: tuple[str, ...]
    ) -> None:
        """Refuse the weights of a head of another kind, such as a folded one for one that is not."""
        partial = [name for name in missing if name.startswith(of_heads)]
        foreign = [name for name in unexpected if name.removeprefix(_TIMM_PREFIX).startswith(
            tuple(path.removeprefix(_TIMM_PREFIX) for path in of_heads)
        )]
        if foreign or (partial and any(name.startswith(of_heads) for name in converted)):
            kind = next(iter(head_modules(self).values())).kind
            raise RuntimeError(
                f"The weights hold another head than this model's ({kind!r}): {', '.join(foreign + partial)}. Finished folders "
                "hold cosine and paper heads folded; go on from a folder checkpoint-<step>, or load this one with "
                "ETFFor...from_pretrained."
            )

    def _require_complete(self) -> None:
        if self._shards is not None:
            missing = [name for name in find_missing(self, convert_state_dict(self, self._shards)[0])]
            raise RuntimeError(
                f"The {len(self._shards)} tensors given to load_state_dict lack {len(missing)} of this model's, such as "
                f"{missing[0]}, and none was loaded: give all of them, or load a part of the model by "
                "model.get_submodule(path).load_state_dict(...)."
            )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the stock class and the factory: a class made on the fly is found by no name."""
        _, _, state, *rest = super().__reduce_ex__(2)
        state = {name: value for name, value in state.items() if name != "_loss"}
        return _blank, (_factory_of(type(self)), self._stock_class), state, *rest
