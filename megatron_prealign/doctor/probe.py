"""Runs Python snippets in child processes with a time limit."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MARK = "megatron-prealign-probe:"
TIMEOUT_S = 60.0

# The child has the same sys.path as this process. The mark separates the result from what libraries print at import.
# The alarm ends the child if this process dies before the time limit.
PRELUDE = f"""
import json, signal, sys
signal.alarm({2 * int(TIMEOUT_S)})
sys.path[:] = json.loads(sys.argv[1])
def result(**values):
    print("\\n{MARK}" + json.dumps(values), flush=True)
"""

GLOO = """
import datetime
import torch, torch.distributed as d
rank = int(sys.argv[2])
d.init_process_group("gloo", store=d.FileStore(sys.argv[3], 2), rank=rank, world_size=2,
                     timeout=datetime.timedelta(seconds=20))
value = torch.tensor([rank + 1.0])
d.all_reduce(value)
result(total=value.item())
d.destroy_process_group()
"""


class ProbeError(Exception):
    """A child process failed, was killed or timed out; the message is one line."""


def probe(code: str, *arguments: str, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """Runs `code` in a new interpreter and returns the JSON values that it passes to `result(**values)`.

    Raises:
        ProbeError: the code raised (last line of the traceback), crashed (the signal), returned no result, or took
            longer than `timeout_s`.
    """
    return _result(_start(code, *arguments), timeout_s)


def gloo_sum(timeout_s: float = TIMEOUT_S) -> float:
    """Sums 1 and 2 over gloo in two processes on this machine and returns the result of rank 0.

    Raises:
        ProbeError: a process failed or timed out.
    """
    with tempfile.TemporaryDirectory() as directory:
        store = str(Path(directory) / "store")
        children = [_start(GLOO, str(rank), store) for rank in range(2)]
        try:
            return float([_result(child, timeout_s) for child in children][0]["total"])
        finally:
            for child in children:
                _kill(child)


def run_command(command: Sequence[str], timeout_s: float) -> str:
    """Runs a command and returns its standard output.

    Raises:
        ProbeError: the command cannot be started, fails or times out.
    """
    try:
        child = _spawn(command)
    except OSError as error:
        raise ProbeError(f"{command[0]}: {error.strerror}") from error
    output, errors = _wait(child, timeout_s)
    if child.returncode:
        raise ProbeError(_reason(child.returncode, errors))
    return output


def _start(code: str, *arguments: str) -> "subprocess.Popen[bytes]":
    return _spawn([sys.executable, "-c", PRELUDE + code, json.dumps(sys.path), *arguments])


def _spawn(command: Sequence[str]) -> "subprocess.Popen[bytes]":
    # A new session, so that the child's own children can be killed with it.
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def _result(child: "subprocess.Popen[bytes]", timeout_s: float) -> dict[str, Any]:
    output, errors = _wait(child, timeout_s)
    results = [line for line in output.splitlines() if line.startswith(MARK)]
    # With a result, a crash of some library at interpreter shutdown does not matter.
    if not results:
        raise ProbeError(_reason(child.returncode, errors))
    values: dict[str, Any] = json.loads(results[-1].removeprefix(MARK))
    return values


def _wait(child: "subprocess.Popen[bytes]", timeout_s: float) -> tuple[str, str]:
    try:
        output, errors = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        _kill(child)
        raise ProbeError(f"timed out after {timeout_s:g} s") from error
    return output.decode(errors="replace"), errors.decode(errors="replace")


def _kill(child: "subprocess.Popen[bytes]") -> None:
    if child.poll() is not None:
        return
    try:
        os.killpg(child.pid, signal.SIGKILL)
        # Bounded, because a process blocked in a driver cannot be killed immediately.
        child.communicate(timeout=5.0)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        return


def _reason(status: int, errors: str) -> str:
    if status < 0:
        try:
            return f"crashed with {signal.Signals(-status).name}"
        except ValueError:
            return f"crashed with signal {-status}"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return lines[-1][:300] if lines else f"exited with status {status} and no message"
