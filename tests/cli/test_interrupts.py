"""Signals at any moment of a command, sent by the command to itself: one line, exit status 130, no traceback."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.messages import assert_facts

ENTRY = """
import sys
from megatron_prealign.cli import COMMANDS, main
COMMANDS["probe"] = ("probe", "a test")
sys.argv[1:] = ["probe"]
sys.exit(main())
"""
PROBE = """
import atexit, os, signal, sys, time
from megatron_prealign.errors import UserError
def send(name="SIGINT"):
    os.kill(os.getpid(), getattr(signal, name))
def main(argv):
    {body}
    time.sleep(10)
"""
# Modules of a library that imports an optional one and continues without it, whatever happens.
LIBRARY = """
try:
    import optional
except:
    optional = None
"""
OPTIONAL = """
import os, signal
os.kill(os.getpid(), signal.SIGINT)
print("imported")
"""


def run_probe(
    directory: Path, body: str, before: Callable[[], object] | None = None
) -> subprocess.CompletedProcess[str]:
    for name, text in (("probe", PROBE.format(body=body)), ("library", LIBRARY), ("optional", OPTIONAL)):
        (directory / f"{name}.py").write_text(text)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(directory), *sys.path])}
    return subprocess.run(
        [sys.executable, "-c", ENTRY], env=environment, capture_output=True, text=True, timeout=60, preexec_fn=before
    )


@pytest.mark.parametrize(
    ("body", "printed"),
    [
        ("send()", ""),
        ("send('SIGTERM')", ""),
        ("send('SIGHUP')", ""),
        # The library must not see the interrupt.
        ("import library; print('complete' if library.optional else 'crippled')", "imported\ncomplete\n"),
        # Python drops exceptions of finalisers.
        ("type('X', (), {'__del__': lambda self: send()})()", ""),
    ],
    ids=["SIGINT", "SIGTERM", "SIGHUP", "inside an import", "inside __del__"],
)
def test_a_signal_ends_the_command(tmp_path: Path, body: str, printed: str) -> None:
    done = run_probe(tmp_path, body)
    assert (done.returncode, done.stdout) == (130, printed), done.stderr
    (line,) = done.stderr.splitlines()
    assert_facts(line, "interrupted; ", "rerun the same command")


def test_a_command_may_say_more(tmp_path: Path) -> None:
    done = run_probe(tmp_path, "raise KeyboardInterrupt('interrupted; 3 documents are saved')")
    assert (done.returncode, done.stderr) == (130, "interrupted; 3 documents are saved\n")


@pytest.mark.parametrize(
    "body",
    [
        "from megatron_prealign import interrupts; interrupts.ignore(); send(); send('SIGTERM'); return 0",
        "atexit.register(send); return 0",
    ],
    ids=["after a clean stop", "while the interpreter ends"],
)
def test_a_late_signal_does_not_change_the_status(tmp_path: Path, body: str) -> None:
    done = run_probe(tmp_path, body)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("body", "printed"),
    [
        ("raise type('Late', (UserError,), {'__str__': lambda self: send() or 'broken'})()", "error: broken"),
        (
            "from megatron_prealign.runtime import agreement, heartbeat;"
            "heartbeat.lost_ranks = lambda: send('SIGTERM') or 'rank 1 ended';"
            "fail = lambda: (_ for _ in ()).throw(RuntimeError('[x] /gloo/ closed'));"
            "agreement.lost_ranks_as_user_errors('training')(fail)()",
            "error: training: rank 1 ended (/gloo/ closed); rerun the same command",
        ),
    ],
    ids=["while an error is printed", "while lost ranks are looked for"],
)
def test_a_signal_does_not_hide_an_error(tmp_path: Path, body: str, printed: str) -> None:
    done = run_probe(tmp_path, body)
    assert (done.returncode, done.stderr) == (2, f"{printed}\n")


def test_ignored_signals_stay_ignored(tmp_path: Path) -> None:
    done = run_probe(tmp_path, "send('SIGHUP'); return 0", before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert (done.returncode, done.stderr) == (0, "")


def test_a_forked_process_dies_of_the_signal(tmp_path: Path) -> None:
    done = run_probe(tmp_path, "child = os.fork(); child or (send(), os._exit(0)); print(os.wait()[1]); return 0")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{int(signal.SIGINT)}\n", "")
