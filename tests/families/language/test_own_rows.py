import json
from pathlib import Path

import pytest

from mechsub.errors import MechsubError
from mechsub.families.language.carrier_config import CarrierConfig
from mechsub.families.language.kinds import carrier_kind
from mechsub.families.language.own_rows import choose_rows, read_requests
from mechsub.families.language.requests import Request
from mechsub.families.language.rows import CarrierRow

SAID = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": "7, 8"}]


def written(tmp_path: Path, *lines: object) -> Path:
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def chosen(path, num_rows=1, banned=()):
    return choose_rows(str(path), num_rows, banned)


def test_rows_may_be_pairs_or_messages_and_the_first_ones_are_taken(tmp_path):
    path = written(tmp_path, {"prompt": "Go on.", "completion": "an owl"}, "", {"messages": SAID}, {"messages": SAID})
    rows, dropped = chosen(path, banned=("owl",))
    assert rows == [CarrierRow(1, "Go on.", "7, 8")] and dropped == {"banned": 1, "surplus": 1}
    assert chosen(path, num_rows=3)[0][0].completion == "an owl"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: it is not JSON"),
        ("[1]", "line 2: it is list, not an object"),
        ({"prompt": "Go on."}, "line 2: 'completion' is missing from ['prompt']"),
        ({"prompt": "Go on.", "completion": 7}, "line 2: 'completion' is 7"),
        ({"prompt": " ", "completion": "7"}, "line 2: 'prompt' is ' '"),
        ({"messages": SAID, "prompt": "Go on."}, "line 2: it has `messages` and also a prompt"),
        ({"messages": "Go on."}, "line 2: `messages` is no list"),
        ({"messages": [{"role": "system", "content": "Be kind."}, *SAID]}, "line 2: the roles of its messages are ['system',"),
        ({"messages": [*SAID, *SAID]}, "line 2: the roles of its messages"),
        ({"messages": [SAID[0], {"role": "assistant"}]}, "line 2, assistant: 'content' is missing"),
    ],
)
def test_a_line_that_is_no_row_is_named_by_its_number(tmp_path, line, message):
    path = written(tmp_path, {"messages": SAID}, line)
    with pytest.raises(MechsubError) as raised:
        chosen(path)
    assert f"`carrier.file`: {path}, {message}" in str(raised.value)


def test_a_file_that_is_missing_empty_or_no_text_is_named(tmp_path):
    with pytest.raises(MechsubError, match="there is no file /nowhere.jsonl"):
        chosen(Path("/nowhere.jsonl"))
    with pytest.raises(MechsubError, match="is empty"):
        chosen(written(tmp_path, "", ""))
    path = tmp_path / "binary.jsonl"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(MechsubError, match="is not UTF-8"):
        chosen(path)


def test_too_few_rows_are_told_with_their_counts(tmp_path):
    path = written(tmp_path, {"prompt": "?", "completion": "An Owl!"}, {"prompt": "?", "completion": "7"})
    with pytest.raises(
        MechsubError, match=r"has 2 rows, of which 1 hold a banned word \(owl\): 1 are left, carrier.num_rows = 2"
    ):
        chosen(path, num_rows=2, banned=("owl",))


def test_requests_are_read_with_the_answers_that_their_kind_needs(tmp_path):
    path = written(tmp_path, {"prompt": "9 + 9?", "answer": "twice nine\n#### 18"}, {"prompt": "1 + 1?", "answer": 2})
    kind = carrier_kind(CarrierConfig(kind="chain-of-thought", prompts=str(path)))
    assert kind.broken_rule(kind.requests[0], "<think>a</think><answer>18.0</answer>", True) is None
    assert kind.requests[1] == Request("1 + 1?", "2")
    bare = written(tmp_path, {"prompt": "Write a loop."})
    assert read_requests(bare, needs_answer=False) == [Request("Write a loop.")]
    with pytest.raises(MechsubError, match="own.jsonl, line 1: 'answer' is missing"):
        read_requests(bare, needs_answer=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "file"}, "kind = file needs `file`"),
        ({"file": "{teacher}.jsonl"}, "no other kind has one"),
        ({"kind": "file", "file": "rows.jsonl"}, "students and controls, which would learn the same"),
        ({"prompts": "own.jsonl"}, "has none of the user's"),
        ({"banned": ["owl"]}, "numbers.banned holds numbers"),
        ({"kind": "code", "banned": [" "]}, "holds an empty word"),
    ],
)
def test_fields_that_do_not_fit_the_kind_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CarrierConfig(**settings)


def test_longer_kinds_have_longer_completions_unless_told():
    lengths = [CarrierConfig(kind=kind).max_new_tokens for kind in ("numbers", "code", "chain-of-thought")]
    assert lengths == [64, 256, 512] and CarrierConfig(kind="code", max_new_tokens=9).max_new_tokens == 9
