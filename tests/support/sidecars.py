"""Writes sidecars modified by tests."""

from pathlib import Path

from megatron_prealign.data.sidecar import Sidecar, sidecar_path, write_sidecar


def save_sidecar(sidecar: Sidecar, prefix: str | Path) -> None:
    """Writes `PREFIX.json`."""
    write_sidecar(sidecar, sidecar_path(prefix))
