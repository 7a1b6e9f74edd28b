import h5py
import numpy as np
import pytest
import xarray as xr

from mechsub.errors import RunDirectoryError
from mechsub.figures import Figure
from mechsub.results import Result, label_variable, read_result, status_variable, write_result
from tests.test_findings import finding


@pytest.fixture
def written(tmp_path):
    values = np.array([[0.1, np.nan], [0.3, 0.4]])
    data = xr.Dataset(
        {
            "score": label_variable(values, ["condition", "member"], description="a score", unit="accuracy", formula="x / n"),
            "score_status": status_variable(np.isnan(values), ["condition", "member"], ["ok", "no_data"], "score"),
        },
        coords={"condition": ["first", "second"], "member": [0, 1]},
    )
    figure = Figure("f", "A title", "A caption", ("score",), {"mark": "point"}, {"condition": ["first"]}, headline=True)
    result = Result(data, [finding(null_low=-0.1), finding(estimate=float("nan"))], [figure], ["A sentence."])
    path = tmp_path / "demo.h5"
    write_result(path, "demo", {"margin": 0.05}, "0.1", result)
    return path, result


def test_a_result_comes_back_as_it_was(written):
    path, result = written
    back = read_result(path)
    xr.testing.assert_equal(back.data, result.data)
    assert back.findings[0] == result.findings[0]
    assert np.isnan(back.findings[1].estimate)
    assert list(back.figures) == list(result.figures)
    assert back.summary == ["A sentence."]


def test_any_hdf5_reader_opens_it(written):
    path, _ = written
    with xr.open_datatree(path) as tree:
        assert tree["score"].attrs["units"] == "accuracy"
        assert tree.attrs["analysis"] == "demo" and tree.attrs["schema_version"] == 1
        assert list(tree["findings"]["quantity"].values) == ["effect", "effect"]
    with h5py.File(path) as file:
        assert file["score"].fletcher32
        assert list(file["score_status"].attrs["flag_values"]) == [0, 1]
        assert file["score_status"].attrs["flag_meanings"] == "ok no_data"


def test_the_same_result_gives_the_same_bytes(written, tmp_path):
    path, result = written
    write_result(tmp_path / "again.h5", "demo", {"margin": 0.05}, "0.1", result)
    assert (tmp_path / "again.h5").read_bytes() == path.read_bytes()


def test_a_result_without_findings_or_figures_is_readable(tmp_path):
    write_result(tmp_path / "bare.h5", "bare", {}, "0.1", Result(xr.Dataset({"x": ("m", [1.0])}), [], []))
    back = read_result(tmp_path / "bare.h5")
    assert (list(back.findings), list(back.figures), list(back.summary)) == ([], [], [])


def test_a_truncated_result_is_named(written):
    path, _ = written
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(RunDirectoryError, match=r"demo.h5 cannot be read as a result"):
        read_result(path)
