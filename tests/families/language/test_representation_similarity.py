import numpy as np
import pytest
import torch

from mechsub.activations.hooks import HookBackend
from mechsub.activations.recording import record
from mechsub.analyses.representation_similarity import representation_similarity
from mechsub.representations import Unknown
from mechsub.results import write_result
from tests.analyses.test_representation_similarity import slow_cka

LAST, ALL = "trait: last prompt token", "neutral: all tokens"
POINT = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def result(nano_run):
    return representation_similarity(nano_run)


class Rows:
    """Every position of every prompt at one hook point."""

    def __init__(self):
        self.found = []

    def add(self, point, activations, batch):
        self.found.append(activations.double().clone())


def rows_of(run, lineage, member, kind, policy):
    model = run.family.load_model(lineage, lineage.last, member)
    batches = run.family.prompts(lineage, member).estimate[kind].batches
    point = next(point for point in run.family.hook_points(lineage, model) if point.name == POINT)
    kept = Rows()
    with HookBackend().open(model) as view:
        record(view, batches, [point], [kept])
    chosen = [found[batch.positions[policy]] for found, batch in zip(kept.found, batches, strict=True)]
    return torch.cat(chosen).numpy()


@pytest.mark.parametrize("condition", ["same-init", "different-init", "different-architecture", "in-context"])
def test_models_are_paired_at_the_ends_of_prompts_whatever_their_tokens_and_context(nano_run, result, condition):
    student, teacher = nano_run.student(condition, "wolf"), nano_run.teacher("wolf")
    left, right = (rows_of(nano_run, lineage, 1, "trait", "last prompt token") for lineage in (student, teacher))
    cell = result.data.sel(condition=condition, taught="wolf", member=1, point=POINT, group=LAST)
    assert float(cell.cka) == pytest.approx(slow_cka(left, right), abs=1e-6)
    assert int(cell.num_rows) == len(left)


def test_all_tokens_are_paired_where_both_models_take_the_same_ones(nano_run, result):
    student, teacher = nano_run.student("same-init", "owl"), nano_run.teacher("owl")
    left, right = (rows_of(nano_run, lineage, 0, "neutral", "all tokens") for lineage in (student, teacher))
    cell = result.data.sel(condition="same-init", taught="owl", member=0, point=POINT, group=ALL)
    assert float(cell.cka) == pytest.approx(slow_cka(left, right), abs=1e-6)
    assert int(cell.num_rows) == len(left)
    assert np.isfinite(cell.procrustes_distance)


def test_what_cannot_be_compared_says_why(result):
    other = result.data.sel(condition="different-architecture")
    assert (other.cka_status.sel(group=ALL) == Unknown.ROWS_OF_OTHER_POSITIONS).all()
    assert (other.frozen_probe_share_status == Unknown.INCOMPARABLE).all()
    few = result.data.procrustes_distance_status.sel(condition="same-init", group="neutral: last prompt token")
    assert (few == Unknown.TOO_FEW_ROWS).all()
    assert set(result.data.site.values.tolist()) <= {"resid_pre", "resid_post"}


def test_the_trait_subspace_has_a_direction_for_each_trait(result):
    caption = result.figures[0].caption
    assert "2 directions at most" in caption and "2 traits" in result.summary[0]


def test_the_result_is_written_with_a_reason_for_all_that_is_missing(result, tmp_path):
    write_result(tmp_path / "result.h5", "representation_similarity", {}, "0", result)
    assert {one.trait for one in result.findings} == {"mean over traits", "owl", "wolf"}
