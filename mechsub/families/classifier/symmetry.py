"""The hidden units of the multilayer perceptron: any two of one layer can change places."""

from collections.abc import Mapping
from typing import Any

from mechsub.families.classifier.model import AUXILIARY_HEAD, CLASS_HEAD, tensor_table
from mechsub.parameters.symmetry import UnitGroup, UnitPlace


def list_unit_groups(spec: Mapping[str, Any]) -> list[UnitGroup]:
    """One group a hidden layer; the last one is read by both heads."""
    known, widths = tensor_table(spec), spec["hidden_widths"]
    groups = []
    for layer, width in enumerate(widths):
        following = [f"layers.{layer + 1}"] if layer + 1 < len(widths) else [CLASS_HEAD, AUXILIARY_HEAD]
        readers = [name for name in following if f"{name}.weight" in known]
        written = [UnitPlace(f"layers.{layer}.{part}", 0) for part in ("weight", "bias")]
        read = [UnitPlace(f"{name}.weight", 1) for name in readers]
        groups.append(UnitGroup(f"layer {layer}", "hidden units", width, (*written, *read), readers[0]))
    return groups
