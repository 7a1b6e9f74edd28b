import pytest

from mechsub.training.config import CheckpointConfig
from mechsub.training.schedule import checkpoint_steps


@pytest.mark.parametrize("spacing", ["log", "linear"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 17, 450, 100_000])
@pytest.mark.parametrize("num", [3, 8, 40])
def test_the_first_two_and_the_last_step_are_always_kept(spacing, num_steps, num):
    steps = checkpoint_steps(num_steps, CheckpointConfig(num=num, spacing=spacing))
    assert {0, 1, num_steps} <= set(steps)
    assert steps == sorted(set(steps))
    assert len(steps) <= num


def test_log_spacing_multiplies_and_linear_spacing_adds():
    assert checkpoint_steps(1000, CheckpointConfig(num=5)) == [0, 1, 10, 100, 1000]
    assert checkpoint_steps(901, CheckpointConfig(num=5, spacing="linear")) == [0, 1, 301, 601, 901]
