"""What is found in folders and CSV files, and what is refused, before any picture is opened."""

import os
from pathlib import Path

import pytest
from toys import replace

from edgeke.data.listing import list_pictures
from edgeke.errors import InputError
from edgeke.params import Data, Group


def data(path: Path, group: Group | None = None) -> Data:
    return Data(str(path), 16, group, 200)


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    touch(tmp_path, "bolt/a.png", "bolt/b.png", "nut/a.png")
    return tmp_path


@pytest.mark.parametrize("names", [("train", "test"), ("images", "masks"), ("Train", "Val")])
def test_folders_of_splits_are_no_classes(tmp_path: Path, names):
    touch(tmp_path, *(f"{name}/{i}.jpg" for name in names for i in range(3)), "labels.csv")
    with pytest.raises(InputError, match=r"no names of classes; .*CSV.*source=csv"):
        list_pictures("image_folder", data(tmp_path))


def test_pictures_without_class_folders_are_counted(tmp_path: Path):
    touch(tmp_path, "a.png", "b.png")
    with pytest.raises(InputError, match=r"no class folders \(it holds 2 images of no class\)"):
        list_pictures("image_folder", data(tmp_path))


def test_a_folder_too_high_is_told(tmp_path: Path):
    touch(tmp_path, "set/bolt/a.png", "other/nut/a.png")
    with pytest.raises(InputError, match=r"(?s)hold no images.*it holds folders: point data.path"):
        list_pictures("image_folder", data(tmp_path))


def test_linked_folders_are_refused_and_linked_files_read(folder: Path, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("nas")
    touch(elsewhere, "x.png", "washer/y.png")
    (folder / "nut" / "x.png").symlink_to(elsewhere / "x.png")  # DVC sees when it changes
    assert "nut/x.png" in list_pictures("image_folder", data(folder)).names
    (folder / "washer").symlink_to(elsewhere / "washer")
    with pytest.raises(InputError, match=r"(?s)links to folders.*washer -> .*nas.*washer"):
        list_pictures("image_folder", data(folder))


def test_hidden_and_system_entries_are_no_classes_and_counted(folder: Path):
    touch(folder, "__MACOSX/._a.png", ".ipynb_checkpoints/a.png", "bolt/Thumbs.db", "bolt/._a.png")
    listing = list_pictures("image_folder", data(folder))
    assert listing.classes == ("bolt", "nut")
    assert listing.notes == (
        f"left out of {folder}: 4 hidden or the system's (such as .ipynb_checkpoints)",
    )


def test_names_that_are_not_utf8_are_named_at_once(folder: Path):
    for name in (b"\xe9t\xe9.png", b"gr\xfcn.png"):
        open(os.fsencode(folder / "bolt") + b"/" + name, "wb").close()
    with pytest.raises(InputError, match=r"(?s)not UTF-8.*gr\\xfcn\.png.*\\xe9t\\xe9\.png"):
        list_pictures("image_folder", data(folder))


def test_groups_by_folder_and_by_pattern(tmp_path: Path):
    touch(tmp_path, "ok/p1/a.png", "ok/p2/a.png", "bad/p2/a/b.png")
    listing = list_pictures("image_folder", data(tmp_path, Group(folder=1)))
    assert listing.names == ("bad/p2/a/b.png", "ok/p1/a.png", "ok/p2/a.png")
    assert listing.groups == ("p2", "p1", "p2")
    flat = tmp_path / "flat"
    touch(flat, "ok/part1_00.png", "bad/part2_00.png", "bad/part2_01.png")
    by_name = data(flat, Group(pattern=r"(part\d+)_"))
    assert list_pictures("image_folder", by_name).groups == ("part2", "part2", "part1")
    touch(flat, "bad/other.png", "ok/another.png")
    with pytest.raises(InputError, match=r"(?s)2 of 5 pictures no group.*bad/other.*ok/another"):
        list_pictures("image_folder", by_name)


def test_a_group_in_train_and_test_is_refused(tmp_path: Path):
    touch(tmp_path, *(f"{part}/{name}/p1_0.png" for part in ("train", "test") for name in "ab"))
    with pytest.raises(InputError, match=r"(?s)more than one split.*p1: test, train"):
        list_pictures("image_folder", data(tmp_path, Group(pattern="(p1)_")))


@pytest.mark.parametrize(
    ("names", "warned"),
    [
        ([f"part{p:03}_{s:02}" for p in range(5) for s in range(4)], True),
        ([f"{p:04}{s}" for p in range(5) for s in "abc"], True),
        ([f"IMG_{i:04}" for i in range(20)], False),
        ([f"2024-{i:03}" for i in range(20)], False),
    ],
)
def test_names_that_look_grouped_are_reported(tmp_path: Path, names, warned):
    touch(tmp_path, *(f"{label}/{name}.png" for label in "ab" for name in names))
    notes = list_pictures("image_folder", data(tmp_path)).notes
    assert any("names look grouped" in note for note in notes) == warned


def write_csv(folder: Path, text: str, name: str = "labels.csv", encoding: str = "utf-8") -> None:
    (folder / name).write_bytes(text.encode(encoding))


def test_a_csv_names_classes_splits_and_groups(tmp_path: Path):
    touch(tmp_path, *(f"images/{i}.png" for i in range(4)))
    text = "path,label,split,group\r\nimages/0.png,ok,test,p1\r\nimages/1.png,nöt,,\r\n"
    write_csv(tmp_path, text + '"images/2.png",ok,train,p2\r\n', "set.csv", "utf-8-sig")
    listing = list_pictures("csv", data(tmp_path))
    assert listing.classes == ("nöt", "ok")
    assert listing.labels.tolist() == [1, 0, 1]
    assert listing.splits == ("test", "", "")  # train is split further
    assert listing.groups == ("p1", "", "p2")
    assert listing.notes == (f"left out of {tmp_path}: 1 not in the CSV (such as images/3.png)",)


def test_all_faults_of_a_csv_are_named_at_once(tmp_path: Path):
    touch(tmp_path, "a.png", "b.png", "note.txt")
    rows = ["a.png,ok,", "a.png,ok,", "gone.png,ok,", "b.png,,", "/etc/x.png,ok,", "../x.png,ok,"]
    write_csv(tmp_path, "\n".join(["path,label,split", *rows, "note.txt,ok,", "./b.png,ok,tset"]))
    with pytest.raises(InputError) as caught:
        list_pictures("csv", data(tmp_path))
    for words in (
        "line 3: a.png is already in line 2",
        "line 4: gone.png is missing",
        "line 5: no label",
        "line 6: /etc/x.png must be relative",
        "line 7: ../x.png must be relative",
        "line 8: note.txt is no image",
        "line 9: ./b.png is already in line 5",
        "line 9: split tset is unknown; use train, validation, calibration, test",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file,label\na.png,x\n", "has the columns file, label .* takes path,label"),
        ("path,label\na.png\n", "line 2: not 2 cells"),
        ("path,label\n", "no rows"),
    ],
)
def test_a_csv_of_another_form_is_refused(tmp_path: Path, text: str, words: str):
    touch(tmp_path, "a.png")
    write_csv(tmp_path, text)
    with pytest.raises(InputError, match=rf"(?s){words}"):
        list_pictures("csv", data(tmp_path))


def test_where_the_csv_must_be(tmp_path: Path):
    touch(tmp_path, "a.png")
    with pytest.raises(InputError, match="no CSV file"):
        list_pictures("csv", data(tmp_path))
    write_csv(tmp_path, "path,label\na.png,gr\xfcn\n", "x.csv", "latin-1")
    with pytest.raises(InputError, match=r"not UTF-8 \(line 2\)"):
        list_pictures("csv", data(tmp_path))
    with pytest.raises(InputError, match="not a folder; give the folder that holds it"):
        list_pictures("csv", data(tmp_path / "x.csv"))
    write_csv(tmp_path, "path,label\n", "y.csv")
    with pytest.raises(InputError, match=r"several CSV files \(x.csv, y.csv\)"):
        list_pictures("csv", data(tmp_path))


def test_groups_of_a_csv_and_of_names_together_are_refused(tmp_path: Path):
    touch(tmp_path, "a.png")
    write_csv(tmp_path, "path,label,group\na.png,x,g\n")
    with pytest.raises(InputError, match="remove one of them"):
        list_pictures("csv", replace(data(tmp_path), group=Group(folder=1)))
