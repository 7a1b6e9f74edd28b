"""mechsub: mechanistic analysis of subliminal learning.

The public functions are those of `mechsub.api`; each is loaded when it is asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechsub.api import (
        adopt_models,
        analyze_run,
        analyze_sweep,
        compare_runs,
        list_analyses,
        list_recipes,
        load_direction,
        load_recipe,
        missing_analyses,
        open_directions,
        open_run,
        open_steering_directions,
        open_sweep,
        plan_experiment,
        plan_sweep,
        run_experiment,
        run_sweep,
        save_directions,
        screen_data,
        verify_run,
        verify_sweep,
        write_report,
        write_sweep_report,
    )
    from mechsub.families.language.callback import LineageCallback

__all__ = [
    "LineageCallback",
    "adopt_models",
    "analyze_run",
    "analyze_sweep",
    "compare_runs",
    "list_analyses",
    "list_recipes",
    "load_direction",
    "load_recipe",
    "missing_analyses",
    "open_directions",
    "open_run",
    "open_steering_directions",
    "open_sweep",
    "plan_experiment",
    "plan_sweep",
    "run_experiment",
    "run_sweep",
    "save_directions",
    "screen_data",
    "verify_run",
    "verify_sweep",
    "write_report",
    "write_sweep_report",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mechsub' has no attribute {name!r}")
    if name == "LineageCallback":  # imports transformers and peft
        from mechsub.families.language.callback import LineageCallback

        return LineageCallback
    from mechsub import api  # imports torch: only when a function is asked for

    return getattr(api, name)
