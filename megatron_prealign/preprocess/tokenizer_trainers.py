"""Trains vocabularies with tokenizers (byte-level BPE) or sentencepiece (unigram and BPE)."""

import io
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_prealign import interrupts
from megatron_prealign.errors import UserError
from megatron_prealign.text import plural
from megatron_prealign.tokenizer.segmenters import Segmenter, checked_word_starts
from megatron_prealign.tokenizer.word_boundaries import is_letter

if TYPE_CHECKING:
    import tokenizers

EOD = "<eod>"
WORD_BREAK = "\ufdd0"
"""Marks word boundaries that no token may cross during training. A Unicode noncharacter, reserved for internal use, so
that it does not occur in text."""
# Maximum characters per line; sentencepiece treats each line as a sentence.
_LINE_CHARACTERS = 4096


def insert_word_breaks(text: str, segmenter: Segmenter, name: str, where: str) -> str:
    """Inserts `WORD_BREAK` at the start of every word that directly follows a letter.

    Elsewhere spaces, digits and punctuation already separate words.

    Raises:
        UserError: the segmenter failed.
    """
    text = text.replace(WORD_BREAK, "")
    parts, begin = [], 0
    for start in checked_word_starts(segmenter, name, text, where).tolist():
        if 0 < start < len(text) and is_letter(text[start]) and is_letter(text[start - 1]):
            parts.append(text[begin:start])
            begin = start
    return WORD_BREAK.join([*parts, text[begin:]])


def train_byte_bpe(texts: Iterator[str], vocab_size: int) -> "tokenizers.Tokenizer":
    """Trains a byte-level BPE tokenizer with `EOD` as id 0, followed by the 256 bytes.

    Memory: the distinct white-space-separated words with their counts.

    Args:
        texts: training text, with `WORD_BREAK` where no token may cross.
        vocab_size: total number of tokens.

    Raises:
        UserError: the text yields fewer than `vocab_size` tokens.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    # Only during training: ids must not depend on a segmenter.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(WORD_BREAK, "removed"), byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD],
        # All bytes, including those not in the text; sorted, because the library returns them in random order.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    interrupts.run_native(lambda items: tokenizer.train_from_iterator(items, trainer), texts)
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    actual = tokenizer.get_vocab_size()
    if actual < vocab_size:
        raise _too_little_text(actual, vocab_size)
    return tokenizer


def train_sentencepiece(texts: Iterator[str], vocab_size: int, model_type: str, character_coverage: float) -> bytes:
    """Trains a sentencepiece model with `EOD` as id 0, the unknown token as id 1, followed by the 256 bytes.

    Text is not normalised and all white space is kept; characters outside the vocabulary are encoded as UTF-8 bytes.
    Memory: all the text and, for `unigram`, about 17 bytes per byte of text.

    Args:
        texts: training text, with `WORD_BREAK` where no token may cross.
        vocab_size: total number of tokens.
        model_type: `unigram` or `bpe`.
        character_coverage: fraction of character occurrences, most frequent characters first, that get their own
            tokens.

    Returns:
        The contents of a `.model` file.

    Raises:
        UserError: the text is unsuitable for `vocab_size` tokens.
    """
    import sentencepiece

    def train(items: Iterator[str]) -> bytes:
        model, lines = io.BytesIO(), _Lines(items)
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=lines,
                model_writer=model,
                model_type=model_type,
                vocab_size=vocab_size,
                character_coverage=character_coverage,
                byte_fallback=True,
                eos_id=0,
                eos_piece=EOD,
                unk_id=1,
                bos_id=-1,
                pad_id=-1,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                split_digits=True,
                # `_lines` adds the space where it belongs.
                add_dummy_prefix=False,
                # The order of floating-point sums depends on the number of threads, and so do the pieces.
                num_threads=1,
                shuffle_input_sentence=False,
                # The library silently skips longer lines.
                max_sentence_length=1 << 30,
                minloglevel=2,
            )
        except RuntimeError as error:
            if lines.failure is None:
                raise _training_error(str(error), vocab_size) from error
        if lines.failure is not None:
            raise lines.failure
        return model.getvalue()

    return _with_first_space(interrupts.run_native(train, texts))


class _Lines:
    """Iterator over the lines of texts that stops when reading fails and stores the error: exceptions do not propagate
    through the C++ code."""

    def __init__(self, texts: Iterator[str]) -> None:
        self.failure: BaseException | None = None
        self._lines = _lines(texts)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            return next(self._lines)
        except StopIteration:
            raise
        except BaseException as error:
            self.failure = error
            raise StopIteration from None


def _lines(texts: Iterator[str]) -> Iterator[str]:
    """Yields lines, each with a leading space that marks its first word. A `WORD_BREAK` also ends a line, but the next
    line then has no leading space."""
    for text in texts:
        # The library stops at a zero byte.
        for line in text.replace("\0", "\n").split("\n"):
            if line and not line.isspace():
                for part in _split_at_spaces(f" {line}"):
                    yield from filter(None, part.split(WORD_BREAK))


def _split_at_spaces(line: str) -> Iterator[str]:
    """Yields parts of at most `_LINE_CHARACTERS`, split before a space if possible."""
    begin = 0
    while len(line) - begin > _LINE_CHARACTERS:
        space = line.rfind(" ", begin + 1, begin + _LINE_CHARACTERS)
        end = space if space > 0 else begin + _LINE_CHARACTERS
        yield line[begin:end]
        begin = end
    yield line[begin:]


def _with_first_space(model: bytes) -> bytes:
    """Returns the model with `add_dummy_prefix` set: it prepends a space to every text, like the training lines."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    proto.normalizer_spec.add_dummy_prefix = True
    return proto.SerializeToString(deterministic=True)


def _training_error(reason: str, vocab_size: int) -> UserError:
    """Converts an error message of sentencepiece to a user error."""
    match = re.search(r"set it to a value <= (\d+)", reason)
    if match:
        return _too_little_text(int(match[1]), vocab_size)
    match = re.search(r"smaller than required_chars.*?vs (\d+)", reason)
    if match:
        return UserError(
            f"--vocab-size is {vocab_size}, but the characters of the text require {match[1]} tokens; increase "
            "--vocab-size or lower --character-coverage"
        )
    return UserError(f"cannot train sentencepiece: {' '.join(reason.split())}; use more or different text")


def _too_little_text(actual: int, vocab_size: int) -> UserError:
    return UserError(
        f"the text yields only {plural(actual, 'token')}, expected {vocab_size}; add text or use --vocab-size {actual}"
    )
