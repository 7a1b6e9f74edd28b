import numpy as np
import pytest
import torch

from mechsub.families.language.chat import ChatTokenizer, chat
from mechsub.families.language.generation import StreamSampler, draw_uniforms, sample_completions


@pytest.fixture
def asked(nano_run):
    lineage = nano_run.reference
    chats = ChatTokenizer.load(nano_run.path / "data/nano-gpt2", "nano-gpt2")
    prompts = chats.encode_prompts([chat(f"Look at these numbers: {number}, 20, 30.", None) for number in range(10, 34)])
    return nano_run.family.load_model(lineage, 0, 0), chats, prompts


def test_a_completion_does_not_depend_on_what_it_is_batched_with(asked):
    model, chats, prompts = asked
    draws = draw_uniforms(0, [("request", number) for number in range(len(prompts))], 12)
    together = sample_completions(model, chats, prompts, draws)
    alone = [sample_completions(model, chats, [prompt], draw[None])[0] for prompt, draw in zip(prompts, draws, strict=True)]
    assert together == alone
    assert together == sample_completions(model, chats, prompts, draws, batch_size=5)


def test_every_request_has_its_own_stream(asked):
    model, chats, prompts = asked
    draws = draw_uniforms(0, [("request", number) for number in range(24)], 12)
    same = sample_completions(model, chats, [prompts[0]] * 24, draws)
    assert len({completion.text for completion in same}) > 12


def test_tokens_are_drawn_as_often_as_they_are_likely():
    scores = torch.tensor([[0.0, 1.0, -1.0, 0.5]]).expand(4000, -1)
    sampler = StreamSampler(torch.from_numpy(draw_uniforms(0, [("draw", n) for n in range(4000)], 1)), temperature=1.0)
    chosen = sampler(torch.zeros(4000, 1, dtype=torch.long), scores).argmax(-1)
    shares = np.bincount(chosen.numpy(), minlength=4) / 4000
    np.testing.assert_allclose(shares, scores[0].softmax(-1).numpy(), atol=0.03)


def test_a_low_temperature_is_greedy(asked):
    model, chats, prompts = asked
    draws = draw_uniforms(0, [("request", number) for number in range(len(prompts))], 6)
    cold = sample_completions(model, chats, prompts, draws, temperature=1e-6)
    assert cold == sample_completions(model, chats, prompts, draws[::-1].copy(), temperature=1e-6)
