"""The methods that recipes/compare.py compares, each by its flags of finetune.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One method, a line of the table; where its head is trained, that head's learning rate is tuned too."""

    name: str
    title: str
    kind: str  # "baseline"; "family": a fixed ETF head under a loss of the dot-regression family; or "other"
    flags: tuple[str, ...]
    trains_head: bool = False
    is_tuned: bool = True  # else its rate is that of the default's rule (etf_adapt.training.budget)


def _methods(kind: str, table: dict[str, tuple[str, str]], **options: bool) -> list[Method]:
    return [Method(name, title, kind, tuple(flags.split()), **options) for name, (title, flags) in table.items()]


BASELINES = {
    "linear_ce": ("linear, cross-entropy", "--head linear --loss cross_entropy"),
    "linear_ce_weighted": (
        "linear, class-weighted cross-entropy",
        "--head linear --loss cross_entropy --class_weights balanced",
    ),
    "linear_ce_balanced": (
        "linear, cross-entropy, oversampled",
        "--head linear --loss cross_entropy --sampler balanced",
    ),
    "linear_focal": ("linear, focal", "--head linear --loss focal"),
    "linear_la": ("linear, logit-adjusted", "--head linear --loss logit_adjusted"),
    "linear_weighted_refit": (
        "linear, class-weighted cross-entropy, then refitted",
        "--head linear --loss cross_entropy --class_weights balanced --final_frame whitened",
    ),
    "linear_balanced_refit": (
        "linear, cross-entropy, oversampled, then refitted",
        "--head linear --loss cross_entropy --sampler balanced --final_frame whitened",
    ),
    "linear_la_refit": (
        "linear, logit-adjusted, then refitted",
        "--head linear --loss logit_adjusted --final_frame whitened",
    ),
    "linear_ce_refit": (
        "linear, cross-entropy, then refitted",
        "--head linear --loss cross_entropy --final_frame whitened",
    ),
    "cosine_la": ("cosine, logit-adjusted", "--head cosine --loss logit_adjusted"),
    "cosine_la_refit": (
        "cosine, logit-adjusted, then refitted",
        "--head cosine --loss logit_adjusted --final_frame whitened",
    ),
}
UNTUNED = {
    "etf_untuned": ("ETF (default, untuned)", "--head etf"),
}
FAMILY = {
    "etf": ("ETF (default), tuned", "--head etf"),
    "etf_dr": ("ETF, dot regression on vertices", "--head etf --loss dot_regression"),
    "paper": ("ETF, dot regression as published", "--paper"),
}
OTHERS = {
    "etf_la": ("ETF, logit-adjusted", "--head etf --loss logit_adjusted"),
    "etf_ce": ("ETF, cross-entropy", "--head etf --loss cross_entropy"),
}
METHODS = {
    method.name: method
    for methods in (
        _methods("baseline", BASELINES, trains_head=True),
        _methods("family", UNTUNED, is_tuned=False),
        _methods("family", FAMILY),
        _methods("other", OTHERS),
    )
    for method in methods
}
