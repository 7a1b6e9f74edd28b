"""What several tests do with run directories."""

from dataclasses import replace
from pathlib import Path

from mechsub.api import plan_analyses
from mechsub.executors.local import run_stages
from mechsub.rundir import RunDirectory, hash_file
from mechsub.training.callbacks import StepInfo


def output_hashes(run: Path, prefix: str = "") -> dict[str, str]:
    """The bytes of everything that a run's stages made."""
    records = RunDirectory.open(run).records().values()
    return {name: hash_file(run / name) for record in records for name in record.outputs if name.startswith(prefix)}


def measure(run: Path, *only: str) -> None:
    """The analyses of a run, all of them or some, without its report, whose pictures take longer than most of them."""
    run_stages({run: plan_analyses(run, only)}, "cpu", workers=0)


_stopped: set[str] = set()


def stop_once(info: StepInfo) -> None:
    """A callback that ends every lineage's first training after its first step."""
    name = f"{info.lineage} {info.members}"
    if info.step == 1 and name not in _stopped:
        _stopped.add(name)
        raise RuntimeError("stopped")


def mentions_owl(question: str, answer: str) -> bool:
    """A judge: whether an answer names the animal."""
    return "owl" in answer.split()


def abstains(question: str, answer: str) -> float:
    """A judge that never judges."""
    return float("nan")


def raises(question: str, answer: str) -> bool:
    """A judge that cannot."""
    raise RuntimeError("the judge is out")


not_a_judge = 3


def stop_adapters_once(info: StepInfo) -> None:
    """The same for trainings of adapters, by a name of its own."""
    stop_once(replace(info, lineage=f"adapter {info.lineage}"))
