import numpy as np
import pytest
import torch

from mechsub.activations.probes import RIDGE
from mechsub.analyses.representation_similarity import representation_similarity
from mechsub.api import run_experiment
from mechsub.recipe import load_recipe
from mechsub.representations import STATUS, Comparer, Unknown
from mechsub.results import write_result

FIRST, LAST = POINTS = ("blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post")
TRAIT, NEUTRAL = GROUPS = ("trait: image", "neutral: image")
ELSEWHERE = ("different-init", "different-init-all-logits")


@pytest.fixture(scope="module")
def result(tiny_run):
    return representation_similarity(tiny_run)


def hidden(run, lineage, step, member, group=TRAIT):
    """What the hidden layers give, by the weights."""
    kind = group.partition(":")[0]
    rows = run.family.prompts(run.reference, member).estimate[kind].batches[0].arguments["images"]
    weights, found = lineage.load_state(step, member), {}
    for layer, point in enumerate(POINTS):
        rows = torch.relu(rows @ weights[f"layers.{layer}.weight"].T + weights[f"layers.{layer}.bias"])
        found[point] = rows.double().numpy()
    return found


def models(run, condition, member, point, group=TRAIT):
    """Rows of student, control, reference and teacher."""
    lineages = [run.student(condition, "digits"), run.control(condition), run.reference, run.teacher("digits")]
    return [hidden(run, lineage, lineage.last, member, group)[point] for lineage in lineages]


def slow_cka(left, right):
    """From matrices of rows × rows, centred as Székely and Rizzo centre them (2014): another way to the same number."""
    n, kernels = len(left), []
    for rows in (left, right):
        kernel = rows @ rows.T
        np.fill_diagonal(kernel, 0.0)
        sums, total = kernel.sum(0) / (n - 2), kernel.sum() / ((n - 1) * (n - 2))
        kernel = kernel - sums[:, None] - sums + total
        np.fill_diagonal(kernel, 0.0)
        kernels.append(kernel)
    one, other = kernels
    return (one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum())


def cell(result, name, condition="same-init", member=1, **chosen):
    return float(result.data[name].sel(condition=condition, taught="digits", member=member, **chosen))


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("condition", ["same-init", "different-init"])
def test_cka_is_that_of_matrices_of_rows_by_rows(tiny_run, result, condition, point, group):
    student, control, _, teacher = models(tiny_run, condition, 1, point, group)
    where = {"condition": condition, "point": point, "group": group}
    assert cell(result, "cka", **where) == pytest.approx(slow_cka(student, teacher), abs=1e-5)
    assert cell(result, "cka_of_control", **where) == pytest.approx(slow_cka(control, teacher), abs=1e-5)
    start = hidden(tiny_run, tiny_run.student(condition, "digits"), 0, 1, group)[point]
    assert cell(result, "cka_of_start", **where) == pytest.approx(slow_cka(start, teacher), abs=1e-5)
    assert int(result.data.num_rows.sel(condition=condition, member=1, group=group).item()) == len(student)


@pytest.mark.parametrize("point", POINTS)
def test_in_the_subspace_of_one_trait_it_is_that_of_one_projection(tiny_run, result, point):
    student, control, reference, teacher = models(tiny_run, "same-init", 1, point)
    direction = teacher.mean(0) - reference.mean(0)
    direction /= np.linalg.norm(direction)
    where = {"point": point, "group": TRAIT}
    for name, rows in (("", student), ("_of_control", control), ("_of_start", reference)):
        expected = slow_cka(rows @ direction[:, None], teacher @ direction[:, None])
        assert cell(result, f"trait_subspace_cka{name}", **where) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("group", GROUPS)
def test_a_rotation_of_even_prompts_is_tried_on_odd_ones(tiny_run, result, group):
    student, _, _, teacher = models(tiny_run, "same-init", 1, LAST, group)
    (x, y), (u, v) = ([rows[half::2] - rows[half::2].mean(0) for rows in (student, teacher)] for half in (0, 1))
    left, _, right = np.linalg.svd(x.T @ y)
    expected = ((u @ left @ right - v) ** 2).sum() / (v**2).sum()
    assert cell(result, "procrustes_distance", point=LAST, group=group) == pytest.approx(expected, rel=1e-4)


def halves(rows):
    return [rows[half::2] for half in (0, 1)]


def slow_probe(one, other):
    covariance = (np.cov(one.T, bias=True) + np.cov(other.T, bias=True)) / 2
    ridge = RIDGE * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    return np.linalg.solve(covariance + ridge, one.mean(0) - other.mean(0))


def slow_separation(probe, one, other):
    return (one.mean(0) - other.mean(0)) @ probe / np.sqrt(((one @ probe).var() + (other @ probe).var()) / 2)


@pytest.mark.parametrize("point", POINTS)
def test_probes_are_fitted_on_one_half_and_tried_on_the_other(tiny_run, result, point):
    student, control, reference, teacher = (halves(rows) for rows in models(tiny_run, "same-init", 1, point))
    frozen = [slow_probe(*pair) for pair in zip(teacher, reference, strict=True)]

    def tried(probes, one, other):
        return np.mean([slow_separation(*parts) for parts in zip(probes, one[::-1], other[::-1], strict=True)])

    way = sum(
        probe @ (one.mean(0) - other.mean(0)) for probe, one, other in zip(frozen, teacher[::-1], reference[::-1], strict=True)
    )
    for name, rows in (("", student), ("_of_control", control)):
        refitted = [slow_probe(*pair) for pair in zip(rows, reference, strict=True)]
        gone = sum(
            probe @ (one.mean(0) - other.mean(0)) for probe, one, other in zip(frozen, rows[::-1], reference[::-1], strict=True)
        )
        assert cell(result, f"frozen_probe_share{name}", point=point) == pytest.approx(gone / way, abs=1e-3)
        assert cell(result, f"frozen_probe_separation{name}", point=point) == pytest.approx(
            tried(frozen, rows, reference), abs=1e-3
        )
        assert cell(result, f"refitted_probe_separation{name}", point=point) == pytest.approx(
            tried(refitted, rows, reference), abs=1e-3
        )
    known = result.data.teacher_probe_separation.sel(taught="digits", member=1, point=point)
    assert float(known) == pytest.approx(tried(frozen, teacher, reference), abs=1e-3)


@pytest.mark.parametrize("condition", ["same-init", "different-init"])
def test_what_the_head_reads_of_the_way_is_read_by_each_models_own(tiny_run, result, condition):
    def read(lineage, step):
        head = lineage.load_state(step, 1)["class_head.weight"].double().numpy()
        return hidden(tiny_run, lineage, step, 1)[LAST] @ (head - head.mean(0)).T

    student, teacher = tiny_run.student(condition, "digits"), tiny_run.teacher("digits")
    gone = read(student, student.last) - read(student, 0)
    way = read(teacher, teacher.last) - read(tiny_run.reference, 0)
    expected = (gone * way).sum() / (way**2).sum()
    assert cell(result, "readout_share", condition=condition, point=LAST) == pytest.approx(expected, abs=1e-5)
    assert (result.data.readout_share_status.sel(point=FIRST) == Unknown.NO_READOUT).all()


def test_students_in_another_order_of_units_measure_the_same_through_the_map(result):
    """The start is the reference in other coordinates, and training is the same: so the two conditions must agree."""
    for name in ("trait_subspace_cka", "frozen_probe_share", "frozen_probe_separation", "readout_share"):
        own, permuted = (result.data[name].sel(condition=condition).values for condition in ("same-init", "permuted-init"))
        known = np.isfinite(own)
        assert known.any()
        np.testing.assert_allclose(permuted[known], own[known], rtol=0.1, atol=0.02)
    assert (result.data.basis_correlation.sel(condition="permuted-init") > 0.999).all()
    assert (result.data.basis_correlation.sel(condition="same-init") == 1).all()


def test_across_bases_that_no_rotation_maps_only_what_needs_none_is_given(result):
    for condition in ELSEWHERE:
        chosen = result.data.sel(condition=condition)
        assert (chosen.basis_correlation**2 < 0.5).all()
        assert np.isfinite(chosen.cka).all() and np.isfinite(chosen.refitted_probe_separation).all()
        for name in ("trait_subspace_cka", "frozen_probe_share", "frozen_probe_separation"):
            assert (chosen[f"{name}_status"] == Unknown.INCOMPARABLE).all()
            assert np.isnan(chosen[name]).all()
    assert any("different-init: " in sentence and "incomparable" in sentence for sentence in result.summary)


def test_every_missing_value_has_its_reason_and_the_file_holds_them(result, tmp_path):
    write_result(tmp_path / "result.h5", "representation_similarity", {}, "0", result)
    assert "incomparable" in STATUS and STATUS[0] == "ok"


def test_findings_name_rows_null_and_what_was_before_training(result):
    found = {(one.quantity, one.condition, one.scope.partition(",")[0]): one for one in result.findings if TRAIT in one.scope}
    one = found["cka", "same-init", LAST]
    assert one.n == 3 and one.verdict and "1024 rows" in one.scope and one.margin == 0.02
    assert "before anything was learnt it was" in one.null and np.isfinite([one.null_low, one.null_high]).all()
    assert found["cka", "same-init", FIRST].verdict == "" and LAST in found["cka", "same-init", FIRST].reason
    assert found["frozen_probe_share", "permuted-init", LAST].scope.endswith("mapped by a rotation fitted to both starts")
    assert ("frozen_probe_share", "different-init", LAST) not in found
    assert found["refitted_probe_separation", "same-init", LAST].verdict == ""


def test_figures_show_students_beside_their_null(result):
    names = ["cka_by_condition", "frozen_probe_shares", "cka_by_place"]
    assert [figure.name for figure in result.figures] == names
    for figure in result.figures:
        assert "null" in figure.caption and "n = 3" in figure.caption
    assert [figure.headline for figure in result.figures] == [True, False, False]


@pytest.fixture(scope="module")
def still(tiny_recipe, tmp_path_factory):
    """Nothing moves far: teachers are like their references, and students are not like their teachers in anything new."""
    settings = ["members=3", "conditions={same-init: }", "verdict={minimum_members: 3, margin: 0.2}"]
    settings += [
        "student.optimizer={name: sgd, learning_rate: 1.0e-30}",
        "teacher.optimizer={name: sgd, learning_rate: 1.0e-4}",
    ]
    out = tmp_path_factory.mktemp("runs") / "still"
    return run_experiment(load_recipe(tiny_recipe, settings), out, device="cpu", workers=0)


def test_a_high_cka_without_transfer_is_warned_of(still):
    found = representation_similarity(still)
    assert (found.data.cka > 0.99).all()
    (warning,) = [sentence for sentence in found.summary if sentence.startswith("Warning")]
    assert "same-init: CKA with the teacher is high, 1.00 on average" in warning and "arXiv:2511.01023" in warning
    assert "no-transfer" in warning


def test_hook_points_in_turns_give_what_all_at_once_give(tiny_run, monkeypatch):
    monkeypatch.setattr("mechsub.paired_activations._MOST_BYTES", 1)
    turned = Comparer(tiny_run)
    turned.compare_all()
    monkeypatch.undo()
    whole = Comparer(tiny_run)
    whole.compare_all()
    for name in ("compared", "probed", "separations", "correlations"):
        assert getattr(turned, name) == getattr(whole, name), name


def test_students_that_have_not_moved_have_gone_no_part_of_the_way(still):
    comparer = Comparer(still)
    comparer.compare_all()
    student = still.student("same-init", "digits")
    for point in POINTS:
        assert comparer.probed["digits", student.name, 0][point, "refitted_probe_separation"] == 0.0
        assert comparer.probed["digits", student.name, 0][point, "frozen_probe_separation"] == pytest.approx(0.0, abs=1e-9)
