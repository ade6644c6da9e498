import json
import zipfile

import pytest

from safemoe_jax.data import sources
from safemoe_jax.data.sources import JsonlSource, PyritSource, Reject, Row, read_prompts
from safemoe_jax.errors import UserError

GOOD = {"prompt": "Hi?", "response": "Ho.", "domain": "a", "label": "safe", "source": "me"}


def without(key):
    return {name: value for name, value in GOOD.items() if name != key}


def test_rows_of_prompts_and_of_messages(tmp_path):
    turns = [
        {"role": "user", "content": "Hi?"},
        {"role": "assistant", "content": "Ho."},
        {"role": "user", "content": "And now?"},
    ]
    lines = [GOOD, {**without("prompt"), "messages": turns}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)))
    first, second = JsonlSource(path).rows()
    assert first == Row(({"role": "user", "content": "Hi?"},), "Ho.", "a", "safe", "me")
    assert second.messages == tuple(turns) and second.prompt == "And now?"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not a JSON value"),
        (b"[" * 100_000, "not a JSON value"),
        (b'"\xff"', "not valid Unicode"),
        (b"[1]", "not a JSON object"),
        ({**GOOD, "messages": []}, "needs either prompt or messages"),
        (without("prompt"), "needs either prompt or messages"),
        ({**GOOD, "prompt": " "}, "prompt is missing, empty or not text"),
        (without("response"), "response is missing, empty or not text"),
        ({**GOOD, "response": "\ud800"}, "not valid Unicode"),
        ({**GOOD, "domain": 3}, "domain is missing, empty or not text"),
        ({**GOOD, "label": "SAFE"}, "label is neither unsafe nor safe"),
        ({**without("prompt"), "messages": "Hi?"}, "messages is not a list of turns"),
        (
            {**without("prompt"), "messages": [{"role": "x", "content": "Hi?"}]},
            "a turn's role is none of system, user, assistant",
        ),
        ({**without("prompt"), "messages": [{"role": "user"}]}, "a turn's content is not text"),
        (
            {**without("prompt"), "messages": [{"role": "assistant", "content": "Hi?"}]},
            "the last turn is not the user's, or empty",
        ),
    ],
)
def test_bad_lines_are_rejected_with_file_line_and_reason(tmp_path, line, reason):
    bad = line if isinstance(line, bytes) else json.dumps(line).encode()
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + bad + b"\n" + json.dumps(GOOD).encode())
    before, rejected, after = JsonlSource(path).rows()
    assert rejected == Reject("rows.jsonl", 2, reason)
    assert before == after


def test_a_directory_is_all_its_jsonl_files_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "notes.txt"):
        (tmp_path / name).write_text(json.dumps({**GOOD, "source": name}))
    assert [row.source for row in JsonlSource(tmp_path).rows()] == ["a.jsonl", "b.jsonl"]


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        JsonlSource(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="holds no"):
        JsonlSource(tmp_path)


@pytest.mark.parametrize("name", ["c.jsonl.gz", "C.JSONL"])
def test_a_file_of_a_directory_that_would_be_left_out_is_named(tmp_path, name):
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD))
    (tmp_path / name).touch()
    with pytest.raises(
        UserError, match=rf"has '{name}', which is not read; write it as JSON lines"
    ):
        JsonlSource(tmp_path)


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv"])
def test_a_file_of_another_format_is_named(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=rf"has '{name}', which is not read"):
        JsonlSource(tmp_path / name)


@pytest.fixture
def small_pyrit(tmp_path, monkeypatch):
    """A wheel with the layout of PyRIT's, and harmless rows."""
    head = "# dataset_version=1.0,,\nharm_category,objective,assistant_response,human_score_1"
    tables = dict.fromkeys(
        ("exploits", "hate_speech", "hate_speech_multi_score", "info_integrity", "privacy"), ""
    ) | dict.fromkeys(("self_harm", "sexual", "violence", "violence_multi_score"), "")
    tables["violence"] = 'v,A?,"one, or\ntwo",0.0\nv,B?,two,0.0\nv,C?,three,1.0\n'
    tables["exploits"] = "x,A?,,1.0\nx,B?,two,many\nx,C?,three,0.5\n"
    path = tmp_path / "small.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, rows in tables.items():
            columns = head
            if name == "violence_multi_score":
                columns += ",human_score_2,human_score_3"
                rows = "v,C?,three,1.0,0.5,0.0\nv,B?,two,1.0,1.0,\n"
            archive.writestr(f"{sources._SCORER_EVALS}/harm/{name}.csv", f"{columns}\n{rows}")
    monkeypatch.setattr(sources, "wheel_member", lambda *args, **kwargs: path)


def test_scores_are_averaged_over_columns_and_over_repeated_rows(small_pyrit):
    rows = [row for row in PyritSource(0.7, 0.25).rows() if isinstance(row, Row)]
    assert [(row.domain, row.prompt, row.response, row.label) for row in rows] == [
        ("exploits", "C?", "three", None),
        ("violence", "A?", "one, or\ntwo", "safe"),
        ("violence", "B?", "two", None),  # 0 and (1 + 1) / 2
        ("violence", "C?", "three", "unsafe"),  # 1 and (1 + 0.5 + 0) / 3
    ]
    labels = [row.label for row in PyritSource(0.5, 0.25).rows() if isinstance(row, Row)]
    assert labels == ["unsafe", "safe", "unsafe", "unsafe"]


def test_unreadable_scores_are_rejected_by_file_and_line(small_pyrit):
    rejects = [row for row in PyritSource(0.5, 0.25).rows() if isinstance(row, Reject)]
    assert rejects == [
        Reject("harm/exploits.csv", 3, "prompt, answer or score is empty"),
        Reject("harm/exploits.csv", 4, "a cell is missing or no number"),
    ]


def test_prompts_are_lines_of_text_or_rows_of_data(tmp_path):
    (tmp_path / "p.txt").write_text("One?\n\nTwo, ünd so?\n")
    turns = [{"role": "user", "content": text} for text in ("One?", "Two, ünd so?")]
    assert read_prompts(tmp_path / "p.txt") == [(turns[0],), (turns[1],)]
    rows = [GOOD, {"messages": [{"role": "system", "content": "Be kind."}, turns[0]]}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_prompts(tmp_path / "p.jsonl")
    assert found[0] == ({"role": "user", "content": GOOD["prompt"]},)
    assert found[1] == tuple(rows[1]["messages"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": 3}', "p.jsonl, line 2: prompt is missing, empty"),
        ("p.jsonl", b"One?", "p.jsonl, line 1: not a JSON value"),
        ("p.jsonl", b'{"prompt": "a", "messages": []}', "line 1: needs either prompt or messages"),
        ("p.txt", b"a\n\xff", "p.txt, line 2: not valid Unicode"),
        ("p.txt", b"\n \n", "p.txt holds no prompt; write one a line"),
    ],
)
def test_a_line_without_a_prompt_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_prompts(tmp_path / name)
