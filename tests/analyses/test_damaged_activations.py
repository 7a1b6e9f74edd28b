"""A checkpoint that holds NaN costs its own cells, with the reason, and nothing else."""

import numpy as np
import pytest
import torch

from mechsub.analyses.representation_similarity import representation_similarity
from mechsub.analyses.steering_directions import steering_directions
from mechsub.analyses.steering_effect import steering_effect
from mechsub.api import run_experiment
from mechsub.families.classifier.family import Family
from mechsub.recipe import load_recipe
from mechsub.results import write_result

BROKEN = 1
"""The member."""


@pytest.fixture(scope="module")
def small(tiny_recipe, tmp_path_factory):
    settings = ["members=3", "conditions={same-init: }", "verdict={minimum_members: 3, margin: 0.05}"]
    out = tmp_path_factory.mktemp("runs") / "small"
    return run_experiment(load_recipe(tiny_recipe, settings), out, device="cpu", workers=0)


@pytest.fixture
def damage(monkeypatch):
    """One weight of one member of a lineage at its last step."""
    load = Family.load_model

    def damage(name):
        def broken(family, lineage, step, member, **settings):
            model = load(family, lineage, step, member, **settings)
            if lineage.name == name and step == lineage.last and member == BROKEN:
                with torch.no_grad():
                    model.layers[0].weight[0, 0] = float("nan")
            return model

        monkeypatch.setattr(Family, "load_model", broken)

    return damage


VARIABLES = {
    steering_directions: "control_adjusted_steering_alignment",
    steering_effect: "specific_effect",
    representation_similarity: "cka",
}


@pytest.fixture(scope="module")
def whole(small):
    """Every analysis of the sound run."""
    return {analysis: analysis(small) for analysis in VARIABLES}


@pytest.mark.parametrize("lineage", ["student.same-init", "teacher", "control.same-init"])
@pytest.mark.parametrize("analysis", VARIABLES, ids=lambda one: one.__name__)
def test_nan_in_a_checkpoint_is_nan_in_its_own_member_only(small, whole, damage, tmp_path, analysis, lineage):
    damage(lineage)
    found = analysis(small)
    write_result(tmp_path / "result.h5", "damaged", {}, "0", found)  # it refuses a NaN that nothing explains
    name = VARIABLES[analysis]
    if name == "cka" and lineage == "control.same-init":
        name = "cka_of_control"
    before, after = (one.data[name] for one in (whole[analysis], found))
    others = [member for member in range(3) if member != BROKEN]
    np.testing.assert_allclose(after.sel(member=others), before.sel(member=others), rtol=1e-6, atol=1e-9)
    lost = np.isnan(after.sel(member=BROKEN)) & ~np.isnan(before.sel(member=BROKEN))
    assert lost.any() and not (~np.isnan(after) & np.isnan(before)).any()
    codes = found.data[f"{name}_status"].sel(member=BROKEN)
    meanings = codes.attrs["flag_meanings"].split()
    assert {meanings[code] for code in codes.values[lost.values]} <= {"not_finite", "no_score"}
    if analysis is steering_effect:
        total = "teacher_effect" if lineage == "teacher" else "student_effect"
        assert np.isnan(found.data[total].sel(member=BROKEN)).all()
