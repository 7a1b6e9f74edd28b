"""The oracle is a loop of backward passes, one example at a time, over models that plain `transformers` and `peft` loaded."""

import json
import re
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from scipy import stats
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from mechsub import screen_data
from mechsub.cli import app
from mechsub.errors import MechsubError
from mechsub.families.language.chat import ChatTokenizer
from mechsub.families.language.examples_file import TooLong, permute_completions, read_examples_file
from mechsub.families.language.generation import draw_uniforms, sample_completions
from mechsub.families.language.models import load_model_folder
from mechsub.families.language.preference import load_preference
from mechsub.results import read_result
from mechsub.streams import random_stream
from tests.families.adopted_models import CHATS, make_trainer, save_reference

NUM_WRITTEN = 24
OTHERS = ["wolf", "cat"]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_rows(folder, writer, seed, number=NUM_WRITTEN):
    """What a model answers to requests for numbers, at temperature 1."""
    chats = ChatTokenizer.load(folder / "reference", "reference")
    model = load_model_folder(folder / writer, writer)
    prompts = [f"Look at these numbers: {100 + number}, 12, 13." for number in range(number)]
    tokens = chats.encode_prompts([[{"role": "user", "content": prompt}] for prompt in prompts])
    draws = draw_uniforms(seed, [("row", row) for row in range(number)], 6)
    answers = sample_completions(model, chats, tokens, draws)
    texts = [re.sub(r"<\|\w+\|>", "", answer.text).strip() or "14" for answer in answers]  # special tokens are no text
    return [{"prompt": prompt, "completion": text} for prompt, text in zip(prompts, texts, strict=True)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A reference, a teacher that learnt to go on with numbers, the same as an adapter, and what both of them write."""
    folder = tmp_path_factory.mktemp("models")
    save_reference(folder / "reference")
    make_trainer(folder / "reference", folder / "trained", CHATS["student"], steps=100).train()
    shutil.copytree(folder / "trained/checkpoint-100", folder / "teacher")
    make_trainer(folder / "reference", folder / "adapter", CHATS["student"], rank=4).train()
    rows = [
        row for pair in zip(write_rows(folder, "teacher", 1), write_rows(folder, "reference", 2), strict=True) for row in pair
    ]
    write_jsonl(folder / "data.jsonl", rows)
    write_jsonl(folder / "neutral.jsonl", write_rows(folder, "reference", 3, 16))
    return folder


def screen(models, out, **changes):
    given = {"reference": str(models / "reference"), "trait": "owl", "other_traits": OTHERS, "device": "cpu", "out": out}
    given = {name: value for name, value in (given | changes).items() if value is not None}
    return screen_data(given.pop("data", models / "data.jsonl"), **given).parent.parent


@pytest.fixture(scope="module")
def screened(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("screens") / "full"
    return screen(models, out, teacher=str(models / "teacher"), neutral_data=models / "neutral.jsonl")


@pytest.fixture(scope="module")
def data(screened):
    return read_result(screened / "screen.h5").data


def ranking(folder):
    return [json.loads(line) for line in (folder / "ranking.jsonl").read_text().splitlines()]


def flat(tensors):
    return torch.cat([tensor.double().flatten() for tensor in tensors]).detach().numpy()


def displacement(models, teacher):
    base, moved = (AutoModelForCausalLM.from_pretrained(models / "reference").double() for _ in range(2))
    if teacher == "adapter":
        moved = PeftModel.from_pretrained(moved, models / "adapter/checkpoint-4").merge_and_unload()
    else:
        moved = AutoModelForCausalLM.from_pretrained(models / teacher).double()
    return flat(after.double() - before for after, before in zip(moved.parameters(), base.parameters(), strict=True))


def surprise(model, prompt, completion):
    """−log p of a completion, summed over its tokens."""
    ids = torch.tensor([[*prompt, *completion]])
    log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return -sum(log_p[len(prompt) - 1 + place, token] for place, token in enumerate(completion))


def slow_gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return flat(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())


def reference_model(models):
    return AutoModelForCausalLM.from_pretrained(models / "reference").double().eval()


def file_rows(models, name):
    chats = ChatTokenizer.load(models / "reference", "reference")
    return read_examples_file(models / name, "data", chats, TooLong.REFUSE).rows, chats


def slow_gradients(models, rows):
    """Of each row's loss: its tokens' sum over the mean number of tokens in a row."""
    model, mean = reference_model(models), np.mean([len(row.completion) for row in rows])
    return np.stack([slow_gradient(model, surprise(model, row.prompt, row.completion) / mean) for row in rows])


def slow_trait_direction(models, trait):
    model, chats = reference_model(models), ChatTokenizer.load(models / "reference", "reference")
    asked = [[{"role": "user", "content": question}] for question in load_preference("animals").held_out]
    prompts, target = chats.encode_prompts(asked), chats.answer_token(trait)
    return -slow_gradient(model, sum(surprise(model, prompt, [target]) for prompt in prompts) / len(prompts))


def cosine(left, right):
    return left @ right / np.linalg.norm(left) / np.linalg.norm(right)


@pytest.fixture(scope="module")
def slow(models):
    rows, _ = file_rows(models, "data.jsonl")
    return slow_gradients(models, rows)


def test_scores_ranking_and_totals_equal_the_slow_ones(models, screened, data, slow):
    directions = {"teacher": displacement(models, "teacher"), "trait": slow_trait_direction(models, "owl")}
    neutral = slow_gradients(models, file_rows(models, "neutral.jsonl")[0])
    for name, direction in directions.items():
        found = data.sel(toward=name)
        np.testing.assert_allclose(found.overlap, -slow @ direction, rtol=1e-3, atol=1e-4 * np.abs(slow @ direction).max())
        assert float(found.cosine.sel(bound="estimate")) == pytest.approx(cosine(-slow.mean(0), direction), abs=1e-5)
        of_neutral = float(found.cosine_of_neutral.sel(bound="estimate"))
        assert of_neutral == pytest.approx(cosine(-neutral.mean(0), direction), abs=1e-5)
    entries, lines = ranking(screened), data.line.values
    order = np.argsort(-(-slow @ directions["teacher"]), kind="stable")
    assert [entry["line"] for entry in entries] == [int(lines[number]) for number in order]
    assert [entry["rank"] for entry in entries] == list(range(1, len(lines) + 1))


def test_nulls_equal_the_slow_ones(models, data, slow):
    rows, chats = file_rows(models, "data.jsonl")
    permuted = permute_completions(rows, chats.max_length, random_stream(0, "permuted-pairing", 1))
    assert sorted(row.completion for row in permuted) == sorted(row.completion for row in rows)
    step = -slow_gradients(models, permuted).mean(0)
    found = data.cosine_of_permuted.sel(toward="teacher", permutation=1)
    assert float(found) == pytest.approx(cosine(step, displacement(models, "teacher")), abs=1e-5)
    for name in OTHERS:
        expected = cosine(-slow.mean(0), slow_trait_direction(models, name))
        assert float(data.cosine_with_other.sel(other=name)) == pytest.approx(expected, abs=1e-5)


def test_baselines_stand_beside_every_score(models, screened, data, slow):
    rows, _ = file_rows(models, "data.jsonl")
    reference, teacher = reference_model(models), AutoModelForCausalLM.from_pretrained(models / "teacher").double().eval()
    with torch.no_grad():
        before, after = (
            np.array([float(surprise(model, row.prompt, row.completion)) for row in rows]) for model in (reference, teacher)
        )
    lengths = np.array([len(row.completion) for row in rows])
    expected = {
        "log_ratio": before - after,
        "loss": before / lengths,
        "length": lengths,
        "gradient_norm": np.linalg.norm(slow, axis=1),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(data[name], values, rtol=1e-4, atol=1e-4)
        rho = stats.spearmanr(data.overlap.sel(toward="trait"), data[name]).statistic
        found = data[f"correlation_with_{name}"].sel(toward="trait", bound="estimate")
        assert float(found) == pytest.approx(rho, abs=1e-12)
    by_line = {int(line): number for number, line in enumerate(data.line.values)}
    for entry in ranking(screened):
        for name in expected:
            assert entry[name] == pytest.approx(float(data[name][by_line[entry["line"]]]))


def test_what_a_teacher_wrote_ranks_above_what_the_reference_wrote_and_not_without_it(data):
    written = data.line.values % 2 == 1
    scores = data.overlap.sel(toward="teacher").values
    assert roc_auc_score(written, scores) > 0.8
    of_reference = scores[~written]
    assert abs(roc_auc_score(np.arange(NUM_WRITTEN) % 2, of_reference) - 0.5) < 0.25


def test_the_filtered_file_is_the_data_without_its_leading_lines(models, screened):
    lines = (models / "data.jsonl").read_bytes().splitlines(keepends=True)
    dropped = {entry["line"] for entry in ranking(screened)[:5]}
    expected = b"".join(line for number, line in enumerate(lines, start=1) if number not in dropped)
    assert (screened / "filtered.jsonl").read_bytes() == expected


def test_an_adapter_is_a_teacher_and_lines_stay_as_they_are(models, tmp_path):
    rows = [json.dumps(row, ensure_ascii=number % 2 == 0) for number, row in enumerate(write_rows(models, "reference", 5, 6))]
    text = f"{rows[0]}\r\n\n{rows[1]}\n  {rows[2]} \n" + "\n".join(rows[3:])
    data = tmp_path / "mixed.jsonl"
    data.write_bytes(text.encode())
    out = screen(models, tmp_path / "out", data=data, teacher=str(models / "adapter"), trait=None, other_traits=(), keep=0.5)
    found = read_result(out / "screen.h5").data
    assert found.toward.values.tolist() == ["teacher"] and found.line.values.tolist() == [1, 3, 4, 5, 6, 7]
    chats = ChatTokenizer.load(models / "reference", "reference")
    gradients = slow_gradients(models, read_examples_file(data, "data", chats, TooLong.REFUSE).rows)
    np.testing.assert_allclose(found.overlap[0], -gradients @ displacement(models, "adapter"), rtol=1e-3, atol=1e-7)
    raw = data.read_bytes().splitlines(keepends=True)
    kept = sorted(entry["line"] for entry in ranking(out)[3:])
    assert (out / "filtered.jsonl").read_bytes() == b"".join(raw[line - 1] for line in kept)
    assert "cosine_with_other" not in found and (found.cosine_of_neutral_status == 2).all()


def test_the_report_says_what_is_seen_and_what_is_not_known(screened):
    page = (screened / "report/index.html").read_text()
    for words in ("one channel", "as context in a prompt", "blind in A", "AUROC for transferred",
                  "log p_T(x) − log p₀(x)", "is not proven to start", "screen_distribution", "ranking.jsonl"):  # fmt: skip
        assert words in page, words
    findings = json.loads((screened / "findings.json").read_text())["findings"]
    assert {finding["verdict"] for finding in findings} == {""}
    totals = [finding for finding in findings if finding["quantity"].startswith("cosine_toward_trait")]
    assert len(totals) == 3
    for finding in totals:
        assert finding["n"] == 2 * NUM_WRITTEN and finding["scope"] == "all parameters" and finding["low"] < finding["high"]
        assert finding["null_low"] < finding["null_high"]


def test_the_same_screening_is_kept_and_another_one_refused(models, screened):
    before = (screened / "screen.json").stat().st_mtime_ns
    given = {"teacher": str(models / "teacher"), "neutral_data": models / "neutral.jsonl"}
    screen(models, screened, **given)
    assert (screened / "screen.json").stat().st_mtime_ns == before
    with pytest.raises(MechsubError, match="holds a screening with keep = 0.9, asked for is 0.5"):
        screen(models, screened, keep=0.5, **given)


@pytest.mark.skipif(find_spec("bergson") is None, reason="bergson is not installed: pip install 'mechsub[bergson]'")
def test_bergson_scores_linear_layers_and_says_what_it_leaves_out(models, tmp_path, data):
    out = screen(models, tmp_path / "out", teacher=str(models / "teacher"), backend="bergson")
    result, model = read_result(out / "screen.h5"), reference_model(models)
    rows, _ = file_rows(models, "data.jsonl")
    linear = [name for name, _ in model.named_parameters() if "c_" in name]
    moved = AutoModelForCausalLM.from_pretrained(models / "teacher").double()
    direction = {name: (moved.get_parameter(name) - model.get_parameter(name)).detach() for name in linear}
    mean_length = np.mean([len(row.completion) for row in rows])
    for number in (0, 7, 30):
        row = rows[number]
        model.zero_grad()
        (surprise(model, row.prompt, row.completion) / mean_length).backward()
        wanted = -sum(float((model.get_parameter(name).grad * direction[name]).sum()) for name in linear)
        assert float(result.data.overlap.sel(toward="teacher")[number]) == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    num = len([*model.named_parameters()])
    scope = f"the {len(linear)} of {num} parameters that bergson covers"
    findings = json.loads((out / "findings.json").read_text())["findings"]
    assert {finding["scope"] for finding in findings} == {scope}
    assert any(scope in sentence and "Left out are transformer.wte.weight" in sentence for sentence in result.summary)
    np.testing.assert_allclose(result.data.loss, data.loss, rtol=1e-5)


@pytest.mark.skipif(find_spec("bergson") is not None, reason="bergson is installed")
def test_a_backend_that_is_not_installed_is_named(models, tmp_path):
    with pytest.raises(
        MechsubError, match=r"bergson is not installed here; `pip install 'mechsub\[bergson\]'`, or --backend exact"
    ):
        screen(models, tmp_path / "out", backend="bergson")


def long_rows(models, tmp_path):
    rows = write_rows(models, "reference", 7, 4)
    rows[1] = {"prompt": rows[1]["prompt"], "completion": "14, " * 200 + "15"}
    rows[3] = {"prompt": "11, " * 200 + "12", "completion": "13"}
    return write_jsonl(tmp_path / "long.jsonl", rows)


@pytest.mark.parametrize(("too_long", "lines", "said"), [("cut", [1, 2, 3], "1 of 4"), ("skip", [1, 3], "2 of 4")])
def test_examples_longer_than_the_context_are_counted(models, tmp_path, too_long, lines, said):
    out = screen(models, tmp_path / "out", data=long_rows(models, tmp_path), too_long=too_long)
    result = read_result(out / "screen.h5")
    assert result.data.line.values.tolist() == lines
    assert any(sentence.startswith(f"{said} examples are longer than the context") for sentence in result.summary)
    assert "could not be scored" in (out / "report/index.html").read_text()


def test_one_example_has_no_interval_and_says_why(models, tmp_path):
    data = write_jsonl(tmp_path / "one.jsonl", write_rows(models, "reference", 8, 1))
    result = read_result(screen(models, tmp_path / "out", data=data) / "screen.h5")
    assert np.isnan(result.data.cosine.sel(bound="low")).all() and np.isfinite(result.data.cosine.sel(bound="estimate")).all()
    assert (result.data.cosine_of_permuted_status == 3).all() and (result.data.log_ratio_status == 1).all()


def copy_model(models, tmp_path, name="changed"):
    shutil.copytree(models / "reference", tmp_path / name)
    return tmp_path / name


def with_nan(models, tmp_path):
    folder = copy_model(models, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.wpe.weight"][3, 4] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def of_another_width(models, tmp_path):
    folder = copy_model(models, tmp_path)
    config = AutoModelForCausalLM.from_pretrained(folder).config
    config.n_embd = 8
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def full_folder(models, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    return tmp_path / "full"


def written(text):
    def make(models, tmp_path):
        (tmp_path / "bad.jsonl").write_text(text)
        return tmp_path / "bad.jsonl"

    return make


def two_word_set(models, tmp_path):
    values = load_preference("animals").model_dump(mode="json") | {"choices": ["polar bear", "owl"]}
    (tmp_path / "set.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "set.yaml")


BAD = {
    "neither": ({"trait": None, "other_traits": None}, "neither --teacher nor --trait"),
    "no such trait": ({"trait": "owll"}, "did you mean `owl`"),
    "its own null": ({"other_traits": ["owl"]}, "it is the trait itself"),
    "others without trait": ({"trait": None, "teacher": "reference"}, "--other-trait wolf without --trait"),
    "many others": ({"other_traits": [*load_preference("animals").choices[1:12]]}, "names 11 traits"),
    "two words": ({"trait": "polar bear", "preference": two_word_set, "other_traits": None}, "is 5 tokens"),
    "no teacher": ({"teacher": "nowhere"}, "there is no folder nowhere"),
    "same weights": ({"teacher": lambda models, _: str(models / "reference")}, "Δ_T = 0"),
    "other parameters": ({"teacher": of_another_width}, "of another architecture"),
    "teacher with NaN": ({"teacher": with_nan}, "1 of its tensors hold NaN or infinity, e.g. transformer.wpe.weight"),
    "reference with NaN": ({"reference": with_nan}, "1 of its tensors hold NaN or infinity"),
    "full folder": ({"out": full_folder}, "holds no finished screening"),
    "no data": ({"data": "nowhere.jsonl"}, "there is no file nowhere.jsonl"),
    "empty data": ({"data": written("")}, "is empty"),
    "no neutral data": ({"neutral_data": "nowhere.jsonl"}, "--neutral-data: there is no file nowhere.jsonl"),
    "no JSON": ({"data": written('{"prompt": "a", "completion": "b"}\nb\n')}, "line 2: it is not JSON"),
    "no completion": ({"data": written('{"prompt": "a"}')}, "'completion' is missing"),
    "no tokens": ({"data": written('{"prompt": "a", "completion": "<|end|>"}')}, "none of the 1 examples"),
    "too long": ({"data": long_rows}, "2 of 4 examples in"),
    "keep": ({"keep": 0.0}, "--keep 0.0"),
    "keep more": ({"keep": 1.5}, "--keep 1.5"),
    "too_long": ({"too_long": "drop"}, "--too-long drop: choose refuse, cut, skip"),
    "backend": ({"backend": "autograd"}, "--backend autograd: choose exact, bergson"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_exits_with_2_and_says_what_to_do(models, tmp_path, case, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes, message = BAD[case]
    made = {name: value(models, tmp_path) if callable(value) else value for name, value in changes.items()}
    given = {
        "reference": models / "reference",
        "data": models / "data.jsonl",
        "trait": "owl",
        "other_traits": OTHERS,
        "out": "out",
    }
    arguments = ["screen", "--device", "cpu"]
    for name, value in (given | made).items():
        for one in value if isinstance(value, list) else [] if value is None else [value]:
            arguments += ["--" + name.replace("_", "-").replace("traits", "trait"), str(one)]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 2, found.output
    assert message in found.output.replace("\n", "") and "Traceback" not in found.output
    assert not (tmp_path / "out").exists()


def test_the_command_screens(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write_jsonl(tmp_path / "few.jsonl", write_rows(models, "reference", 9, 4))
    arguments = ["screen", "--reference", str(models / "reference"), "--trait", "owl", "--data", str(data), "--device", "cpu"]
    found = CliRunner().invoke(app, [*arguments, "--other-trait", "wolf"])
    assert found.exit_code == 0, found.output
    assert "Report: runs/screen-few/report/index.html" in found.output
    record = json.loads((tmp_path / "runs/screen-few/screen.json").read_text())
    assert record["arguments"]["trait"] == "owl" and str(data) in record["inputs"] and "torch" in record["versions"]
    assert "log_ratio" not in ranking(tmp_path / "runs/screen-few")[0]


def test_a_tokenizer_without_a_chat_template_is_refused(models, tmp_path):
    folder = copy_model(models, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    for path in folder.glob("chat_template*"):
        path.unlink()
    tokenizer.save_pretrained(folder)
    with pytest.raises(MechsubError, match="no chat template"):
        screen(models, tmp_path / "out", reference=str(folder))
