"""Use an adapted image model without etf_adapt: by transformers, and by timm if the backbone is timm's.

python examples/use_without_etf_adapt.py out/digits-micro-etf photo.jpg
python examples/use_without_etf_adapt.py me/digits photo.jpg
"""

import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageClassification, TimmWrapperConfig, pipeline

if len(sys.argv) != 3:
    raise SystemExit(__doc__)
name, photo = sys.argv[1], Image.open(sys.argv[2]).convert("RGB")

# 1. By transformers' pipeline.
for guess in pipeline("image-classification", model=name, top_k=3)(photo):
    print(f"pipeline: {guess['label']} {guess['score']:.3f}")

# 2. As an ordinary model with an ordinary linear head, for any tool.
model = AutoModelForImageClassification.from_pretrained(name)
print("class:", type(model).__name__, "of", model.config.num_labels, "classes")

# 3. By timm.
if isinstance(model.config, TimmWrapperConfig):
    import timm

    place = "local-dir:" if Path(name).is_dir() else "hf-hub:"
    network = timm.create_model(place + name, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False)
    with torch.no_grad():
        index = int(network(transform(photo).unsqueeze(0)).argmax())
    print("timm:", network.pretrained_cfg["label_names"][index])
