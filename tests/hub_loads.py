"""Loads models by their names on a Hub; a module and a program, which runs with the Hub of its environment (HF_ENDPOINT).

As a program it takes a token, which may be empty, and prints what each model gives for an image of ones, as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import timm
import torch
from transformers import AutoModelForImageClassification, AutoTokenizer

from etf_adapt import ETFForImageClassification
from etf_adapt.models.folders import load_processor


def describe(model: Any) -> dict[str, list[float]]:
    """Return a part of what the backbone of a model makes of an image of ones, and its first logits."""
    model = model.eval()
    backbone = getattr(model, "timm_model", model)
    size = 8 if hasattr(backbone, "vit") else 160
    image = torch.ones(1, 3, size, size)
    with torch.no_grad():
        features = backbone.vit(image)[0] if hasattr(backbone, "vit") else backbone.forward_features(image)
        output = model(image)
    logits = getattr(output, "logits", output)
    return {"features": features.flatten()[:50].tolist(), "logits": logits[0, :5].tolist()}


def main(token: str | None) -> None:
    stock, ours = AutoModelForImageClassification.from_pretrained, ETFForImageClassification.from_pretrained
    loads: dict[str, Callable[[], Any]] = {
        "stock": lambda: stock("me/vit"),
        "ours": lambda: ours("me/vit"),
        "ours by revision": lambda: ours("me/vit", revision="v2"),
        "adapted": lambda: ours("me/adapted"),
        "adapted in stock": lambda: stock("me/adapted"),
        "private": lambda: ours("me/secret", token=token),
        "timm's hf-hub:": lambda: timm.create_model("hf-hub:me/net", pretrained=True),
        "a timm repository": lambda: ours("me/net"),
        "timm/": lambda: ours("timm/test_vit.r160_in1k"),
        "a timm name": lambda: timm.create_model("test_vit.r160_in1k", pretrained=True),
    }
    found: dict[str, Any] = {}
    for name, load in loads.items():
        try:
            found[name] = describe(load())
        except Exception as error:  # is the answer for this model
            found[name] = f"{type(error).__name__}: {error}"
    found["tokens"] = AutoTokenizer.from_pretrained("me/words")("tree tree")["input_ids"]
    found["processor"] = load_processor("me/net", "image")["input_size"]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1] or None)
