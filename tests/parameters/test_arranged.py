from dataclasses import replace

import numpy as np
import pytest
import torch

from mechsub.checkpoints import LoraInfo, TensorInfo, write_tensors
from mechsub.lineages import ADAPTER_WEIGHTS, LineageSpec, Origin, checkpoint_folder, open_lineage, write_spec
from mechsub.parameters.arranged import ArrangedLineage
from mechsub.parameters.blocks import list_blocks
from mechsub.parameters.directions import displacement, displacement_difference, load_dense, load_low_rank, origin_direction
from mechsub.parameters.gram import stream_gram
from mechsub.parameters.symmetry import Arrangement, UnitGroup, UnitPlace
from tests.parameters.test_gram import MEMBERS, TABLE, write_lineage

UNITS = UnitGroup("rows", "units", 7, (UnitPlace("w", 0), UnitPlace("b", 0), UnitPlace("v.weight", 1)), "v")
INPUTS = UnitGroup("columns", "units", 4, (UnitPlace("w", 1), UnitPlace("u.weight", 1)), "u")
SOURCES = (1, 2, 0)


def arrangements():
    torch.manual_seed(0)
    stored = Arrangement.as_stored([UNITS, INPUTS])
    return [stored.permute(UNITS, torch.randperm(7)).permute(INPUTS, torch.randperm(4)) for _ in range(MEMBERS)]


def write_adapters(run, name, seed, magnitude=None):
    """A lineage of LoRA adapters, a folder a member, beside references of their own."""
    generator = torch.Generator().manual_seed(seed)
    table = {
        "w": replace(TABLE["w"], lora=LoraInfo("w.A", "w.B", 0.5, magnitude=magnitude)),
        "b": replace(TABLE["b"], frozen=True),
    }
    for member in range(MEMBERS):
        spec = LineageSpec(name, "student", None, None, "any", {}, Origin("base", (member,)), None, 1, (0, 5), table, member)
        folder = run / checkpoint_folder(name, 5, member)
        folder.mkdir(parents=True)
        drawn = {"w.A": (2, 4), "w.B": (7, 2), "m": (7,)}
        tensors = {key: torch.randn(*shape, generator=generator) for key, shape in drawn.items()}
        write_tensors(folder / ADAPTER_WEIGHTS, tensors, {})
        write_spec(folder.parent, replace(spec, is_adapter=True, holds_start=False))
    return open_lineage(run, name)


@pytest.fixture
def lineages(tmp_path):
    base = write_lineage(tmp_path, "base", 0)
    return {
        "stored": base,
        "low rank": write_adapters(tmp_path, "low-rank", 1),
        "other": write_adapters(tmp_path, "other", 2),
        "change": write_adapters(tmp_path, "change", 3, magnitude="m"),
    }


@pytest.mark.parametrize("kind", ["stored", "low rank", "change"])
@pytest.mark.parametrize("tensor", ["w", "b"])
def test_every_way_of_reading_gives_the_same_arranged_weights(lineages, kind, tensor):
    lineage, orders = lineages[kind], arrangements()
    shown = ArrangedLineage(lineage, "arranged", SOURCES, orders)
    for member, (source, order) in enumerate(zip(SOURCES, orders, strict=True)):
        expected = order.arrange(tensor, lineage.load_tensor(5, tensor, source))
        parts = shown.parts(5, tensor)
        torch.testing.assert_close(sum(part.load_whole(tensor, member) for part in parts).float(), expected)
        rows = [sum(part.open_rows(tensor)[member](*cut) for part in parts) for cut in ((0, 3), (3, 7))]
        torch.testing.assert_close(torch.cat(rows).float(), expected)


def test_what_lineages_of_one_origin_share_cancels_when_they_are_shown_alike(lineages):
    orders = arrangements()
    first, second = (ArrangedLineage(lineages[name], "arranged", SOURCES, orders) for name in ("low rank", "other"))
    for direction in (displacement(first, 5), displacement_difference(first, second, 5)):
        factors = load_low_rank(direction, "w", 1)
        assert factors is not None
        torch.testing.assert_close(
            (factors.rows @ factors.columns).float(), load_dense(direction, "w", 1).float(), atol=1e-5, rtol=1e-4
        )
    mixed = displacement_difference(first, lineages["other"], 5)
    assert load_low_rank(mixed, "w", 1) is None, "shown in another order the origin is no longer the same"


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
@pytest.mark.parametrize("kind", ["stored", "low rank", "change"])
def test_gram_matrices_of_arranged_lineages_equal_the_slow_product(lineages, kind, chunk_bytes):
    shown = ArrangedLineage(lineages[kind], "arranged", SOURCES, arrangements())
    directions = [displacement(lineages["stored"], 2), displacement(shown, 5), origin_direction(shown)]
    gram = stream_gram(directions, list_blocks(TABLE), (), chunk_bytes=chunk_bytes)
    for member in range(MEMBERS):
        for index, tensor in enumerate(gram.blocks):
            vectors = [load_dense(direction, tensor, member).double().flatten() for direction in directions]
            slow = np.array([[float(left @ right) for right in vectors] for left in vectors])
            np.testing.assert_allclose(gram.within[member, index], slow, rtol=1e-4, atol=1e-4)


def test_what_is_computed_is_computed_once_a_tensor_however_many_chunks_there_are(lineages, monkeypatch):
    source, calls = lineages["change"], []
    compute = source._load_change

    def count(*place):
        calls.append(place)
        return compute(*place)

    monkeypatch.setattr(source, "_load_change", count)
    shown = ArrangedLineage(source, "arranged", SOURCES, arrangements())
    stream_gram([displacement(shown, 5)], [one for one in list_blocks(TABLE) if one.tensor == "w"], (), chunk_bytes=1)
    assert sorted(calls) == [(5, "w", member, 0, 7) for member in range(MEMBERS)]


def test_the_numbers_of_an_arranged_lineage_are_located_in_its_own(lineages):
    part = ArrangedLineage(lineages["stored"], "arranged", SOURCES, arrangements()).parts(5, "w")[0]
    for member, source in enumerate(SOURCES):
        found, whose = part.locate(member)
        assert (found.name, whose) == ("base", source)


def test_an_arranged_tensor_of_another_size_is_refused(tmp_path):
    lineage = write_lineage(tmp_path, "wide", 0, table={"w": TensorInfo((9, 4), "layer 0", "hidden")})
    shown = ArrangedLineage(lineage, "arranged", SOURCES, arrangements())
    with pytest.raises(Exception, match="9 entries along axis 0"):
        shown.parts(2, "w")[0].load_whole("w", 0)
