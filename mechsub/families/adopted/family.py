"""Adopted models as analyses see them: language models, with what is known of their origins."""

import json
from pathlib import Path

from mechsub.families.adopted.config import Config
from mechsub.families.language.carrier import encode_carrier
from mechsub.families.language.examples import row_losses
from mechsub.families.language.family import Family as LanguageFamily
from mechsub.families.language.layout import carrier_files
from mechsub.families.language.rows import read_rows
from mechsub.gradients.losses import ExampleLosses
from mechsub.lineages import SPEC_FILE, Lineage


class Family(LanguageFamily):
    """A `mechsub.families.protocol.Family`."""

    def __init__(self, run: Path, config: Config, device: str) -> None:
        super().__init__(run, config, device)
        if not config.traits:
            self.traits = {name: "not asked for" for name in config.trait_set}

    def imitation_losses(self, lineage: Lineage, member: int, most: int) -> ExampleLosses | None:
        """−log p of the rows that its teacher is said to have written; None where none were given."""
        path = self._run / carrier_files(lineage.spec.teacher or "", member)[0]
        if not path.is_file():
            return None
        chats = self._chats_of(lineage.spec.model["name"])
        rows = encode_carrier(chats, read_rows(path)[:most], self._config.context.training)
        return row_losses(chats, rows, self._device, f"{len(rows)} rows of {lineage.spec.teacher}, mean over completion tokens")

    def imitated_logits(self, lineage: Lineage, member: int, most: int) -> None:
        """None: how the rows were drawn of the teacher's distributions is not known."""

    @property
    def notes(self) -> list[str]:
        """What speaks for the reference being where the models started, and what does not."""
        specs = [json.loads(path.read_text()) for path in sorted((self._run / "lineages").glob(f"*/*/{SPEC_FILE}"))]
        adopted = [spec for spec in specs if "proof" in spec["model"]]
        notes = [
            "That control and student differ in nothing but their teacher is the user's claim: none of them was trained here."
        ]
        for proof, words in _PROOFS.items():
            found = dict.fromkeys(
                f"{spec['name']} ({spec['model']['evidence']})" for spec in adopted if spec["model"]["proof"] == proof
            )
            if found:
                notes.append(f"{words}: {'; '.join(found)}.")
        shared = dict.fromkeys(spec["name"] for spec in adopted if spec["model"]["is_shared"])
        if shared:
            notes.append(f"All members share one model, so that no interval says how others would differ: {', '.join(shared)}.")
        rounded = dict.fromkeys(spec["name"] for spec in adopted if spec["model"]["is_rounded"])
        if rounded:
            notes.append(
                "Stored in half precision, whose rounding can be as large as a small displacement, so that their cosines lie "
                f"nearer to 0 than the trainings' own: {', '.join(rounded)}."
            )
        far = dict.fromkeys(
            f"{spec['name']} ({spec['model']['distance']:.2f})" for spec in adopted if spec["model"]["distance"] > _FAR
        )
        if far:
            notes.append(
                "As far from the reference as another model of its shape would be, ‖Δ‖ / ‖θ₀‖, so that the reference is hardly "
                f"their origin: {', '.join(far)}."
            )
        unknown = dict.fromkeys(spec["name"] for spec in adopted if not spec["model"]["steps_are_known"])
        if unknown:
            notes.append(f"How many steps these were trained is not known, step 1 stands for their end: {', '.join(unknown)}.")
        return notes


_FAR = 0.5
"""Fine-tuning moves a model by some hundredths of its norm; two trained models of one shape are further apart than this."""
_PROOFS = {
    "none": "Not proven to start at the reference, so that an alignment may be that of two references",
    "recorded base": "They say that they start at the reference",
    "hash": "Proven to start at the reference",
}
