import numpy as np
import pytest
import torch

from mechsub.analyses.steering_effect import steering_effect
from mechsub.steered.edits import (
    ADD,
    OTHER_STUDENTS,
    OTHER_TEACHERS,
    OUT,
    OWN_STUDENT,
    OWN_TEACHER,
    RANDOM,
    REPLACE,
    list_edits,
)

LAST = "blocks.1.mlp.hook_post"


@pytest.fixture(scope="module")
def result(tiny_run):
    return steering_effect(tiny_run)


def forward(model, images, change=lambda features: features):
    """Class logits, with the last hidden layer changed on the way; the images that the trait is scored on."""
    features = images
    for layer in model.layers:
        features = torch.relu(layer(features))
    return model.class_head(change(features))


def accuracy(run, model, change=lambda features: features):
    images, labels = run.family._images, run.family._labels["digits"]
    with torch.no_grad():
        return float((forward(model, images, change).argmax(-1) == labels).double().mean())


def hidden_mean(run, lineage, step, member):
    (batch,) = run.family.prompts(run.reference, member).estimate["trait"].batches
    model = run.family.load_model(lineage, step, member)
    features = batch.arguments["images"]
    with torch.no_grad():
        for layer in model.layers:
            features = torch.relu(layer(features))
    return features.mean(0), features.norm(dim=-1).mean()


def direction(run, lineage, member):
    moved, _ = hidden_mean(run, lineage, lineage.last, member)
    start, norm = hidden_mean(run, lineage, 0, member)
    return moved - start, norm


def edit_of(result, kind, vector, dose=""):
    data = result.data
    chosen = (data.kind == kind) & (data.vector == vector) & (data.window == LAST) & (data.dose == dose)
    return data.isel(edit=int(np.flatnonzero(chosen.values)[0]))


@pytest.mark.parametrize("dose", [-1.0, 0.5, 1.0, 2.0])
def test_a_vector_is_added_at_a_multiple_of_the_mean_length_there(tiny_run, result, dose):
    teacher = tiny_run.teacher("digits")
    for member in range(3):
        vector, norm = direction(tiny_run, teacher, member)
        added = vector / vector.norm() * dose * norm
        model = tiny_run.family.load_model(tiny_run.reference, 0, member)
        expected = accuracy(tiny_run, model, lambda h, added=added: h + added) - accuracy(tiny_run, model)
        found = edit_of(result, ADD, OWN_TEACHER, str(dose)).sel(condition="same-init", taught="digits", member=member)
        assert float(found.effect) == pytest.approx(expected, abs=0.006)  # rounding can turn one image of 360, or two


def test_a_dose_is_split_over_the_hook_points_of_a_window(tiny_run, result):
    teacher, data = tiny_run.teacher("digits"), result.data
    chosen = (data.kind == ADD) & (data.vector == OWN_TEACHER) & (data.window == "all layers")
    (edit,) = np.flatnonzero(chosen.values)
    assert data.dose.values[edit] == "0.5"
    images, labels = tiny_run.family._images, tiny_run.family._labels["digits"]
    (batch,) = tiny_run.family.prompts(tiny_run.reference, 1).estimate["trait"].batches
    moved, start = (tiny_run.family.load_model(teacher, step, 1) for step in (teacher.last, 0))
    steered = rows = images
    ends, starts = batch.arguments["images"], batch.arguments["images"]
    with torch.no_grad():
        for taught, layer in zip(moved.layers, start.layers, strict=True):
            ends, starts = torch.relu(taught(ends)), torch.relu(layer(starts))
            vector = ends.mean(0) - starts.mean(0)
            steered = torch.relu(layer(steered)) + vector / vector.norm() * 0.25 * starts.norm(dim=-1).mean()
            rows = torch.relu(layer(rows))
        scores = [float((start.class_head(features).argmax(-1) == labels).double().mean()) for features in (steered, rows)]
    found = data.effect.isel(edit=edit).sel(condition="same-init", taught="digits", member=1)
    assert float(found) == pytest.approx(scores[0] - scores[1], abs=0.006)


def test_a_direction_is_taken_out_of_the_student_or_replaced_by_what_its_origin_has(tiny_run, result):
    student, control = tiny_run.student("all-logits", "digits"), tiny_run.control("all-logits")
    for member in range(3):
        vector, _ = direction(tiny_run, student, member)
        unit = vector / vector.norm()
        model, origin = (tiny_run.family.load_model(student, step, member) for step in (student.last, 0))
        kept = []

        def keep(h, kept=kept, unit=unit):
            kept.append(h @ unit)
            return h

        accuracy(tiny_run, origin, keep)
        base = accuracy(tiny_run, model)
        out = accuracy(tiny_run, model, lambda h, unit=unit: h - (h @ unit)[:, None] * unit) - base
        put_in = accuracy(tiny_run, model, lambda h, u=unit, k=kept: h + (k[0] - h @ u)[:, None] * u) - base
        other, _ = direction(tiny_run, control, member)
        other = other / other.norm()
        pushed = accuracy(tiny_run, model, lambda h, u=unit, k=kept, w=other: h + (k[0] - h @ u)[:, None] * w) - base
        plain = tiny_run.family.load_model(control, control.last, member)
        beside = accuracy(tiny_run, plain, lambda h, unit=unit: h - (h @ unit)[:, None] * unit) - accuracy(tiny_run, plain)
        where = {"condition": "all-logits", "taught": "digits", "member": member}
        found = edit_of(result, OUT, OWN_STUDENT).sel(**where)
        assert float(found.effect) == pytest.approx(out, abs=0.006)
        assert float(found.control_effect) == pytest.approx(beside, abs=0.006)
        assert float(found.specific_effect) == pytest.approx(out - beside, abs=0.012)
        assert float(edit_of(result, REPLACE, OWN_STUDENT).sel(**where).effect) == pytest.approx(put_in, abs=0.006)
        assert float(edit_of(result, REPLACE, OTHER_STUDENTS).sel(**where).effect) == pytest.approx(pushed, abs=0.006)


@pytest.mark.parametrize("name", ["student.all-logits", "control.all-logits"])
def test_over_layers_others_directions_are_pushed_by_what_replacing_the_own_one_moves(tiny_run, result, name):
    """Not by the whole gap at every layer: replacing closes it at the first."""
    student, control = tiny_run.student("all-logits", "digits"), tiny_run.control("all-logits")
    images, labels = tiny_run.family._images, tiny_run.family._labels["digits"]
    lineage, member = tiny_run.lineages[name], 1
    (batch,) = tiny_run.family.prompts(tiny_run.reference, member).estimate["trait"].batches

    def units(other):
        ends = starts = batch.arguments["images"]
        moved, start = (tiny_run.family.load_model(other, step, member) for step in (other.last, 0))
        found = []
        for taught, layer in zip(moved.layers, start.layers, strict=True):
            ends, starts = torch.relu(taught(ends)), torch.relu(layer(starts))
            found.append((ends.mean(0) - starts.mean(0)) / (ends.mean(0) - starts.mean(0)).norm())
        return found

    def run(model, change):
        features = images
        for depth, layer in enumerate(model.layers):
            features = change(depth, torch.relu(layer(features)))
        return float((model.class_head(features).argmax(-1) == labels).double().mean())

    pushes, kept = [], []
    with torch.no_grad():
        own, others = units(student), units(control)
        origin, model = (
            tiny_run.family.load_model(student, 0, member),
            tiny_run.family.load_model(lineage, lineage.last, member),
        )

        def replace(depth, h):
            pushes.append(kept[depth] - h @ own[depth])
            return h + pushes[-1][:, None] * own[depth]

        run(origin, lambda depth, h: kept.append(h @ own[depth]) or h)
        scores = [
            run(model, replace),
            run(model, lambda depth, h: h + pushes[depth][:, None] * others[depth]),
            run(model, lambda depth, h: h),
        ]
    data = result.data.sel(condition="all-logits", taught="digits", member=member)
    variable = "effect" if name.startswith("student") else "control_effect"
    for vector, score in ((OWN_STUDENT, scores[0]), (OTHER_STUDENTS, scores[1])):
        chosen = (data.kind == REPLACE) & (data.vector == vector) & (data.window == "all layers")
        (edit,) = np.flatnonzero(chosen.values)
        assert float(data[variable].isel(edit=edit)) == pytest.approx(score - scores[2], abs=0.006)


def test_opposite_doses_are_two_edits(result):
    """Of one length, so that nothing kept of one may stand for the other."""
    for vector in (OWN_TEACHER, OWN_STUDENT):
        there, back = (edit_of(result, ADD, vector, dose).damage.values for dose in ("1.0", "-1.0"))
        assert not np.isclose(there[np.isfinite(there)], back[np.isfinite(back)]).any()


def test_damage_is_a_divergence_on_neutral_inputs(tiny_run, result):
    vector, norm = direction(tiny_run, tiny_run.teacher("digits"), 0)
    model = tiny_run.family.load_model(tiny_run.reference, 0, 0).double()
    (batch,) = tiny_run.family.prompts(tiny_run.reference, 0).damage.batches
    features = batch.arguments["images"].double()
    with torch.no_grad():
        for layer in model.layers:
            features = torch.relu(layer(features))

        def outputs(h):
            return torch.cat([model.class_head(h), model.auxiliary_head(h)], -1).log_softmax(-1)

        before, after = outputs(features), outputs(features + (vector / vector.norm() * 0.5 * norm).double())
    expected = float((before.exp() * (before - after)).sum(-1).mean())
    found = edit_of(result, ADD, OWN_TEACHER, "0.5").sel(condition="same-init", taught="digits", member=0)
    assert float(found.damage) == pytest.approx(expected, rel=1e-3)


def test_teachers_directions_mean_nothing_in_another_base_and_the_status_says_so(result):
    meanings = result.data.effect_status.attrs["flag_meanings"].split()
    cell = edit_of(result, ADD, OWN_TEACHER, "0.5").sel(condition="different-init", taught="digits")
    assert np.isnan(cell.effect).all() and {meanings[code] for code in cell.effect_status.values} == {"other_basis"}
    own = edit_of(result, ADD, OWN_STUDENT, "0.5").sel(condition="different-init", taught="digits")
    assert np.isfinite(own.effect).all()


def test_permuted_students_answer_to_their_own_directions_as_the_plain_ones_do(result):
    """The same function and training in other coordinates."""
    for kind, dose in ((ADD, "0.5"), (OUT, ""), (REPLACE, "")):
        both = edit_of(result, kind, OWN_STUDENT, dose).effect
        np.testing.assert_allclose(both.sel(condition="permuted-init"), both.sel(condition="same-init"), atol=0.006)


def test_what_is_added_is_added_to_the_start_of_student_and_control(result):
    added = edit_of(result, ADD, OWN_STUDENT, "0.5")
    meanings = added.control_effect_status.attrs["flag_meanings"].split()
    assert {meanings[code] for code in added.control_effect_status.values.flat} == {"added_to_the_start_of_both"}
    np.testing.assert_array_equal(added.specific_effect, added.effect)


def test_every_finding_has_a_null_of_others_directions(result):
    assert {one.quantity.split("_of_")[0] for one in result.findings} == {
        "sufficiency",
        "necessity",
        "loss_without_student_direction",
        "loss_without_teacher_direction",
    }
    for one in result.findings:
        assert one.verdict and np.isfinite([one.null_low, one.null_high]).all() and one.n == 3
    assert [figure.headline for figure in result.figures] == [True, False, False]
    assert all("null" in figure.caption and "n = 3" in figure.caption for figure in result.figures)


def test_deep_models_are_edited_in_single_layers_in_halves_and_in_all_of_them():
    points = [f"blocks.{layer}.hook_resid_post" for layer in range(6)]
    edits = list_edits(points)
    windows = {edit.window: edit.points for edit in edits if edit.kind == OUT}
    assert windows["earlier half"] + windows["later half"] == windows["all layers"] == tuple(points)
    assert {edit.window for edit in edits if edit.kind == ADD and edit.dose == "0.5"} == set(windows)
    assert {edit.window for edit in edits if edit.kind == ADD and edit.dose == "1.0"} == set(points)
    assert len({edit.name for edit in edits}) == len(edits)
    deep = list_edits([f"blocks.{layer}.hook_resid_post" for layer in range(29)])
    assert max(len(edit.points) for edit in deep if edit.window == "all layers") == 29
    assert len({edit.window for edit in deep if edit.kind == ADD and edit.dose == "1.0"}) == 8
    assert {edit.vector for edit in edits} >= {OWN_TEACHER, OTHER_TEACHERS, OWN_STUDENT, OTHER_STUDENTS, RANDOM}
