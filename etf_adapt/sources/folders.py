"""What lies below a folder: images, tables, and what is passed over; and the class folders that images lie in."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image as PILImage

from etf_adapt.errors import DataError, quoted

logger = logging.getLogger(__name__)

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
RUN_FILE = "arguments.json"  # by which `results.run_folder` knows the folder of a run
_RUNS = "folders of runs of this library"

# Pillow knows these by their header, and has no pixels of them.
_WITHOUT_PIXELS = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
IMAGE_SUFFIXES = frozenset(
    suffix
    for suffix, name in PILImage.registered_extensions().items()
    if name in PILImage.OPEN and name not in _WITHOUT_PIXELS
)


@dataclass
class Listing:
    """Paths below a folder, in order."""

    images: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    passed: dict[str, list[Path]] = field(default_factory=dict)  # by the reason

    def warn(self, root: Path) -> None:
        """Count and name what is passed over, in one line."""
        reasons = [f"{reason}: {len(paths)} (`{min(paths)}`)" for reason, paths in sorted(self.passed.items())]
        if reasons:
            logger.warning("Not read below %s: %s", root, ", ".join(reasons))


def list_files(root: Path) -> Listing:
    """List what lies below a folder; links are followed to what is not read already."""
    found = Listing()
    base = os.path.realpath(root)
    read: set[str] = set()  # real paths of folders, and of files that were linked to
    pending = [(str(root), base)]
    links: list[tuple[str, str]] = []
    while pending or links:
        # Folders that are there come before links, so that a name does not decide which of the two is read.
        is_link = not pending
        shown, real = links.pop(0) if is_link else pending.pop()
        folder, name = os.path.split(real)
        is_listed = folder in read and not is_hidden(name) and os.path.isfile(real)
        if real in read or (is_link and (is_listed or base.startswith(os.path.join(real, "")))):
            found.passed.setdefault("links to what is read already", []).append(Path(shown))
            continue
        if not os.path.isdir(real):
            read.add(real)
            _add_file(found, shown)
            continue
        entries = sorted(os.scandir(real), key=lambda entry: entry.name)
        if real != base and any(entry.name == RUN_FILE for entry in entries):
            found.passed.setdefault(_RUNS, []).append(Path(shown))
            continue
        read.add(real)
        found.folders.append(Path(shown))
        for entry in entries:
            path = os.path.join(shown, entry.name)
            if is_hidden(entry.name):
                found.passed.setdefault("hidden", []).append(Path(path))
            elif entry.is_symlink():
                links.append((path, os.path.realpath(entry.path)))
            elif entry.is_dir():
                pending.append((path, entry.path))
            else:
                _add_file(found, path)
    for paths in (found.images, found.tables, found.folders):
        paths.sort()
    return found


def _add_file(found: Listing, path: str) -> None:
    suffix = _suffix(path)
    if is_image(path):
        found.images.append(Path(path))
    elif suffix in BUILDERS:
        found.tables.append(Path(path))
    else:
        found.passed.setdefault(suffix or "without a suffix", []).append(Path(path))


def is_image(path: str) -> bool:
    """Return whether a file is an image by its suffix, or without one by its header."""
    if suffix := _suffix(path):
        return suffix in IMAGE_SUFFIXES
    try:
        PILImage.open(path).close()
    except Exception:  # Pillow's readers raise any class at other files
        return False
    return True


def _suffix(path: str) -> str:
    suffix = os.path.splitext(path)[1].lower()
    return suffix if re.fullmatch(r"\.[a-z]\w*", suffix) else ""  # "cell.0001" has none


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is passed over by its name."""
    return name.startswith(".") or name == "__MACOSX"


def class_folders(root: Path, listing: Listing) -> tuple[dict[str, dict[str, list[Path]]], list[Path]]:
    """Group images as {split: {class: files}} by the folders that they lie in, and list those in no class folder."""
    # `datasets`' own image folder loses the labels where one class is alone and adds a class that only test has to train's
    # names (5.2); here the first folder, below the split's, is the class, everywhere.
    parts = {file: file.relative_to(root).parts for file in listing.images}
    by_name = {folder.name: split_of(folder.name) for folder in listing.folders if folder.parent == root}
    split_folders = {name: split for name, split in by_name.items() if split}
    # Beside other folders of images, a folder "train" that holds images and no folders is a class, such as of vehicles.
    depths = {len(place) for place in parts.values() if place[0] in split_folders}
    others = any(len(place) > 1 and place[0] not in split_folders for place in parts.values())
    if "train" not in split_folders.values() or (others and depths == {2}):
        split_folders = {}
    for split in split_folders.values():
        require_one_set([root / name for name, other in split_folders.items() if other == split], split)
    splits: dict[str, dict[str, list[Path]]] = {"train": {}}
    bases = {root / name: split for name, split in split_folders.items()} or {root: "train"}
    of_runs = {folder for run in listing.passed.get(_RUNS, []) for folder in run.parents}
    of_images = {folder for file in listing.images for folder in file.parents} if of_runs else set()
    for folder in listing.folders:  # an empty one is a class without rows; one that holds runs alone is none
        if folder.parent in bases and folder not in of_runs - of_images:
            splits.setdefault(bases[folder.parent], {})[folder.name] = []
    stray, nested = [], []
    for file, place in parts.items():
        split_name, below = (split_folders.get(place[0]), place[1:]) if split_folders else ("train", place)
        if split_name and len(below) > 1:
            splits[split_name][below[0]].append(file)
            nested += [file.parent] if len(below) > 2 else []
        else:
            stray.append(file)
    if nested and not stray and (len(splits["train"]) > 1 or not listing.tables):
        if [len(classes) for classes in splits.values()] == [1]:
            lone = next(iter(splits["train"]))
            raise DataError(f"`dataset` (={root}) holds one class folder: if classes lie in it, give {root / lone}.")
        logger.warning("Images in folders below those of the classes are of these classes: `%s`.", nested[0])
    return splits, stray


def split_of(name: str) -> str | None:
    """Return the split that a file's or folder's name stands for: "train-00000-of-00001" is train, "trains" is none."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for split, known in SPLIT_WORDS.items() if any(word in words for word in known)), None)


def require_one_set(paths: Sequence[Path], split: str) -> None:
    """Refuse several files or folders of a split that are no numbered parts: copies and versions would count rows twice."""
    keys = {(path.parent, re.sub(r"\d+-of-\d+(-[0-9a-f]+)?|\d+", "#", path.name)) for path in paths}
    key = next(iter(keys))[1] if len(keys) == 1 else ""
    if len(paths) > 1 and ("#" not in key or re.search(r"(\(|(?<![a-z])v|copy\W*)#", key.lower())):
        raise DataError(
            f"Split {split} has {len(paths)} files or folders that may hold the same rows: {quoted(paths)}. Move all but one "
            "away; tables that belong together can be given as a pattern, such as `folder/train*.csv`."
        )
