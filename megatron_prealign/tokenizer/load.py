"""Finds out what kind of tokenizer lies at a path, and loads it."""

from pathlib import Path

from megatron_prealign.errors import UserError
from megatron_prealign.tokenizer.base import Tokenizer, check_word_forms
from megatron_prealign.tokenizer.clone import CLONE_FILE, CloneTokenizer, load_clone_language
from megatron_prealign.tokenizer.huggingface import HuggingFaceTokenizer
from megatron_prealign.tokenizer.sentencepiece import SentencePieceTokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a Hugging Face tokenizer directory or a sentencepiece `.model` file.

    A directory that also holds `clone.json` (`{"language": "en_clone"}`) loads as a `CloneTokenizer`.

    Args:
        path: the directory or file.

    Raises:
        UserError: nothing there, a broken file, a tokenizer that does not mark where words start, or no end-of-document
            token.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"{path}: no such tokenizer; expected a Hugging Face tokenizer directory or a sentencepiece .model file"
        )
    base = _load_base(path)
    check_word_forms(base)
    if path.is_dir() and (path / CLONE_FILE).exists():
        return CloneTokenizer(base, load_clone_language(path / CLONE_FILE))
    return base


def _load_base(path: Path) -> Tokenizer:
    if path.is_file():
        if path.suffix == ".model":
            return SentencePieceTokenizer(path)
        raise UserError(
            f"{path}: not a tokenizer; expected a sentencepiece .model file or the directory that holds tokenizer.json"
        )
    if (path / "tokenizer.json").exists():
        return HuggingFaceTokenizer(path)
    models = sorted(path.glob("*.model"))
    if len(models) == 1:
        return SentencePieceTokenizer(models[0])
    if (path / "tokenizer_config.json").exists() or (path / "vocab.json").exists():
        return HuggingFaceTokenizer(path)
    raise UserError(
        f"{path}: no tokenizer in this directory; expected tokenizer.json (from save_pretrained) or one .model file"
    )
