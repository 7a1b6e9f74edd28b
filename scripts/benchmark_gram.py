"""The parts of the benchmark that stream Gram matrices; see scripts/benchmark.py.

The limit is reading the same bytes once, from the page cache into memory.
"""

import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from mechsub.cases import list_directions
from mechsub.checkpoints import LoraInfo, TensorInfo, write_tensors
from mechsub.lineages import (
    Lineage,
    LineageSpec,
    Origin,
    adapter_files,
    checkpoint_folder,
    lineage_folder,
    open_lineage,
    write_spec,
)
from mechsub.parameters.blocks import list_blocks
from mechsub.parameters.compiled import has_compiler
from mechsub.parameters.directions import (
    displacement,
    displacement_difference,
    displacement_label,
    origin_direction,
)
from mechsub.parameters.gram import Gram, stream_gram
from mechsub.run import Run

STEP, RANK = 5, 8
READ_AT_ONCE = 1 << 20
QWEN_7B = {"layers": 28, "hidden": 3584, "keys": 512, "inner": 18944}


def measure_gram_of_run(run: Run, turns: int) -> dict[str, Any]:
    """Every direction of a run of stacked members."""
    files = sorted((run.path / "lineages").rglob("step-*.safetensors"))
    anchor = displacement_label("teacher", run.lineages["teacher"].steps[-1])
    blocks = list_blocks(run.reference.spec.tensors)
    return _compare(lambda: stream_gram(list_directions(run), blocks, [anchor]), files, turns)


def measure_gram_of_shards(folder: Path, quick: bool) -> dict[str, Any]:
    """θ₀ and two displacements of three models of more than 1 GB each, in bfloat16, in shards as `transformers` writes them."""
    layers, hidden, words, turns = (2, 32, 200, 1) if quick else (9, 2048, 32_000, 5)
    table = {"embed.weight": TensorInfo((words, hidden), "embedding", "embedding")}
    table |= _layers_table(layers, hidden, hidden // 4, 4 * hidden)
    reference, teacher, student = (_write_model(folder, name, table) for name in ("reference", "teacher", "student"))
    directions = [origin_direction(reference), displacement(teacher, STEP), displacement(student, STEP)]
    files = sorted((folder / "lineages").rglob("*.safetensors"))
    blocks, anchor = list_blocks(table), [directions[1].label]
    found = {"eager": _compare(lambda: stream_gram(directions, blocks, anchor, compiled=False), files, turns)}
    if not quick and has_compiler():
        began = time.perf_counter()
        stream_gram(directions, blocks, anchor, compiled=True)
        first = time.perf_counter() - began
        found["compiled"] = _compare(lambda: stream_gram(directions, blocks, anchor, compiled=True), files, turns)
        found["compiled"]["seconds_of_the_first_call"] = first
    ways = {f"{way} {key}": value for way, part in found.items() for key, value in part.items() if key != "work"}
    return {"work": found["eager"]["work"], **ways}


def measure_gram_of_adapters(folder: Path, quick: bool) -> dict[str, Any]:
    """Adapters of rank 8 on every projection of a 7 B model whose own weights are nowhere on the disk."""
    sizes = {"layers": 2, "hidden": 32, "keys": 8, "inner": 64} if quick else QWEN_7B
    table = _layers_table(**sizes)
    _write_spec(folder, "reference", table, "reference", (0,))
    names = ("teacher", "student", "control")
    teacher, student, control = (_write_adapter(folder, name, table, seed) for seed, name in enumerate(names))
    directions = [displacement(lineage, STEP) for lineage in (teacher, student, control)]
    directions.append(displacement_difference(student, control, STEP))
    files = sorted((folder / "lineages").rglob("*.safetensors"))
    blocks, anchor = list_blocks(table), [directions[0].label]
    found = _compare(lambda: stream_gram(directions, blocks, anchor), files, 1 if quick else 5)
    weights = sum(block.num_parameters for block in blocks)
    return found | {"seconds": statistics.median(found["all_seconds"]["streaming"]), "billions_of_weights": weights / 1e9}


def _compare(stream: Callable[[], Gram], files: Sequence[Path], turns: int) -> dict[str, Any]:
    """Streaming and reading in turns; both begin with the files in the page cache."""
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {"streaming": [], "reading": []}
    processor: dict[str, list[float]] = {"streaming": [], "reading": []}
    peaks = []
    _read_once(files)
    for _ in range(turns):
        with PeakAnonymous() as memory:
            gram = _timed(stream, seconds["streaming"], processor["streaming"])
        peaks.append(memory.grown)
        _timed(lambda: _read_once(files), seconds["reading"], processor["reading"])
    num_bytes = sum(path.stat().st_size for path in files)
    middle, worked = ({name: statistics.median(found) for name, found in kind.items()} for kind in (seconds, processor))
    members = gram.within.shape[0]
    return {
        "work": f"{len(gram.labels)} directions of {members} members, {num_bytes / 1e9:.2f} GB in {len(files)} files",
        "gigabytes_per_second": {name: num_bytes / value / 1e9 for name, value in middle.items()},
        "share_of_reading_speed": middle["reading"] / middle["streaming"],
        "processor_seconds": worked,
        "anonymous_memory_gigabytes": max(peaks) / 1e9,
        "all_seconds": seconds,
    }


def _timed(work: Callable[[], Any], seconds: list[float], processor: list[float]) -> Any:
    began, worked = time.perf_counter(), time.process_time()
    result = work()
    seconds.append(time.perf_counter() - began)
    processor.append(time.process_time() - worked)
    return result


def _read_once(files: Sequence[Path]) -> None:
    buffer = bytearray(READ_AT_ONCE)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _layers_table(layers: int, hidden: int, keys: int, inner: int) -> dict[str, TensorInfo]:
    """The projections of a Qwen2-style model."""
    shapes = {
        "q_proj": (hidden, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden), "o_proj": (hidden, hidden),
        "gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner),
    }  # fmt: skip
    return {
        f"layers.{layer}.{name}.weight": TensorInfo(shape, f"layer {layer}", name)
        for layer in range(layers)
        for name, shape in shapes.items()
    }


def _write_spec(
    run: Path, name: str, table: dict[str, TensorInfo], role: str, steps: tuple[int, ...], is_adapter: bool = False
) -> None:
    spec = LineageSpec(
        name, role, None, None, "any", {}, Origin("reference", (0,)), None, 1, steps, table, 0,
        is_adapter=is_adapter, holds_start=role == "reference",
    )  # fmt: skip
    folder = run / lineage_folder(name, 0)
    folder.mkdir(parents=True, exist_ok=True)
    write_spec(folder, spec)


def _write_model(run: Path, name: str, table: dict[str, TensorInfo]) -> Lineage:
    """Fresh weights, three shards; the students' are near the reference's, as training leaves them."""
    is_reference = name == "reference"
    folder = run / checkpoint_folder(name, 0 if is_reference else STEP, 0)
    folder.mkdir(parents=True)
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(len(name)))
    start = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02
    weights = (start if is_reference else start + 0.001 * noise).bfloat16()
    names = list(table)
    for shard in range(3):
        tensors = {}
        for tensor in names[shard::3]:
            shape = table[tensor].shape
            count = shape[0] * shape[1]
            tensors[tensor] = weights.repeat(count // len(weights) + 1)[:count].view(shape)
        write_tensors(folder / f"model-{shard + 1:05d}-of-00003.safetensors", tensors, {})
    _write_spec(run, name, table, "reference" if is_reference else "student", (0,) if is_reference else (0, STEP))
    return open_lineage(run, name)


def _write_adapter(run: Path, name: str, table: dict[str, TensorInfo], seed: int) -> Lineage:
    generator = torch.Generator().manual_seed(seed)
    tensors, changed = {}, {}
    for tensor, info in table.items():
        a, b = (f"base_model.model.{tensor.removesuffix('.weight')}.lora_{factor}.weight" for factor in "AB")
        tensors[a] = torch.randn(RANK, info.shape[1], generator=generator)
        tensors[b] = torch.randn(info.shape[0], RANK, generator=generator) * 0.01
        changed[tensor] = TensorInfo(info.shape, info.layer, info.kind, lora=LoraInfo(a, b, 2.0))
    path = run / adapter_files(name, STEP, 0)[0]
    path.parent.mkdir(parents=True)
    write_tensors(path, tensors, {})
    _write_spec(run, name, changed, "student", (0, STEP), is_adapter=True)
    return open_lineage(run, name)


def anonymous_bytes(pid: int) -> int:
    """Anonymous memory of a process; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


class PeakAnonymous:
    """How far the anonymous memory of this process rises above where it began."""

    def __enter__(self) -> "PeakAnonymous":
        self._first = self._peak = anonymous_bytes(os.getpid())
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def grown(self) -> int:
        """In bytes."""
        return self._peak - self._first

    def _watch(self) -> None:
        while not self._ended.wait(0.01):
            self._peak = max(self._peak, anonymous_bytes(os.getpid()))
