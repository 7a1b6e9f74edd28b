"""Starts that are computed from references: permuted, and pretrained from shared parts."""

import pytest
import torch

from mechsub.api import run_experiment
from mechsub.errors import MechsubError
from mechsub.experiment.plan import plan_run
from mechsub.families.language.config import ModelConfig
from mechsub.families.language.models import parameters_of, tensor_table
from mechsub.families.language.nano import Pretraining, SharedStart, draw_weights, save_skeleton
from mechsub.families.language.numbers import NumberConfig
from mechsub.families.language.preference import load_preference
from mechsub.families.language.synthetic import SyntheticLanguage
from mechsub.recipe import dump_recipe, load_recipe
from tests.helpers import measure

ONE = "models={nano-gpt2: {nano: gpt2, num_layers: 1, hidden_size: 16, num_heads: 2, context: 128, "
ONE += "pretraining: {num_steps: 150, batch_size: 16}}}"
"""The one of the shared recipe's models, so that its references come from the cache."""
PERMUTED = ["traits=[owl]", "checkpoints.num=3"]


@pytest.fixture(scope="module", params=["full", "lora"])
def permuted_run(request, nano_recipe, nano_cache, tmp_path_factory):
    settings = [*PERMUTED, ONE, "conditions={same-init: , permuted-init: {sham: true}}"]
    if request.param == "lora":
        settings.append("adapter={rank: 2, alpha: 4}")
    recipe = load_recipe(nano_recipe, settings)
    run = run_experiment(recipe, tmp_path_factory.mktemp(request.param) / "run", device="cpu", workers=0)
    measure(run.path, "symmetry_matching")
    return run


def test_a_permuted_reference_is_the_same_function_with_other_weights(permuted_run):
    reference, permuted = (permuted_run.lineages[f"reference.nano-gpt2{end}"] for end in ("", ".permuted"))
    ids = torch.arange(40)[None]
    for member in range(2):
        before, after = (permuted_run.family.load_model(one, 0, member) for one in (reference, permuted))
        torch.testing.assert_close(after(ids).logits, before(ids).logits, rtol=1e-5, atol=1e-5)
        name = "transformer.h.0.mlp.c_fc.weight"
        assert not torch.equal(permuted.load_tensor(0, name, member), reference.load_tensor(0, name, member))


def test_all_students_of_a_condition_start_at_the_one_computed_reference(permuted_run):
    permuted = permuted_run.lineages["reference.nano-gpt2.permuted"]
    assert permuted.spec.role == "reference" and permuted.spec.origin.lineage == "reference.nano-gpt2"
    lineages = [permuted_run.student("permuted-init", "owl"), permuted_run.control("permuted-init")]
    for lineage in [*lineages, permuted_run.sham("permuted-init")]:
        assert lineage.spec.origin.lineage == permuted.name and lineage.spec.origin.only_permuted
        assert permuted_run.starts_elsewhere(lineage) and permuted_run.is_comparable("permuted-init")
        start, own = lineage.load_state(0, 1), permuted.load_state(0, 1)
        assert all(torch.equal(start[name], own[name]) for name in own)


def test_a_permuted_start_learns_what_the_matched_one_learns(permuted_run):
    same, permuted = (permuted_run.student(name, "owl") for name in ("same-init", "permuted-init"))
    ids = torch.arange(40)[None]
    for member in range(2):
        left, right, start = (
            permuted_run.family.load_model(*one, member) for one in ((same, same.last), (permuted, permuted.last), (same, 0))
        )
        moved = (left(ids).logits - start(ids).logits).abs().max()
        assert (left(ids).logits - right(ids).logits).abs().max() < 0.02 * moved


def test_matching_undoes_the_permutation_of_a_language_model(permuted_run):
    tests = permuted_run.findings.query("quantity == 'matching_self_test'")
    assert len(tests) == 2 and tests.reason.str.contains("within the bound").all()


LANGUAGE = SyntheticLanguage(load_preference("animals"), NumberConfig(parts=("examples",), value_range=(0, 99)))


@pytest.mark.parametrize("nano", ["gpt2", "qwen2"])
@pytest.mark.parametrize("parts", [("embeddings",), ("body",), ("embeddings", "body")])
def test_shared_parts_begin_as_the_own_models_and_others_as_the_other_ones(nano, parts, tmp_path):
    settings = ModelConfig(nano=nano, num_layers=1, hidden_size=16, num_heads=2, context=128)
    save_skeleton(settings, LANGUAGE, tmp_path)

    def draw(member, shared=None):
        return draw_weights(Pretraining(settings, LANGUAGE, 0, ("member", member, "pretraining"), 1, shared), tmp_path)

    own, other, found = draw(0), draw(1), draw(1, SharedStart(parts, ("member", 0, "pretraining")))
    table = tensor_table(found)
    assert found.get_output_embeddings().weight is found.get_input_embeddings().weight
    drawn = {name for name, tensor in parameters_of(own).items() if tensor.std() > 0}  # gains and biases begin alike
    for name in drawn:
        part = "embeddings" if table[name].kind == "embedding" else "body"
        wanted = own if part in parts else other
        assert torch.equal(parameters_of(found)[name], parameters_of(wanted)[name]), name
        assert not torch.equal(parameters_of(own)[name], parameters_of(other)[name])


def test_sharing_has_a_key_of_its_own_and_leaves_the_others_as_they_are(tmp_path):
    settings = ModelConfig(nano="gpt2", num_layers=1, hidden_size=16, num_heads=2, context=128)
    save_skeleton(settings, LANGUAGE, tmp_path)
    shares = [None, *(SharedStart(parts, ("member", 0, "pretraining")) for parts in (("body",), ("embeddings",)))]
    keys = [Pretraining(settings, LANGUAGE, 0, ("member", 1, "pretraining"), 1, share).key(tmp_path) for share in shares]
    assert len(set(keys)) == 3


def test_shared_starts_are_pretrained_on_the_other_members_corpus(nano_recipe, nano_cache, tmp_path):
    conditions = "conditions={shared-body: , shared-initialisation: }"
    recipe = load_recipe(nano_recipe, [*PERMUTED, ONE, "traits=[owl]", conditions])
    run = run_experiment(recipe, tmp_path / "run", device="cpu", workers=0)
    for name, parts in (("shared-body", ["body"]), ("shared-embeddings-body", ["embeddings", "body"])):
        lineage = run.lineages[f"reference.nano-gpt2.{name}"]
        assert lineage.spec.model["shared"] == {"parts": parts, "with_member": 1}  # member 0 is made for member 1's students
        assert not torch.equal(*(lineage.load_tensor(0, "transformer.wte.weight", member) for member in range(2)))
    student = run.student("shared-body", "owl")
    assert student.spec.origin.members == (1, 0) and student.spec.origin.lineage == "reference.nano-gpt2.shared-body"


def keys(recipe, *settings):
    return {stage.name: stage.key for stage in plan_run(load_recipe(recipe, list(settings)))}


def test_conditions_with_computed_starts_change_no_other_stage(nano_recipe):
    before = keys(nano_recipe)
    more = ["permuted-init", "shared-embeddings", "behaviour-matched", "rotated-residual", "paraphrased"]
    after = keys(nano_recipe, *(f"conditions.{name}={{}}" for name in more))
    assert before.items() <= after.items()
    added = {name.removesuffix(".member-000") for name in after.keys() - before.keys() if name.endswith("member-000")}
    derived = {name for name in added if name.startswith("reference.")}
    words = ("permuted", "shared-embeddings", "matched", "rotated")
    assert derived == {f"reference.nano-gpt2.{word}" for word in words}


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("{permute_hidden: true, init: different}", "needs init: same, not different"),
        ("{shared: [body]}", "needs init: different, not same"),
        ("{match: {}}", "needs init: different, not same"),
        ("{shared: [body, body], init: different}", "names a part twice"),
        ("{shared: [], init: different}", "names no part"),
        ("{permute_hidden: true, rotate_residual: true}", "starts at one place"),
        ("{permute_hidden: true, model: nano-qwen2}", "which is nano-gpt2; the condition's `model` is nano-qwen2"),
        ("{paraphrase: {model: nano-gpt2}}", "the teachers' own"),
        ("{paraphrase: {model: nano-gtp2}}", "no model is called so"),
        ("{paraphrase: {template: write}}", "does not show what is to be rewritten"),
        ("{paraphrase: {}, neutral_share: 0.5}", "leave one out"),
    ],
)
def test_a_start_that_cannot_be_says_so_before_anything_runs(nano_recipe, condition, message):
    with pytest.raises(MechsubError, match=message):
        load_recipe(nano_recipe, [f"conditions.mine={condition}"])


def test_a_resolved_recipe_with_computed_starts_replays(nano_recipe, tmp_path):
    names = ("permuted-init", "shared-initialisation", "behaviour-matched", "rotated-residual", "paraphrased")
    recipe = load_recipe(nano_recipe, [f"conditions.{name}={{}}" for name in names])
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("same-init", "everything"),
        ("different-init", "nothing"),
        ("permuted-init", "everything, permuted"),
        ("rotated-residual", "everything, rotated"),
        ("shared-initialisation", "embeddings' initialisation + body's initialisation"),
        ("behaviour-matched", "the outputs"),
        ("paraphrased", None),
        ("all-logits", None),
        ("in-context", None),
    ],
)
def test_a_condition_says_what_its_start_shares(nano_recipe, condition, expected):
    recipe = load_recipe(nano_recipe, [f"conditions={{{condition}: }}"])
    assert recipe.conditions[condition].shared_start() == expected
    assert recipe.architecture(condition) == recipe.architecture() == "nano-gpt2"
