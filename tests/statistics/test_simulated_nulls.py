"""Error rates and power of verdicts, over simulated experiments that go the way an analysis takes."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "simulate_nulls.py"
RUNS = 1000


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("simulate_nulls", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("members", [5, 10])
def test_noise_is_above_its_null_at_most_at_the_level_of_the_test(script, members):
    for verdicts in script.simulate(members, planted=0.0, runs=RUNS).values():
        assert verdicts["above-null"] <= script.most_by_chance(RUNS)
        assert sum(verdicts.values()) == RUNS


def test_the_power_to_call_noise_equivalent_grows_with_members_and_a_planted_part_is_found(script):
    for few, many in zip(*(script.simulate(members, 0.0, RUNS // 4).values() for members in (5, 10)), strict=True):
        assert few["equivalent-to-null"] < many["equivalent-to-null"]
    planted = script.simulate(10, planted=0.3, runs=RUNS // 4)
    assert all(verdicts["above-null"] > 0.9 * RUNS / 4 for verdicts in planted.values())


def test_verdicts_come_out_as_often_as_the_power_calculation_says_and_wrong_ones_at_most_at_their_level(script):
    runs = 200
    for row in script.tabulate_single(runs, members=(3, 10), spreads=(1.0,)):
        for verdict in ("transferred", "no-transfer", "reversed"):
            assert script.standard_errors_apart(row[verdict], row[f"{verdict} computed"], runs) < 4, (row, verdict)
        if row["effect"] == 0:
            assert runs * row["transferred"] <= script.most_by_chance(runs)
        if abs(row["effect"]) == 1:
            assert runs * row["no-transfer"] <= script.most_by_chance(runs, 0.05)


def test_any_wrong_verdict_among_thirty_correlated_ones_is_as_rare_as_one_alone(script):
    runs = 20
    nothing, edge, half = script.tabulate_families(runs, members=(10,))
    for row in (nothing, half):
        assert runs * row["any wrong transferred"] <= script.most_by_chance(runs)
    assert runs * edge["any wrong no-transfer"] <= script.most_by_chance(runs, 0.05)
    assert half["right transferred"] > 0.99


def test_only_the_permutation_of_traits_keeps_its_level_where_members_share_what_pairs_of_traits_have(script):
    runs = 80
    rows = {(row["shared by members"], row["excess"]): row for row in script.tabulate_diagonal(runs, members=(5,), traits=(5,))}
    tests = ("verdict over members", "labels within members", "labels of traits")
    bound = script.most_by_chance(runs)
    assert all(runs * rows[0.0, 0.0][test] <= bound for test in tests)
    assert [runs * rows[1.0, 0.0][test] <= bound for test in tests] == [False, False, True]
    assert all(rows[0.0, 2.0][test] > 0.9 for test in tests)


def test_verdicts_are_taken_back_as_often_as_teachers_fail_to_show_their_trait(script):
    runs = 100
    for row in script.tabulate_teachers(runs, members=(5,)):
        for rate in ("teacher-without-trait", "transferred"):
            assert script.standard_errors_apart(row[rate], row[f"{rate} computed"], runs) < 4, (row, rate)


def test_what_one_member_in_five_does_is_beyond_five_members_and_the_table_shows_it(script):
    runs = 60
    rows = {row["members' effects"]: row for row in script.tabulate_distributions(runs, members=(5,))}
    normal, rare = rows["normal"], rows["one member in five moves"]
    assert runs * normal["transferred at 0"] <= script.most_by_chance(runs)
    assert runs * normal["no-transfer at +margin"] <= script.most_by_chance(runs, 0.05)
    assert normal["covered"] > 0.87
    assert rare["no-transfer at +margin"] == pytest.approx(0.8**5, abs=0.15) and rare["covered"] < 0.8


@pytest.mark.parametrize("name", ["normal", "accuracies near chance", "skewed up (exponential)", "one member in five moves"])
def test_the_simulated_members_have_mean_0_and_standard_deviation_1(script, name):
    values = script.DISTRIBUTIONS[name](np.random.default_rng(0), (100_000,))
    assert abs(values.mean()) < 0.02 and values.std() == pytest.approx(1.0, abs=0.03)
