"""The oracle is a loop of backward passes on the examples, one at a time, in float64."""

import numpy as np
import pytest
import torch

from mechsub.analyses.example_overlap import STATUS, Why, example_overlap
from mechsub.errors import AnalysisError
from mechsub.lineages import Lineage
from mechsub.run import Run

MEMBER = 2
TRAIT = "digits"


@pytest.fixture
def data(tiny_run):
    return tiny_run.results["example_overlap"].sel(taught=TRAIT)


def flat(tensors):
    return torch.cat([tensor.double().flatten() for tensor in tensors.values()]).numpy()


def gradients(run, lineage, losses):
    """[example, parameter], and which layer each parameter lies in."""
    model = run.family.load_model(lineage, 0, MEMBER)
    found = []
    for number in range(losses.num_examples):
        model.zero_grad()
        losses.compute(model, range(number, number + 1)).sum().backward()
        found.append(flat({name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}))
    return np.stack(found)


def displacement(run, name):
    lineage = run.lineages[name]
    first, last = (lineage.load_state(step, MEMBER) for step in (0, lineage.last))
    return flat({name: last[name] - first[name] for name in first})


def layers(run):
    tensors = run.reference.spec.tensors
    return np.concatenate([[info.layer] * int(np.prod(info.shape)) for info in tensors.values()])


def cosine(left, right):
    return left @ right / np.linalg.norm(left) / np.linalg.norm(right)


@pytest.mark.parametrize("condition", ["same-init", "different-init", "all-logits"])
def test_every_number_equals_the_slow_one(tiny_run, data, condition):
    found = data.sel(condition=condition, member=MEMBER)
    student, control = tiny_run.student(condition, TRAIT), tiny_run.control(condition)
    trait = gradients(tiny_run, student, tiny_run.family.trait_losses(student, MEMBER, TRAIT)).mean(0)
    teacher, neutral = displacement(tiny_run, "teacher"), displacement(tiny_run, "neutral.relabelled")
    directions, means, of_layer = {"teacher": teacher, "trait": -trait, "neutral": neutral}, [], layers(tiny_run)
    for who, lineage in (("", student), ("_of_control", control)):
        steps = -gradients(tiny_run, lineage, tiny_run.family.imitation_losses(lineage, MEMBER, 512))
        means.append(steps.mean(0))
        np.testing.assert_allclose(found[f"gradient_norm{who}"], np.linalg.norm(steps, axis=1), rtol=1e-4)
        for toward, direction in directions.items():
            one, overlaps = found.sel(toward=toward), steps @ direction
            scale = np.sqrt((steps**2).sum(1).mean()) * np.linalg.norm(direction)
            np.testing.assert_allclose(one[f"overlap{who}"], overlaps, atol=2e-6 * scale, rtol=1e-3)
            assert float(one[f"mean_overlap{who}"]) == pytest.approx(overlaps.mean(), abs=2e-6 * scale)
            assert float(one[f"overlap_sd{who}"]) == pytest.approx(overlaps.std(ddof=1), rel=1e-4)
            assert float(one[f"positive_share{who}"]) == pytest.approx((overlaps > 0).mean(), abs=0.011)
            assert float(one[f"cosine{who}"]) == pytest.approx(cosine(steps.mean(0), direction), abs=2e-5)
            wanted = np.quantile(overlaps / scale, one["quantile"].values)
            np.testing.assert_allclose(one[f"overlap_quantile{who}"], wanted, atol=2e-5)
            inside = of_layer == "layer 1"
            expected = cosine(steps.mean(0)[inside], direction[inside])
            assert float(one[f"layer_cosine{who}"].sel(layer="layer 1")) == pytest.approx(expected, abs=2e-5)
    assert float(found.specific_cosine) == pytest.approx(cosine(means[0] - means[1], teacher - neutral), abs=2e-5)


def test_a_small_step_on_an_example_moves_along_the_teacher_and_lowers_the_trait_loss_as_its_overlaps_say(tiny_run, data):
    student = tiny_run.student("all-logits", TRAIT)
    found = data.sel(condition="all-logits", member=MEMBER)
    losses, trait = (
        tiny_run.family.imitation_losses(student, MEMBER, 512),
        tiny_run.family.trait_losses(student, MEMBER, TRAIT),
    )
    teacher, step = displacement(tiny_run, "teacher"), 1e-3
    for example in (0, 5):
        model = tiny_run.family.load_model(student, 0, MEMBER).double()

        def trait_loss(model=model):
            images, labels = tiny_run.family._images.double(), tiny_run.family._labels[TRAIT]
            with torch.no_grad():
                return float(torch.nn.functional.cross_entropy(model(images)[:, :10], labels))

        assert trait.num_examples == len(tiny_run.family._images)
        single = tiny_run.family.load_model(student, 0, MEMBER)
        losses.compute(single, range(example, example + 1)).sum().backward()
        before, start = trait_loss(), flat(model.state_dict()).copy()
        with torch.no_grad():
            for parameter, source in zip(model.parameters(), single.parameters(), strict=True):
                if source.grad is not None:
                    parameter -= step * source.grad.double()
        moved = flat(model.state_dict()) - start
        overlaps = found.overlap.sel(example=example)
        assert moved @ teacher / step == pytest.approx(float(overlaps.sel(toward="teacher")), rel=1e-3, abs=1e-6)
        assert (before - trait_loss()) / step == pytest.approx(float(overlaps.sel(toward="trait")), rel=0.02, abs=1e-4)


def test_every_example_of_a_small_carrier_is_asked(data):
    assert (np.isfinite(data.loss).sum("example") == 96).all() and data.sizes["example"] == 96
    assert ((data.positive_share >= 0) & (data.positive_share <= 1)).all()


def test_findings_name_scope_null_and_n(tiny_run):
    found = tiny_run.findings.query("analysis == 'example_overlap'")
    names = {f"{name}_toward_{toward}" for name in ("cosine", "positive_share") for toward in ("teacher", "trait", "neutral")}
    assert set(found.quantity) == names | {"specific_cosine"}
    assert (found.n == 3).all() and (found.step == 0).all() and (found.scope == "all parameters").all()
    assert (found["null"] != "").all() and (found.formula != "").all() and np.isfinite(found.null_low).all()
    judged = found[found.verdict != ""]
    assert set(judged.quantity) == {name for name in set(found.quantity) if "neutral" not in name}
    assert (found[found.verdict == ""].reason != "").all()


def test_the_report_shows_the_distributions(tiny_run):
    page = (tiny_run.path / "report/index.html").read_text()
    assert "Where single steps on the carrier" in page and "a step goes along its teacher" in page


@pytest.fixture
def changed(tiny_run, monkeypatch):
    """The tiny run, opened anew, for tests that change what its family says."""
    run = Run(tiny_run.directory)
    return run, lambda name, value: monkeypatch.setattr(type(run.family), name, value)


def codes(result, name, **chosen):
    return {STATUS[code] for code in np.unique(result.data[f"{name}_status"].sel(**chosen))}


def test_without_imitation_losses_there_is_nothing_but_the_reason(changed):
    run, change = changed
    change("imitation_losses", lambda self, lineage, member, most: None)
    result = example_overlap(run)
    assert not result.findings and not result.figures
    assert codes(result, "overlap") == codes(result, "loss_of_control") == {"no_imitation_loss"}
    assert any("learnt is not known example by example" in sentence for sentence in result.summary)


def test_a_prompted_teacher_leaves_the_overlap_with_the_trait(changed, monkeypatch):
    run, _ = changed
    monkeypatch.setattr(Lineage, "last", property(lambda self: 0 if self.name == "teacher" else self.steps[-1]))
    result = example_overlap(run)
    assert codes(result, "cosine", toward="teacher") == codes(result, "specific_cosine") == {"no_displacement"}
    assert codes(result, "cosine", toward="trait") == codes(result, "cosine", toward="neutral") == {"ok"}
    assert {finding.quantity.rpartition("_")[2] for finding in result.findings} == {"trait", "neutral"}
    assert any("has no displacement; the overlap with the trait" in sentence for sentence in result.summary)


def test_a_trait_without_a_loss_leaves_the_overlap_with_the_displacement(changed):
    run, change = changed
    change("trait_losses", lambda self, lineage, member, trait: None)
    result = example_overlap(run)
    assert codes(result, "cosine", toward="trait") == {"no_trait_loss"}
    assert codes(result, "cosine", toward="teacher") == codes(result, "specific_cosine") == {"ok"}


def test_without_a_control_there_is_no_null_and_no_verdict(changed, monkeypatch):
    run, _ = changed
    monkeypatch.setattr(Run, "control", lambda self, condition: None)
    result = example_overlap(run)
    assert codes(result, "cosine_of_control") == codes(result, "specific_cosine") == {"no_control"}
    assert {finding.verdict for finding in result.findings} == {""}
    assert all(finding.null.startswith("none") for finding in result.findings)


def test_a_layer_that_is_not_known_is_named_and_not_skipped(changed, monkeypatch):
    run, _ = changed

    def refuse(*arguments):
        raise AnalysisError("the gradient of x cannot be taken example by example")

    monkeypatch.setattr("mechsub.analyses.example_overlap.read_examples", refuse)
    result = example_overlap(run)
    assert codes(result, "overlap") == {"unknown_layer"}
    assert any("the gradient of x cannot" in sentence for sentence in result.summary)


def test_students_of_another_architecture_have_only_the_traits_gradient(changed, monkeypatch):
    run, _ = changed
    monkeypatch.setattr(Run, "why_incomparable", lambda self, condition: "it is wider" if condition == "same-init" else "")
    result = example_overlap(run)
    assert codes(result, "cosine", condition="same-init", toward="teacher") == {Why.INCOMPARABLE.name.lower()}
    assert codes(result, "cosine", condition="same-init", toward="trait") == {"ok"}
    assert codes(result, "cosine", condition="all-logits", toward="teacher") == {"ok"}
    assert any("it is wider" in sentence for sentence in result.summary)
