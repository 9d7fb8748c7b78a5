"""Reports the dictionary words that are too long for the alignment phase."""

import logging
from pathlib import Path

from megatron_prealign.alignment.words import WordSampler
from megatron_prealign.files.atomic import write_atomically

logger = logging.getLogger(__name__)

FILE = "alignment_dropped_words.tsv"
_MAX_EXAMPLES = 5


def report_dropped_words(sampler: WordSampler, max_word_tokens: int, directory: Path) -> None:
    """Logs how many words are skipped and lists all of them in a file in `directory`: language, word, tokens."""
    table, words = sampler.table, sampler.usable.too_long
    if not len(words):
        # A list from before the limit was raised.
        (directory / FILE).unlink(missing_ok=True)
        return
    text = table.word_text.tobytes()
    ends = table.word_text_offsets
    spelled = [text[ends[word] : ends[word + 1]].decode() for word in words]
    with write_atomically(directory / FILE) as path, path.open("w", encoding="utf-8") as file:
        for word, spelling in zip(words, spelled, strict=True):
            tokens = table.word_offsets[word + 1] - table.word_offsets[word]
            file.write(f"{table.languages[table.word_language[word]]}\t{spelling}\t{tokens}\n")
    distinct = [*dict.fromkeys(spelled)]
    examples = ", ".join(map(repr, distinct[:_MAX_EXAMPLES])) + (", ..." if len(distinct) > _MAX_EXAMPLES else "")
    logger.warning(
        "alignment skips %s words longer than alignment.max_word_tokens = %d tokens (%s); full list in %s",
        f"{len(words):,}",
        max_word_tokens,
        examples,
        directory / FILE,
    )
