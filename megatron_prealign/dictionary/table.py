"""The dictionary as token ids: the one file that alignment and code-switching share.

`table.safetensors` holds three lists: *keys* (token n-grams as they stand in a text, with their candidates),
*candidates* (token n-grams that may replace a key) and *words* (one spelling of every word of every group, for
alignment). Ranges and offsets are checked once, on loading, so that nothing that reads the table later has to.
"""

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.dictionary.ragged import row_indices
from megatron_prealign.errors import UserError
from megatron_prealign.files.atomic import write_atomically
from megatron_prealign.files.directories import writing

FORMAT_VERSION = "2"
MAX_KEY_TOKENS = 8
BOUNDARY_BEFORE, BOUNDARY_AFTER, HAS_LETTER = 1, 2, 4
# Bits of `key_form`. The case is 0 (as the dictionary writes the word), 1 (capitalised) or 2 (upper).
FORM_CASE, FORM_WORD_INITIAL = 3, 4

# Tensor -> dtype, in the order of the file. Everything is one-dimensional.
TENSORS: dict[str, type[np.generic]] = {
    "word_boundary": np.uint8,
    "key_tokens": np.int32,
    "key_offsets": np.int64,
    "key_language": np.int16,
    "key_group": np.int32,
    "key_form": np.uint8,
    "key_candidate_offsets": np.int64,
    "candidate_tokens": np.int32,
    "candidate_offsets": np.int64,
    "candidate_language": np.int16,
    "candidate_weight": np.float32,
    "word_tokens": np.int32,
    "word_offsets": np.int64,
    "word_language": np.int16,
    "word_text": np.uint8,
    "word_text_offsets": np.int64,
    "group_offsets": np.int64,
    "group_count": np.int64,
}
# Only in files that need it.
_WORD_WEIGHT = "word_weight"


@dataclass(frozen=True, eq=False)
class DictionaryTable:
    """K keys, C candidates, W words, G groups. Row i of a ragged list is `values[offsets[i]:offsets[i+1]]`.

    Attributes:
        languages: codes; the index is the language id.
        tokenizer_fingerprint: of the tokenizer that made the ids.
        vocab_size: ids are below it.
        word_boundary: `[vocab_size]`, bit 0 (1): a word boundary lies before this token, bit 1 (2): one lies after it,
            bit 2 (4): it contains a letter.
        key_tokens, key_offsets: ids of each key `[K+1]`, 1 to 8 each; only the first token starts a word.
        key_language: source language `[K]`; a key holds in rows of this language alone.
        key_group: group of each key `[K]`.
        key_form: how each key is written `[K]`: bits 0 and 1 its case (0 as the dictionary writes the word, 1
            capitalised, 2 upper), bit 2 (4) set where the word stands after a space, clear where it is bare.
        key_candidate_offsets: candidates of each key `[K+1]`, at least one, sorted by language.
        candidate_tokens, candidate_offsets: ids of each candidate `[C+1]`, written in the case of its key.
        candidate_language: target language `[C]`.
        candidate_weight: weight in the draw within a key and language `[C]`, above 0.
        word_tokens, word_offsets: ids of each word as it stands inside a sentence `[W+1]`.
        word_language: `[W]`.
        word_text, word_text_offsets: UTF-8 of each word `[W+1]`.
        group_offsets: words of each group `[G+1]`, the source word first.
        group_count: occurrences of the source word in the counting corpus `[G]`, 0 if there was none.
        sources: files the table was built from: `{"path", "format", "languages", "pairs", "title", "licence"}` each.
        word_weight: weight of each word as a translation, above 0; None where all are 1 `[W]`.
        build: `{"settings", "rules", "lines_skipped"}` of the build, empty for tables of before they were kept.
        path: where the table was loaded from or saved to.
    """

    languages: tuple[str, ...]
    tokenizer_fingerprint: str
    vocab_size: int
    word_boundary: NDArray[np.uint8]
    key_tokens: NDArray[np.int32]
    key_offsets: NDArray[np.int64]
    key_language: NDArray[np.int16]
    key_group: NDArray[np.int32]
    key_form: NDArray[np.uint8]
    key_candidate_offsets: NDArray[np.int64]
    candidate_tokens: NDArray[np.int32]
    candidate_offsets: NDArray[np.int64]
    candidate_language: NDArray[np.int16]
    candidate_weight: NDArray[np.float32]
    word_tokens: NDArray[np.int32]
    word_offsets: NDArray[np.int64]
    word_language: NDArray[np.int16]
    word_text: NDArray[np.uint8]
    word_text_offsets: NDArray[np.int64]
    group_offsets: NDArray[np.int64]
    group_count: NDArray[np.int64]
    sources: tuple[dict[str, Any], ...] = ()
    word_weight: NDArray[np.float32] | None = None
    build: dict[str, Any] = field(default_factory=dict)
    path: Path | None = field(default=None)

    @property
    def num_keys(self) -> int:
        return len(self.key_language)

    @property
    def num_candidates(self) -> int:
        return len(self.candidate_language)

    @property
    def num_words(self) -> int:
        return len(self.word_language)

    @property
    def num_groups(self) -> int:
        return len(self.group_count)

    def text(self, word: int) -> str:
        """The spelling of one word."""
        begin, end = self.word_text_offsets[word : word + 2]
        return self.word_text[begin:end].tobytes().decode("utf-8")

    def group_words(self, group: int) -> list[tuple[str, str]]:
        """`(language, word)` of a group, the source word first."""
        begin, end = (int(bound) for bound in self.group_offsets[group : group + 2])
        return [(self.languages[self.word_language[word]], self.text(word)) for word in range(begin, end)]

    def language_id(self, language: str) -> int | None:
        """Id of a language code; None where the table does not have it."""
        return self.languages.index(language) if language in self.languages else None

    def replaced_languages(self) -> list[str]:
        """Codes of the languages that have keys: words of no other are ever replaced."""
        return [self.languages[language] for language in np.unique(self.key_language)]

    def check_tokenizer(self, fingerprint: str, whose: str = "the tokenizer in use") -> None:
        """Checks that ids of this table mean the same as those of a tokenizer or dataset, called `whose` in the
        message.

        Raises:
            UserError: the fingerprints differ.
        """
        if fingerprint != self.tokenizer_fingerprint:
            raise UserError(
                f"{self.path or 'dictionary table'}: built with tokenizer {self.tokenizer_fingerprint}, but {whose} "
                f"has {fingerprint}; build the table with the same tokenizer (megatron-prealign dictionary build)"
            )

    def held_out_groups(self, fraction: float) -> NDArray[np.bool_]:
        """Groups kept away from training, bool `[G]`, about `fraction` of them.

        It depends on the source word's text alone (case ignored, so that `Polish` goes with `polish`): rebuilding the
        table, adding languages or changing the training seed moves no word from one side to the other, and a larger
        fraction only adds to a smaller one.
        """
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"fraction is {fraction}, expected 0 to 1")
        limit = int(fraction * 2**64)
        held_out = np.zeros(self.num_groups, dtype=bool)
        if not limit:
            return held_out
        data, source = self.word_text.tobytes(), self.group_offsets[:-1]
        begins, ends = self.word_text_offsets[source].tolist(), self.word_text_offsets[source + 1].tolist()
        for group, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            word = data[begin:end].decode().casefold()
            digest = hashlib.blake2b(word.encode(), digest_size=8, person=b"heldout").digest()
            held_out[group] = int.from_bytes(digest, "big") < limit
        return held_out

    def without_groups(self, dropped: NDArray[np.bool_]) -> "DictionaryTable":
        """The table without the keys and candidates of the `dropped` groups (bool `[G]`); words and groups stay."""
        if dropped.dtype != bool or dropped.shape != (self.num_groups,):
            raise ValueError(f"mask is {dropped.dtype} {dropped.shape}, expected bool ({self.num_groups},)")
        return self.with_keys(np.flatnonzero(~dropped[self.key_group])) if dropped.any() else self

    def switching_digest(self) -> str:
        """A hash of everything that decides which words are replaced and by what: boundaries, keys and candidates."""
        digest = hashlib.blake2b("\0".join(self.languages).encode(), digest_size=16, person=b"switching")
        for name in TENSORS:
            # The number of a key's group says nothing: groups may have been sorted anew.
            if name == "word_boundary" or (name.startswith(("key_", "candidate_")) and name != "key_group"):
                values = np.ascontiguousarray(getattr(self, name))
                digest.update(f"\0{name} {len(values)}\0".encode())
                digest.update(values.view(np.uint8).data)
        return f"blake2b:{digest.hexdigest()}"

    def with_keys(self, keys: NDArray[Any], candidates_of: NDArray[Any] | None = None) -> "DictionaryTable":
        """The table with the chosen keys and their candidates alone; words and groups stay.

        Args:
            keys: integers `[R]`, the keys to keep in that order.
            candidates_of: integers `[R]`, the keys whose candidates these get; their own by default.
        """
        tokens, key_offsets = row_indices(self.key_offsets, keys)
        candidates, key_candidate_offsets = row_indices(
            self.key_candidate_offsets, keys if candidates_of is None else candidates_of
        )
        candidate_tokens, candidate_offsets = row_indices(self.candidate_offsets, candidates)
        return replace(
            self,
            key_tokens=self.key_tokens[tokens],
            key_offsets=key_offsets,
            key_language=self.key_language[keys],
            key_group=self.key_group[keys],
            key_form=self.key_form[keys],
            key_candidate_offsets=key_candidate_offsets,
            candidate_tokens=self.candidate_tokens[candidate_tokens],
            candidate_offsets=candidate_offsets,
            candidate_language=self.candidate_language[candidates],
            candidate_weight=self.candidate_weight[candidates],
        )

    def save(self, path: str | Path) -> None:
        """Writes the table in one step: a reader sees the old file or the whole new one.

        Raises:
            UserError: the directory cannot be written or its disk is full.
        """
        from safetensors.numpy import save_file

        path = Path(path)
        metadata = {
            "format_version": FORMAT_VERSION,
            "languages": json.dumps(self.languages, ensure_ascii=False),
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
            "vocab_size": str(self.vocab_size),
            "sources": json.dumps(self.sources, ensure_ascii=False),
            "build": json.dumps(self.build, ensure_ascii=False),
        }
        tensors = {name: np.ascontiguousarray(getattr(self, name)) for name in TENSORS}
        if self.word_weight is not None:
            tensors[_WORD_WEIGHT] = np.ascontiguousarray(self.word_weight)
        with writing(path, "dictionary table"), write_atomically(path) as temporary:
            # safetensors makes files that only their owner can read, whatever the umask says.
            temporary.touch()
            mode = temporary.stat().st_mode
            save_file(tensors, temporary, metadata)
            _sort_metadata(temporary)
            temporary.chmod(mode)


def _sort_metadata(path: Path) -> None:
    """Sorts the texts in the header: safetensors writes them in another order every time, and the same lists should
    make the same file."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        data = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        # The tensors begin where they are: a header that became longer would have to stay as it was.
        if len(data) <= size:
            file.seek(8)
            file.write(data.ljust(size))


def load_table(path: str | Path) -> DictionaryTable:
    """Loads and checks a table.

    Raises:
        UserError: the file is missing, cut off, of another kind or version, or its contents do not fit together.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such dictionary table; build it with megatron-prealign dictionary build")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            version = metadata.get("format_version")
            missing = [name for name in TENSORS if name not in file.keys()]  # noqa: SIM118 (safe_open is no mapping)
            if version != FORMAT_VERSION or missing:
                raise _corrupt(path, f"format_version is {version}, missing tensors are {missing or 'none'}")
            tensors = {name: file.get_tensor(name) for name in TENSORS}
            if _WORD_WEIGHT in file.keys():  # noqa: SIM118
                tensors[_WORD_WEIGHT] = file.get_tensor(_WORD_WEIGHT)
        table = DictionaryTable(
            languages=tuple(_list_of(str, metadata, "languages")),
            tokenizer_fingerprint=metadata["tokenizer_fingerprint"],
            vocab_size=int(metadata["vocab_size"]),
            sources=_sources_of(metadata),
            build=_build_of(metadata),
            path=path,
            **tensors,
        )
    except (SafetensorError, KeyError, ValueError, TypeError, OSError, RecursionError) as error:
        raise _corrupt(path, str(error) or type(error).__name__) from error
    problem = find_problem(table)
    if problem:
        raise _corrupt(path, problem)
    return table


def _list_of(kind: type, metadata: dict[str, str], key: str) -> list[Any]:
    values = json.loads(metadata[key])
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"{key} is {metadata[key][:60]!r}, expected a list")
    return values


def _sources_of(metadata: dict[str, str]) -> tuple[dict[str, Any], ...]:
    sources = _list_of(dict, metadata, "sources")
    if not all(isinstance(source.get("pairs", 0), int) for source in sources):
        raise ValueError("sources has a number of pairs that is none")
    return tuple(sources)


def _build_of(metadata: dict[str, str]) -> dict[str, Any]:
    """The record of the build, as reports show it: settings and counts by name."""
    build = json.loads(metadata.get("build", "{}"))
    if not isinstance(build, dict) or not all(isinstance(build.get(key, {}), dict) for key in ("settings", "rules")):
        raise ValueError(f"build is {metadata['build'][:60]!r}, expected an object of settings and rules")
    counts = [build.get("lines_skipped", 0), *build.get("rules", {}).values()]
    if not all(isinstance(count, int) for count in counts):
        raise ValueError("build has a count that is no number")
    return build


def _corrupt(path: Path, what: str) -> UserError:
    return UserError(
        f"{path}: not a whole dictionary table of format {FORMAT_VERSION}: {' '.join(what.split())}; "
        "build it again with megatron-prealign dictionary build"
    )


def find_problem(table: DictionaryTable) -> str | None:
    """The first thing in `table` that does not fit together, in words; None when all is well."""
    for name, dtype in TENSORS.items():
        values = getattr(table, name)
        if values.dtype != dtype or values.ndim != 1:
            return f"{name} is {values.dtype} {values.shape}, expected {np.dtype(dtype)} in one dimension"
    checks = (_languages_problem, _weight_problem, _shape_problem, _offsets_problem, _range_problem, _text_problem)
    # Each relies on those before it.
    return next((problem for check in checks if (problem := check(table))), None)


def _languages_problem(table: DictionaryTable) -> str | None:
    return None if len(set(table.languages)) == len(table.languages) else "languages has one code twice"


def _text_problem(table: DictionaryTable) -> str | None:
    try:
        table.word_text.tobytes().decode()
    except UnicodeDecodeError as error:
        return f"word_text is not valid UTF-8 ({error})"
    begins = table.word_text_offsets[:-1]
    # The bytes of one character never belong to two words.
    inside = table.word_text[begins[begins < len(table.word_text)]] & 0xC0 == 0x80
    return "word_text_offsets cuts through a character" if inside.any() else None


def _weight_problem(table: DictionaryTable) -> str | None:
    weights = table.word_weight
    if weights is None:
        return None
    if weights.dtype != np.float32 or weights.shape != (table.num_words,):
        return f"word_weight is {weights.dtype} {weights.shape}, expected float32 ({table.num_words},)"
    return None if (np.isfinite(weights) & (weights > 0)).all() else "word_weight has a value that is not above 0"


def _shape_problem(table: DictionaryTable) -> str | None:
    keys, candidates, words, groups = table.num_keys, table.num_candidates, table.num_words, table.num_groups
    expected = {
        "word_boundary": table.vocab_size,
        "key_offsets": keys + 1,
        "key_group": keys,
        "key_form": keys,
        "key_candidate_offsets": keys + 1,
        "candidate_offsets": candidates + 1,
        "candidate_weight": candidates,
        "word_offsets": words + 1,
        "word_text_offsets": words + 1,
        "group_offsets": groups + 1,
    }
    for name, length in expected.items():
        if len(getattr(table, name)) != length:
            return f"{name} has {len(getattr(table, name))} elements, expected {length}"
    return None


def _offsets_problem(table: DictionaryTable) -> str | None:
    # Offsets -> number of elements they divide, fewest and most elements of a row.
    rules: dict[str, tuple[int, int, int | None]] = {
        "key_offsets": (len(table.key_tokens), 1, MAX_KEY_TOKENS),
        "key_candidate_offsets": (table.num_candidates, 1, None),
        "candidate_offsets": (len(table.candidate_tokens), 1, None),
        "word_offsets": (len(table.word_tokens), 1, None),
        "word_text_offsets": (len(table.word_text), 1, None),
        "group_offsets": (table.num_words, 2, None),
    }
    for name, (total, fewest, most) in rules.items():
        offsets = getattr(table, name)
        lengths = np.diff(offsets)
        if offsets[0] != 0 or offsets[-1] != total or (lengths < fewest).any():
            return f"{name} does not rise from 0 to {total} in steps of at least {fewest}"
        if most is not None and (lengths > most).any():
            return f"{name} has a row of {lengths.max()} elements, expected at most {most}"
    return None


def _range_problem(table: DictionaryTable) -> str | None:
    ranges = {
        "key_tokens": table.vocab_size,
        "candidate_tokens": table.vocab_size,
        "word_tokens": table.vocab_size,
        "key_language": len(table.languages),
        "candidate_language": len(table.languages),
        "word_language": len(table.languages),
        "key_group": table.num_groups,
    }
    for name, limit in ranges.items():
        values = getattr(table, name)
        if len(values) and (values.min() < 0 or values.max() >= limit):
            return f"{name} has values from {values.min()} to {values.max()}, expected 0 to {limit - 1}"
    if len(table.group_count) and table.group_count.min() < 0:
        return f"group_count has the value {table.group_count.min()}, expected 0 or more"
    if (table.key_form > (FORM_CASE | FORM_WORD_INITIAL)).any() or (table.key_form & FORM_CASE == FORM_CASE).any():
        return "key_form has a value that names no case, expected 0, 1, 2, 4, 5 or 6"
    weights = table.candidate_weight
    if not (np.isfinite(weights).all() and (weights > 0).all()):
        return "candidate_weight has a value that is not above 0"
    falls = np.diff(table.candidate_language.astype(np.int32)) < 0
    falls[table.key_candidate_offsets[1:-1] - 1] = False
    if falls.any():
        return f"candidate_language is not sorted within a key, at candidate {int(np.argmax(falls)) + 1}"
    return _key_problem(table)


def _key_problem(table: DictionaryTable) -> str | None:
    """A key that spans a word boundary could never be found in a text, or would be found across two words."""
    before, after = table.word_boundary & BOUNDARY_BEFORE, table.word_boundary & BOUNDARY_AFTER
    inner = np.ones(len(table.key_tokens), dtype=bool)
    inner[table.key_offsets[:-1]] = False
    index = np.flatnonzero(inner)
    broken = (before[table.key_tokens[index]] | after[table.key_tokens[index - 1]]) != 0
    if broken.any():
        return f"a word starts inside a key, at key token {int(index[np.argmax(broken)])}"
    return None
