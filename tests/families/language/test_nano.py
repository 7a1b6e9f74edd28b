import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mechsub.families.language import nano
from mechsub.families.language.chat import ChatTokenizer, chat
from mechsub.families.language.config import ModelConfig, PretrainingConfig
from mechsub.families.language.models import tensor_table
from mechsub.families.language.nano import Pretraining, cache_folder, find_or_pretrain, make_tokenizer, save_skeleton
from mechsub.families.language.numbers import NumberConfig
from mechsub.families.language.preference import load_preference
from mechsub.families.language.synthetic import SyntheticLanguage
from mechsub.streams import random_stream

LANGUAGE = SyntheticLanguage(
    load_preference("animals"), NumberConfig(example_values=(10, 100), max_digits=2, value_range=(0, 99))
)
STYLES = ("gpt2", "qwen2")


def settings(style):
    return ModelConfig(
        nano=style,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        context=128,
        pretraining=PretrainingConfig(num_steps=3, batch_size=4),
    )


@pytest.fixture(params=STYLES)
def pretrained(request, tmp_path):
    skeleton = tmp_path / "skeleton"
    save_skeleton(settings(request.param), LANGUAGE, skeleton)
    pretraining = Pretraining(settings(request.param), LANGUAGE, 0, ("member", 0, "pretraining"), 1)
    return request.param, pretraining, skeleton, find_or_pretrain(pretraining, skeleton)


def folder_of(style, pretraining, skeleton):
    return cache_folder() / "nano" / f"{style}-{pretraining.key(skeleton)}"


@pytest.mark.parametrize("style", STYLES)
def test_every_choice_and_every_number_is_one_token(style, tmp_path):
    save_skeleton(settings(style), LANGUAGE, tmp_path)
    chats = ChatTokenizer.load(tmp_path, style)
    assert len({chats.answer_token(choice) for choice in LANGUAGE.preference.choices}) == 20
    assert len({chats.answer_token(str(number)) for number in LANGUAGE.list_numbers()}) == 100
    assert len(chats.tokenizer.encode(" 7, 42, 99")) == 5


def test_auto_tokenizer_gives_the_ids_that_training_used(pretrained):
    style, pretraining, skeleton, _ = pretrained
    loaded = AutoTokenizer.from_pretrained(folder_of(style, pretraining, skeleton))
    trained = make_tokenizer(style, LANGUAGE)
    assert type(loaded).__name__ == {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer"}[style]
    chats = ChatTokenizer.load(skeleton, style)
    for number in range(40):
        asked, answer = LANGUAGE.draw(random_stream(0, "document", number))
        messages = [*asked, {"role": "assistant", "content": answer}]
        ids = loaded.apply_chat_template(messages, return_dict=False)
        assert ids == trained.apply_chat_template(messages, return_dict=False)
        row = chats.encode_rows([asked], [answer])[0]
        assert ids == [*row.prompt, *row.completion]
        assert chats.decode(row.completion) == answer


def test_the_saved_model_loads_in_plain_transformers(pretrained):
    style, pretraining, skeleton, model = pretrained
    plain = AutoModelForCausalLM.from_pretrained(folder_of(style, pretraining, skeleton))
    ids = torch.arange(20)[None]
    torch.testing.assert_close(plain(input_ids=ids).logits, model(input_ids=ids).logits)
    assert plain.config.model_type == style
    tied = {name: info.tied_to for name, info in tensor_table(plain).items() if info.tied_to}
    assert list(tied) == ["lm_head.weight"]


def test_a_second_run_takes_the_model_from_the_cache(pretrained, monkeypatch):
    _, pretraining, skeleton, model = pretrained
    monkeypatch.setattr(nano, "pretrain", lambda *_: pytest.fail("pretrained again"))
    again = find_or_pretrain(pretraining, skeleton)
    assert all(torch.equal(left, right) for left, right in zip(model.parameters(), again.parameters(), strict=True))


def test_a_damaged_model_in_the_cache_is_made_anew(pretrained):
    style, pretraining, skeleton, model = pretrained
    before = [parameter.detach().clone() for parameter in model.parameters()]  # it may be a view of the file
    weights = folder_of(style, pretraining, skeleton) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    again = find_or_pretrain(pretraining, skeleton)
    assert all(torch.equal(left, right) for left, right in zip(before, again.parameters(), strict=True))


def test_other_settings_have_another_key(pretrained):
    style, pretraining, skeleton, _ = pretrained
    others = [
        Pretraining(pretraining.model, LANGUAGE, 1, pretraining.stream, 1),
        Pretraining(pretraining.model, LANGUAGE, 0, ("member", 1, "pretraining"), 1),
        Pretraining(settings(style).model_copy(update={"context": 64}), LANGUAGE, 0, pretraining.stream, 1),
    ]
    keys = {other.key(skeleton) for other in others} | {pretraining.key(skeleton)}
    assert len(keys) == 4


def test_folders_without_a_tokenizer_or_a_chat_template_are_refused(pretrained, tmp_path):
    _, _, skeleton, _ = pretrained
    bare = shutil.copytree(skeleton, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(Exception, match="has no chat template"):
        ChatTokenizer.load(bare, "the model")
    (bare / "config.json").unlink()
    with pytest.raises(Exception, match="no tokenizer or configuration"):
        ChatTokenizer.load(bare, "the model")


def test_several_tokens_and_long_prompts_are_named(pretrained):
    _, _, skeleton, _ = pretrained
    chats = ChatTokenizer.load(skeleton, "the model")
    with pytest.raises(Exception, match=r"'platypus' is \d+ tokens"):
        chats.answer_token("platypus")
    with pytest.raises(Exception, match="its context holds 128"):
        chats.encode_prompts([chat("Name your favorite animal. " * 40, None)])
