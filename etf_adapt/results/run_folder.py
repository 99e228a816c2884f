"""Files of a run's output folder: their names, their contents, and when they may be replaced."""

from __future__ import annotations

import dataclasses
import glob
import json
import math
import os
import platform
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from etf_adapt.errors import OutputFolderError
from etf_adapt.results.claim import CLAIM_FILE
from etf_adapt.results.prediction_files import write_rows

ARGUMENTS_FILE = "arguments.json"
RESULTS_FILE = "all_results.json"
LOG_FILE = "log.jsonl"
PREDICTIONS_FILE = "predictions.csv"
STATISTICS_FILE = "etf_statistics.safetensors"  # of the rows that the head was set from: inference/head_statistics.py
RUN_FILES = (ARGUMENTS_FILE, RESULTS_FILE, LOG_FILE, PREDICTIONS_FILE)

MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "preprocessor_config.json",
    "processor_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
    "spiece.model", "spm.model", "sentencepiece*.model", "bpe.codes", "dict.txt", "entity_vocab.json", "chat_template*",
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json",
    "*_Dense/config.json", "*_Dense/model.safetensors",
)  # fmt: skip
"""Files of a model as stock libraries write them, where they exist; a star matches no slash."""

CARD_FILE, NEW_CARD_FILE, FACTS_FILE = "README.md", "README.new.md", "card.json"
COUNTS_FIGURE, RECALLS_FIGURE = "class_counts.png", "recalls.png"
_PACKAGES = ("etf_adapt", "torch", "transformers", "timm", "datasets", "accelerate", "numpy")
_SECRET = re.compile("token|password|secret", re.I)
_OF_TEXTS = re.compile("tokens?[_-](seen|per|across|id|type)|(num|max|min)[_-].*tokens?|tokenizer", re.I)
# Fields of arguments that choose nothing here, and what the same run begun anew would not be given.
_UNRECORDED = ("do_train", "do_eval", "do_predict", "resume_from_checkpoint")


def check_output_dir(folder: str | os.PathLike[str], *, resume: bool = False, overwrite: bool = False) -> None:
    """Refuse a folder with files of no run, or with a run past its first checkpoint, without ``resume`` or ``overwrite``."""
    path = Path(folder)
    if path.is_file():
        raise OutputFolderError(f"`output_dir` (={str(folder)!r}) is a file: name a folder.")
    names = sorted({entry.name for entry in path.iterdir()} - {CLAIM_FILE}) if path.is_dir() else []
    if not names:
        return
    if not (path / ARGUMENTS_FILE).is_file():
        raise OutputFolderError(
            f"`output_dir` (={str(folder)!r}) holds something that no run of this recipe wrote ({names[0]!r}): "
            "choose another folder, or an empty one."
        )
    trained = [name for name in names if name.startswith("checkpoint-") or name.endswith(".safetensors")]
    if trained and not resume and not overwrite:
        raise OutputFolderError(
            f"`output_dir` (={str(folder)!r}) holds an earlier run: go on with it (--resume_from_checkpoint last), "
            "replace it (--overwrite_output_dir), or choose another folder (--output_dir)."
        )


def folders_of_name(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the folders of runs of one name, without end: out/x, out/x-2, out/x-3 ..."""
    path = Path(folder)
    return (path if number == 1 else path.with_name(f"{path.name}-{number}") for number in count(1))


def newest_of_name(folder: str | os.PathLike[str]) -> Path:
    """Return the folder of the run of one name that began last, or was resumed last; the first name if there is none."""
    path = Path(folder)
    files = path.parent.glob(f"{glob.escape(path.name)}*/{ARGUMENTS_FILE}")
    runs = [file for file in files if re.fullmatch(r"(-\d+)?", file.parent.name.removeprefix(path.name))]
    return max(runs, key=lambda file: file.stat().st_mtime_ns).parent if runs else path


def remove_run_files(folder: str | os.PathLike[str]) -> None:
    """Remove the model and the reports of an earlier run; checkpoints and the card, which may be edited, stay."""
    path = Path(folder)
    if not (path / ARGUMENTS_FILE).is_file():
        return
    for pattern in (*MODEL_FILES, NEW_CARD_FILE, FACTS_FILE, COUNTS_FIGURE, RECALLS_FIGURE, *RUN_FILES):
        for file in path.glob(pattern):
            if file.is_file():
                file.unlink()


def write_json(file: str | os.PathLike[str], content: Any) -> None:
    """Write JSON in one step: a reader finds the old file or the new one. What is not finite becomes null."""
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    text = json.dumps(plain_value(content), indent=2, ensure_ascii=False, allow_nan=False)
    draft.write_text(f"{text}\n", encoding="utf-8")
    draft.replace(path)


def public_value(value: Any) -> Any:
    """Return a value for JSON, without secrets in dicts; of absolute paths the part below the working folder, or a name."""
    value = _without_secrets(value)
    if isinstance(value, str) and os.path.isabs(value):
        return os.path.relpath(value) if Path(value).is_relative_to(Path.cwd()) else Path(value).name
    if isinstance(value, Mapping):
        return {key: public_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [public_value(item) for item in value]
    return plain_value(value)


def _is_secret(name: str) -> bool:
    return _SECRET.search(name) is not None and not _OF_TEXTS.search(name)


def _without_secrets(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {key: item for key, item in value.items() if not _is_secret(str(key))}
    return getattr(value, "value", value)  # of an enumeration, as it is typed


def public_arguments(*groups: Any) -> dict[str, Any]:
    """Return the fields of dataclasses as one flat dict for JSON, without tokens and without absolute paths."""
    return {name: public_value(value) for name, value in recorded_arguments(*groups).items()}


def recorded_arguments(*groups: Any) -> dict[str, Any]:
    """Return the fields of dataclasses as one flat dict for JSON, without tokens; the command can read it again."""
    arguments: dict[str, Any] = {}
    for group in groups:
        for field in dataclasses.fields(group):
            if field.init and field.name not in _UNRECORDED and not _is_secret(field.name):
                arguments[field.name] = plain_value(_without_secrets(getattr(group, field.name)))
    return arguments


def public_command(argv: Sequence[str]) -> str:
    """Return the command line that begins a run, without tokens and private paths; ``argv`` lacks the program."""
    words: list[str] = []
    skip = False
    for word in argv:
        flag, equals, value = word.partition("=")
        is_flag = flag.startswith("--")
        is_left_out = is_flag and (_is_secret(flag) or flag[2:].replace("-", "_") in ("resume", *_UNRECORDED))
        if is_left_out or (skip and not is_flag):
            skip = is_left_out and not equals
            continue
        skip = False
        words.append(f"{flag}={public_value(value)}" if is_flag and equals else public_value(word))
    return shlex.join(["etf-adapt", "finetune", *words])


def describe_environment() -> dict[str, Any]:
    """Return versions and hardware of this process, without names of users, machines or folders."""
    import torch

    found: dict[str, Any] = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    found |= {"platform": f"{platform.system()} {platform.machine()}", "cpu_count": os.cpu_count()}
    found["processes"] = int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    return found


def write_log(file: str | os.PathLike[str], history: Iterable[Mapping[str, Any]]) -> None:
    """Write ``trainer.state.log_history`` as JSON lines, one for each step."""
    steps: dict[Any, dict[str, Any]] = {}
    for entry in history:
        steps.setdefault(entry.get("step"), {}).update(entry)
    lines = [json.dumps(plain_value(entry), allow_nan=False) for entry in steps.values()]
    Path(file).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_predictions(
    file: str | os.PathLike[str],
    *,
    row_ids: Sequence[int] | np.ndarray,
    labels: Sequence[int] | np.ndarray,
    predictions: Sequence[int] | np.ndarray,
    confidences: Sequence[float] | np.ndarray,
    label_names: Sequence[str],
    files: Sequence[str] | None = None,
) -> None:
    """Write CSV with label, prediction, its calibrated probability and its file, if there are ``files``, for each row."""
    columns: dict[str, Iterable[Any]] = {
        "row_id": map(int, row_ids),
        "label": (label_names[label] for label in labels),
        "prediction": (label_names[label] for label in predictions),
        "confidence": (round(float(confidence), 6) for confidence in confidences),
    } | ({} if files is None else {"file": files})
    write_rows((dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)), str(file))


def share_weights(folder: str | os.PathLike[str]) -> None:
    """Give files of weights the mode of other new files: safetensors 0.8 lets their owner alone read them."""
    mask = os.umask(0o077)  # the only way to read it sets it
    os.umask(mask)
    for file in (file for pattern in ("*.safetensors", "*_Dense/*.safetensors") for file in Path(folder).glob(pattern)):
        if file.stat().st_mode & 0o777 == 0o600:
            file.chmod(0o666 & ~mask)


def loading_lines(folder: str | os.PathLike[str], library: str, task: str) -> str:
    """Return the Python that loads a finished run, a folder or a Hub id, with a stock library."""
    name = json.dumps(str(folder))
    if library == "sentence_transformers":
        return f"from sentence_transformers import SentenceTransformer\nscore = SentenceTransformer({name}).encode  # logits"
    pipeline, cut = ("image-classification", "") if task == "image" else ("text-classification", ", truncation=True")
    return f'from transformers import pipeline\nclassify = pipeline("{pipeline}", model={name}{cut})'


def plain_value(value: Any) -> Any:
    """Return a value as JSON can hold it; what is not finite becomes None."""
    if isinstance(value, Mapping):
        return {str(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain_value(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, bool, int, float)) else str(value)
