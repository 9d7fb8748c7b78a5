#!/usr/bin/env bash
# jsonargparse 4.53.0: parsing a list of dataclasses takes time that grows with the square of its length. Counted in
# function calls, which do not depend on the machine: a list twice as long costs almost four times as many.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet jsonargparse==4.53.0 pyyaml==6.0.3
cd "$work"
"$work/venv/bin/python" - <<'PY'
import cProfile
import importlib.metadata
import pstats
from dataclasses import dataclass, field
from pathlib import Path

from jsonargparse import ArgumentParser


@dataclass
class Source:
    path: str
    weight: float = 1.0


@dataclass
class Data:
    sources: list[Source] = field(default_factory=list)


def calls(length: int) -> int:
    """Function calls to parse a configuration of one list with `length` items."""
    lines = [f"  - path: text/{number}\n    weight: 1.0\n" for number in range(length)]
    Path("config.yaml").write_text("data:\n  sources:\n" + "".join(lines))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--data", type=Data)
    with cProfile.Profile() as profile:
        parsed = parser.parse_args(["--config", "config.yaml"])
    assert len(parsed.data.sources) == length
    return pstats.Stats(profile).total_calls


print(f"jsonargparse {importlib.metadata.version('jsonargparse')}")
counts = {length: calls(length) for length in (50, 100, 200)}
for length, count in counts.items():
    print(f"{length:>4} items: {count:>11,} function calls, {count // length:>7,} per item")
if counts[200] < 3 * counts[100]:
    raise SystemExit("the calls no longer grow with the square of the length")
PY
