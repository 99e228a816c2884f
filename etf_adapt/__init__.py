"""Fine-tune pretrained models on rare classes with a fixed simplex-ETF head and the dot-regression loss."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from etf_adapt.commands.evaluate import evaluate as evaluate
    from etf_adapt.commands.finetune import finetune as finetune
    from etf_adapt.commands.predict import predict as predict
    from etf_adapt.data.image_dataset import ImageDataset as ImageDataset
    from etf_adapt.data.load import load_data as load_data
    from etf_adapt.data.long_tail import class_counts as class_counts
    from etf_adapt.data.long_tail import make_long_tailed as make_long_tailed
    from etf_adapt.data.sampler import ClassBalancedSampler as ClassBalancedSampler
    from etf_adapt.data.transforms import image_transforms as image_transforms
    from etf_adapt.geometry.simplex import simplex_cosines as simplex_cosines
    from etf_adapt.geometry.simplex import simplex_etf as simplex_etf
    from etf_adapt.heads.alignment import align_head as align_head
    from etf_adapt.heads.layers import ETFHead as ETFHead
    from etf_adapt.hub.publish import publish as publish
    from etf_adapt.inference.extend import extend as extend
    from etf_adapt.inference.refit import refit as refit
    from etf_adapt.losses.dot_regression import dot_regression_loss as dot_regression_loss
    from etf_adapt.losses.dot_regression import margin_dot_regression_loss as margin_dot_regression_loss
    from etf_adapt.losses.softmax import logit_adjusted_loss as logit_adjusted_loss
    from etf_adapt.metrics.collapse import NeuralCollapse as NeuralCollapse
    from etf_adapt.metrics.shots import ShotAccuracy as ShotAccuracy
    from etf_adapt.models.auto import ETFForImageClassification as ETFForImageClassification
    from etf_adapt.models.auto import ETFForSequenceClassification as ETFForSequenceClassification
    from etf_adapt.models.swap import restore_head as restore_head
    from etf_adapt.models.swap import swap_head as swap_head
    from etf_adapt.training.arguments import ETFTrainingArguments as ETFTrainingArguments
    from etf_adapt.training.trainer import ETFTrainer as ETFTrainer

__version__ = "0.1.0"

_MODULES = {
    "evaluate": "commands.evaluate",
    "finetune": "commands.finetune",
    "predict": "commands.predict",
    "ImageDataset": "data.image_dataset",
    "load_data": "data.load",
    "class_counts": "data.long_tail",
    "make_long_tailed": "data.long_tail",
    "ClassBalancedSampler": "data.sampler",
    "image_transforms": "data.transforms",
    "simplex_cosines": "geometry.simplex",
    "simplex_etf": "geometry.simplex",
    "align_head": "heads.alignment",
    "ETFHead": "heads.layers",
    "dot_regression_loss": "losses.dot_regression",
    "margin_dot_regression_loss": "losses.dot_regression",
    "logit_adjusted_loss": "losses.softmax",
    "NeuralCollapse": "metrics.collapse",
    "ShotAccuracy": "metrics.shots",
    "ETFForImageClassification": "models.auto",
    "ETFForSequenceClassification": "models.auto",
    "restore_head": "models.swap",
    "swap_head": "models.swap",
    "ETFTrainingArguments": "training.arguments",
    "publish": "hub.publish",
    "extend": "inference.extend",
    "refit": "inference.refit",
    "ETFTrainer": "training.trainer",
}

__all__ = sorted(_MODULES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    """Import a public name's module on first use: ``import etf_adapt`` alone loads neither torch nor transformers."""
    if name not in _MODULES:
        raise AttributeError(f"module 'etf_adapt' has no attribute {name!r}")
    value = getattr(import_module(f"etf_adapt.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
