"""The doctor on this machine and on simulated broken ones: fake packages, old versions, hangs and crashes."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.messages import assert_facts, user_error

from megatron_prealign.doctor import checks
from megatron_prealign.doctor.probe import ProbeError, probe, run_command
from megatron_prealign.tools.doctor import main


def add_module(directory: Path, name: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / name).mkdir(parents=True)
    (directory / name / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(str(directory))


def fake_versions(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str | None]) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name not in versions:
            return real(name)
        if (fake := versions[name]) is None:
            raise metadata.PackageNotFoundError(name)
        return fake

    monkeypatch.setattr(metadata, "version", version)


def add_command(directory: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.slow
def test_this_machine_can_run_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["--json"])
    findings = {finding["part"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert list(findings) == list(checks.CHECKS)
    failed = {part: finding for part, finding in findings.items() if finding["status"] == "fail"}
    assert not failed and status == 0
    assert findings["Megatron-Core"]["found"].startswith("0.16.")
    assert findings["gloo"]["status"] == "ok"


def test_one_line_per_part_and_status_1_on_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash() -> checks.Finding:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(checks, "CHECKS", {"Python": checks.check_python, "broken": crash})
    assert main([]) == 1
    *lines, made, following = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert_facts(made, "2 parts", "ok 1", "fail 1")
    assert following.endswith("megatron-prealign doctor")
    assert lines[0].startswith("ok    Python") and lines[1].startswith("fail  broken")
    assert "RuntimeError: first line" in lines[1] and "second line" not in lines[1]


def test_warnings_do_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CHECKS", {"x": lambda: checks.Finding("x", "warn", "so so")})
    assert main([]) == 0


def test_a_hanging_check_is_a_finding_and_the_others_still_finish() -> None:
    start = time.monotonic()
    stuck_checks = {"stuck": lambda: time.sleep(30) or checks.Finding("stuck", "ok", ""), "Python": checks.check_python}
    stuck, python = checks.run_checks(stuck_checks, deadline_s=0.5)
    assert (stuck.status, python.status) == ("fail", "ok")
    assert "timed out" in stuck.found and "0.5 s" in stuck.found
    assert time.monotonic() - start < 10.0  # 0.5 s by design; the rest is for a busy machine


def test_apex_without_fused_adam_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_module(tmp_path, "apex", "", monkeypatch)
    finding = checks.check_apex()
    assert finding.status == "fail"
    assert "PyPI" in finding.found and "not NVIDIA's" in finding.found and "uninstall" in finding.fix


def test_nvidia_apex_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_module(tmp_path, "apex", "", monkeypatch)
    (tmp_path / "apex" / "optimizers.py").write_text("class FusedAdam: pass\n")
    assert checks.check_apex().status == "ok"


@pytest.mark.parametrize("version", ["0.15.3", "0.16.0", "0.17.0", "0.17.0rc1", "1.0"])
def test_a_megatron_core_outside_the_range_fails(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_versions(monkeypatch, {"megatron-core": version})
    finding = checks.check_megatron_core()
    assert finding.status == "fail" and version in finding.found and "megatron-core>=0.16.1,<0.17" in finding.fix


def test_missing_or_old_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_versions(monkeypatch, {"psutil": None, "torch": "2.5.1+cu121", "tokenizers": "0.19.1", "sentencepiece": None})
    assert checks.check_psutil().status == "fail" and "pip install psutil" in checks.check_psutil().fix
    assert checks.check_torch().status == "fail" and "2.5.1" in checks.check_torch().found
    finding = checks.check_tokenizer_libraries()
    assert finding.status == "fail"
    assert "not installed: sentencepiece" in finding.found
    assert "tokenizers 0.19.1" in finding.found and "0.20" in finding.found
    assert '"tokenizers>=0.20"' in finding.fix and '"sentencepiece>=0.2"' in finding.fix


def test_an_unreadable_version_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_versions(monkeypatch, {"torch": "unknown"})
    (finding,) = checks.run_checks({"torch": checks.check_torch})
    assert finding.status == "fail" and "'unknown'" in finding.found


def fake_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(checks, "_nvidia_gpus", lambda: [("NVIDIA H200", "570.10")] * count)


@pytest.mark.parametrize(("gpus", "status"), [(0, "warn"), (1, "fail")])
def test_an_old_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, status: str) -> None:
    fake_gpus(monkeypatch, gpus)
    add_module(tmp_path, "triton", "__version__ = '3.1.0'", monkeypatch)
    finding = checks.check_triton()
    assert finding.status == status and "3.1.0" in finding.found and "upgrade torch" in finding.fix


@pytest.mark.parametrize(("gpus", "status"), [(0, "ok"), (1, "fail")])
def test_no_triton(monkeypatch: pytest.MonkeyPatch, gpus: int, status: str) -> None:
    fake_gpus(monkeypatch, gpus)
    fake_versions(monkeypatch, {"triton": None})
    monkeypatch.setattr(checks, "is_importable", lambda module: False)
    finding = checks.check_triton()
    assert finding.status == status and "not installed" in finding.found
    assert ("triton>=3.2" in finding.fix) == (status == "fail")


@pytest.mark.parametrize(("gpus", "status"), [(0, "ok"), (1, "fail")])
def test_no_c_compiler(monkeypatch: pytest.MonkeyPatch, gpus: int, status: str) -> None:
    fake_gpus(monkeypatch, gpus)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    finding = checks.check_compiler()
    assert finding.status == status
    assert ("install gcc" in finding.fix) == (status == "fail")


def test_optional_packages_that_do_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_module(tmp_path, "transformer_engine", "raise OSError('libcudart.so.12 is missing')", monkeypatch)
    engine = checks.check_transformer_engine()
    assert engine.status == "fail" and "libcudart.so.12 is missing" in engine.found


def test_a_gpu_that_torch_cannot_use_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_command(tmp_path, "nvidia-smi", 'echo "NVIDIA H200, 570.10"; echo "NVIDIA H200, 570.10"', monkeypatch)
    monkeypatch.setattr(checks, "probe", lambda code: {"names": [], "usable": False, "cuda": None, "warnings": []})
    finding = checks.check_gpus()
    assert finding.status == "fail"
    assert "2 x NVIDIA H200, driver 570.10" in finding.found and "CPU build" in finding.found
    monkeypatch.setattr(
        checks, "probe", lambda code: {"names": [], "usable": False, "cuda": "13.0", "warnings": ["too old"]}
    )
    assert "too old" in checks.check_gpus().found
    monkeypatch.setattr(checks, "probe", lambda code: {"version": None})
    assert checks.check_nccl().status == "fail"


def test_a_broken_nvidia_smi_counts_as_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_command(tmp_path, "nvidia-smi", "echo cannot talk to the driver >&2; exit 9", monkeypatch)
    monkeypatch.setattr(checks, "probe", lambda code: {"names": [], "usable": False, "cuda": None, "warnings": []})
    assert checks.check_gpus().status == "warn"


@pytest.mark.slow
def test_gloo_on_a_missing_interface_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuchif0")
    finding = checks.check_gloo()
    assert finding.status == "fail" and "GLOO_SOCKET_IFNAME" in finding.fix


@pytest.mark.parametrize(("free_gib", "disk", "memory"), [(0.5, "fail", "warn"), (5, "warn", "ok"), (50, "ok", "ok")])
def test_space(free_gib: float, disk: str, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(free=int(free_gib * 2**30), total=100 * 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert checks.check_disk().status == disk
    assert checks.check_shared_memory().status == memory


def test_a_probe_has_the_same_modules_and_ignores_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_module(tmp_path, "noisy_part", "print('hello', end='')\nvalue = 7", monkeypatch)
    assert probe("import noisy_part; result(value=noisy_part.value); print('bye')") == {"value": 7}


@pytest.mark.parametrize(
    ("code", "fact"),
    [
        ("raise ValueError('why')", "ValueError: why"),
        ("import os; os.abort()", "SIGABRT"),
        ("import sys; sys.exit(3)", "status 3"),
        ("pass", "status 0"),
    ],
)
def test_a_failing_probe_names_the_reason(code: str, fact: str) -> None:
    with user_error(fact, kind=ProbeError):
        probe(code)


@pytest.mark.slow
def test_a_hanging_probe_is_killed_with_its_children(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    code = (
        "import subprocess, sys, time, pathlib\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"pathlib.Path({str(mark)!r}).write_text(str(child.pid))\n"
        "time.sleep(60)"
    )
    start = time.monotonic()
    with user_error("timed out", "3 s", kind=ProbeError):
        probe(code, timeout_s=3.0)
    assert time.monotonic() - start < 20.0  # 3 s by design; the rest is for a busy machine
    child = int(mark.read_text())
    for _ in range(50):
        if not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text():
            return
        time.sleep(0.1)
    pytest.fail("the probe's child is still running")


def test_a_missing_command_is_a_probe_error() -> None:
    with user_error("no-such-command", kind=ProbeError):
        run_command(["no-such-command"], timeout_s=1.0)


def test_json_and_unknown_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(checks, "CHECKS", {"Python": checks.check_python})
    assert main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["part"] == "Python"
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("ok")
    with user_error("--jsn"):
        main(["--jsn"])


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom megatron_prealign.tools.doctor import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "import megatron_prealign.doctor.checks\n"
        "heavy = {'torch', 'numpy', 'transformers', 'megatron', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "--json" in result.stdout


def test_libraries_are_those_of_setup() -> None:
    setup = (Path(__file__).parents[2] / "setup.py").read_text(encoding="utf-8")
    required = setup.partition("install_requires=[")[2].partition("extras_require")[0]
    own_checks = {
        "torch",
        "megatron-core",
        "psutil",
        "triton",
        "sentencepiece",
        "protobuf",
        "tokenizers",
        "transformers",
    }
    found = {name.lower(): minimum for name, minimum in re.findall(r'"([\w-]+)(?:[>=]=([\d.]+))?', required)}
    assert {name.lower() for name in checks.LIBRARIES} == set(found) - own_checks
    for name, minimum in checks.LIBRARIES.items():
        assert found[name.lower()] in ("", minimum), name
