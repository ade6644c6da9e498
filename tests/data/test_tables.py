import gzip
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest

from safemoe_jax.data.tables import read_rows
from safemoe_jax.errors import UserError

ROWS = [{"prompt": "One, or\ntwo?", "id": 1}, {"prompt": "Drei?", "id": 2}]


def read(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_rows(path))


def test_tables_give_their_columns_and_the_files_name(tmp_path):
    expected = [{**row, "file": "rows"} for row in ROWS]
    lines = "\n\n".join(map(json.dumps, ROWS)).encode()
    assert read(tmp_path / "rows.jsonl", lines) == expected
    assert read(tmp_path / "rows.jsonl.gz", gzip.compress(lines)) == expected
    assert read(tmp_path / "rows.jsonl.xz", lzma.compress(lines)) == expected
    assert read(tmp_path / "rows.json", json.dumps(ROWS)) == expected
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert list(read_rows(tmp_path / "rows.parquet")) == expected
    table = '\ufeffprompt,id\n"One, or\ntwo?",1\nDrei?,2\n'
    assert read(tmp_path / "rows.csv", table) == [{**r, "id": str(r["id"])} for r in expected]
    seeds = "source: x\nseeds:\n- prompt: \"One, or\\ntwo?\"\n  id: 1\n- prompt: 'Drei?'\n  id: 2\n"
    assert read(tmp_path / "rows.prompt", seeds) == expected


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.json", '{"instructions": ["One?", "Two?"]}'),
        ("rows.json", '["One?", "Two?"]'),
        ("rows.txt", "One?\n\n  Two?\n"),
    ],
)
def test_texts_are_rows_of_one_column(tmp_path, name, content):
    rows = read(tmp_path / name, content)
    assert rows == [{"prompt": text, "file": "rows"} for text in ("One?", "Two?")]


def test_a_damaged_line_is_a_row_without_columns(tmp_path):
    lines = b'{"prompt": "One?"}\n{"prompt": \n\xff\n[1]\n{"prompt": "Two?"}'
    rows = read(tmp_path / "rows.jsonl", lines)
    assert [row.get("prompt") for row in rows] == ["One?", None, None, None, "Two?"]


@pytest.mark.parametrize("name", ["rows.doc", "rows", "rows.gz", "rows.doc.gz"])
def test_an_unknown_format_is_named_with_the_known_ones(tmp_path, name):
    with pytest.raises(UserError, match=r"no known format; .*\.csv, \.json"):
        read(tmp_path / name, b"x")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.json", "secret"),
        ("rows.json", "3"),
        ("rows.json", '{"secret": 1}'),
        ("rows.csv", b"prompt\nsecret \xff"),
        ("rows.csv", 'prompt\n"secret'),
        ("rows.parquet", "secret"),
        ("rows.prompt", "seeds: [secret"),
        ("rows.prompt", "secret: 1"),
        ("rows.txt", b"secret \xff"),
        ("rows.jsonl.gz", "secret"),
        ("rows.jsonl.xz", "secret"),
        ("rows.jsonl.xz", lzma.compress(b'{"prompt": "secret"}')[:-20]),
    ],
)
def test_a_damaged_file_is_named_and_its_text_is_not(tmp_path, name, content):
    with pytest.raises(UserError, match=r"rows.* cannot be read as \.") as error:
        read(tmp_path / name, content)
    assert "secret" not in str(error.value)
