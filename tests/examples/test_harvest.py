"""The harvest script on a small package made for the test."""

import json
from pathlib import Path
from types import ModuleType

import pytest
from support.example_scripts import load_example
from support.messages import assert_facts

TOPICS = ["animals", "rivers", "mountains", "engines", "colours", "letters", "planets", "windows", "gardens", "bridges"]
VERBS = ["follow", "describe", "carry", "remember", "measure", "collect", "explain", "compare"]


@pytest.fixture(scope="module")
def harvest() -> ModuleType:
    return load_example("english_clone/harvest.py")


def sentence(topic: str, verb: str) -> str:
    """Prose with one word (topic and verb in one) that no other sentence has."""
    unique = f"{topic.replace(' ', '')}{verb}"
    return f"This is the part that will {verb} all of the {topic} in the garden, and it returns to the {unique} hut."


def put_package(directory: Path, name: str, files: dict[str, str]) -> None:
    for path, source in {"__init__.py": "", **files}.items():
        target = directory / name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source, encoding="utf-8")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package of 10 modules with 8 documented functions each, and some that must be passed over."""
    files = {
        f"part_{topic}.py": "\n".join(f'def {verb}():\n    """{sentence(topic, verb)}"""\n' for verb in VERBS)
        for topic in TOPICS
    }
    files["broken.py"] = 'def f(:\n    """' + sentence("ruins", "collect") + '"""\n'
    files["tests/test_part.py"] = '"""' + sentence("tests", "measure") + '"""\n'
    put_package(tmp_path / "path", "harvest_fake_package", files)
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    return "harvest_fake_package"


def run(harvest: ModuleType, output: Path, *arguments: str) -> tuple[list[str], list[str], list[str]]:
    assert harvest.main(["--output", str(output), *arguments]) == 0
    train, validation = (
        [json.loads(line)["text"] for line in (output / f"{side}.jsonl").read_text().splitlines()]
        for side in ("train", "validation")
    )
    return train, validation, (output / "words.tsv").read_text().splitlines()


def test_every_good_document_is_harvested_once_and_nothing_else(
    harvest: ModuleType, package: str, tmp_path: Path
) -> None:
    train, validation, _ = run(harvest, tmp_path / "out", "--packages", package, "--seed", "3")
    expected = {sentence(topic, verb) for topic in TOPICS for verb in VERBS}
    assert sorted([*train, *validation]) == sorted(expected)
    assert 0 < len(validation) < 10
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "train.jsonl",
        "validation.jsonl",
        "words.tsv",
    ]


def test_the_same_call_gives_the_same_bytes_and_the_seed_changes_only_the_order(
    harvest: ModuleType, package: str, tmp_path: Path
) -> None:
    first = run(harvest, tmp_path / "a", "--packages", package)
    run(harvest, tmp_path / "b", "--packages", package)
    for name in ("train.jsonl", "validation.jsonl", "words.tsv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    other = run(harvest, tmp_path / "c", "--packages", package, "--seed", "2")
    assert other[0] != first[0] and sorted(other[0]) == sorted(first[0])
    assert sorted(other[1]) == sorted(first[1])


def test_a_document_stays_on_its_side_when_the_corpus_grows(harvest: ModuleType, package: str, tmp_path: Path) -> None:
    train, validation, _ = run(harvest, tmp_path / "small", "--packages", package)
    more = {f"m{i}.py": f'"""{sentence(f"things {TOPICS[i]}", VERBS[i % 8])}"""\n' for i in range(10)}
    put_package(tmp_path / "path", "harvest_second_package", more)
    grown = run(harvest, tmp_path / "large", "--packages", package, "harvest_second_package")
    assert set(train) < set(grown[0]) and set(validation) <= set(grown[1])
    assert len(grown[0]) + len(grown[1]) == len(train) + len(validation) + 10


def test_near_identical_documents_are_one(harvest: ModuleType) -> None:
    text = sentence("rivers", "measure")
    seen: set[bytes] = set()
    assert harvest.clean(text, seen) == text
    for copy in (text.upper(), text.replace(", ", ",\n   "), f"**{text}** 1.5", f"{text}\n\n{text}"):
        assert harvest.clean(copy, seen) == ""


def test_a_paragraph_copied_into_another_document_is_kept_once(harvest: ModuleType) -> None:
    seen: set[bytes] = set()
    shared, own = sentence("rivers", "measure"), sentence("engines", "carry")
    assert harvest.clean(shared, seen) == shared
    assert harvest.clean(f"{own}\n\n{shared}", seen) == own


def test_the_split_is_two_in_a_hundred(harvest: ModuleType) -> None:
    documents = {harvest.digest(str(i)): str(i) for i in range(20_000)}
    train, validation = harvest.split(documents, seed=1)
    assert sorted([*train, *validation]) == sorted(documents.values())
    # 400 expected, standard deviation 20: five of them
    assert 300 < len(validation) < 500


DOCSTRING = """Return the list of the words that are in the text, in the order in which they were found there.

    >>> words("a b")
    ['a', 'b']

    +------+------+
    | left | right|
    +------+------+

    ======  ======
    a       b
    ======  ======

    The text may be written in any of the languages that are known to this module, as in the block below::

        for word in words(text):
            print(word + "x", file=out)

            this is a comment in the code and it should not be in the text at all

    And this is what comes after the block, which should be kept as it is for the reader to see.

    ```python
    this is the code that should be dropped since it is in a fence and not in the text
    ```

    .. code-block:: python

        this is the other code that should be dropped since it is not in the text

    .. note::
        This is a note that is to be kept, because it is a part of the text for all of the readers.

    x = {1: [2, 3], 4: (5, 6)}; y = f(x)[0] ** 2 + g(x)
    """


def test_code_tables_and_doctests_are_dropped_and_prose_is_kept(harvest: ModuleType) -> None:
    text = harvest.clean(DOCSTRING, set())
    assert [paragraph.split()[0] for paragraph in text.split("\n\n")] == ["Return", "The", "And", "This"]
    assert text.count("\n\n") == 3 and "block below:\n" in text and "::" not in text


@pytest.mark.parametrize(
    "text",
    [
        "Diese Funktion gibt eine Liste aller Wörter zurück, die in der Datei gefunden wurden, und sortiert sie.",
        "この関数は、ファイル内で見つかったすべての単語のリストを返します。その後、並べ替えます。",
        "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon",
        "0.1 0.2 0.3 0.4 the 0.5 0.6 0.7 of 0.8 0.9 1.0 and 1.1 1.2 it 1.3 1.4 is 1.5",
    ],
)
def test_what_is_not_english_prose_is_left_out(harvest: ModuleType, text: str) -> None:
    assert not harvest.is_english_prose(text)


def test_docstrings_are_found_in_nested_and_conditional_definitions(harvest: ModuleType) -> None:
    bodies = [
        f"{name} {sentence('rivers', 'carry')}" for name in ("module", "klass", "method", "branch", "tried", "async")
    ]
    module, klass, method, branch, tried, coroutine = bodies
    source = (
        f'"""{module}"""\n'
        f'class A:\n    """{klass}"""\n    def f(self):\n        """{method}"""\n'
        f'if True:\n    pass\nelse:\n    def g():\n        """{branch}"""\n'
        f'try:\n    pass\nexcept ValueError:\n    def h():\n        """{tried}"""\n'
        f'async def i():\n    """{coroutine}"""\n'
        f'def short():\n    """Too short."""\n'
        f'def assigned():\n    x = """{sentence("engines", "carry")}"""\n'
    )
    assert list(harvest.docstrings(source.encode(), "x.py")) == bodies


def test_words_are_as_they_stand_in_order_of_count(harvest: ModuleType) -> None:
    text = "The cat, the (cat) and The dog. -- 12 cat,"
    assert harvest.frequent_words([text], 10) == ["The", "cat,", "(cat)", "and", "dog.", "the"]
    assert harvest.frequent_words([text, "the the"], 1) == ["the"]


def test_the_dictionary_comes_from_the_training_text_alone(harvest: ModuleType, package: str, tmp_path: Path) -> None:
    train, validation, lines = run(harvest, tmp_path / "out", "--packages", package)
    pairs = [line.split("\t") for line in lines]
    assert all(source == target for source, target in pairs)
    words = [source for source, _ in pairs]
    assert words == harvest.frequent_words(train, 8000) and words[0] == "the"
    unseen = set(harvest.frequent_words(validation, 8000)) - set(harvest.frequent_words(train, 8000))
    assert len(unseen) >= len(validation) and unseen.isdisjoint(words)
    assert len(run(harvest, tmp_path / "few", "--packages", package, "--words", "12")[2]) == 12


def test_max_bytes_is_a_bound(harvest: ModuleType, package: str, tmp_path: Path) -> None:
    gathered = harvest.gather([package], max_bytes=1000, seed=1)
    assert 800 < gathered.text_bytes <= 1000
    assert gathered.text_bytes == sum(len(text.encode()) for text in gathered.documents.values())


def test_errors_are_one_line(
    harvest: ModuleType, package: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert harvest.main(["--output", str(tmp_path / "x"), "--packages", "no_such_package_at_all"]) == 2
    assert_facts(capsys.readouterr().err, "no_such_package_at_all is not installed", "--packages")
    # A package without documentation.
    put_package(tmp_path / "path", "harvest_bare_package", {})
    assert harvest.main(["--output", str(tmp_path / "x"), "--packages", "harvest_bare_package"]) == 2
    assert_facts(capsys.readouterr().err, "harvest_bare_package", "0 documents", "--packages", "--max-bytes")
    (tmp_path / "file").write_text("in the way")
    assert harvest.main(["--output", str(tmp_path / "file"), "--packages", package]) == 2
    assert f"{tmp_path}/file is a file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        harvest.main(["--output", str(tmp_path), "--max-bytes", "0"])
    assert_facts(capsys.readouterr().err, "--max-bytes", "at least 1", "got 0")


def test_a_paragraph_reads_as_on_the_rendered_page(harvest: ModuleType) -> None:
    text = "- The *first* :class:`~package.Name` and\n  a ``literal`` or `the page <https://example.org>`_ of name_."
    assert harvest.plain(text) == "The first Name and a literal or the page of name."


def test_a_paragraph_full_of_names_and_signs_is_left_out(harvest: ModuleType) -> None:
    names = (
        "The value of first_value and of second_value is what third_value and fourth_value are for in this_function."
    )
    assert harvest.is_english_prose(names)
    assert harvest.clean(names, set()) == ""
