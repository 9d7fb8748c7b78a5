"""Runs of real processes under torchrun, whose ranks a test stops or kills."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml


class Launched:
    """A training run of two ranks under torchrun; kills what is left of it at the end of the block."""

    def __init__(self, values: dict[str, Any], directory: Path, *, world_size: int = 2) -> None:
        recipe = directory / "launched.yaml"
        recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
        self.host = socket.gethostname()
        self.log = directory / "launched.log"
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
        command += ["-m", "megatron_prealign", "pretrain", "--config", str(recipe)]
        with self.log.open("w") as log:
            self.process = psutil.Popen([sys.executable, *command], stdout=log, stderr=log, env=_environment())
        self._ranks: dict[int, psutil.Process] = {}

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *_: object) -> None:
        for process in [self.process, *self._ranks.values()]:
            if process.is_running():
                process.send_signal(signal.SIGCONT)
                process.kill()
        self.process.wait()

    @property
    def text(self) -> str:
        """Everything that torchrun and the ranks have printed."""
        return self.log.read_text(encoding="utf-8")

    @property
    def ranks(self) -> dict[int, psutil.Process]:
        """Processes of the ranks."""
        for child in self.process.children() if not self._ranks else ():
            self._ranks[int(child.environ()["RANK"])] = child
        return self._ranks

    def wait_for(self, reached: Callable[[], bool], timeout_s: float) -> None:
        """Waits until `reached` is true; fails with the log if it is not in time or the run has ended before."""
        deadline_s = time.monotonic() + timeout_s
        while not reached():
            ended = self.process.poll() is not None and not any(each.is_running() for each in self._ranks.values())
            assert not ended and time.monotonic() < deadline_s, self.text
            time.sleep(0.1)

    def wait_for_steps(self, run_dir: Path, steps: int, timeout_s: float = 120) -> None:
        """Waits until the run has logged this many steps."""
        metrics = run_dir / "metrics.jsonl"
        self.wait_for(lambda: metrics.is_file() and metrics.read_text().count('"train"') >= steps, timeout_s)
        assert len(self.ranks) == 2


def _environment() -> dict[str, str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in names} | {"OMP_NUM_THREADS": "1"}
