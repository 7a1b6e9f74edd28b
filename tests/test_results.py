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


def test_it_reads_as_xarray_reads_it(tmp_path):
    data = xr.Dataset(
        {
            "grid": label_variable(
                [[0.5, np.nan]], ["condition", "step"], description="é", unit="share of all", formula="a ≤ b"
            ),
            "grid_status": status_variable([[0, 1]], ["condition", "step"], ["ok", "none"], "grid"),
            "names": (["step"], ["owl", ""], {"tags": ["one", "two"], "tag": ["one"], "levels": [1.0, 2.0]}),
            "flags": (["bare"], [True, False, True]),
            "nothing": (["empty"], np.zeros(0)),
            "one": ((), 2.5, {"count": 3}),
            "word": ((), "owl"),
        },
        coords={"condition": ["first"], "step": [0, 7], "taught": ("step", ["a", "b"])},
    )
    write_result(tmp_path / "wide.h5", "wide", {}, "0.1", Result(data, [finding()], [], ["A sentence.", "And one more."]))
    with xr.open_datatree(tmp_path / "wide.h5", engine="h5netcdf") as tree:
        expected = tree.to_dataset(inherit=False).load()
    found = read_result(tmp_path / "wide.h5").data
    xr.testing.assert_identical(found, expected)
    assert list(found.variables) == list(expected.variables)
    assert {name: found[name].dtype for name in found.variables} == {name: expected[name].dtype for name in expected.variables}


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
