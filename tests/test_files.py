import subprocess
from pathlib import Path

import pytest

from edgeke import files
from edgeke.errors import InputError
from edgeke.learning import parallel


@pytest.mark.parametrize("rank", ["1", "node-7"])
def test_another_launchers_rank_silences_nothing(tmp_path, monkeypatch, rank):
    """Slurm's and MPI's wrappers export RANK, too; only torchrun's means that others write."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "4")
    files.write_text(tmp_path / "a", "written")
    assert (tmp_path / "a").read_text() == "written"
    assert parallel.world_size() == 1
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", "1")
    files.write_text(tmp_path / "b", "the first process writes it")
    assert not (tmp_path / "b").exists()


def test_the_repository_is_the_project_around_the_working_folder(tmp_path, monkeypatch):
    outer, inner = tmp_path / "outer", tmp_path / "outer" / "edgeke"
    copy = inner / ".dvc" / "tmp" / "exps" / "tmpx" / "edgeke"
    for folder in (outer, inner, copy):
        (folder / ".dvc").mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("DVC_ROOT", str(outer))  # which runs the inner one in a stage of its own
    for folder in (inner, copy):
        monkeypatch.chdir(folder)
        assert files.repository() == inner
    monkeypatch.chdir(tmp_path)
    assert files.repository() == outer


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
