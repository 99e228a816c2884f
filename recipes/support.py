"""Which models can be adapted: every timm name, every classification class and image encoder of transformers, tried out.

    python recipes/support.py                                     # all: hours on a CPU; after a stop it goes on
    python recipes/support.py --only BertForSequenceClassification vit_tiny_patch16_224
    python recipes/support.py --table_only                        # recipes/SUPPORT.md from what was found

Each model has random weights and is adapted to three classes, run forward and backward under dot regression, given its head
back (logits equal to the last bit), adapted again, saved, and read again: by this library, by its stock class, and timm's
models by timm, with equal logits. Classes of transformers are built small (`support_configs.py`); timm's models of more than
--most_parameters or --most_pixels are built on the meta device, and swapped, run and given back there, but not saved.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from comparison import format_markdown
from export_onnx import example_inputs
from support_configs import small_config
from torch import Tensor
from transformers.models.auto import modeling_auto

from etf_adapt.heads.in_model import HeadError, head_modules, logits_of
from etf_adapt.inference.predictions import load_stock
from etf_adapt.models.auto import ETFForImageClassification, ETFForSequenceClassification, adapt
from etf_adapt.models.pooling import pooled_features
from etf_adapt.models.swap import find_heads, restore_head, swap_head
from etf_adapt.results import run_folder

RESULTS = Path(__file__).with_name("results") / "support"
TABLE = Path(__file__).with_name("SUPPORT.md")
KINDS = {
    "image": "transformers' image classes",
    "text": "transformers' sequence classes",
    "encoder": "transformers' image encoders without a class",
    "timm": "timm's names",
}
CLASSES, SIZE, TOLERANCE = 5, 224, 1e-5


def main(argv: Sequence[str] | None = None) -> None:
    """Try what is not tried yet, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="Names to try; all where none is given.")
    parser.add_argument("--kinds", nargs="+", default=[*KINDS], choices=[*KINDS])
    parser.add_argument("--most_parameters", type=float, default=30e6, help="Of timm's models with weights.")
    parser.add_argument(
        "--most_pixels", type=int, default=256, help="Side of the images of timm's models with weights."
    )
    parser.add_argument("--jobs", type=int, default=1, help="Processes.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Folder of what was found.")
    parser.add_argument("--table", type=Path, default=TABLE, help="File of the table.")
    parser.add_argument("--table_only", action="store_true", help="Try nothing.")
    options = parser.parse_args(argv)
    if not options.table_only:
        try_all(options)
    found = {kind: list(read(options.results, kind).values()) for kind in KINDS}
    options.table.write_text(table(found), encoding="utf-8")
    for kind, records in found.items():
        print(f"{KINDS[kind]}: {dict(Counter(record['outcome'] for record in records))}")


def try_all(options: argparse.Namespace) -> None:
    """Try the models that are not tried yet; worker processes end now and then, as memory is not given back."""
    for kind in options.kinds:
        done = read(options.results, kind)
        tasks = [
            (kind, name, model_type, options.most_parameters, options.most_pixels)
            for name, model_type in names(kind)
            if name not in done and (not options.only or name in options.only)
        ]
        options.results.mkdir(parents=True, exist_ok=True)
        with (
            open(options.results / f"{kind}.jsonl", "a", encoding="utf-8") as file,
            multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=25) as pool,
        ):
            for number, record in enumerate(pool.imap_unordered(try_one, tasks), start=1):
                file.write(json.dumps(record) + "\n")
                file.flush()
                print(f"[{number}/{len(tasks)}] {record['name']}: {record['outcome']} {record['said']}", flush=True)


def names(kind: str) -> Iterator[tuple[str, str]]:
    """Yield the names of a kind, with the model type of each class of transformers."""
    if kind == "timm":
        yield from ((name, "") for name in timm.list_models())
        return
    if kind == "encoder":
        with_class, seen = {*modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES}, set()
        for model_type, classes in modeling_auto.MODEL_MAPPING_NAMES.items():
            name = classes if isinstance(classes, str) else classes[0]
            is_image = False
            with suppress(ImportError):  # of a package of its own
                is_image = getattr(getattr(transformers, name, None), "main_input_name", None) == "pixel_values"
            if is_image and model_type not in with_class and not name.startswith("Timm") and name not in seen:
                seen.add(name)
                yield name, model_type
        return
    task = {"image": "IMAGE", "text": "SEQUENCE"}[kind]
    mapping: dict[str, Any] = getattr(modeling_auto, f"MODEL_FOR_{task}_CLASSIFICATION_MAPPING_NAMES")
    seen = set()
    for model_type, classes in mapping.items():
        for name in [classes] if isinstance(classes, str) else classes:
            if name not in seen and not name.startswith("TimmWrapper"):  # timm's names are its models
                seen.add(name)
                yield name, model_type


def try_one(task: tuple[str, str, str, float, int]) -> dict[str, Any]:
    """Try one model; an error is part of its record."""
    kind, name, model_type, most_parameters, most_pixels = task
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    record: dict[str, Any] = {"name": name, "outcome": "failed", "said": "", "heads": [], "weights": "small"}
    stages = ["build"]
    try:
        if kind == "timm":
            try_timm(name, record, stages.append, most_parameters, most_pixels)
        elif kind == "encoder":
            try_encoder(name, model_type, record, stages.append)
        else:
            try_class(kind, name, model_type, record, stages.append)
        record["outcome"] = "works"
    except ImportError as error:
        record |= {"outcome": "not built", "said": first_line(error)}
    except HeadError as error:
        record |= {"outcome": "refused", "said": first_line(error)}
    except Exception as error:  # what any of a thousand models may raise
        record["said"] = f"{stages[-1]}: {type(error).__name__}: {first_line(error)}"
    gc.collect()
    return record


def try_class(kind: str, name: str, model_type: str, record: dict[str, Any], at: Callable[[str], None]) -> None:
    """Try a class of transformers, built small."""
    stock = getattr(transformers, name)
    config = small_config(model_type, num_labels=CLASSES)
    config.architectures = [name]  # which of several classes of its type it stands for
    model = stock(config).eval()
    factory = ETFForImageClassification if kind == "image" else ETFForSequenceClassification
    batch = inputs_of(model)
    again = [stock.from_pretrained]
    if (
        type(factory._auto_model.from_config(model.config)).__name__ == name
    ):  # the class that its configuration stands for
        again.append(factory.from_pretrained)
    go_through(model, batch, again, record, at)


def try_encoder(name: str, model_type: str, record: dict[str, Any], at: Callable[[str], None]) -> None:
    """Try an image encoder of transformers, built small, by its pooled output."""
    config = small_config(model_type, num_labels=CLASSES)
    if pooled_features(config) is None:
        raise HeadError("It makes no pooled output of images alone.")
    with tempfile.TemporaryDirectory() as folder:
        getattr(transformers, name)(config).save_pretrained(folder)
        at("load")
        model: Any = ETFForImageClassification.from_pretrained(folder, num_labels=CLASSES)
    restore_head(model)
    loaders = [ETFForImageClassification.from_pretrained, lambda place: load_stock(place, "image")]
    go_through(model.eval(), inputs_of(model), loaders, record, at)


def try_timm(name: str, record: dict[str, Any], at: Callable[[str], None], parameters: float, pixels: int) -> None:
    """Try a model of timm: with weights in transformers' wrapper, or alone on the meta device."""
    with torch.device("meta"):
        empty = timm.create_model(name, num_classes=CLASSES)
    channels, *size = empty.pretrained_cfg.get("input_size", (3, SIZE, SIZE))
    if sum(parameter.numel() for parameter in empty.parameters()) > parameters or max(size) > pixels:
        record["weights"] = "none"
        at("swap")
        swap_head(empty, 3)
        record["heads"] = list(head_modules(empty))
        with torch.device("meta"):
            at("forward")
            logits = logits_of(empty.eval()(torch.empty(2, channels, *size)))
            require(logits.shape == (2, 3), f"logits of shape {tuple(logits.shape)}")
            at("backward")
            logits.square().sum().backward()  # dot regression picks the label's entry, which this device cannot differentiate
        at("restore")
        restore_head(empty)
        swap_head(empty, 4)
        return
    record["weights"] = "random"
    model: Any = ETFForImageClassification.from_pretrained(f"timm/{name}", num_labels=CLASSES, pretrained=False)
    restore_head(model)

    def by_timm(folder: str) -> Any:
        plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        return lambda pixel_values: plain(pixel_values)

    loaders = [
        ETFForImageClassification.from_pretrained,
        transformers.AutoModelForImageClassification.from_pretrained,
        by_timm,
    ]
    go_through(model.eval(), example_inputs(model), loaders, record, at)


def go_through(
    model: Any,
    batch: dict[str, Tensor],
    loaders: Sequence[Callable[[str], Any]],
    record: dict[str, Any],
    at: Callable[[str], None],
) -> None:
    """Adapt a model, train it a step, give its head back, adapt it again, save it and load it in each way."""
    at("find")
    find_heads(model)
    at("stock forward")
    with torch.no_grad():
        before = logits_of(model(**batch))
    at("adapt")
    model = adapt(model, 3, loss="dot_regression")
    record["heads"] = list(head_modules(model))
    at("forward and backward")
    output = model.train()(**batch, labels=torch.tensor([0, 2]))
    output["loss"].backward()
    require(
        any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in model.parameters()),
        "no gradient",
    )
    require(all(head.weight.grad is None for head in head_modules(model).values()), "the fixed head has a gradient")
    model.zero_grad()
    at("restore")
    norms = {key: value.clone() for key, value in model.state_dict().items() if "running_" in key}
    restore_head(model.eval())
    if not norms:  # which a step in training mode has moved
        with torch.no_grad():
            require(torch.equal(logits_of(model(**batch)), before), "other logits with its own head back")
    at("adapt again")
    model = adapt(model, 3)
    with torch.no_grad():
        logits = logits_of(model(**batch))
    require(logits.shape == (2, 3), f"logits of shape {tuple(logits.shape)}")
    with tempfile.TemporaryDirectory() as folder:
        at("save")
        model.save_pretrained(folder)
        for number, loader in enumerate(loaders, start=1):
            at(f"load {number}")
            loaded = loader(folder)
            with torch.no_grad():
                found = logits_of((loaded.eval() if hasattr(loaded, "eval") else loaded)(**batch))
            apart = float((found - logits).abs().max() / logits.abs().max().clamp_min(1.0))
            require(apart <= TOLERANCE, f"logits {apart:.2g} apart after loading")


def inputs_of(model: Any) -> dict[str, Tensor]:
    """Make a batch of two rows, also for convolutional networks, whose configuration holds no image size."""
    if model.config.model_type == "siglip2":  # which takes patches
        patches = torch.randn(2, 16, 3 * model.config.vision_config.patch_size**2)
        places = {"pixel_attention_mask": torch.ones(2, 16), "spatial_shapes": torch.full((2, 2), 4)}
        return {"pixel_values": patches, **places}
    try:
        return example_inputs(model)
    except ValueError:
        return {model.main_input_name: torch.randn(2, getattr(model.config, "num_channels", 3), SIZE, SIZE)}


def require(holds: bool, otherwise: str) -> None:
    """Raise unless it holds."""
    if not holds:
        raise AssertionError(otherwise)


def first_line(error: BaseException) -> str:
    """Return the first line of an error, without local paths."""
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return str(run_folder.public_value(said))[:200]


def read(results: Path, kind: str) -> dict[str, dict[str, Any]]:
    """Return the records of a kind, by name."""
    file = results / f"{kind}.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return {record["name"]: record for record in map(json.loads, lines)}


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Format the counts, and each model that does not work with its reason."""
    outcomes = ("works", "refused", "not built", "failed")
    cells, apart = [], []
    for kind, records in found.items():
        if not records:
            continue
        counts = Counter(record["outcome"] for record in records)
        saved = sum(record["outcome"] == "works" and record["weights"] != "none" for record in records)
        several = sum(len(record["heads"]) > 1 for record in records)
        numbers = (len(records), *(counts[outcome] for outcome in outcomes), saved, several)
        cells.append([KINDS[kind], *map(str, numbers)])
        alike: dict[tuple[str, str], list[str]] = {}
        for record in sorted(records, key=lambda record: record["name"]):
            if record["outcome"] != "works":
                alike.setdefault((record["outcome"], record["said"].replace("|", "\\|")), []).append(record["name"])
        apart += [[", ".join(names), outcome, said] for (outcome, said), names in alike.items()]
    kinds = " ".join(kind for kind, records in found.items() if records)
    told = "" if all(found.values()) else f" --kinds {kinds}"
    parts = [
        "# Which models can be adapted",
        f"By `python recipes/support.py{told}`, which says what *works* means; random weights. *Saved* ones were "
        "also read again with equal logits by their stock library; the others were too large and stayed on the meta device.",
        format_markdown(["", "tried", *outcomes, "saved and read again", "with several heads"], cells),
        format_markdown(["not", "", "why"], apart) if apart else "",
        ", ".join(
            f"{name} {value}" for name, value in run_folder.describe_environment().items() if name != "processes"
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


if __name__ == "__main__":
    sys.exit(main())
