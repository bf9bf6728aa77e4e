import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from toys import ROOT

from edgeke.errors import InputError
from stages._entry import entry


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    content["tracking"]["enabled"] = False
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def raising(error: BaseException):
    def body(params, run):
        raise error

    return body


def test_metrics_are_written_below_results(folder: Path):
    assert entry("download", lambda params, run: {"train/images": float(params.seed)}) == 0
    assert (folder / "results/download/metrics.json").read_text() == '{\n  "train/images": 0.0\n}\n'


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (InputError("that is wrong; do this"), 1, "error: that is wrong; do this\n"),
        (PermissionError(errno.EACCES, "Permission denied", "models"), 1, "'models'; change that"),
        (KeyboardInterrupt(), 130, "stopped\n"),
    ],
)
def test_what_a_user_can_change_is_one_line(folder, capsys, error, status, words):
    assert entry("download", raising(error)) == status
    output = capsys.readouterr().err
    assert output.endswith(words) or words in output
    assert output.count("\n") == 1


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda: replace_in("params.yaml", "delta: 0.1", "delta: 0.25"),
            "calibrate.delta (0.1 -> ",
        ),
        (lambda: Path("edgeke/policy/votes.py").write_text("# other"), "edgeke/policy/votes.py"),
        (lambda: replace_in("params.yaml", "parity_images: 500", "parity_images: 400"), None),
    ],
    ids=["a parameter", "code", "another stage's parameter"],
)
def test_what_changes_while_a_stage_runs_is_not_recorded_as_its_input(folder, capsys, edit, words):
    """DVC reads inputs at the end, and would write the new ones into dvc.lock."""
    shutil.copy(ROOT / "dvc.yaml", folder)
    (folder / "edgeke" / "policy").mkdir(parents=True)
    (folder / "edgeke" / "policy" / "votes.py").write_text("# code")
    cleaned = []

    def body(params, run):
        run.cleanups.append(lambda: cleaned.append("the checkpoint"))
        edit()
        return {}

    status = entry("calibrate", body)
    said = capsys.readouterr().err
    if words is None:
        assert (status, said, cleaned) == (0, "", ["the checkpoint"])
    else:
        assert status == 1
        assert words in said
        assert "changed while calibrate ran" in said
        assert cleaned == []  # the same command with the old value goes on from it
        assert not (folder / "results/calibrate").exists()


def replace_in(name: str, old: str, new: str) -> None:
    text = Path(name).read_text()
    assert old in text
    Path(name).write_text(text.replace(old, new))


def test_pythons_path_to_another_project_is_refused(folder):
    (folder / "stages").mkdir()
    shutil.copy(ROOT / "stages" / "_entry.py", folder / "stages")
    done = subprocess.run(
        [sys.executable, "-m", "stages.download"],
        env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"error: the code that runs is that of {ROOT}, not of this folder"
    )


def test_a_bug_keeps_its_traceback(folder):
    with pytest.raises(FileNotFoundError):
        entry("download", raising(FileNotFoundError(errno.ENOENT, "No such file", "a.json")))


@pytest.mark.parametrize(("given", "used"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(given, used):
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": given} if given else {}
    code = "import stages.train_teacher, os; print(os.environ['OMP_WAIT_POLICY'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout == f"{used}\n", done.stderr
