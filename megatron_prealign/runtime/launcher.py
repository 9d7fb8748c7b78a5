"""Ends the processes of a launcher that has died, which would otherwise train on as orphans and lock the run.

A launcher is torchrun, or a study, which names itself in `STUDY_VARIABLE`.
"""

import contextlib
import os
import signal
import sys
import threading
import time

import megatron_prealign

STUDY_VARIABLE = "MEGATRON_PREALIGN_STUDY"
"""Environment variable of a run that a study started: the id of the study's process."""
_INTERVAL_S = 1.0
_launcher: int | None = None
_unreported = ""
_reporting = threading.Lock()


def watch_launcher(interval_s: float = _INTERVAL_S) -> None:
    """Sends SIGTERM to this process when torchrun or the study, which started it, has died.

    Training then saves a checkpoint and stops on all ranks as on any SIGTERM; anything else ends at once.

    Does nothing in a process that neither of them started: the parent of such a process may end for good reasons
    (`nohup`, a closed shell). Polls instead of using Linux's PR_SET_PDEATHSIG, which reports the end of the parent's
    thread.

    A launcher that died before this call is noticed if it was alive when the package was imported. An orphan of an
    earlier death looks like a child of its new parent, but it has no store to join the other processes with. A study
    is noticed whenever it died, by its id.

    Args:
        interval_s: Time between two checks.
    """
    global _launcher
    # Removed, since processes that this one starts are not the study's.
    study = os.environ.pop(STUDY_VARIABLE, None)
    if study is not None and _launcher is None:
        _start(int(study), f"the study (process {study}) has ended; stopping its run", interval_s)
        return
    process, parent = megatron_prealign.STARTED
    if process != os.getpid():
        # A fork of the process that imported the package.
        parent = os.getppid()
    # Process 1 is the launcher only in a container, which ends with it.
    if _launcher is not None or "TORCHELASTIC_RUN_ID" not in os.environ or parent == 1:
        return
    _start(parent, f"torchrun (process {parent}) has ended; stopping its ranks", interval_s)


def _start(launcher: int, message: str, interval_s: float) -> None:
    global _launcher, _unreported
    _launcher = launcher
    # One process of a host reports it.
    _unreported = message if os.environ.get("LOCAL_RANK", "0") == "0" else ""
    threading.Thread(target=_watch, args=(launcher, interval_s), name="launcher", daemon=True).start()


def launcher_has_ended() -> bool:
    """Whether the watched launcher has died; False without one."""
    return _launcher is not None and os.getppid() != _launcher


def report_end() -> None:
    """Prints that the watched launcher has died, once and in one process of a host; nothing if it lives.

    The watch reports it too, but another rank may have noticed earlier and asked all ranks to stop.
    """
    global _unreported
    if not launcher_has_ended():
        return
    with _reporting:
        message, _unreported = _unreported, ""
    if message:
        # The launcher may have been the reader of this output.
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), f"{message}\n".encode())


def _watch(parent: int, interval_s: float) -> None:
    while os.getppid() == parent:
        time.sleep(interval_s)
    report_end()
    os.kill(os.getpid(), signal.SIGTERM)
