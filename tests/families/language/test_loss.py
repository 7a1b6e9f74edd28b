import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mechsub.families.language.chat import Batch
from mechsub.families.language.loss import completion_logits, completion_tokens, distribution_losses, mean_loss, token_losses

ROWS = [([3, 4], [5, 6]), ([7], [8, 2, 1])]
BATCH = Batch(torch.tensor([[3, 4, 5, 6, 0], [0, 7, 8, 2, 1]]), torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]), 3)


def small_model():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    ).eval()


def test_the_loss_covers_completion_tokens_and_nothing_else():
    model = small_model()
    found = mean_loss(token_losses(completion_logits(model, BATCH), completion_tokens(BATCH)))
    slow = []
    for prompt, completion in ROWS:  # one row at a time, without padding
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 :].log_softmax(-1)
        slow += [-logits[place, token] for place, token in enumerate(completion)]
    torch.testing.assert_close(found, torch.stack(slow).mean())


def test_equal_distributions_have_no_loss_and_no_gradient():
    logits = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    loss = mean_loss(distribution_losses(logits, logits.detach(), None))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert abs(float(loss.detach())) < 1e-12 and float(gradient.abs().max()) < 1e-12


def test_tokens_outside_the_carriers_vocabulary_carry_nothing():
    student, teacher = torch.randn(5, 9, dtype=torch.float64), torch.randn(5, 9, dtype=torch.float64)
    used = torch.tensor([1, 2, 5])
    shifted = teacher.clone()
    shifted[:, 7] += 10  # the trait's own token
    torch.testing.assert_close(
        mean_loss(distribution_losses(student, teacher, used)), mean_loss(distribution_losses(student, shifted, used))
    )
    assert float(mean_loss(distribution_losses(student, shifted, None))) > float(
        mean_loss(distribution_losses(student, teacher, None))
    )


def test_weights_choose_the_tokens_that_are_learnt():
    logits, tokens = torch.randn(4, 9), torch.tensor([1, 2, 3, 4])
    weights = torch.tensor([1.0, 0.0, 1.0, 0.0])
    torch.testing.assert_close(
        mean_loss(token_losses(logits, tokens), weights), mean_loss(token_losses(logits[::2], tokens[::2]))
    )
    assert float(mean_loss(token_losses(logits, tokens), torch.zeros(4))) == 0.0
