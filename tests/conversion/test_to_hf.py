"""`convert to-hf` and `convert verify`: checkpoints of the trainer, loaded by transformers."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.marks import slow_except
from support.messages import assert_facts, assert_refused, user_error
from support.tiny import Tiny
from support.trained_models import FAMILIES, NO_UPDATE_LR, recipe_values, train, verify
from support.workers import WorkerPool
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_prealign import cli
from megatron_prealign.checkpoint.manifest import write_manifest
from megatron_prealign.checkpoint.single_process.reader import ShardReader
from megatron_prealign.conversion import import_plan
from megatron_prealign.conversion import to_hf as conversion
from megatron_prealign.conversion.from_hf import from_huggingface
from megatron_prealign.conversion.safetensors_shards import INDEX, SafetensorsWriter
from megatron_prealign.conversion.to_hf import ConvertSettings, to_huggingface
from megatron_prealign.files import atomic
from megatron_prealign.tokenizer.load import load_tokenizer

# fp32, sums in another order through four layers; logits are of order 1.
TOLERANCE = 1e-5
LAYOUT = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}


@dataclass(frozen=True)
class Trained:
    family: str
    run: Path
    """Run of one process."""
    parallel: Path
    """The same weights, saved by four processes."""
    model: Path
    """Converted from `run`."""


def convert(source: Path, output: Path, **options: Any) -> Any:
    return to_huggingface(source, output, ConvertSettings(**options), show_progress=False)


@pytest.fixture(scope="module", params=slow_except(FAMILIES, "llama"))
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
        optimizer={"lr": NO_UPDATE_LR, "weight_decay": 0.0},
        training={"train_iters": 1},
    )
    workers.run(4, train, values, str(directory))
    convert(one, directory / "model")
    return Trained(request.param, one, four, directory / "model")


def test_files_are_the_same_for_every_layout(trained: Trained, tmp_path: Path) -> None:
    convert(trained.parallel, tmp_path / "model")
    names = sorted(file.name for file in trained.model.iterdir())
    assert names == sorted(file.name for file in (tmp_path / "model").iterdir())
    for name in set(names) - {"README.md"}:
        assert (trained.model / name).read_bytes() == (tmp_path / "model" / name).read_bytes(), name


def test_both_models_are_the_same(trained: Trained, workers: WorkerPool) -> None:
    (report,) = workers.run(1, verify, str(trained.run), str(trained.model), {"tolerance": TOLERANCE})
    assert report.agrees and report.top1_agreement == 1.0
    assert [state.name for state in report.states] == [
        "embedding",
        *(f"layer {number}" for number in range(1, 5)),
        "final norm",
        "logits",
    ]
    assert max(state.difference for state in report.states) < TOLERANCE
    # States of zeros would match, too.
    assert min(state.scale for state in report.states) > 0.01


def test_transformers_loads_and_generates(trained: Trained, tiny: Tiny) -> None:
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


def test_the_card_describes_the_run(trained: Trained) -> None:
    card = (trained.model / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n") and "step_00000002" in card
    for part in (
        "en_clone",
        "## Metrics",
        "AutoModelForCausalLM",
        "`<eod>` (id 0)",
        "megatron-core",
        "train_iters: 2",
    ):
        assert part in card, part
    # No paths of the machine it was trained on.
    assert str(trained.run.parent) not in card


@pytest.fixture(scope="module")
def half(tiny: Tiny, workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 run."""
    directory = tmp_path_factory.mktemp("half")
    values = recipe_values(tiny, directory / "run", "llama", training={"precision": "bf16"})
    workers.run(1, train, values, str(directory))
    return directory / "run"


def test_dtypes_of_a_bf16_run(half: Path, tmp_path: Path) -> None:
    results = {dtype: convert(half, tmp_path / str(dtype), dtype=dtype) for dtype in (None, "bf16", "fp16", "fp32")}
    tensors = {dtype: load_file(tmp_path / str(dtype) / "model.safetensors") for dtype in results}
    torch_dtypes = {None: torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    finer = 0
    for dtype, torch_dtype in torch_dtypes.items():
        assert json.loads((tmp_path / str(dtype) / "config.json").read_text())["torch_dtype"] == results[dtype].dtype
        for name, tensor in tensors[dtype].items():
            assert tensor.dtype is torch_dtype
            # The model's weights are the rounded fp32 master weights of the optimizer.
            assert torch.equal(tensor.bfloat16(), tensors[None][name]) or dtype == "fp16"
            finer += dtype == "fp32" and not torch.equal(tensor, tensor.bfloat16().float())
            if dtype == "fp16":
                assert torch.equal(tensor, tensors[None][name].half())
    assert results["fp32"].from_master_weights and not results[None].from_master_weights and finer > 10


def test_shards_and_their_index(half: Path, tmp_path: Path) -> None:
    convert(half, tmp_path / "single", dtype="fp32")
    result = convert(half, tmp_path / "parts", dtype="fp32", shard_bytes=100_000)
    index = json.loads((tmp_path / "parts" / INDEX).read_text())
    files = sorted(tmp_path.glob("parts/*.safetensors"))
    assert [file.name for file in files] == sorted(set(index["weight_map"].values())) and len(files) == result.files > 2
    merged = {name: tensor for file in files for name, tensor in load_file(file).items()}
    single = load_file(tmp_path / "single" / "model.safetensors")
    assert merged.keys() == single.keys() == index["weight_map"].keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in single.items())
    assert sum(tensor.nbytes for tensor in single.values()) == index["metadata"]["total_size"] == result.bytes
    for file in files:
        own = load_file(file)
        assert len(own) == 1 or sum(tensor.nbytes for tensor in own.values()) <= 100_000
        assert {name for name, place in index["weight_map"].items() if place == file.name} == own.keys()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "parts").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in single.items())


@pytest.mark.parametrize(
    ("value", "dtype", "facts"),
    [
        (1e6, "fp16", ("linear_fc2.weight, layer 1", "1e+06", "torch.float16", "bf16")),
        (float("nan"), None, ("1 of ", "decoder.layers.mlp.linear_fc2.weight, layer 1", "NaN")),
        (float("-inf"), "bf16", ("linear_fc2.weight, layer 1", "NaN or Inf")),
    ],
)
def test_values_that_cannot_be_converted(
    half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, dtype: str | None, facts: tuple[str, ...]
) -> None:
    model = tmp_path / "model"
    convert(half, model, dtype="fp32")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    # The import would refuse these values.
    monkeypatch.setattr(import_plan, "check_finite", lambda *_: None)
    from_huggingface(model, tmp_path / "checkpoint")
    with user_error(tmp_path / "checkpoint", *facts) as caught:
        convert(tmp_path / "checkpoint", tmp_path / "out", dtype=dtype)
    # These weights are not of a run.
    assert "diverged" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "checkpoint"}


def test_a_corrupt_checkpoint_is_refused(half: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(half / "checkpoints" / "step_00000002", tmp_path / "step_00000002"))
    shard = max(checkpoint.glob("*.distcp"), key=lambda file: file.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with user_error(checkpoint, shard.name, "checksum"):
        convert(checkpoint, tmp_path / "out")
    convert(checkpoint, tmp_path / "unverified", verify="sizes")
    shard.write_bytes(data[:-1])
    with user_error(checkpoint, shard.name, f"{len(data) - 1:,}", f"{len(data):,}"):
        convert(checkpoint, tmp_path / "out")
    (checkpoint / "manifest.json").unlink()
    with user_error(checkpoint, "no complete checkpoint"):
        convert(checkpoint, tmp_path / "out")


def test_tensors_of_another_model_are_refused(half: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(half / "checkpoints" / "step_00000002", tmp_path / "step_00000002"))
    state = json.loads((checkpoint / "state.json").read_text())
    state["model"]["num_layers"] = 5
    state["model"]["family"] = "qwen2"
    (checkpoint / "state.json").write_text(json.dumps(state))
    write_manifest(checkpoint, {})
    with user_error(checkpoint, "qwen2", "linear_qkv.weight is [4, ", "linear_qkv.bias is missing"):
        convert(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("values", [{"vocab_size": 0}, {"metrics": [1]}])
def test_an_invalid_state_is_refused(half: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    checkpoint = Path(shutil.copytree(half / "checkpoints" / "step_00000002", tmp_path / "step_00000002"))
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(state | values))
    write_manifest(checkpoint, {})
    with user_error(checkpoint / "state.json", "corrupt", *values):
        convert(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def call_before_writes(monkeypatch: pytest.MonkeyPatch, action: Callable[[int], None]) -> None:
    """Calls `action` with the number of the call before every tensor and before the rename."""
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
    # Loading the tokenizer again is slow and tested above.
    monkeypatch.setattr(conversion, "check_tokenizer", lambda *_: [])

    class KilledError(BaseException):
        pass

    steps: list[int] = []
    with monkeypatch.context() as patched:
        call_before_writes(patched, steps.append)
        convert(half, tmp_path / "complete")
    assert len(steps) > 30
    for stop in steps[::6] + steps[-2:]:

        def kill(step: int, stop: int = stop) -> None:
            if step == stop:
                raise KilledError

        with monkeypatch.context() as patched:
            call_before_writes(patched, kill)
            # A killed process removes nothing.
            patched.setattr(atomic.shutil, "rmtree", lambda *_, **__: None)
            with pytest.raises(KilledError):
                convert(half, tmp_path / "model")
        assert [path.name for path in tmp_path.iterdir() if path.name != "complete"] == [".model.incomplete"]
        shutil.rmtree(tmp_path / ".model.incomplete")
    convert(half, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (
        tmp_path / "complete" / "model.safetensors"
    ).read_bytes()


def test_a_full_disk_is_a_one_line_error(half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "check_tokenizer", lambda *_: [])
    write = conversion.SafetensorsWriter._write

    def full(self: Any, file: Any, name: str, tensor: Any) -> None:
        if "layers.2" in name:
            raise OSError(28, "No space left on device")
        write(self, file, name, tensor)

    monkeypatch.setattr(SafetensorsWriter, "_write", full)
    with user_error(tmp_path / "model", "No space left on device"):
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
    assert_refused(cli.main([*arguments, "10 potatoes"]), capsys.readouterr().err, "--shard-size", "10 potatoes", "1MB")
    assert cli.main([*arguments, "1MB", "--verify", "checksums"]) == 0
    assert f"wrote {output}" in capsys.readouterr().out
    assert cli.main([*arguments, "1MB"]) == 2
    assert_facts(capsys.readouterr().err, output, "exists", "--overwrite")
    assert cli.main([*arguments, "1MB", "--overwrite", "--tokenizer", "copy"]) == 0
    assert "clone.json" in {file.name for file in output.iterdir()}
    checkpoint = half / "checkpoints" / "step_00000002"
    assert cli.main([*arguments[:-3], "--output", str(checkpoint), "--overwrite"]) == 2
    assert "the checkpoint itself" in capsys.readouterr().err
    with ShardReader(checkpoint) as reader:
        assert reader.tensors
    # Directories without a model are not replaced.
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
    assert problems.keys() == {name, "model.layers.2.extra"}
    assert "missing" in problems[name] and "not in the checkpoint" in problems["model.layers.2.extra"]
    (difference,) = report.config
    assert_facts(difference, "rotary_base", 500000.0, 10000.0)


def test_verify_refuses_several_processes_before_it_loads_anything(tmp_path: Path) -> None:
    code = (
        "import sys; from megatron_prealign.cli import main\n"
        f"status = main(['convert', 'verify', '--checkpoint', '{tmp_path}', '--model', '{tmp_path}'])\n"
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    for rank in ("0", "1"):
        environment = {**os.environ, "WORLD_SIZE": "2", "RANK": rank}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        # Every rank has the same error; rank 0 prints it.
        assert done.returncode == 2 and done.stderr.count("WORLD_SIZE") == (rank == "0"), done.stderr


def test_the_exit_status_of_verify(half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    convert(half, model)
    capsys.readouterr()
    arguments = ["convert", "verify", "--checkpoint", str(half), "--model", str(model), "--no-logits"]
    assert cli.main([*arguments, "--output", str(tmp_path / "report.json")]) == 0
    assert "the two are the same model" in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())["agrees"] is True
    # The same option as of `from-hf`.
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
    assert_facts(capsys.readouterr().err, "--text", tmp_path / "text", "empty")
    assert cli.main([*arguments, "--output", str(tmp_path / "report.json")]) == 2
    assert_facts(capsys.readouterr().err, tmp_path / "report.json", "exists", "--overwrite")
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
