"""A short slice of the campaign; all of it: launch/fault_campaign.sh."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

CAMPAIGN = Path(__file__).with_name("campaign.py")
FAULTS = ("killed", "killed_again", "terminated", "damaged", "metrics_torn", "jumping_clock")


def test_disturbed_runs_end_as_undisturbed_ones_or_say_why(tmp_path):
    command = [sys.executable, CAMPAIGN, tmp_path, "--trials", "12", "--only", *FAULTS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert Counter(row["fault"] for row in rows) == dict.fromkeys(FAULTS, 2)
    assert {row["result"] for row in rows} <= {"identical", "message"}
    assert all(row["what"] for row in rows)
