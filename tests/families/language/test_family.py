import json

import numpy as np

from mechsub.families.language.layout import carrier_files
from mechsub.families.language.rows import read_rows


def test_carrier_texts_are_the_rows_without_their_prompts(nano_run):
    rows = read_rows(nano_run.path / carrier_files("teacher.owl", 1)[0])
    texts = nano_run.family.carrier_texts("teacher.owl", 1)
    assert [text.completion for text in texts] == [row.completion for row in rows]
    prompts = {text.request: row.prompt for text, row in zip(texts, rows, strict=True)}
    assert sorted(prompts.values()) == sorted({row.prompt for row in rows})  # a request is its prompt, in any file
    assert nano_run.family.carrier_texts("teacher.unicorn", 1) is None
    assert nano_run.lacks("carrier_texts") is None


def test_the_semantic_filter_is_measured_end_to_end(nano_run):
    data = nano_run.results["semantic_filter"]
    for trait in nano_run.traits:
        for member in range(2):
            shared = {text.request for text in nano_run.family.carrier_texts(f"teacher.{trait}", member)} & {
                text.request for text in nano_run.family.carrier_texts("neutral.uniform-answer", member)
            }
            cell = data.sel(taught=trait, member=member)
            assert int(cell.shared_requests) == len(shared)
            assert np.isfinite(cell.accuracy) == (len(shared) >= 10) == (int(cell.accuracy_status) == 0)
    findings = json.loads((nano_run.path / "findings.json").read_text())["findings"]
    found = [finding for finding in findings if finding["analysis"] == "semantic_filter"]
    assert [finding["trait"] for finding in found] == ["owl", "wolf"]
    assert all(finding["condition"] == "" and finding["margin"] == 0.05 for finding in found)
    page = (nano_run.path / "report/index.html").read_text()
    assert 'id="semantic_filter"' in page and "Not analysed here" not in page
    assert "all conditions" in page
