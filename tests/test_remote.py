"""A device through ssh: a real server on this machine, and what goes wrong without one."""

import io
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

from edgeke.errors import InputError
from edgeke.remote import _unpack, main, run_folder, ssh_command

MODULE = """
import json, pathlib
text = pathlib.Path("image").read_text()
print("a word on standard output")
pathlib.Path("out/answer.json").write_text(json.dumps(text))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "work"
    made.mkdir()
    (made / "job.py").write_text(MODULE)
    (made / "image").write_text("an image")
    return made


def temporary_folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("tmp.*"))


def test_a_folder_runs_on_a_device_that_greets_and_comes_back(server, folder):
    """The server prints a greeting at each login, and `python` is in the home of its user."""
    before = temporary_folders()
    run_folder(folder, "job", server, "~/a venv/python")
    assert (folder / "out" / "answer.json").read_text() == '"an image"'
    assert temporary_folders() == before


def test_the_devices_last_words_are_the_error_and_nothing_stays(server, folder):
    (folder / "job.py").write_text(
        "import os, sys; print('more'); sys.exit('no memory in ' + os.getcwd())"
    )
    with pytest.raises(InputError, match=r"^ssh://\S+ failed: no memory in /\S+$") as caught:
        run_folder(folder, "job", server, sys.executable)
    assert not Path(str(caught.value).rsplit(" ", 1)[1]).exists()
    with pytest.raises(InputError, match=r"^ssh://\S+ failed: .*No module named missing$"):
        run_folder(folder, "missing", server, sys.executable)


def test_a_device_is_checked_before_it_is_needed(server, capsys, tmp_path):
    assert main([server, "~/a venv/python"]) == 0
    assert capsys.readouterr().out.startswith(f"{server}: Python 3.")
    assert main([server, "~/b/python"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "ssh" / "authorized_keys").write_text("")
    assert main([server]) == 1
    assert "denied" in capsys.readouterr().err
    assert main(["ssh://127.0.0.1:1"]) == 1
    assert "refused" in capsys.readouterr().err


def test_here_it_is_a_process_of_its_own(folder):
    run_folder(folder, "job", "local", "unused")
    assert (folder / "out" / "answer.json").read_text() == '"an image"'
    with pytest.raises(InputError, match="device process failed: .*No module named missing"):
        run_folder(folder, "missing", "local", "unused")


def test_addresses():
    assert ssh_command("ssh://pi@board:2222")[-3:] == ["-p", "2222", "pi@board"]
    assert ssh_command("ssh://MyPi")[-1] == "MyPi", "ssh_config distinguishes capitals"
    assert ssh_command("ssh://pi@[fe80::1]/")[-1] == "pi@fe80::1"
    assert "BatchMode=yes" in ssh_command("ssh://board")


@pytest.mark.parametrize(
    "device",
    ["board", "http://board", "ssh://", "ssh://pi:secret@board", "ssh://board:port",
     "ssh://-oProxyCommand=x", "ssh://-l@board", "ssh://board/path", "ssh://a b"],
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
    with pytest.raises(InputError, match=r"'\.\./outside' would be extracted"):
        _unpack(packed.getvalue(), tmp_path / "out")
    assert (tmp_path / "out" / "fine" / "file").read_bytes() == b"abc"
    assert not (tmp_path / "outside").exists()
    with pytest.raises(InputError, match="no archive"):
        _unpack(b"", tmp_path / "out")
