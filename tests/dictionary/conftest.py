"""A small real tokenizer, a clone of it, and datasets made with it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_prealign.tokenizer.base import Tokenizer
from megatron_prealign.tokenizer.load import load_tokenizer

TRAINING_TEXT = [
    "The apple and the house are red. An apple tree, a bank, the Bank of the river; Polish people polish the table.",
    "Der Apfel und das Haus sind rot. Ein Apfelbaum, eine Bank, das Ufer; die Tische und der Straßenbahn, straße.",
    "la pomme et la maison sont rouges, une banque, le fleuve",
    "苹果 银行 房子 りんご 家",
    "яблоко дом банк",
    # Spellings of the tests as single tokens, so that token counts do not depend on the order of merges.
    " RED ROT BANK UFER APPLE APFEL HOUSE HAUS POLISH Red Rot Haus Gebäude Polish polnisch POLNISCH polieren POLIEREN",
    "it's 's rouges rouges",
    "(red (rot (house (haus (Red (Rot (House (RED (ROT (HOUSE (HAUS (BANK (UFER (POLISH (polish (APPLE (Apple (apple",
]


def save_bpe(directory: Path, *, vocab_size: int = 900) -> Path:
    """Saves a byte-level BPE tokenizer directory as `train-tokenizer` writes it."""
    from tokenizers import Tokenizer as HuggingFace
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = HuggingFace(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<eod>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT * 3, trainer)
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bpe(tmp_path_factory.mktemp("bpe") / "tokenizer")


@pytest.fixture(scope="session")
def tokenizer(tokenizer_directory: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_directory)


@pytest.fixture(scope="session")
def metaspace_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer that maps characters missing in its training data to the unknown token."""
    from tokenizers import Tokenizer as HuggingFace
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = HuggingFace(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(TRAINING_TEXT * 3, trainer)
    directory = tmp_path_factory.mktemp("metaspace")
    tokenizer.save(str(directory / "tokenizer.json"))
    return load_tokenizer(directory)


@pytest.fixture(scope="session")
def clone_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = save_bpe(tmp_path_factory.mktemp("clone") / "tokenizer")
    (directory / "clone.json").write_text('{"language": "en_clone"}')
    return load_tokenizer(directory)


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., Path]:
    """Writes documents as PREFIX.bin, .idx and .json, with a segmenter also .words; returns the prefix."""
    from megatron_prealign.preprocess.run import PreprocessSettings, preprocess

    def make(tokenizer: Tokenizer, documents: list[str], language: str, segmenter: str | None = None) -> Path:
        import json

        source = tmp_path / f"{language}.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
        prefix = tmp_path / (f"data_{language}" if segmenter is None else f"words_{language}")
        settings = PreprocessSettings(language=language, segmenter=segmenter, overwrite=True)
        preprocess([str(source)], str(tokenizer.path), str(prefix), settings)
        return prefix

    return make
