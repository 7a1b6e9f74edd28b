import json

from mechsub.findings import Finding, findings_document


def finding(**fields):
    values = dict(
        analysis="demo", quantity="effect", condition="same-init", trait="digits", context="images", step=6, scope="all",
        estimate=0.5, low=0.4, high=0.6, confidence=0.95, unit="accuracy", n=5,
        null="none", null_low=float("nan"), null_high=0.0,
        num_references=5, verdict="transferred", reason="because", rule="", margin=0.05, formula="a − b", source="here",
    )  # fmt: skip
    return Finding(**{**values, **fields})


def test_missing_numbers_become_null_and_the_document_is_json():
    document = findings_document("run", [finding()])
    assert document["schema"] == 1 and document["run"] == "run"
    (row,) = json.loads(json.dumps(document, allow_nan=False))["findings"]
    assert row["null_low"] is None and row["estimate"] == 0.5 and row["n"] == 5
