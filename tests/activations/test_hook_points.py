"""Hook points are found by TransformerLens's names; a wrong one gets the nearest."""

import pytest

from mechsub.activations.hook_points import find_hook_point, select_hook_points
from mechsub.errors import ActivationError
from mechsub.families.classifier.prompts import list_hook_points as hidden_points
from mechsub.families.language.hook_points import list_hook_points
from tests.activations.tiny_models import WIDTH, make_model


@pytest.fixture(scope="module")
def points():
    return list_hook_points(make_model("gpt2"))


def test_every_block_has_its_sites_and_the_first_what_it_starts_from(points):
    assert [point.label for point in points] == [
        "layer 0 resid_pre",
        *(f"layer {layer} {site}" for layer in range(3) for site in ("attn_out", "mlp_out", "resid_post")),
    ]
    assert {point.width for point in points} == {WIDTH}
    assert find_hook_point(points, "blocks.2.hook_mlp_out").module == "transformer.h.2.mlp"


def test_of_an_architecture_that_is_not_known_only_the_names_are_given(points):
    unknown = list_hook_points(make_model("gemma2"))
    assert [point.name for point in unknown] == [point.name for point in points]
    assert {point.module for point in unknown} == {None}


def test_the_classifiers_last_hidden_layer_is_what_its_head_reads():
    points = hidden_points({"num_pixels": 6, "hidden_widths": [5, 4]})
    assert [(point.name, point.width, point.is_read_out) for point in points] == [
        ("blocks.0.mlp.hook_post", 5, False),
        ("blocks.1.mlp.hook_post", 4, True),
    ]


def test_a_hook_point_that_the_model_lacks_gets_the_nearest_name(points):
    with pytest.raises(ActivationError, match="no hook point 'blocks.2.hook_mlp'; did you mean `blocks.2.hook_mlp_out`?"):
        find_hook_point(points, "blocks.2.hook_mlp")


def test_a_layer_or_site_that_the_model_lacks_is_refused(points):
    with pytest.raises(ActivationError, match="no layer 3; it has layers 0 to 2"):
        select_hook_points(points, layers=[1, 3])
    with pytest.raises(ActivationError, match="no site 'resid_past'; did you mean `resid_pos"):
        select_hook_points(points, sites=["resid_past"])
    with pytest.raises(ActivationError, match=r"layers by site: {'resid_pre': \[0\]}"):
        select_hook_points(points, layers=[1], sites=["resid_pre"])


def test_hook_points_are_chosen_in_the_order_of_the_forward_pass(points):
    chosen = select_hook_points(points, layers=[2, 0], sites=["resid_post", "attn_out"])
    assert [point.label for point in chosen] == [
        f"layer {layer} {site}" for layer in (0, 2) for site in ("attn_out", "resid_post")
    ]
    assert select_hook_points(points) == points
