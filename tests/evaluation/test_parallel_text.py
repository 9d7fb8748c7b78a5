"""Sentence pairs of parallel text: which documents are measured, and files that are not parallel."""

import gzip
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.messages import user_error
from support.recipe_values import recipe_values
from support.sidecars import save_sidecar
from support.tiny import Tiny, recipe_of
from support.token_datasets import EOD, write_dataset

from megatron_prealign.corpus.readers import Fields
from megatron_prealign.data.indexed import write_index
from megatron_prealign.data.sidecar import load_sidecar
from megatron_prealign.evaluation import parallel_text
from megatron_prealign.evaluation.parallel_text import SentencePairs, measured_pairs, open_parallel_text
from megatron_prealign.preprocess.run import PreprocessSettings, preprocess
from megatron_prealign.tokenizer.load import load_tokenizer

FINGERPRINT = "sha256:aa"


def write(prefix: Path, language: str, documents: list[list[int]], **options: Any) -> str:
    """Writes documents of these ids, each with its end-of-document id."""
    return write_dataset(prefix, [np.array([*document, EOD]) for document in documents], language, **options)


def opened(directory: Path, changes: dict[str, Any] | None = None, **entry: Any) -> list[SentencePairs]:
    text = {"source": str(directory / "en"), "target": str(directory / "de"), **entry}
    recipe = recipe_of(recipe_values({"data.parallel_text": [text], **(changes or {})}), directory)
    return open_parallel_text(recipe, tokenizer_fingerprint=FINGERPRINT)


def pairs_of(text: SentencePairs) -> list[tuple[list[int], list[int]]]:
    assert text.pairs is not None
    return [(text.pairs.source[one].tolist(), text.pairs.target[other].tolist()) for one, other in text.pairs.links]


def write_both(directory: Path, pairs: list[tuple[list[int], list[int]]]) -> None:
    write(directory / "en", "en", [source for source, _ in pairs])
    write(directory / "de", "de", [target for _, target in pairs])


@pytest.mark.parametrize("chunk", [2, 1 << 16])
def test_documents_that_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Pairs in order, without those that have an empty or a long side; equal sentences are one."""
    monkeypatch.setattr(parallel_text, "_CHUNK", chunk)
    # 16 tokens is data.seq_length; the end-of-document token does not count.
    longest = list(range(100, 116))
    pairs = [
        ([1, 2], [3]),
        ([], [4]),
        ([5], [*longest, 116]),
        (longest, [6, 7]),
        ([8], []),
        ([1, 2], [3]),
        ([1, 2], [9]),
        ([10], [11]),
    ]
    write_both(tmp_path, pairs)
    (text,) = opened(tmp_path, {"training.retrieval_sentences": 3})
    assert pairs_of(text) == [pairs[0], pairs[6], pairs[3]]
    assert (text.name, text.documents, text.measured, text.max_tokens) == ("en-de", 8, 3, 16)
    assert text.pairs is not None and [len(text.pairs.source), len(text.pairs.target)] == [2, 3]
    (text,) = opened(tmp_path, {"training.retrieval_sentences": 100})
    assert [pairs[index] for index in (0, 6, 3, 7)] == pairs_of(text)


def test_longest_sentence(tmp_path: Path) -> None:
    write_both(tmp_path, [(list(range(1, 129)), [1]), (list(range(1, 130)), [2])])
    assert opened(tmp_path)[0].pairs is None
    assert measured_pairs(opened(tmp_path)) == []
    (text,) = opened(tmp_path, {"data.seq_length": 256})
    assert (text.measured, text.max_tokens) == (1, 128)


def test_special_tokens_at_both_ends_are_left_out(tmp_path: Path) -> None:
    write_both(tmp_path, [([7, 1, 2], [7, 3])])
    for name in ("en", "de"):
        save_sidecar(replace(load_sidecar(tmp_path / name), bos=True), tmp_path / name)
    assert pairs_of(opened(tmp_path)[0]) == [([1, 2], [3])]
    for name in ("en", "de"):
        save_sidecar(replace(load_sidecar(tmp_path / name), append_eod=False), tmp_path / name)
    assert pairs_of(opened(tmp_path)[0]) == [([1, 2, EOD], [3, EOD])]


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    """As Megatron-LM writes them with `--split-sentences`."""
    write_both(tmp_path, [([1, 2, 3, 4], [5]), ([6], [7])])
    lengths = np.array([2, 3, 2], dtype=np.int32)
    write_index(tmp_path / "en.idx", np.int32, lengths, np.array([0, 2, 3]))
    assert pairs_of(opened(tmp_path)[0]) == [([1, 2, 3, 4], [5]), ([6], [7])]


def test_languages_of_the_recipe_agree_with_the_datasets(tmp_path: Path) -> None:
    write_both(tmp_path, [([1], [2])])
    assert opened(tmp_path, languages=["en", "de"])[0].languages == opened(tmp_path)[0].languages == ("en", "de")
    with user_error(tmp_path / "en", "language is en", "data.parallel_text[0].languages says de"):
        opened(tmp_path, languages=["de", "en"])


def test_files_that_are_not_parallel(tmp_path: Path) -> None:
    write_both(tmp_path, [([1], [2]), ([3], [4])])
    write(tmp_path / "short", "de", [[2]])
    with user_error("data.parallel_text[0]", tmp_path / "en", "2 documents", tmp_path / "short", " 1,"):
        opened(tmp_path, target=str(tmp_path / "short"))
    write(tmp_path / "english", "en", [[2], [4]])
    with user_error("data.parallel_text[0]", tmp_path / "en", tmp_path / "english", "both of language en"):
        opened(tmp_path, target=str(tmp_path / "english"))
    write(tmp_path / "other", "de", [[2], [4]], fingerprint="sha256:bb")
    with user_error(tmp_path / "other", "another tokenizer (somewhere)", "data.tokenizer (tok)"):
        opened(tmp_path, target=str(tmp_path / "other"))
    with user_error(tmp_path / "nowhere.idx", "file not found"):
        opened(tmp_path, source=str(tmp_path / "nowhere"))
    save_sidecar(replace(load_sidecar(tmp_path / "de"), skipped_count=1), tmp_path / "de")
    with user_error(tmp_path / "de.json", "skipped 1 document,", "paired with the wrong one"):
        opened(tmp_path)
    os.remove(tmp_path / "de.json")
    with user_error(tmp_path / "de.json", "file not found"):
        opened(tmp_path)


def test_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    write_both(tmp_path, [([1], [2])])
    np.array([90_000, 0], dtype=np.int32).tofile(tmp_path / "de.bin")
    with user_error(tmp_path / "de.bin", "90000", "0 to 89999"):
        opened(tmp_path)


def test_a_pair_of_languages_once(tmp_path: Path) -> None:
    write_both(tmp_path, [([1], [2])])
    forward = {"source": str(tmp_path / "en"), "target": str(tmp_path / "de")}
    backward = {"source": forward["target"], "target": forward["source"]}
    texts = opened(tmp_path, {"data.parallel_text": [forward, backward]})
    assert [text.name for text in texts] == ["en-de", "de-en"]
    with user_error("data.parallel_text[1]", "en-de", "data.parallel_text[0]"):
        opened(tmp_path, {"data.parallel_text": [forward, forward]})


def test_both_keys_of_one_file_stay_parallel(tiny: Tiny, tmp_path: Path) -> None:
    """The way of the documentation; a pair with an empty side is refused instead of shifting those after it."""
    texts = [("The house.", "Das Haus."), ("A river\nand a tree.", "Ein Fluss\nund ein Baum."), ("Yes.", "Ja.")]
    tokenizer = load_tokenizer(tiny.tokenizer)

    def prepared(pairs: list[tuple[str, str]]) -> list[SentencePairs]:
        lines = "".join(json.dumps({"en": en, "de": de}) + "\n" for en, de in pairs)
        (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        for language in ("en", "de"):
            fields = Fields(text_keys=(language,))
            settings = PreprocessSettings(language=language, fields=fields, overwrite=True)
            preprocess([tmp_path / "pairs.jsonl.gz"], tiny.tokenizer, tmp_path / language, settings, False)
        text = {"source": str(tmp_path / "en"), "target": str(tmp_path / "de")}
        recipe = recipe_of(recipe_values({"data.parallel_text": [text], "data.seq_length": 64}), tmp_path)
        return open_parallel_text(recipe, tokenizer_fingerprint=tokenizer.fingerprint)

    (text,) = prepared(texts)
    decoded = [tuple(tokenizer.decode(sentence) for sentence in pair) for pair in pairs_of(text)]
    assert decoded == texts
    with user_error(tmp_path / "de.json", "skipped 1 document,"):
        prepared([texts[0], (texts[1][0], " "), texts[2]])
