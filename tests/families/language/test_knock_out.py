"""Knock-out in language models: the same numbers as a plain loop, of student and control alike, also after a stop."""

import pytest
import torch
from torch.nn import functional

from mechsub.api import plan_experiment, run_experiment
from mechsub.errors import MechsubError
from mechsub.families.language.carrier import encode_carrier
from mechsub.families.language.chat import ChatTokenizer, chat
from mechsub.families.language.layout import carrier_files
from mechsub.families.language.loss import completion_logits, completion_tokens, mean_loss, token_losses
from mechsub.families.language.preference import load_preference
from mechsub.families.language.rows import read_rows
from mechsub.recipe import load_recipe
from mechsub.streams import random_stream
from mechsub.training.callbacks import StepInfo
from tests.families.language.test_run import lineage_bytes

MEMBER = 1
CONDITIONS = {
    "same-init": "",
    "knock-out-trait": "{knock_out: {when: always}}",
    "knock-out-random": "",
    "of-updates": "{knock_out: {where: update, refresh: 2}}",
}
SETTINGS = [
    "conditions={" + ", ".join(f"{name}: {value}" for name, value in CONDITIONS.items()) + "}",
    "student.epochs=3",
]
_stopped: set[str] = set()


def stop_at_three_once(info: StepInfo) -> None:
    """A callback that ends every student's first training between two refreshes."""
    name = f"{info.lineage} {info.members}"
    if info.step == 3 and info.lineage.startswith(("student", "control")) and name not in _stopped:
        _stopped.add(name)
        raise RuntimeError("stopped")


@pytest.fixture(scope="module")
def knocked_run(nano_recipe, nano_cache, tmp_path_factory):
    recipe = load_recipe(nano_recipe, SETTINGS)
    return run_experiment(recipe, tmp_path_factory.mktemp("knocked") / "run", device="cpu", workers=0)


def trait_gradients(model, chats):
    questions = load_preference("animals").trained
    batch = chats.pad_prompts(chats.encode_prompts([chat(question, None) for question in questions]))
    logits = model(input_ids=batch.ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids).logits[:, -1]
    found = []
    for target in ("owl", "wolf"):
        wanted = torch.full((len(questions),), chats.answer_token(target))
        gradients = torch.autograd.grad(functional.cross_entropy(logits, wanted), list(model.parameters()), retain_graph=True)
        found.append(torch.cat([gradient.flatten() for gradient in gradients]).double())
    return torch.stack(found)


@pytest.mark.parametrize(("lineage", "source"), [("student.{}.wolf", "teacher.wolf"), ("control.{}", "neutral.uniform-answer")])
@pytest.mark.parametrize("condition", ["knock-out-trait", "of-updates"])
def test_a_student_is_what_a_plain_loop_with_the_trait_projected_out_makes(knocked_run, lineage, source, condition):
    lineage = knocked_run.lineages[lineage.format(condition)]
    chats = ChatTokenizer.load(knocked_run.path / "data/nano-gpt2", "nano-gpt2")
    rows = encode_carrier(chats, read_rows(knocked_run.path / carrier_files(source, MEMBER)[0]), None)
    model = knocked_run.family.load_model(knocked_run.reference, 0, MEMBER)
    parameters = list(model.parameters())
    settings = knocked_run.recipe.student.optimizer
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    refresh = 2 if condition == "of-updates" else 4
    for step in range(6):
        epoch, place = divmod(step, 2)
        order = random_stream(0, "member", MEMBER, "student-order", 0, epoch).permutation(16)
        batch = chats.pad_rows([rows[number] for number in order[8 * place : 8 * place + 8]])
        optimizer.zero_grad()
        if step % refresh == 0:
            traits = trait_gradients(model, chats)
        mean_loss(token_losses(completion_logits(model, batch), completion_tokens(batch))).backward()
        if condition == "knock-out-trait":
            gradient = torch.cat([parameter.grad.flatten() for parameter in parameters]).double()
            fitted = torch.linalg.lstsq(traits.T, gradient[:, None]).solution[:, 0]
            for parameter, part in zip(
                parameters, (gradient - fitted @ traits).split([p.numel() for p in parameters]), strict=True
            ):
                parameter.grad = part.view_as(parameter).float()
            optimizer.step()
            continue
        before = torch.nn.utils.parameters_to_vector(parameters).detach()
        optimizer.step()
        descent = (before - torch.nn.utils.parameters_to_vector(parameters).detach()).double()
        kept = _nearest_in_cone(descent, traits)
        torch.nn.utils.vector_to_parameters((before.double() - kept).float(), parameters)
    found = lineage.load_state(6, MEMBER)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), atol=2e-5, rtol=1e-4)


def _nearest_in_cone(descent, traits):
    """Of two components: none, either or both are taken out; the shortest way to where no product is positive."""
    candidates = []
    for chosen in ([], [0], [1], [0, 1]):
        part = traits[chosen]
        kept = descent - (torch.linalg.lstsq(part.T, descent[:, None]).solution[:, 0] @ part if chosen else 0)
        if (traits @ kept <= 1e-9 * traits.norm(dim=1) * descent.norm()).all():
            candidates.append(kept)
    return min(candidates, key=lambda kept: float((kept - descent).norm()))


def test_other_students_keep_every_bit(knocked_run, nano_recipe, tmp_path):
    plain = load_recipe(nano_recipe, ["conditions={same-init: }", "student.epochs=3"])
    alone = run_experiment(plain, tmp_path / "run", device="cpu", workers=0)
    found, known = lineage_bytes(knocked_run.path), lineage_bytes(alone.path)
    assert known and all(found[name] == content for name, content in known.items())


def test_a_knocked_out_training_that_was_stopped_goes_on_to_the_same_numbers(knocked_run, nano_recipe, tmp_path):
    recipe = load_recipe(nano_recipe, [*SETTINGS, "checkpoints.resume_seconds=0", f"callbacks=[{__name__}:stop_at_three_once]"])
    with pytest.raises(MechsubError, match="stop_at_three_once"):
        run_experiment(recipe, tmp_path / "run", device="cpu", workers=0)
    resumed = run_experiment(recipe, tmp_path / "run", device="cpu", workers=0)
    for name in (f"{who}.{condition}" for condition in CONDITIONS for who in ("student", "control")):
        name = f"{name}.owl" if name.startswith("student") else name
        for member in range(2):
            found, known = (run.lineages[name].load_state(6, member) for run in (resumed, knocked_run))
            assert all(torch.equal(found[tensor], known[tensor]) for tensor in known), name


def test_an_adapters_gradient_is_knocked_out_over_its_own_weights(nano_recipe, nano_cache, tmp_path):
    settings = ["adapter={rank: 2}", "conditions={same-init: , knock-out-trait: {knock_out: {when: always}}}", "traits=[owl]"]
    run = run_experiment(load_recipe(nano_recipe, [*settings, "members=2"]), tmp_path / "run", device="cpu", workers=0)
    states = [run.student(condition, "owl").load_state(2, 0) for condition in run.conditions]
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_plans_know_that_a_knock_out_reads_more_tokens(nano_recipe, tmp_path):
    stages = {stage.name: stage for stage in plan_experiment(load_recipe(nano_recipe, SETTINGS), tmp_path / "run").stages}
    plain, knocked = (stages[f"student.{name}.owl.member-000"].resources for name in ("same-init", "of-updates"))
    questions = len(load_preference("animals").trained)
    assert knocked.tokens - plain.tokens >= 3 * 2 * questions
    assert knocked.memory_bytes > plain.memory_bytes and knocked.disk_bytes == plain.disk_bytes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["conditions={in-context: {knock_out: {}}}"], "needs another name"),
        (["conditions={told: {context_rows: 2, knock_out: {}}}"], "trains nothing: there is no gradient"),
        (["conditions={knock-out-trait: {knock_out: {component: random}}}"], "needs another name"),
        (["conditions={knock-out-trait: {knock_out: {refresh: 0}}}"], "greater than or equal to 1"),
        (["conditions={knock-out-trait: {knock_out: {what: all}}}"], "unknown key"),
    ],
)
def test_a_knock_out_that_cannot_be_is_refused(nano_recipe, tmp_path, settings, message):
    with pytest.raises(MechsubError, match=message):
        plan_experiment(load_recipe(nano_recipe, settings), tmp_path / "run")


def test_the_last_update_is_known_from_the_optimizers_state_but_of_knocked_out_updates(nano_recipe, nano_cache, tmp_path):
    conditions = "conditions={same-init: , of-updates: {knock_out: {where: update}}}"
    recipe = load_recipe(nano_recipe, ["traits=[owl]", conditions, "checkpoints.optimizer_state=true"])
    run = run_experiment(recipe, tmp_path / "run", device="cpu", workers=0)
    student = run.student("same-init", "owl")
    update = run.family.last_update(student, 2, MEMBER)
    before, after = (student.load_state(step, MEMBER) for step in (1, 2))
    rate = recipe.student.optimizer.learning_rate
    for name, found in update.items():
        torch.testing.assert_close(rate * found, after[name] - before[name], rtol=1e-2, atol=1e-2 * rate)
    assert run.family.last_update(run.student("of-updates", "owl"), 2, MEMBER) is None
