"""Opening a data set by its name: the embedded digits, files, folders and Hub data sets, as raw splits."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

from etf_adapt.data.digits import make_digits
from etf_adapt.data.tables import read_tables
from etf_adapt.errors import DataError, nearest_names

logger = logging.getLogger(__name__)

DIGITS_IMBALANCE = 20.0  # 120 rows of the first class, 6 of the last, one of which goes to validation

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Source:
    """The raw splits of a data set, with its own columns and labels."""

    kind: str  # "embedded", "image folder", "files", "saved folder" or "Hub"
    splits: dict[str, Dataset]
    folder: Path | None = None  # where relative image paths in a column start
    imbalance_factor: float | None = None  # the long tail by default
    allow_flip: bool = True  # whether a mirrored image still shows its class


def open_source(dataset: str, *, revision: str | None = None) -> Source:
    """Open a data set by name or path, as `load_data` describes them; splits are "train", "validation" and "test"."""
    if dataset == "digits":
        return Source("embedded", make_digits(), imbalance_factor=DIGITS_IMBALANCE, allow_flip=False)
    path = Path(dataset).expanduser().absolute()
    if path.is_dir():
        source = _open_folder(path)
    elif path.is_file():
        source = _open_files([path], path.parent)
    elif glob.has_magic(dataset):
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True)) if Path(match).is_file()]
        if not matches:
            raise FileNotFoundError(f"`dataset` (={dataset}) matches no file.")
        source = _open_files(matches, Path(os.path.commonpath([match.parent for match in matches])))
    elif _looks_like_a_path(dataset):
        raise FileNotFoundError(f"`dataset` (={dataset}) does not exist{_neighbour(path)}; give an existing path.")
    else:
        source = _open_hub(dataset, revision)
    if "train" not in source.splits:
        raise DataError(f"`dataset` (={dataset}) has no train split: it holds {quoted(source.splits)}.")
    for split, rows in source.splits.items():
        if not rows.num_rows:
            raise DataError(f"The {split} split of `dataset` (={dataset}) has no rows: remove it or fill it.")
    return source


def _open_folder(path: Path) -> Source:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return Source("saved folder", _by_split(_read(datasets.load_from_disk, str(path), named=path)), path)
    files = _walk(path)
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    tables = [file for file in files if file.suffix.lower() in BUILDERS]
    if images and any(file.stem == "metadata" for file in tables):
        loaded = _read(datasets.load_dataset, "imagefolder", named=path, data_dir=str(path))
        return Source("image folder", _by_split(loaded), path)
    if images:
        splits, stray = _class_folders(path, images)
        if stray and not tables:
            raise DataError(
                f"Image `{stray[0]}` lies in no class folder: an image folder is <class>/..., <split>/<class>/..., or "
                "has a metadata.csv with a label column."
            )
        if not stray and (len(splits["train"]) > 1 or not tables):
            return Source("image folder", {name: _image_rows(classes) for name, classes in splits.items()}, path)
    if not tables:
        raise DataError(
            f"`dataset` (={path}) holds neither images nor {', '.join(BUILDERS)} files, and no `save_to_disk` data set."
        )
    return _open_files(tables, path)


def _walk(root: Path) -> list[Path]:
    """List the files below a folder in order, hidden ones and what archivers leave excepted."""
    files: list[Path] = []
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        files += [Path(folder, name) for name in sorted(names) if not _is_hidden(name)]
    return files


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _class_folders(root: Path, images: Sequence[Path]) -> tuple[dict[str, dict[str, list[Path]]], list[Path]]:
    """Group images as {split: {class: files}} by the folders that they lie in, and list those in no class folder."""
    # `datasets`' own image folder loses the labels where one class is alone and adds a class that only test has to train's
    # names (5.2); here the first folder, below the split's, is the class, everywhere.
    by_name = {folder.name: _split_of(folder.name) for folder in root.iterdir() if folder.is_dir()}
    split_folders = {name: split for name, split in by_name.items() if split}
    if "train" not in split_folders.values():
        split_folders = {}
    splits: dict[str, dict[str, list[Path]]] = {}
    for name in split_folders or [""]:
        classes = [child.name for child in (root / name).iterdir() if child.is_dir() and not _is_hidden(child.name)]
        splits.setdefault(split_folders.get(name, "train"), {}).update({label: [] for label in classes})
    stray: list[Path] = []
    for file in images:
        split, parts = "train", file.relative_to(root).parts
        if split_folders:
            split, parts = split_folders.get(parts[0], ""), parts[1:]
        if split and len(parts) > 1:
            splits[split][parts[0]].append(file)
        else:
            stray.append(file)
    return splits, stray


def _image_rows(classes: Mapping[str, Sequence[Path]]) -> Dataset:
    # As numbers where all are, so that "10" does not precede "9".
    numeric = all(re.fullmatch(r"\d+", name) for name in classes)
    names = sorted(classes, key=int if numeric else str)
    paths = [str(file) for name in names for file in classes[name]]
    labels = [index for index, name in enumerate(names) for _ in classes[name]]
    return Dataset.from_dict(
        {"image": paths, "label": labels}, features=Features({"image": Image(), "label": ClassLabel(names=names)})
    )


def _open_files(files: Sequence[Path], folder: Path) -> Source:
    """Read tables, each split by its own files: a column may be missing or differ in type elsewhere."""
    by_split: dict[str, list[Path]] = {}
    unnamed: list[Path] = []
    for file in files:
        split = _split_of(file.stem) or next(filter(None, map(_split_of, file.relative_to(folder).parts[:-1])), None)
        by_split.setdefault(split, []).append(file) if split else unnamed.append(file)
    if len(files) == 1 or not by_split:
        by_split, unnamed = {"train": list(files)}, []
    if unnamed:
        logger.warning("Not read, because their names are of no split: %s", ", ".join(map(str, unnamed)))
    splits = {split: _read_tables(by_split[split], split) for split in SPLIT_WORDS if split in by_split}
    return Source("files", splits, folder)


def _read_tables(files: Sequence[Path], split: str) -> Dataset:
    suffixes = sorted({file.suffix.lower() for file in files})
    if len(suffixes) > 1 or suffixes[0] not in BUILDERS:
        raise DataError(
            f"File type {' and '.join(suffixes)} of {quoted(file.name for file in files)} cannot be read: "
            f"give files of one type among {', '.join(BUILDERS)}."
        )
    if BUILDERS[suffixes[0]] == "csv":
        return read_tables(files)
    named = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    options = {"data_files": {split: [str(file) for file in files]}, "split": split}
    return _read(datasets.load_dataset, BUILDERS[suffixes[0]], named=named, **options)


def _read(reader: Callable[..., Any], *arguments: str, named: object, **options: Any) -> Any:
    """Call one of the readers of `datasets`; its errors are of the parser below it, or only say that there was one."""
    try:
        return reader(*arguments, **options)
    except Exception as error:
        cause = error.__cause__ or error
        raise DataError(f"`{named}` cannot be read: {_first_line(cause)}. Mend or replace it.") from error


def _open_hub(dataset: str, revision: str | None) -> Source:
    match = re.fullmatch(r"(?P<repository>[\w.-]+(?:/[\w.-]+)?)(?::(?P<configuration>[\w.+-]+))?", dataset)
    if not match:
        raise DataError(f"`dataset` (={dataset}) is neither an existing path nor a Hub id such as `owner/name`.")
    reachable = _hub_is_reachable()
    if revision and not reachable:
        logger.warning("`revision` (=%s) is not asked for: offline, the newest cached one is read.", revision)
    try:
        with _offline(not reachable):
            loaded = datasets.load_dataset(match["repository"], match["configuration"], revision=revision)
    except Exception as error:  # every reader, network and file-system error of `datasets` ends here
        if reachable:
            raise DataError(f"`dataset` (={dataset}) cannot be loaded from the Hub: {_first_line(error)}.") from error
        raise DataError(
            f"`dataset` (={dataset}) is no local path and not in the cache, and {datasets.config.HF_ENDPOINT} cannot "
            "be reached: give a local folder or file, load it once while online, or use `digits`."
        ) from error
    return Source("Hub", _by_split(loaded))


def _hub_is_reachable(timeout: float = 3.0) -> bool:
    """Ask once: `datasets` itself retries for 25 s before it says that there is no network (5.2)."""
    if datasets.config.HF_HUB_OFFLINE:
        return False
    from huggingface_hub import get_session

    try:
        get_session().head(datasets.config.HF_ENDPOINT, timeout=timeout)
    except Exception:  # the HTTP library, and so the class of its errors, differs between versions of huggingface_hub
        return False
    return True


@contextmanager
def _offline(offline: bool) -> Iterator[None]:
    """Let `datasets` read its cache alone."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _by_split(loaded: Dataset | DatasetDict) -> dict[str, Dataset]:
    """Name the splits as we do; a lone split of another name is train."""
    if isinstance(loaded, Dataset):
        return {"train": loaded}
    if len(loaded) == 1:
        return {"train": next(iter(loaded.values()))}
    splits: dict[str, Dataset] = {}
    for words in SPLIT_WORDS.values():
        found = next((word for word in words if word in loaded), None)
        if found:
            splits[words[0]] = loaded[found]
    ignored = [name for name in loaded if not any(loaded[name] is rows for rows in splits.values())]
    if ignored:
        logger.warning("Not read, because their names are of no split: %s", ", ".join(ignored))
    return splits


def _split_of(name: str) -> str | None:
    """Return the split that a file's or folder's name stands for: "train-00000-of-00001" is train, "trains" is none."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for split, known in SPLIT_WORDS.items() if any(word in words for word in known)), None)


def _looks_like_a_path(dataset: str) -> bool:
    path = Path(dataset)
    return (
        dataset.startswith((".", "/", "~"))
        or path.suffix.lower() in BUILDERS
        or len(path.parts) > 2
        or (len(path.parts) == 2 and path.parent.is_dir())
    )


def _neighbour(path: Path) -> str:
    names = [child.name for child in path.parent.iterdir()] if path.parent.is_dir() else []
    near = nearest_names(path.name, names, limit=1)
    return f" (nearest: {path.parent / near[0]})" if near else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def quoted(names: Iterable[object]) -> str:
    """Return the first ten names for a message."""
    shown = [f"`{name}`" for name in names]
    return ", ".join(shown[:10]) + (", ..." if len(shown) > 10 else "")
