"""The hidden units of the classifier, or channels of its convolutions: any two of one layer can change places."""

from collections.abc import Mapping
from typing import Any

from mechsub.families.classifier.model import AUXILIARY_HEAD, CLASS_HEAD, hidden_layers, tensor_table
from mechsub.parameters.symmetry import UnitGroup, UnitPlace


def list_unit_groups(spec: Mapping[str, Any]) -> list[UnitGroup]:
    """One group a hidden layer; the last one is read by both heads."""
    known, shapes = tensor_table(spec), hidden_layers(spec)
    groups = []
    for layer, shape in enumerate(shapes):
        following = [f"layers.{layer + 1}"] if layer + 1 < len(shapes) else [CLASS_HEAD, AUXILIARY_HEAD]
        readers = [name for name in following if f"{name}.weight" in known]
        written = [UnitPlace(f"layers.{layer}.{part}", 0) for part in ("weight", "bias")]
        width = known[f"{readers[0]}.weight"].shape[1] // shape.num_units
        read = [UnitPlace(f"{name}.weight", 1, 0, width) for name in readers]
        kind = "hidden units" if shape.side is None else "channels"
        groups.append(UnitGroup(f"layer {layer}", kind, shape.num_units, (*written, *read), readers[0]))
    return groups
