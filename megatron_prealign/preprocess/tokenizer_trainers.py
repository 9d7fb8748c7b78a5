"""The two libraries that learn a vocabulary: tokenizers (byte-level BPE) and sentencepiece (unigram and BPE)."""

import io
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_prealign.errors import UserError
from megatron_prealign.tokenizer.segmenters import Segmenter, checked_word_starts
from megatron_prealign.tokenizer.word_boundaries import is_letter

if TYPE_CHECKING:
    import tokenizers

EOD = "<eod>"
WORD_BREAK = "\ufdd0"
"""Stands where no token may reach across while a vocabulary is learnt. Unicode reserves it for use inside a program, so
that no text has it."""
# Characters of a line at most; sentencepiece takes each of them for a sentence.
_LINE_CHARACTERS = 4096


def separate_words(text: str, segmenter: Segmenter, name: str, where: str) -> str:
    """`text` with `WORD_BREAK` at the start of every word that directly follows a letter.

    Elsewhere spaces, digits and signs keep words apart as they do in every language.

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
    """A byte-level BPE tokenizer with `EOD` as id 0 and the 256 bytes behind it.

    Memory: the different words between white space, with how often each came.

    Args:
        texts: the text, with `WORD_BREAK` where no token may reach across.
        vocab_size: tokens in all.

    Raises:
        UserError: the text is too little for so many tokens.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    # Only while it learns: the ids of a text must not depend on who looks for words in it.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(WORD_BREAK, "removed"), byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD],
        # All bytes, also those that this text lacks; sorted, as the library lists them in another order every run.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    found = tokenizer.get_vocab_size()
    if found < vocab_size:
        raise too_little_text(found, vocab_size)
    return tokenizer


def train_sentencepiece(texts: Iterator[str], vocab_size: int, model_type: str, character_coverage: float) -> bytes:
    """A sentencepiece model with `EOD` as id 0, the unknown token as id 1 and the 256 bytes behind them.

    Text stays as it is (no normalisation, all white space kept); a character that the vocabulary lacks becomes its
    UTF-8 bytes. Memory: all the text and, for `unigram`, about 17 bytes for each of its bytes.

    Args:
        texts: the text, with `WORD_BREAK` where no token may reach across.
        vocab_size: tokens in all.
        model_type: `unigram` or `bpe`.
        character_coverage: share of the running characters, the most frequent first, that get tokens of their own.

    Returns:
        The contents of a `.model` file.

    Raises:
        UserError: the text does not fit to so many tokens.
    """
    import sentencepiece

    model = io.BytesIO()
    lines = _Lines(texts)
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
            # The lines have it where it belongs.
            add_dummy_prefix=False,
            # Another number of threads adds up in another order: other pieces.
            num_threads=1,
            shuffle_input_sentence=False,
            # Nothing is too long for it here; it would pass longer lines over without a word.
            max_sentence_length=1 << 30,
            minloglevel=2,
        )
    except RuntimeError as error:
        if lines.failure is None:
            raise _refused(str(error), vocab_size) from error
    if lines.failure is not None:
        raise lines.failure
    return _with_first_space(model.getvalue())


class _Lines:
    """The lines of texts, as an iterator that ends where reading fails: an exception would not come out of the C++
    code."""

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
    """Lines, each with the space in front that marks its first word; where no token may reach across a line ends, too,
    but the next one has no space."""
    for text in texts:
        # The library ends text at a zero.
        for line in text.replace("\0", "\n").split("\n"):
            if line and not line.isspace():
                for part in _cut_at_spaces(f" {line}"):
                    yield from filter(None, part.split(WORD_BREAK))


def _cut_at_spaces(line: str) -> Iterator[str]:
    """Parts of at most `_LINE_CHARACTERS`, where possible cut in front of a space."""
    begin = 0
    while len(line) - begin > _LINE_CHARACTERS:
        space = line.rfind(" ", begin + 1, begin + _LINE_CHARACTERS)
        end = space if space > 0 else begin + _LINE_CHARACTERS
        yield line[begin:end]
        begin = end
    yield line[begin:]


def _with_first_space(model: bytes) -> bytes:
    """The same model, but it puts a space in front of every text, as its training lines had one."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    proto.normalizer_spec.add_dummy_prefix = True
    return proto.SerializeToString(deterministic=True)


def _refused(reason: str, vocab_size: int) -> UserError:
    """sentencepiece's own words of why it does not train, as a line for the user."""
    found = re.search(r"set it to a value <= (\d+)", reason)
    if found:
        return too_little_text(int(found[1]), vocab_size)
    found = re.search(r"smaller than required_chars.*?vs (\d+)", reason)
    if found:
        return UserError(
            f"vocab_size is {vocab_size}, but the characters of the text alone are {found[1]} tokens; "
            "give a larger --vocab-size or a smaller --character-coverage"
        )
    return UserError(f"sentencepiece cannot train on this text ({' '.join(reason.split())}); give more or other text")


def too_little_text(found: int, vocab_size: int) -> UserError:
    return UserError(
        f"the text yields only {found} tokens, expected {vocab_size}; give more text or --vocab-size {found}"
    )
