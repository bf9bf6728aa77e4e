"""`make compare`: settings averaged over seeds, ranked by accuracy and cost, on one page."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml
from toys import ROOT, replace

from edgeke import compare, params
from edgeke.tracking.runs import stage_run

pytestmark = pytest.mark.filterwarnings("ignore:::mlflow")


@pytest.fixture(scope="module")
def repository(empty_store, tmp_path_factory):
    """A repository whose store holds three settings, one of three seeds; and what is left out."""
    root = tmp_path_factory.mktemp("repository")
    (root / "mlflow").mkdir()
    shutil.copy(empty_store, root / "mlflow")
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    (root / "params.yaml").write_text(yaml.safe_dump(content))
    with pytest.MonkeyPatch.context() as patched:
        for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT", "DVC_EXP_NAME"):
            patched.delenv(name, raising=False)
        patched.chdir(root)
        loaded = params.load()

        def log(accuracy: float, cost: float, name: str, met: float = 1.0, **changes) -> None:
            changes["kd"] = replace(loaded.kd, **changes.pop("kd", {}))
            patched.setenv("DVC_EXP_NAME", name)
            with stage_run("evaluate", replace(loaded, **changes)) as run:
                run.headline(
                    {
                        "validation/int8/default/accuracy": accuracy,
                        "validation/int8/default/cost_share": cost,
                        "validation/default/accuracy": 0.1,  # of fp32, which is not shipped
                        "validation/default/cost_share": 0.1,
                        "calibration/max_cost_0.9/met": 0.0,
                        "calibration/int8/max_cost_0.9/met": met,
                        "test/int8/default/accuracy": 1.0 - accuracy,
                        "test/int8/default/latency_ms_mean": 0.25,
                    }
                )

        log(0.50, 0.9, "before")  # the same setting and seed again: the newest counts
        for seed, accuracy in enumerate((0.90, 0.94, 0.98)):
            log(accuracy, 0.8, f"seed-{seed}", met=float(seed > 0), seed=seed)
        log(0.95, 0.9, "dear", kd={"distance": "js"})
        log(0.93, 0.85, "worse", kd={"temperature": 2.0})
        with stage_run("download", replace(loaded, seed=9)):  # never evaluated
            pass
        with pytest.raises(KeyboardInterrupt), stage_run("evaluate", replace(loaded, seed=8)):
            raise KeyboardInterrupt
    return root


@pytest.fixture
def here(repository: Path, monkeypatch) -> Path:
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT", "DVC_EXP_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(repository)
    return repository


def test_settings_are_ranked_by_accuracy_and_cost_over_seeds(here):
    table = compare.rank(compare.read_runs("edgeke", "digits"))
    assert table["runs"].tolist() == ["dear", "seed-0, seed-1, seed-2", "worse"]
    assert table["beaten by"].tolist() == [0, 0, 1]  # a dearer and a cheaper one, and neither
    seeds = table.loc[2]
    assert (seeds["kd.distance"], seeds["seeds"], seeds["certified"]) == ("kl", 3, 2)
    assert seeds["accuracy"] == pytest.approx(0.94)
    assert seeds["accuracy std"] == pytest.approx(0.04)
    assert seeds["test latency"] == 0.25
    assert np.isnan(table.loc[1, "accuracy std"])
    assert table["kd.temperature"].tolist() == ["4.0", "4.0", "2.0"]
    assert not {"seed", "tracking.experiment", "kd.source"} & set(table.columns)


def test_the_command_prints_the_table_and_writes_a_page_that_needs_no_network(
    here, tmp_path, capsys
):
    assert compare.main([]) == 0
    printed = capsys.readouterr().out
    assert "0.9400 ± 0.0400" in printed
    assert printed.endswith(".edgeke/compare.html\n")
    page = here / ".edgeke" / "compare.html"
    assert "0.9400 ± 0.0400" in page.read_text()
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium (Debian: chromium)")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    flags += [f"--user-data-dir={tmp_path}", "--virtual-time-budget=25000"]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom", page.as_uri()]
    drawn = subprocess.run([chromium, *flags], capture_output=True, text=True, timeout=120)
    assert "accuracy on validation</text>" in drawn.stdout


def test_what_users_name_is_text_on_the_page(here):
    table = compare.rank(compare.read_runs("edgeke", "digits"))
    table["runs"] = "</script><script>alert(1)</script>"
    page = compare.make_page(table, "<b>")
    assert "alert(1)" in page
    assert "<script>alert(1)" not in page
    assert "<h1>&lt;b&gt;</h1>" in page


def test_nothing_to_compare_says_what_to_run(here, tmp_path, monkeypatch, capsys):
    assert compare.main(["--profile", "tiny"]) == 1
    assert "--profile NAME shows another (there: digits)" in capsys.readouterr().err
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "empty"))
    assert compare.main([]) == 1
    assert "nothing was run yet; `make run`" in capsys.readouterr().err
    assert not (tmp_path / "empty").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "gopher://nowhere")
    assert compare.main([]) == 1
    assert capsys.readouterr().err.startswith("error: the tracking store gopher://nowhere")
