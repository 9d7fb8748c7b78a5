"""Trains a byte-level BPE tokenizer and saves it as a folder that transformers opens."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_prealign.data.clone import save_clone_language
from megatron_prealign.data.files import make_folder, write_atomically
from megatron_prealign.data.readers import OnError, Problems, check_inputs, read_documents
from megatron_prealign.errors import UserError
from megatron_prealign.progress import Progress

EOD = "<eod>"
# Every byte is a token, so that any text can be encoded, and one special token stands in front.
MINIMUM_VOCABULARY = 256 + 1


def train_tokenizer(
    inputs: Sequence[str | Path],
    output: str | Path,
    vocab_size: int,
    clone_language: str | None = None,
    text_key: str = "text",
    on_error: OnError = "stop",
    show_progress: bool = True,
) -> Problems:
    """Writes the folder `output` with `tokenizer.json` and `tokenizer_config.json`, `<eod>` being token 0.

    The same inputs in the same order give the same files, byte for byte.

    Args:
        inputs: `.jsonl` or `.txt` files, also gzipped.
        output: folder to make; it must not exist or be empty.
        vocab_size: tokens, `<eod>` and the 256 bytes included.
        clone_language: also makes it a clone tokenizer: 2 * vocab_size ids, the upper half for this language code.
        text_key: key of the text in each JSON object.
        on_error: `stop` at the first bad document, or `skip` it.
        show_progress: whether to write progress to standard error.

    Returns:
        What was passed over.

    Raises:
        UserError: bad options, inputs or documents, or too little text for `vocab_size` tokens.
    """
    check_inputs(inputs)
    if vocab_size < MINIMUM_VOCABULARY:
        raise UserError(f"vocab_size is {vocab_size}; expected at least {MINIMUM_VOCABULARY} (256 bytes and {EOD})")
    if clone_language is not None and not clone_language.strip():
        raise UserError("clone_language is empty; expected a code like en_clone, or leave it out")
    target = Path(output)
    if target.exists() and not target.is_dir():
        raise UserError(f"output {target}: is a file; expected the path of a new folder")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"output {target}: the folder is not empty; give a new one, or remove it first")
    # Before the hours that a large corpus takes.
    make_folder(target.parent, "output")
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    problems = Problems()
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD],
        # All bytes, also those that this text lacks; sorted, as the library lists them in another order every run.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    with Progress("read text", unit="documents", enabled=show_progress) as progress:
        tokenizer.train_from_iterator(_texts(inputs, text_key, on_error, problems, progress), trainer)
    found = tokenizer.get_vocab_size()
    if found < vocab_size:
        raise UserError(
            f"the text yields only {found} tokens, expected {vocab_size}; give more text or --vocab-size {found}"
        )
    with write_atomically(target) as folder:
        folder.mkdir()
        tokenizer.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": EOD,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if clone_language is not None:
            save_clone_language(folder, clone_language)
    return problems


def _texts(
    inputs: Sequence[str | Path], text_key: str, on_error: OnError, problems: Problems, progress: Progress
) -> Iterator[str]:
    for text, _ in read_documents(inputs, text_key, on_error, problems):
        progress.update()
        yield text
