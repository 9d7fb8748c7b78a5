#!/usr/bin/env bash
# numpy 2.4.6: np.unique of distinct integers takes six times as long as np.unique with return_index=True, which returns
# more, and forty times as long as in numpy 2.2.6. The plain call uses a hash table; with further results it sorts.
#
# Seen for a million distinct int64 on two x86-64 cores: 0.84 s plain, 0.13 s with return_index; numpy 2.2.6: 0.02 s and
# 0.16 s.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 2.2.6 2.4.6; do
    "${PYTHON:-python3}" -m venv "$work/$version"
    "$work/$version/bin/pip" install --quiet "numpy==$version"
    "$work/$version/bin/python" - <<'PY'
import time

import numpy as np

values = np.random.default_rng(0).permutation(1_000_000) * 8192


def seconds(**options: bool) -> float:
    """Processor time of the fastest of three calls."""
    times = []
    for _ in range(3):
        start = time.process_time()
        np.unique(values, **options)
        times.append(time.process_time() - start)
    return min(times)


plain, with_index = seconds(), seconds(return_index=True)
print(f"numpy {np.__version__}: plain {plain:.3f} s, return_index=True {with_index:.3f} s")
if np.__version__ == "2.2.6":
    assert plain < 2 * with_index, "numpy 2.2.6 is no longer fast"
else:
    assert plain > 3 * with_index, "the plain call is no longer slower than the one that returns more"
PY
done
