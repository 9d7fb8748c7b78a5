"""Words that are too long for the alignment phase are counted, logged and listed."""

from dataclasses import replace
from typing import Any

from support.messages import assert_facts
from support.word_draws import MAX_TOKENS, USUAL, Setting, groups, pairs_of_words, sampler_of
from support.workers import WorkerPool


def reported(setting: Setting, directory: str) -> tuple[list[str], list[str], list[str]]:
    """Runs in a worker: log messages about dropped words, files, and lines of the list."""
    import logging
    from pathlib import Path

    from megatron_prealign.alignment.dropped_words import FILE, report_dropped_words

    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron_prealign.alignment.dropped_words")
    logger.addHandler(handler)
    try:
        report_dropped_words(sampler_of(setting), MAX_TOKENS, Path(directory))
    finally:
        logger.removeHandler(handler)
    files = sorted(path.name for path in Path(directory).iterdir())
    return messages, files, (Path(directory) / FILE).read_text(encoding="utf-8").splitlines() if files else []


def test_words_that_are_too_long_are_counted_and_listed(workers: WorkerPool, tmp_path: Any) -> None:
    """Words of held-out groups are not, since they are not used anyway."""
    made = [*groups(), [("en", [250] * 5), ("de", [251] * 7), ("zh", [252])]]
    setting = replace(USUAL, groups=made, held_out=frozenset([21]))
    messages, files, lines = workers.run(1, reported, setting, str(tmp_path))[0]
    # Words are numbered consecutively in the table: one of group 5, one of group 22, two of the added group.
    numbers = [
        number
        for number, (group, word) in enumerate((g, word) for g, words in enumerate(made) for _, word in words)
        if len(word) > MAX_TOKENS and group != 21
    ]
    assert len(numbers) == 4
    spelled = [f"word{number}" for number in numbers]
    assert files == ["alignment_dropped_words.tsv"]
    languages_and_tokens = [("de", 4), ("de", 4), ("en", 5), ("de", 7)]
    assert lines == [
        f"{code}\t{word}\t{tokens}" for word, (code, tokens) in zip(spelled, languages_and_tokens, strict=True)
    ]
    (message,) = messages
    file = tmp_path / "alignment_dropped_words.tsv"
    assert_facts(
        message,
        "4 words",
        "alignment.max_word_tokens",
        f"{MAX_TOKENS} tokens",
        f"({', '.join(map(repr, spelled))})",
        file,
    )


def test_only_some_of_many_dropped_words_are_logged(workers: WorkerPool, tmp_path: Any) -> None:
    made = [*pairs_of_words(3), *[[("en", [9] * 4), ("de", [8] * 4)] for _ in range(600)]]
    setting = Setting(made).section_with(words_per_step=2)
    messages, _, lines = workers.run(1, reported, setting, str(tmp_path))[0]
    assert len(lines) == 1200
    assert_facts(messages[0], "1,200 words", "('word6', 'word7', 'word8', 'word9', 'word10', ...)")


def test_without_dropped_words_nothing_is_reported(workers: WorkerPool, tmp_path: Any) -> None:
    setting = Setting(pairs_of_words(3)).section_with(words_per_step=2)
    assert workers.run(1, reported, setting, str(tmp_path))[0] == ([], [], [])
