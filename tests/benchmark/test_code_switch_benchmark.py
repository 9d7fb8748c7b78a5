"""`megatron-prealign benchmark code-switch` on the CPU: results and output files; times are never compared."""

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from support.messages import assert_facts, assert_refused, user_error
from support.sidecars import save_sidecar

from megatron_prealign.benchmark import code_switch as module
from megatron_prealign.benchmark.code_switch import (
    Inputs,
    Measurement,
    bytes_moved,
    check_equal,
    check_python_loop,
    compare,
)
from megatron_prealign.benchmark.machine import Machine
from megatron_prealign.benchmark.options import CodeSwitchOptions
from megatron_prealign.benchmark.python_loop import PythonLoop
from megatron_prealign.benchmark.timing import WARM_CALLS, CapturedCall, Timing
from megatron_prealign.benchmark.workload import EOD, LANGUAGES, Workload, dataset_workload, synthetic_workload
from megatron_prealign.cli import main
from megatron_prealign.data.sidecar import load_sidecar
from megatron_prealign.data.word_bitmap import words_path
from megatron_prealign.kernels import (
    CodeSwitchBatch,
    CodeSwitchOutput,
    CodeSwitchSettings,
    build_ngram_table,
    code_switch_reference,
    ratio_threshold,
)
from megatron_prealign.kernels.code_switch_interface import KNOWN, RUNNING

SEED = 7


@pytest.fixture(autouse=True)
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COPY_BYTES", {"cpu": 1 << 16, "cuda": 1 << 16})


@pytest.fixture(scope="module")
def workload() -> Workload:
    return synthetic_workload(2000, SEED)


def inputs_of(
    workload: Workload, ratio: float, rows: int = 3, sequence: int = 512, lookahead: int | None = None
) -> Inputs:
    tokens, starts = workload.rows(rows, sequence, round(ratio * sequence) if lookahead is None else lookahead)
    table = build_ngram_table(**workload.arrays)
    languages = table.num_languages
    return Inputs(
        batch=CodeSwitchBatch(
            tokens=torch.from_numpy(tokens),
            language=torch.full((rows,), workload.language),
            sample_id=torch.arange(rows) + (5 << 32),
            word_starts=None if starts is None else torch.from_numpy(starts),
        ),
        table=table,
        thresholds=torch.full((languages, languages), ratio_threshold(ratio)),
        settings=CodeSwitchSettings(
            seed=(3 << 32) + 9, sequence_length=sequence, label_mode="input_only", pad_id=workload.eod_id
        ),
    )


def python_loop(workload: Workload, inputs: Inputs) -> PythonLoop:
    return PythonLoop(workload.arrays, inputs.table, workload.language, workload.eod_id)


def test_command_writes_the_documented_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "figures.csv"
    arguments = ["benchmark", "code-switch", "--device", "cpu", "--cases", "2x64", "1x32", "--keys", "300"]
    arguments += ["--ratio", "0.05", "0.5", "--token-dtype", "both", "--repeats", "2", "--output", str(output)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "2 x 64, ratio 0.5, lookahead 32, int32 tokens:" in printed
    assert "versions  megatron-prealign " in printed and f"wrote {output}" in printed
    with output.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    columns = [field.name for kind in (Measurement, Machine) for field in dataclasses.fields(kind)]
    assert list(rows[0]) == columns
    assert [(row["implementation"], row["rows"], row["ratio"], row["token_dtype"]) for row in rows] == [
        (implementation, case, ratio, dtype)
        for case in ("2", "1")
        for ratio in ("0.05", "0.5")
        for dtype in ("int64", "int32")
        for implementation in ("reference", "python_loop")
    ]
    for row in rows:
        assert row["device"] == "cpu" and row["keys"] == "300" and row["text"] == "synthetic"
        assert row["torch"] == torch.__version__ and row["cpu"] and row["date"]
        assert float(row["median_us"]) > 0 and float(row["copy_gb_per_second"]) > 0
        # Empty columns for what only a GPU has.
        assert row["host_us"] == row["floor_us"] == row["l2"] == row["gpu"] == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="only without a GPU")
def test_without_a_gpu_the_cpu_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--cases", "1x32", "--keys", "300", "--ratio", "0.5", "--repeats", "1", "--no-python-loop"]
    assert main(["benchmark", "code-switch", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert_facts(lines[0], "no GPU", "CPU")
    assert lines[-1].split()[0] == "reference" and "python_loop" not in "\n".join(lines)
    status = main(["benchmark", "code-switch", "--device", "cuda"])
    assert_refused(status, capsys.readouterr().err, "--device is cuda", "no GPU", "--device cpu")


def test_measurements_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU code without CUDA: kernels, graphs and events are replaced by fakes."""
    options = CodeSwitchOptions(device="cpu", cases=["2x64"], keys=300, ratio=[0.5], repeats=2, l2="both")
    benchmark = module.CodeSwitchBenchmark(options)
    benchmark.on_gpu, benchmark._floor_us = True, 1.5
    flushes: list[object] = []

    def time_replays(captured: CapturedCall, repeats: int, flush: object) -> Timing:
        flushes.append((captured.calls, flush))
        return Timing(2.0, 1.0, 3.0, repeats)

    def capture(call: Callable[[], Any], calls: int) -> CapturedCall:
        return CapturedCall(cast(Any, SimpleNamespace(replay=lambda: None)), calls, call())

    benchmark._flush = torch.zeros(1)
    monkeypatch.setattr(module, "time_replays", time_replays)
    monkeypatch.setattr(module, "capture", capture)
    monkeypatch.setattr(module, "launch_code_switch", lambda *inputs, form: code_switch_reference(*inputs))
    assert "floor     1.5 us" in "\n".join(benchmark.header())
    (measured,) = benchmark.cases()
    kernels = [name for name in ("kernel_row", "kernel_blocks", "kernel_auto") for _ in range(2)]
    assert [each.implementation for each in measured] == [*kernels, "reference", "python_loop"]
    assert [each.l2 for each in measured] == ["cold", "warm"] * 3 + ["", ""]
    assert [each.timed_as for each in measured] == ["graph"] * 6 + ["call"] * 2
    assert flushes == [(1, benchmark._flush), (WARM_CALLS, None)] * 3
    assert all(each.host_us for each in measured[:-1]) and measured[-1].host_us is None
    assert [each.floor_us for each in measured] == [1.5] * 6 + [None] * 2

    def wrong(*inputs: Any, form: str) -> CodeSwitchOutput:
        output = code_switch_reference(*inputs)
        return output if form == "row" else output._replace(labels=output.labels + 1)

    monkeypatch.setattr(module, "launch_code_switch", wrong)
    with user_error("kernel_blocks: labels", "reference", kind=RuntimeError):
        next(benchmark.cases())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--cases", "2x600", "70x600", "--keys", "3000", "--ratio", "0.5", "--repeats", "2", "--l2", "both"]
    assert main(["benchmark", "code-switch", *arguments]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith(("kernel_", "ref"))]
    kernels = [name for name in ("kernel_row", "kernel_blocks", "kernel_auto") for _ in range(2)]
    assert names == 2 * [*kernels, "reference"]


@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("lookahead", [0, None])
def test_python_loop_equals_the_reference(workload: Workload, ratio: float, lookahead: int | None) -> None:
    inputs = inputs_of(workload, ratio, lookahead=lookahead)
    check_python_loop(python_loop(workload, inputs), ratio_threshold(ratio), inputs, inputs.table)


@pytest.mark.parametrize("fraction", [0.02, 0.7])
def test_python_loop_equals_the_reference_with_word_starts(workload: Workload, fraction: float) -> None:
    inputs = inputs_of(workload, 0.5)
    starts = torch.from_numpy(np.random.default_rng(SEED).random(inputs.batch.tokens.shape) < fraction)
    marked = inputs._replace(batch=inputs.batch._replace(word_starts=starts))
    assert not torch.equal(code_switch_reference(*marked).tokens, code_switch_reference(*inputs).tokens)
    check_python_loop(python_loop(workload, inputs), ratio_threshold(0.5), marked, inputs.table)


def test_python_loop_with_its_own_random_draws(workload: Workload) -> None:
    inputs = inputs_of(workload, 0.5)
    loop = python_loop(workload, inputs)
    tokens, labels, mask, positions = loop(inputs.batch.tokens, 512, 0)
    assert torch.equal(tokens, inputs.batch.tokens[:, :512]) and torch.equal(labels, inputs.batch.tokens[:, 1:513])
    assert bool((mask == 1).all()) and torch.equal(positions[1], torch.arange(512))
    switched, *_ = loop(inputs.batch.tokens, 512, ratio_threshold(0.5))
    assert switched.shape == tokens.shape and not torch.equal(switched, tokens)


def test_a_wrong_python_loop_is_found(workload: Workload) -> None:
    inputs = inputs_of(workload, 0.5)
    with user_error("python_loop: tokens", "reference", kind=RuntimeError):
        check_python_loop(python_loop(workload, inputs), ratio_threshold(0.4), inputs, inputs.table)


def test_a_wrong_kernel_is_found(workload: Workload) -> None:
    expected = code_switch_reference(*inputs_of(workload, 0.5))
    check_equal("kernel", expected, expected)
    for name in ("tokens", "labels", "loss_mask", "position_ids", "counts"):
        changed = getattr(expected, name).clone()
        changed[-1, -1] += 1
        with user_error(f"kernel: {name}", "reference", kind=RuntimeError):
            check_equal("kernel", expected._replace(**{name: changed}), expected)
    starts = torch.zeros(expected.tokens.shape, dtype=torch.int32)
    with user_error("kernel: document_starts", kind=RuntimeError):
        check_equal("kernel", expected._replace(document_starts=starts), expected)


def test_bytes_moved_by_hand() -> None:
    # 2 rows: 10 tokens of 8 bytes, language and sample id; 6 positions of 28 bytes; 5 + 3 counts of 8 bytes
    assert bytes_moved(2, 10, 6, 8, 3, False) == 2 * (80 + 16 + 168 + 64)
    assert bytes_moved(2, 10, 6, 4, 3, False) == 2 * (40 + 16 + 168 + 64)
    assert bytes_moved(2, 10, 6, 4, 3, True) == 2 * (40 + 10 + 16 + 168 + 64)


def test_bytes_moved_equal_the_sizes_of_the_tensors(workload: Workload) -> None:
    inputs = inputs_of(workload, 0.5)
    output = code_switch_reference(*inputs)
    moved = [inputs.batch.tokens, inputs.batch.language, inputs.batch.sample_id, *output[:4], output.counts]
    total = sum(each.numel() * each.element_size() for each in moved)
    assert bytes_moved(*inputs.batch.tokens.shape, 512, 8, LANGUAGES, False) == total


def test_speed_ups_compare_medians() -> None:
    fields = {field.name: 1 for field in dataclasses.fields(Measurement)}
    names = {"kernel_row": 2.0, "reference": 10.0, "python_loop": 80.0}
    measured = [
        Measurement(**{**fields, "implementation": name, "median_us": median})  # type: ignore[arg-type]
        for name, median in names.items()
    ]
    assert [each.times_reference for each in compare(measured)] == [5.0, 1.0, 0.125]
    assert [each.times_python_loop for each in compare(measured)] == [40.0, 8.0, 1.0]
    assert [each.times_python_loop for each in compare(measured[:2])] == [None, None]


def test_synthetic_text_is_like_text(workload: Workload) -> None:
    inputs = inputs_of(workload, 0.05, rows=8, sequence=4096)
    counts = code_switch_reference(*inputs).counts.sum(0)
    assert 0.87 < counts[KNOWN] / counts[RUNNING] < 0.93
    # Ten of eleven units are words of 2.1 tokens on average, the others are punctuation marks.
    assert 0.44 < counts[RUNNING] / (8 * 4096) < 0.47
    assert inputs.batch.tokens.min() == EOD and inputs.batch.tokens.max() < len(inputs.table.word_boundary)
    # Rows are consecutive in one text and overlap in the token between them and in the lookahead.
    assert torch.equal(inputs.batch.tokens[1, : 1 + 205], inputs.batch.tokens[0, 4096:])
    # Zipf's law: the most frequent of 600 words of one token is far above the mean.
    frequency = torch.bincount(inputs.batch.tokens.flatten())
    assert frequency[1:20_000].max() > 5 * frequency[1:20_000].sum() / 600
    again, other = synthetic_workload(2000, SEED), synthetic_workload(2000, SEED + 1)
    for name, values in workload.arrays.items():
        assert np.array_equal(values, again.arrays[name])
    assert np.array_equal(again.read(1000)[0], workload.read(1000)[0])
    assert not np.array_equal(other.read(1000)[0], workload.read(1000)[0])


@pytest.mark.parametrize("keys", [1, 2, 70_000])
def test_synthetic_table_has_the_requested_number_of_keys(keys: int) -> None:
    arrays = synthetic_workload(keys, SEED).arrays
    table = build_ngram_table(**arrays)
    assert table.num_keys == keys
    lengths = np.bincount(np.diff(arrays["key_offsets"]), minlength=5)
    assert lengths.sum() == keys and lengths[0] == 0
    if keys == 70_000:
        # All available words of one token; the other lengths in the ratio 40 : 20 : 10.
        assert lengths.tolist() == [0, 19_999, 28_572, 14_286, 7_143]


def test_custom_table_and_dataset(tiny: "Tiny", tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F821
    custom = dataset_workload(tiny.table, f"{tiny.directory}/en")
    inputs = inputs_of(custom, 0.5, rows=2, sequence=64)
    output = code_switch_reference(*inputs)
    assert int(output.counts[:, KNOWN].sum()) > 10
    check_python_loop(python_loop(custom, inputs), ratio_threshold(0.5), inputs, inputs.table)
    arguments = ["benchmark", "code-switch", "--device", "cpu", "--table", tiny.table, "--data", f"{tiny.directory}/en"]
    assert main([*arguments, "--cases", "1x64", "--repeats", "1"]) == 0
    assert f"workload  {tiny.directory}/en text, table of " in capsys.readouterr().out
    status = main([*arguments, "--cases", "1x64", "999x99999"])
    # Nothing is measured before the error.
    captured = capsys.readouterr()
    assert captured.out == ""
    assert_refused(status, captured.err, f"{tiny.directory}/en", "99,949,002", "999x99999")


def test_word_bitmap_of_a_dataset(tiny: "Tiny", tmp_path: Path) -> None:  # noqa: F821
    prefix = tmp_path / "marked"
    for ending in (".bin", ".idx"):
        Path(f"{prefix}{ending}").write_bytes(Path(f"{tiny.directory}/en{ending}").read_bytes())
    sidecar = dataclasses.replace(load_sidecar(f"{tiny.directory}/en"), segmenter="mine")
    save_sidecar(sidecar, prefix)
    with user_error(f"{words_path(prefix)}: file not found"):
        dataset_workload(tiny.table, str(prefix))
    bits = np.random.default_rng(SEED).random(sidecar.tokens) < 0.3
    words_path(prefix).write_bytes(np.packbits(bits, bitorder="little").tobytes())
    tokens, starts = dataset_workload(tiny.table, str(prefix)).read(1003)
    assert starts is not None and np.array_equal(starts, bits[:1003])
    assert np.array_equal(tokens, dataset_workload(tiny.table, f"{tiny.directory}/en").read(1003)[0])


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["--keys", "0"], ("--keys is 0", "at least 1")),
        (["--keys", "99999999"], ("--keys is 99999999", "1 to 10000000")),
        (["--ratio", "0.5", "1.5"], ("--ratio is 1.5", "[0, 1]")),
        (["--ratio", "nan"], ("--ratio is nan", "finite")),
        (["--cases", "8by9"], ("--cases is '8by9'", "ROWSxSEQUENCE")),
        (["--cases", "1x9999999"], ("--cases has 1x9999999", "at most 4194304")),
        (["--repeats", "0"], ("--repeats is 0", "at least 1")),
        (["--seed", "-1"], ("--seed is -1", "0 to 2^64-1")),
        (["--table", "x"], ("--table requires --data",)),
        (["--data", "x"], ("--data requires --table",)),
        (["--table", "no/table", "--data", "x"], ("dictionary table no/table", "does not exist")),
        (["--table", "x", "--data", "x", "--keys", "5"], ("--keys cannot be combined with --table",)),
        (["--output", "no/directory/x.csv"], ("--output no/directory/x.csv", "no/directory is not an existing")),
        (["--output", "."], ("--output . is a directory",)),
        (["--l2", "hot"], ("--l2 is hot", "one of cold, warm, both")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_options(arguments: list[str], facts: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["benchmark", "code-switch", "--device", "cpu", *arguments])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert_refused(status, captured.err, *facts)
