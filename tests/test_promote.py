"""Promotion: only what is certified and equals the network; test numbers decide nothing."""

import shutil
from pathlib import Path

import pytest
from toys import ROOT

from edgeke import promote

pytestmark = pytest.mark.filterwarnings("ignore:::mlflow")


@pytest.fixture(scope="module")
def client(empty_store, tmp_path_factory):
    """A store with two runs that registered a version, one that did not, two of one name."""
    root = tmp_path_factory.mktemp("repository")
    (root / "mlflow").mkdir()
    (root / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    shutil.copy(empty_store, root / "mlflow")
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{root / 'mlflow' / 'mlflow.db'}")
    client.root = root
    experiment = client.create_experiment("edgeke")
    client.create_registered_model("edgeke-digits")
    for name in ("good", "bad", "unfinished", "double", "double"):
        tags = {"edgeke.state": name, "DVC_EXP_NAME": f"exp-{name}"}
        run = client.create_run(experiment, tags=tags, run_name=f"digits-{name}").info.run_id
        if name not in ("good", "bad"):
            continue
        version = client.create_model_version("edgeke-digits", f"file:///{name}", run).version
        objections = "" if name == "good" else "max_cost_0.9 is not certified"
        shown = f"accuracy {0.9 if name == 'good' else 1.0}"
        for key, value in {"objections": objections, "test": shown}.items():
            client.set_model_version_tag("edgeke-digits", version, f"edgeke.{key}", value)
        client.set_tag(run, "edgeke.model", f"edgeke-digits/{version}")
    return client


@pytest.fixture(autouse=True)
def _here(client, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(Path(client.root))


def test_a_certified_model_gets_the_alias_and_test_stands_beside(client, capsys):
    assert promote.main(["exp-good", "--alias", "challenger"]) == 0
    out = capsys.readouterr().out
    aliases = client.get_registered_model("edgeke-digits").aliases
    assert {alias: str(version) for alias, version in aliases.items()} == {"challenger": "1"}
    assert "test        accuracy 0.9" in out
    assert '"models:/edgeke-digits@challenger"' in out
    assert promote.main(["digits-good", "--alias", "challenger"]) == 0
    assert "before: version 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("digits-bad", "not promoted: max_cost_0.9 is not certified"),  # better on test
        ("nobody", "0 runs are called 'nobody'; `make compare` lists them"),
        ("digits-unfinished", "has no registered model"),
        ("exp-double", "2 runs are called 'exp-double': give the id of one: "),
    ],
)
def test_what_cannot_be_promoted_says_why(client, name, words, capsys):
    assert promote.main([name]) == 1
    assert words in capsys.readouterr().err
    assert "champion" not in client.get_registered_model("edgeke-digits").aliases
