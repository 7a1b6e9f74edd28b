"""The numbers by which the rows of a dataset are ranked before anybody learns them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedModel

from mechsub.errors import AnalysisError
from mechsub.families.language.carrier import encode_carrier
from mechsub.families.language.chat import Row
from mechsub.families.language.examples import row_losses
from mechsub.families.language.layout import carrier_files, ranking_file
from mechsub.families.language.members import load_chats, load_merged_model
from mechsub.families.language.rows import read_rows
from mechsub.gradients.example_statistics import ExampleReading, read_examples
from mechsub.gradients.losses import compute_losses
from mechsub.lineages import Lineage
from mechsub.parameters.directions import displacement, load_tensors
from mechsub.rundir import write_json
from mechsub.stage import Task


def rank_rows(tasks: Sequence[Task]) -> None:
    """Stage: the numbers of every row of one member's carrier, at the reference of the teacher that wrote it.

    ``overlap``: ⟨−∇ℓ_i, Δ_T⟩, in loss × weight: how far a small step on the row moves along the teacher's displacement; not
    there where the teacher's weights have not moved. The others: see `describe_rows`.
    """
    for task in tasks:
        arguments = task.stage.arguments
        member, teacher = arguments["member"], Lineage(task.run, arguments["teacher"], arguments["member"])
        chats, texts = load_chats(task), read_rows(task.path(carrier_files(arguments["carrier_of"], member)[0]))
        rows, taught = (encode_carrier(chats, texts, arguments[prompt]) for prompt in ("system_prompt", "teacher_prompt"))
        said = row_losses(chats, taught, task.device, "the rows as the teacher was asked them")
        teacher_losses = compute_losses(_load(task, arguments["teacher"], arguments["teacher_step"]), said).numpy()
        reference = _load(task, arguments["origin"], 0)
        directions = []
        if arguments["teacher_step"] > 0:
            moved = displacement(teacher, arguments["teacher_step"])
            directions.append(load_tensors(moved, (name for name, _ in reference.named_parameters()), 0))
        reading = read_examples(reference, row_losses(chats, rows, task.device, "the rows of the carrier"), directions)
        numbers = describe_rows(rows, reading, teacher_losses)
        if directions:
            numbers["overlap"] = reading.totals[:, 0]
        unknown = [name for name, values in numbers.items() if not np.isfinite(values).all()]
        if unknown:
            raise AnalysisError(
                f"{task.stage.name}: {unknown[0]} is not finite on some rows, so that they cannot be ranked: the reference or "
                f"{arguments['teacher']} computes NaN or infinity there; train it at a smaller learning rate"
            )
        write_json(
            task.path(ranking_file(arguments["carrier_of"], member)),
            {name: values.tolist() for name, values in numbers.items()},
        )


def describe_rows(
    rows: Sequence[Row], reading: ExampleReading, teacher_losses: Float[np.ndarray, " row"] | None
) -> dict[str, Float[np.ndarray, " row"]]:
    """What is known of each row without the direction of a trait.

    ``log-ratio``: log p_T − log p₀ of the completion, in nats (not there without a teacher); ``loss``: −log p₀ a token, in
    nats; ``length``: its tokens; ``gradient-norm``: ‖∇ℓ_i‖ at the reference. ``reading`` and ``teacher_losses`` are of
    `row_losses`: a row's sum over the mean length.
    """
    lengths = np.array([float(len(row.completion)) for row in rows])
    surprise = reading.losses * lengths.mean()
    found: dict[str, Float[np.ndarray, " row"]] = {}
    if teacher_losses is not None:
        found["log-ratio"] = surprise - teacher_losses * lengths.mean()
    return found | {"loss": surprise / lengths, "length": lengths, "gradient-norm": reading.norms}


def _load(task: Task, lineage: str, step: int) -> PreTrainedModel:
    return load_merged_model(task.run, Lineage(task.run, lineage, task.stage.arguments["member"]), step, 0, task.device)
