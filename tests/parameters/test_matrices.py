import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mechsub.checkpoints import LoraInfo, Section, TensorInfo, write_tensors
from mechsub.lineages import LineageSpec, Origin, Part, checkpoint_name, lineage_folder, open_lineage, write_spec
from mechsub.parameters.alignment import Scopes
from mechsub.parameters.directions import displacement, displacement_difference
from mechsub.parameters.matrices import MatrixScopes, average_groups, list_matrices, load_spectrum
from mechsub.parameters.subspaces import BELOW, NOT_FINITE, OK, ZERO

MEMBERS, LAST, TOP = 3, 5, 2
SECTIONS = (Section("q", 0, 4), Section("k", 4, 8), Section("v", 8, 12))
TABLE = {
    "plain": TensorInfo((7, 5), "layer 0", "hidden"),
    "bias": TensorInfo((7,), "layer 0", "hidden"),
    "fused": TensorInfo((6, 12), "layer 1", "attention", transposed=True, sections=SECTIONS),
    "row": TensorInfo((1, 9), "layer 1", "head"),
    "tied": TensorInfo((7, 5), "layer 1", "head", tied_to="plain"),
}


def write_lineage(run, name, seed, dtype=torch.float32, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    own = {key: info for key, info in TABLE.items() if info.tied_to is None}
    for step in (0, LAST):
        tensors = {key: size * torch.randn(MEMBERS, *info.shape, generator=generator) for key, info in own.items()}
        write_tensors(run / checkpoint_name(name, step), {key: value.to(dtype) for key, value in tensors.items()}, {})
    origin = Origin(name, tuple(range(MEMBERS)))
    write_spec(
        run / lineage_folder(name), LineageSpec(name, "teacher", None, None, "any", {}, origin, None, MEMBERS, (0, LAST), TABLE)
    )
    return open_lineage(run, name)


def write_adapter(run, base, seed, rank):
    """LoRA on both matrices, member by member, as peft's files lie."""
    generator = torch.Generator().manual_seed(seed)
    name = f"adapter-{seed}"
    table = {
        key: TensorInfo(
            info.shape, info.layer, info.kind, info.transposed, info.tied_to, sections=info.sections, frozen=key == "bias",
            lora=LoraInfo(f"{key}.a", f"{key}.b", 0.5, info.transposed) if key in ("plain", "fused") else None,
        )
        for key, info in TABLE.items()
    }  # fmt: skip
    table["row"] = TensorInfo((1, 9), "layer 1", "head", frozen=True)
    for member in range(MEMBERS):
        tensors = {}
        for key in ("plain", "fused"):
            rows, columns = TABLE[key].shape[::-1] if TABLE[key].transposed else TABLE[key].shape
            tensors[f"{key}.a"] = torch.randn(rank, columns, generator=generator)
            tensors[f"{key}.b"] = torch.randn(rows, rank, generator=generator)
        write_tensors(run / checkpoint_name(name, LAST, member), tensors, {})
        spec = LineageSpec(
            name, "student", "lora", None, "any", {}, Origin(base.name, (member,)), None, MEMBERS, (0, LAST), table, member,
            is_adapter=True, holds_start=False,
        )  # fmt: skip
        write_spec(run / lineage_folder(name, member), spec)
    return open_lineage(run, name)


def slow(lineage, matrix, member):
    moved = (
        lineage.load_tensor(LAST, matrix.block.tensor, member).double()
        - lineage.load_tensor(0, matrix.block.tensor, member).double()
    )
    own = moved[matrix.block.index].numpy()
    return own.T if matrix.transposed else own


def test_matrices_are_blocks_with_two_sides_and_know_which_is_the_output():
    matrices = list_matrices(TABLE)
    assert [matrix.name for matrix in matrices] == ["plain", "fused [q]", "fused [k]", "fused [v]"]
    assert [matrix.shape for matrix in matrices] == [(7, 5), (4, 6), (4, 6), (4, 6)]


def check_against_slow(lineage, atol):
    for matrix in list_matrices(TABLE):
        spectrum = load_spectrum(displacement(lineage, LAST), matrix, TOP, seed=0)
        for member in range(MEMBERS):
            left, values, right = np.linalg.svd(slow(lineage, matrix, member), full_matrices=False)
            known = spectrum.values[member, : len(values)].numpy()
            np.testing.assert_allclose(known, values[: len(known)], atol=atol)
            for own, other in ((spectrum.left, left), (spectrum.right, right.T)):
                projector = own[member] @ own[member].T
                np.testing.assert_allclose(projector, other[:, :TOP] @ other[:, :TOP].T, atol=10 * atol)


@pytest.mark.parametrize("bytes_at_once", [1 << 28, 1], ids=["all members at once", "one by one"])
@pytest.mark.parametrize("exact_up_to", [1024, 3], ids=["held", "sketched"])
def test_the_spectrum_of_stored_weights_is_the_slow_one(tmp_path, monkeypatch, bytes_at_once, exact_up_to):
    monkeypatch.setattr("mechsub.parameters.matrices._BYTES_AT_ONCE", bytes_at_once)
    monkeypatch.setattr("mechsub.parameters.matrices.EXACT_UP_TO", exact_up_to)
    check_against_slow(write_lineage(tmp_path, "teacher", 1), 1e-6)


def test_the_spectrum_of_an_adapter_is_the_slow_one(tmp_path):
    check_against_slow(write_adapter(tmp_path, write_lineage(tmp_path, "reference", 1), 2, rank=2), 1e-5)


def test_what_adapters_add_is_never_multiplied_out(tmp_path, monkeypatch):
    base = write_lineage(tmp_path, "reference", 1)
    first, second = (write_adapter(tmp_path, base, seed, rank=1) for seed in (2, 3))

    def refuse(*arguments):
        raise AssertionError("a dense load")

    monkeypatch.setattr(Part, "open_rows", refuse)
    monkeypatch.setattr(Part, "load_whole", refuse)
    for matrix in list_matrices(TABLE):
        assert load_spectrum(displacement(first, LAST), matrix, TOP, seed=0).rank.tolist() == [1] * MEMBERS
        assert load_spectrum(displacement_difference(first, second, LAST), matrix, TOP, seed=0).rank.tolist() == [2] * MEMBERS


@pytest.mark.parametrize("sketched", [False, True], ids=["held", "sketched a row at a time"])
def test_an_adapter_beside_stored_weights_is_the_slow_sum(tmp_path, monkeypatch, sketched):
    if sketched:
        monkeypatch.setattr("mechsub.parameters.matrices.EXACT_UP_TO", 3)
        monkeypatch.setattr("mechsub.parameters.matrices._SKETCHED_BYTES", 1)
    base = write_lineage(tmp_path, "teacher", 1)
    adapter = write_adapter(tmp_path, base, 2, rank=2)
    direction = displacement_difference(base, adapter, LAST)
    for matrix in list_matrices(TABLE):
        spectrum = load_spectrum(direction, matrix, TOP, seed=0)
        assert spectrum.is_whole != sketched
        for member in range(MEMBERS):
            whole = slow(base, matrix, member) - slow(adapter, matrix, member)
            left, values, right = np.linalg.svd(whole, full_matrices=False)
            np.testing.assert_allclose(spectrum.values[member, :TOP], values[:TOP], atol=1e-5)
            assert float(spectrum.square[member]) == pytest.approx((whole**2).sum(), rel=1e-5)
            assert float(spectrum.backward_error[member]) < 1e-6
            for own, other in ((spectrum.left, left), (spectrum.right, right.T)):
                np.testing.assert_allclose(own[member] @ own[member].T, other[:, :TOP] @ other[:, :TOP].T, atol=1e-4)


@pytest.mark.parametrize("exact_up_to", [1024, 3], ids=["held", "sketched"])
def test_numbers_that_are_not_finite_spoil_their_member_and_matrix_alone(tmp_path, monkeypatch, exact_up_to):
    monkeypatch.setattr("mechsub.parameters.matrices.EXACT_UP_TO", exact_up_to)
    lineage = write_lineage(tmp_path, "teacher", 1)
    path = tmp_path / checkpoint_name("teacher", LAST)
    tensors = load_file(path)
    before = [load_spectrum(displacement(lineage, LAST), matrix, TOP, seed=0) for matrix in list_matrices(TABLE)]
    tensors["fused"][1, 0, 5] = torch.nan  # a key
    write_tensors(path, tensors, {})
    lineage = open_lineage(tmp_path, "teacher")
    for matrix, whole in zip(list_matrices(TABLE), before, strict=True):
        found = load_spectrum(displacement(lineage, LAST), matrix, TOP, seed=0)
        spoilt = matrix.name == "fused [k]"
        assert found.square.isnan().tolist() == [False, spoilt, False]
        known = [0, 2] if spoilt else [0, 1, 2]
        torch.testing.assert_close(found.values[known], whole.values[known])


def test_a_direction_that_holds_nothing_has_no_singular_value(tmp_path):
    lineage = write_lineage(tmp_path, "teacher", 1)
    spectrum = load_spectrum(displacement(lineage, 0), list_matrices(TABLE)[0], TOP, seed=0)
    assert spectrum.rank.tolist() == [0] * MEMBERS and spectrum.square.tolist() == [0.0] * MEMBERS


def test_directions_that_rounding_to_half_precision_could_have_made_do_not_count(tmp_path):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(MEMBERS, 7, 5, generator=generator)
    moved = start + 0.05 * torch.randn(MEMBERS, 7, 1, generator=generator) * torch.randn(MEMBERS, 1, 5, generator=generator)
    rank = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).split(".")[-1]
        lineage = write_lineage(tmp_path, name, 1)
        for step, weights in ((0, start), (LAST, moved)):
            write_tensors(tmp_path / checkpoint_name(name, step), {"plain": weights.to(dtype)}, {})
        rank[name] = load_spectrum(displacement(lineage, LAST), list_matrices(TABLE)[0], TOP, seed=0).rank.tolist()
    assert rank["float32"] == [1] * MEMBERS
    assert max(rank["bfloat16"]) <= 1  # the rounding has full rank, and is not counted


def test_means_are_plain_ones_over_what_has_a_value_and_nothing_has_no_mean():
    scopes = MatrixScopes.of(list_matrices(TABLE))
    assert scopes.names[4:] == ("layer 0", "layer 1", "model")
    values = np.array([[1.0, 2.0, np.nan, 4.0], [np.nan, np.nan, np.nan, np.nan]])
    codes = np.array([[OK, OK, BELOW, OK], [ZERO, ZERO, BELOW, ZERO]])
    means, found = average_groups(values, codes, scopes.groups, -1)
    assert means[0, [4, 5, -1]].tolist() == [1.0, 3.0, pytest.approx(7 / 3)]
    assert np.isnan(means[1]).all() and found[1].tolist() == [
        ZERO,
        ZERO,
        BELOW,
        ZERO,
        ZERO,
        BELOW,
        BELOW,
    ]
    assert ((found == OK) == np.isfinite(means)).all()


def test_matrices_have_the_scopes_of_blocks():
    matrices = list_matrices(TABLE | {"other": TensorInfo((7, 7), "layer 1", "hidden")})
    names = Scopes.of([matrix.block for matrix in matrices]).names
    assert MatrixScopes.of(matrices).names == names[:-1] and "every hidden" in names  # means have no shared support


def test_what_is_not_finite_spoils_the_means_that_it_lies_in_and_no_other():
    scopes = MatrixScopes.of(list_matrices(TABLE))
    values = np.array([[1.0, 2.0, np.nan, 4.0], [1.0, 2.0, 3.0, 4.0]])
    codes = np.array([[OK, OK, NOT_FINITE, BELOW], [OK, OK, OK, BELOW]])
    means, found = average_groups(values, codes, scopes.groups, -1)
    assert found[0].tolist() == [OK, OK, NOT_FINITE, BELOW, OK, NOT_FINITE, NOT_FINITE]
    assert (np.isnan(means) == (found != OK)).all() and means[1, -1] == pytest.approx(2.0)
