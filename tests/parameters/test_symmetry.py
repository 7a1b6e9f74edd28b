import pytest
import torch

from mechsub.errors import AnalysisError
from mechsub.parameters.symmetry import Arrangement, UnitGroup, UnitPlace

HEADS = UnitGroup(
    "heads", "heads", 3, (UnitPlace("qk", 0, 0, 2), UnitPlace("qk", 0, 6, 2), UnitPlace("o.weight", 1, 0, 2)), "o"
)
INNER = UnitGroup("inner", "halves", 2, (UnitPlace("qk", 0, 2, 1), UnitPlace("o.weight", 1, 2, 1)), "o")


def test_units_move_whole_in_every_section():
    arrangement = Arrangement.as_stored([HEADS]).permute(HEADS, torch.tensor([2, 0, 1]))
    assert arrangement.arrange("qk", torch.arange(12.0)).tolist() == [4, 5, 0, 1, 2, 3, 10, 11, 6, 7, 8, 9]
    columns = arrangement.arrange("o.weight", torch.arange(6.0)[None].expand(2, -1))
    assert columns[1].tolist() == [4, 5, 0, 1, 2, 3]


def test_a_group_inside_anothers_unit_moves_what_now_stands_there():
    arrangement = (
        Arrangement.as_stored([HEADS, INNER]).permute(HEADS, torch.tensor([0, 2, 1])).permute(INNER, torch.tensor([1, 0]))
    )
    assert arrangement.arrange("o.weight", torch.arange(6.0)[None])[0].tolist() == [0, 1, 5, 4, 2, 3]


def test_the_inverse_undoes_an_arrangement():
    stored = Arrangement.as_stored([HEADS, INNER])
    arrangement = stored.permute(HEADS, torch.tensor([1, 2, 0])).permute(INNER, torch.tensor([1, 0]))
    values = torch.randn(4, 6)
    assert torch.equal(arrangement.invert().arrange("o.weight", arrangement.arrange("o.weight", values)), values)
    assert stored.moved_share == 0.0 and arrangement.moved_share > 0.5


def test_a_tensor_without_units_stays_as_it_is():
    values = torch.randn(3, 3)
    assert Arrangement.as_stored([HEADS]).arrange("norm", values) is values


def test_a_tensor_of_another_size_is_refused():
    with pytest.raises(AnalysisError, match="8 entries along axis 1"):
        Arrangement.as_stored([HEADS]).arrange("o.weight", torch.zeros(2, 8))
