import altair as alt
import numpy as np
import pytest
import xarray as xr

from mechsub.figures import DATA, Figure, chart_spec, fill_figure


def test_rows_are_filled_from_the_arrays_and_the_spec_holds_none():
    data = xr.Dataset({"score": (("condition", "member"), np.array([[0.1, np.nan], [0.3, 0.4]]))}, {"condition": ["a", "b"]})
    figure = Figure("f", "", "", ("score",), chart_spec(alt.Chart(DATA).mark_point().encode(x="score:Q")), {"condition": ["a"]})
    assert "datasets" not in figure.spec
    rows = fill_figure(figure, data)["datasets"]["data"]
    assert [(row["condition"], row["member"], row["score"]) for row in rows] == [("a", 0, 0.1), ("a", 1, None)]


def test_a_facet_whose_layers_name_their_data_is_refused():
    inner = alt.layer(alt.Chart(DATA).mark_point().encode(x="x:Q"), alt.Chart(DATA).mark_line().encode(x="x:Q"))
    with pytest.raises(ValueError, match="every panel would show all rows"):
        chart_spec(inner.facet(row="c:N", data=DATA))
    hoisted = alt.layer(alt.Chart(DATA).mark_point().encode(x="x:Q"), data=DATA).facet(facet="c:N")
    assert chart_spec(hoisted)["data"] == {"name": "data"}
