"""Exported tokenizers, loaded by transformers, against the libraries that encoded the training data."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from support.english import english_texts
from support.hf_models import make_model, save_model
from support.messages import assert_facts, user_error
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from megatron_prealign.checkpoint.commands.export import export_weights
from megatron_prealign.checkpoint.commit import CONFIG
from megatron_prealign.conversion.from_hf import from_huggingface
from megatron_prealign.conversion.to_hf import ConvertSettings, to_huggingface
from megatron_prealign.conversion.tokenizer import (
    _CHECK_TEXTS,
    check_tokenizer,
    export_tokenizer,
    export_unchanged,
)
from megatron_prealign.preprocess.tokenizer_trainers import train_sentencepiece
from megatron_prealign.preprocess.train_tokenizer import train_tokenizer
from megatron_prealign.tokenizer.clone import CLONE_CLOSE, CLONE_OPEN, CloneLanguage, CloneTokenizer, save_clone
from megatron_prealign.tokenizer.load import load_tokenizer

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
ENGLISH = english_texts(40)
# Models that normalise are tested without combining marks: transformers' normaliser drops some (see the module).
PIECES = [
    *" \t\n  ▁<0xA>aBé', ñ1234567890ü東京한東京ﬁ①🙂👨🇩🇪…",
    "the",
    " the",
    "ing",
    "\r\n",
    "<0x0A>",
    "русский",
    "日本語",
    "\x00",
]
MARKS = ["\u0301", "\u200d", "\u200b", "\ufeff", "क्ष"]


def odd_texts(*, marks: bool, count: int = 1500) -> list[str]:
    generator = random.Random(5)
    pieces = PIECES + (MARKS if marks else [])
    return ["".join(generator.choices(pieces, k=generator.randint(0, 12))) for _ in range(count)]


def text_lines() -> Iterator[str]:
    yield from _CHECK_TEXTS
    yield from ENGLISH


def sentencepiece_directory(directory: Path, model: bytes) -> Path:
    directory.mkdir()
    (directory / "tokenizer.model").write_bytes(model)
    return directory


def other_model(**options: Any) -> bytes:
    """A sentencepiece model trained with its default settings: normalised, with its own BOS and EOS."""
    import io

    lines = (line for text in text_lines() for line in text.split("\n") if line.strip())
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        minloglevel=2,
        **{"num_threads": 1, "byte_fallback": True, "vocab_size": 560, **options},
    )
    return model.getvalue()


def make_byte_bpe(directory: Path) -> Path:
    corpus = directory.with_suffix(".jsonl")
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in text_lines()), encoding="utf-8")
    train_tokenizer([str(corpus)], str(directory), 600, show_progress=False)
    return directory


MODELS: dict[str, Callable[[Path], Path]] = {
    "byte_bpe": make_byte_bpe,
    "unigram": lambda path: sentencepiece_directory(path, train_sentencepiece(text_lines(), 700, "unigram", 0.995)),
    "bpe": lambda path: sentencepiece_directory(path, train_sentencepiece(text_lines(), 700, "bpe", 0.995)),
    "normalised_unigram": lambda path: sentencepiece_directory(path, other_model(character_coverage=0.98)),
    "normalised_bpe": lambda path: sentencepiece_directory(
        path, other_model(model_type="bpe", character_coverage=0.98)
    ),
    "no_bytes": lambda path: sentencepiece_directory(
        path, other_model(byte_fallback=False, character_coverage=0.98, vocab_size=400)
    ),
    "no_bytes_bpe": lambda path: sentencepiece_directory(
        path, other_model(model_type="bpe", byte_fallback=False, character_coverage=0.98)
    ),
    "symbols": lambda path: sentencepiece_directory(
        path, other_model(user_defined_symbols=["<sep>", "<tab>"], normalization_rule_name="identity")
    ),
}
# Several segmentations may have equal scores, and the libraries round differently.
UNIGRAM = {"unigram", "normalised_unigram", "no_bytes", "symbols"}


@pytest.fixture(scope="module", params=list(MODELS))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, MODELS[request.param](tmp_path_factory.mktemp(request.param) / "tokenizer")


def export(source: Path, output: Path, family: str = "llama") -> Any:
    """Writes it next to a config.json of the family and loads it as users do."""
    output.mkdir()
    (output / "config.json").write_text(json.dumps({"model_type": family}), encoding="utf-8")
    export_tokenizer(source, output, family=family, max_length=1 << 20)
    return AutoTokenizer.from_pretrained(output)


def test_ids_match_training(source: tuple[str, Path], tmp_path: Path) -> None:
    name, path = source
    mcore, hf = load_tokenizer(path), export(path, tmp_path / "out")
    marks = not name.startswith(("normalised", "no_bytes"))
    texts = [*_CHECK_TEXTS, *ENGLISH, *odd_texts(marks=marks)]
    special = [mcore.decode([number]) for number in mcore.special_ids]
    texts = [text for text in texts if not any(name in text for name in special)]
    expected = mcore.encode_batch(texts)
    got = hf(texts).input_ids
    different = [text for text, one, other in zip(texts, expected, got, strict=True) if one != other]
    # Ties, which BPE does not have: of 2.6 million tokens 8 in 100,000 differed; a text here has up to thousands.
    assert len(different) <= (len(texts) // 100 if name in UNIGRAM else 0), different[:5]
    assert len(hf) == mcore.vocab_size


def test_bos_and_eos_are_the_end_of_document_token(source: tuple[str, Path], tmp_path: Path) -> None:
    mcore, hf = load_tokenizer(source[1]), export(source[1], tmp_path / "out")
    assert hf.eos_token_id == hf.bos_token_id == mcore.eod_id
    assert hf("word").input_ids == mcore.encode("word")
    # Models would refuse others.
    assert hf.init_kwargs["model_input_names"] == ["input_ids", "attention_mask"]
    # transformers encodes its name in a text as the token; with split_special_tokens as text, as in the training data.
    name = hf.eos_token
    assert hf(name).input_ids == [mcore.eod_id]
    if not source[0].startswith("no_bytes"):
        # Without byte fallback the unknown characters of the name are one token in training, two here.
        assert hf(f"a {name} b", split_special_tokens=True).input_ids == mcore.encode(f"a {name} b")


def test_text_survives_the_round_trip(source: tuple[str, Path], tmp_path: Path) -> None:
    hf = export(source[1], tmp_path / "out")
    text = "the value of an expression is not the name of it"
    assert hf.decode(hf(text).input_ids) == text


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trust", [False, True])
def test_no_family_uses_its_own_tokenizer_class(tmp_path: Path, family: str, trust: bool) -> None:
    # transformers 5 splits texts like Qwen's tokenizer in every Qwen2 directory, unless the config names a class.
    source = make_byte_bpe(tmp_path / "tokenizer")
    export(source, tmp_path / "out", family)
    hf = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=trust)
    mcore = load_tokenizer(source)
    for text in (*_CHECK_TEXTS, "a 12345 \n\n b  c's", *odd_texts(marks=True, count=100)):
        assert hf(text).input_ids == mcore.encode(text), text


@pytest.mark.parametrize("name", ["byte_bpe", "unigram", "bpe"])
def test_cloned_ids_have_names_and_text(name: str, tmp_path: Path) -> None:
    path = MODELS[name](tmp_path / "tokenizer")
    save_clone(path, CloneLanguage("en_clone"))
    mcore = load_tokenizer(path)
    assert isinstance(mcore, CloneTokenizer)
    hf = export(path, tmp_path / "out")
    assert len(hf) == mcore.vocab_size
    assert len(set(hf.convert_ids_to_tokens(range(mcore.vocab_size)))) == mcore.vocab_size
    texts = [*"\n".join(ENGLISH).split("\n"), f"no {CLONE_OPEN} the{CLONE_CLOSE} {CLONE_OPEN}the{CLONE_CLOSE} clone"]
    pairs = zip(hf(texts).input_ids, mcore.encode_batch(texts), strict=True)
    # Ties in a unigram model, as in the test above; the last text has brackets.
    assert sum(one != other for one, other in pairs) <= (len(texts) * 3 // 1000 if name in UNIGRAM else 0)
    assert hf(texts[-1]).input_ids == mcore.encode(texts[-1])
    for text in [text for text in ENGLISH if text.isascii()][:5]:
        cloned = mcore.encode(text, "en_clone")
        # sentencepiece's space before a text stays inside the brackets.
        assert hf.decode(cloned).replace(f"{CLONE_OPEN} ", CLONE_OPEN) == f"{CLONE_OPEN}{text.lstrip(' ')}{CLONE_CLOSE}"
    both = mcore.encode("One two") + mcore.encode(" three four", "en_clone")
    assert hf.decode(both).split(CLONE_OPEN)[1].strip(" ") == f"three four{CLONE_CLOSE}"


def test_added_tokens_after_the_vocabulary_keep_their_ids_in_a_clone(tmp_path: Path) -> None:
    path = make_byte_bpe(tmp_path / "tokenizer")
    data = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    added = {**data["added_tokens"][0], "id": 603, "content": "<extra>"}
    data["added_tokens"].append(added)
    (path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    library = LibraryTokenizer.from_file(str(path / "tokenizer.json"))
    save_clone(path, CloneLanguage("en_clone"))
    mcore, hf = load_tokenizer(path), export(path, tmp_path / "out")
    extra = library.token_to_id("<extra>")
    assert hf("a<extra>").input_ids[-1] == extra == mcore.base.vocab_size - 1  # type: ignore[attr-defined]
    assert hf("word").input_ids == mcore.encode("word")


def test_special_tokens_that_the_data_did_not_have_are_dropped(tmp_path: Path) -> None:
    path = make_byte_bpe(tmp_path / "tokenizer")
    data = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<eod>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<eod>": {"id": "<eod>", "ids": [0], "tokens": ["<eod>"]}},
    }
    data["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    data["model"]["dropout"] = 0.5
    (path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    config = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    # Not in the vocabulary: transformers would add it with an id beyond the model's embedding.
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<pad>"}), encoding="utf-8")
    mcore, hf = load_tokenizer(path), export(path, tmp_path / "out")
    assert hf(ENGLISH).input_ids == mcore.encode_batch(ENGLISH)
    assert hf.pad_token is None and len(hf) == mcore.vocab_size


@pytest.mark.parametrize("change", ["unused", "symbols", "word"])
def test_unsupported_sentencepiece_models_are_refused(tmp_path: Path, change: str) -> None:
    from sentencepiece import sentencepiece_model_pb2

    options = {"symbols": {"user_defined_symbols": ["<sep>"]}}.get(change, {})
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(other_model(model_type="bpe", **options))
    if change == "unused":
        proto.pieces[500].type = 5
    if change == "word":
        proto.trainer_spec.model_type = 3
    path = sentencepiece_directory(tmp_path / "tokenizer", proto.SerializeToString())
    (tmp_path / "out").mkdir()
    fact = {"unused": "1 unused pieces", "symbols": "user-defined symbols", "word": "model type word"}[change]
    with user_error(path / "tokenizer.model", fact, "--tokenizer copy"):
        export_tokenizer(path, tmp_path / "out", family="llama", max_length=8)


def test_differing_ids_are_detected(tmp_path: Path) -> None:
    source = make_byte_bpe(tmp_path / "tokenizer")
    output = tmp_path / "out"
    export(source, output)
    assert check_tokenizer(source, output, 600) == []
    data = json.loads((output / "tokenizer.json").read_text(encoding="utf-8"))
    data["model"]["merges"] = data["model"]["merges"][:-50]
    (output / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    with user_error(source, "different ids", "test texts", "--tokenizer copy"):
        check_tokenizer(source, output, 600)
    with user_error(source, "600 tokens", "599", "--tokenizer copy"):
        check_tokenizer(source, output, 599)


def test_added_tokens_in_every_text_do_not_hide_differing_ids(tmp_path: Path) -> None:
    source = make_byte_bpe(tmp_path / "tokenizer")
    data = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    names = [*"abcdefghijklmnopqrstuvwxyz ", "0", "1"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    data["added_tokens"] += [{"id": data["model"]["vocab"].get(name, 600), "content": name, **flags} for name in names]
    (source / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    output = tmp_path / "out"
    export(source, output)
    rows = load_tokenizer(source).vocab_size
    assert check_tokenizer(source, output, rows) == []
    data = json.loads((output / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = data["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (output / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    with user_error(source, "different ids", "test texts"):
        check_tokenizer(source, output, rows)


def test_a_chat_template_is_kept(tmp_path: Path) -> None:
    source = make_byte_bpe(tmp_path / "tokenizer")
    (source / "chat_template.jinja").write_text("{{ messages[0] }}", encoding="utf-8")
    assert export(source, tmp_path / "out").chat_template == "{{ messages[0] }}"


def test_a_copy_is_unchanged(tmp_path: Path) -> None:
    source = make_byte_bpe(tmp_path / "tokenizer")
    shutil.copy(source / "tokenizer.json", source / "other.json")
    (tmp_path / "out").mkdir()
    exported = export_unchanged(source, tmp_path / "out")
    assert exported.eod_token == "<eod>" and not exported.converted
    for file in source.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_a_tokenizer_from_another_directory_is_converted(tmp_path: Path) -> None:
    """transformers loads sentencepiece files with a class of the model's family, which splits texts in its own way."""
    hf, source = save_model(make_model("llama"), tmp_path / "hf"), MODELS["bpe"](tmp_path / "sentencepiece")
    from_huggingface(hf, tmp_path / "first", tokenizer=source)
    config = json.loads((tmp_path / "first" / CONFIG).read_text(encoding="utf-8"))
    assert config["eos_token_id"] == load_tokenizer(source).eod_id
    export_weights(tmp_path / "first", tmp_path / "mcore")
    done = to_huggingface(tmp_path / "mcore", tmp_path / "out", ConvertSettings(), show_progress=False)
    assert not any("copied" in note for note in done.notes)
    loaded, tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer(source)
    assert loaded(ENGLISH[0]).input_ids == tokenizer.encode(ENGLISH[0])
    # The model's own special token ids are other tokens of this tokenizer.
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["eos_token_id"] == loaded.eos_token_id == tokenizer.eod_id != 256
    done = to_huggingface(tmp_path / "mcore", tmp_path / "copy", ConvertSettings(tokenizer="copy"), show_progress=False)
    assert any("copied" in note and "transformers" in note and "--tokenizer convert" in note for note in done.notes)


def test_the_models_own_tokenizer_is_copied(tmp_path: Path) -> None:
    """A token that it adds before a text, unlike training, is not reported as a difference."""
    hf = save_model(make_model("llama"), tmp_path / "hf")
    library = LibraryTokenizer.from_file(str(hf / "tokenizer.json"))
    library.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)])
    library.save(str(hf / "tokenizer.json"))
    assert from_huggingface(hf, tmp_path / "mcore").notes == []
    done = to_huggingface(tmp_path / "mcore", tmp_path / "out", ConvertSettings(), show_progress=False)
    assert done.notes == []
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a").input_ids[0] == 256
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()


def test_a_family_with_its_own_tokenizer_class_is_reported(tmp_path: Path) -> None:
    hf = save_model(make_model("qwen2"), tmp_path / "hf")
    (note,) = from_huggingface(hf, tmp_path / "mcore").notes
    assert_facts(note, "qwen2", "Qwen2Tokenizer", "--tokenizer convert")
    config = hf / "tokenizer_config.json"
    named = {**json.loads(config.read_text(encoding="utf-8")), "tokenizer_class": "Qwen2Tokenizer"}
    config.write_text(json.dumps(named), encoding="utf-8")
    assert from_huggingface(hf, tmp_path / "again").notes == []
