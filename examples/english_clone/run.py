"""The demo: joint training, PreAlign and its control on English and English-Clone, from raw text to the report.

Every step is a command a user would type; it is printed before it runs. Steps whose output exists are skipped, so an
interrupted demo can be restarted. The three runs share nothing, so they run side by side, each in a process of one
thread.
"""

import argparse
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
DEMO = Path("runs/demo")
DATA = DEMO / "data"
TABLE, CONTROL = DATA / "table.safetensors", DATA / "shuffled.safetensors"
# Name of each run -> recipes that are added to base.yaml, in the order of the report.
RUNS = {"joint": [], "prealign": ["prealign.yaml"], "shuffled": ["prealign.yaml", "shuffled.yaml"]}
NOTE = (
    "shuffled is the control: it trains like prealign, but every word has the translations of another word, so what it "
    "gains over joint does not come from true pairs"
)


def megatron_prealign(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "megatron_prealign", *map(str, arguments)]


def run(command: Sequence[str], output: Path | None = None) -> None:
    """Runs one command, unless its last output `output` exists."""
    if output is not None and output.exists():
        print(f"# {output} exists", flush=True)
        return
    print(f"$ {shlex.join(command)}", flush=True)
    done = subprocess.run(command, env=_environment(os.cpu_count() or 1), check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def run_side_by_side(commands: Mapping[str, Sequence[str]]) -> None:
    """Runs commands at once in processes of one thread; prints their lines with the name of the command. The others
    end if one fails.

    With fewer cores than commands they share the cores: starting one as soon as another ends would leave a core idle at
    the end.
    """
    processes: list[subprocess.Popen[str]] = []
    failed = threading.Event()

    def follow(name: str, command: Sequence[str]) -> int:
        if failed.is_set():
            return 0
        print(f"$ {shlex.join(command)}", flush=True)
        with subprocess.Popen(
            command, env=_environment(1), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            processes.append(process)
            assert process.stdout is not None
            for line in process.stdout:
                print(f"[{name}] {line}", end="", flush=True)
        if process.returncode and not failed.is_set():
            failed.set()
            for each in processes:
                # A run that is stopped like this saves a checkpoint, from which the next demo continues.
                each.terminate()
        return process.returncode

    with ThreadPoolExecutor(len(commands)) as pool:
        statuses = list(pool.map(follow, commands, commands.values()))
    if any(statuses):
        raise SystemExit(max(statuses))


def _environment(threads: int) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads)}


def prepare() -> None:
    """Harvests the text, trains the tokenizer, preprocesses both languages, builds the dictionary and its control."""
    harvest = [sys.executable, str(HERE / "harvest.py"), "--output", str(DATA), "--max-bytes", "6000000"]
    run(harvest, DATA / "words.tsv")
    tokenizer, text = DATA / "tokenizer", DATA / "train.jsonl"
    # The corpus is small: train on all of it.
    options = ("--vocab-size", 2048, "--clone-language", "en_clone", "--held-out", 0)
    run(megatron_prealign("train-tokenizer", "--input", text, "--output", tokenizer, *options), tokenizer)
    for split in ("train", "validation"):
        for language in ("en", "en_clone"):
            text, prefix = DATA / f"{split}.jsonl", DATA / f"{split}_{language}"
            # Starting more workers takes longer than files of this size.
            options = ("--output", prefix, "--language", language, "--workers", 1)
            run(
                megatron_prealign("preprocess", "--input", text, "--tokenizer", tokenizer, *options),
                Path(f"{prefix}.json"),
            )
    # The list has the words as they are in the text, brackets included.
    options = ("--tokenizer", tokenizer, "--output", TABLE, "--corpus", DATA / "train_en", "--notes", "keep")
    run(megatron_prealign("dictionary", "build", "--input", f"{DATA / 'words.tsv'}:en-en_clone", *options), TABLE)
    run(megatron_prealign("dictionary", "shuffle", "--table", TABLE, "--output", CONTROL), CONTROL)


def main() -> int:
    """Runs the whole demo in the current directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prepare", action="store_true", help="only prepare the data, for study.yaml")
    options = parser.parse_args()
    start_s = time.monotonic()
    prepare()
    if options.prepare:
        return 0
    recipes = {
        name: [word for file in ("base.yaml", *files) for word in ("--config", str(HERE / file))]
        for name, files in RUNS.items()
    }
    for recipe in recipes.values():
        run(megatron_prealign("pretrain", *recipe, "--validate"))
    # Training resumes automatically; a finished run exits at once.
    run_side_by_side({name: megatron_prealign("pretrain", *recipe) for name, recipe in recipes.items()})
    runs = [f"{name}={DEMO / name}" for name in RUNS]
    run(megatron_prealign("evaluate", "--run", *runs, "--output", DEMO))
    print(NOTE)
    print(f"done in {(time.monotonic() - start_s) / 60:.1f} minutes; open {DEMO / 'report.html'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
