import json
import subprocess
import sys
from pathlib import Path

import pytest
from toys import ROOT

from edgeke.compare import store as stores
from edgeke.compare.cli import main
from edgeke.compare.rows import rank

pytestmark = pytest.mark.filterwarnings("ignore:::mlflow")


def experiment(client, request):
    return client.get_experiment_by_name(request.node.name).experiment_id


def comparisons(client, request):
    found = client.search_runs([experiment(client, request)])
    return [run for run in found if run.info.run_name == "comparison"]


def test_table_page_and_artifact(here, log_run, client, request, capsys):
    for seed, accuracy in enumerate((0.90, 0.94, 0.98)):
        log_run(accuracy, seed)
    log_run(0.95, distance="js")
    assert main([]) == 0
    printed = capsys.readouterr()
    lines = [" ".join(line.split()[:11]) for line in printed.out.splitlines()]
    assert any(line.startswith("1 js asynchronous 0.5 1 85.0 95.0 ") for line in lines)
    assert "2 kl asynchronous 0.5 3 84.0 ± 4.0 94.0 ± 4.0" in lines
    assert printed.err.startswith("\n.edgeke/compare.html\nkept in MLflow")
    page = (here / ".edgeke" / "compare.html").read_text()
    assert "<td>94.0 ± 4.0</td>" in page

    assert main(["--no-log"]) == 0
    log_run(0.99, seed=3)
    assert main(["--out", "other.html"]) == 0
    (run,) = comparisons(client, request)
    assert run.data.tags["edgeke.comparison"] == "true"
    assert "edgeke.state" not in run.data.tags
    assert run.info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["compare.html"]
    kept = client.download_artifacts(run.info.run_id, "compare.html", str(here))
    assert Path(kept).read_text() == (here / "other.html").read_text() != page


def test_json_is_all_that_is_printed(here, log_run, capsys):
    for seed, accuracy in enumerate((0.90, 0.94)):
        log_run(accuracy, seed)
    capsys.readouterr()
    assert main(["--json", "--no-log"]) == 0
    found = json.loads(capsys.readouterr().out)
    (profile,) = found["profiles"]
    (row,) = profile["rows"]
    assert (profile["profile"], row["rank"], row["seeds"]) == ("digits", 1, ["0", "1"])
    assert row["params"]["kd.distance"] == "kl"
    main_exit = row["metrics"]["validation/exit_1/accuracy"]
    assert main_exit["mean"] == pytest.approx(0.92)
    assert main_exit["std"] == pytest.approx(0.04 / 2**0.5)


def test_runs_are_read_page_by_page_and_deleted_ones_are_not(
    here, log_run, client, request, monkeypatch
):
    monkeypatch.setattr(stores, "_PAGE", 2)
    for seed in range(5):
        log_run(0.9, seed)
    number = experiment(client, request)
    found = stores.read_runs(client, here, number)
    assert len(found) == len({run.id for run in found}) == 5, "parents, without their children"
    client.delete_run(next(run.id for run in found if run.seed == "4"))
    (ranking,) = rank(stores.read_runs(client, here, number))
    assert [run.seed for row in ranking.rows for run in row.runs] == ["0", "1", "2", "3"]


def test_a_store_that_refuses_the_page_costs_no_table(here, log_run, monkeypatch, capsys):
    log_run(0.9)
    capsys.readouterr()

    def refuse(*_: object) -> None:
        raise OSError("no space left\nat all")

    monkeypatch.setattr("edgeke.compare.cli.log_page", refuse)
    assert main([]) == 0
    printed = capsys.readouterr()
    assert "90.0" in printed.out
    assert "warning: MLflow did not take the page (no space left); the file is there" in printed.err
    assert (here / ".edgeke" / "compare.html").is_file()


def test_a_page_that_cannot_be_written_is_one_line(here, log_run, capsys):
    log_run(0.9)
    (here / "file").write_text("")
    assert main(["--out", "file/page.html"]) == 1
    assert "error: file/page.html cannot be written" in capsys.readouterr().err


def test_no_run_says_what_to_run(here, log_run, client, request, capsys):
    assert main([]) == 1
    assert "there is no experiment" in capsys.readouterr().err
    log_run(0.9)
    assert main(["--profile", "cifar100"]) == 1
    error = capsys.readouterr().err
    assert "no finished run of profile 'cifar100'" in error
    assert "`dvc exp run` makes one, --profile shows others: digits, all" in error
    assert main(["--profile", "all", "--no-log"]) == 0
    client.delete_experiment(experiment(client, request))
    capsys.readouterr()
    assert main([]) == 1
    assert "was deleted in MLflow" in capsys.readouterr().err


def test_no_store_is_not_made(tmp_path, here, monkeypatch, capsys):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "empty"))
    assert main([]) == 1
    assert "nothing was run yet; `make run`" in capsys.readouterr().err
    assert not (tmp_path / "empty").exists()


def test_an_unusable_store_is_one_line(here, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "gopher://nowhere")
    assert main([]) == 1
    assert capsys.readouterr().err.startswith("error: the tracking store gopher://nowhere")


def test_it_runs_as_a_module(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "edgeke.compare"],
        cwd=tmp_path,
        env={"PATH": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: params.yaml is missing")
