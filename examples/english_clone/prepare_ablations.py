"""Data of study_ablations.yaml: dictionaries with noise, clone text in another word order, clones that share ids.

Steps whose output exists are skipped.
"""

import argparse
import json
from pathlib import Path

from run import DATA, TABLE, megatron_prealign, prepare, run

GROUP = 5
"""Words per group that is reversed in the text of another order."""
NOISE = (0.1, 0.25, 0.5)
SHARED_IDS = (512, 1024)


def reorder(source: Path, target: Path) -> None:
    """Writes the text of `source` with every group of `GROUP` words of a line reversed."""
    # Renamed when complete, because an existing file is not written again.
    temporary = target.with_name(f".{target.name}.tmp")
    with source.open(encoding="utf-8") as lines, temporary.open("w", encoding="utf-8") as output:
        for line in lines:
            document = json.loads(line)
            rows = (row.split(" ") for row in document["text"].split("\n"))
            text = "\n".join(" ".join(_reversed_groups(words)) for words in rows)
            output.write(json.dumps({**document, "text": text}, ensure_ascii=False) + "\n")
    temporary.replace(target)


def _reversed_groups(words: list[str]) -> list[str]:
    groups = (words[start : start + GROUP] for start in range(0, len(words), GROUP))
    return [word for group in groups for word in reversed(group)]


def preprocess(text: Path, tokenizer: Path, prefix: Path, language: str) -> None:
    options = ("--output", prefix, "--language", language, "--workers", 1)
    run(megatron_prealign("preprocess", "--input", text, "--tokenizer", tokenizer, *options), Path(f"{prefix}.json"))


def main() -> int:
    """Prepares everything in the current directory."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    prepare()
    for share in NOISE:
        table = DATA / f"noise_{share:g}.safetensors"
        run(megatron_prealign("dictionary", "shuffle", "--table", TABLE, "--output", table, "--share", share), table)
    for split in ("train", "validation"):
        text = DATA / f"{split}_reordered.jsonl"
        if not text.exists():
            reorder(DATA / f"{split}.jsonl", text)
        preprocess(text, DATA / "tokenizer", DATA / f"{split}_en_clone_reordered", "en_clone")
    for shared in SHARED_IDS:
        directory = DATA / f"shared_{shared}"
        directory.mkdir(exist_ok=True)
        tokenizer, table = directory / "tokenizer", directory / "table.safetensors"
        options = ("--vocab-size", 2048, "--clone-language", "en_clone", "--clone-shared-ids", shared, "--held-out", 0)
        run(
            megatron_prealign("train-tokenizer", "--input", DATA / "train.jsonl", "--output", tokenizer, *options),
            tokenizer,
        )
        for split in ("train", "validation"):
            for language in ("en", "en_clone"):
                preprocess(DATA / f"{split}.jsonl", tokenizer, directory / f"{split}_{language}", language)
        options = ("--tokenizer", tokenizer, "--corpus", directory / "train_en", "--notes", "keep", "--output", table)
        run(megatron_prealign("dictionary", "build", "--input", f"{DATA / 'words.tsv'}:en-en_clone", *options), table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
