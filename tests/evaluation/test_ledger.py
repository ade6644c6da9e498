"""The count of evaluations of the test part."""

import json
import stat

from safemoe_jax.evaluation.ledger import record


def test_each_evaluation_counts_once_for_each_part(tmp_path):
    path = tmp_path / "cache" / "test_evaluations.jsonl"
    first = record(path, "a", {"held_out": "h1", "advbench": "v1"})
    assert first["counts"] == {"held_out": 1, "advbench": 1}
    assert record(path, "b", {"held_out": "h1"})["counts"] == {"held_out": 2}
    again = record(path, "a", {"held_out": "h1", "advbench": "v1"})  # it goes on after a kill
    assert again["counts"] == {"held_out": 2, "advbench": 1}
    assert again["entries"] == 2
    assert record(path, "c", {"held_out": "h2"})["counts"] == {"held_out": 1}  # other prompts
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_line_taken_out_or_changed_is_seen(tmp_path):
    path = tmp_path / "test_evaluations.jsonl"
    for name in "abc":
        head = record(path, name, {"held_out": "h"})
    assert head["intact"]
    lines = path.read_text().splitlines(keepends=True)
    for broken in (lines[:1] + lines[2:], [lines[0].replace('"h"', '"x"'), *lines[1:]], lines[1:]):
        path.write_text("".join(broken))
        assert not record(path, "c", {"held_out": "h"})["intact"]
    # The last one may be taken out unseen, but for what results.json keeps of it.
    path.write_text("".join(lines[:2]))
    assert record(path, "b", {"held_out": "h"})["head"] != head["head"]
    assert json.loads(lines[0])["before"] == ""


def test_a_line_that_a_full_disk_cut_is_one_that_was_changed(tmp_path):
    path = tmp_path / "test_evaluations.jsonl"
    record(path, "a", {"held_out": "h"})
    with path.open("a") as file:
        file.write('{"evaluation": "b", "par')
    found = record(path, "c", {"held_out": "h"})
    assert (found["counts"], found["intact"]) == ({"held_out": 2}, False)
    assert json.loads(path.read_text().splitlines()[-1])["evaluation"] == "c"
