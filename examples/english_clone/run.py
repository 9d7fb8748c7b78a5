"""The demo: joint training and PreAlign on English and English-Clone, from raw text to the report.

Every step is a command a user would type; it is printed before it runs. Steps whose output exists are skipped, so an
interrupted demo can be restarted.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
DEMO = Path("runs/demo")
DATA = DEMO / "data"
PROCESSES = 2


def run(command: Sequence[str], output: Path | None = None) -> None:
    """Runs one command, unless its last output `output` exists."""
    if output is not None and output.exists():
        print(f"# {output} exists", flush=True)
        return
    print(f"$ {shlex.join(command)}", flush=True)
    threads = max(1, (os.cpu_count() or 1) // PROCESSES)
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def megatron_prealign(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "megatron_prealign", *arguments]


def torchrun(*arguments: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    return [*launcher, "-m", "megatron_prealign", *arguments]


def prepare() -> None:
    """Harvests the text, trains the tokenizer, preprocesses both languages and builds the dictionary."""
    harvest = [sys.executable, str(HERE / "harvest.py"), "--output", str(DATA), "--max-bytes", "8000000"]
    run(harvest, DATA / "words.tsv")
    tokenizer = DATA / "tokenizer"
    train_text = str(DATA / "train.jsonl")
    run(
        megatron_prealign(
            *("train-tokenizer", "--input", train_text, "--output", str(tokenizer)),
            # The corpus is small: train on all of it.
            *("--vocab-size", "4096", "--clone-language", "en_clone", "--held-out", "0"),
        ),
        tokenizer,
    )
    for split in ("train", "validation"):
        for language in ("en", "en_clone"):
            prefix = DATA / f"{split}_{language}"
            run(
                megatron_prealign(
                    *("preprocess", "--input", str(DATA / f"{split}.jsonl"), "--tokenizer", str(tokenizer)),
                    # Starting more workers takes longer than files of this size.
                    *("--output", str(prefix), "--language", language, "--workers", "1"),
                ),
                prefix.with_suffix(".json"),
            )
    table = DATA / "table.safetensors"
    run(
        megatron_prealign(
            *("dictionary", "build", "--input", f"{DATA / 'words.tsv'}:en-en_clone"),
            *("--tokenizer", str(tokenizer), "--output", str(table), "--corpus", str(DATA / "train_en")),
            # The list has the words as they are in the text, brackets included.
            *("--notes", "keep"),
        ),
        table,
    )


def main() -> int:
    """Runs the whole demo in the current directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    start_s = time.monotonic()
    prepare()
    base = ["--config", str(HERE / "base.yaml")]
    # Training resumes automatically; a finished run exits at once.
    for recipe in (base, [*base, "--config", str(HERE / "prealign.yaml")]):
        run(megatron_prealign("pretrain", *recipe, "--validate", "--world-size", str(PROCESSES)))
        run(torchrun("pretrain", *recipe))
    run(
        megatron_prealign(
            *("evaluate", "--run", f"joint={DEMO / 'joint'}", f"prealign={DEMO / 'prealign'}", "--output", str(DEMO))
        )
    )
    print(f"done in {(time.monotonic() - start_s) / 60:.1f} minutes; open {DEMO / 'report.html'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
