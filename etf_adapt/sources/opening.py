"""Opening a data set by its name: files, folders and Hub data sets, as raw splits."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, Features, Image
from huggingface_hub import snapshot_download

from etf_adapt.errors import DataError, nearest_names, quoted
from etf_adapt.sources.folders import BUILDERS, SPLIT_WORDS, class_folders, list_files, require_one_set, split_of
from etf_adapt.sources.image_names import ImageNames, read_image_names
from etf_adapt.sources.tables import read_tables

logger = logging.getLogger(__name__)

_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # as `datasets` calls a table of images
# Of a configuration: which files, not what is in them.
_LAYOUT = ("name", "version", "data_dir", "data_files", "description")


@dataclass(frozen=True)
class Source:
    """The raw splits of a data set, with its own columns and labels."""

    kind: str  # "embedded", "image folder", "files", "saved folder" or "Hub"
    splits: dict[str, Dataset]
    folder: Path | None = None  # where relative image paths in a column start
    files: tuple[Path, ...] = ()  # tables that were read
    imbalance_factor: float | None = None  # the long tail by default
    allow_flip: bool = True  # whether a mirrored image still shows its class


def open_source(
    dataset: str, *, revision: str | None = None, image_root: str | None = None, needs_train: bool = True
) -> Source:
    """Open a data set by name or path, as `load_data` describes them; splits are "train", "validation" and "test"."""
    root = None if image_root is None else Path(image_root).expanduser().absolute()
    if root is not None and not root.is_dir():
        raise FileNotFoundError(f"`image_root` (={image_root}) is no folder{_neighbour(root)}; give an existing one.")
    given = Path(dataset).expanduser()
    path = given.absolute()
    if path.is_dir():
        source = _open_folder(path, root)
    elif path.is_file():
        source = _open_files([path], path.parent, ImageNames(path.parent, root), are_chosen=True)
    elif glob.has_magic(dataset):
        found = sorted(glob.glob(str(given), recursive=True))  # the working folder is no pattern
        matches = [Path(match).absolute() for match in found if Path(match).is_file()]
        if not matches:
            raise FileNotFoundError(f"`dataset` (={dataset}) matches no file.")
        folder = Path(os.path.commonpath([match.parent for match in matches]))
        source = _open_files(matches, folder, ImageNames(folder, root), are_chosen=True)
    elif _looks_like_a_path(dataset):
        raise FileNotFoundError(f"`dataset` (={dataset}) does not exist{_neighbour(path)}; give an existing path.")
    else:
        source = _open_hub(dataset, revision, root)
    if needs_train and "train" not in source.splits:
        raise DataError(f"`dataset` (={dataset}) has no train split: it holds {quoted(source.splits)}.")
    for split, rows in source.splits.items():
        if not rows.num_rows:
            raise DataError(f"The {split} split of `dataset` (={dataset}) has no rows: remove it or fill it.")
    return source


def _open_folder(path: Path, image_root: Path | None) -> Source:
    if is_saved_data_set(path):
        splits = _by_split(_read(datasets.load_from_disk, str(path), named=path))
        return Source("saved folder", splits, image_root or path)
    listing = list_files(path)
    listing.warn(path)
    names = ImageNames(path, image_root, listing.images)
    metadata = [file for file in listing.tables if file.name in _METADATA]
    if listing.images and not metadata and image_root is None:
        splits, stray = class_folders(path, listing)
        if stray and not listing.tables:
            raise DataError(
                f"Image `{stray[0]}` lies in no class folder: an image folder is <class>/..., <split>/<class>/..., or "
                "has a table with the names and labels of the images."
            )
        if not stray and (len(splits["train"]) > 1 or not listing.tables):
            _require_no_rival(path, listing.tables, names)
            return Source("image folder", {name: _image_rows(classes) for name, classes in splits.items()}, path)
    if not listing.tables:
        raise DataError(
            f"`dataset` (={path}) holds neither images nor {', '.join(BUILDERS)} files, and no `save_to_disk` data set."
        )
    if not (metadata and listing.images):
        return _open_files(listing.tables, path, names, are_chosen=False)
    source = _open_files(metadata, path, names, are_chosen=True)
    if not any(isinstance(kind, Image) for rows in source.splits.values() for kind in rows.features.values()):
        raise DataError(f"`{metadata[0]}` names no image below {path}: add a column file_name, or move it away.")
    return source


def is_saved_data_set(folder: Path) -> bool:
    """Return whether a folder was written by `save_to_disk`."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _require_no_rival(path: Path, tables: Sequence[Path], names: ImageNames) -> None:
    """Refuse class folders beside a table that names their images or is of a split: either may hold the classes."""
    for table in tables:
        try:
            rows = _read_tables([table], "train")
            names_images = read_image_names(rows, names, near=table.parent, split="train").features != rows.features
        except DataError:  # no table of rows, such as a file of settings
            names_images = False
        if names_images or split_of(table.stem):
            raise DataError(
                f"`dataset` (={path}) holds class folders, and a table that may hold the classes, {table.name}: give the table "
                f"as `dataset`, {table} (its images are found below it, or below `image_root`), or move it away."
            )
    if tables:
        logger.warning("Not read, because the class folders are: %s", quoted(tables))


def _image_rows(classes: Mapping[str, Sequence[Path]]) -> Dataset:
    # As numbers where all are, so that "10" does not precede "9".
    numeric = all(re.fullmatch(r"\d+", name) for name in classes)
    names = sorted(classes, key=int if numeric else str)
    paths = [str(file) for name in names for file in classes[name]]
    labels = [index for index, name in enumerate(names) for _ in classes[name]]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"image": paths, "label": labels}, features=features)


def _open_files(files: Sequence[Path], folder: Path, names: ImageNames, *, are_chosen: bool) -> Source:
    """Read tables, each split by its own files: a column may be missing or differ in type elsewhere."""
    by_split: dict[str, list[Path]] = {}
    unnamed: list[Path] = []
    for file in files:
        split = split_of(file.stem) or next(filter(None, map(split_of, file.relative_to(folder).parts[:-1])), None)
        by_split.setdefault(split, []).append(file) if split else unnamed.append(file)
    if len(files) == 1 or not by_split:
        by_split, unnamed = {"train": list(files)}, []
    if unnamed:
        logger.warning("Not read, because their names are of no split: %s", ", ".join(map(str, unnamed)))
    splits = {}
    for split in filter(by_split.get, SPLIT_WORDS):
        if not are_chosen:
            require_one_set(by_split[split], split)
        splits[split] = _read_split(by_split[split], split, names)
    return Source("files", splits, names.root, files=tuple(file for group in by_split.values() for file in group))


def _read_split(files: Sequence[Path], split: str, names: ImageNames) -> Dataset:
    folders = sorted({file.parent for file in files})
    if len(folders) > 1 and all(file.stem == "metadata" for file in files):  # each names the images beside it
        groups = [[file for file in files if file.parent == folder] for folder in folders]
        return datasets.concatenate_datasets([_read_split(group, split, names) for group in groups])
    rows = _read_tables(files, split)
    return read_image_names(rows, names, near=Path(os.path.commonpath(folders)), split=split)


def _read_tables(files: Sequence[Path], split: str) -> Dataset:
    suffixes = sorted({file.suffix.lower() for file in files})
    if len(suffixes) > 1 or suffixes[0] not in BUILDERS:
        raise DataError(
            f"File type {' and '.join(suffixes)} of {quoted(file.name for file in files)} cannot be read: "
            f"give files of one type among {', '.join(BUILDERS)}."
        )
    if BUILDERS[suffixes[0]] != "parquet":
        return read_tables(files)
    named = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    options = {"data_files": {split: [glob.escape(str(file)) for file in files]}, "split": split}
    return _read(datasets.load_dataset, BUILDERS[suffixes[0]], named=named, **options)


def _read(reader: Callable[..., Any], *arguments: str, named: object, **options: Any) -> Any:
    """Call one of the readers of `datasets`; its errors are of the parser below it, or only say that there was one."""
    try:
        return reader(*arguments, **options)
    except Exception as error:
        cause = error.__cause__ or error
        raise DataError(f"`{named}` cannot be read: {_first_line(cause)}. Mend or replace it.") from error


def _open_hub(dataset: str, revision: str | None, image_root: Path | None) -> Source:
    match = re.fullmatch(r"(?P<repository>[\w.-]+(?:/[\w.-]+)?)(?::(?P<configuration>[\w.+-]+))?", dataset)
    if not match:
        raise DataError(f"`dataset` (={dataset}) is neither an existing path nor a Hub id such as `owner/name`.")
    reachable = _hub_is_reachable()
    if revision and not reachable:
        logger.warning("`revision` (=%s) is not asked for: offline, the newest cached one is read.", revision)
    try:
        loaded = _load_hub(match["repository"], match["configuration"], revision, offline=not reachable)
    except Exception as error:  # every reader, network and file-system error of `datasets` ends here
        if reachable:
            raise DataError(f"`dataset` (={dataset}) cannot be loaded from the Hub: {_first_line(error)}.") from error
        raise DataError(
            f"`dataset` (={dataset}) is no local path and not in the cache, and {datasets.config.HF_ENDPOINT} cannot "
            "be reached: give a local folder or file, load it once while online, or use `digits`."
        ) from error
    return Source("Hub", _by_split(loaded), image_root)


def _load_hub(repository: str, name: str | None, revision: str | None, *, offline: bool) -> Mapping[str, Dataset]:
    """Load the splits of a Hub data set, without the types that the Hub's viewer guesses; offline, what was fetched before."""
    config = datasets.config
    before = config.HF_HUB_OFFLINE, config.USE_PARQUET_EXPORT
    config.HF_HUB_OFFLINE, config.USE_PARQUET_EXPORT = before[0] or offline, False
    try:
        if offline:
            with suppress(Exception):  # where no tables were fetched, `datasets` may have kept the rows
                folder = snapshot_download(repository, repo_type="dataset", revision=revision, local_files_only=True)
                if tables := _plain_tables(datasets.load_dataset_builder(folder, name)):
                    return tables
        builder = datasets.load_dataset_builder(repository, name, revision=revision)
        if tables := _plain_tables(builder):
            return tables
        builder.download_and_prepare()
        return builder.as_dataset()
    finally:
        config.HF_HUB_OFFLINE, config.USE_PARQUET_EXPORT = before


def _plain_tables(builder: Any) -> dict[str, Dataset]:
    """Read a Hub data set's csv and json files as local ones; nothing where it has others, or declares their types or form."""
    plain, files = vars(type(builder.config)()), builder.config.data_files or {}
    stated = {key for key, value in vars(builder.config).items() if key not in _LAYOUT and value != plain[key]}
    suffixes = {Path(file).suffix.lower() for group in files.values() for file in group}
    stated -= {"sep"} if suffixes == {".tsv"} else set()
    if stated or builder.info.features or not suffixes <= BUILDERS.keys() - {".parquet"}:
        return {}
    fetch = datasets.DownloadManager().download
    return {str(split): read_tables([Path(file) for file in fetch(list(files[split]))]) for split in files}


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


def _by_split(loaded: Dataset | Mapping[str, Dataset]) -> dict[str, Dataset]:
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
    if not splits:
        raise DataError(
            f"The splits {quoted(loaded)} are none of {', '.join(SPLIT_WORDS)}: rename them, or give a data set of one split."
        )
    ignored = [name for name in loaded if not any(loaded[name] is rows for rows in splits.values())]
    if ignored:
        logger.warning("Not read, because their names are of no split: %s", ", ".join(ignored))
    return splits


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
