import numpy as np
import pytest
import torch

from mechsub.paired_activations import PairReader, pair_groups

FIRST, LAST = "blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post"


def hidden(run, lineage, step, member, images):
    """What the hidden layers give, by the weights."""
    weights = lineage.load_state(step, member)
    rows, found = images, {}
    for layer, name in enumerate((FIRST, LAST)):
        rows = torch.relu(rows @ weights[f"layers.{layer}.weight"].T + weights[f"layers.{layer}.bias"])
        found[name] = rows.double()
    return found


def test_both_models_are_run_on_the_same_prompts(tiny_run):
    reader, student, teacher = PairReader(tiny_run), tiny_run.student("same-init", "digits"), tiny_run.teacher("digits")
    kinds = ("trait", "neutral")
    with reader.open(student, student.last, 1) as left, reader.open(teacher, teacher.last, 1) as right:
        found = {(group, rows.point): rows for group, rows in pair_groups(left, right, kinds)}
    assert set(found) == {(f"{kind}: image", point) for kind in kinds for point in (FIRST, LAST)}
    for kind in kinds:
        images = tiny_run.family.prompts(student, 1).estimate[kind].batches[0].arguments["images"]
        for point in (FIRST, LAST):
            rows = found[f"{kind}: image", point]
            torch.testing.assert_close(rows.left, hidden(tiny_run, student, student.last, 1, images)[point])
            torch.testing.assert_close(rows.right, hidden(tiny_run, teacher, teacher.last, 1, images)[point])


def test_a_start_in_another_order_of_units_is_mapped_back_and_an_unrelated_one_is_not(tiny_run):
    reader = PairReader(tiny_run)
    permuted = reader.fit_basis_maps(tiny_run.student("permuted-init", "digits"), 0)
    assert set(permuted) == {FIRST, LAST}
    for point, found in permuted.items():
        assert found.is_sound and found.num_rows == 1536
        assert found.correlation == pytest.approx(1.0, abs=1e-5)
        start, own = tiny_run.student("permuted-init", "digits"), tiny_run.reference
        images = tiny_run.family.prompts(own, 0).estimate["trait"].batches[0].arguments["images"]
        mapped = hidden(tiny_run, start, 0, 0, images)[point] @ found.rotation
        wanted = hidden(tiny_run, own, 0, 0, images)[point]
        assert float((mapped - wanted).norm() / wanted.norm()) < 0.05
    different = reader.fit_basis_maps(tiny_run.student("different-init", "digits"), 0)
    assert not any(found.is_sound for found in different.values())


def test_a_lineage_that_was_trained_starts_at_its_own_first_step(tiny_run):
    student = tiny_run.student("permuted-init", "digits")
    with PairReader(tiny_run).open_start(student, 2) as start:
        weights = start.model.state_dict()
    own = student.load_state(0, 2)
    assert all(torch.equal(weights[name], own[name]) for name in own)
    reference = tiny_run.reference.load_state(0, 2)
    assert not np.allclose(reference["layers.0.weight"], own["layers.0.weight"])
