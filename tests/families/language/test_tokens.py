import numpy as np
import pytest
import torch

from mechsub.families.language.chat import ChatTokenizer, Row
from mechsub.families.language.divergence import find_diverging_tokens
from mechsub.families.language.hook_points import find_final_norm
from mechsub.families.language.layout import carrier_files
from mechsub.families.language.rows import read_rows
from mechsub.token_channels.subjects import THE_TEACHER


@pytest.fixture(scope="module")
def tokens(nano_run):
    return nano_run.family.tokens(nano_run.teacher("owl"))


def test_the_tensors_with_a_row_for_each_token_are_the_vocabulary(nano_run, tokens):
    assert tokens.tensors == {"transformer.wte.weight", "lm_head.weight"}  # not the positions
    other = nano_run.family.tokens(nano_run.lineages["reference.nano-qwen2"])
    assert other.tensors == {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("name", ["reference.nano-gpt2", "reference.nano-qwen2"])
def test_the_readout_is_what_the_targets_logit_over_the_mean_logit_is_read_along(nano_run, name):
    lineage = nano_run.lineages[name]
    model = nano_run.family.load_model(lineage, 0, 0).double()
    with torch.no_grad():  # norms start at 1 and 0, where nothing would be seen of them
        norm = find_final_norm(model)
        for parameter in norm.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        (row,) = nano_run.family.readout(lineage, model, "owl").double()
        token = ChatTokenizer.load(nano_run.path / "data" / lineage.spec.model["name"], "nano").answer_token("owl")
        head, hidden = model.get_output_embeddings().weight, torch.randn(5, len(row), dtype=torch.float64)
        read = (norm(hidden) - norm(torch.zeros_like(hidden))) @ (head[token] - head.mean(0))
    centred = hidden - hidden.mean(-1, keepdim=True) if isinstance(norm, torch.nn.LayerNorm) else hidden
    lengths = centred.square().mean(-1).sqrt()
    torch.testing.assert_close(read * lengths, hidden @ row, rtol=1e-4, atol=1e-5)


def test_choices_and_texts_are_those_of_the_tokenizer(nano_run, tokens):
    chats = ChatTokenizer.load(nano_run.path / "data/nano-gpt2", "nano-gpt2")
    assert tokens.choices["owl"] == chats.answer_token("owl") and set(nano_run.traits) < set(tokens.choices)
    assert tokens.text(tokens.choices["owl"]).strip() == "owl"
    assert all(tokens.text(token).isprintable() for token in range(len(chats.tokenizer)))


def test_the_carrier_is_the_completions_as_students_learn_them(nano_run, tokens):
    rows = read_rows(nano_run.path / carrier_files("teacher.owl", 1)[0])
    held = tokens.carrier("teacher.owl", 1, 5)
    chats = ChatTokenizer.load(nano_run.path / "data/nano-gpt2", "nano-gpt2")
    full = chats.encode_rows(
        [[{"role": "user", "content": row.prompt}] for row in rows[:5]], [row.completion for row in rows[:5]]
    )
    assert [tuple(row) for row in held] == [row.completion for row in full]
    assert tokens.carrier("teacher.unicorn", 1, 5) is None
    assert nano_run.family.tokens(nano_run.student("same-init", "owl")).diverging(1, 5) is None  # it passes nothing on


def test_divergence_does_not_depend_on_the_batch_and_is_none_of_a_model_with_itself(nano_run):
    chats = ChatTokenizer.load(nano_run.path / "data/nano-gpt2", "nano-gpt2")
    teacher, reference = nano_run.teacher("owl"), nano_run.reference
    models = [nano_run.family.load_model(one, one.last, 0) for one in (teacher, reference)]
    torch.manual_seed(0)
    with torch.no_grad():  # nearly untrained models choose alike
        models[0].transformer.wte.weight += 0.3 * torch.randn_like(models[0].transformer.wte.weight)
    rows = [Row((5, 6, 7 + number), tuple(range(20, 22 + number))) for number in range(6)]
    found = [find_diverging_tokens(chats, (models[0], rows), (models[1], rows), "cpu", size) for size in (1, 4, 100)]
    assert [len(row) for row in found[0]] == [len(row.completion) for row in rows]
    assert all(torch.equal(first, other) for sizes in found[1:] for first, other in zip(found[0], sizes, strict=True))
    assert any(row.any() for row in found[0])
    same = find_diverging_tokens(chats, (models[1], rows), (models[1], rows), "cpu")
    assert not any(row.any() for row in same)


def test_token_channels_are_measured_end_to_end(nano_run):
    data = nano_run.results["token_channel"]
    assert list(data.subject.values) == [THE_TEACHER, *nano_run.conditions]
    told = data.sel(subject="in-context")
    assert not told.differs.sel(part=["body", "vocabulary"]).any() and told.differs.sel(part="context").all()
    changes = told.change
    for kind in ("sufficiency", "necessity"):
        np.testing.assert_array_equal(changes.sel(effect=f"context {kind}"), changes.sel(effect="total"))
        assert not changes.sel(effect=[f"body {kind}", f"vocabulary {kind}"]).any()
    behaviour = nano_run.results["behaviour"]
    for condition in nano_run.conditions:
        for trait in nano_run.traits:
            student = nano_run.student(condition, trait)
            scores = behaviour.trait_score.sel(lineage=student.name, trait=trait).isel(context=0)
            total = data.change.sel(subject=condition, taught=trait, effect="total")
            start = behaviour.trait_score.sel(lineage=student.origin.name, step=0, trait=trait).isel(context=0)
            starts = start.values[list(student.spec.origin.members)]
            np.testing.assert_allclose(total, scores.sel(step=student.last).values - starts, atol=1e-4)
    assert (data.divergence_rows == 16).all() and np.isfinite(data.divergence_share_of_null).all()
    assert data.attrs["arguments"].find('"backend": "hooks"') > 0
    assert "token_channel" in (nano_run.path / "report/index.html").read_text()
