"""Results on disk: one HDF5 (netCDF-4) file an analysis, with labelled arrays, findings and figure specs.

Any tool that reads HDF5 opens it. The root group holds the arrays; ``/findings`` and ``/figures`` a column per field.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xarray as xr

from mechsub.errors import RunDirectoryError
from mechsub.figures import Figure
from mechsub.findings import FIELDS, Finding
from mechsub.rundir import RunDirectory, atomic_write

SCHEMA_VERSION = 1
_GROUPS = "/groups"
_TABLES = ("findings", "figures")
_CHUNK_BYTES = 2 << 20
_JSON_FIELDS = ("variables", "spec", "select")
_FORMAT_ATTRIBUTES = {"CLASS", "NAME", "DIMENSION_LIST", "REFERENCE_LIST", "DIMENSION_LABELS"} | {
    *("_Netcdf4Dimid", "_Netcdf4Coordinates", "_nc3_strict", "_NCProperties")
}
_FIGURE_FIELDS = ("name", "title", "caption", *_JSON_FIELDS, "headline")


@dataclass(frozen=True)
class Result:
    """What an analysis returns."""

    data: xr.Dataset
    findings: Sequence[Finding]
    figures: Sequence[Figure]
    summary: Sequence[str] = field(default_factory=tuple)
    """Sentences for the reader, made from the numbers."""
    groups: Mapping[str, xr.Dataset] = field(default_factory=dict)
    """Larger arrays that no report shows, each in a group of the file; `read_group` reads one of them."""


def label_variable(
    values: Any, dims: Sequence[str], *, description: str, unit: str, formula: str = "", source: str = ""
) -> xr.Variable:
    """An array with what a reader of the file needs to know of it."""
    attributes = {"long_name": description, "units": unit, "formula": formula, "source": source}
    return xr.Variable(tuple(dims), values, {name: text for name, text in attributes.items() if text})


def status_variable(codes: Any, dims: Sequence[str], meanings: Sequence[str], of: str) -> xr.Variable:
    """Why a value is NaN: an int8 array with CF ``flag_values`` and ``flag_meanings``; 0 is always ``ok``."""
    flags = np.arange(len(meanings), dtype=np.int8)
    attributes = {"long_name": f"status of {of}", "flag_values": flags, "flag_meanings": " ".join(meanings)}
    return xr.Variable(tuple(dims), np.asarray(codes, dtype=np.int8), attributes)


def write_result(path: Path, analysis: str, arguments: Mapping[str, Any], version: str, result: Result) -> None:
    """Write a result atomically; the same result gives the same numbers, without any wall-clock time."""
    for data in (result.data, *result.groups.values()):
        _check_reasons(data)
    root = result.data.assign_attrs(
        analysis=analysis,
        arguments=json.dumps(arguments, sort_keys=True),
        mechsub_version=version,
        schema_version=SCHEMA_VERSION,
        summary=json.dumps(list(result.summary), ensure_ascii=False),
    )
    tables = {"/findings": _findings_table(result.findings), "/figures": _figures_table(result.figures)}
    tree = xr.DataTree.from_dict({"/": root, **tables})
    encoding = {"/": {str(name): _encoding(variable) for name, variable in root.variables.items()}}
    with atomic_write(path) as temporary:
        tree.to_netcdf(temporary, engine="h5netcdf", encoding=encoding)
        for name, data in result.groups.items():
            kept = {str(key): _encoding(variable) for key, variable in data.variables.items()}
            data.to_netcdf(temporary, mode="a", group=f"{_GROUPS}/{name}", engine="h5netcdf", encoding=kept)


def read_group(path: Path, name: str) -> xr.Dataset:
    """One of a result's groups, wholly into memory.

    Raises:
        RunDirectoryError: the file is damaged, or has no such group.
    """
    try:
        with xr.open_dataset(path, group=f"{_GROUPS}/{name}", engine="h5netcdf") as data:
            return data.load()
    except (OSError, KeyError, ValueError) as error:
        raise RunDirectoryError(f"{path} holds no {name} that can be read ({error}); analyse the run again") from error


def read_result(path: Path) -> Result:
    """Read what `write_result` wrote, wholly into memory.

    Raises:
        RunDirectoryError: the file is damaged or not ours.
    """
    try:
        with h5py.File(path) as file:  # groups stay on the disk
            data = _load_group(file)
            findings = [Finding(**row) for row in _rows(_load_group(file["findings"]), "finding", FIELDS)]
            figures = [_parse_figure(row) for row in _rows(_load_group(file["figures"]), "figure", _FIGURE_FIELDS)]
        summary = json.loads(data.attrs["summary"])
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise RunDirectoryError(f"{path} cannot be read as a result ({error}); analyse the run again") from error
    return Result(data, findings, figures, summary)


def find_results(directory: RunDirectory) -> tuple[dict[str, Path], list[str]]:
    """The result files of a run by their analyses' names, and the names of those that the run has outgrown.

    A result is outgrown when the lineages that it read are not the lineages that are there now: a condition was added.
    """
    measured = directory.measured_files()
    current: dict[str, Path] = {}
    outgrown = []
    for record in directory.records().values():
        for name in (name for name in record.outputs if name.startswith("results/")):
            if dict(record.inputs) == measured:
                current[Path(name).stem] = directory.path / name
            else:
                outgrown.append(Path(name).stem)
    return dict(sorted(current.items())), sorted(outgrown)


def find_result(directory: RunDirectory, analysis: str, what: str) -> Path:
    """The result file of one analysis of what the run is now, whole; ``what`` is wanted of it, in words.

    Raises:
        RunDirectoryError: the run was not analysed yet, has changed since, or the file is damaged.
    """
    path = find_results(directory)[0].get(analysis)
    if path is None:
        raise RunDirectoryError(
            f"{directory.path} has no {what} of what its lineages are now; "
            f"`mechsub analyze {directory.path} --only {analysis}` makes them"
        )
    directory.check_files([path.relative_to(directory.path).as_posix()])
    return path


def _check_reasons(data: xr.Dataset) -> None:
    """No data is NaN with a reason: a variable without its status may hold no NaN."""
    for name, variable in data.data_vars.items():
        if variable.dtype.kind != "f":
            continue
        missing = np.isnan(variable.values)
        status = data.get(f"{name}_status")
        explained = np.zeros_like(missing) if status is None else status.values != 0
        if (missing != explained).any():
            raise ValueError(
                f"{name} holds {int(missing.sum())} NaN, its status explains {int(explained.sum())}, not the same ones"
            )


def _encoding(variable: xr.Variable) -> dict[str, Any]:
    if variable.dtype.kind not in "iuf" or variable.ndim == 0 or variable.size == 0:
        return {}  # HDF5 refuses checksums on strings
    chunks = list(variable.shape)
    for axis in range(variable.ndim):  # halve the leading axes first: readers take trailing ones whole
        while chunks[axis] > 1 and int(np.prod(chunks)) * variable.dtype.itemsize > _CHUNK_BYTES:
            chunks[axis] = -(-chunks[axis] // 2)
    return {"fletcher32": True, "chunksizes": tuple(chunks)}


def _findings_table(findings: Sequence[Finding]) -> xr.Dataset:
    columns = {name: [getattr(finding, name) for finding in findings] for name in FIELDS}
    return _table(columns, "finding")


def _figures_table(figures: Sequence[Figure]) -> xr.Dataset:
    rows = [asdict(figure) for figure in figures]
    for row in rows:
        row["headline"] = int(row["headline"])
        for name in _JSON_FIELDS:
            row[name] = json.dumps(row[name], ensure_ascii=False)
    return _table({name: [row[name] for row in rows] for name in _FIGURE_FIELDS}, "figure")


def _parse_figure(row: dict[str, Any]) -> Figure:
    parsed = {name: json.loads(row[name]) for name in _JSON_FIELDS}
    return Figure(**{**row, **parsed, "variables": tuple(parsed["variables"]), "headline": bool(row["headline"])})


def _table(columns: Mapping[str, list[Any]], dim: str) -> xr.Dataset:
    return xr.Dataset(
        {
            name: (dim, np.array(values, dtype=object if not values or isinstance(values[0], str) else None))
            for name, values in columns.items()
        }
    )


def _rows(table: xr.Dataset, dim: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """One dict per entry of a table; plain Python values."""
    columns = {name: table[name].values.tolist() for name in names}
    return [{name: columns[name][index] for name in names} for index in range(table.sizes[dim])]


def _load_group(group: h5py.Group) -> xr.Dataset:
    """A group as xarray reads it, by h5py alone: h5netcdf opens every object dozens of times, which takes seconds."""
    variables = {}
    for name, item in group.items():
        if isinstance(item, h5py.Dataset) and not _is_bare_dimension(item):
            dims = [name if item.is_scale else axis[0].name.rpartition("/")[2] for axis in item.dims]
            is_text = h5py.check_string_dtype(item.dtype) is not None
            values = item.asstr()[()] if is_text else item[()]
            variables[name] = xr.Variable(dims, values, _attributes(item), {"dtype": str} if is_text else None)
    data: xr.Dataset = xr.decode_cf(xr.Dataset(variables, attrs=_attributes(group))).load()
    return data


def _is_bare_dimension(item: h5py.Dataset) -> bool:
    return bool(item.is_scale) and item.attrs["NAME"].startswith(b"This is a netCDF dimension but not a netCDF variable")


def _attributes(item: h5py.Dataset | h5py.Group) -> dict[str, Any]:
    """What somebody said of an object, without what HDF5 and netCDF-4 note for themselves."""
    found = {name: value for name, value in item.attrs.items() if name not in _FORMAT_ATTRIBUTES}
    return {name: _plain(value) for name, value in found.items()}


def _plain(value: Any) -> Any:
    """Lists of texts as lists, and a list of one number as that number: as xarray has them."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "O":
        value = value.tolist()
    return value[0] if isinstance(value, np.ndarray | list) and len(value) == 1 else value
