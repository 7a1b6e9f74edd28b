"""Error rates and power of verdicts on alignment, over simulated runs that go the way an analysis takes."""

import importlib.util
from pathlib import Path

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
