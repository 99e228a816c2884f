"""Export a finished model as one ONNX file, for runtimes without Python; onnxruntime must give the model's logits.

    python examples/export_onnx.py out/digits-micro-etf model.onnx --task image

Needs the packages of ``pip install "etf_adapt[onnx]"``.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TimmWrapperConfig

from etf_adapt.heads.in_model import evaluation_mode, logits_of
from etf_adapt.inference.predictions import load_stock
from etf_adapt.models.folders import load_processor
from etf_adapt.models.timm_layout import data_config

TOLERANCE = 1e-4
"""Largest difference of a logit between file and model, relative to the largest logit or one."""

_TOKENS = 16


def export_onnx(
    model: PreTrainedModel | str | Path,
    file: str | Path,
    *,
    task: str | None = None,
    example: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write a classification model, or a finished folder of a ``task``, as an ONNX file; return its path.

    Batch size and number of tokens are free. Inputs keep their names in the model, the output is ``logits`` (batch,
    num_classes). Weights of more than 2 GB lie beside the file. ``example`` is a batch of two rows or more without labels.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch imports it late
    except ImportError as error:
        raise ImportError(f'export_onnx needs further packages ({error}): pip install "etf_adapt[onnx]".') from error
    if isinstance(model, (str, Path)):
        if task not in ("image", "text"):
            raise ValueError(f"`task` (={task!r}) must be 'image' or 'text', to load the folder {model}.")
        folder, model = model, load_stock(model, task)
        with suppress(FileNotFoundError):  # what the inputs are called and how large they are
            cast(Any, model).processor = load_processor(str(folder), task)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"`model` is a {type(model).__name__}: give a model of transformers (timm's in TimmWrapper) or a folder."
        )
    if model.dtype != torch.float32:
        raise ValueError(
            f"`model` is in {model.dtype}, which runtimes hold differently: convert it with model.float() first."
        )
    inputs = dict(example_inputs(model) if example is None else example)
    if any(len(value) < 2 for value in inputs.values()):
        raise ValueError("`example` has a single row, which exporters take for a fixed size: give two or more.")
    axes: dict[str, Any] = {name: {0: torch.export.Dim("batch")} for name in inputs}
    for name in axes.keys() & {"input_ids", "attention_mask", "token_type_ids"}:
        axes[name][1] = torch.export.Dim("tokens")
    other = {name: torch.cat([value, value.flip(0)[:1]]) for name, value in inputs.items()}
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    with evaluation_mode(model), tempfile.TemporaryDirectory(dir=file.parent) as place, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="# The axis name")  # two inputs share their axes, as they should
        program = torch.onnx.export(
            _Logits(model, list(inputs)).eval(),
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=["logits"],
            dynamic_shapes=(tuple(axes[name] for name in inputs),),  # of *inputs
            dynamo=True,
            verbose=False,
        )
        cast(Any, program).save(str(Path(place, file.name)))
        expected = logits_of(model(**other)).float().cpu().numpy()
        session = onnxruntime.InferenceSession(str(Path(place, file.name)), providers=["CPUExecutionProvider"])
        found = session.run(None, {name: value.cpu().numpy() for name, value in other.items()})[0]
        difference = float(np.abs(found - expected).max() / max(1.0, np.abs(expected).max()))
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"What was exported gave other logits than the model (difference {difference:.2g} of the greatest), and {file} "
                "was not written: newer versions of torch and onnxscript may export this architecture."
            )
        for part in Path(place).iterdir():  # weights of more than 2 GB are in a file of their own
            part.replace(file.parent / part.name)
    return file


class _Logits(nn.Module):
    """A model that takes its inputs by position and returns only the logits."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: Tensor) -> Tensor:
        return logits_of(self.model(**dict(zip(self.names, inputs, strict=True))))


def example_inputs(model: PreTrainedModel, *, rows: int = 2) -> dict[str, Tensor]:
    """Make a batch of a model's inputs from its configuration: noise, or random tokens."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "input_ids" or "SequenceClassification" in type(model).__name__:
        vocabulary = getattr(config.get_text_config(), "vocab_size", 256)  # of characters, where there is none
        ids = torch.randint(
            vocabulary // 2, vocabulary, (rows, _TOKENS), generator=generator
        )  # special ones come first
        if config.is_encoder_decoder and config.eos_token_id is not None:
            ids[:, -1] = config.eos_token_id  # where such models read the class
        names = getattr(getattr(model, "processor", None), "model_input_names", ("attention_mask",))
        others = {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        inputs = {"input_ids": ids, **{name: value for name, value in others.items() if name in names}}
        return {name: value.to(model.device) for name, value in inputs.items()}
    if isinstance(config, TimmWrapperConfig):
        channels, *size = data_config(config, cast(Any, model).timm_model.pretrained_cfg)["input_size"]
    else:
        vision = getattr(config, "vision_config", config)
        side, channels = getattr(vision, "image_size", None), getattr(vision, "num_channels", 3)
        if side is None:
            processor = getattr(model, "processor", None)
            known = getattr(processor, "crop_size", None) or getattr(processor, "size", None) or {}
            side = (known["height"], known["width"]) if "height" in known else known.get("shortest_edge")
        if not side:
            raise ValueError(
                f"`example` (=None): {type(model).__name__} does not tell the size of its images: give one."
            )
        size = [side, side] if isinstance(side, int) else list(side)
    images = torch.randn(rows, channels, *size, generator=generator)
    return {model.main_input_name: images.to(model.device, model.dtype)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a finished folder as an ONNX file.")
    parser.add_argument("folder", help="what a run left")
    parser.add_argument("file", help="the ONNX file")
    parser.add_argument("--task", choices=("image", "text"), required=True)
    options = parser.parse_args()
    print(export_onnx(options.folder, options.file, task=options.task))


if __name__ == "__main__":
    main()
