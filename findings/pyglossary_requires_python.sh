#!/usr/bin/env bash
# pyglossary 5.4.0: its metadata allows Python 3.10, so pip installs it there, but it uses syntax of a newer Python and
# cannot be imported.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON310:-python3.10}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet pyglossary==5.4.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import importlib.metadata
import sys

version, requires = (importlib.metadata.metadata("pyglossary")[field] for field in ("Version", "Requires-Python"))
print(f"Python {sys.version.split()[0]}, pyglossary {version}, Requires-Python {requires}")
try:
    from pyglossary.glossary_v2 import Glossary
except SyntaxError as error:
    print(f"import fails: SyntaxError in {error.filename.rpartition('site-packages/')[2]}: {error.msg}")
else:
    raise SystemExit("the import no longer fails")
PY
