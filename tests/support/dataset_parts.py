"""Datasets for the tests of `megatron-prealign dataset`: random documents and plainly written files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_prealign.data.indexed import import_indexed_dataset
from megatron_prealign.data.sidecar import InputRecord, Sidecar, TokenizerRecord, sidecar_path, write_sidecar
from megatron_prealign.files.checksum import file_checksum

EOD = 3
VOCAB_SIZE = 1000
Documents = list[list[int]]


def random_documents(count: int, seed: int, longest: int = 40) -> Documents:
    """Documents of ids other than `EOD`, each terminated by `EOD`; some contain nothing else."""
    random = np.random.default_rng(seed)
    return [[*random.integers(EOD + 1, VOCAB_SIZE, random.integers(0, longest)).tolist(), EOD] for _ in range(count)]


def word_bits(documents: Documents) -> np.ndarray:
    """A bit per token by a simple rule: set for the first and last token of a document and for even ids."""
    bits = [
        place == 0 or token % 2 == 0 or token == EOD for document in documents for place, token in enumerate(document)
    ]
    return np.array(bits, dtype=np.bool_)


def write_tokens(prefix: Path, documents: Documents, dtype: type = np.uint16) -> None:
    """Writes `.bin` and `.idx` with Megatron-Core."""
    builder = import_indexed_dataset().IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(np.array(document, dtype=dtype), [len(document)])
    builder.finalize(f"{prefix}.idx")


def make_dataset(
    prefix: Path,
    documents: Documents,
    /,
    *,
    segmenter: str | None = None,
    checksums: Sequence[str] = ("bin", "idx", "words"),
    dtype: type = np.uint16,
    **fields: object,
) -> str:
    """Writes a complete dataset with checksums; `fields` replace fields of the sidecar."""
    write_tokens(prefix, documents, dtype)
    if segmenter is not None:
        np.packbits(word_bits(documents), bitorder="little").tofile(f"{prefix}.words")
    names = [name for name in checksums if name != "words" or segmenter is not None]
    values: dict[str, object] = {
        "language": "zh",
        "tokenizer": TokenizerRecord("no/such/tokenizer", "sha256:aa", VOCAB_SIZE),
        "eod_id": EOD,
        "documents": len(documents),
        "tokens": sum(map(len, documents)),
        "bytes": 5 * len(documents),
        "inputs": [InputRecord(f"{prefix.name}.jsonl", 100)],
        "segmenter": segmenter,
        "checksums": {name: file_checksum(Path(f"{prefix}.{name}")) for name in names},
        "engine": "tokenizers",
        "text_keys": ["text"],
    }
    write_sidecar(Sidecar(**(values | fields)), sidecar_path(prefix))  # type: ignore[arg-type]
    return str(prefix)
