import pytest

from mechsub.executors.local import group_stages
from mechsub.stage import Resources, Stage


def stages(*memory, stack="s", function="m:f"):
    return [
        Stage(f"{stack}{index}", function, {"index": index}, {}, (), Resources(memory_bytes=size, stack=stack))
        for index, size in enumerate(memory)
    ]


def sizes(groups):
    return [[stage.resources.memory_bytes for stage in group] for group in groups]


def test_stackable_stages_share_a_call_as_far_as_memory_goes():
    assert sizes(group_stages(stages(4, 4, 4, 4), 1, 9)) == [[4, 4], [4, 4]]
    assert sizes(group_stages(stages(4, 4, 4, 4), 1, 100)) == [[4, 4, 4, 4]]


def test_a_stage_that_is_too_large_for_company_runs_alone():
    assert sizes(group_stages(stages(20, 4, 4), 1, 9)) == [[20], [4, 4]]


def test_stacks_are_dealt_over_the_processes():
    assert sizes(group_stages(stages(1, 1, 1, 1, 1), 2, 100)) == [[1, 1, 1], [1, 1]]


@pytest.mark.parametrize("other", [stages(1, stack="t"), stages(1, function="m:g"), stages(1, 1, stack=None)])
def test_only_stages_of_one_function_and_stack_share_a_call(other):
    groups = group_stages([*stages(1, 1), *other], 1, 100)
    assert len(groups[0]) == 2
    assert sum(map(len, groups)) == 2 + len(other)
    assert all(len(group) == 1 for group in groups[1:])
