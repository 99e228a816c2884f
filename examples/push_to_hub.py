"""Publish an adapted model on the Hub, and load it from there.

    hf auth login                                  # or HF_TOKEN; no program here takes a token as an argument
    python examples/push_to_hub.py me/digits

A run of recipes/finetune.py is published with its card, scores and plots, at its end
(--push_to_hub --hub_model_id me/digits) or later (etf-adapt publish out/digits-micro-etf me/digits).
"""

import sys

import torch
from torch.utils.data import DataLoader

from etf_adapt import ETFForImageClassification, ImageDataset, align_head, image_transforms, load_data

if len(sys.argv) != 2:
    raise SystemExit(__doc__)
repo_id = sys.argv[1]

# 1. A model whose head is set in closed form from the training rows; no training, to keep it short.
data = load_data("digits", imbalance_factor=20)
model = ETFForImageClassification.from_pretrained("micro", id2label=dict(enumerate(data.label_names)))
rows = ImageDataset(data.train, image_transforms(model.config.pretrained_cfg, train=False))
align_head(model, DataLoader(rows, batch_size=64))

# 2. One commit, here in timm's layout, which transformers and timm read without this library.
print("published:", model.push_to_hub(repo_id, private=True, commit_message="Digits, aligned"))

# 3. Back from the Hub, with its head and loss.
again = ETFForImageClassification.from_pretrained(repo_id)
same = all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
print("the same weights:", same, "and head:", again.etf_settings["head"]["frame"])
