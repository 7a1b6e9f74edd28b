"""The public functions: each composes the rooms for one command, and is what a notebook calls."""

from mechsub.api.adoption import adopt_models, plan_adoption
from mechsub.api.comparison import compare_runs
from mechsub.api.runs import (
    Plan,
    analyze_run,
    describe_installation,
    list_analyses,
    missing_analyses,
    open_directions,
    open_run,
    plan_analyses,
    plan_experiment,
    resolve_device,
    run_experiment,
    verify_run,
    write_report,
)
from mechsub.api.screening import screen_data
from mechsub.api.steering import load_direction, open_steering_directions, save_directions
from mechsub.api.sweeps import (
    SweepPlan,
    analyze_sweep,
    missing_from_sweep,
    open_sweep,
    plan_sweep,
    plan_sweep_analyses,
    run_sweep,
    verify_sweep,
    write_sweep_report,
)
from mechsub.executors.local import Progress
from mechsub.recipe import list_recipes, load_recipe
from mechsub.run import Run
from mechsub.sweeps.config import is_sweep
from mechsub.sweeps.directory import is_sweep_directory

__all__ = [
    "Plan",
    "Progress",
    "Run",
    "SweepPlan",
    "adopt_models",
    "analyze_run",
    "analyze_sweep",
    "compare_runs",
    "describe_installation",
    "is_sweep",
    "is_sweep_directory",
    "list_analyses",
    "list_recipes",
    "load_direction",
    "load_recipe",
    "missing_analyses",
    "missing_from_sweep",
    "open_directions",
    "open_run",
    "open_steering_directions",
    "open_sweep",
    "plan_adoption",
    "plan_analyses",
    "plan_experiment",
    "plan_sweep",
    "plan_sweep_analyses",
    "resolve_device",
    "run_experiment",
    "run_sweep",
    "save_directions",
    "screen_data",
    "verify_run",
    "verify_sweep",
    "write_report",
    "write_sweep_report",
]
