#!/usr/bin/env bash
# torch 2.13.0: torchrun exits with status 1 after SIGTERM even if it forwards the signal and every worker handles it and
# exits with status 0. A job script that tests the exit status takes a clean stop (checkpoint saved) for a failure.
#
# Seen: both workers print "worker exits with 0", torchrun raises SignalException and exits with 1.
set -euo pipefail
work=$(mktemp -d)
launcher=
trap '[ -z "$launcher" ] || kill -KILL "$launcher" 2>/dev/null || true; rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy
cd "$work"
cat > worker.py <<'PY'
import os
import signal
import sys
import time
from pathlib import Path


def stop(number, frame):
    print(f"worker {os.environ['RANK']} exits with 0", flush=True)
    sys.exit(0)


signal.signal(signal.SIGTERM, stop)
Path(f"ready{os.environ['RANK']}").touch()
time.sleep(120)
PY
"$work/venv/bin/python" -c 'import torch; print("torch", torch.__version__)'
"$work/venv/bin/python" -m torch.distributed.run --standalone --nproc-per-node 2 worker.py > log 2>&1 &
launcher=$!
for _ in $(seq 600); do
  if [ -e ready0 ] && [ -e ready1 ]; then break; fi
  kill -0 "$launcher" || { cat log; exit 1; }
  sleep 0.2
done
kill -TERM "$launcher"
status=0
wait "$launcher" || status=$?
launcher=
grep -h "worker . exits" log
echo "torchrun exited with $status: $(grep -h SignalException log | tail -1)"
[ "$(grep -c 'exits with 0' log)" = 2 ] || { echo "the workers did not stop cleanly"; exit 1; }
[ "$status" = 1 ] || { echo "torchrun no longer exits with 1"; exit 1; }
