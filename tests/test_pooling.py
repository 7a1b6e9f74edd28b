import numpy as np

from mechsub.pooling import distinct_members, list_traits, pool_traits, say_statuses
from mechsub.run import Run


def test_copies_of_one_model_count_once(tiny_run, monkeypatch):
    teacher, copies = tiny_run.teacher("digits"), np.array([0.5, 0.5, 0.5])
    np.testing.assert_array_equal(distinct_members(tiny_run, copies, teacher), copies)  # members that happen to agree
    monkeypatch.setattr(Run, "has_one_model", lambda run, lineage: lineage.name != "reference")
    np.testing.assert_array_equal(distinct_members(tiny_run, copies, teacher), [0.5])
    np.testing.assert_array_equal(distinct_members(tiny_run, copies, teacher, tiny_run.reference), copies)
    drawn = np.array([0.5, 0.5, 0.6])  # of one model with draws of each member's own
    np.testing.assert_array_equal(distinct_members(tiny_run, drawn, teacher), drawn)


def test_members_with_starts_of_their_own_are_not_one_model(tiny_run):
    assert not any(map(tiny_run.has_one_model, tiny_run.lineages.values()))


def test_one_trait_stands_for_itself(tiny_run):
    case = pool_traits(tiny_run, "same-init")
    assert case == ("same-init", "digits") and list_traits(tiny_run, case) == ["digits"]


def test_reasons_are_said_once_and_what_is_there_has_none():
    assert say_statuses([0, 2, 2, 1], ("ok", "no_control", "not_finite")) == "no control, not finite"
    assert say_statuses([0, 0], ("ok", "no_control")) == ""
