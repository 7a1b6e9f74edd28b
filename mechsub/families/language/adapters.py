"""Low-rank adapters through `peft`: put into a model, written, read back, and told to the tensor table."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import PreTrainedModel

from mechsub.checkpoints import LoraInfo, TensorInfo, tensor_shapes
from mechsub.errors import RecipeError
from mechsub.families.language.folders import read_json, refuse_pickles
from mechsub.families.language.models import tensor_table
from mechsub.families.language.training_config import AdapterConfig
from mechsub.lineages import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from mechsub.parameters.symmetry import Arrangement
from mechsub.training.recorder import AdapterFormat

_NAME = "default"
"""How `peft` calls an adapter inside a model."""
_PREFIX = "base_model.model."
"""Before every name in its files."""
_KEEPS_BASE = (True, "gaussian", "eva")
"""Values of `init_lora_weights` with which the model computes at step 0 what its base computes."""
_UNREAD = ("alora_invocation_tokens", "layer_replication", "target_parameters", "trainable_token_indices", "use_bdlora",
           "use_qalora", "lora_bias", "velora_config", "monteclora_config", "kasa_config", "arrow_config")  # fmt: skip
"""Settings under which the change of a weight is not scale · B A, or of a part of it only."""


def attach_adapter(model: PreTrainedModel, config: AdapterConfig, key: int) -> LoraConfig:
    """Put a fresh adapter into a model in place, its A drawn from the stream ``key``; nothing else is trained then."""
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # any number will do
        target_modules=config.targets if isinstance(config.targets, str) else list(config.targets),
        use_rslora=config.rslora,
        use_dora=config.dora,
        lora_dropout=config.dropout,
        init_lora_weights=True if config.initialisation == "kaiming" else "gaussian",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key % 2**63)
        _inject(lora, model, "`adapter`")
    _set_magnitudes(model)
    return lora


@torch.no_grad()
def permute_adapter(model: PreTrainedModel, arrangement: Arrangement) -> None:
    """Put the columns of a fresh adapter's A, in place, in the order of the units that its layers read.

    The model's weights stand in that order already. With B = 0 the adapter then is, and stays in training, the one that would
    have been drawn for the model as it was, in other coordinates.
    """
    for name, parameter in model.named_parameters():
        module_name, found, _ = name.partition(f".lora_A.{_NAME}.weight")
        if found:
            module: Any = model.get_submodule(module_name)
            order = arrangement.index.get((f"{module_name}.weight", 0 if module.fan_in_fan_out else 1))
            if order is not None:
                parameter.copy_(parameter[:, order.to(parameter.device)].clone())


def attach_saved_adapter(model: PreTrainedModel, folder: Path, source: str) -> LoraConfig:
    """Put the adapter of a folder into a model in place."""
    lora = read_adapter_config(folder, source)
    _inject(lora, model, source)
    found: Any = set_peft_model_state_dict(model, load_file(folder / ADAPTER_WEIGHTS))
    if found.unexpected_keys:
        raise RecipeError(f"{source}: {folder} holds {found.unexpected_keys[0]}, which is not in the model that it is added to")
    return lora


def read_adapter_config(folder: Path, source: str) -> LoraConfig:
    """The configuration of an adapter whose change of the weights can be read exactly.

    Raises:
        RecipeError: it is no LoRA adapter, its weights are pickled, or it does not start at its base.
    """
    if not (folder / ADAPTER_WEIGHTS).is_file():
        refuse_pickles(source, folder)
        raise RecipeError(f"{source}: {folder} has no {ADAPTER_WEIGHTS}; save the adapter again with save_pretrained")
    content = read_json(folder / ADAPTER_CONFIG, source)
    if content.get("peft_type") != "LORA":
        raise RecipeError(f"{source}: {folder} is a {content.get('peft_type')} adapter; LoRA, rsLoRA and DoRA can be read")
    start = content.get("init_lora_weights", True)
    if start not in _KEEPS_BASE:
        raise RecipeError(
            f"{source}: {folder} was initialised with init_lora_weights = {start!r}, so that its first step is not its base: a "
            "displacement from the base would hold that difference; if it was saved relative to the base (see `peft` on "
            "converting PiSSA and OLoRA to LoRA), convert it and set init_lora_weights to true"
        )
    odd = [name for name in _UNREAD if content.get(name)]
    if odd:
        raise RecipeError(f"{source}: {folder} uses {odd[0]} = {content[odd[0]]!r}, whose change of the weights cannot be read")
    try:
        return LoraConfig(**{name: value for name, value in content.items() if name in LoraConfig.__dataclass_fields__})
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{source}: {folder / ADAPTER_CONFIG} is not one that this peft reads: {error}") from None


def adapter_table(
    model: PreTrainedModel, table: Mapping[str, TensorInfo], held: Sequence[str], source: str
) -> dict[str, TensorInfo]:
    """The tensor table of a lineage of adapters: how each tensor of the base's ``table`` is changed.

    ``model`` has the adapter in it; ``held``: the names in the adapter's files.

    Raises:
        RecipeError: a changed tensor is tied to another, or the files hold what the model has no place for.
    """
    found = {name: replace(info, frozen=True, stored=None) for name, info in table.items()}
    used: set[str] = set()
    for module_name, module in model.named_modules():
        if isinstance(module, LoraLayer) and _NAME in module.scaling:
            name, lora = f"{module_name}.weight", _describe(module_name, module)
            _refuse_tied(name, table, source)
            found[name] = replace(found[name], frozen=False, lora=lora)
            used |= {lora.a, lora.b, *([lora.magnitude] if lora.magnitude else [])}
    for name in table:  # modules that are trained whole, and biases, also beside an adapter
        module_name, _, own = name.rpartition(".")
        whole = {_PREFIX + name, f"{_PREFIX}{module_name}.base_layer.{own}"} & {*held}
        if whole:
            _refuse_tied(name, table, source)
            found[name] = replace(found[name], frozen=False, stored=min(whole))
            used |= whole
    unread, lacking = sorted({*held} - used), sorted(used - {*held})
    if unread or lacking:
        what = f"holds {unread[0]}, which the base has no place for" if unread else f"lacks {lacking[0]}"
        raise RecipeError(f"{source}: the adapter {what}: it belongs to another base")
    return found


def outline_adapter(outline: PreTrainedModel, folder: Path, source: str) -> dict[str, TensorInfo]:
    """The tensor table of an adapter's folder, from an outline of its base without weights; it is left with the adapter in it.

    Raises:
        RecipeError: see `read_adapter_config`; the adapter does not fit the base.
    """
    table = tensor_table(outline)
    _inject(read_adapter_config(folder, source), outline, source)
    shapes = tensor_shapes(folder)
    found = adapter_table(outline, table, list(shapes), source)
    for name, info in found.items():
        if info.lora is not None:
            rows, columns = reversed(info.shape) if info.lora.flipped else info.shape
            if (shapes[info.lora.b][0], shapes[info.lora.a][1]) != (rows, columns):
                raise RecipeError(
                    f"{source}: its change of {name} is {shapes[info.lora.b][0]} × {shapes[info.lora.a][1]}, the base's weight "
                    f"is {rows} × {columns}: it belongs to another base"
                )
    return found


def _refuse_tied(name: str, table: Mapping[str, TensorInfo], source: str) -> None:
    tied = [other for other, info in table.items() if name in {info.tied_to, other if info.tied_to else None}]
    if tied:
        raise RecipeError(f"{source}: an adapter on {name}, which is tied ({tied[0]}), is no change of one weight")


def adapter_format(model: PreTrainedModel, lora: LoraConfig, base: str) -> AdapterFormat:
    """How the adapter in a model is written; ``base`` names the model that it is added to."""
    content: dict[str, Any] = lora.to_dict()  # type: ignore[no-untyped-call]
    config = {name: sorted(value) if isinstance(value, set) else value for name, value in content.items()}
    config |= {"base_model_name_or_path": base, "inference_mode": True}
    plain = {name: getattr(value, "value", value) for name, value in config.items()}
    return AdapterFormat(plain, {name: _file_name(name) for name in trained_parameters(model)})


def trained_parameters(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """The parameters that training moves: all of them, or the adapter's."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _inject(lora: LoraConfig, model: PreTrainedModel, source: str) -> None:
    with _quiet():
        try:
            inject_adapter_in_model(lora, model, adapter_name=_NAME)
        except ValueError as error:
            raise RecipeError(f"{source}: {str(error).splitlines()[0]}") from None
    for name, parameter in model.named_parameters():
        if "lora_" in name or ".modules_to_save." in name:
            parameter.data = parameter.data.float()  # half precision would lose most updates, and round what was saved


@torch.no_grad()
def _set_magnitudes(model: PreTrainedModel) -> None:
    """DoRA starts at its base: ‖W‖ by rows, in float32; `peft` takes it in the base's precision, which moves every row."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and _NAME in module.lora_magnitude_vector:
            weight = module.get_base_layer().weight.float()
            norms = torch.linalg.vector_norm(weight, dim=0 if module.fan_in_fan_out else 1)
            module.lora_magnitude_vector[_NAME].weight.data = norms.to(weight.device)


def _describe(module_name: str, module: Any) -> LoraInfo:
    prefix = f"{_PREFIX}{module_name}"
    is_embedding = _NAME in module.lora_embedding_A
    suffixes = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
    return LoraInfo(
        a=f"{prefix}.{suffixes[0]}",
        b=f"{prefix}.{suffixes[1]}",
        scale=float(module.scaling[_NAME]),
        flipped=is_embedding or bool(module.fan_in_fan_out),
        magnitude=f"{prefix}.lora_magnitude_vector" if _NAME in module.lora_magnitude_vector else None,
    )


def _file_name(parameter: str) -> str:
    """`peft` leaves the adapter's name out, and the end of a magnitude's."""
    name = parameter.replace(f".{_NAME}", "")
    return _PREFIX + (name.removesuffix(".weight") if "lora_magnitude_vector" in name else name)


@contextmanager
def _quiet() -> Iterator[None]:
    """`peft` warns that it chooses `fan_in_fan_out` for GPT-2's layers, and of a name that transformers will drop."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield
