"""Data of the study on a natural language: LibreOffice's help in English and another language.

Every page has the same paragraphs in both languages, so the text of one set of pages trains, that of others is held
out, and the paragraphs of the pages that train give a dictionary of the words in the forms that occur. Steps whose
output exists are skipped.
"""

import argparse
import json
import random
import shlex
import subprocess
import sys
from pathlib import Path

from pages import read_help

HELD_OUT_SHARE = 0.05
OUTPUT = Path("runs/libreoffice_help")


def run(output: Path, *arguments: object) -> None:
    """Runs a command of the package, unless its output exists."""
    if output.exists():
        print(f"# {output} exists", flush=True)
        return
    command = ["megatron-prealign", *map(str, arguments)]
    print(f"$ {shlex.join(command)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "megatron_prealign", *command[1:]], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def write_text(directory: Path, data: Path, language: str) -> None:
    """Writes the text of both languages, train and validation, and their paragraphs side by side."""
    pages = read_help(directory, [language])
    names = sorted(pages["en"])
    held_out = set(random.Random(0).sample(names, int(len(names) * HELD_OUT_SHARE)))
    data.mkdir(parents=True, exist_ok=True)
    for code, by_name in pages.items():
        for split in ("train", "validation"):
            lines = []
            for name in names:
                if (name in held_out) == (split == "validation") and by_name.get(name):
                    kept = [by_name[name][key] for key in pages["en"][name] if key in by_name[name]]
                    lines.append(json.dumps({"text": "\n".join(kept)}, ensure_ascii=False) + "\n")
            (data / f"{code}_{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    pairs: dict[bool, list[tuple[str, str]]] = {False: [], True: []}
    for name in names:
        for key, text in pages["en"][name].items():
            if key in pages[language].get(name, {}):
                pairs[name in held_out].append((text, pages[language][name][key]))
    (data / "bitext.tsv").write_text("".join(f"{one}\t{other}\n" for one, other in pairs[False]), encoding="utf-8")
    # The first ones are measured.
    random.Random(0).shuffle(pairs[True])
    rows = (json.dumps({"en": one, language: other}, ensure_ascii=False) + "\n" for one, other in pairs[True])
    # Complete under its name, by which the next start knows that all text is there.
    partial = data / "paragraphs.jsonl.partial"
    partial.write_text("".join(rows), encoding="utf-8")
    partial.replace(data / "paragraphs.jsonl")


def main() -> int:
    """Prepares one language in the current directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("help", type=Path, help="directory usr/share/libreoffice/help of the unpacked packages")
    parser.add_argument("--language", default="de", help="code of the other language")
    options = parser.parse_args()
    language, data = options.language, OUTPUT / options.language
    if not (data / "paragraphs.jsonl").exists():
        write_text(options.help, data, language)
    tokenizer, table = data / "tokenizer", data / "table.safetensors"
    texts = [f"{data / code}_train.jsonl:{code}" for code in ("en", language)]
    # Many words of both languages are one token, as with the vocabularies of large models.
    run(
        tokenizer,
        *("train-tokenizer", "--input", *texts, "--output", tokenizer),
        *("--vocab-size", 8192, "--temperature", 3, "--held-out", 0),
    )
    for code in ("en", language):
        for name, source in (("train", f"{code}_train"), ("validation", f"{code}_validation")):
            prefix = data / f"{name}_{code}"
            _preprocess(data / f"{source}.jsonl", tokenizer, prefix, code, "text")
        _preprocess(data / "paragraphs.jsonl", tokenizer, data / f"paragraphs_{code}", code, code)
    pairs = data / "pairs.tsv"
    run(pairs, "dictionary", "induce", "--bitext", f"{data / 'bitext.tsv'}:en-{language}", "--output", pairs)
    run(
        table,
        *("dictionary", "build", "--input", f"{pairs}:en-{language}", "--weights", "--tokenizer", tokenizer),
        *("--output", table, "--corpus", data / "train_en", "--notes", "keep"),
    )
    control = data / "shuffled.safetensors"
    run(control, "dictionary", "shuffle", "--table", table, "--output", control)
    return 0


def _preprocess(text: Path, tokenizer: Path, prefix: Path, language: str, key: str) -> None:
    run(
        Path(f"{prefix}.json"),
        *("preprocess", "--input", text, "--tokenizer", tokenizer, "--output", prefix),
        *("--language", language, "--text-key", key, "--workers", 1),
    )


if __name__ == "__main__":
    raise SystemExit(main())
