"""What recipes/compare.py compares: each row of its table, by the flags of finetune.py that make it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One row of the table, and the flags of finetune.py that make it; `{epochs}` among them is the number of epochs.

    Its kind is "baseline"; "family", that is a fixed ETF head under a loss of the dot-regression family; or "other". Where
    it trains its head, that head's learning rate is tuned too.
    """

    name: str
    title: str
    kind: str
    flags: tuple[str, ...]
    trains_head: bool = False


def _rows(kind: str, table: dict[str, tuple[str, str]], *, trains_head: bool = False) -> list[Row]:
    return [Row(name, title, kind, tuple(flags.split()), trains_head) for name, (title, flags) in table.items()]


BASELINES = {
    "linear_ce": ("linear, cross-entropy", "--head linear --loss cross_entropy"),
    "linear_la": ("linear, logit-adjusted", "--head linear --loss logit_adjusted"),
    "linear_la_sqrt_smooth": (
        "linear, logit-adjusted, root sampling, smoothed",
        "--head linear --loss logit_adjusted --sampler sqrt --label_smoothing 0.1",
    ),
    "cosine_la": ("cosine, logit-adjusted", "--head cosine --loss logit_adjusted"),
    "cosine_ldam_drw": ("cosine, LDAM, deferred re-weighting", "--head cosine --loss ldam --reweight_from 0.8"),
}
FAMILY = {
    "etf_dr": ("ETF, dot regression", "--head etf"),
    "etf_dr_balanced": ("ETF, dot regression, balanced sampling", "--head etf --sampler balanced"),
    "etf_margin": ("ETF, margin dot regression", "--head etf --loss margin_dot_regression"),
    "etf_margin_realign": (
        "ETF aligned each epoch, margin dot regression",
        "--head etf --loss margin_dot_regression --realign_epochs {epochs}",
    ),
    "means_margin": ("class means, margin dot regression", "--head etf --frame means --loss margin_dot_regression"),
    "means_margin_realign": (
        "class means aligned each epoch, margin dot regression",
        "--head etf --frame means --loss margin_dot_regression --realign_epochs {epochs}",
    ),
    "paper": ("ETF, dot regression as published", "--paper"),
}
OTHERS = {
    "etf_la": ("ETF, logit-adjusted", "--head etf --loss logit_adjusted"),
    "etf_la_realign": (
        "ETF aligned each epoch, logit-adjusted",
        "--head etf --loss logit_adjusted --realign_epochs {epochs}",
    ),
    "means_la": ("class means, logit-adjusted", "--head etf --frame means --loss logit_adjusted"),
}
TRAINED = {
    "etf_trained_la": ("ETF trained, logit-adjusted", "--head etf --head_trainable true --loss logit_adjusted"),
    "etf_trained_margin": (
        "ETF trained, margin dot regression",
        "--head etf --head_trainable true --loss margin_dot_regression",
    ),
}
ROWS = {
    row.name: row
    for rows in (
        _rows("baseline", BASELINES, trains_head=True),
        _rows("family", FAMILY),
        _rows("other", OTHERS),
        _rows("other", TRAINED, trains_head=True),
    )
    for row in rows
}
