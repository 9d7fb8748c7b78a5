"""The dictionary as token ids: one file for both alignment and code-switching.

`table.safetensors` has three lists: *keys* (token n-grams as they occur in a text, with their candidates),
*candidates* (token n-grams that can replace a key) and *words* (one spelling of every word of every group, for
alignment). Ranges and offsets are checked once on loading, so users of the table need not check them.
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

# Tensor -> dtype, in file order. All tensors are one-dimensional.
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
# Optional tensor.
_WORD_WEIGHT = "word_weight"


@dataclass(frozen=True, eq=False)
class DictionaryTable:
    """K keys, C candidates, W words, G groups. Row i of a ragged list is `values[offsets[i]:offsets[i+1]]`.

    Attributes:
        languages: codes; the index is the language id.
        tokenizer_fingerprint: fingerprint of the tokenizer that produced the ids.
        vocab_size: upper bound (exclusive) of the ids.
        word_boundary: `[vocab_size]`, bit 0 (1): there is a word boundary before this token, bit 1 (2): there is one
            after it, bit 2 (4): the token contains a letter.
        key_tokens, key_offsets: ids of each key `[K+1]`, 1 to 8 each; only the first token starts a word.
        key_language: source language `[K]`; a key matches only in sequences of this language.
        key_group: group of each key `[K]`.
        key_form: spelling of each key `[K]`: bits 0 and 1 are the case (0 as in the dictionary, 1 capitalised, 2
            upper), bit 2 (4) is set if the word follows a space.
        key_candidate_offsets: candidates of each key `[K+1]`, at least one, sorted by language.
        candidate_tokens, candidate_offsets: ids of each candidate `[C+1]`, in the case of its key.
        candidate_language: target language `[C]`.
        candidate_weight: sampling weight within a key and language `[C]`, above 0.
        word_tokens, word_offsets: ids of each word as spelled inside a sentence `[W+1]`.
        word_language: language of each word `[W]`.
        word_text, word_text_offsets: UTF-8 of each word `[W+1]`.
        group_offsets: words of each group `[G+1]`, the source word first.
        group_count: occurrences of the source word in the counting corpus `[G]`, 0 without a corpus.
        sources: files the table was built from: `{"path", "format", "languages", "pairs", "title", "licence"}` each.
        word_weight: weight of each word as a translation `[W]`, above 0; None if all are 1.
        build: `{"settings", "rules", "lines_skipped", "shuffled"}` of the build, empty for tables without this record.
        path: path the table was loaded from.
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

    @property
    def shuffled(self) -> dict[str, Any] | None:
        """Record of a table made by `shuffle_table`: `{"seed", "original", "kept", "held_out_fraction"}`; None for a
        table of true pairs. A table with noise has its `share` too; older tables have no `held_out_fraction`."""
        return self.build.get("shuffled")

    @property
    def is_control(self) -> bool:
        """Whether the translations of all groups are shuffled."""
        return self.shuffled is not None and "share" not in self.shuffled

    def text(self, word: int) -> str:
        """Returns the text of one word."""
        begin, end = self.word_text_offsets[word : word + 2]
        return self.word_text[begin:end].tobytes().decode("utf-8")

    def group_words(self, group: int) -> list[tuple[str, str]]:
        """Returns the `(language, word)` pairs of a group, the source word first."""
        begin, end = (int(bound) for bound in self.group_offsets[group : group + 2])
        return [(self.languages[self.word_language[word]], self.text(word)) for word in range(begin, end)]

    def language_id(self, language: str) -> int | None:
        """Returns the id of a language code; None if the table does not have the language."""
        return self.languages.index(language) if language in self.languages else None

    def replaced_languages(self) -> list[str]:
        """Returns the codes of the languages with keys; only words of these are replaced."""
        return [self.languages[language] for language in np.unique(self.key_language)]

    def check_tokenizer(self, fingerprint: str, owner: str = "the tokenizer in use") -> None:
        """Checks that the table was built with the tokenizer of `owner`, a tokenizer or dataset named in the message.

        Raises:
            UserError: the fingerprints differ.
        """
        if fingerprint != self.tokenizer_fingerprint:
            raise UserError(
                f"{self.path or 'dictionary table'}: got tokenizer fingerprint {self.tokenizer_fingerprint}, expected "
                f"{fingerprint} of {owner}; rebuild the table with this tokenizer (megatron-prealign dictionary build)"
            )

    def held_out_groups(self, fraction: float) -> NDArray[np.bool_]:
        """Returns the mask of groups held out from training, bool `[G]`, about `fraction` of them.

        The choice depends only on the case-folded text of the source word (`Polish` and `polish` go together).
        Rebuilding the table, adding languages or changing the training seed does not change it, and a larger fraction
        is a superset of a smaller one.
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
        """Drops the keys and candidates of the `dropped` groups (bool `[G]`); words and groups are unchanged."""
        if dropped.dtype != bool or dropped.shape != (self.num_groups,):
            raise ValueError(f"got mask {dropped.dtype} {dropped.shape}, expected bool ({self.num_groups},)")
        return self.with_keys(np.flatnonzero(~dropped[self.key_group])) if dropped.any() else self

    def switching_fingerprint(self) -> str:
        """Returns a hash of everything that determines code-switching: word boundaries, keys and candidates."""
        hasher = hashlib.blake2b("\0".join(self.languages).encode(), digest_size=16, person=b"switching")
        for name in TENSORS:
            # Group numbers are excluded: they do not affect switching and may be reordered.
            if name == "word_boundary" or (name.startswith(("key_", "candidate_")) and name != "key_group"):
                values = np.ascontiguousarray(getattr(self, name))
                hasher.update(f"\0{name} {len(values)}\0".encode())
                hasher.update(values.view(np.uint8).data)
        return f"blake2b:{hasher.hexdigest()}"

    def with_keys(self, keys: NDArray[Any], candidates_of: NDArray[Any] | None = None) -> "DictionaryTable":
        """Returns the table with only the chosen keys and their candidates; words and groups are unchanged.

        Args:
            keys: integers `[R]`, the keys to keep, in that order.
            candidates_of: integers `[R]`, the keys whose candidates they get; default their own.
        """
        tokens, key_offsets = row_indices(self.key_offsets, keys)
        candidates, key_candidate_offsets = row_indices(
            self.key_candidate_offsets, keys if candidates_of is None else candidates_of
        )
        return replace(
            self.with_candidates(candidates, key_candidate_offsets),
            key_tokens=self.key_tokens[tokens],
            key_offsets=key_offsets,
            key_language=self.key_language[keys],
            key_group=self.key_group[keys],
            key_form=self.key_form[keys],
        )

    def with_candidates(self, candidates: NDArray[Any], key_candidate_offsets: NDArray[np.int64]) -> "DictionaryTable":
        """Returns the table with these candidates, in this order.

        Args:
            candidates: integers `[N]`, candidates of this table; one may be given to several keys.
            key_candidate_offsets: `[K+1]`, the part of `candidates` that each key gets.
        """
        tokens, candidate_offsets = row_indices(self.candidate_offsets, candidates)
        return replace(
            self,
            key_candidate_offsets=key_candidate_offsets,
            candidate_tokens=self.candidate_tokens[tokens],
            candidate_offsets=candidate_offsets,
            candidate_language=self.candidate_language[candidates],
            candidate_weight=self.candidate_weight[candidates],
        )

    def save(self, path: str | Path) -> None:
        """Writes the table atomically: readers see the old or the complete new file.

        Raises:
            UserError: the directory is not writable or the disk is full.
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
            # safetensors creates files that only their owner can read, regardless of the umask.
            temporary.touch()
            mode = temporary.stat().st_mode
            save_file(tensors, temporary, metadata)
            _sort_metadata(temporary)
            temporary.chmod(mode)


def _sort_metadata(path: Path) -> None:
    """Sorts the metadata in the header: safetensors writes it in random order, but the same lists should produce the
    same file."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        data = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        # The tensors cannot move, so a longer header is not written.
        if len(data) <= size:
            file.seek(8)
            file.write(data.ljust(size))


def load_table(path: str | Path) -> DictionaryTable:
    """Loads and checks a table.

    Raises:
        UserError: the file is missing, truncated, of another kind or version, or its contents are inconsistent.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise UserError(f"dictionary table {path} does not exist; build it with megatron-prealign dictionary build")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            version = metadata.get("format_version")
            missing = [name for name in TENSORS if name not in file.keys()]  # noqa: SIM118 (not a mapping)
            if version != FORMAT_VERSION or missing:
                raise _invalid(path, f"format_version is {version}, missing tensors: {missing or 'none'}")
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
        raise _invalid(path, str(error) or type(error).__name__) from error
    problem = find_problem(table)
    if problem:
        raise _invalid(path, problem)
    return table


def _list_of(kind: type, metadata: dict[str, str], key: str) -> list[Any]:
    values = json.loads(metadata[key])
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"{key} is {metadata[key][:60]!r}, expected a list of {kind.__name__}")
    return values


def _sources_of(metadata: dict[str, str]) -> tuple[dict[str, Any], ...]:
    sources = _list_of(dict, metadata, "sources")
    if not all(isinstance(source.get("pairs", 0), int) for source in sources):
        raise ValueError('"pairs" in sources must be an integer')
    return tuple(sources)


def _build_of(metadata: dict[str, str]) -> dict[str, Any]:
    """Parses the build record: settings and counts by name."""
    build = json.loads(metadata.get("build", "{}"))
    if not isinstance(build, dict) or not all(isinstance(build.get(key, {}), dict) for key in ("settings", "rules")):
        raise ValueError(f"build is {metadata['build'][:60]!r}, expected an object with settings and rules")
    shuffled = build.get("shuffled", {})
    kinds = {"seed": int, "original": str, "kept": int}
    if "shuffled" in build and not (
        isinstance(shuffled, dict) and all(isinstance(shuffled.get(name), kind) for name, kind in kinds.items())
    ):
        raise ValueError(f'"shuffled" in build must be an object with {", ".join(kinds)}')
    counts = [build.get("lines_skipped", 0), *build.get("rules", {}).values()]
    if not all(isinstance(count, int) for count in counts):
        raise ValueError("counts in build must be integers")
    return build


def _invalid(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path}: not a valid dictionary table of format {FORMAT_VERSION}: {' '.join(reason.split())}; rebuild it with "
        "megatron-prealign dictionary build"
    )


def find_problem(table: DictionaryTable) -> str | None:
    """Returns a description of the first inconsistency in `table`; None if it is valid."""
    for name, dtype in TENSORS.items():
        values = getattr(table, name)
        if values.dtype != dtype or values.ndim != 1:
            return f"{name} is {values.dtype} {values.shape}, expected one-dimensional {np.dtype(dtype)}"
    checks = (_languages_problem, _weight_problem, _shape_problem, _offsets_problem, _range_problem, _text_problem)
    # Each check relies on the previous ones.
    return next((problem for check in checks if (problem := check(table))), None)


def _languages_problem(table: DictionaryTable) -> str | None:
    return None if len(set(table.languages)) == len(table.languages) else "languages has a duplicate code"


def _text_problem(table: DictionaryTable) -> str | None:
    try:
        table.word_text.tobytes().decode()
    except UnicodeDecodeError as error:
        return f"word_text is not valid UTF-8 ({error})"
    begins = table.word_text_offsets[:-1]
    # A word must not start inside a multi-byte character.
    inside = table.word_text[begins[begins < len(table.word_text)]] & 0xC0 == 0x80
    return "word_text_offsets splits a UTF-8 character" if inside.any() else None


def _weight_problem(table: DictionaryTable) -> str | None:
    weights = table.word_weight
    if weights is None:
        return None
    if weights.dtype != np.float32 or weights.shape != (table.num_words,):
        return f"word_weight is {weights.dtype} {weights.shape}, expected float32 ({table.num_words},)"
    return (
        None
        if (np.isfinite(weights) & (weights > 0)).all()
        else "word_weight has a value that is not finite and above 0"
    )


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
    # Offsets -> number of elements, minimum and maximum length of a row.
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
            return f"{name} does not increase from 0 to {total} in steps of at least {fewest}"
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
        return "key_form has an invalid value, expected 0, 1, 2, 4, 5 or 6"
    weights = table.candidate_weight
    if not (np.isfinite(weights).all() and (weights > 0).all()):
        return "candidate_weight has a value that is not finite and above 0"
    decreases = np.diff(table.candidate_language.astype(np.int32)) < 0
    decreases[table.key_candidate_offsets[1:-1] - 1] = False
    if decreases.any():
        return f"candidate_language is not sorted within a key, at candidate {int(np.argmax(decreases)) + 1}"
    return _key_problem(table)


def _key_problem(table: DictionaryTable) -> str | None:
    """Checks for keys that span a word boundary: they would never match, or match across two words."""
    before, after = table.word_boundary & BOUNDARY_BEFORE, table.word_boundary & BOUNDARY_AFTER
    inner = np.ones(len(table.key_tokens), dtype=bool)
    inner[table.key_offsets[:-1]] = False
    index = np.flatnonzero(inner)
    broken = (before[table.key_tokens[index]] | after[table.key_tokens[index - 1]]) != 0
    if broken.any():
        return f"a word starts inside a key, at key token {int(index[np.argmax(broken)])}"
    return None
