"""How often the test part has been evaluated: a list that only grows, one for all work directories.

Whoever chooses among many runs by their test results reports the luckiest. The list therefore lies
in the cache and not in a work directory, each of its lines holds the sha256 of the line before, and
every results.json says where it stood. It guards against forgetting, not against deceit: another
machine has another list, and whoever deletes it begins anew.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safemoe_jax.private_files import lock, open_private


def record(path: Path, evaluation: str, parts: Mapping[str, str]) -> dict[str, Any]:
    """Writes an evaluation down, before it begins; one that goes on is not counted twice.

    Args:
      path: of the list; `fetch.cache_dir() / "test_evaluations.jsonl"`.
      evaluation: names what is evaluated and how; another bundle, seed or setting is another one.
      parts: benchmark -> hash of where its prompts are from.

    Returns:
      {counts: benchmark -> evaluations of it so far, this one included, whatever their number of
      prompts; entries: lines of the list; head: sha256 of the last one; intact: whether every line
      holds the sha256 of the one before}.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_private(path, "a") as file:
        lock(file, f"SAFEMOE_CACHE {path.parent}", wait=True)
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        entries = list(map(_entry, lines))
        if all(entry["evaluation"] != evaluation for entry in entries):
            entries.append(
                {
                    "evaluation": evaluation,
                    "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                    "parts": dict(parts),
                    "before": _sha256(lines[-1]) if lines else "",
                }
            )
            lines.append(json.dumps(entries[-1]))
            if text and not text.endswith("\n"):
                file.write("\n")
            file.write(f"{lines[-1]}\n")
    before = ["", *map(_sha256, lines)]
    return {
        "counts": {
            name: sum(entry["parts"].get(name) == part for entry in entries)
            for name, part in parts.items()
        },
        "entries": len(entries),
        "head": before[-1],
        "intact": all(entry["before"] == own for entry, own in zip(entries, before, strict=False)),
    }


def _entry(line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError:  # a full disk may have cut it; the list is not intact then
        return {"evaluation": "", "parts": {}, "before": None}


def _sha256(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()
