import pytest
import torch

from mechsub.api import open_run, run_experiment
from mechsub.families.language.carrier import encode_carrier
from mechsub.families.language.chat import ChatTokenizer
from mechsub.families.language.layout import carrier_files
from mechsub.families.language.loss import completion_logits, completion_tokens, mean_loss, token_losses
from mechsub.families.language.rows import read_rows
from mechsub.gradients.losses import mean_gradient

MEMBER = 1


def test_the_mean_over_rows_is_the_mean_over_tokens_that_students_minimise(nano_run):
    student = nano_run.student("different-init", "wolf")
    model = nano_run.family.load_model(student, 0, MEMBER)
    chats = ChatTokenizer.load(nano_run.path / "data/nano-gpt2", "nano-gpt2")
    rows = encode_carrier(chats, read_rows(nano_run.path / carrier_files("teacher.wolf", MEMBER)[0]), None)
    batch = chats.pad_rows(rows)
    wanted = mean_loss(token_losses(completion_logits(model, batch), completion_tokens(batch)))
    losses = nano_run.family.imitation_losses(student, MEMBER, 16)
    torch.testing.assert_close(losses.compute(model, range(16)).mean(), wanted)
    wanted.backward()
    for name, gradient in mean_gradient(model, losses).items():
        torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad)


def test_distributions_are_imitated_where_the_condition_says_so(nano_run):
    student = nano_run.student("all-logits", "owl")
    losses = nano_run.family.imitation_losses(student, MEMBER, 6)
    teacher = nano_run.family.load_model(nano_run.teacher("owl"), nano_run.teacher("owl").last, MEMBER)
    reference = nano_run.family.load_model(nano_run.reference, 0, MEMBER)
    assert "all-logits" in losses.description
    found = [losses.compute(model, range(6)).detach() for model in (teacher, reference)]
    assert found[0].abs().max() < 1e-6 < found[1].min()


def test_the_trait_loss_is_the_surprise_of_the_target(nano_run):
    student, reference = nano_run.student("same-init", "owl"), nano_run.reference
    model = nano_run.family.load_model(reference, 0, MEMBER)
    losses = nano_run.family.trait_losses(student, MEMBER, "owl")
    scores = nano_run.family.trait_score(model, student, MEMBER)
    column = list(nano_run.family.traits).index("owl")
    p = torch.exp(-losses.compute(model, range(losses.num_examples))).mean().detach()
    assert float(p) == pytest.approx(scores["probability"][column, 0], rel=1e-5)


def test_who_was_shown_its_rows_learnt_nothing(nano_run):
    assert nano_run.family.imitation_losses(nano_run.student("in-context", "owl"), MEMBER, 4) is None


def test_a_merged_model_is_the_adapted_one_with_the_lineages_own_tensors(nano_recipe, nano_cache, tmp_path):
    settings = ["adapter={rank: 2}", "conditions={same-init: {}}", "traits=[owl]"]
    run_experiment(nano_recipe, tmp_path / "run", settings, device="cpu", workers=0)
    adapter_run = open_run(tmp_path / "run")
    student = adapter_run.student("same-init", "owl")
    beside = adapter_run.family.load_model(student, student.last, 0)
    merged = adapter_run.family.load_model(student, student.last, 0, merged=True)
    ids = torch.arange(5, 25)[None]
    torch.testing.assert_close(merged(input_ids=ids).logits, beside(input_ids=ids).logits, atol=1e-5, rtol=1e-4)
    assert {name for name, _ in merged.named_parameters()} == {
        n for n, info in student.spec.tensors.items() if info.tied_to is None
    }
