"""`pretrain --validate`: finds invalid recipes and files without torch."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.messages import assert_facts, assert_refused, user_error
from support.sidecars import save_sidecar
from support.tiny import VOCAB_SIZE, Tiny, recipe_of

from megatron_prealign import cli
from megatron_prealign.checkpoint.manifest import write_manifest
from megatron_prealign.checkpoint.resume.identity import resume_fingerprint
from megatron_prealign.checkpoint.state import model_identity
from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.data.sidecar import load_sidecar
from megatron_prealign.data.word_bitmap import words_path
from megatron_prealign.dictionary.table import load_table
from megatron_prealign.preprocess.train_tokenizer import train_tokenizer
from megatron_prealign.recipe import recipe_to_dict
from megatron_prealign.run.vocabulary import model_vocab_size
from megatron_prealign.tokenizer.clone import CloneTokenizer
from megatron_prealign.tokenizer.load import load_tokenizer

WITHOUT_TORCH = """
import sys
for name in ("torch", "megatron", "megatron.core"):
    sys.modules[name] = None
from megatron_prealign.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def values(tiny: Tiny, tmp_path: Path) -> dict[str, Any]:
    return tiny.values(tmp_path / "run")


def write(values: dict[str, Any], directory: Path) -> str:
    path = directory / "recipe.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return str(path)


def assert_invalid(
    values: dict[str, Any],
    directory: Path,
    capsys: pytest.CaptureFixture[str],
    *facts: object,
    options: tuple[str, ...] = (),
) -> None:
    """Fails unless validation ends with a one-line error that contains every fact."""
    status = cli.main(["pretrain", "--config", write(values, directory), "--validate", *options])
    output = capsys.readouterr()
    assert output.out == ""
    assert_refused(status, output.err, *facts)


def copy_dataset(prefix: Path, directory: Path) -> Path:
    """A copy of a dataset that a test may corrupt."""
    for ending in (".bin", ".idx", ".json"):
        shutil.copy(f"{prefix}{ending}", directory / f"{prefix.name}{ending}")
    return directory / prefix.name


def test_valid_recipe_needs_no_torch(tiny: Tiny, values: dict[str, Any], tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, "pretrain", "--config", write(values, tmp_path), "--validate"]
    done = subprocess.run([*command, "--world_size", "2"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    headline, *summary, start, following = done.stdout.splitlines()
    assert_facts(headline, "languages en, en_clone", "alignment and code_switch")
    steps = f"{values['alignment']['train_iters'] + values['training']['train_iters']} steps"
    assert_facts("\n".join(summary), steps, "2 processes", f"{tiny.directory}/en:", "passes", "checkpoints", "memory")
    assert "from scratch" in start
    assert following.endswith(shlex.join(["pretrain", "--config", str(tmp_path / "recipe.json")]))
    assert not (tmp_path / "run").exists()


def test_all_missing_inputs_are_named_at_once(
    tiny: Tiny, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values["data"]["tokenizer"] = "no/tokenizer"
    values["data"]["sources"][1]["path"] = "no/data"
    facts = ["2 inputs", "data.tokenizer no/tokenizer", "data.sources[1].path no/data", "relative to the current"]
    assert_invalid(values, tmp_path, capsys, *facts)
    values["data"]["validation"] = [{"path": "no/held_out", "language": "en"}]
    values["data"]["parallel_text"] = [{"source": "no/pairs_en", "target": "no/pairs_de"}]
    values["dictionary"]["table"] = "no/table"
    values["checkpoint"] = {"load": "no/checkpoint"}
    facts[0] = "7 inputs"
    facts += [f"data.parallel_text[0].{side} no/pairs_{code}" for side, code in (("source", "en"), ("target", "de"))]
    facts += ["data.validation[0].path no/held_out", "dictionary.table no/table", "checkpoint.load no/checkpoint"]
    assert_invalid(values, tmp_path, capsys, *facts)
    # The run itself says the same, before it creates anything.
    assert cli.main(["pretrain", "--config", write(values, tmp_path)]) == 2
    assert_facts(capsys.readouterr().err, *facts)
    assert not (tmp_path / "run").exists()


def test_parallel_text(tiny: Tiny, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = tiny.sentences()
    values["data"]["parallel_text"] = [entry]
    values["training"]["retrieval_sentences"] = 20
    values["checkpoint"] = {"keep_best": "sentence_retrieval_p_at_1/en-en_clone"}

    def printed() -> str:
        assert cli.main(["pretrain", "--config", write(values, tmp_path), "--validate"]) == 0
        return capsys.readouterr().out

    (line,) = [line for line in printed().splitlines() if line.startswith("sentences")]
    assert_facts(line, "en-en_clone, 20 of 60 pairs of data.parallel_text[0]", "32 tokens")
    assert "sentence retrieval is not measured" not in printed()
    # Documents of many lines: none fits, so keep_best has nothing to go by.
    whole = {"source": str(tiny.directory / "en"), "target": str(tiny.directory / "en_clone")}
    values["data"]["parallel_text"] = [whole]
    assert_invalid(values, tmp_path, capsys, "checkpoint.keep_best is sentence_retrieval_p_at_1/en-en_clone")
    del values["checkpoint"]
    text = printed()
    assert_facts(text, "en-en_clone, 0 of 107 pairs")
    assert_facts(text, "WARNING: data.parallel_text[0] (en-en_clone)", "none of 107 pairs", "1 to 32 tokens")
    values["data"]["parallel_text"] = [{**entry, "target": whole["target"]}]
    assert_invalid(values, tmp_path, capsys, "data.parallel_text[0]", "60 documents", "107", whole["target"])


def test_validation_set_in_the_training_data(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = values["data"]["sources"][0]["path"]
    values["data"]["validation"] = [{"path": path, "language": "en"}]
    assert_invalid(values, tmp_path, capsys, "data.validation", path, "data.sources")


def test_less_text_than_one_sample(values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values["data"]["seq_length"] = 100_000_000
    path = values["data"]["sources"][0]["path"]
    assert_invalid(values, tmp_path, capsys, path, "data.seq_length + 1 = 100000001")


def test_missing_weights_to_load(values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "no_checkpoint"
    empty.mkdir()
    for directory in ("nowhere", str(empty)):
        values["checkpoint"] = {"load": directory}
        facts = ["does not exist"] if directory == "nowhere" else []
        assert_invalid(values, tmp_path, capsys, directory, "no complete checkpoint", "step_*", *facts)


def write_checkpoint(values: dict[str, Any], tmp_path: Path, checkpoint: Path, **changes: Any) -> dict[str, Any]:
    """Writes a checkpoint of the recipe's run after three steps, without tensors; returns the content of state.json."""
    recipe = recipe_of(values, tmp_path / "recipe")
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    size = recipe.model.vocab_size or tokenizer.vocab_size
    state = {
        "kind": "run",
        **model_identity(
            asdict(recipe.model),
            vocab_size=size,
            padded_vocab_size=2048,
            tokenizer_fingerprint=tokenizer.fingerprint,
        ),
        "run": resume_fingerprint(
            recipe,
            num_samples=60,
            keys=[0, 1],
            segmenters=[None, None],
        ),
        "train_state": TrainState(phase=1, phase_step=3, step=8, tokens=2500).to_dict(),
        "phase": "language_model",
        "layout": {},
        "consumed_samples_per_source": {},
        "metrics": {},
        "saved_at": "2026-01-01T00:00:00+00:00",
        "versions": {},
        "blend": {"start": 0, "consumed_at_start": {}, "consumed": {}, "sources": [], "dropped": []},
        **changes,
    }
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps(state), encoding="utf-8")
    write_manifest(checkpoint, {})
    return state


def test_start_is_reported(values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def assert_start(*facts: object) -> None:
        assert cli.main(["pretrain", "--config", write(values, tmp_path), "--validate"]) == 0
        assert_facts(capsys.readouterr().out.splitlines()[-2], *facts)

    other, own = tmp_path / "other" / "checkpoints", tmp_path / "run" / "checkpoints"
    write_checkpoint(values, tmp_path, other / "step_00000008")
    values["checkpoint"] = {"load": str(tmp_path / "other")}
    assert_start("weights", other / "step_00000008")
    values["checkpoint"]["load_parts"] = "all"
    where = "(phase language_model, step 8, 2,500 tokens)"
    assert_start("another run", other / "step_00000008", where)
    for step in (8, 9):
        write_checkpoint(values, tmp_path, own / f"step_{step:08d}")
    assert_start("resume", own / "step_00000009", where)
    (own / "step_00000009" / "state.json").write_text("")
    assert_start("resume", own / "step_00000008", where)
    values["checkpoint"]["on_damage"] = "fail"
    (own / "latest").write_text("step_00000009")
    assert_invalid(values, tmp_path, capsys, own / "step_00000009", "state.json", "0 bytes", "expected")
    del values["checkpoint"]["on_damage"]
    values["training"]["seed"] = 5
    capsys.readouterr()
    assert cli.main(["pretrain", "--config", write(values, tmp_path), "--validate"]) == 2
    assert "training.seed 3 (recipe: 5)" in capsys.readouterr().err


def test_weights_to_load_of_another_model(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "step_00000001"
    model = recipe_to_dict(recipe_of(values, tmp_path / "recipe"))["model"]
    write_checkpoint(values, tmp_path, checkpoint, model={**model, "hidden_size": 7})
    values["checkpoint"] = {"load": str(checkpoint)}
    assert_invalid(
        values, tmp_path, capsys, checkpoint, "different model", "hidden_size 7 (recipe: 32)", "checkpoint.load"
    )


def test_wrong_language(values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values["data"]["sources"][1]["language"] = "de"
    path = values["data"]["sources"][1]["path"]
    assert_invalid(values, tmp_path, capsys, path, "language is en_clone", "recipe says de")


@pytest.mark.parametrize("ending", [".bin", ".idx", ".json"])
def test_missing_file(
    tiny: Tiny, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    prefix = copy_dataset(tiny.directory / "en", tmp_path)
    Path(f"{prefix}{ending}").unlink()
    values["data"]["sources"][0]["path"] = str(prefix)
    command = "dataset repair" if ending == ".idx" else "preprocess"
    assert_invalid(values, tmp_path, capsys, f"{prefix}{ending}: file not found", f"megatron-prealign {command}")


def test_validation_sources_are_checked_too(
    tiny: Tiny, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values["data"]["validation"] = [{"path": str(tmp_path / "nowhere"), "language": "en"}]
    assert_invalid(values, tmp_path, capsys, f"{tmp_path / 'nowhere'}.idx: file not found")


def test_dataset_of_another_tokenizer(
    tiny: Tiny, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = copy_dataset(tiny.directory / "en_clone", tmp_path)
    sidecar = json.loads(Path(f"{prefix}.json").read_text())
    sidecar["tokenizer"]["fingerprint"] = "sha256:other"
    Path(f"{prefix}.json").write_text(json.dumps(sidecar))
    values["data"]["sources"][1]["path"] = str(prefix)
    assert_invalid(values, tmp_path, capsys, prefix, "another tokenizer", f"expected data.tokenizer ({tiny.tokenizer})")


def test_missing_tokenizer(values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values["data"]["tokenizer"] = str(tmp_path / "gone")
    assert_invalid(values, tmp_path, capsys, f"{tmp_path / 'gone'}: tokenizer not found")


def test_table_of_another_tokenizer(
    tiny: Tiny, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.safetensors"
    replace(load_table(tiny.table), tokenizer_fingerprint="sha256:other").save(path)
    values["dictionary"]["table"] = str(path)
    assert_invalid(values, tmp_path, capsys, path, "tokenizer fingerprint sha256:other")


def test_missing_table(values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values["dictionary"]["table"] = str(tmp_path / "gone.safetensors")
    assert_invalid(values, tmp_path, capsys, f"table {tmp_path / 'gone.safetensors'} does not exist")


def test_vocabulary_too_small(
    tiny: Tiny, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values["model"]["vocab_size"] = 2 * VOCAB_SIZE - 1
    size = f"model.vocab_size is {2 * VOCAB_SIZE - 1}"
    assert_invalid(values, tmp_path, capsys, size, f"at least {2 * VOCAB_SIZE}", tiny.tokenizer)
    values["model"]["vocab_size"] = 2 * VOCAB_SIZE
    assert cli.main(["pretrain", "--config", write(values, tmp_path), "--validate"]) == 0


def test_equal_embeddings_of_clones_need_a_clone_tokenizer(
    tiny: Tiny, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values["model"]["equal_clone_embeddings"] = True
    assert cli.main(["pretrain", "--config", write(values, tmp_path), "--validate"]) == 0
    capsys.readouterr()
    values["model"]["vocab_size"] = 2 * VOCAB_SIZE + 2
    assert_invalid(values, tmp_path, capsys, f"model.vocab_size is {2 * VOCAB_SIZE + 2}", f"null or {2 * VOCAB_SIZE}")
    tokenizer = load_tokenizer(tiny.tokenizer)
    assert isinstance(tokenizer, CloneTokenizer)
    values["model"]["vocab_size"] = None
    with user_error("model.equal_clone_embeddings is true", "no clone language", tiny.tokenizer):
        model_vocab_size(recipe_of(values, tmp_path), tokenizer.base)


@pytest.mark.parametrize(
    ("world_size", "facts"),
    [
        ("3", ("training.global_batch_size is 8", "multiple of micro batch size x data-parallel size (4 x 3 = 12)")),
        ("0", ("world size is 0", "positive")),
        ("two", ("--world-size is two", "integer")),
    ],
)
def test_world_size_that_does_not_fit(
    values: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    world_size: str,
    facts: tuple[str, ...],
) -> None:
    assert_invalid(values, tmp_path, capsys, *facts, options=("--world_size", world_size))


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_truncated_dataset(
    tiny: Tiny, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    prefix = copy_dataset(tiny.directory / "en", tmp_path)
    path = Path(f"{prefix}{ending}")
    os.truncate(path, path.stat().st_size - 2)
    values["data"]["sources"][0]["path"] = str(prefix)
    assert_invalid(values, tmp_path, capsys, f"{path}: got {path.stat().st_size:,} bytes, expected")


def test_missing_word_bitmap(
    tiny: Tiny, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = copy_dataset(tiny.directory / "en", tmp_path)
    sidecar = load_sidecar(prefix)
    save_sidecar(replace(sidecar, segmenter="icu"), prefix)
    values["data"]["sources"][0]["path"] = str(prefix)
    assert_invalid(values, tmp_path, capsys, f"{prefix}.words: file not found", "--segmenter icu")
    words_path(prefix).write_bytes(bytes(-(-sidecar.tokens // 8)))
    assert cli.main(["pretrain", "--config", write(values, tmp_path), "--validate"]) == 0


def test_tokenizer_that_the_data_was_not_made_with(
    tiny: Tiny, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # All sidecars agree, only data.tokenizer differs.
    other = tmp_path / "other"
    train_tokenizer([str(tiny.directory / "corpus.jsonl")], other, VOCAB_SIZE - 1, "en_clone", show_progress=False)
    values["data"]["tokenizer"] = str(other)
    facts = (f"another tokenizer ({tiny.tokenizer})", f"expected data.tokenizer ({other})")
    assert_invalid(values, tmp_path, capsys, *facts)


@pytest.mark.parametrize("field", ["table", "evaluation_table"])
def test_table_of_other_languages(
    tiny: Tiny, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str
) -> None:
    path = tmp_path / "other.safetensors"
    replace(load_table(tiny.table), languages=["fr", "it"]).save(path)
    values["dictionary"][field] = str(path)
    facts = (f"dictionary.{field} {path}", "languages fr, it", "languages en, en_clone")
    assert_invalid(values, tmp_path, capsys, *facts)


def test_code_switch_to_a_language_missing_in_the_table(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values["code_switch"]["language_ratios"] = {"de": 0.5}
    assert_invalid(values, tmp_path, capsys, "code_switch.language_ratios has de,", ": en, en_clone;")


def test_code_switch_that_leaves_no_translation(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The table covers the language but has no translation into it.
    values["code_switch"]["language_weights"] = {"en": 1.0}
    assert_invalid(values, tmp_path, capsys, "none of the", "source_languages any", "language_weights of en")


def test_code_switch_of_only_held_out_words(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del values["alignment"]
    values["dictionary"]["held_out_fraction"] = 0.999999
    assert_invalid(values, tmp_path, capsys, "code_switch: none of the 0 keys")


def test_dictionary_with_too_few_words(
    tiny: Tiny, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = load_table(tiny.table)
    lengths, ends, held_out = np.diff(table.word_offsets), table.group_offsets, table.held_out_groups(0.05)
    # A word and its clone in each group, equally long.
    groups = [group for group in range(table.num_groups) if lengths[ends[group]] <= 8 and not held_out[group]]
    assert 0 < len(groups) < table.num_groups
    values["dictionary"]["held_out_fraction"] = 0.05
    values["alignment"]["words_per_step"] = 2 * len(groups)
    assert cli.main(["pretrain", "--config", write(values, tmp_path), "--validate"]) == 0
    capsys.readouterr()
    values["alignment"]["words_per_step"] = 2 * len(groups) + 1
    assert_invalid(
        values,
        tmp_path,
        capsys,
        f"alignment.words_per_step is {2 * len(groups) + 1}",
        f"at most {2 * len(groups)}",
        f"{len(groups)} of {table.num_groups} groups",
    )


@pytest.mark.parametrize(
    ("fields", "facts"),
    [
        ({"language_weights": {"en": 1, "de": 1}}, ("alignment.language_weights has de,", ": en, en_clone;")),
        ({"frequency_exponent": 0.5}, ("alignment.frequency_exponent is 0.5", "without a counting corpus")),
        ({"layers": "2-9"}, ("alignment.layers is 2-9", "6, 7, 8, 9", "0 to 5")),
    ],
)
def test_alignment_that_does_not_fit_the_table_or_the_model(
    values: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fields: dict[str, Any],
    facts: tuple[str, ...],
) -> None:
    values["alignment"].update(fields)
    assert_invalid(values, tmp_path, capsys, *facts)


@pytest.mark.parametrize(
    ("fields", "facts"),
    [
        ({"words_per_step": 33}, ("alignment.words_per_step is 33", "multiple of data-parallel size", "(2 x 1 = 2)")),
        ({"word_micro_batch_size": 32}, ("alignment.word_micro_batch_size is 32", "divisor of the 16 words")),
    ],
)
def test_words_that_do_not_divide(
    values: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fields: dict[str, Any],
    facts: tuple[object, ...],
) -> None:
    values["alignment"].update(fields)
    # Checked only if the number of processes is known.
    assert cli.main(["pretrain", "--config", write(values, tmp_path), "--validate"]) == 0
    capsys.readouterr()
    assert_invalid(values, tmp_path, capsys, *facts, options=("--world_size", "2"))
