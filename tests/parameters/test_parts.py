import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mechsub.parameters.parts import PartScores, find_differing, mix_parts
from mechsub.parameters.surgery import operate

PARTS = ("a", "b", "c")
WORTH = {"a": 1.0, "b": 0.25, "c": -2.0}


def additive(of_end):
    return np.array([sum(WORTH[part] for part in of_end), 0.0])


def test_parts_that_add_up_have_no_interaction():
    found = PartScores.measure(PARTS, frozenset(PARTS), additive)
    assert found.total[0] == -0.75 and found.interaction[0] == 0
    for part, worth in WORTH.items():
        assert found.sufficiency(part)[0] == found.necessity(part)[0] == worth
    assert not found.total[1:].any()


def test_what_takes_two_parts_is_all_interaction_and_needs_both():
    found = PartScores.measure(PARTS, frozenset("ab"), lambda of_end: np.array([float({"a", "b"} <= of_end)]))
    assert found.interaction[0] == found.total[0] == 1
    assert [found.sufficiency(part)[0] for part in PARTS] == [0, 0, 0]
    assert [found.necessity(part)[0] for part in PARTS] == [1, 1, 0]


@pytest.mark.parametrize(("differing", "scored"), [("", 1), ("a", 2), ("ab", 4), ("abc", 8)])
def test_a_part_that_is_the_same_is_never_scored_and_changes_exactly_nothing(differing, scored):
    seen = []
    found = PartScores.measure(PARTS, frozenset(differing), lambda of_end: (seen.append(of_end), additive(of_end))[1])
    assert len(seen) == len(set(seen)) == scored
    for part in set(PARTS) - set(differing):
        assert found.sufficiency(part)[0] == found.necessity(part)[0] == 0


def make_model():
    config = AutoConfig.for_model(
        "gpt2", vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=16, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def part_of(name):
    return "vocabulary" if name in {"transformer.wte.weight", "lm_head.weight"} else "body"


def score(model, token=7):
    with torch.no_grad():
        return model(torch.tensor([[3, 1, 4], [1, 5, 9]])).logits[:, -1].double().log_softmax(-1)[:, token].mean().numpy()[None]


def measure(start, end):
    first, last = ({name: one.detach().clone() for name, one in model.named_parameters()} for model in (start, end))
    with operate(start) as patient:

        def score_mixed(of_end):
            patient.install(mix_parts(first, last, part_of, of_end))
            return score(patient.module)

        return PartScores.measure(("body", "vocabulary"), find_differing(first, last, part_of), score_mixed)


def test_a_student_whose_only_change_is_a_row_of_its_unembedding_has_it_all_from_its_vocabulary():
    start, end = make_model(), make_model()
    with torch.no_grad():
        end.lm_head.weight[7] += torch.randn(16)
    found = measure(start, end)
    assert found.differing == {"vocabulary"} and abs(found.total[0]) > 1e-3
    assert found.sufficiency("vocabulary") == found.necessity("vocabulary") == found.total
    assert found.sufficiency("body") == found.necessity("body") == found.interaction == 0


def test_a_swap_of_everything_is_the_student_exactly_and_the_model_is_left_as_it_was():
    start, end = make_model(), make_model()
    with torch.no_grad():
        for parameter in end.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    before, after = score(start), score(end)
    found = measure(start, end)
    assert found.total == after - before and score(start) == before
    body = make_model()
    with torch.no_grad():
        for name, parameter in body.named_parameters():
            if part_of(name) == "body":
                parameter.copy_(end.get_parameter(name))
    assert found.sufficiency("body") == score(body) - before and found.necessity("vocabulary") == after - score(body)


def test_weights_of_another_precision_are_compared_by_their_numbers():
    start = {"w": torch.tensor([1.0, 0.5], dtype=torch.bfloat16)}
    assert find_differing(start, {"w": start["w"].float()}, part_of) == frozenset()
    assert find_differing(start, {"w": torch.tensor([1.0, 0.5001])}, part_of) == {"body"}
