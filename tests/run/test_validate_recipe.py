"""`pretrain --validate`: finds what does not fit, without torch."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
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


def refusal(
    values: dict[str, Any], directory: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...] = ()
) -> str:
    assert cli.main(["pretrain", "--config", write(values, directory), "--validate", *options]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == 1
    return output.err


def moved(prefix: Path, directory: Path) -> Path:
    """A copy of a dataset that a test may damage."""
    for ending in (".bin", ".idx", ".json"):
        shutil.copy(f"{prefix}{ending}", directory / f"{prefix.name}{ending}")
    return directory / prefix.name


def test_sound_recipe_needs_no_torch(tiny: Tiny, values: dict[str, Any], tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, "pretrain", "--config", write(values, tmp_path), "--validate"]
    done = subprocess.run([*command, "--world_size", "2"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    tokens = sum(json.loads(Path(f"{tiny.directory}/{name}.json").read_text())["tokens"] for name in ("en", "en_clone"))
    assert done.stdout == (
        f"the recipe is sound: {values['training']['train_iters']} steps of training on sources of {tokens:,} tokens, "
        "languages en, en_clone, alignment and code_switch\nthe run starts anew\n"
    )
    assert not (tmp_path / "run").exists()


def test_validation_set_that_is_trained_on(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = values["data"]["sources"][0]["path"]
    values["data"]["validation"] = [{"path": path, "language": "en"}]
    assert f"data.validation is ['{path}'], expected datasets that are not in data.sources" in refusal(
        values, tmp_path, capsys
    )


def test_less_text_than_one_sample(values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values["data"]["seq_length"] = 100_000_000
    assert "one sample needs data.seq_length + 1 = 100000001" in refusal(values, tmp_path, capsys)


def test_weights_to_load_that_are_not_there(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "no_checkpoint"
    empty.mkdir()
    for directory, reason in (("nowhere", ": there is no such directory"), (str(empty), "")):
        values["checkpoint"] = {"load": directory}
        expected = f"{directory} holds no complete checkpoint{reason}; expected a step_* directory"
        assert expected in refusal(values, tmp_path, capsys)


def write_checkpoint(values: dict[str, Any], tmp_path: Path, checkpoint: Path, **changes: Any) -> dict[str, Any]:
    """A checkpoint of the recipe's run after three steps, without tensors; returns what it says of itself."""
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


def test_start_is_told(values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told() -> str:
        assert cli.main(["pretrain", "--config", write(values, tmp_path), "--validate"]) == 0
        return capsys.readouterr().out.splitlines()[-1]

    other, own = tmp_path / "other" / "checkpoints", tmp_path / "run" / "checkpoints"
    write_checkpoint(values, tmp_path, other / "step_00000008")
    values["checkpoint"] = {"load": str(tmp_path / "other")}
    assert told() == f"the run takes the weights of {other / 'step_00000008'}"
    values["checkpoint"]["load_parts"] = "all"
    where = "(phase language_model, step 8, 2,500 tokens)"
    assert told() == f"the run goes on from another run's {other / 'step_00000008'} {where}"
    for step in (8, 9):
        write_checkpoint(values, tmp_path, own / f"step_{step:08d}")
    assert told() == f"the run resumes from {own / 'step_00000009'} {where}"
    (own / "step_00000009" / "state.json").write_text("")
    assert told() == f"the run resumes from {own / 'step_00000008'} {where}"
    values["checkpoint"]["on_damage"] = "fail"
    (own / "latest").write_text("step_00000009")
    message = refusal(values, tmp_path, capsys)
    assert f"{own / 'step_00000009'} is damaged: state.json has 0 bytes, expected" in message
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
    message = refusal(values, tmp_path, capsys)
    assert f"{checkpoint} is of another model: hidden_size 7 (recipe: 32)" in message
    assert "name another checkpoint in checkpoint.load" in message


def test_wrong_language(values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values["data"]["sources"][1]["language"] = "de"
    message = refusal(values, tmp_path, capsys)
    assert "en_clone is in language en_clone, but the recipe says de" in message


@pytest.mark.parametrize("ending", [".bin", ".idx", ".json"])
def test_missing_file(
    tiny: Tiny, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    prefix = moved(tiny.directory / "en", tmp_path)
    Path(f"{prefix}{ending}").unlink()
    values["data"]["sources"][0]["path"] = str(prefix)
    message = refusal(values, tmp_path, capsys)
    assert f"{prefix}{ending}" in message
    assert f"megatron-prealign {'dataset repair' if ending == '.idx' else 'preprocess'}" in message


def test_validation_sources_are_checked_too(
    tiny: Tiny, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values["data"]["validation"] = [{"path": str(tmp_path / "nowhere"), "language": "en"}]
    assert f"{tmp_path / 'nowhere'}.idx: no such file" in refusal(values, tmp_path, capsys)


def test_dataset_of_another_tokenizer(
    tiny: Tiny, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = moved(tiny.directory / "en_clone", tmp_path)
    sidecar = json.loads(Path(f"{prefix}.json").read_text())
    sidecar["tokenizer"]["fingerprint"] = "sha256:other"
    Path(f"{prefix}.json").write_text(json.dumps(sidecar))
    values["data"]["sources"][1]["path"] = str(prefix)
    message = refusal(values, tmp_path, capsys)
    assert f"{prefix} was made with another tokenizer" in message
    assert f"than data.tokenizer ({tiny.tokenizer})" in message


def test_tokenizer_that_is_not_there(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values["data"]["tokenizer"] = str(tmp_path / "gone")
    assert f"{tmp_path / 'gone'}: no such tokenizer" in refusal(values, tmp_path, capsys)


def test_table_of_another_tokenizer(
    tiny: Tiny, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.safetensors"
    replace(load_table(tiny.table), tokenizer_fingerprint="sha256:other").save(path)
    values["dictionary"]["table"] = str(path)
    message = refusal(values, tmp_path, capsys)
    assert f"{path}: built with tokenizer sha256:other" in message


def test_missing_table(values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values["dictionary"]["table"] = str(tmp_path / "gone.safetensors")
    assert "gone.safetensors: no such dictionary table" in refusal(values, tmp_path, capsys)


def test_vocabulary_too_small(
    tiny: Tiny, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values["model"]["vocab_size"] = 2 * VOCAB_SIZE - 1
    message = refusal(values, tmp_path, capsys)
    assert (
        f"model.vocab_size is {2 * VOCAB_SIZE - 1}, but the tokenizer {tiny.tokenizer} has {2 * VOCAB_SIZE} ids"
        in message
    )
    values["model"]["vocab_size"] = 2 * VOCAB_SIZE
    assert cli.main(["pretrain", "--config", write(values, tmp_path), "--validate"]) == 0


@pytest.mark.parametrize(
    ("world_size", "message"),
    [
        ("3", "training.global_batch_size is 8, expected a multiple of the micro batch x data-parallel size"),
        ("0", "the number of processes is 0, expected a number above 0"),
        ("two", "--world-size is two, expected a whole number"),
    ],
)
def test_world_size_that_does_not_fit(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], world_size: str, message: str
) -> None:
    assert message in refusal(values, tmp_path, capsys, ("--world_size", world_size))


@pytest.mark.parametrize("ending", [".bin", ".idx"])
def test_truncated_dataset(
    tiny: Tiny, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    prefix = moved(tiny.directory / "en", tmp_path)
    path = Path(f"{prefix}{ending}")
    os.truncate(path, path.stat().st_size - 2)
    values["data"]["sources"][0]["path"] = str(prefix)
    message = refusal(values, tmp_path, capsys)
    assert f"{path}: " in message and "bytes, expected" in message


def test_missing_bitmap_of_words(
    tiny: Tiny, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = moved(tiny.directory / "en", tmp_path)
    sidecar = load_sidecar(prefix)
    save_sidecar(replace(sidecar, segmenter="icu"), prefix)
    values["data"]["sources"][0]["path"] = str(prefix)
    error = refusal(values, tmp_path, capsys)
    assert f"{prefix}.words: no such file" in error and "--segmenter icu" in error
    words_path(prefix).write_bytes(bytes(-(-sidecar.tokens // 8)))
    assert cli.main(["pretrain", "--config", write(values, tmp_path), "--validate"]) == 0


def test_tokenizer_that_the_data_was_not_made_with(
    tiny: Tiny, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # All sidecars agree with each other, only data.tokenizer is another one.
    other = tmp_path / "other"
    train_tokenizer([str(tiny.directory / "corpus.jsonl")], other, VOCAB_SIZE - 1, "en_clone", show_progress=False)
    values["data"]["tokenizer"] = str(other)
    message = refusal(values, tmp_path, capsys)
    assert f"was made with another tokenizer ({tiny.tokenizer}) than data.tokenizer ({other})" in message


def test_table_of_other_languages(
    tiny: Tiny, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.safetensors"
    replace(load_table(tiny.table), languages=["fr", "it"]).save(path)
    values["dictionary"]["table"] = str(path)
    message = refusal(values, tmp_path, capsys)
    assert f"the dictionary table {path} is of fr, it, but the data is in en, en_clone" in message


def test_code_switch_of_a_language_that_the_table_lacks(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values["code_switch"]["language_ratios"] = {"de": 0.5}
    assert "code_switch.language_ratios names de, expected languages of" in refusal(values, tmp_path, capsys)


def test_code_switch_that_leaves_no_translation(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The table knows the language, but no translation is in it.
    values["code_switch"]["language_weights"] = {"en": 1.0}
    assert "is left (source_languages any, " in refusal(values, tmp_path, capsys)


def test_code_switch_of_held_out_words_alone(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del values["alignment"]
    values["dictionary"]["held_out_fraction"] = 0.999999
    assert "code_switch: none of the 0 keys of" in refusal(values, tmp_path, capsys)


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
    message = refusal(values, tmp_path, capsys)
    assert (
        f"alignment.words_per_step is {2 * len(groups) + 1}, but one draw can take {2 * len(groups)} words: of "
        f"{table.num_groups} groups in the dictionary, {len(groups)} are left"
    ) in message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"language_weights": {"en": 1, "de": 1}}, "alignment.language_weights names de, but the dictionary is of en,"),
        ({"frequency_exponent": 0.5}, "alignment.frequency_exponent is 0.5, but the dictionary was built without a"),
        ({"layers": "2-9"}, "alignment.layers is 2-9 with layer 6, 7, 8, 9, expected layers from 0 to 5"),
    ],
)
def test_alignment_that_does_not_fit_the_table_or_the_model(
    values: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fields: dict[str, Any],
    message: str,
) -> None:
    values["alignment"].update(fields)
    assert message in refusal(values, tmp_path, capsys)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"words_per_step": 33}, "alignment.words_per_step is 33, expected a multiple of data-parallel size x"),
        ({"word_micro_batch_size": 32}, "alignment.word_micro_batch_size is 32, expected null or a divisor of the 16"),
    ],
)
def test_words_that_do_not_divide(
    values: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fields: dict[str, Any],
    message: str,
) -> None:
    values["alignment"].update(fields)
    # Without a number of processes nothing is known of it.
    assert cli.main(["pretrain", "--config", write(values, tmp_path), "--validate"]) == 0
    capsys.readouterr()
    assert message in refusal(values, tmp_path, capsys, ("--world_size", "2"))
