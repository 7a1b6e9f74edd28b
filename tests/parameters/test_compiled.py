import pytest
import torch

from mechsub.parameters.compiled import contract, has_compiler

pytestmark = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler here")
COUNT = 200_000
"""Rows of 4,096 and some over."""
PATTERN = (((0, 1.0),), ((1, 1.0), (0, -1.0)), ((2, 0.5), (0, -0.5)))


def draw(count, dtype):
    torch.manual_seed(0)
    origin = torch.randn(count, dtype=torch.float64)
    moved = [origin + 0.01 * torch.randn(count, dtype=torch.float64) for _ in range(2)]
    return [part.to(dtype) for part in (origin, *moved)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [COUNT, 5000])
def test_the_compiled_products_are_those_of_the_stored_numbers_in_float64(dtype, count):
    parts = draw(count, dtype)
    wide = [part.double() for part in parts]
    directions = torch.stack([wide[0], wide[1] - wide[0], 0.5 * (wide[2] - wide[0])])
    exact = directions @ directions.T
    found = contract(PATTERN, parts)
    scale = exact.diagonal().sqrt()
    assert ((found - exact).abs() / (scale[:, None] * scale)).max() < 2e-6


def test_a_number_that_is_not_finite_spoils_its_own_directions_only():
    parts = draw(COUNT, torch.bfloat16)
    healthy = contract(PATTERN, parts)
    parts[1][7] = torch.nan
    found = contract(PATTERN, parts)
    assert found[1].isnan().all() and found[:, 1].isnan().all()
    kept = torch.tensor([0, 2])
    assert torch.equal(found[kept[:, None], kept], healthy[kept[:, None], kept])


def test_the_number_of_workers_changes_no_bit():
    parts = draw(COUNT, torch.bfloat16)
    before = torch.get_num_threads()
    assert torch.equal(contract(PATTERN, parts, workers=1), contract(PATTERN, parts, workers=2))
    assert torch.get_num_threads() == before
