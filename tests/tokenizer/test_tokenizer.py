"""Tokenizers of every kind: ids, words inside a sentence, word boundary flags, clones, and errors."""

import json
from pathlib import Path

import numpy
import pytest
import sentencepiece
from support.messages import user_error
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from megatron_prealign.dictionary.coverage import Words
from megatron_prealign.dictionary.running_words import word_texts
from megatron_prealign.tokenizer.base import Tokenizer
from megatron_prealign.tokenizer.clone import CLONE_CLOSE, CLONE_OPEN, CloneLanguage, CloneTokenizer, save_clone
from megatron_prealign.tokenizer.load import load_tokenizer
from megatron_prealign.tokenizer.word_boundaries import bytes_flags, text_flags

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog's owner (an apple farmer) counts 14 apples.",
    "Der schnelle braune Fuchs springt über den faulen Hund, und die Äpfel sind grün.",
    "Быстрая коричневая лиса прыгает через ленивую собаку.\nПривет, мир!",
    "素早い茶色の狐がのろまな犬を飛び越える。",
] * 20
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def save(tokenizer: RawTokenizer, directory: Path, eos: str | None = "<eod>") -> Path:
    directory.mkdir(parents=True)
    data = json.loads(tokenizer.to_str())
    # The trainer accepts byte pieces only as special tokens; real files have them only in the vocabulary.
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] not in BYTES]
    (directory / "tokenizer.json").write_text(json.dumps(data))
    if eos is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return directory


def byte_level(directory: Path, add_prefix_space: bool, eos: str | None = "<eod>") -> Path:
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<eod>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(SENTENCES, trainer)
    return save(raw, directory, eos)


def metaspace(directory: Path, scheme: str) -> Path:
    """`scheme`: a Metaspace prepend scheme, `legacy` (Llama 2: a Prepend normaliser) or `xlm-r` (white space split)."""
    raw = RawTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if scheme == "legacy":
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    elif scheme == "xlm-r":
        raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    else:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    raw.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>", *BYTES]
    raw.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False))
    if scheme == "legacy":
        raw.pre_tokenizer = None
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return save(raw, directory, "</s>")


def sentencepiece_model(directory: Path, kind: str, **settings: object) -> Path:
    directory.mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(SENTENCES[:4]).split("\n") * 20),
        model_prefix=str(directory / "m"),
        model_type=kind,
        vocab_size=420 if kind == "bpe" else 110,
        character_coverage=1.0,
        minloglevel=2,
        num_threads=1,
        **settings,
    )
    return directory / "m.model"


KINDS = ("byte", "byte-prefix", "always", "first", "never", "legacy", "xlm-r", "unigram", "bpe", "bpe-bare")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    directory = tmp_path_factory.mktemp("tokenizers")
    bpe = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    paths = {
        "byte": byte_level(directory / "byte", add_prefix_space=False),
        "byte-prefix": byte_level(directory / "byte-prefix", add_prefix_space=True),
        **{scheme: metaspace(directory / scheme, scheme) for scheme in ("always", "first", "never", "legacy", "xlm-r")},
        "unigram": sentencepiece_model(directory / "unigram", "unigram"),
        "bpe": sentencepiece_model(directory / "bpe", "bpe", **bpe),
        "bpe-bare": sentencepiece_model(directory / "bpe-bare", "bpe", add_dummy_prefix=False, **bpe),
    }
    return {kind: load_tokenizer(path) for kind, path in paths.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_cover_the_characters_of_each_token(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    # Characters outside the vocabulary (bytes or the unknown token), leading, trailing and repeated spaces, no text.
    for text in [*SENTENCES[:4], "  犬犬と  𠮷龘の家 ", "犬", "a", "😀\n\nfox\t ", ""]:
        ids, spans = tokenizer.encode_with_offsets(text)
        assert ids == tokenizer.encode(text)
        assert spans.shape == (len(ids), 2) and spans.dtype == numpy.int64
        assert (numpy.diff(spans, axis=0) >= 0).all() and (spans[:, 0] <= spans[:, 1]).all()
        assert not len(ids) or (spans.min() >= 0 and spans.max() <= len(text))
        for index, (start, end) in zip(ids, spans.tolist(), strict=True):
            piece = tokenizer.decode([index]).strip()
            if index not in tokenizer.special_ids and "\ufffd" not in piece and not piece.startswith("<0x"):
                assert piece in ("", text[start:end].strip())
        # Every visible character is in some token.
        covered = {at for start, end in spans.tolist() for at in range(start, end)}
        assert all(at in covered for at, character in enumerate(text) if not character.isspace())


def test_offsets_of_parts_of_characters(tokenizers: dict[str, Tokenizer]) -> None:
    """Byte-level tokens may contain the end of one character and the start of the next: both are covered."""
    raw = RawTokenizer.from_file(str(tokenizers["byte"].path / "tokenizer.json"))
    for text in ("龘の家 𠮷野家ü 犬犬と", "家家家の犬を飛び越える"):
        ids, spans = tokenizers["byte"].encode_with_offsets(text)
        # One character of the byte alphabet is one byte.
        ends = numpy.cumsum([len(raw.id_to_token(index)) for index in ids])
        character_of_byte = [at for at, character in enumerate(text) for _ in character.encode()]
        expected = [
            [character_of_byte[start], character_of_byte[end - 1] + 1]
            for start, end in zip([0, *ends[:-1]], ends, strict=True)
        ]
        assert spans.tolist() == expected
    for kind in ("bpe", "legacy"):
        ids, spans = tokenizers[kind].encode_with_offsets("a龘b")
        assert [span for span in spans.tolist() if span == [1, 2]] == [[1, 2]] * 3


def test_a_post_processor_does_not_trim_offsets(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    """The post-processor in GPT-2's files excludes the leading space from the range of a token."""
    plain = tokenizers["byte"]
    data = json.loads((plain.path / "tokenizer.json").read_text())
    data["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eod>"}')
    trimming = load_tokenizer(tmp_path)
    assert trimming.fingerprint == plain.fingerprint
    for text in SENTENCES[:4]:
        ids, spans = trimming.encode_with_offsets(text + "  x")
        assert ids == plain.encode(text + "  x")
        assert spans.tolist() == plain.encode_with_offsets(text + "  x")[1].tolist()
        assert spans[:, 0].tolist() == [0, *spans[:-1, 1].tolist()] or not text.isascii()


def test_offsets_of_a_clone(tokenizers: dict[str, Tokenizer]) -> None:
    clone = CloneTokenizer(tokenizers["byte"], "en_clone")
    for language in (None, "en", "en_clone"):
        ids, spans = clone.encode_with_offsets("the 犬 fox", language)
        assert ids == clone.encode("the 犬 fox", language)
        assert spans.tolist() == tokenizers["byte"].encode_with_offsets("the 犬 fox")[1].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_word_forms_are_those_inside_a_sentence(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    start = tokenizer.encode("fox")
    for word in ("apple", "dog", "counts", "über", "собаку", "Zqx"):
        sentence = tokenizer.encode(f"fox {word}")
        assert sentence[: len(start)] == start
        assert tokenizer.encode_word(word) == sentence[len(start) :], word
        sentence = tokenizer.encode(f"fox ({word}")
        bracket = tokenizer.encode("fox (")
        if len(sentence) > len(bracket) and sentence[: len(bracket)] == bracket:
            assert tokenizer.encode_word(word, word_initial=False) == sentence[len(bracket) :], word


@pytest.mark.parametrize("kind", KINDS)
def test_batches_equal_single_calls_and_add_no_special_tokens(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    texts = [*SENTENCES[:4], "", " ", "the dog"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode("") == []
    words = ["dog", "Äpfel", "犬"]
    for initial in (True, False):
        expected = [tokenizer.encode_word(word, word_initial=initial) for word in words]
        assert tokenizer.encode_words(words, word_initial=initial) == expected
    ids = tokenizer.encode(SENTENCES[0])
    assert tokenizer.eod_id not in ids
    assert max(ids) < tokenizer.vocab_size
    assert tokenizer.decode(ids).strip() == SENTENCES[0]


@pytest.mark.parametrize("kind", KINDS)
def test_flags_find_the_words_of_a_sentence(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    flags = tokenizer.word_boundaries()
    assert flags.dtype == numpy.uint8
    assert flags.shape == (tokenizer.vocab_size,)
    ids = tokenizer.encode("the quick brown fox jumps over the dog")
    starts = [i for i, index in enumerate(ids) if flags[index] & 1 or (i and flags[ids[i - 1]] & 2)]
    words = [tokenizer.decode(ids[a:b]).strip() for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]
    assert [word for word in words if word][-7:] == ["quick", "brown", "fox", "jumps", "over", "the", "dog"]
    assert all(flags[index] == 3 for index in tokenizer.special_ids)


@pytest.mark.parametrize("kind", ["byte", "legacy", "bpe"])
def test_names_of_special_tokens_in_a_text_are_plain_text(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    assert not tokenizer.special_ids & set(tokenizer.encode("a<eod> b</s> <s>"))


@pytest.mark.parametrize(
    ("token", "flags"),
    [
        (" the", 1),
        ("the", 0),
        ("'s", 1),
        ("\n", 3),
        (" ", 3),
        ("14", 3),
        ("word,", 2),
        ("(apple", 1),
        ("_id_", 3),
        (" Äpfel", 1),
        ("犬", 0),
        ("。", 3),
        # A combining mark (M*) belongs to the word.
        ("\u0301", 0),
        ("क्", 0),
        ("", 3),
    ],
)
def test_flags_of_complete_text(token: str, flags: int) -> None:
    assert text_flags(token) == flags
    assert bytes_flags(token.encode()) == flags


@pytest.mark.parametrize(
    ("data", "flags"),
    [
        ("п".encode()[:1], 0),
        ("п".encode()[1:], 0),
        (b" " + "п".encode()[:1], 1),
        ("при".encode()[:-1], 0),
        ("п".encode()[1:] + b",", 2),
        ("犬".encode()[:2], 0),
        ("犬".encode()[2:] + "。".encode(), 2),
        # The first two bytes of an ideographic full stop: incomplete, so letters.
        ("。".encode()[:2], 0),
        ("🎉".encode(), 3),
        ("🎉".encode()[1:], 0),
        (b"\xff", 0),
        (b"\x80\x80\x80\x80\x80", 0),
    ],
)
def test_flags_of_bytes_inside_characters(data: bytes, flags: int) -> None:
    assert bytes_flags(data) == flags


def test_flags_of_a_byte_level_vocabulary(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte"]
    flags = tokenizer.word_boundaries()
    vocabulary = json.loads((tokenizer.path / "tokenizer.json").read_text())["model"]["vocab"]
    expected = {"Ġthe": 1, "Ċ": 3, "Ġ": 3, "1": 3, ",": 3, "a": 0, "Ð": 0, "æ": 0, "'": 3, "<eod>": 3}
    assert {token: int(flags[vocabulary[token]]) for token in expected} == expected


def test_flags_of_byte_fallback_pieces(tokenizers: dict[str, Tokenizer]) -> None:
    for kind in ("bpe", "legacy"):
        tokenizer = tokenizers[kind]
        flags = tokenizer.word_boundaries()
        tab = [index for index in tokenizer.encode("a\ta") if index not in tokenizer.encode("aa")]
        assert flags[tab].tolist() == [3], kind
        emoji = [index for index in tokenizer.encode("a🎉") if index not in tokenizer.encode("a")]
        assert flags[emoji].tolist() == [0, 0, 0, 0], kind


def test_clone(tmp_path: Path) -> None:
    directory = byte_level(tmp_path / "clone", add_prefix_space=False)
    base = load_tokenizer(directory)
    (directory / "clone.json").write_text('{"language": "en_clone"}')
    clone = load_tokenizer(directory)
    assert isinstance(clone, CloneTokenizer)
    size = base.vocab_size
    assert (clone.vocab_size, clone.eod_id) == (2 * size, base.eod_id)
    assert clone.fingerprint != base.fingerprint
    ids = base.encode("the dog")
    assert clone.encode("the dog") == clone.encode("the dog", "de") == ids
    assert clone.encode("the dog", "en_clone") == [index + size for index in ids]
    assert clone.encode_batch(["the dog", ""], "en_clone") == [[index + size for index in ids], []]
    assert clone.encode_word("dog", "en_clone", False) == [index + size for index in base.encode("dog")]
    assert clone.decode([*ids, *(index + size for index in ids)]) == f"the dog{CLONE_OPEN}the dog{CLONE_CLOSE}"
    assert clone._shift([[base.eod_id, ids[0]]], "en_clone") == [[base.eod_id, ids[0] + size]]
    assert numpy.array_equal(clone.word_boundaries(), numpy.tile(base.word_boundaries(), 2))
    (directory / "clone.json").write_text("{}")
    with user_error(f"{directory / 'clone.json'}: ", "language is missing"):
        load_tokenizer(directory)
    (directory / "clone.json").write_text('{"language": "en_clone", "shared_ids": "many"}')
    with user_error(f"{directory / 'clone.json'}: ", "shared_ids is many"):
        load_tokenizer(directory)
    save_clone(directory, CloneLanguage("en_clone", size))
    with user_error(f"{directory / 'clone.json'}: ", f"shared_ids is {size}", f"less than {size}"):
        load_tokenizer(directory)


def test_clone_that_shares_ids(tmp_path: Path) -> None:
    directory = byte_level(tmp_path / "clone", add_prefix_space=False)
    base = load_tokenizer(directory)
    size, ids = base.vocab_size, base.encode("the dog ran")
    first = sorted(ids)[1]
    save_clone(directory, CloneLanguage("en_clone", first))
    clone = load_tokenizer(directory)
    shifted = [index if index < first else index + size for index in ids]
    assert any(index >= size for index in shifted) and any(index < size for index in shifted)
    assert clone.encode("the dog ran", "en_clone") == shifted
    assert clone.encode_rows(["the dog ran"], "en_clone")[0].tolist() == shifted
    engine = clone.fast_engine("en_clone")
    assert engine is None or engine(["the dog ran"])[0].tolist() == shifted
    assert clone.encode("the dog ran") == ids
    # Words are compared as text: brackets would split a word with ids of both kinds.
    assert CLONE_OPEN in clone.decode(shifted) and clone.decode_word(shifted) == "the dog ran"
    words = Words(numpy.zeros(1, dtype=numpy.int64), numpy.array([len(shifted)]), numpy.ones(1, dtype=bool))
    assert word_texts(clone, numpy.array(shifted), words, numpy.zeros(1, dtype=numpy.int64)) == ["the dog ran"]
    # Data of one is not data of the other.
    assert clone.fingerprint != CloneTokenizer(base, "en_clone").fingerprint


def test_fingerprint_depends_only_on_what_affects_ids(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    directory = byte_level(tmp_path / "moved", add_prefix_space=False)
    assert load_tokenizer(directory).fingerprint == tokenizers["byte"].fingerprint
    assert tokenizers["byte-prefix"].fingerprint != tokenizers["byte"].fingerprint
    data = json.loads((directory / "tokenizer.json").read_text())
    data["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    data["model"]["dropout"] = 0.5
    (directory / "tokenizer.json").write_text(json.dumps(data, indent=3))
    changed = load_tokenizer(directory)
    assert changed.fingerprint == tokenizers["byte"].fingerprint
    # Truncation and dropout of the file are disabled: texts are encoded completely and deterministically.
    assert changed.encode(SENTENCES[0]) == tokenizers["byte"].encode(SENTENCES[0])
    data["model"]["merges"] = data["model"]["merges"][:-1]
    (directory / "tokenizer.json").write_text(json.dumps(data))
    assert load_tokenizer(directory).fingerprint != tokenizers["byte"].fingerprint


def test_sentencepiece_fingerprint_ignores_names(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    again = load_tokenizer(sentencepiece_model(tmp_path / "elsewhere", "unigram"))
    assert again.fingerprint == tokenizers["unigram"].fingerprint
    assert again.fingerprint != tokenizers["bpe"].fingerprint
    assert tokenizers["bpe"].fingerprint != tokenizers["bpe-bare"].fingerprint


def test_end_of_document_token(tmp_path: Path) -> None:
    named = load_tokenizer(byte_level(tmp_path / "named", add_prefix_space=False, eos=None))
    assert named.decode([named.eod_id]) == "<eod>"
    wrong = byte_level(tmp_path / "wrong", add_prefix_space=False, eos="<|end|>")
    with user_error(f"{wrong}: ", "eos_token '<|end|>'", "not in the vocabulary"):
        load_tokenizer(wrong)
    data = json.loads((tmp_path / "named/tokenizer.json").read_text())
    data["added_tokens"] = []
    data["model"]["vocab"] = {("zz" if t == "<eod>" else t): i for t, i in data["model"]["vocab"].items()}
    (tmp_path / "named/tokenizer.json").write_text(json.dumps(data))
    with user_error(f"{tmp_path / 'named'}: no end-of-document token", "expected eos_token"):
        load_tokenizer(tmp_path / "named")
    model = sentencepiece_model(tmp_path / "no-eos", "bpe", eos_id=-1, byte_fallback=True)
    with user_error(f"{model}: no end-of-document token", "expected an EOS piece"):
        load_tokenizer(model)


def test_errors(tmp_path: Path) -> None:
    with user_error(f"{tmp_path / 'nothing'}: tokenizer not found"):
        load_tokenizer(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with user_error(f"{tmp_path / 'empty'}: ", "no tokenizer", "tokenizer.json"):
        load_tokenizer(tmp_path / "empty")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with user_error(f"{tmp_path / 'bad.model'}: not a sentencepiece model"):
        load_tokenizer(tmp_path / "bad.model")
    (tmp_path / "notes.txt").write_text("x")
    with user_error(f"{tmp_path / 'notes.txt'}: not a tokenizer"):
        load_tokenizer(tmp_path / "notes.txt")
    for content in ("{", "[]", '{"model": {"type": "BPE"}}'):
        (tmp_path / "empty/tokenizer.json").write_text(content)
        with user_error(f"{tmp_path / 'empty/tokenizer.json'}: "):
            load_tokenizer(tmp_path / "empty")


def test_tokenizers_that_do_not_mark_words_are_rejected(tmp_path: Path) -> None:
    raw = RawTokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.train_from_iterator(
        SENTENCES, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "<eod>"], show_progress=False)
    )
    with user_error(f"{tmp_path / 'wordpiece'}: ", "does not mark the start of words"):
        load_tokenizer(save(raw, tmp_path / "wordpiece"))
    model = sentencepiece_model(tmp_path / "suffix", "bpe", treat_whitespace_as_suffix=True, byte_fallback=True)
    with user_error(f"{model}: ", "does not mark the start of words"):
        load_tokenizer(model)
