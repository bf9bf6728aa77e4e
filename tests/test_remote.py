"""A device through ssh: a real server on this machine, and what goes wrong without one."""

import io
import sys
import tarfile
from pathlib import Path

import pytest

from edgeke.errors import InputError
from edgeke.remote import _unpack, run_folder, ssh_command

MODULE = """
import json, pathlib, sys
given = pathlib.Path("given").read_text()
pathlib.Path("out/answer.json").write_text(json.dumps([sys.argv[1], given]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "work"
    made.mkdir()
    (made / "job.py").write_text(MODULE)
    (made / "given").write_text("an image")
    return made


def test_a_folder_runs_on_a_device_and_comes_back(server, folder):
    run_folder(folder, "job", ["word; touch /tmp/no"], server, sys.executable)
    expected = '["word; touch /tmp/no", "an image"]'
    assert (folder / "out" / "answer.json").read_text() == expected


def test_the_devices_words_come_back_and_nothing_stays(server, folder):
    (folder / "job.py").write_text("import os, sys; sys.exit('no memory left in ' + os.getcwd())")
    with pytest.raises(InputError, match="process on ssh://.* failed: .*no memory left") as caught:
        run_folder(folder, "job", [], server, sys.executable)
    assert not Path(str(caught.value).rsplit(" ", 1)[1]).exists()


def test_another_key_is_refused_without_asking(server, folder, tmp_path):
    (tmp_path / "ssh" / "authorized_keys").write_text("")
    with pytest.raises(InputError, match="(?s)failed: .*denied"):
        run_folder(folder, "job", [], server, sys.executable)


def test_here_it_is_a_process_of_its_own(folder):
    run_folder(folder, "job", ["word"], "local", "unused")
    assert (folder / "out" / "answer.json").read_text() == '["word", "an image"]'
    with pytest.raises(InputError, match="device process failed: .*No module named missing"):
        run_folder(folder, "missing", [], "local", "unused")


def test_addresses():
    assert ssh_command("ssh://pi@board:2222")[-3:] == ["-p", "2222", "pi@board"]
    assert ssh_command("ssh://board")[-1] == "board"
    assert "BatchMode=yes" in ssh_command("ssh://board")


@pytest.mark.parametrize(
    "device",
    ["board", "http://board", "ssh://", "ssh://pi:secret@board", "ssh://board:port",
     "ssh://-oProxyCommand=x", "ssh://board/path"],
)  # fmt: skip
def test_other_addresses_are_refused(device):
    with pytest.raises(InputError, match="use local or ssh://user@host"):
        ssh_command(device)


def test_files_outside_the_folder_are_refused(tmp_path: Path):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name in ("fine/file", "../outside"):
            entry = tarfile.TarInfo(name)
            entry.size = 3
            archive.addfile(entry, io.BytesIO(b"abc"))
    with pytest.raises(InputError, match=r"outside its folder: '\.\./outside'"):
        _unpack(packed.getvalue(), tmp_path / "out")
    assert (tmp_path / "out" / "fine" / "file").read_bytes() == b"abc"
    assert not (tmp_path / "outside").exists()
