"""Facts of a model card, and names that try to break out of it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from etf_adapt.results import tables
from etf_adapt.results.card import CardFacts

HOSTILE_NAMES = [
    "a|b",
    "<script>alert(1)</script>",
    "{{ 7 * 7 }}",
    "two\nlines\n---\n# heading",
    'quo"te',
    "```\ncode",
    "x\n<!-- Written by etf_adapt -->\ny",
]


def card_facts(**changes: Any) -> CardFacts:
    scores = {"accuracy": 0.5, "balanced_accuracy": 0.25, "few": None, "many": math.nan, "ece": 0.01}
    facts = CardFacts(
        model_id="out/digits-micro-etf",
        on_hub=False,
        task="image",
        library="timm",
        base_model="timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        dataset={"name": "digits", "kind": "embedded", "rows": {"train": 10}},
        label_names=["no", "yes"],
        class_counts=[200, 8],
        head={"kind": "etf", "frame": "whitened", "trainable": False},
        loss={"name": "dot_regression", "form": "one_sided"},
        split="test",
        scores=scores,
        table=tables.shot_table(scores, [200, 8], [10, 10]),
        is_adjusted=True,
        calibrated_rows=20,
        command="accelerate launch recipes/finetune.py",
        seeds={"seed": 0},
        environment={"python": "3.11"},
    )
    return dataclasses.replace(facts, **changes)
