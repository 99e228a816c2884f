"""Fine-tune pretrained models on rare classes with a fixed simplex-ETF head and the dot-regression loss."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from etf_adapt.alignment import align_head as align_head
    from etf_adapt.arguments import ETFTrainingArguments as ETFTrainingArguments
    from etf_adapt.collapse import NeuralCollapse as NeuralCollapse
    from etf_adapt.data import load_data as load_data
    from etf_adapt.dot_regression import dot_regression_loss as dot_regression_loss
    from etf_adapt.dot_regression import margin_dot_regression_loss as margin_dot_regression_loss
    from etf_adapt.export import export_onnx as export_onnx
    from etf_adapt.head import ETFHead as ETFHead
    from etf_adapt.long_tail import class_counts as class_counts
    from etf_adapt.long_tail import make_long_tailed as make_long_tailed
    from etf_adapt.metrics import ShotAccuracy as ShotAccuracy
    from etf_adapt.modeling import ETFForImageClassification as ETFForImageClassification
    from etf_adapt.modeling import ETFForSequenceClassification as ETFForSequenceClassification
    from etf_adapt.sampler import ClassBalancedSampler as ClassBalancedSampler
    from etf_adapt.simplex import simplex_cosines as simplex_cosines
    from etf_adapt.simplex import simplex_etf as simplex_etf
    from etf_adapt.softmax_losses import ldam_loss as ldam_loss
    from etf_adapt.softmax_losses import logit_adjusted_loss as logit_adjusted_loss
    from etf_adapt.swap import restore_head as restore_head
    from etf_adapt.swap import swap_head as swap_head
    from etf_adapt.training import ETFTrainer as ETFTrainer

__version__ = "0.1.0"

_MODULES = {
    "align_head": "alignment",
    "ETFTrainingArguments": "arguments",
    "NeuralCollapse": "collapse",
    "load_data": "data",
    "export_onnx": "export",
    "ETFHead": "head",
    "class_counts": "long_tail",
    "make_long_tailed": "long_tail",
    "dot_regression_loss": "dot_regression",
    "margin_dot_regression_loss": "dot_regression",
    "ldam_loss": "softmax_losses",
    "logit_adjusted_loss": "softmax_losses",
    "ShotAccuracy": "metrics",
    "ETFForImageClassification": "modeling",
    "ETFForSequenceClassification": "modeling",
    "ClassBalancedSampler": "sampler",
    "simplex_cosines": "simplex",
    "simplex_etf": "simplex",
    "restore_head": "swap",
    "swap_head": "swap",
    "ETFTrainer": "training",
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
