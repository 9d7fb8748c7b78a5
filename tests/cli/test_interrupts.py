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
        "from types import SimpleNamespace; from megatron_prealign.training.callbacks import StopOnRequest;"
        "trainer = SimpleNamespace(runtime=SimpleNamespace(rank=0), state=SimpleNamespace(stop_requested=True));"
        "callback = StopOnRequest(None); callback.on_start(trainer); callback.on_close(trainer);"
        "send('SIGTERM'); return 0",
        "atexit.register(send); return 0",
    ],
    ids=["after a clean stop", "after another rank's clean stop", "while the interpreter ends"],
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
        (
            "from megatron_prealign.runtime import agreement, heartbeat;"
            "heartbeat.lost_ranks = lambda: send('SIGTERM') or 'rank 1 ended';"
            "fail = lambda *args, **named: (_ for _ in ()).throw(RuntimeError('[x] /gloo/ closed'));"
            "agreement.dist.get_backend, agreement.dist.all_reduce = lambda group: 'gloo', fail;"
            "agreement.all_ranks_ok(None, 'saving')",
            "error: saving: rank 1 ended (/gloo/ closed); rerun the same command",
        ),
    ],
    ids=["while an error is printed", "while lost ranks are looked for", "while all ranks agree"],
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


# Native code that no signal ends: it waits for a mutex that it has locked itself. The signal comes while it waits.
NATIVE = """
import ctypes, subprocess, sys
def block():
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
    library.pthread_mutex_init(mutex, None)
    library.pthread_mutex_lock(mutex)
    subprocess.Popen(["sh", "-c", "sleep 1; kill -INT $PPID"])
    library.pthread_mutex_lock(mutex)
"""
TRAINING = """
{native}
import sentencepiece, tokenizers
class Tokenizer:
    def __init__(self, model): pass
    def train_from_iterator(self, texts, trainer): train(texts)
def train(sentence_iterator, **_):
    assert len(list(sentence_iterator)) == 100
    block()
tokenizers.Tokenizer, sentencepiece.SentencePieceTrainer.train = Tokenizer, train
from megatron_prealign.cli import main
sys.argv[1:] = ["train-tokenizer", "--input", "a.txt", "--output", "tokenizer", "--vocab-size", "300"]
sys.argv += ["--kind", "{kind}", "--held-out", "0"]
sys.exit(main())
"""


@pytest.mark.parametrize("kind", ["byte-bpe", "sentencepiece-unigram"])
def test_training_in_a_library_is_interrupted_at_once(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.txt").write_text("A text.\n\n" * 100)
    done = subprocess.run(
        [sys.executable, "-c", TRAINING.format(native=NATIVE, kind=kind)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 130, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "interrupted" in line]
    assert_facts(line, "rerun the same command")
    assert "Traceback" not in done.stderr and [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("body", "status", "printed"),
    [
        # All items arrive in their order, and the result is returned.
        ("print(run(list, iter(range(100))) == list(range(100))); return 0", 0, "True\n"),
        ("print(run(lambda items: next(items), itertools.count())); return 0", 0, "0\n"),
        # Errors of either side reach the caller, while the other still waits.
        ("run(list, (1 // (5 - n) for n in range(99)))", 1, ""),
        ("run(lambda items: next(items) // 0, itertools.count())", 1, ""),
    ],
)
def test_native_code_gets_its_items_from_the_caller(tmp_path: Path, body: str, status: int, printed: str) -> None:
    done = run_probe(tmp_path, f"import itertools; from megatron_prealign.interrupts import run_native as run; {body}")
    assert (done.returncode, done.stdout) == (status, printed)
    assert (status == 1) == ("ZeroDivisionError" in done.stderr)
