"""The benchmark can be run, and writes what it measured; no time is asserted."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "scripts/benchmark.py"
GRAMS = ("gram", "gram-shards", "gram-adapters")


def test_every_part_of_the_benchmark_runs_at_tiny_sizes(tmp_path):
    out = tmp_path / "figures.json"
    done = subprocess.run([sys.executable, str(SCRIPT), "--quick", "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert set(found) == {"provenance", "quick", "training", "memory", *GRAMS, "examples", "activations", "startup", "demo"}
    assert set(found["training"]["times_faster_than"]) == {"loop over members", "published way", "matrix products alone"}
    assert found["memory"]["peak_anonymous_gigabytes"] > 0
    assert all(found[part]["share_of_reading_speed"] > 0 for part in ("gram", "gram-adapters"))
    assert all(value > 0 for value in found["examples"]["nano GPT-2 times_forward_and_backward"].values())
    assert all(value > 0 for value in found["activations"]["times_the_forward_of_the_body"].values())
    assert found["gram-shards"]["eager share_of_reading_speed"] > 0
