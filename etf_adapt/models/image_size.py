"""Another image size for a pretrained model: its position embeddings, its configuration and its processor."""

from __future__ import annotations

from typing import Any

import torch


def set_image_size(model: Any, processor: Any, size: int) -> None:
    """Set a model and its image processor (timm's: its configuration) to images of another size, in pixels a side."""
    # Convolutional networks take any. Position embeddings of transformers are interpolated once, to stay stock weights.
    config = model.config
    if hasattr(model, "timm_model"):
        if hasattr(model.timm_model, "set_input_size"):
            model.timm_model.set_input_size(img_size=size)
            config.model_args = {**(config.model_args or {}), "img_size": size}
        config.pretrained_cfg = {**config.pretrained_cfg, "input_size": [3, size, size]}
    else:
        own = dict(processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size)
        scale = size / (own.get("height") or own["shortest_edge"])
        for name in ("size", "crop_size"):
            if getattr(processor, name, None):
                lengths = dict(getattr(processor, name)).items()
                setattr(processor, name, {side: round(scale * length) for side, length in lengths if length})
        for module in model.modules():
            embeddings = getattr(module, "position_embeddings", None)
            if isinstance(embeddings, torch.nn.Parameter) and hasattr(module, "interpolate_pos_encoding"):
                patches = (size // config.patch_size) ** 2
                extra = embeddings.shape[1] - module.patch_embeddings.num_patches  # class token and the like
                tokens = embeddings.new_zeros(1, patches + extra, embeddings.shape[2])
                with torch.no_grad():
                    resized = module.interpolate_pos_encoding(tokens, size, size)
                module.position_embeddings = torch.nn.Parameter(resized.clone(), embeddings.requires_grad)
                module.patch_embeddings.num_patches = patches
        for part in (config, *model.modules()):
            if "image_size" in vars(part):
                part.image_size = size if isinstance(part.image_size, int) else (size, size)
    try:
        with torch.no_grad():
            model.eval()(pixel_values=torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        why = str(error).rstrip(".")
        raise ValueError(f"`image_size` (={size}) is none that {type(model).__name__} allows: {why}.") from error
