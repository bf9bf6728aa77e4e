import errno
import os
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
