import subprocess
from pathlib import Path

import pytest

from edgeke import files
from edgeke.errors import InputError


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    target = tmp_path / "a" / "weights"
    files.write_text(target, "old")

    def write_half() -> None:
        with files.replacing(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert target.read_text() == "old"
    assert [p.name for p in target.parent.iterdir()] == ["weights"]


def test_a_full_disk_changes_nothing_and_the_advice_loses_nothing(tmp_path: Path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        files.write_text(disk / "weights", "old")
        with pytest.raises(InputError, match=r"no space left .*weights.*not changed") as caught:
            files.write_bytes(disk / "weights", b"x" * 200_000)
        assert "gc --all-commits --all-experiments" in str(caught.value)
        with pytest.raises(InputError, match=r"no space left .*big"):
            files.write_files({disk / "weights": b"new", disk / "big": b"x" * 200_000})
        assert (disk / "weights").read_text() == "old"
        assert [p.name for p in disk.iterdir()] == ["weights"]
        monkeypatch.setattr(files, "SCRATCH", disk)
        with pytest.raises(InputError, match=r"no space left for 2 MiB in .*disk\. Free space"):
            files.scratch_array((1024, 2048), "uint8")
        assert [p.name for p in disk.iterdir()] == ["weights"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_json_refuses_nan_and_reads_back(tmp_path: Path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "m.json", {"loss": float("nan")})
    files.write_json(tmp_path / "m.json", {"loss": 0.5})
    assert files.read_json(tmp_path / "m.json") == {"loss": 0.5}
    with pytest.raises(InputError, match="missing"):
        files.read_json(tmp_path / "none.json")
    (tmp_path / "m.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        files.read_json(tmp_path / "m.json")
