import torch

from mechsub.checkpoints import load_tensor, map_tensor, write_tensors


def test_who_loads_a_tensor_may_change_it_and_changes_nothing_for_others(tmp_path):
    path, weights = tmp_path / "step.safetensors", torch.arange(6.0)
    write_tensors(path, {"w": weights}, {})
    mapped, first = map_tensor(path, "w"), load_tensor(path, "w")
    first.mul_(2)
    for again in (mapped, map_tensor(path, "w"), load_tensor(path, "w")):
        torch.testing.assert_close(again, weights)


def test_a_mapped_tensor_is_that_of_the_file_that_is_there_now(tmp_path):
    path = tmp_path / "step.safetensors"
    for value in (1.0, 2.0):
        write_tensors(path, {"w": torch.full((3,), value)}, {})
        torch.testing.assert_close(map_tensor(path, "w"), torch.full((3,), value))
