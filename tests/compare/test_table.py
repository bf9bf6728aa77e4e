import math

from edgeke.compare.columns import columns, labels, notes, variants
from edgeke.compare.rows import rank
from edgeke.compare.table import render

ASKED = "max_degradation_0.03_delta_0.1"


def cells(ranking, heading, name, detailed=False):
    found = [c for c in columns(ranking, detailed) if (c.heading, c.name) == (heading, name)]
    assert len(found) == 1
    return found[0].cells


def test_cells_are_percent_with_deviation_over_seeds(make_run):
    (ranking,) = rank([make_run(0.90, 0), make_run(0.94, 1), make_run(0.98, 2)])
    assert cells(ranking, "", "rank") == ("1",)
    assert cells(ranking, "", "seeds") == ("3",)
    assert cells(ranking, "validation accuracy", "exit_1") == ("94.0 ± 4.0",)
    assert cells(ranking, "mean validation cost (seeds met)", ASKED) == ("80.0 ± 0.0 (3/3)",)
    assert cells(ranking, "test accuracy", "default") == ("89.0 ± 4.0",)
    assert cells(ranking, "test latency", "fp32") == ("0.125 ± 0.000",)
    assert cells(ranking, "test latency", "int8") == ("2.50 ± 0.00",)


def test_a_single_seed_and_a_missing_metric_are_dashes(make_run):
    refused = make_run(0.9)
    del refused.metrics[f"validation/{ASKED}/cost_share"]
    refused.metrics[f"calibration/{ASKED}/met"] = 0.0
    refused.metrics["test/default/latency_ms_mean"] = math.nan
    (ranking,) = rank([refused])
    assert cells(ranking, "validation accuracy", "exit_1") == ("90.0",)
    assert cells(ranking, "mean validation cost (seeds met)", ASKED) == ("- (0/1)",)
    assert cells(ranking, "test latency", "fp32") == ("-",)
    assert cells(ranking, "test accuracy", "teacher", detailed=True) == ("-",)


def test_a_mean_over_fewer_seeds_says_so(make_run):
    broken = make_run(0.9, 1)
    broken.metrics["test/default/accuracy"] = math.nan
    (ranking,) = rank([make_run(0.9, 0), broken])
    assert cells(ranking, "test accuracy", "default") == ("85.0 (1 seeds)",)


def test_a_requirement_that_a_row_did_not_ask_is_a_dash(make_run):
    (ranking,) = rank([make_run(0.9), make_run(0.8, calibrate__requirements="max_cost_0.9")])
    assert cells(ranking, "mean validation cost (seeds met)", ASKED)[1] == "-"
    assert cells(ranking, "mean validation cost (seeds met)", "max_cost_0.9") == ("-", "-")


def test_few_differing_parameters_have_columns(make_run):
    (ranking,) = rank([make_run(0.9), make_run(0.8, student__width="32")])
    assert cells(ranking, "", "student.width") == ("-", "32")
    assert variants(ranking) == []
    assert labels(ranking) == [
        "1: kl, asynchronous, beta 0.5, student.width -",
        "2: kl, asynchronous, beta 0.5, student.width 32",
    ]


def test_many_differing_parameters_share_a_column_that_is_explained(make_run):
    many = {f"recipes__distill__{name}": "2" for name in "abcd"}
    (ranking,) = rank([make_run(0.9), make_run(0.8, **many), make_run(0.7, kd__beta="0.1", **many)])
    assert cells(ranking, "", "other") == ("v1", "v2", "v2")
    names, first, second = variants(ranking)
    assert names.cells == tuple(f"recipes.distill.{name}" for name in "abcd")
    assert (first.name, set(first.cells)) == ("v1", {"-"})
    assert (second.name, set(second.cells)) == ("v2", {"2"})
    assert "What `other` stands for:" in render(ranking, 120)


def test_networks_with_fewer_exits_have_dashes(make_run):
    deeper = make_run(0.8, branchynet__layout="stages")
    deeper.metrics["validation/exit_2/accuracy"] = 0.95
    (ranking,) = rank([make_run(0.9), deeper])
    assert cells(ranking, "validation accuracy", "exit_2") == ("95.0", "-")


def test_notes_say_what_does_not_compare(make_run):
    (ranking,) = rank([make_run(0.9), make_run(0.9, 1)])
    assert notes(ranking) == ["One of the 180 validation images is 0.56 points."]
    runs = [
        make_run(0.9, 0, machine="fast", commit="a"),
        make_run(0.9, 1, machine="slow", commit="b"),
        make_run(0.8, 0, kd__beta="0.1", evaluate__device="ssh://board"),
        make_run(0.8, 1, status="KILLED"),
        make_run(0.8, 2, metrics={}),
    ]
    (ranking,) = rank(runs)
    assert notes(ranking)[1:] == [
        "Runs left out: 1 killed, 1 without validation metrics.",
        "Latencies were measured in 3 places and do not compare between them: fast, one_thread; "
        "slow, one_thread; ssh://board, one_thread.",
        "The runs come from 3 commits, also within rank 1: code may differ, too.",
    ]


def test_the_table_says_how_it_ranks_and_fits_the_terminal(make_run):
    (ranking,) = rank(
        [make_run(0.9, seed, kd__beta=beta) for seed in (0, 1) for beta in ("0", "1")]
    )
    wide, narrow = render(ranking, 200), render(ranking, 80)
    for text in (wide, narrow):
        assert "digits: 2 settings, 4 runs" in text
        assert "Ranked by validation accuracy of the main exit" in " ".join(text.split())
    assert wide.count("distance") == 1
    assert narrow.count("distance") > 1, "a narrow terminal gets parts that repeat whose row it is"
    assert max(map(len, narrow.splitlines())) <= 80
    header = next(line for line in wide.splitlines() if line.startswith("rank"))
    row = next(line for line in wide.splitlines() if line.startswith("1 "))
    assert header.index("exit_1") == row.rindex("90.0 ± 0.0", 0, header.index("exit_1") + 12)
