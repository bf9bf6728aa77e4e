import math

import pytest

from edgeke.compare.rows import rank

MAIN = "validation/exit_1/accuracy"


def only(rankings):
    assert len(rankings) == 1
    return rankings[0]


def test_seeds_of_equal_settings_are_averaged(make_run):
    ranking = only(rank([make_run(0.90, 0), make_run(0.94, 1), make_run(0.98, 2)]))
    (row,) = ranking.rows
    spread = row.spread(MAIN)
    assert spread.mean == pytest.approx(0.94)
    # deviations -0.04, 0, 0.04: sqrt(0.0032 / (3 - 1))
    assert spread.std == pytest.approx(0.04)
    assert spread.seeds == 3
    assert [run.seed for run in row.runs] == ["0", "1", "2"]


def test_one_seed_has_no_deviation(make_run):
    (row,) = only(rank([make_run(0.9)])).rows
    assert row.spread(MAIN).std is None
    assert row.spread("test/unknown/accuracy") is None


def test_seeds_are_in_the_order_of_numbers(make_run):
    (row,) = only(rank([make_run(seed=10), make_run(seed=9)])).rows
    assert [run.seed for run in row.runs] == ["9", "10"]


def test_rows_are_ranked_by_the_main_exits_mean_on_validation(make_run):
    runs = [
        make_run(0.90, 0, kd__beta="0.1"),
        make_run(0.98, 1, kd__beta="0.1"),  # the best run, in the row with the lower mean
        make_run(0.95, 0, kd__beta="0.3"),
        make_run(0.96, 0, kd__beta="0.9"),
    ]
    rows = only(rank(runs)).rows
    assert [row.settings["kd.beta"] for row in rows] == ["0.9", "0.3", "0.1"]


def test_equal_accuracy_is_decided_by_cost_and_never_by_test(make_run):
    cheap, dear, unknown = make_run(kd__beta="0.1"), make_run(kd__beta="0.3"), make_run()
    cheap.metrics["validation/default/cost_share"] = 0.7
    del unknown.metrics["validation/default/cost_share"]
    dear.metrics["test/default/accuracy"] = unknown.metrics["test/default/accuracy"] = 1.0
    rows = only(rank([unknown, dear, cheap])).rows
    assert [row.settings["kd.beta"] for row in rows] == ["0.1", "0.3", "0.5"]


def test_means_that_differ_by_rounding_are_equal(make_run):
    cheaper, dearer = make_run(0.8, kd__beta="0.1"), make_run(0.8 + 1e-13, kd__beta="0.3")
    cheaper.metrics["validation/default/cost_share"] = 0.5
    rows = only(rank([dearer, cheaper])).rows
    assert [row.settings["kd.beta"] for row in rows] == ["0.1", "0.3"]


def test_any_other_parameter_makes_a_row_of_its_own(make_run):
    runs = [make_run(0.9, 0), make_run(0.9, 1, recipes__distill__epochs="20")]
    ranking = only(rank(runs))
    assert len(ranking.rows) == 2
    assert ranking.differing == ("recipes.distill.epochs",)


def test_where_runs_are_logged_and_measured_makes_no_row(make_run):
    runs = [
        make_run(0.9, 0, tracking__experiment="a", evaluate__device="local"),
        make_run(0.9, 1, tracking__experiment="b", evaluate__device="ssh://board"),
    ]
    ranking = only(rank(runs))
    assert len(ranking.rows) == 1
    assert ranking.differing == ()


def test_the_newest_run_of_a_seed_counts(make_run):
    old, new = make_run(0.99, 0), make_run(0.90, 0)
    ranking = only(rank([old, new, make_run(0.92, 1)]))
    (row,) = ranking.rows
    assert row.spread(MAIN).mean == pytest.approx(0.91)
    assert ranking.left_out == {"older, of a seed that ran again": 1}


def test_an_unfinished_newer_run_does_not_hide_a_finished_one(make_run):
    old, new = make_run(0.9, 0), make_run(0.9, 0, metrics={})
    ranking = only(rank([old, new]))
    assert [row.runs for row in ranking.rows] == [(old,)]
    assert ranking.left_out == {"without validation metrics": 1}


@pytest.mark.parametrize("status", ["KILLED", "FAILED", "RUNNING"])
def test_runs_that_did_not_end_well_are_left_out_and_counted(make_run, status):
    ranking = only(rank([make_run(0.99, 0, status=status), make_run(0.9, 1)]))
    assert [run.seed for row in ranking.rows for run in row.runs] == ["1"]
    assert ranking.left_out == {status.lower(): 1}


def test_no_finished_run_is_no_row(make_run):
    assert only(rank([make_run(metrics={MAIN: math.nan})])).rows == ()
    assert rank([]) == []


def test_nan_is_missing(make_run):
    broken = make_run(0.9, 1)
    broken.metrics["test/default/accuracy"] = math.nan
    (row,) = only(rank([make_run(0.9, 0), broken])).rows
    assert row.spread("test/default/accuracy").seeds == 1
    assert row.spread(MAIN).seeds == 2


def test_a_seed_without_the_main_exit_does_not_lower_it(make_run):
    broken = make_run(0.5, 0)
    broken.metrics[MAIN] = math.nan
    (row,) = only(rank([broken, make_run(0.9, 1)])).rows
    assert row.exits == (0, 1)
    assert row.spread(MAIN).mean == pytest.approx(0.9)


def test_met_counts_seeds(make_run):
    refused = make_run(0.9, 1)
    refused.metrics["calibration/max_degradation_0.03_delta_0.1/met"] = 0.0
    (row,) = only(rank([make_run(0.9, 0), refused])).rows
    assert row.requirements == ("max_degradation_0.03_delta_0.1",)
    assert row.met("max_degradation_0.03_delta_0.1") == (1, 2)
    assert row.met("max_cost_0.9") is None


def test_profiles_are_ranked_apart(make_run):
    rankings = rank([make_run(0.9), make_run(0.5, profile="cifar100")])
    assert [one.profile for one in rankings] == ["cifar100", "digits"]
    assert [len(one.rows) for one in rankings] == [1, 1]
