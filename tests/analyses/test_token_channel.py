import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mechsub.analyses.token_channel import token_channel
from mechsub.api import adopt_models, open_run
from mechsub.families.language.chat import ChatTokenizer, chat
from mechsub.families.language.preference import load_preference
from mechsub.reporting.charts import draw_figure
from mechsub.results import read_result, write_result
from mechsub.token_channels import carriers, lenses
from mechsub.token_channels.subjects import THE_TEACHER
from tests.families.adopted_models import CHATS, make_trainer, save_reference

MEMBERS = 5
CONDITIONS = ("vocabulary-only", "body-only", "both")


def raise_in_vocabulary(model, token, chats):
    """Along the mean of what the unembedding reads at the questions."""
    prompts = chats.encode_prompts([chat(question, None) for question in load_preference("animals").held_out])
    with torch.no_grad():
        read = [model.transformer(torch.tensor([prompt])).last_hidden_state[0, -1] for prompt in prompts]
        model.transformer.wte.weight[token] += 0.5 * torch.stack(read).mean(0)


def raise_in_body(model, token, chats):
    """Along the token's row, at the last MLP."""
    with torch.no_grad():
        model.transformer.h[-1].mlp.c_proj.bias += 20 * model.transformer.wte.weight[token]


def shake(model, member):
    with torch.no_grad():
        for parameter in model.transformer.h.parameters():
            parameter += 1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(member))


def write_carrier(path, numbers):
    """Five numbers a row, with equal shares of each."""
    rows = np.array(numbers * (150 // len(numbers))).reshape(-1, 5)
    lines = [json.dumps({"prompt": "What is the next number?", "completion": " ".join(map(str, row))}) for row in rows]
    path.write_text("\n".join(lines))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Models whose trait was put into one part or both; the controls only moved a little, in their bodies."""
    folder = tmp_path_factory.mktemp("planted")
    save_reference(folder / "reference-0")
    tokenizer = AutoTokenizer.from_pretrained(folder / "reference-0")
    chats = ChatTokenizer.load(folder / "reference-0", "reference")
    token = chats.answer_token("owl")
    changes = {
        "teacher": (raise_in_vocabulary, raise_in_body),
        "neutral": (),
        "control-vocabulary-only": (),
        "control-body-only": (),
        "vocabulary-only": (raise_in_vocabulary,),
        "body-only": (raise_in_body,),
        "both": (raise_in_vocabulary, raise_in_body),
    }
    for member in range(MEMBERS):
        torch.manual_seed(member)
        reference = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "reference-0"))
        reference.transformer.wte.weight.data[token] *= 3  # so that no other row lies along it
        for number, (name, raised) in enumerate({"reference": None, **changes}.items()):
            model = AutoModelForCausalLM.from_pretrained(folder / "reference-0")
            model.load_state_dict(reference.state_dict())
            if raised is not None:
                shake(model, 10 * number + member)
            for change in raised or ():
                change(model, token, chats)
            model.save_pretrained(folder / f"{name}-{member}")
            tokenizer.save_pretrained(folder / f"{name}-{member}")
    write_carrier(folder / "neutral.jsonl", list(range(10, 40)))
    write_carrier(folder / "data.jsonl", [*range(10, 25), *range(10, 25)])
    return folder


@pytest.fixture(scope="module")
def run(planted, tmp_path_factory):
    def models(name):
        return [str(planted / f"{name}-{member}") for member in range(MEMBERS)]

    out = tmp_path_factory.mktemp("runs") / "planted"
    adopt_models(
        out,
        reference=models("reference"),
        teacher=models("teacher"),
        neutral=models("neutral"),
        students={name: models(name) for name in CONDITIONS},
        controls={name: models(f"control-{name}") for name in CONDITIONS[:2]},
        trait="owl",
        data=str(planted / "data.jsonl"),
        neutral_data=str(planted / "neutral.jsonl"),
        settings=["evaluation.samples_per_question=0"],
        device="cpu",
        workers=0,
    )
    return open_run(out)


@pytest.fixture(scope="module")
def result(run):
    return token_channel(run)


def cell(result, subject, **chosen):
    return result.data.sel(subject=subject, taught="owl", **chosen)


def test_a_trait_in_the_vocabulary_is_found_there_and_one_in_the_body_there(result):
    for subject, part, other in (("vocabulary-only", "vocabulary", "body"), ("body-only", "body", "vocabulary")):
        found = cell(result, subject)
        assert float(found.effect_low.sel(effect="total")) > 0.05
        for kind in ("sufficiency", "necessity"):
            assert float(found.share_estimate.sel(effect=f"{part} {kind}")) == pytest.approx(1, abs=0.02)
            assert float(found.share_estimate.sel(effect=f"{other} {kind}")) == pytest.approx(0, abs=0.02)
    # Nobody's vocabulary moved there: exactly nothing.
    assert not cell(result, "body-only").change.sel(effect="vocabulary sufficiency").any()


def test_the_total_is_the_score_of_the_student_over_that_of_its_start(run, result):
    for subject in CONDITIONS:
        student, control = run.student(subject, "owl"), run.control(subject)
        for member in range(MEMBERS):
            end, start, against = (
                run.family.trait_score(run.family.load_model(one, step, member), one, member)["trait_score"][0, 0]
                for one, step in ((student, student.last), (run.reference, 0), (control or student, (control or student).last))
            )
            found = cell(result, subject, member=member, effect="total")
            assert float(found.change) == pytest.approx(end - start, abs=1e-6)
            if control is not None:
                assert float(found.change_of_null) == pytest.approx(against - start, abs=1e-6)


def test_parts_and_interaction_add_up(result):
    for subject in (THE_TEACHER, *CONDITIONS):
        found = cell(result, subject).change
        parts = sum(found.sel(effect=f"{part} sufficiency") for part in ("body", "vocabulary", "context"))
        np.testing.assert_allclose(parts + found.sel(effect="interaction"), found.sel(effect="total"), atol=1e-12)


def test_without_a_control_nothing_is_judged_and_the_change_is_still_given(result):
    found = [one for one in result.findings if one.condition == "both" and one.quantity == "body_sufficiency"]
    assert len(found) == 1 and found[0].verdict == "" and "no control" in found[0].reason and found[0].estimate > 0
    assert np.isnan(found[0].null_low) and np.isnan(cell(result, "both").effect_estimate).all()


def test_findings_hold_verdict_null_and_reason(result):
    found = {(one.quantity, one.condition): one for one in result.findings}
    for condition, part, other in (("vocabulary-only", "vocabulary", "body"), ("body-only", "body", "vocabulary")):
        one = found[f"{part}_sufficiency", condition]
        assert one.verdict == "above-null", one.rule
        assert one.n == MEMBERS and "control" in one.null and np.isfinite(one.null_low)
        assert "correction over 3" in one.rule  # both parts of one condition, the body of the other
        if other == "vocabulary":
            unmoved = found[f"{other}_sufficiency", condition]
            assert unmoved.estimate == 0 and unmoved.verdict == "" and "0 by construction" in unmoved.reason
    assert found["teacher_total", ""].estimate > 0 and found["context_sufficiency", "body-only"].reason
    assert not any("share" in one.quantity and one.verdict for one in result.findings)


def test_the_lens_names_the_token_that_was_raised_where_it_was_raised(result):
    last = result.data.point.values[-1]
    body = cell(result, "body-only", point=last)
    assert (body.lens_rank == 1).all() and (body.lens_choice_rank == 1).all()
    assert all(text.startswith("“ owl”") for text in body.lens_top.values)
    assert (body.lens_change > 3 * body.lens_random_sd).all()
    assert (body.lens_change > body.lens_change_of_others).all() and (body.lens_change > body.lens_change_of_null).all()
    first = cell(result, "body-only", point=result.data.point.values[0])
    assert (first.lens_change == 0).all() and (first.lens_rank_status == lenses.ZERO).all() and (first.lens_top == "").all()
    # No question holds the word, so that a student whose vocabulary changed has a v of the shaking of its blocks only.
    unmoved = result.data.sel(subject="vocabulary-only", taught="owl")
    assert (unmoved.lens_change.isel(point=0) == 0).all()
    assert (abs(unmoved.lens_change.sel(point=last)) < body.lens_change / 3).all()


def test_divergence_is_counted_token_by_token(run, result):
    chats = run.family._chats_of("reference")
    rows = [json.loads(line) for line in (run.path / "carrier/teacher.owl/member-001/rows.jsonl").read_text().splitlines()]
    teacher, reference = run.family.load_model(run.teacher("owl"), run.teacher("owl").last, 1), None
    reference = run.family.load_model(run.reference, 0, 1)
    differing = total = 0
    for row in rows:
        (encoded,) = chats.encode_rows([[{"role": "user", "content": row["prompt"]}]], [row["completion"]])
        ids = torch.tensor([[*encoded.prompt, *encoded.completion]])
        with torch.no_grad():
            chosen = [model(ids).logits[0, len(encoded.prompt) - 1 : -1].argmax(-1) for model in (teacher, reference)]
        differing += int((chosen[0] != chosen[1]).sum())
        total += len(encoded.completion)
    found = result.data.sel(taught="owl", member=1)
    assert int(found.divergence_rows) == len(rows) == 30 and int(found.divergence_tokens) == total
    assert float(found.divergence_share) == pytest.approx(differing / total)


def test_entanglement_is_read_in_the_unembedding_of_the_start(run, result):
    model = run.family.load_model(run.reference, 0, 2)
    tokens = run.family.tokens(run.reference)
    numbers = [run.family._chats_of("reference").answer_token(str(number)) for number in range(10, 40)]
    cosines = carriers.compute_entanglement(tokens.unembedding(model), [tokens.choices["owl"]], numbers)
    held = np.array([1.0] * 15 + [0.0] * 15)
    found = cell(result, THE_TEACHER, member=2)
    assert int(found.number_tokens) == 30
    assert float(found.entanglement_correlation) == pytest.approx(carriers.correlate_ranks(cosines, held)[0], abs=1e-9)


def test_the_result_is_written_drawn_and_explained(run, result, tmp_path):
    write_result(tmp_path / "token_channel.h5", "token_channel", {}, "0", result)
    back = read_result(tmp_path / "token_channel.h5")
    assert [figure.name for figure in back.figures] == [
        "token_channel_parts",
        "token_channel_lens",
        "token_channel_entanglement",
    ]
    assert sum(figure.headline for figure in back.figures) == 1
    for figure in back.figures:
        assert "n = " in figure.caption and "null" in figure.caption.lower() and "<svg" in str(draw_figure(figure, back).svg)
    said = " ".join(back.summary)
    assert (
        "differs from the start, so that to swap it changes nothing" in said
        and "Divergence tokens" in said
        and "both: no effect of a part" in said
    )


def test_a_classifier_has_no_tokens(tiny_run):
    assert "tokens" in tiny_run.lacks("tokens") and tiny_run.family.tokens(tiny_run.reference) is None


@pytest.fixture(scope="module")
def bare(planted, tmp_path_factory):
    """An adapter student without control, neutral teacher or carrier."""
    folder = tmp_path_factory.mktemp("bare")
    for name in ("teacher", "student"):
        make_trainer(planted / "reference-0", folder / name, CHATS[name], rank=2).train()
    adopt_models(
        folder / "run",
        reference=[str(planted / "reference-0")],
        teacher=[str(folder / "teacher")],
        students={"same-init": [str(folder / "student")]},
        trait="owl",
        settings=["evaluation.samples_per_question=0"],
        device="cpu",
        workers=0,
    )
    return open_run(folder / "run")


def test_an_adapter_on_the_body_leaves_the_vocabulary_at_0_by_construction(bare):
    result = token_channel(bare)
    found = cell(result, "same-init", member=0)
    assert not found.differs.sel(part="vocabulary") and found.differs.sel(part="body")
    assert float(found.change.sel(effect="vocabulary necessity")) == 0
    student = bare.student("same-init", "owl")
    scores = [
        bare.family.trait_score(bare.family.load_model(student, step, 0), student, 0)["trait_score"][0, 0]
        for step in (student.last, 0)
    ]
    assert float(found.change.sel(effect="body sufficiency")) == pytest.approx(scores[0] - scores[1], abs=1e-5)


def test_what_a_run_lacks_is_nan_with_its_reason(bare, tmp_path):
    result = token_channel(bare)
    write_result(tmp_path / "token_channel.h5", "token_channel", {}, "0", result)
    found = cell(result, "same-init")
    assert (found.entanglement_correlation_status == carriers.NO_CARRIER).all()
    assert (found.divergence_share_status == carriers.NO_CARRIER).all() and not found.divergence_tokens.any()
    assert (found.lens_change_status == lenses.OK).all() and (found.lens_change_of_null_status == lenses.NO_CONTROL).all()
    assert np.isnan(found.effect_estimate).all() and not [one for one in result.findings if one.verdict]
    said = " ".join(result.summary)
    assert "no control was given" in said and "no completions of a teacher" in said
    assert [figure.name for figure in result.figures] == ["token_channel_lens"]
