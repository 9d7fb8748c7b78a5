"""What the trainer saved, as transformers opens it."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import Tiny
from support.trained_models import FAMILIES, NOTHING, recipe_values, train, verify
from support.workers import WorkerPool
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_prealign import cli
from megatron_prealign.checkpoint.manifest import write_manifest
from megatron_prealign.checkpoint.single_process.reader import ShardReader
from megatron_prealign.conversion import import_plan
from megatron_prealign.conversion import to_hf as conversion
from megatron_prealign.conversion.from_hf import from_huggingface
from megatron_prealign.conversion.safetensors_shards import INDEX, SafetensorsWriter
from megatron_prealign.conversion.to_hf import ToHuggingFace, to_huggingface
from megatron_prealign.errors import UserError
from megatron_prealign.files import atomic
from megatron_prealign.tokenizer.load import load_tokenizer

# fp32, sums in another order through four layers; logits are of order 1.
TOLERANCE = 1e-5
LAYOUT = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}


@dataclass(frozen=True)
class Trained:
    family: str
    run: Path
    """Trained by one process."""
    elsewhere: Path
    """The same weights, saved by four."""
    model: Path
    """Converted from `run`."""


def convert(source: Path, output: Path, **options: Any) -> Any:
    return to_huggingface(source, output, ToHuggingFace(**options), show_progress=False)


@pytest.fixture(scope="module", params=FAMILIES)
def trained(
    request: pytest.FixtureRequest, tiny: Tiny, workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    directory = tmp_path_factory.mktemp(request.param)
    one, four = directory / "one", directory / "four"
    workers.run(1, train, recipe_values(tiny, one, request.param), str(directory))
    values = recipe_values(
        tiny,
        four,
        request.param,
        parallel=LAYOUT,
        checkpoint={"load": str(one)},
        optimizer={"lr": NOTHING, "weight_decay": 0.0},
        training={"train_iters": 1},
    )
    workers.run(4, train, values, str(directory))
    convert(one, directory / "model")
    return Trained(request.param, one, four, directory / "model")


def test_files_are_the_same_for_every_layout(trained: Trained, tmp_path: Path) -> None:
    convert(trained.elsewhere, tmp_path / "model")
    names = sorted(file.name for file in trained.model.iterdir())
    assert names == sorted(file.name for file in (tmp_path / "model").iterdir())
    for name in set(names) - {"README.md"}:
        assert (trained.model / name).read_bytes() == (tmp_path / "model" / name).read_bytes(), name


def test_both_models_are_one(trained: Trained, workers: WorkerPool) -> None:
    (report,) = workers.run(1, verify, str(trained.run), str(trained.model), {"tolerance": TOLERANCE})
    assert report.agrees and report.same_choice == 1.0
    assert [place.name for place in report.places] == [
        "embedding",
        *(f"layer {number}" for number in range(1, 5)),
        "final norm",
        "logits",
    ]
    assert max(place.difference for place in report.places) < TOLERANCE
    # What has no numbers would agree, too.
    assert min(place.scale for place in report.places) > 0.01


def test_transformers_opens_and_generates(trained: Trained, tiny: Tiny) -> None:
    model, tokenizer = (kind.from_pretrained(trained.model) for kind in (AutoModelForCausalLM, AutoTokenizer))
    mcore = load_tokenizer(tiny.tokenizer)
    ids = tokenizer("The value of an expression", return_tensors="pt").input_ids
    assert ids[0].tolist() == mcore.encode("The value of an expression")
    assert model.config.vocab_size == mcore.vocab_size == len(tokenizer) == model.get_input_embeddings().weight.shape[0]
    assert model.generation_config.eos_token_id == model.config.eos_token_id == mcore.eod_id == tokenizer.eos_token_id
    continued = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert continued.shape[1] > ids.shape[1] and tokenizer.decode(continued[0])
    stored = load_file(trained.model / "model.safetensors")
    tied = model.config.tie_word_embeddings
    assert tied == (trained.family in ("gpt2", "qwen3")) == ("lm_head.weight" not in stored)


def test_the_card_says_what_the_run_knows(trained: Trained) -> None:
    card = (trained.model / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n") and "step_00000002" in card
    for part in (
        "en_clone",
        "## Measures",
        "AutoModelForCausalLM",
        "`<eod>` (id 0)",
        "megatron-core",
        "train_iters: 2",
    ):
        assert part in card, part
    # Nothing of where it was trained.
    assert str(trained.run.parent) not in card


@pytest.fixture(scope="module")
def half(tiny: Tiny, workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 run."""
    directory = tmp_path_factory.mktemp("half")
    values = recipe_values(tiny, directory / "run", "llama", training={"precision": "bf16"})
    workers.run(1, train, values, str(directory))
    return directory / "run"


def test_types_of_a_bf16_run(half: Path, tmp_path: Path) -> None:
    found = {dtype: convert(half, tmp_path / str(dtype), dtype=dtype) for dtype in (None, "bf16", "fp16", "fp32")}
    tensors = {dtype: load_file(tmp_path / str(dtype) / "model.safetensors") for dtype in found}
    kinds = {None: torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    finer = 0
    for dtype, kind in kinds.items():
        assert json.loads((tmp_path / str(dtype) / "config.json").read_text())["torch_dtype"] == found[dtype].dtype
        for name, tensor in tensors[dtype].items():
            assert tensor.dtype is kind
            # The optimizer's own numbers, of which the model's are the rounded ones.
            assert torch.equal(tensor.bfloat16(), tensors[None][name]) or dtype == "fp16"
            finer += dtype == "fp32" and not torch.equal(tensor, tensor.bfloat16().float())
            if dtype == "fp16":
                assert torch.equal(tensor, tensors[None][name].half())
    assert found["fp32"].from_masters and not found[None].from_masters and finer > 10


def test_shards_and_their_index(half: Path, tmp_path: Path) -> None:
    convert(half, tmp_path / "whole", dtype="fp32")
    found = convert(half, tmp_path / "parts", dtype="fp32", shard_bytes=100_000)
    index = json.loads((tmp_path / "parts" / INDEX).read_text())
    files = sorted(tmp_path.glob("parts/*.safetensors"))
    assert [file.name for file in files] == sorted(set(index["weight_map"].values())) and len(files) == found.files > 2
    joined = {name: tensor for file in files for name, tensor in load_file(file).items()}
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert joined.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(joined[name], tensor) for name, tensor in whole.items())
    assert sum(tensor.nbytes for tensor in whole.values()) == index["metadata"]["total_size"] == found.bytes
    for file in files:
        own = load_file(file)
        assert len(own) == 1 or sum(tensor.nbytes for tensor in own.values()) <= 100_000
        assert {name for name, place in index["weight_map"].items() if place == file.name} == own.keys()
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "parts").state_dict()
    assert all(torch.equal(opened[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (1e6, "fp16", r"linear_fc2.weight, layer 1 has numbers up to 1e\+06, too large for torch.float16; choose bf16"),
        (
            float("nan"),
            None,
            r"1 of the .* numbers of decoder.layers.mlp.linear_fc2.weight, layer 1 are NaN or infinite",
        ),
        (float("-inf"), "bf16", r"linear_fc2.weight, layer 1 are NaN or infinite"),
    ],
)
def test_numbers_that_cannot_be_carried_over(
    half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, dtype: str | None, message: str
) -> None:
    model = tmp_path / "model"
    convert(half, model, dtype="fp32")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    # It would not take them.
    monkeypatch.setattr(import_plan, "check_numbers", lambda *_: None)
    from_huggingface(model, tmp_path / "checkpoint")
    with pytest.raises(UserError, match=message) as caught:
        convert(tmp_path / "checkpoint", tmp_path / "out", dtype=dtype)
    # No training of ours.
    assert "broken down" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "checkpoint"}


def test_a_damaged_checkpoint_is_refused(half: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(half / "checkpoints" / "step_00000002", tmp_path / "step_00000002"))
    shard = max(checkpoint.glob("*.distcp"), key=lambda file: file.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=rf"{shard.name} has another checksum"):
        convert(checkpoint, tmp_path / "out", checksums=True)
    shard.write_bytes(data[:-1])
    with pytest.raises(UserError, match=rf"{shard.name} has .* bytes, expected"):
        convert(checkpoint, tmp_path / "out")
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        convert(checkpoint, tmp_path / "out")


def test_tensors_of_another_model_are_refused(half: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(half / "checkpoints" / "step_00000002", tmp_path / "step_00000002"))
    state = json.loads((checkpoint / "state.json").read_text())
    state["model"]["num_layers"] = 5
    state["model"]["family"] = "qwen2"
    (checkpoint / "state.json").write_text(json.dumps(state))
    write_manifest(checkpoint, {})
    with pytest.raises(UserError, match=r"linear_qkv.weight is \[4, .*linear_qkv.bias is missing"):
        convert(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("values", [{"vocab_size": 0}, {"metrics": [1]}])
def test_a_state_that_cannot_be_is_refused(half: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    checkpoint = Path(shutil.copytree(half / "checkpoints" / "step_00000002", tmp_path / "step_00000002"))
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(state | values))
    write_manifest(checkpoint, {})
    with pytest.raises(UserError, match="state.json is damaged"):
        convert(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def changes(monkeypatch: pytest.MonkeyPatch, action: Callable[[int], None]) -> None:
    """Calls `action` with a number before every tensor and before the renaming."""
    count = iter(range(10**6))

    def before(function: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            action(next(count))
            return function(*args, **kwargs)

        return called

    monkeypatch.setattr(SafetensorsWriter, "add", before(SafetensorsWriter.add))
    monkeypatch.setattr(SafetensorsWriter, "close", before(SafetensorsWriter.close))
    monkeypatch.setattr(atomic.os, "replace", before(atomic.os.replace))


def test_a_killed_conversion_leaves_nothing_that_looks_complete(
    half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Opening the tokenizer again is the slow part, and has been done.
    monkeypatch.setattr(conversion, "check_tokenizer", lambda *_: [])

    class KilledError(BaseException):
        pass

    steps: list[int] = []
    with monkeypatch.context() as patched:
        changes(patched, steps.append)
        convert(half, tmp_path / "whole")
    assert len(steps) > 30
    for stop in steps[::6] + steps[-2:]:

        def kill(step: int, stop: int = stop) -> None:
            if step == stop:
                raise KilledError

        with monkeypatch.context() as patched:
            changes(patched, kill)
            # A killed process removes nothing.
            patched.setattr(atomic.shutil, "rmtree", lambda *_, **__: None)
            with pytest.raises(KilledError):
                convert(half, tmp_path / "model")
        assert [path.name for path in tmp_path.iterdir() if path.name != "whole"] == [".model.incomplete"]
        shutil.rmtree(tmp_path / ".model.incomplete")
    convert(half, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_a_full_disk_is_one_line(half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "check_tokenizer", lambda *_: [])
    write = conversion.SafetensorsWriter._write

    def full(self: Any, file: Any, name: str, tensor: Any) -> None:
        if "layers.2" in name:
            raise OSError(28, "No space left on device")
        write(self, file, name, tensor)

    monkeypatch.setattr(SafetensorsWriter, "_write", full)
    with pytest.raises(UserError, match="model: No space left on device; nothing was written"):
        convert(half, tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def touched(*_: Any, **__: Any) -> None:
        raise AssertionError("CUDA was touched")

    for name in ("_lazy_init", "current_device", "synchronize", "init"):
        monkeypatch.setattr(torch.cuda, name, touched)
    yield


def test_the_command(half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_cuda: None) -> None:
    output = tmp_path / "model"
    arguments = ["convert", "to-hf", "--checkpoint", str(half), "--output", str(output), "--shard-size"]
    assert cli.main([*arguments, "10 potatoes"]) == 2
    assert "--shard-size is '10 potatoes', expected a size" in capsys.readouterr().err
    assert cli.main([*arguments, "1MB", "--verify", "checksums"]) == 0
    assert f"wrote {output}" in capsys.readouterr().out
    assert cli.main([*arguments, "1MB"]) == 2
    assert "model exists; choose another path, or replace it with --overwrite" in capsys.readouterr().err
    assert cli.main([*arguments, "1MB", "--overwrite", "--tokenizer", "copy"]) == 0
    assert "clone.json" in {file.name for file in output.iterdir()}
    checkpoint = half / "checkpoints" / "step_00000002"
    assert cli.main([*arguments[:-3], "--output", str(checkpoint), "--overwrite"]) == 2
    assert "the checkpoint itself" in capsys.readouterr().err
    with ShardReader(checkpoint) as reader:
        assert reader.tensors
    # Something else than a model is not replaced.
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    assert cli.main([*arguments[:-3], "--output", str(tmp_path / "other"), "--overwrite"]) == 2
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"


def test_a_model_that_differs(half: Path, tmp_path: Path, workers: WorkerPool) -> None:
    model = tmp_path / "model"
    convert(half, model)
    weights = load_file(model / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    weights[name][1, 1] += 0.5
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    (report,) = workers.run(1, verify, str(half), str(model), {})
    assert len(report.tensors) == len(weights)
    assert [each.name for each in report.different_tensors] == [name] and not report.agrees
    assert report.first_different == "layer 3"
    del weights[name]
    weights["model.layers.2.extra"] = torch.zeros(1)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))
    (report,) = workers.run(1, verify, str(half), str(model), {"logits": False})
    problems = {each.name: each.problem for each in report.different_tensors}
    assert problems == {name: "missing in the directory", "model.layers.2.extra": "the checkpoint has none"}
    assert report.config == ["rotary_base is 500000.0, expected 10000.0"]


def test_the_verify_command_tells_by_its_status(half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    convert(half, model)
    capsys.readouterr()
    arguments = ["convert", "verify", "--checkpoint", str(half), "--model", str(model), "--no-logits"]
    assert cli.main([*arguments, "--output", str(tmp_path / "report.json")]) == 0
    assert "the two are the same model" in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())["agrees"] is True
    # As `from-hf` takes it.
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"made_up": 1}))
    assert cli.main(arguments) == 2
    assert "--ignore-config-field" in capsys.readouterr().err
    assert cli.main([*arguments, "--ignore-config-field", "made_up"]) == 0
    (model / "config.json").write_text(json.dumps(config))
    (tmp_path / "text").write_bytes(b"\xff")
    assert cli.main([*arguments, "--text", str(tmp_path / "text")]) == 2
    (tmp_path / "text").write_bytes(b"")
    assert cli.main([*arguments, "--text", str(tmp_path / "text")]) == 2
    assert f"--text {tmp_path / 'text'} is empty" in capsys.readouterr().err
    assert cli.main([*arguments, "--output", str(tmp_path / "report.json")]) == 2
    assert "report.json is there already" in capsys.readouterr().err
    assert cli.main([*arguments, "--output", str(tmp_path / "report.json"), "--overwrite"]) == 0
    (model / "tokenizer.json").write_text(
        (model / "tokenizer.json")
        .read_text(encoding="utf-8")
        .replace('"add_prefix_space": false', '"add_prefix_space": true'),
        encoding="utf-8",
    )
    assert cli.main(arguments) == 1
    assert "tokenizer   " in capsys.readouterr().out
    shutil.rmtree(model)
    assert cli.main(arguments) == 2
