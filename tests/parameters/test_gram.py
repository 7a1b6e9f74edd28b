from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from mechsub.checkpoints import LoraInfo, Section, TensorInfo, load_stacked, write_tensors
from mechsub.errors import AnalysisError
from mechsub.lineages import (
    LineageSpec,
    Origin,
    Part,
    adapter_files,
    checkpoint_folder,
    checkpoint_name,
    lineage_folder,
    open_lineage,
    write_spec,
)
from mechsub.parameters.blocks import list_blocks
from mechsub.parameters.chunks import DenseChunks
from mechsub.parameters.directions import (
    Direction,
    displacement,
    displacement_difference,
    displacement_label,
    load_dense,
    origin_direction,
    origin_label,
)
from mechsub.parameters.gram import describe_not_finite, stream_gram

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


def draw_states(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        step: {name: torch.randn(MEMBERS, *info.shape, generator=generator) for name, info in TABLE.items()} for step in STEPS
    }


def write_states(run, name, states, layout, table=TABLE):
    """Stacked states on the disk: as they are, as a file for each member, or as a folder of shards for each."""
    spec = LineageSpec(
        name, "teacher", None, None, "any", {}, Origin(name, tuple(range(MEMBERS))), None, MEMBERS, tuple(states), table
    )
    for member in [None] if layout == "stacked" else range(MEMBERS):
        own = spec if member is None else replace(spec, num_members=1, member=member, origin=Origin(name, (member,)))
        write_spec(run / lineage_folder(name, member), own)
        for step, stacked in states.items():
            state = {key: stacked[key] if member is None else stacked[key][member] for key in table}
            if layout != "shards":
                write_tensors(run / checkpoint_name(name, step, member), state, {})
                continue
            for number, (key, tensor) in enumerate(state.items()):
                path = run / checkpoint_folder(name, step, member) / f"model-{number:05d}-of-{len(state):05d}.safetensors"
                write_tensors(path, {key: tensor}, {})
    return open_lineage(run, name)


ADAPTED = {"w": TensorInfo((7, 4), "layer 0", "hidden", lora=LoraInfo("A", "B", 1.5))}


def write_adapters(run, name, seed):
    """Adapters of rank 2 of each member, on a base that need not be there."""
    generator = torch.Generator().manual_seed(seed)
    base = {"w": TABLE["w"]}
    for member in range(MEMBERS):
        spec = LineageSpec(
            "reference", "reference", None, None, "any", {}, Origin("reference", (member,)), None, 1, (0,), base, member
        )
        write_spec(run / lineage_folder("reference", member), spec)
        own = replace(spec, name=name, role="student", steps=(0, 5), tensors=ADAPTED, is_adapter=True, holds_start=False)
        write_spec(run / lineage_folder(name, member), own)
        factors = {"A": torch.randn(2, 4, generator=generator), "B": torch.randn(7, 2, generator=generator)}
        write_tensors(run / adapter_files(name, 5, member)[0], factors, {})
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


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_no_bit(lineages, workers):
    anchor = [displacement_label("teacher", 5)]
    found = [stream_gram(directions_of(*lineages), list_blocks(TABLE), anchor, workers=number) for number in (2, workers)]
    np.testing.assert_array_equal(found[0].within, found[1].within)
    np.testing.assert_array_equal(found[0].across, found[1].across)


@pytest.mark.parametrize("layout", ["a file a member", "shards"])
@pytest.mark.parametrize("backwards", [False, True])
def test_layout_and_order_of_the_files_change_nothing(tmp_path, layout, backwards):
    states = {name: draw_states(seed) for seed, name in enumerate(("student", "teacher"))}
    stacked = [write_states(tmp_path / "stacked", name, found, "stacked") for name, found in states.items()]
    table = dict(reversed(TABLE.items())) if backwards else TABLE
    other = [write_states(tmp_path / "other", name, found, layout, table) for name, found in states.items()]
    anchor = [displacement_label("teacher", 5)]
    wanted = stream_gram(directions_of(*stacked), list_blocks(TABLE), anchor)
    found = stream_gram(directions_of(*other), list_blocks(table), anchor)
    order = [found.blocks.index(name) for name in wanted.blocks]
    np.testing.assert_array_equal(found.within[:, order], wanted.within)
    np.testing.assert_array_equal(found.across[:, order], wanted.across)
    np.testing.assert_array_equal(found.rounding[:, order], wanted.rounding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_storage_moves_norms_and_alignments_no_further_than_the_floor_says(tmp_path, dtype):
    table = {"w": TensorInfo((100, 80), "layer 0", "hidden")}
    generator = torch.Generator().manual_seed(3)
    start, *steps = (torch.randn(MEMBERS, 100, 80, generator=generator, dtype=torch.float64) for _ in range(3))
    exact = {
        "student": [0.02 * start, 0.02 * (start + 0.2 * steps[0])],
        "teacher": [0.02 * start, 0.02 * (start + 0.2 * steps[1])],
    }
    grams = []
    for kept in (torch.float64, dtype):
        found = [
            write_states(tmp_path / str(kept), name, dict(zip((0, 5), [{"w": w.to(kept)} for w in values], strict=True)),
                         "stacked", table)
            for name, values in exact.items()
        ]  # fmt: skip
        asked = [origin_direction(found[0]), displacement(found[0], 5), displacement(found[1], 5)]
        grams.append(stream_gram(asked, list_blocks(table), [displacement_label("teacher", 5)]))
    true, stored = grams
    for place, values in ((1, exact["student"]), (2, exact["teacher"])):
        errors = [value.to(dtype).double() - value for value in values]
        measured = (errors[1] - errors[0]).square().sum((1, 2)).numpy()
        np.testing.assert_allclose(stored.rounding[:, 0, place] / measured, 1, atol=0.1)
    norms = [np.sqrt(gram.within[:, 0, [1, 2], [1, 2]]) for gram in grams]
    share = np.sqrt(stored.rounding[:, 0, 1:]) / norms[0]
    assert (np.abs(norms[1] / norms[0] - 1) <= share + 1e-6).all()
    cosines = [gram.within[:, 0, 1, 2] / norm.prod(1) for gram, norm in zip(grams, norms, strict=True)]
    assert (np.abs(cosines[1] - cosines[0]) <= 2 * share.sum(1) + 1e-6).all()
    assert (true.rounding < 1e-20 * stored.rounding).all() or dtype == torch.float32


def test_a_part_that_cancels_has_no_floor_and_one_held_twice_has_four_times_its_own(tmp_path):
    student, teacher = (write_lineage(tmp_path, name, seed) for seed, name in enumerate(("student", "teacher")))
    nothing = Direction("nothing", ((student, 5, 1.0), (student, 5, -1.0)))
    twice = Direction("twice", ((teacher, 5, 2.0),))
    once = Direction("once", ((teacher, 5, 1.0),))
    gram = stream_gram([nothing, once, twice], list_blocks(TABLE), ["once"])
    assert (gram.within[:, :, 0] == 0).all() and (gram.rounding[..., 0] == 0).all()
    np.testing.assert_allclose(gram.rounding[..., 2], 4 * gram.rounding[..., 1])


def test_sections_of_a_tensor_add_up_to_the_whole(tmp_path):
    sections = tuple(Section(kind, 4 * place, 4 * place + 4) for place, kind in enumerate(("q", "k", "v")))
    table = {
        "weight": TensorInfo((6, 12), "layer 0", "qkv", transposed=True, sections=sections),
        "bias": TensorInfo((12,), "layer 0", "qkv", transposed=True, sections=sections),
    }
    whole = {name: TensorInfo(info.shape, info.layer, info.kind) for name, info in table.items()}
    pair = [write_lineage(tmp_path, name, seed, torch.float64, table) for seed, name in enumerate(("student", "teacher"))]
    anchor = [displacement_label("teacher", 5)]
    together = stream_gram(directions_of(*pair), list_blocks(whole), anchor)
    for chunk_bytes in (1, 2000, 1 << 20):
        apart = stream_gram(directions_of(*pair), list_blocks(table), anchor, chunk_bytes=chunk_bytes)
        for name in ("within", "across", "rounding"):
            total = getattr(apart, name).reshape(MEMBERS, 2, 3, *getattr(apart, name).shape[2:]).sum(2)
            np.testing.assert_allclose(total, getattr(together, name), rtol=1e-12)
    moved = pair[0].load_tensor(5, "weight", 1)[:, 4:8] - pair[0].load_tensor(0, "weight", 1)[:, 4:8]
    assert apart.blocks[1] == "weight [k]"
    assert apart.within[1, 1, 2, 2] == pytest.approx(float(moved.square().sum()), rel=1e-12)


def test_what_is_not_finite_is_named_and_spoils_only_the_directions_that_hold_it(tmp_path):
    states = {name: draw_states(seed) for seed, name in enumerate(("student", "teacher", "control"))}
    clean = [write_states(tmp_path / "clean", name, found, "shards") for name, found in states.items()]
    states["student"][2]["w"][1, 3, 2] = torch.nan
    states["control"][0]["b"][0, 1] = torch.inf
    spoilt = [write_states(tmp_path / "spoilt", name, found, "shards") for name, found in states.items()]

    def gram(student, teacher, control):
        asked = [*directions_of(student, teacher), displacement(control, 5)]
        return stream_gram(asked, list_blocks(TABLE), [displacement_label("teacher", 5), displacement_label("student", 2)])

    wanted, found = gram(*clean), gram(*spoilt)
    is_spoilt = np.zeros((MEMBERS, 2, 5), dtype=bool)
    is_spoilt[1, found.blocks.index("w"), 1] = is_spoilt[0, found.blocks.index("b"), 4] = True
    involved = is_spoilt[..., :, None] | is_spoilt[..., None, :]
    np.testing.assert_array_equal(found.within, np.where(involved, np.nan, wanted.within))
    anchored = is_spoilt[:, :, [3, 1]].transpose(1, 2, 0)[None, :, None]
    np.testing.assert_array_equal(found.across, np.where(is_spoilt[..., None, None] | anchored, np.nan, wanted.across))
    assert np.isfinite(found.rounding).all() and wanted.not_finite == ()
    assert [(one.lineage, one.step, one.member, one.tensor) for one in found.not_finite] == [
        ("control", 0, 0, "b"),
        ("student", 2, 1, "w"),
    ]
    assert found.not_finite[1].checkpoint == spoilt[0].checkpoint(2, 1)
    assert "tensor w of student at step 2, member 1" in str(found.not_finite[1])
    sentences = describe_not_finite([*found.not_finite, *found.not_finite])
    assert len(sentences) == 2 and "tensor b of control at step 0, member 0" in sentences[0]


def test_finite_numbers_too_large_for_products_in_float32_are_multiplied_in_float64(tmp_path):
    table = {"w": TensorInfo((4, 3), "layer 0", "hidden")}
    states = {step: {"w": torch.full((MEMBERS, 4, 3), 1e25 * step)} for step in (0, 2)}
    lineage = write_states(tmp_path, "student", states, "stacked", table)
    gram = stream_gram([displacement(lineage, 2)], list_blocks(table), [displacement_label("student", 2)])
    np.testing.assert_allclose(gram.within, 12 * float(torch.tensor(2e25)) ** 2, rtol=1e-6)
    assert gram.not_finite == ()


def test_every_number_is_read_once_and_no_chunk_is_larger_than_asked_for(tmp_path, monkeypatch):
    student, teacher = (write_lineage(tmp_path, name, seed) for seed, name in enumerate(("student", "teacher")))
    read, sizes = Counter(), []
    open_rows, load = Part.open_rows, DenseChunks.load

    def counted(part, tensor):
        def wrap(reader, member):
            def rows(start, stop):
                read.update((part.name, part.step, member, tensor, row) for row in range(start, stop))
                return reader(start, stop)

            return rows

        return [wrap(reader, member) for reader, member in zip(open_rows(part, tensor), part.members, strict=True)]

    def measured(chunks, start, stop):
        chunk = load(chunks, start, stop)
        sizes.append(chunk.nbytes)
        return chunk

    monkeypatch.setattr(Part, "open_rows", counted)
    monkeypatch.setattr(DenseChunks, "load", measured)
    shuffled = Direction("θ₀ of others", tuple((lineage, 0, 1.0) for lineage in (student,)))
    asked = [*directions_of(student, teacher), displacement_difference(student, teacher, 5), shuffled]
    stream_gram(asked, list_blocks(TABLE), ["Δ teacher @ 5"], chunk_bytes=3000)
    checkpoints = [("student", step) for step in STEPS] + [("teacher", step) for step in (0, 5)]
    assert read == Counter(
        (*checkpoint, member, tensor, row)
        for checkpoint in checkpoints
        for member in range(MEMBERS)
        for tensor in TABLE
        for row in range(7)
    )
    assert max(sizes) <= 3000 and len(sizes) > 2


def test_adapters_are_never_made_dense_and_need_no_base(tmp_path, monkeypatch):
    student, teacher = (write_adapters(tmp_path, name, seed) for seed, name in enumerate(("student", "teacher")))
    monkeypatch.setattr(Part, "open_rows", None)
    asked = [displacement(student, 5), displacement(teacher, 5), displacement_difference(student, teacher, 5)]
    gram = stream_gram(asked, list_blocks(ADAPTED), [displacement_label("teacher", 5)])
    moved = {one: [one.load_factors(5, "w", member) for member in range(MEMBERS)] for one in (student, teacher)}
    dense = {one: torch.stack([found.rows @ found.columns for found in factors]) for one, factors in moved.items()}
    vectors = torch.stack([dense[student], dense[teacher], dense[student] - dense[teacher]], 1).flatten(2)
    np.testing.assert_allclose(gram.within[:, 0], vectors @ vectors.transpose(1, 2), rtol=1e-9, atol=1e-12)
    across = torch.einsum("mdn,on->mdo", vectors, dense[teacher].flatten(1))
    np.testing.assert_allclose(gram.across[:, 0, :, 0], across, rtol=1e-9, atol=1e-12)
    assert (gram.rounding == 0).all()


@pytest.mark.parametrize("beside_dense", [False, True])
def test_a_spoilt_adapter_leaves_the_others_as_they_are(tmp_path, beside_dense):
    grams = []
    for folder, spoil in (("clean", False), ("spoilt", True)):
        run = tmp_path / folder
        lineages = [write_adapters(run, name, seed) for seed, name in enumerate(("student", "teacher", "control"))]
        base = write_states(run, "reference", {0: {"w": torch.ones(MEMBERS, 7, 4)}}, "shards", {"w": TABLE["w"]})
        if spoil:
            path = lineages[2].checkpoint(5, 1) / "adapter_model.safetensors"
            factors = load_stacked(path)
            factors["A"][0, 0] = torch.nan
            write_tensors(path, factors, {})
        asked = [displacement(lineage, 5) for lineage in lineages]
        asked += [origin_direction(base)] if beside_dense else []
        grams.append(stream_gram(asked, list_blocks(ADAPTED), ["Δ teacher @ 5", "Δ control @ 5"]))
    clean, spoilt = grams
    held = np.zeros((MEMBERS, 1, len(asked)), dtype=bool)
    held[1, 0, 2] = True
    np.testing.assert_array_equal(spoilt.within, np.where(held[..., None] | held[:, :, None], np.nan, clean.within))
    anchored = held[:, :, [1, 2]].transpose(1, 2, 0)[None, :, None]
    np.testing.assert_array_equal(spoilt.across, np.where(held[..., None, None] | anchored, np.nan, clean.across))
    assert [(one.lineage, one.step, one.member, one.tensor) for one in spoilt.not_finite] == [("control", 5, 1, "w")]


def test_the_floor_of_a_large_tensor_is_that_of_evenly_spaced_rows_whatever_the_chunks_are(tmp_path):
    sections = (Section("q", 0, 1500), Section("k", 1500, 2100))
    table = {"w": TensorInfo((2100, 512), "layer 0", "hidden", sections=sections)}
    weights = torch.randn(MEMBERS, 2100, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    lineage = write_states(tmp_path, "student", {0: {"w": weights}}, "stacked", table)
    found = [
        stream_gram([origin_direction(lineage)], list_blocks(table), [origin_label("student")], chunk_bytes=chunk).rounding
        for chunk in (100_000, 64 << 20)
    ]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)
    exact = 4.0 ** (torch.frexp(weights.float()).exponent - 8).double() / 12
    np.testing.assert_allclose(found[1][:, 0, 0], exact[:, :1500].sum((1, 2)), rtol=0.02)
    np.testing.assert_allclose(found[1][:, 1, 0], exact[:, 1500:].sum((1, 2)), rtol=0.02)


def test_long_sums_keep_the_precision_of_their_numbers(tmp_path):
    table = {"w": TensorInfo((1024, 600), "layer 0", "hidden")}
    first, second = (write_lineage(tmp_path, name, seed, table=table) for seed, name in enumerate(("first", "second")))
    directions = [displacement(lineage, STEPS[-1]) for lineage in (first, second)]
    gram = stream_gram(directions, list_blocks(table), [directions[0].label])
    for member in range(MEMBERS):
        vectors = torch.stack([load_dense(direction, "w", member).double().flatten() for direction in directions])
        exact = (vectors @ vectors.T).numpy()
        size = np.sqrt(exact.diagonal())
        assert (np.abs(gram.within[member, 0] - exact) / np.outer(size, size)).max() < 2e-6
