"""`megatron-prealign benchmark`: measures kernels, phases, preprocessing and conversion on this machine."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from megatron_prealign.benchmark.options import (
    CodeSwitchOptions,
    ContrastiveOptions,
    ConvertOptions,
    PreprocessOptions,
    ResourcesOptions,
)
from megatron_prealign.cli.actions import Actions, run_action
from megatron_prealign.cli.options import parse_options
from megatron_prealign.resources import use_huge_pages
from megatron_prealign.text import plural
from megatron_prealign.tools.benchmark_data_wait import main as data_wait
from megatron_prealign.tools.benchmark_phases import main as phases

if TYPE_CHECKING:
    from megatron_prealign.benchmark.code_switch import CodeSwitchBenchmark
    from megatron_prealign.benchmark.contrastive import ContrastiveBenchmark


def code_switch(argv: Sequence[str]) -> int:
    options = parse_options(CodeSwitchOptions, "benchmark code-switch", argv)

    from megatron_prealign.benchmark.code_switch import CodeSwitchBenchmark
    from megatron_prealign.benchmark.report import case_table

    return _measure(CodeSwitchBenchmark(options), case_table, options)


def contrastive(argv: Sequence[str]) -> int:
    options = parse_options(ContrastiveOptions, "benchmark contrastive", argv)

    from megatron_prealign.benchmark.contrastive import ContrastiveBenchmark
    from megatron_prealign.benchmark.report import contrastive_table

    return _measure(ContrastiveBenchmark(options), contrastive_table, options)


def _measure(
    benchmark: "CodeSwitchBenchmark | ContrastiveBenchmark",
    table: Callable[[Any], list[str]],
    options: CodeSwitchOptions | ContrastiveOptions,
) -> int:
    """Prints a table for each case as soon as it is measured, then writes the CSV file."""
    if not benchmark.on_gpu and options.device == "auto":
        print("torch found no GPU: measuring on the CPU, without kernels", flush=True)
    print("\n".join(benchmark.header()), flush=True)
    rows: list[dict[str, Any]] = []
    for measured in benchmark.cases():
        print("\n".join(["", *table(measured)]), flush=True)
        rows += [{**asdict(each), **asdict(benchmark.machine)} for each in measured]
    _write(options.output, rows)
    return 0


def _print_lines(
    measurements: Iterable[Any],
    line: Callable[[Any], str],
    row: Callable[[Any], dict[str, Any]],
    output: str | None,
) -> None:
    """Prints a line for each measurement as soon as it is available, then writes the CSV file."""
    rows: list[dict[str, Any]] = []
    for measurement in measurements:
        print(line(measurement), flush=True)
        rows.append(row(measurement))
    _write(output, rows)


def _write(output: str | None, rows: Sequence[dict[str, Any]]) -> None:
    from megatron_prealign.benchmark.report import write_csv

    if output is not None:
        write_csv(output, rows)
        print(f"\nwrote {output}")


def preprocess(argv: Sequence[str]) -> int:
    options = parse_options(PreprocessOptions, "benchmark preprocess", argv)

    from pathlib import Path

    import torch

    from megatron_prealign.benchmark.machine import describe_machine
    from megatron_prealign.benchmark.preprocess import PreprocessBenchmark, PreprocessMeasurement
    from megatron_prealign.benchmark.report import preprocess_header, preprocess_line

    machine = describe_machine(torch.device("cpu"))
    sizes = " to ".join(f"{size:,}" for size in options.document_bytes)
    corpus = " ".join(Path(path).name for path in options.input) or f"synthetic, documents of {sizes} bytes"
    tokenizer = Path(options.tokenizer).name if options.tokenizer is not None else "byte-level BPE, 4,096 ids"
    print(
        "\n".join([*machine.lines(), f"corpus    {corpus}", f"tokenizer {tokenizer}", "", preprocess_header()]),
        flush=True,
    )

    def row(measurement: PreprocessMeasurement) -> dict[str, Any]:
        rates = {"mb_per_second": measurement.mb_per_second, "tokens_per_second": measurement.tokens_per_second}
        return {"corpus": corpus, "tokenizer": tokenizer} | asdict(measurement) | rates | asdict(machine)

    _print_lines(PreprocessBenchmark(options).measure(), preprocess_line, row, options.output)
    return 0


def convert(argv: Sequence[str]) -> int:
    options = parse_options(ConvertOptions, "benchmark convert", argv)
    # Same setting as in the `convert` command.
    use_huge_pages()

    import torch

    from megatron_prealign.benchmark.convert import ConvertBenchmark, ConvertMeasurement
    from megatron_prealign.benchmark.machine import describe_machine
    from megatron_prealign.benchmark.report import convert_header, convert_line

    machine = describe_machine(torch.device("cpu"))
    benchmark = ConvertBenchmark(options)
    model = f"Llama, {benchmark.parameters:,} parameters in bf16, {plural(benchmark.model.num_layers, 'layer')}"
    print("\n".join([*machine.lines(), f"model     {model}", "", convert_header()]), flush=True)

    def row(measurement: ConvertMeasurement) -> dict[str, Any]:
        return asdict(measurement) | {"gb_per_second": measurement.gb_per_second} | asdict(machine)

    _print_lines(benchmark.measure(), convert_line, row, options.output)
    return 0


def resources(argv: Sequence[str]) -> int:
    options = parse_options(ResourcesOptions, "benchmark resources", argv)

    import torch

    from megatron_prealign.benchmark.kernel_resources import measure_resources
    from megatron_prealign.benchmark.machine import describe_machine
    from megatron_prealign.text import align

    rows = list(measure_resources(options.capability))
    # The compiled kernels depend only on these.
    machine = describe_machine(torch.device("cpu"))
    versions = {name: getattr(machine, name) for name in ("triton", "version", "commit", "date")}
    print("\n".join(align([list(rows[0]), *[[str(value) for value in row.values()] for row in rows]])))
    print(", ".join(f"{name} {value}" for name, value in versions.items()))
    _write(options.output, [row | versions for row in rows])
    return 0


ACTIONS: Actions = {
    "code-switch": (code_switch, "code-switching of a batch: kernels, plain PyTorch, Python loop"),
    "contrastive": (contrastive, "contrastive loss: eager PyTorch, torch.compile, chunked PyTorch, kernels"),
    "phases": (phases, "alignment phase of a recipe compared with its language-model training"),
    "data-wait": (data_wait, "waiting of a step for samples of a slow disk, read on demand and ahead"),
    "preprocess": (preprocess, "preprocessing: gigatoken, the tokenizer's own library, Megatron-LM's tool"),
    "convert": (convert, "conversion to and from Hugging Face: speed compared with cp, memory"),
    "resources": (resources, "registers, spills and shared memory of the kernels; no GPU required"),
}


def main(argv: Sequence[str]) -> int:
    """Runs `benchmark ACTION`."""
    return run_action("benchmark", ACTIONS, argv)
