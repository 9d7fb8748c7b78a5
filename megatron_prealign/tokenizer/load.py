"""Loads the tokenizer at a path, whatever its type."""

from pathlib import Path

from megatron_prealign.errors import UserError
from megatron_prealign.tokenizer.base import Tokenizer, check_word_forms
from megatron_prealign.tokenizer.clone import CLONE_FILE, CloneTokenizer, load_clone
from megatron_prealign.tokenizer.huggingface import HuggingFaceTokenizer
from megatron_prealign.tokenizer.sentencepiece import SentencePieceTokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a Hugging Face tokenizer directory or a sentencepiece `.model` file.

    A directory that also contains `clone.json` (`{"language": "en_clone"}`) loads as a `CloneTokenizer`.

    Args:
        path: directory or file.

    Raises:
        UserError: the path does not exist, a file is invalid, the tokenizer does not mark word starts, or it has no
            end-of-document token.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"{path}: tokenizer not found, expected a Hugging Face tokenizer directory or a sentencepiece .model file"
        )
    base = _load_base(path)
    check_word_forms(base)
    if path.is_dir() and (path / CLONE_FILE).exists():
        clone = load_clone(path / CLONE_FILE)
        if clone.shared_ids >= base.vocab_size:
            raise UserError(
                f"{path / CLONE_FILE}: shared_ids is {clone.shared_ids}, expected less than {base.vocab_size}, the "
                "number of ids of the original; train the tokenizer again with another --clone-shared-ids"
            )
        return CloneTokenizer(base, clone.language, clone.shared_ids)
    return base


def _load_base(path: Path) -> Tokenizer:
    if path.is_file():
        if path.suffix == ".model":
            return SentencePieceTokenizer(path)
        raise UserError(
            f"{path}: not a tokenizer, expected a sentencepiece .model file or a directory with tokenizer.json"
        )
    if (path / "tokenizer.json").exists():
        return HuggingFaceTokenizer(path)
    models = sorted(path.glob("*.model"))
    if len(models) == 1:
        return SentencePieceTokenizer(models[0])
    if (path / "tokenizer_config.json").exists() or (path / "vocab.json").exists():
        return HuggingFaceTokenizer(path)
    raise UserError(
        f"{path}: directory contains no tokenizer, expected tokenizer.json (from save_pretrained) or one .model file"
    )
