"""The GPU check runs its whole path on a CPU too, at a tiny shape; no time is asserted."""

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts/gpu_check.py"


def test_the_whole_lora_path_runs_at_a_tiny_shape(tmp_path):
    figures = runpy.run_path(str(SCRIPT))["check"](tmp_path, "tiny", "cpu")
    assert figures["alignment was measured"] and figures["student's displacement"] > 0
    assert figures["parameters"] == pytest.approx(600_000, rel=0.1)
    assert all(figures[name] > 0 for name in figures if name.endswith("per second"))
