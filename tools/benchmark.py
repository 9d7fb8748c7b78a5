"""`megatron-prealign benchmark`: measures kernels and phases on this machine."""

from collections.abc import Callable, Sequence
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
    """Prints the table of each case as it comes, and writes all of them at the end."""
    from megatron_prealign.benchmark.report import write_csv

    if not benchmark.on_gpu and options.device == "auto":
        print("torch finds no GPU: the CPU is measured, and no kernel", flush=True)
    print("\n".join(benchmark.header()), flush=True)
    rows: list[dict[str, Any]] = []
    for measured in benchmark.cases():
        print("\n".join(["", *table(measured)]), flush=True)
        rows += [{**asdict(each), **asdict(benchmark.machine)} for each in measured]
    if options.output is not None:
        write_csv(options.output, rows)
        print(f"\nwrote {options.output}")
    return 0


def preprocess(argv: Sequence[str]) -> int:
    options = parse_options(PreprocessOptions, "benchmark preprocess", argv)

    from pathlib import Path

    import torch

    from megatron_prealign.benchmark.machine import describe_machine
    from megatron_prealign.benchmark.preprocess import PreprocessBenchmark
    from megatron_prealign.benchmark.report import preprocess_header, preprocess_line, write_csv

    machine = describe_machine(torch.device("cpu"))
    sizes = " to ".join(f"{size:,}" for size in options.document_bytes)
    corpus = " ".join(Path(path).name for path in options.input) or f"synthetic, documents of {sizes} bytes"
    tokenizer = Path(options.tokenizer).name if options.tokenizer is not None else "byte-level BPE, 4,096 ids"
    print(
        "\n".join([*machine.lines(), f"corpus    {corpus}", f"tokenizer {tokenizer}", "", preprocess_header()]),
        flush=True,
    )
    rows: list[dict[str, Any]] = []
    for found in PreprocessBenchmark(options).measure():
        print(preprocess_line(found), flush=True)
        rates = {"mb_per_second": found.mb_per_second, "tokens_per_second": found.tokens_per_second}
        rows.append({"corpus": corpus, "tokenizer": tokenizer} | asdict(found) | rates | asdict(machine))
    if options.output is not None:
        write_csv(options.output, rows)
        print(f"\nwrote {options.output}")
    return 0


def convert(argv: Sequence[str]) -> int:
    options = parse_options(ConvertOptions, "benchmark convert", argv)
    # As `convert` itself does.
    use_huge_pages()

    import torch

    from megatron_prealign.benchmark.convert import ConvertBenchmark, header, line
    from megatron_prealign.benchmark.machine import describe_machine
    from megatron_prealign.benchmark.report import write_csv

    machine = describe_machine(torch.device("cpu"))
    benchmark = ConvertBenchmark(options)
    model = f"Llama of {benchmark.parameters:,} numbers in bf16, {benchmark.model.num_layers} layers"
    print("\n".join([*machine.lines(), f"model     {model}", "", header()]), flush=True)
    rows: list[dict[str, Any]] = []
    for found in benchmark.measure():
        print(line(found), flush=True)
        rows.append(asdict(found) | {"gb_per_second": found.gb_per_second} | asdict(machine))
    if options.output is not None:
        write_csv(options.output, rows)
        print(f"\nwrote {options.output}")
    return 0


def resources(argv: Sequence[str]) -> int:
    options = parse_options(ResourcesOptions, "benchmark resources", argv)

    import torch

    from megatron_prealign.benchmark.kernel_resources import measure_resources
    from megatron_prealign.benchmark.machine import describe_machine
    from megatron_prealign.benchmark.report import align, write_csv

    rows = list(measure_resources(options.capability))
    # what the compiler makes of a kernel depends on these alone
    machine = describe_machine(torch.device("cpu"))
    facts = {name: getattr(machine, name) for name in ("triton", "version", "commit", "date")}
    print("\n".join(align([list(rows[0]), *[[str(value) for value in row.values()] for row in rows]])))
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    if options.output is not None:
        write_csv(options.output, [row | facts for row in rows])
        print(f"\nwrote {options.output}")
    return 0


ACTIONS: Actions = {
    "code-switch": (code_switch, "code-switching of a batch: kernels, plain torch, a loop in Python"),
    "contrastive": (contrastive, "the contrastive loss of alignment: eager torch, torch.compile, strips, kernels"),
    "phases": (phases, "the alignment phase of a recipe against its language-model training"),
    "preprocess": (preprocess, "preprocessing of text: gigatoken, the tokenizer's library, Megatron-LM's way"),
    "convert": (convert, "checkpoints to and from Hugging Face against cp of the same bytes, and memory"),
    "resources": (resources, "registers, spills and shared memory of the kernels, without a GPU"),
}


def main(argv: Sequence[str]) -> int:
    """Runs `benchmark ACTION`."""
    return run_action("benchmark", ACTIONS, argv)
