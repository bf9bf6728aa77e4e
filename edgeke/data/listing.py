"""Which of the user's own pictures there are, without opening one: class folders, or a CSV."""

import csv
import io
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from edgeke.errors import InputError
from edgeke.params import Data, Group

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
SPLITS = ("train", "validation", "calibration", "test")

# So many names are printed where all of them have a fault.
_NAMED = 200

_SYSTEM = {
    "thumbs.db", "desktop.ini", "__macosx", "lost+found", "system volume information",
    "$recycle.bin", "@eadir", "#recycle", "icon\r",
}  # fmt: skip

# Folders that hold splits, or everything: where all folders have such names, none is a class.
_NO_CLASSES = {
    "train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval",
    "evaluation", "holdout", "calibration", "images", "image", "img", "imgs", "pictures", "photos",
    "jpegimages", "labels", "annotations", "masks", "ground_truth", "data", "dataset", "datasets",
    "source", "raw", "unlabelled", "unlabeled",
}  # fmt: skip

# A name that ends in the number of a shot after the number of a part: part007_03, 12 (2), 0815-b.
_SHOT = re.compile(r"^(.*\d.*?)(?:[ _.-]+\(?(?:\d{1,4}|[a-z])\)?|(?<=\d)[a-z])$", re.IGNORECASE)


@dataclass(frozen=True)
class Listing:
    """Pictures in order: their files, what users call them, labels `[N]` and class names.

    `splits`: the split that the source itself gives, or nothing. `groups`: pictures of one group
    are never in two splits; nothing for a picture that is alone. `notes` are sentences for the
    user.
    """

    files: tuple[Path, ...]
    names: tuple[str, ...]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    splits: tuple[str, ...]
    groups: tuple[str, ...]
    notes: tuple[str, ...] = ()


def list_pictures(source: str, data: Data) -> Listing:
    """The pictures of `image_folder` or `csv` below `data.path`.

    Errors: InputError that names everything that is wrong with names, folders, rows and groups.
    """
    path = Path(data.path)
    if not path.is_dir():
        hint = "; give the folder that holds it and the pictures" if path.is_file() else ""
        raise InputError(
            f"data.path = {path} is not a folder{hint}; put class folders there, or point to them "
            "with -S 'data.path=\"/absolute/folder\"'"
        )
    listing = _from_csv(path) if source == "csv" else _from_folders(path, data.group)
    if data.group is not None:
        if any(listing.groups):
            raise InputError(
                f"data.group = {_shown(data.group)}, but the CSV of {path} has a column `group`; "
                "remove one of them"
            )
        listing = replace(listing, groups=_groups(listing, source, data.group))
    elif not any(listing.groups):
        listing = replace(listing, notes=(*listing.notes, *_about_names(listing)))
    _check_groups(listing)
    return listing


def listed(faults: Iterable[str]) -> str:
    """Faults for an error message: one a line, the first 200."""
    every = list(faults)
    more = [f"... and {len(every) - _NAMED} more"] if len(every) > _NAMED else []
    return "".join(f"\n  {escaped(fault)}" for fault in [*every[:_NAMED], *more])


def escaped(text: str) -> str:
    """A file's name that every terminal can print."""
    plain = text.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in plain)


def _from_folders(path: Path, group: Group | None) -> Listing:
    """`path/{train,test}/<class>/*`, or `path/<class>/*` when there is no own test split."""
    tree = _Tree(path)
    # A class may be called train, too: only a folder of folders is a split.
    has_parts = "train" in tree.folders(path) and bool(tree.folders(path / "train"))
    parts = [path / "train", path / "test"] if has_parts else [path]
    if has_parts:
        tree.leave_out("beside train/ and test/", (f for f in tree.in_order(path, parts)))
    classes = _classes(tree, parts[0])
    files, labels, splits, empty = [], [], [], []
    for part in parts:
        if (other := _classes(tree, part)) != classes:
            differing = ", ".join(map(escaped, sorted(set(other) ^ set(classes))))
            raise InputError(
                f"{parts[0]} and {part} must hold the same class folders; these are in only one "
                f"of them: {differing}"
            )
        tree.leave_out("beside class folders", (part / name for name in tree.files(part)))
        for label, name in enumerate(classes):
            pictures = list(tree.pictures(part / name, group is not None and bool(group.folder)))
            if not pictures:
                deeper = "; it holds folders: point data.path to the folder of the class folders"
                empty.append(f"{part / name}{deeper if tree.folders(part / name) else ''}")
            files += pictures
            labels += [label] * len(pictures)
            splits += ["test" if has_parts and part == parts[1] else ""] * len(pictures)
    tree.check()
    if empty:
        raise InputError(
            f"class folders hold no images ({', '.join(SUFFIXES)}); add some, or remove the "
            f"folders:{listed(empty)}"
        )
    names = tuple(file.relative_to(path).as_posix() for file in files)
    return Listing(
        tuple(files),
        names,
        np.asarray(labels, np.int64),
        classes,
        tuple(splits),
        ("",) * len(files),
        tree.notes(),
    )


def _classes(tree: "_Tree", folder: Path) -> tuple[str, ...]:
    names = tree.folders(folder)
    pictures = [name for name in tree.files(folder) if name.lower().endswith(SUFFIXES)]
    if not names:
        if not folder.is_dir():
            raise InputError(f"{folder} is missing; it must hold one folder per class")
        hint = f" (it holds {len(pictures)} images of no class)" if pictures else ""
        raise InputError(
            f"{folder} holds no class folders{hint}; put the images of each class into a folder "
            "of its name, or name their classes in a CSV: docs/data.md (queued and --temp runs "
            "work in a copy: give data.path as an absolute path)"
        )
    if all(name.lower() in _NO_CLASSES for name in names):
        raise InputError(
            f"{folder} holds the folders {', '.join(names)}, which are no names of classes; give "
            "one folder per class (in train/ and test/ where these are to be kept), or a CSV that "
            "names each picture's class (-S profiles.image_folder.data.source=csv): docs/data.md"
        )
    return names


class _Tree:
    """Folders below one, read once each; what is not read is counted by reason."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._read: dict[Path, tuple[list[str], list[str]]] = {}
        self.left_out: dict[str, list[Path]] = defaultdict(list)
        self.links: list[Path] = []
        self.unreadable: list[Path] = []

    def folders(self, folder: Path) -> tuple[str, ...]:
        return tuple(self._entries(folder)[0])

    def files(self, folder: Path) -> list[str]:
        return self._entries(folder)[1]

    def in_order(self, folder: Path, without: Sequence[Path] = ()) -> Iterator[Path]:
        folders, files = self._entries(folder)
        yield from (f for name in sorted([*folders, *files]) if (f := folder / name) not in without)

    def leave_out(self, reason: str, paths: Iterable[Path]) -> None:
        for path in paths:
            self.left_out[reason].append(path)

    def pictures(self, folder: Path, deep: bool) -> Iterator[Path]:
        """The picture files in a folder, and (`deep`) below it."""
        for path in self.in_order(folder):
            if path.name in self._entries(folder)[0]:
                if deep:
                    yield from self.pictures(path, deep)
                else:
                    self.left_out["below class folders"].append(path)
            elif path.name.lower().endswith(SUFFIXES):
                yield path
            else:
                self.left_out[f"ending in {escaped(path.suffix) or 'nothing'}"].append(path)

    def check(self) -> None:
        """Refuse what DVC does not watch, or cannot name. Errors: InputError."""
        if self.links:
            raise InputError(
                "symbolic links to folders, which DVC does not follow, so that pictures added "
                "there would be missed: move the folder here, or mount it (mount --bind):"
                + listed(f"{link} -> {os.readlink(link)}" for link in self.links)
            )
        if self.unreadable:
            raise InputError(
                f"names that are not UTF-8, which DVC cannot keep; rename them (convmv does it):"
                f"{listed(map(str, self.unreadable))}"
            )

    def notes(self) -> tuple[str, ...]:
        """One sentence that counts by reason what was not read, with an example of each."""
        reasons = [
            f"{len(paths)} {reason} (such as {escaped(str(paths[0].relative_to(self.root)))})"
            for reason, paths in self.left_out.items()
            if paths
        ]
        return (f"left out of {self.root}: {', '.join(reasons)}",) if reasons else ()

    def _entries(self, folder: Path) -> tuple[list[str], list[str]]:
        if folder not in self._read:
            folders: list[str] = []
            files: list[str] = []
            if folder.is_dir():
                for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
                    path = folder / entry.name
                    if _is_hidden(entry.name):
                        self.left_out["hidden or the system's"].append(path)
                        continue
                    if not _is_utf8(entry.name):
                        self.unreadable.append(path)
                    if entry.is_dir() and entry.is_symlink():
                        self.links.append(path)
                    (folders if entry.is_dir() else files).append(entry.name)
            self._read[folder] = folders, files
        return self._read[folder]


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _from_csv(folder: Path) -> Listing:
    """The only CSV in the folder, or its labels.csv: `path,label[,split][,group]`."""
    found = sorted(f for f in folder.glob("*.[cC][sS][vV]") if not _is_hidden(f.name))
    file = found[0] if len(found) == 1 else folder / "labels.csv"
    if file not in found:
        what = f"several CSV files ({', '.join(f.name for f in found)})" if found else "no CSV file"
        raise InputError(
            f"data.path = {folder} holds {what}; call the one with the columns path,label and "
            "perhaps split and group labels.csv"
        )
    rows, faults = _rows(file), []
    lines: dict[str, int] = {}
    for number, row in rows:
        where, name = f"line {number}: ", row["path"]
        pure = PurePosixPath(name)
        if not name:
            faults.append(f"{where}no path")
        elif pure.is_absolute() or ".." in pure.parts or "\\" in name:
            faults.append(f"{where}{name} must be relative to {folder}, below it, with /")
        elif (first := lines.setdefault(str(pure), number)) != number:
            faults.append(f"{where}{name} is already in line {first}")
        elif not (folder / name).is_file():
            faults.append(f"{where}{name} is missing")
        elif not name.lower().endswith(SUFFIXES):
            faults.append(f"{where}{name} is no image ({', '.join(SUFFIXES)})")
        elif any((folder / parent).is_symlink() for parent in list(pure.parents)[:-1]):
            faults.append(f"{where}{name} is in a linked folder, which DVC does not follow")
        if not row["label"]:
            faults.append(f"{where}no label")
        if row["split"] not in ("", *SPLITS):
            faults.append(f"{where}split {row['split']} is unknown; use {', '.join(SPLITS)}")
    if faults:
        raise InputError(f"{file} has {len(faults)} faults; correct them:{listed(faults)}")
    if not rows:
        raise InputError(f"{file} has no rows; give one per picture: path,label")
    values = [row for _, row in rows]
    classes = tuple(sorted({row["label"] for row in values}))
    labels = np.asarray([classes.index(row["label"]) for row in values], np.int64)
    given = {row["split"] for row in values} - {"", "train"}
    # Rows of train may be split further unless all splits are there; rows without one always.
    fixed = {*given, "train"} if len(given) == len(SPLITS) - 1 else given
    splits = tuple(row["split"] if row["split"] in fixed else "" for row in values)
    splits = tuple(split or ("train" if "train" in fixed else "") for split in splits)
    groups = tuple(row["group"] for row in values)
    files = tuple(folder / row["path"] for row in values)
    others = _unlisted(folder, {*files, file})
    notes = (f"left out of {folder}: {others}",) if others else ()
    names = tuple(row["path"] for row in values)
    return Listing(files, names, labels, classes, splits, groups, notes)


def _rows(file: Path) -> list[tuple[int, dict[str, str]]]:
    """The rows with their line numbers, cells without blanks around them."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise InputError(
            f"{file} is not UTF-8 (line {line}); save it as UTF-8, in a spreadsheet as `CSV UTF-8`"
        ) from None
    header = text.partition("\n")[0]
    delimiter = ";" if ";" in header and "," not in header else ","  # some spreadsheets'
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    columns = [(name or "").strip() for name in reader.fieldnames or ()]
    known = ("path", "label", "split", "group")
    unknown = [name for name in columns if name not in known]
    missing = [name for name in known[:2] if name not in columns]
    if missing or unknown or len(set(columns)) < len(columns):
        raise InputError(
            f"{file} has the columns {', '.join(columns) or 'none'} in its first line; it takes "
            "path,label and perhaps split and group, each once"
        )
    reader.fieldnames = columns
    rows, faults = [], []
    try:
        for row in reader:
            if None in row or None in row.values():
                faults.append(f"line {reader.line_num}: not {len(columns)} cells")
                continue
            cells = {name: row.get(name, "").strip() for name in known}
            if any(cells.values()):
                rows.append((reader.line_num, cells))
    except csv.Error as error:
        faults.append(f"line {reader.line_num}: {error}")
    if faults:
        raise InputError(f"{file} cannot be read; correct it:{listed(faults)}")
    return rows


def _unlisted(folder: Path, known: set[Path]) -> str:
    """How many pictures the CSV does not name, with an example."""
    others = [
        Path(place) / name
        for place, _, names in os.walk(folder)
        for name in sorted(names)
        if name.lower().endswith(SUFFIXES) and not _is_hidden(name)
    ]
    others = [file for file in others if file not in known]
    if not others:
        return ""
    return f"{len(others)} not in the CSV (such as {escaped(str(others[0].relative_to(folder)))})"


def _groups(listing: Listing, source: str, group: Group) -> tuple[str, ...]:
    """Each picture's group by its file's name. Errors: InputError where a name gives none."""
    groups, without = [], []
    # Below the class folder, which is in train/ or test/ where these keep their splits.
    above = 0 if source == "csv" else 2 if "test" in listing.splits else 1
    for name in listing.names:
        parts = PurePosixPath(name).parts[above:]
        if group.folder is not None:
            found = parts[group.folder - 1] if len(parts) > group.folder else ""
        else:
            match = re.search(group.pattern or "", "/".join(parts))
            found = "/".join(filter(None, match.groups() or (match[0],))) if match else ""
        groups.append(found)
        if not found:
            without.append(name)
    if without:
        raise InputError(
            f"data.group = {_shown(group)} gives {len(without)} of {len(groups)} pictures no "
            f"group; rename or move them, or change it:{listed(without)}"
        )
    return tuple(groups)


def _check_groups(listing: Listing) -> None:
    """Refuse a group that the source itself puts into two splits. Errors: InputError."""
    splits: dict[str, set[str]] = defaultdict(set)
    for group, split in zip(listing.groups, listing.splits, strict=True):
        if group:
            splits[group].add(split or "train")
    torn = [f"{group}: {', '.join(sorted(s))}" for group, s in splits.items() if len(s) > 1]
    if torn:
        raise InputError(
            f"groups with pictures in more than one split; keep each group in one:{listed(torn)}"
        )


def _about_names(listing: Listing) -> tuple[str, ...]:
    """A warning where many names look like several shots of one thing."""
    shots: dict[tuple[int, str], list[str]] = defaultdict(list)
    for label, name in zip(listing.labels.tolist(), listing.names, strict=True):
        if match := _SHOT.match(PurePosixPath(name).stem):
            shots[label, match[1]].append(name)
    many = [names for names in shots.values() if len(names) > 1]
    pictures = sum(map(len, many))
    if len(many) < 3 or pictures < len(listing.names) / 2:
        return ()
    return (
        f"names look grouped: {pictures} pictures of {len(many)} things, such as "
        f"{many[0][0]} and {many[0][1]}. Pictures of one part, roll or plate in two splits make "
        "every promise too good; say in params.yaml which belong together, such as data.group: "
        "{pattern: '(.*)[_-]'} or {folder: 1}: docs/data.md",
    )


def _shown(group: Group) -> str:
    if group.folder is not None:
        return f"{{folder: {group.folder}}}"
    return f"{{pattern: {group.pattern!r}}}"
