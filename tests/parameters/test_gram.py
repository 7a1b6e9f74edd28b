import numpy as np
import pytest
import torch

from mechsub.checkpoints import TensorInfo, write_tensors
from mechsub.errors import AnalysisError
from mechsub.lineages import LineageSpec, Origin, checkpoint_name, open_lineage, write_spec
from mechsub.parameters.blocks import list_blocks
from mechsub.parameters.directions import (
    displacement,
    displacement_difference,
    displacement_label,
    origin_direction,
    origin_label,
)
from mechsub.parameters.gram import stream_gram

MEMBERS, STEPS = 3, (0, 2, 5)
TABLE = {"w": TensorInfo((7, 4), "layer 0", "hidden"), "b": TensorInfo((7,), "layer 0", "hidden")}


def write_lineage(run, name, seed, dtype=torch.float32, table=TABLE):
    generator = torch.Generator().manual_seed(seed)
    origin = Origin(name, tuple(range(MEMBERS)))
    spec = LineageSpec(name, "teacher", None, None, "any", {}, origin, None, MEMBERS, STEPS, table)
    for step in STEPS:
        tensors = {key: torch.randn(MEMBERS, *info.shape, generator=generator, dtype=dtype) for key, info in table.items()}
        write_tensors(run / checkpoint_name(name, step), tensors, {"step": str(step)})
    write_spec(run / "lineages" / name, spec)
    return open_lineage(run, name)


@pytest.fixture
def lineages(tmp_path):
    return write_lineage(tmp_path, "student", 1), write_lineage(tmp_path, "teacher", 2)


def directions_of(student, teacher):
    return [origin_direction(student), displacement(student, 2), displacement(student, 5), displacement(teacher, 5)]


def flat(lineage, step, member, tensor):
    return lineage.load_state(step, member)[tensor].double().numpy().ravel()


def test_every_entry_equals_the_slow_product(lineages):
    student, teacher = lineages
    gram = stream_gram(directions_of(*lineages), list_blocks(TABLE), [displacement_label("teacher", 5)])
    for member in range(MEMBERS):
        for index, tensor in enumerate(gram.blocks):
            origin = flat(student, 0, member, tensor)
            vectors = [
                origin,
                flat(student, 2, member, tensor) - origin,
                flat(student, 5, member, tensor) - origin,
                flat(teacher, 5, member, tensor) - flat(teacher, 0, member, tensor),
            ]
            slow = np.array([[left @ right for right in vectors] for left in vectors])
            np.testing.assert_allclose(gram.within[member, index], slow, rtol=1e-5, atol=1e-5)
            for other in range(MEMBERS):
                anchor = flat(teacher, 5, other, tensor) - flat(teacher, 0, other, tensor)
                slow_across = [vector @ anchor for vector in vectors]
                np.testing.assert_allclose(gram.across[member, index, :, 0, other], slow_across, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_bytes", [1, 1000, 5000])
def test_the_chunk_size_changes_nothing(tmp_path, chunk_bytes):
    pair = write_lineage(tmp_path, "student", 1, torch.float64), write_lineage(tmp_path, "teacher", 2, torch.float64)
    anchor = [displacement_label("teacher", 5)]
    whole = stream_gram(directions_of(*pair), list_blocks(TABLE), anchor)
    parts = stream_gram(directions_of(*pair), list_blocks(TABLE), anchor, chunk_bytes=chunk_bytes)
    np.testing.assert_allclose(parts.within, whole.within, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(parts.across, whole.across, rtol=1e-12, atol=1e-12)


def test_a_small_difference_is_subtracted_weight_by_weight(tmp_path):
    # Two float32 displacements of size 1 that differ by 1e-6: their Gram entries cancel to noise, the weights do not.
    table = {"w": TensorInfo((64,), "layer 0", "hidden")}
    base = torch.rand(MEMBERS, 64, generator=torch.Generator().manual_seed(0))
    moved = {"first": base + 1.0, "second": base + 1.0 + 2.0**-20}
    found = {}
    for name, last in moved.items():
        origin = Origin(name, tuple(range(MEMBERS)))
        spec = LineageSpec(name, "student", "any", None, "any", {}, origin, None, MEMBERS, (0, 5), table)
        for step, tensor in ((0, base), (5, last)):
            write_tensors(tmp_path / checkpoint_name(name, step), {"w": tensor}, {})
        write_spec(tmp_path / "lineages" / name, spec)
        found[name] = open_lineage(tmp_path, name)
    direct = displacement_difference(found["first"], found["second"], 5)
    gram = stream_gram(
        [direct, displacement(found["first"], 5), displacement(found["second"], 5)], list_blocks(table), [direct.label]
    )
    exact = ((moved["first"].double() - moved["second"].double()) ** 2).sum(1).numpy()
    np.testing.assert_allclose(gram.within[:, 0, 0, 0], exact, rtol=1e-5)
    from_entries = gram.within[:, 0, 1, 1] - 2 * gram.within[:, 0, 1, 2] + gram.within[:, 0, 2, 2]
    assert np.abs(from_entries / exact - 1).max() > 0.1


def test_tied_tensors_count_once(tmp_path):
    table = {"w": TABLE["w"], "tied": TensorInfo((7, 4), "head", "head", tied_to="w")}
    lineage = write_lineage(tmp_path, "student", 1, table=table)
    assert stream_gram([displacement(lineage, 2)], list_blocks(table), [displacement_label("student", 2)]).blocks == ("w",)


def test_lineages_of_other_shapes_are_incomparable(tmp_path, lineages):
    other = write_lineage(tmp_path, "wide", 3, table={"w": TensorInfo((9, 4), "layer 0", "hidden"), "b": TABLE["b"]})
    with pytest.raises(AnalysisError, match=r"tensor w \(7, 4\): lineage wide has it as \(9, 4\).*incomparable"):
        stream_gram(
            [displacement(lineages[0], 2), displacement(other, 2)], list_blocks(TABLE), displacement_label("student", 2)
        )


def test_labels_tell_origins_from_displacements():
    assert origin_label("student") != displacement_label("student", 0)
