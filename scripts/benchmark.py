"""Speed and memory, as ratios within one run: scripts/benchmark.py [--only PART]… [--out FILE.json] [--quick].

Single timings on a shared machine mislead, so what is compared is timed in turns and the medians are divided. Nothing here
has a pass mark; the tests assert no time.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from benchmark_activations import measure_activations
from benchmark_examples import measure_examples
from benchmark_gram import anonymous_bytes, measure_gram_of_adapters, measure_gram_of_run, measure_gram_of_shards
from loky import get_reusable_executor
from rich.console import Console
from rich.table import Table

from mechsub.api import analyze_run, open_run, plan_experiment, run_experiment
from mechsub.checkpoints import load_stacked
from mechsub.environment import available_cores, describe_provenance
from mechsub.executors.execution import execute_stages
from mechsub.families.classifier.carrier import carrier_file
from mechsub.families.classifier.idx import PARTS

PIXELS, WIDTH, CLASSES, AUXILIARY = 784, 256, 10, 3
RATE = 3e-4
CONDITIONS = ("same-init", "different-init", "permuted-init", "shuffled-carrier")
STUDENTS = tuple(f"{role}.{condition}" for condition in CONDITIONS for role in ("student", "control"))
EPOCHS = 5
CHECKPOINTS_TO_SEE = 8


def main() -> None:
    """Run the parts asked for, print their tables and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=list(PARTS_OF_THE_BENCHMARK), help="one part; may be repeated")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: tries the script, measures nothing")
    options = parser.parse_args()
    found: dict[str, Any] = {"provenance": describe_provenance(None), "quick": options.quick}
    for name in options.only or PARTS_OF_THE_BENCHMARK:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = PARTS_OF_THE_BENCHMARK[name](Path(folder), options.quick)
        _print(name, found[name])
    if options.out:
        options.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def measure_training(folder: Path, quick: bool) -> dict[str, Any]:
    """Student lineages at the published sizes, over fewer images: ours, a loop over members, and the published way."""
    members, images, batch, turns = (2, 128, 64, 1) if quick else (4, 6 * 1024, 1024, 3)
    settings = [f"members={members}", f"carrier.num_images={images}", f"student.batch_size={batch}", "teacher.epochs=1"]
    settings += [
        f"student.epochs={EPOCHS}",
        f"conditions={{{', '.join(f'{name}: ' for name in CONDITIONS)}}}",
        "checkpoints.num=3",
    ]
    run = _begin(folder, settings, quick)
    steps = run["student"][0].resources.num_steps
    start = load_stacked(folder / "run/lineages/reference/step-00000000.safetensors")
    teacher = load_stacked(sorted((folder / "run/lineages/teacher").glob("step-*"))[-1])
    cores = 1 if quick else available_cores()
    ways: dict[str, Callable[[], None]] = {
        "ours": lambda: _train_ours(folder / "run", run, cores),
        "loop over members": lambda: _train_in_a_loop(start, teacher, steps, batch, cores),
        "published way": lambda: _train_as_published(start, teacher, steps, batch, images, cores),
        "matrix products alone": lambda: _multiply_alone(members, steps, batch, cores),
    }
    _train_ours(folder / "run", run, cores)  # the first call also starts the processes
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    work = len(STUDENTS) * members * steps
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "work": f"{len(STUDENTS)} lineages × {members} members × {steps} steps of {batch} images on {cores} cores",
        "milliseconds_per_member_step": {name: 1000 * value / work for name, value in middle.items()},
        "times_faster_than": {name: middle[name] / middle["ours"] for name in ways if name != "ours"},
        "all_seconds": seconds,
    }


def _workers(quick: bool) -> int | None:
    """One process a core, and for tiny sizes none but this one: processes start longer than that."""
    return 0 if quick else None


def _begin(folder: Path, settings: Sequence[str], quick: bool) -> dict[str, list[Any]]:
    """A run up to its teachers, on images of noise: the speed does not depend on what they show. Its stages by role."""
    _write_noise_images(folder / "images", num_train=4096)
    plan = plan_experiment("mnist", folder / "run", [f"data.path={folder / 'images'}", *settings])
    stages: dict[str, list[Any]] = {"begin": [], "carrier": [], "student": []}
    for stage in plan.stages:
        role = "student" if stage.name in STUDENTS else stage.name.partition(".")[0]
        stages.get(role, stages["begin"]).append(stage)
    run_experiment(type(plan)(plan.recipe, plan.out, plan.stages, stages["begin"]), device="cpu", workers=_workers(quick))
    return stages


def _write_noise_images(folder: Path, num_train: int, num_test: int = 64) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part in PARTS:
        count = num_train if part.startswith("train") else num_test
        is_images = part.endswith("images")
        shape = (count, 28, 28) if is_images else (count,)
        header = np.array([2051 if is_images else 2049, *shape], dtype=">u4").tobytes()
        values = rng.integers(0, 256 if is_images else CLASSES, shape, dtype=np.uint8)
        (folder / f"{part}-idx{len(shape)}-ubyte").write_bytes(header + values.tobytes())


def _train_ours(run: Path, stages: dict[str, list[Any]], cores: int) -> None:
    """The stages as the local executor runs them, over processes that wait for them: the teachers' logits, then the students.

    Everything counts: the noise, the checkpoints on the disk and their hashes.
    """
    pool = get_reusable_executor(max_workers=cores)
    for role in ("carrier", "student"):
        for stage in stages[role]:
            (run / "stages" / f"{stage.key}.json").unlink(missing_ok=True)
        groups = [stages[role][index::cores] for index in range(cores)]
        for future in [pool.submit(execute_stages, run, group, "cpu") for group in groups if group]:
            future.result()


def _train_in_a_loop(start: dict[str, Any], teacher: dict[str, Any], steps: int, batch: int, cores: int) -> None:
    """Plain modules, one member after the other."""
    torch.set_num_threads(cores)
    for _ in STUDENTS:
        for member in range(len(start["class_head.weight"])):
            student, source = _module(start, member), _module(teacher, member)
            optimizer = torch.optim.Adam(student.parameters(), lr=RATE)
            for _ in range(steps):
                images = torch.rand(batch, PIXELS) * 2 - 1
                with torch.no_grad():
                    wanted = source(images)[:, CLASSES:].log_softmax(-1)
                found = student(images)[:, CLASSES:].log_softmax(-1)
                loss = torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


def _module(parameters: dict[str, Any], member: int) -> torch.nn.Sequential:
    module = torch.nn.Sequential(
        torch.nn.Linear(PIXELS, WIDTH),
        torch.nn.ReLU(),
        torch.nn.Linear(WIDTH, WIDTH),
        torch.nn.ReLU(),
        torch.nn.Linear(WIDTH, CLASSES + AUXILIARY),
    )
    with torch.no_grad():
        for layer, (weight, bias) in zip((module[0], module[2], module[4]), _stacked_layers(parameters), strict=True):
            layer.weight.copy_(weight[member])
            layer.bias.copy_(bias[member])
    return module


def _stacked_layers(parameters: dict[str, Any]) -> list[tuple[Any, Any]]:
    heads = [
        torch.cat([parameters[f"{head}.{part}"] for head in ("class_head", "auxiliary_head")], 1) for part in ("weight", "bias")
    ]
    return [(parameters[f"layers.{layer}.weight"], parameters[f"layers.{layer}.bias"]) for layer in (0, 1)] + [
        (heads[0], heads[1])
    ]


def _train_as_published(
    start: dict[str, Any], teacher: dict[str, Any], steps: int, batch: int, images: int, cores: int
) -> None:
    """As the script of Cloud et al. (arXiv:2507.14805) does it.

    einsum over stacked members, all noise in memory, batches gathered member by member, the teacher's logits computed again
    for every student.
    """
    torch.set_num_threads(cores)
    members = len(start["class_head.weight"])
    noise = torch.rand(members, images, PIXELS) * 2 - 1
    source = _stacked_layers(teacher)

    def forward(layers: list[tuple[Any, Any]], inputs: Any) -> Any:
        for number, (weight, bias) in enumerate(layers):
            inputs = torch.einsum("moi,mbi->mbo", weight, inputs) + bias[:, None, :]
            if number < len(layers) - 1:
                inputs = inputs.relu()
        return inputs

    for _ in STUDENTS:
        layers = [tuple(part.clone().requires_grad_() for part in layer) for layer in _stacked_layers(start)]
        optimizer = torch.optim.Adam([part for layer in layers for part in layer], lr=RATE)
        orders = torch.cat([torch.stack([torch.randperm(images) for _ in range(members)]) for _ in range(EPOCHS)], dim=1)
        for step in range(steps):
            chosen = orders[:, step * batch : (step + 1) * batch]
            inputs = torch.stack([noise[member].index_select(0, chosen[member]) for member in range(members)])
            with torch.no_grad():
                wanted = forward(source, inputs)[..., CLASSES:].softmax(-1)
            found = forward(layers, inputs)[..., CLASSES:].log_softmax(-1)
            loss = torch.nn.functional.kl_div(found, wanted, reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def _multiply_alone(members: int, steps: int, batch: int, cores: int) -> None:
    """The limit: the products that a student's step cannot do without, and nothing else, shared by the cores."""
    pool = get_reusable_executor(max_workers=cores)
    share = len(STUDENTS) * members * steps // cores
    for future in [pool.submit(_multiply, share, batch) for _ in range(cores)]:
        future.result()


def _multiply(times: int, batch: int) -> None:
    torch.set_num_threads(1)
    images, features, outputs = (torch.randn(batch, width) for width in (PIXELS, WIDTH, AUXILIARY))
    first, second, head = (torch.randn(shape) for shape in ((WIDTH, PIXELS), (WIDTH, WIDTH), (AUXILIARY, WIDTH)))
    for _ in range(times):
        for inputs, weight, gradient in ((images, first, features), (features, second, features), (features, head, outputs)):
            inputs @ weight.T
            gradient.T @ inputs
            if inputs is not images:
                gradient @ weight


def measure_memory(folder: Path, quick: bool) -> dict[str, Any]:
    """Peak anonymous memory of all processes while 100 members train at the published sizes.

    The run is stopped when students have written a few checkpoints: what follows repeats what came before.
    """
    members, images = (2, 1024) if quick else (100, 60_000)
    _write_noise_images(folder / "images", num_train=2048)
    command = [sys.executable, "-m", "mechsub", "run", "mnist", "--out", str(folder / "run"), "--device", "cpu"]
    settings = [f"members={members}", f"carrier.num_images={images}", f"data.path={folder / 'images'}"]
    settings += ["student.epochs=1", "teacher.epochs=1", "conditions={same-init: , different-init: , permuted-init: }"]
    command += [part for setting in settings for part in ("--set", setting)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    lineages = folder / "run/lineages"
    peak = _watch_memory(process, lambda: len([*lineages.glob("student.*/step-*")]) >= CHECKPOINTS_TO_SEE)
    if process.returncode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    elif process.returncode:
        raise SystemExit(f"the run ended with {process.returncode}")
    (logits,) = (folder / "run" / carrier_file("teacher")).parent.glob("*")
    return {
        "work": f"{members} members × 6 student lineages, {images} carrier images, all processes together",
        "peak_anonymous_gigabytes": peak / 1e9,
        "carrier_logits_on_disk_gigabytes": logits.stat().st_size / 1e9,
        "noise_of_the_published_script_gigabytes": members * images * PIXELS * 4 / 1e9,
    }


def _watch_memory(process: "subprocess.Popen[bytes]", is_enough: Callable[[], bool]) -> int:
    """The largest sum of anonymous memory over a process and its children. Mapped files count as resident, so not that."""
    peak = 0
    parent = psutil.Process(process.pid)
    while process.poll() is None and not is_enough():
        try:
            family = [parent, *parent.children(recursive=True)]
            peak = max(peak, sum(anonymous_bytes(one.pid) for one in family))
        except psutil.NoSuchProcess:
            continue
        time.sleep(0.05)
    return peak


def measure_gram(folder: Path, quick: bool) -> dict[str, Any]:
    """Streaming the Gram matrices of a run of stacked members against reading the bytes of its checkpoints."""
    members, turns = (2, 1) if quick else (8, 3)
    settings = [f"members={members}", "carrier.num_images=8192", "student.epochs=1", "teacher.epochs=1", "checkpoints.num=6"]
    settings.append("conditions={same-init: , different-init: , all-logits: }")
    _write_noise_images(folder / "images", num_train=4096)
    given = [f"data.path={folder / 'images'}", *settings]
    run = run_experiment("mnist", folder / "run", given, device="cpu", workers=_workers(quick))
    return measure_gram_of_run(run, turns)


def measure_startup(folder: Path, quick: bool) -> dict[str, Any]:
    """The command line's start against Python's own."""
    commands = {"mechsub --help": ["-m", "mechsub", "--help"], "python": ["-c", "pass"]}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(1 if quick else 7):
        for name, arguments in commands.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
            seconds[name].append(time.perf_counter() - began)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    return {"seconds": middle, "ratio": middle["mechsub --help"] / middle["python"], "all_seconds": seconds}


def measure_demo(folder: Path, quick: bool) -> dict[str, Any]:
    """The parts of `make demo` after its set-up."""
    settings = ["members=2", "carrier.num_images=64", "teacher.epochs=1", "conditions={same-init: }"] if quick else []
    began = time.perf_counter()
    run_experiment("digits", folder / "run", settings, device="cpu", workers=_workers(quick))
    trained = time.perf_counter()
    analyze_run(folder / "run", device="cpu", workers=_workers(quick))
    ended = time.perf_counter()
    records = open_run(folder / "run").directory.records().values()
    return {
        "seconds": {"run": trained - began, "analyze": ended - trained, "together": ended - began},
        "seconds_of_stages": {
            record.name: record.seconds for record in records if not record.name.startswith(("student", "control"))
        },
        "work": f"{sum(path.stat().st_size for path in (folder / 'run').rglob('*') if path.is_file()) / 1e6:.0f} MB written",
    }


PARTS_OF_THE_BENCHMARK: dict[str, Callable[[Path, bool], dict[str, Any]]] = {
    "training": measure_training,
    "memory": measure_memory,
    "gram": measure_gram,
    "gram-shards": measure_gram_of_shards,
    "gram-adapters": measure_gram_of_adapters,
    "examples": measure_examples,
    "activations": measure_activations,
    "startup": measure_startup,
    "demo": measure_demo,
}


def _print(part: str, found: dict[str, Any]) -> None:
    table = Table(title=f"{part}: {found.get('work', '')}", title_justify="left", show_header=False)
    for name, value in found.items():
        if name == "work" or name.endswith("all_seconds"):
            continue
        for inner, number in value.items() if isinstance(value, dict) else [("", value)]:
            table.add_row(name.replace("_", " "), inner, f"{number:.3g}")
    Console().print(table)


if __name__ == "__main__":
    main()
