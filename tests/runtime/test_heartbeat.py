"""A rank that is killed, stopped or silent is named by the others; one that reported its end is not."""

import json
import logging
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

import psutil
import pytest
import torch.distributed as dist
from support.messages import assert_facts

from megatron_prealign.runtime.heartbeat import Heartbeat, Pulse, lost_ranks, start

KEY = "megatron_prealign/restart_0/pulse/"
"""Start of the keys of pulses; the rank follows."""


@pytest.fixture(autouse=True)
def never_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """Another process of this host."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.send_signal(signal.SIGCONT)
        process.kill()


@pytest.fixture
def beating() -> Iterator[tuple[dist.Store, Heartbeat]]:
    """The heartbeat of rank 0 of three, and its store."""
    store = dist.HashStore()
    heartbeat = Heartbeat(store, 0, 3, warn_after_s=0.1, interval_s=0.01, silence_s=0.2)
    yield store, heartbeat
    heartbeat.close()


def publish(store: dist.Store, rank: int, pulse: Pulse) -> None:
    store.set(f"{KEY}{rank}", json.dumps(asdict(pulse)))


def pulse_of(store: dist.Store, rank: int) -> Any:
    return json.loads(store.get(f"{KEY}{rank}"))


def wait_for_status(process: subprocess.Popen[bytes], status: str) -> None:
    while psutil.Process(process.pid).status() != status:
        time.sleep(0.01)


def test_the_condition_of_a_process(other: subprocess.Popen[bytes]) -> None:
    pulse = Pulse.of(other.pid)
    assert pulse.condition() == "does not respond" and not pulse.is_lost
    other.send_signal(signal.SIGSTOP)
    wait_for_status(other, psutil.STATUS_STOPPED)
    assert "SIGSTOP" in pulse.condition() and pulse.is_lost
    other.kill()
    wait_for_status(other, psutil.STATUS_ZOMBIE)
    assert "ended without a report" in pulse.condition() and pulse.is_lost
    assert not replace(pulse, ended=True).is_lost
    other.wait()
    assert pulse.is_lost
    assert replace(pulse, host="another-host").condition() == "does not respond"
    # Another container with the same name.
    assert replace(pulse, machine="another boot").condition() == "does not respond"
    # Another process has got its id.
    assert replace(Pulse.of(psutil.Process().pid), started=0.0).is_lost


def test_a_killed_rank_is_named_with_host_and_process(
    beating: tuple[dist.Store, Heartbeat], other: subprocess.Popen[bytes]
) -> None:
    store, heartbeat = beating
    pulse = Pulse.of(other.pid)
    publish(store, 2, pulse)
    other.kill()
    other.wait()
    lost = heartbeat.lost_ranks()
    assert_facts(lost, "rank 2", pulse.host, str(other.pid), "ended without a report")
    assert "rank 1" not in lost and "\n" not in lost


def test_only_silent_ranks_are_lost(beating: tuple[dist.Store, Heartbeat]) -> None:
    store, heartbeat = beating
    # Rank 1 goes on, rank 2 is silent on another host.
    alive = Heartbeat(store, 1, 3, warn_after_s=60, interval_s=0.01)
    silent = replace(Pulse.of(psutil.Process().pid), host="another-host")
    publish(store, 2, silent)
    lost = heartbeat.lost_ranks()
    assert_facts(lost, "rank 2 on another-host", "does not respond")
    assert "rank 1" not in lost and "rank 0" not in lost
    alive.close()
    publish(store, 2, replace(silent, ended=True))
    # Both have reported their end, before this one.
    lost = heartbeat.lost_ranks()
    assert_facts(lost, "rank 1", "rank 2 on another-host", "see its output")


def test_pulses_from_before_a_restart_are_not_read(
    other: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = dist.HashStore()
    publish(store, 1, Pulse.of(other.pid))
    other.kill()
    other.wait()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    heartbeat = Heartbeat(store, 0, 2, warn_after_s=60, interval_s=0.01, silence_s=0.1)
    assert heartbeat.lost_ranks() == ""
    heartbeat.close()
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    heartbeat = Heartbeat(store, 0, 2, warn_after_s=60, interval_s=0.01, silence_s=0.1)
    assert_facts(heartbeat.lost_ranks(), "rank 1")
    heartbeat.close()


@pytest.mark.parametrize(("killed", "reads"), [(True, 1), (False, 2)])
def test_one_rank_searches_and_all_name_the_lost_one(other: subprocess.Popen[bytes], killed: bool, reads: int) -> None:
    searches: list[list[str]] = []

    class Counting(dist.HashStore):
        def multi_get(self, keys: list[str]) -> list[bytes]:
            if len(keys) > 1:
                searches.append(keys)
            return super().multi_get(keys)

    store = Counting()
    pulse = Pulse.of(other.pid)
    publish(store, 3, pulse if killed else replace(pulse, host="another-host"))
    other.kill()
    other.wait()
    heartbeats = [Heartbeat(store, rank, 4, warn_after_s=60, interval_s=0.01, silence_s=2) for rank in range(3)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(Heartbeat.lost_ranks, heartbeats))
    for each in heartbeats:
        each.close()
    assert len(set(found)) == 1 and found[0].count("rank ") == 1
    assert_facts(found[0], "rank 3", "ended without a report" if killed else "does not respond")
    assert len(searches) == reads


def test_a_rank_that_does_not_search_knows_its_own_host(other: subprocess.Popen[bytes]) -> None:
    store = dist.HashStore()
    pulse = Pulse.of(other.pid)
    other.kill()
    other.wait()
    for host, condition, expected in (
        (pulse.host, "does not respond", "ended without a report"),
        ("another-host", "ended, as that host sees", "ended, as that host sees"),
    ):
        found = [{"rank": 1, "pulse": asdict(replace(pulse, host=host)), "condition": condition}]
        store.set("megatron_prealign/restart_0/found", json.dumps(found))
        store.add("megatron_prealign/restart_0/search", 1)
        heartbeat = Heartbeat(store, 0, 2, warn_after_s=60, interval_s=0.01, silence_s=0.2)
        assert_facts(heartbeat.lost_ranks(), f"rank 1 on {host}", expected)
        heartbeat.close()


def test_a_rank_searches_itself_if_the_first_one_does_not_end(
    beating: tuple[dist.Store, Heartbeat], other: subprocess.Popen[bytes]
) -> None:
    store, heartbeat = beating
    store.add("megatron_prealign/restart_0/search", 1)
    publish(store, 2, Pulse.of(other.pid))
    other.kill()
    other.wait()
    assert_facts(heartbeat.lost_ranks(), "rank 2")


def test_the_previous_rank_warns_once_of_a_long_silence(
    beating: tuple[dist.Store, Heartbeat], caplog: pytest.LogCaptureFixture
) -> None:
    store, _ = beating
    with caplog.at_level(logging.WARNING):
        publish(store, 1, replace(Pulse.of(psutil.Process().pid), host="another-host"))
        deadline_s = time.monotonic() + 20
        while not caplog.records and time.monotonic() < deadline_s:
            time.sleep(0.01)
        # Time for a second warning, which must not come.
        time.sleep(0.2)
    (record,) = caplog.records
    assert_facts(record.getMessage(), "rank 1 on another-host", "does not respond")


def test_the_store_of_a_launcher_that_has_ended_is_left_alone(
    beating: tuple[dist.Store, Heartbeat], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, heartbeat = beating
    monkeypatch.setattr("megatron_prealign.runtime.heartbeat.launcher_has_ended", lambda: True)
    heartbeat.close()
    last = store.get(f"{KEY}0")
    assert not json.loads(last)["ended"] and heartbeat.lost_ranks() == ""


def test_a_store_that_has_ended_names_no_rank_and_raises_nothing() -> None:
    class Ended(dist.HashStore):
        def check(self, keys: list[str]) -> bool:
            raise dist.DistNetworkError("connection closed")

    heartbeat = Heartbeat(Ended(), 0, 2, warn_after_s=60, interval_s=0.01)
    assert heartbeat.lost_ranks() == ""
    heartbeat.close()


@pytest.mark.timeout(20)
def test_a_store_that_responds_late_skips_a_pulse() -> None:
    class Late(dist.HashStore):
        timeouts = 0

        def multi_get(self, keys: list[str]) -> list[bytes]:
            if self.timeouts < 2:
                self.timeouts += 1
                raise dist.DistStoreError("wait timeout after 30000ms, keys: /a/key")
            return super().multi_get(keys)

    store = Late()
    store.timeouts = 2
    heartbeat = Heartbeat(store, 0, 2, warn_after_s=60, interval_s=0.01)
    publish(store, 1, Pulse.of(psutil.Process().pid))
    store.timeouts = 0
    while store.timeouts < 2:
        time.sleep(0.01)
    count = pulse_of(store, 0)["count"]
    while pulse_of(store, 0)["count"] < count + 3:
        time.sleep(0.01)
    heartbeat.close()
    assert pulse_of(store, 0)["ended"]


@pytest.mark.timeout(20)
def test_a_store_whose_host_does_not_respond_keeps_no_rank_waiting() -> None:
    lost, answer = threading.Event(), threading.Event()

    class Silent(dist.HashStore):
        def set(self, key: str, value: str) -> None:
            if lost.is_set():
                answer.wait()
            super().set(key, value)

    heartbeat = Heartbeat(Silent(), 0, 2, warn_after_s=60, interval_s=0.01, silence_s=0.1)
    lost.set()
    assert heartbeat.lost_ranks() == ""
    heartbeat.close()
    answer.set()


def test_a_store_that_cannot_be_reached_is_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    # As soon as torch has given up, which would take 30 s.
    monkeypatch.setattr("megatron_prealign.runtime.heartbeat.timedelta", lambda seconds: timedelta(seconds=0.1))
    with caplog.at_level(logging.WARNING):
        start(3, 4, timeout_s=60)
    (message,) = caplog.messages
    assert_facts(message, "rank 3", f"127.0.0.1:{port}")
    assert "\n" not in message and lost_ranks() == ""
