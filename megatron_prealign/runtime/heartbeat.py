"""Signs of life of all ranks, so that the error of a lost rank names that rank.

A collective only reports that a peer has closed its connection or is late. Therefore a thread of every rank writes a
counter into the store of the launcher. When a collective fails, the first rank that notices looks for counters that
stand still, and the others read what it found: if each of 1,000 ranks searched, they would read 2 million counters. The
same thread watches the next rank and warns when it is silent for long, which also names a rank that hangs where the
backend ends the process itself, as NCCL does.
"""

import atexit
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import psutil
import torch.distributed as dist

from megatron_prealign.runtime.launcher import launcher_has_ended

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0
# Several intervals, since a thread waits for the interpreter while other threads hold it.
SILENCE_S = 4.0
_UNKNOWN = "does not respond"
_ENDED = "ended by itself, see its output"
# Between two looks for what another rank has found: soon at first, since torchrun may be about to end this rank.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 0.25

_current: "Heartbeat | None" = None


@dataclass(frozen=True)
class Pulse:
    """What a rank writes into the store."""

    host: str
    machine: str
    """Boot and process namespace of the host, since hosts and containers may have equal names."""
    pid: int
    started: float
    """Start time of the process; a later process may have the same id."""
    count: int = 0
    ended: bool = False
    """Whether the rank reported its own end."""

    @classmethod
    def of(cls, pid: int) -> "Pulse":
        """The pulse of a process of this host."""
        return cls(socket.gethostname(), _machine(), pid, psutil.Process(pid).create_time())

    def condition(self) -> str:
        """Why the process is silent, as far as this host can see."""
        if self.ended:
            return _ENDED
        if (self.host, self.machine) != (socket.gethostname(), _machine()):
            return _UNKNOWN
        try:
            process = psutil.Process(self.pid)
            status = process.status() if process.create_time() == self.started else psutil.STATUS_DEAD
        except psutil.NoSuchProcess:
            status = psutil.STATUS_DEAD
        if status in (psutil.STATUS_DEAD, psutil.STATUS_ZOMBIE):
            # Its exit status is known only to the launcher.
            return "ended without a report (killed, out of memory, or crashed)"
        return "is stopped (SIGSTOP)" if status == psutil.STATUS_STOPPED else _UNKNOWN

    @property
    def is_lost(self) -> bool:
        """Whether this host sees that the process is stopped or has ended without a report."""
        return not self.ended and self.condition() != _UNKNOWN


@dataclass(frozen=True)
class LostRank:
    """A rank that is silent, or that ended before the others."""

    rank: int
    pulse: Pulse
    condition: str
    """Why, as far as the host of the rank that searched can see."""

    def __str__(self) -> str:
        # This host may see more.
        own = self.pulse.condition()
        return _described(self.rank, self.pulse, self.condition if own == _UNKNOWN else own)


class StoreEndedError(Exception):
    """The store of the launcher cannot be reached any more."""


class StoreTimeoutError(Exception):
    """The store of the launcher did not respond in time; it may respond later."""


class Heartbeat:
    """Writes the pulse of this rank from a thread and reads those of the others."""

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        *,
        warn_after_s: float,
        interval_s: float = INTERVAL_S,
        silence_s: float = SILENCE_S,
    ) -> None:
        """
        Args:
            store: Store that all ranks use, through a connection of this object's own.
            warn_after_s: Silence of the next rank after which this one logs a warning.
            interval_s: Time between two pulses.
            silence_s: Silence after which a rank counts as lost once a collective has failed.
        """
        self._store = store
        self._rank, self._world_size = rank, world_size
        self._warn_after_s, self._interval_s, self._silence_s = warn_after_s, interval_s, silence_s
        self._pulse = Pulse.of(os.getpid())
        self._lock = threading.Lock()
        self._store_has_ended = False
        self._has_looked = False
        self._stopped = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Reports that this rank ends by itself. Waits up to `silence_s` seconds for a store that does not respond."""
        self._stopped.set()
        self._thread.join(self._silence_s)

    def lost_ranks(self) -> str:
        """Describes the ranks that are silent although they did not report their end, or else those that ended by
        themselves; empty if there are none or the store does not respond.

        The first rank that calls it searches for all. Takes about `silence_s` seconds if every host responds, and at
        most three times as long.
        """
        found: list[str] = []
        # In a thread, because a request waits for minutes if the host of the store has lost its power or network.
        search = threading.Thread(target=lambda: found.append(self._find_lost()), name="lost ranks", daemon=True)
        search.start()
        search.join(3 * self._silence_s)
        return found[0] if found else ""

    def _find_lost(self) -> str:
        try:
            # What was found for an earlier call may be out of date.
            is_first_call, self._has_looked = not self._has_looked, True
            with self._reachable_store() as store:
                searches = store.add(_key("search"), 1) == 1 or not is_first_call
            lost = None if searches else self._wait_for_found()
            if lost is None:
                lost = self._search()
                with self._reachable_store() as store:
                    store.set(_key("found"), json.dumps([asdict(each) for each in lost]))
        except (StoreEndedError, StoreTimeoutError):
            return ""
        return "; ".join(str(each) for each in lost if each.rank != self._rank)

    def _search(self) -> list[LostRank]:
        before = self._read()
        lost = {rank: pulse for rank, pulse in before.items() if pulse.is_lost}
        # A rank reports its end, such as that by an error of its own, before its connections close.
        lost = lost or {rank: pulse for rank, pulse in before.items() if pulse.ended}
        if not lost:
            time.sleep(self._silence_s)
            after = self._read()
            lost = {rank: pulse for rank, pulse in after.items() if not pulse.ended and pulse == before.get(rank)}
        return [LostRank(rank, pulse, pulse.condition()) for rank, pulse in sorted(lost.items()) if rank != self._rank]

    def _wait_for_found(self) -> list[LostRank] | None:
        """What another rank found; None if it found nothing in time, since it may be lost itself."""
        pause_s = _FIRST_PAUSE_S
        deadline_s = time.monotonic() + 1.5 * self._silence_s
        # The store could wait by itself, but then this rank would be silent.
        while time.monotonic() < deadline_s:
            with self._reachable_store() as store:
                found = store.get(_key("found")) if store.check([_key("found")]) else None
            if found is not None:
                return [LostRank(each["rank"], Pulse(**each["pulse"]), each["condition"]) for each in json.loads(found)]
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return None

    def _run(self) -> None:
        next_rank = (self._rank + 1) % self._world_size
        seen: Pulse | None = None
        seen_s = time.monotonic()
        warned = False
        while not self._stopped.wait(self._interval_s):
            try:
                self._write()
                pulse = self._read([next_rank]).get(next_rank)
            except StoreEndedError:
                return
            except StoreTimeoutError:
                # The next rank may have waited for the store, too; its silence counts from now on.
                seen_s = time.monotonic()
                continue
            if pulse is None or pulse.ended or pulse != seen:
                seen, seen_s, warned = pulse, time.monotonic(), False
            elif not warned and time.monotonic() - seen_s > self._warn_after_s:
                silent_s = time.monotonic() - seen_s
                described = _described(next_rank, pulse, pulse.condition())
                logger.warning("no sign of life for %.0f s: %s", silent_s, described)
                warned = True
        self._pulse = replace(self._pulse, ended=True)
        with suppress(StoreEndedError, StoreTimeoutError):
            self._write()

    def _write(self) -> None:
        self._pulse = replace(self._pulse, count=self._pulse.count + 1)
        with self._reachable_store() as store:
            store.set(_pulse_key(self._rank), json.dumps(asdict(self._pulse)))

    def _read(self, ranks: list[int] | None = None) -> Mapping[int, Pulse]:
        """Pulses of the ranks that have begun; by default of all."""
        ranks = list(range(self._world_size)) if ranks is None else ranks
        with self._reachable_store() as store:
            # Reading a missing key would block. One request for all ranks, unless some have not begun.
            begun = ranks
            if not store.check([_pulse_key(rank) for rank in ranks]):
                begun = [rank for rank in ranks if store.check([_pulse_key(rank)])]
            values = store.multi_get([_pulse_key(rank) for rank in begun])
            return {rank: Pulse(**json.loads(value)) for rank, value in zip(begun, values, strict=True)}

    @contextmanager
    def _reachable_store(self) -> Iterator[dist.Store]:
        # The store ends with the launcher, and torch prints a trace of every attempt to reach it then.
        with self._lock:
            if self._store_has_ended or launcher_has_ended():
                raise StoreEndedError
            try:
                yield self._store
            except dist.DistStoreError as error:
                # torch cancels a request whose time is up, so the connection stays usable.
                raise StoreTimeoutError from error
            except RuntimeError as error:
                # A closed connection is a DistNetworkError.
                self._store_has_ended = True
                raise StoreEndedError from error


def _machine() -> str:
    """Names the processes that this one can see; empty where the system does not tell."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _key(name: str) -> str:
    # torchrun restarts processes with the same store, which still has the pulses of those before.
    return f"megatron_prealign/restart_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"


def _pulse_key(rank: int) -> str:
    return _key(f"pulse/{rank}")


def _described(rank: int, pulse: Pulse, condition: str) -> str:
    return f"rank {rank} on {pulse.host} (process {pulse.pid}) {condition}"


def start(rank: int, world_size: int, *, timeout_s: float) -> None:
    """Starts the heartbeat of this process if the launcher named a store and there are several ranks.

    A store that cannot be reached is reported and does not end the run.

    Args:
        timeout_s: Timeout of collectives; the warning comes after half of it.
    """
    global _current
    if _current is not None or world_size < 2 or not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        # A connection of its own: an operation of another thread on the same one could block for minutes. A host may
        # allow fewer open connections than there are ranks.
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=30), wait_for_workers=False)
        _current = Heartbeat(store, rank, world_size, warn_after_s=timeout_s / 2)
    except (RuntimeError, StoreEndedError, StoreTimeoutError) as error:
        reason = (str(error).splitlines() or ["connection closed"])[0]
        logger.warning("rank %d: no signs of life, cannot reach the store at %s:%d (%s)", rank, address, port, reason)
        return
    # An exit that Python takes part in is no silent death, whatever the error.
    atexit.register(stop)


def stop() -> None:
    """Reports the end of this rank to the others."""
    global _current
    if _current is not None:
        _current.close()
        _current = None


def lost_ranks() -> str:
    """`Heartbeat.lost_ranks` of this process; empty without a heartbeat."""
    return "" if _current is None else _current.lost_ranks()
