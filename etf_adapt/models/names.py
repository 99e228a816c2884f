"""Names of models: short names, timm names, folders and Hub ids; whether their files can be had from the Hub or its cache."""

from __future__ import annotations

import importlib.resources
import os
from pathlib import Path

from etf_adapt.errors import nearest_names

ENTRY = "etf_adapt"
"""Name of our one entry in a model's ``config.json``. Stock readers pass over it, and transformers keeps it when it saves."""

IMAGE_MODELS = {
    "micro": "micro",  # inside this package: see micro_folder
    "vit_tiny": "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "vit_small": "timm/vit_small_patch16_224.augreg_in21k_ft_in1k",
    "vit_base": "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "vit_large": "timm/vit_large_patch16_224.augreg_in21k_ft_in1k",
    "deit_small": "timm/deit_small_patch16_224.fb_in1k",
    "deit_base": "timm/deit_base_patch16_224.fb_in1k",
    "swin_tiny": "timm/swin_tiny_patch4_window7_224.ms_in22k_ft_in1k",
    "swin_base": "timm/swin_base_patch4_window7_224.ms_in22k_ft_in1k",
    "convnext_tiny": "timm/convnext_tiny.fb_in22k_ft_in1k",
    "convnext_base": "timm/convnext_base.fb_in22k_ft_in1k",
    "resnet18": "timm/resnet18.a1_in1k",
    "resnet50": "timm/resnet50.a1_in1k",
    "mobilenetv2": "timm/mobilenetv2_100.ra_in1k",
    "mobilenetv3_large": "timm/mobilenetv3_large_100.ra_in1k",
    "efficientnet_b0": "timm/efficientnet_b0.ra_in1k",
    "clip_base": "timm/vit_base_patch16_clip_224.openai",
    "siglip_base": "timm/vit_base_patch16_siglip_224.webli",
    "dinov2_small": "facebook/dinov2-small",  # timm's copy of these weights reads 518 pixels, this one 224
    "dinov2_base": "facebook/dinov2-base",
    "dinov3_small": "timm/vit_small_patch16_dinov3.lvd1689m",
    "dinov3_base": "timm/vit_base_patch16_dinov3.lvd1689m",
}

TEXT_MODELS = {
    "bert_base": "google-bert/bert-base-uncased",
    "bert_large": "google-bert/bert-large-uncased",
    "distilbert": "distilbert/distilbert-base-uncased",
    "roberta_base": "FacebookAI/roberta-base",
    "roberta_large": "FacebookAI/roberta-large",
    "xlm_roberta_base": "FacebookAI/xlm-roberta-base",
    "deberta_base": "microsoft/deberta-v3-base",
    "modernbert_base": "answerdotai/ModernBERT-base",
    "minilm": "sentence-transformers/all-MiniLM-L6-v2",
    "mpnet_base": "sentence-transformers/all-mpnet-base-v2",
}

MODEL_NAMES = IMAGE_MODELS | TEXT_MODELS


class UnavailableError(OSError):
    """The files of a model cannot be fetched and are not cached."""


def micro_folder() -> str:
    """Return the folder of ``micro``, the pretrained image model inside this package."""
    return str(importlib.resources.files("etf_adapt") / "micro")


def model_task(name: str) -> str | None:
    """Return ``"image"`` or ``"text"`` where the name alone decides, else None."""
    if name in IMAGE_MODELS or name.startswith("timm/"):
        return "image"
    return "text" if name in TEXT_MODELS else None


def resolve_model_name(name: str) -> str:
    """Turn a short name, a timm name with or without its tag, a Hub id or a folder into what ``from_pretrained`` takes."""
    if name == "micro":
        return micro_folder()
    if name in MODEL_NAMES:
        return MODEL_NAMES[name]
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"`model` (={name!r}) is a folder without a config.json: it holds no model.")
        return os.path.expanduser(name)  # as it is: without its dot ./minilm would be a short name
    if name.startswith(("./", "../", "/", "~")) or name.count("/") > 1 or folder.suffix in (".safetensors", ".bin"):
        raise FileNotFoundError(
            f"`model` (={name!r}) is not a folder: give the folder that holds the model's config.json; or, of a file of "
            "weights with nothing beside it, the name of its architecture, and the file as checkpoint_path."
        )
    if name.count("/") == 1 and all(name.split("/")):
        return timm_location(name.removeprefix("timm/")) if name.startswith("timm/") and "." not in name else name
    return _timm_or_old_id(name)


def _timm_or_old_id(name: str) -> str:
    import timm  # late: its import takes seconds

    if timm.is_model(name) and "." not in name:
        return timm_location(name)
    if name in timm.list_pretrained():
        return f"timm/{name}"
    if ask_hub(name) is None or cached_folder(name):  # ids of the Hub's first years, such as gpt2, have no owner
        return name
    near = nearest_names(name, MODEL_NAMES) + nearest_names(name, timm.list_models(), limit=2)
    hint = f"the nearest are {', '.join(near)}" if near else f"short names are {', '.join(MODEL_NAMES)}"
    raise ValueError(f"`model` (={name!r}) is no short name, timm model, folder or Hub id (owner/name): {hint}.")


def timm_location(architecture: str) -> str:
    """Return ``timm/<architecture>`` with the tag of the weights that timm prefers, where it has some."""
    import timm

    config = timm.get_pretrained_cfg(architecture) if timm.is_model(architecture) else None
    return f"timm/{architecture}" if config is None or not config.tag else f"timm/{architecture}.{config.tag}"


def is_timm_elsewhere(location: str) -> bool:
    """Return whether timm's weights of this name lie elsewhere than in the Hub repository of this name."""
    # timm's own loader knows where: in repositories of others, in other forms, or at addresses of their own (55 of 1,826 sets
    # of weights as of timm 1.0.31).
    if not location.startswith("timm/") or Path(location).is_dir():
        return False
    import timm

    name = location.removeprefix("timm/")
    if not timm.is_model(name.split(".")[0]) or (name not in timm.list_pretrained() and "." in name):
        return False
    config = timm.get_pretrained_cfg(name)
    return config is not None and config.has_weights and config.hf_hub_id != location


def ask_hub(location: str, revision: str | None = None) -> Exception | None:
    """Ask the Hub for a model's config.json by one HEAD request; return the error, None where it is found."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(location, "config.json", revision=revision), timeout=5.0)
    except Exception as error:  # the transport's errors have another base class in each major version of the client
        return error
    return None


def cached_folder(location: str, revision: str | None = None) -> str | None:
    """Return the newest cached snapshot that holds configuration and weights."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(location, revision=revision, local_files_only=True))
    except OSError:
        return None
    weights = [path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern)]
    return str(folder) if weights and (folder / "config.json").is_file() else None


def locate_model(location: str, revision: str | None = None) -> str:
    """Check within seconds, by one HEAD request, that a model's files can be had; offline, return the cached folder."""
    # from_pretrained would find out too, but only after minutes of retries, and after the data were prepared.
    if Path(location).is_dir() or is_timm_elsewhere(location):
        if revision is not None:
            raise ValueError(f"`revision` (={revision!r}): {location!r} is read from no Hub repository: leave it out.")
        return location
    from huggingface_hub import errors

    error = ask_hub(location, revision)
    if error is None:
        return location
    named = f"`model` (={location!r}{'' if revision is None else f', revision {revision!r}'})"
    unknown = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError)
    if isinstance(error, errors.GatedRepoError):
        reason = "its owner grants access on request, and your login has none (ask on its page, then `hf auth login`)"
    elif isinstance(error, (*unknown, errors.HFValidationError)):
        near = nearest_names(location, MODEL_NAMES.values())
        hint = f" The nearest known are {', '.join(near)}." if near else ""
        hint = " Give the revision apart (--model_revision of finetune, else --revision)." if "@" in location else hint
        raise ValueError(
            f"{named}: the Hub has no such model with a config.json, or it is private and you are not logged in, and no "
            f"folder has that name.{hint}"
        ) from error
    elif cached := cached_folder(location, revision):
        return cached
    else:  # without addresses
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(": ")[-1].rstrip(".")[:120]
        reason = f"the Hub cannot be reached ({reason})"
    raise UnavailableError(
        f"{named} could not be fetched: {reason}, and it is not cached. Three ways on: a local folder (--model "
        "path/to/folder), a model that is in the cache (hf cache ls), or the one inside this package (--model micro)."
    ) from error
