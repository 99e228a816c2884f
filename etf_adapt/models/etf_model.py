"""What a stock classification class gains: our loss in its forward, calibration, and folders that read back exactly."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys
from transformers import PreTrainedModel, TimmWrapperForImageClassification

from etf_adapt.geometry.simplex import reachable_cosine
from etf_adapt.heads.in_model import batch_norms, head_modules
from etf_adapt.heads.layers import ClassifierHead, fold_head
from etf_adapt.hub.send import carry_on_command, check_name_and_token, send_folder
from etf_adapt.losses.registry import Loss, make_loss
from etf_adapt.models.adapters import has_adapters, merge_adapters
from etf_adapt.models.digests import describe_layers
from etf_adapt.models.folders import is_training_checkpoint, remove_stale_weights
from etf_adapt.models.names import ENTRY
from etf_adapt.models.pooling import PooledEncoder, refuse_stock_classes, write_sentence_folder
from etf_adapt.models.stock_subclass import blank, factory_of
from etf_adapt.models.timm_layout import write_timm_folder
from etf_adapt.models.weights import ConvertedState, convert_state_dict, find_missing
from etf_adapt.results.card import write_short_card
from etf_adapt.results.run_folder import share_weights

DEFAULT_LOSSES: dict[str, dict[str, Any]] = {  # settings of the loss that goes with each kind of head
    "etf": {"name": "margin_dot_regression"},
    "linear": {"name": "cross_entropy"},
    "cosine": {"name": "cross_entropy"},
    # As in the published code: on the sphere, by the length of the feature, the classes of a batch weighted equally.
    "paper": {"name": "dot_regression", "form": "sphere", "balance": "in_batch", "unit_features": True},
}

_TIMM_PREFIX = "timm_model."


def is_live(saved: Mapping[str, Any]) -> bool:
    """Return whether an entry of ``config.json`` tells of a head that is no stock layer, as in training checkpoints."""
    head = saved.get("head", {"kind": "linear"})
    return head["kind"] not in ("etf", "linear") and not head["folded"]


if TYPE_CHECKING:
    _Base = PreTrainedModel
else:
    _Base = object  # A base of transformers' own would hide the attributes of the stock class.


class ETFModel(_Base):
    """Base of the classes made on the fly (``stock_subclass``), which are subclasses of a stock class too."""

    # `Trainer` then averages the loss over accumulated batches. True, which it would take from a `**kwargs` in the signature,
    # would multiply the gradients by their number.
    accepts_loss_kwargs = False
    freeze_batch_norm: bool | None = None  # in training mode; None: while the head is aligned and fixed
    without_dropout: bool = False  # in training mode
    processor: Any = None  # tokenizer or image processor that save_pretrained writes beside the model
    trusts_code: bool | None = None  # of the model's own: as its folder is read again
    _stock_class: type[PreTrainedModel]
    _task: str  # "image" or "text"
    _loss: Loss | None = None
    _loss_settings: Mapping[str, Any] = MappingProxyType({})
    _class_counts: list[int] | None = None
    _logit_scale: float = 1.0
    _prior_adjustment: list[float] | None = None
    _shards: dict[str, Tensor] | None = None
    _unlabelled_steps: int = 0
    _has_trained: bool = False
    _has_bias: Mapping[str, bool] = MappingProxyType({})
    _new_weights: tuple[str, ...] = ()

    @property
    def etf_settings(self) -> dict[str, Any]:
        """Head, loss and calibration of the model: its entry in ``config.json``."""
        heads = head_modules(self)
        first = next(iter(heads.values()), None)
        head = {
            "kind": first and (first.folded_from or first.kind),
            "frame": getattr(first, "frame", None),
            "trainable": getattr(first, "trainable", None),
            "folded": bool(first and first.folded_from),  # into a stock layer, from a head of that kind
            "paths": list(heads),
        }
        library = "timm" if isinstance(self, TimmWrapperForImageClassification) else "transformers"
        return {
            "version": 1,
            "library": "sentence_transformers" if isinstance(self, PooledEncoder) else library,
            "pooling": self.pooling if isinstance(self, PooledEncoder) else "stock",
            "adapters": has_adapters(self),
            "head": head,
            "loss": dict(self._loss_settings),
            "class_counts": None if self._class_counts is None else list(self._class_counts),
            "logit_scale": self._logit_scale,
            "prior_adjustment": self._prior_adjustment,
        }

    def set_loss(
        self, settings: Mapping[str, Any] | str | None = None, class_counts: Sequence[int] | None = None
    ) -> None:
        """Choose the loss of ``forward``: arguments of ``losses.registry.make_loss``, its name, or None for the head's default.

        Class counts (num_classes,) that are None stay as they are.
        """
        heads = list(head_modules(self).values())
        chosen = DEFAULT_LOSSES[heads[0].kind] if settings is None else settings
        chosen = {"name": chosen} if isinstance(chosen, str) else dict(chosen)
        reachable = min(reachable_cosine(head.num_classes, head.weight.shape[1]) for head in heads)
        if chosen.get("name") == "dot_regression" and heads[0].kind == "etf" and reachable < 1.0:
            chosen.setdefault("target", reachable)  # more classes than features: not all vertices can be reached
        counts = self._class_counts if class_counts is None else [int(count) for count in class_counts]
        weights: Any = chosen.get("class_weights")
        if hasattr(weights, "tolist"):  # an array or tensor, which config.json cannot hold
            weights = chosen["class_weights"] = weights.tolist()
        num_classes = heads[0].num_classes
        for name, values in (("class_counts", counts), ("class_weights", weights)):
            if isinstance(values, Sequence) and not isinstance(values, str) and len(values) != num_classes:
                raise ValueError(f"`{name}` has {len(values)} entries, but the head has {num_classes} classes.")
        self._loss = make_loss(chosen, class_counts=counts)
        self._loss_settings, self._class_counts = chosen, counts

    def train(self, mode: bool = True) -> Any:
        """Set training mode; ``freeze_batch_norm`` and ``without_dropout`` keep some or all but the head in evaluation mode."""
        super().train(mode)
        if mode and self.without_dropout:
            kept = {self, *(part for head in head_modules(self).values() for part in head.modules())}
            kept |= set() if self.freeze_batch_norm is not False else {*batch_norms(self)}
            for module in {*self.modules()} - kept:
                # Layers whose activations are computed again, and embeddings under NEFTune, are asked for training mode.
                is_asked = getattr(module, "gradient_checkpointing", False) or hasattr(module, "neftune_noise_alpha")
                module.training = bool(is_asked)
        heads = head_modules(self).values()
        is_aligned = bool(heads) and all(head.is_aligned and not head.trainable for head in heads)
        if mode and (is_aligned if self.freeze_batch_norm is None else self.freeze_batch_norm):
            # Batch statistics differ from the running ones that the head was aligned under, and these move.
            for norm in batch_norms(self):
                norm.eval()
        return self

    def set_calibration(self, logit_scale: float, prior_adjustment: Sequence[float] | None = None) -> None:
        r"""Fold a logit scale s and offsets a into the head in place of earlier ones: W <- s W, b <- s b + a.

        The stock layer then gives calibrated confidences; the loss of ``forward`` takes both out again, so that training goes
        on as before. The scale changes no argmax; the offsets do.
        """
        if not (logit_scale > 0.0 and all(map(math.isfinite, prior_adjustment or ()))):
            raise ValueError(f"`logit_scale` (={logit_scale}) must be above 0, and `prior_adjustment` finite.")
        heads = list(head_modules(self).values())
        for head in heads:
            if not head.is_stock_layer:
                raise ValueError(f"A {head.kind!r} head is no stock layer: call fold_heads() before calibrating.")
            if prior_adjustment is not None and len(prior_adjustment) != head.num_classes:
                raise ValueError(
                    f"`prior_adjustment` has {len(prior_adjustment)} entries, the head {head.num_classes} classes."
                )
        if prior_adjustment is not None:
            self.require_adjustable()
        factor = logit_scale / self._logit_scale
        old = torch.tensor(self._prior_adjustment or [0.0], dtype=torch.float64)
        new = torch.tensor(list(prior_adjustment or [0.0]), dtype=torch.float64)
        for head in heads:
            weight, bias = head.class_vectors()
            head.set_class_vectors(factor * weight, None if bias is None else factor * (bias - old) + new)
        self._logit_scale = float(logit_scale)
        self._prior_adjustment = None if prior_adjustment is None else [float(offset) for offset in prior_adjustment]

    @property
    def is_adjustable(self) -> bool:
        """Whether offsets of the logits can be folded into the classifier."""
        return len(self._has_bias) == 1 and all(self._has_bias.values())

    def require_adjustable(self) -> None:
        """Refuse offsets of the logits where the classifier has no bias, or several layers."""
        if not all(self._has_bias.values()):
            raise ValueError("`prior_adjustment` needs a bias, and this model's classifier has none: take 'none'.")
        if len(self._has_bias) > 1:
            raise ValueError("`prior_adjustment` cannot be split over several heads: take 'none'.")

    def reset_calibration(self) -> None:
        """Forget what was folded into the head, after its class vectors were set anew."""
        self._logit_scale, self._prior_adjustment = 1.0, None

    def fold_heads(self) -> None:
        """Replace cosine and paper heads by the stock layer with the same argmax; confidences change: calibrate afterwards."""
        for path, head in head_modules(self).items():
            folded = fold_head(head, bias=self._has_bias.get(path, head.bias is not None))
            if folded is not head:
                self.set_submodule(path, folded)
                # The features of a folded head have norms again.
                self.set_loss({name: value for name, value in self._loss_settings.items() if name != "unit_features"})

    def compute_loss_from_logits(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of logits (batch, num_classes) as ``forward`` returns them; labels are indices or probabilities."""
        self._unlabelled_steps = 0
        if self._loss is None:  # a copy: functions are not pickled
            self._loss = make_loss(self._loss_settings, class_counts=self._class_counts)
        if self._prior_adjustment is not None:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logits = logits - logits.new_tensor(self._prior_adjustment)
        if self._logit_scale != 1.0:
            logits = logits.float() / self._logit_scale
        return self._loss(logits, labels.to(logits.device))

    def _warn_in_training(self, labels: Tensor | None) -> None:
        """Warn once of an unaligned head, and of a loss that is not the model's."""
        is_first, self._has_trained = not self._has_trained, True
        if is_first and any(head.is_set_from_data and head.frame == "random" for head in head_modules(self).values()):
            warnings.warn(
                "The ETF head is a random frame, to which the features of a pretrained model have to turn first. "
                "etf_adapt.align_head(model, dataloader) sets it from the training rows before the first step and learns the "
                "rare classes better; ETFTrainer does so by itself.",
                stacklevel=3,
            )
        if labels is None:
            self._unlabelled_steps += 1
            if self._unlabelled_steps == 2:  # a loop that calls compute_loss_from_logits has done so by now
                warnings.warn(
                    f"This model is trained without its labels, so that its loss ({self._loss_settings['name']}) is not used. "
                    "Trainer does that for `label_smoothing_factor` and applies a cross-entropy: set it to 0 and call "
                    f"model.set_loss({ {**self._loss_settings, 'label_smoothing': 0.1} }).",
                    stacklevel=3,
                )

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        *,
        fold: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a folder that stock transformers (timm too, for its backbones) reads, and this library in full.

        ``fold`` puts the stock layer with the same argmax in place of cosine and paper heads. None folds all folders but
        ``Trainer``'s ``checkpoint-<step>``, which hold the head as it trains. ``kwargs`` are transformers'.
        """
        self._require_complete()
        if kwargs.pop("push_to_hub", False):
            raise ValueError(
                "`push_to_hub` (=True) of save_pretrained sends what else is in the folder too: call "
                "model.push_to_hub(repo_id), or publish the folder with `etf-adapt publish FOLDER user/name`."
            )
        fold = not is_training_checkpoint(save_directory) if fold is None else fold
        if fold and has_adapters(self):
            merged = deepcopy(self)
            if state_dict is not None:
                merged.load_state_dict(state_dict)
            merge_adapters(merged)
            return merged.save_pretrained(save_directory, is_main_process, fold=fold, **kwargs)
        tensors: dict[str, Tensor] = dict(self.state_dict() if state_dict is None else state_dict)
        setattr(self.config, ENTRY, self._entry(tensors, fold=fold))
        if is_main_process and self.processor is not None and not is_training_checkpoint(save_directory):
            self.processor.save_pretrained(save_directory)
        is_pooled = fold and isinstance(self, PooledEncoder)
        is_timm = isinstance(self, TimmWrapperForImageClassification) and getattr(self, "hf_quantizer", None) is None
        if not is_pooled and not is_timm:  # timm's layout cannot tell how weights are quantized
            super().save_pretrained(cast(str, save_directory), is_main_process, tensors, **kwargs)
        elif is_main_process and is_pooled:
            write_sentence_folder(save_directory, self, tensors)
        elif is_main_process:
            names = {name.removeprefix(_TIMM_PREFIX): tensor for name, tensor in tensors.items()}
            write_timm_folder(save_directory, cast(Any, self.config), self.timm_model, names)
        if not is_main_process:
            return
        remove_stale_weights(save_directory, is_single=is_pooled or is_timm)
        share_weights(save_directory)
        is_stock = all(head.is_stock_layer for head in head_modules(self).values()) and not has_adapters(self)
        if not fold and (not is_stock or isinstance(self, PooledEncoder)):
            refuse_stock_classes(save_directory)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        max_shard_size: int | str = "50GB",
    ) -> str:
        """Publish what ``save_pretrained`` writes in one commit, with a card where there is none yet; return its address.

        Repository and branch are made where they do not exist; ``private=None`` leaves that to the owner's settings. A
        finished run is published with its own card by ``etf_adapt.hub.publish.publish``.
        """
        check_name_and_token(repo_id, token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, fold=True, max_shard_size=max_shard_size)
            write_short_card(folder, repo_id, library=self.etf_settings["library"], task=self._task)
            options: dict[str, Any] = {"private": private, "revision": revision}
            command = f"model.push_to_hub({repo_id!r}), or model.save_pretrained(folder) and "
            command += carry_on_command("folder", repo_id, **options)
            options |= {"commit_message": commit_message, "token": token, "kept": ("README.md",)}
            return send_folder(folder, repo_id, command=command, **options)

    def _entry(self, tensors: dict[str, Tensor], *, fold: bool) -> dict[str, Any] | None:
        """Return the entry of ``config.json``; heads that are to be folded are folded in ``tensors``."""
        settings = self.etf_settings
        heads = head_modules(self)
        for path, head in heads.items():
            own = {name: tensors[f"{path}.{name}"] for name in head.state_dict() if f"{path}.{name}" in tensors}
            if fold and not head.is_stock_layer:
                copy = deepcopy(head)
                copy.load_state_dict(own)
                stock = fold_head(copy, bias=self._has_bias.get(path, head.bias is not None))
                for name in own:
                    del tensors[f"{path}.{name}"]
                tensors.update({f"{path}.{name}": tensor for name, tensor in stock.state_dict().items()})
                settings["head"]["folded"] = True
                settings["loss"].pop("unit_features", None)
        if not heads:
            return None
        present = [path for path in heads if f"{path}.weight" in tensors]
        layers = [(tensors[f"{path}.weight"], tensors.get(f"{path}.bias")) for path in present]
        if len(layers) == len(heads):  # processes that do not write may hold no weights
            settings["head"] |= describe_layers(layers)
        return settings

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights by the model's names or by those of its files: all of them, those of the head, or one shard's."""
        # `Trainer` calls this with the contents of a checkpoint's file, or of one shard after another, and strict=False.
        # Nothing is loaded before all of the backbone is there, so that a half-loaded model can be neither run nor saved.
        if getattr(self, "hf_quantizer", None) is not None:
            return super().load_state_dict(state_dict, strict, assign)
        collected = {**(self._shards or {}), **state_dict}
        converted = convert_state_dict(self, collected)
        if strict:
            self._shards = None
            refused = {name: collected.get(name, torch.empty(0)) for name in (*converted.unexpected, *converted.unfit)}
            return super().load_state_dict({**converted.tensors, **refused}, True, assign)
        heads = head_modules(self)
        self._refuse_another_head(converted, heads)
        missing = find_missing(self, converted.tensors)
        of_heads = tuple(f"{path}." for path in heads)
        holds_head = any(name.startswith(of_heads) for name in converted.tensors)
        holds_backbone = not all(name.startswith(of_heads) for name in (*converted.tensors, *converted.unexpected))
        is_partial = any(holds_head if name.startswith(of_heads) else holds_backbone for name in missing)
        if is_partial or converted.unfit:
            self._shards = collected  # The rest may come with the next shard.
            return _IncompatibleKeys(missing, converted.unexpected)
        self._shards = None
        before = [head.class_vectors()[0] for head in heads.values()]
        super().load_state_dict(converted.tensors, False, assign)
        for head, weight in zip(heads.values(), before, strict=True):
            if head.frame == "random" and not torch.equal(head.class_vectors()[0], weight):
                head.frame = "loaded"
        return _IncompatibleKeys(missing, converted.unexpected)

    def _refuse_another_head(self, converted: ConvertedState, heads: Mapping[str, ClassifierHead]) -> None:
        """Refuse the weights of another kind of head, such as a folded one, or of another number of classes."""
        of_heads = tuple(f"{path.removeprefix(_TIMM_PREFIX)}." for path in heads)
        names = (*converted.unexpected, *converted.unfit)
        foreign = [name for name in names if name.removeprefix(_TIMM_PREFIX).startswith(of_heads)]
        if foreign:
            kind = next(iter(heads.values())).kind
            raise RuntimeError(
                f"The weights hold another head than this model's ({kind!r}, {self.config.num_labels} classes): "
                f"{', '.join(foreign)} does not fit. Finished folders hold cosine and paper heads folded; go on from a folder "
                "checkpoint-<step>, or load this one with ETFFor...from_pretrained."
            )

    def _require_complete(self) -> None:
        if self._shards is not None:
            missing = find_missing(self, convert_state_dict(self, self._shards).tensors)
            raise RuntimeError(
                f"The {len(self._shards)} tensors given to load_state_dict lack {len(missing)} of this model's, such as "
                f"{missing[0]}, and none was loaded: give all of them, or load a part of the model by "
                "model.get_submodule(path).load_state_dict(...)."
            )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as the stock class and the factory: a class made on the fly is found by no name."""
        _, _, state, *rest = cast("tuple[Any, ...]", super().__reduce_ex__(2))
        state = {name: value for name, value in state.items() if name != "_loss"}
        return blank, (factory_of(type(self)), self._stock_class), state, *rest
