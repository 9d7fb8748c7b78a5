"""`convert from-hf`: vocabulary, dtypes and layouts of its output, what it refuses, and that it leaves a complete
directory or none."""

import os
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.hf_models import (
    CONFIGS,
    ROWS,
    SHAPE,
    TOKENS,
    change_config,
    make_model,
    save_model,
    save_tokenizer,
)
from support.mcore_models import parameters
from support.messages import assert_facts
from support.workers import WorkerPool
from transformers import BertConfig, BertModel

from megatron_prealign.checkpoint.manifest import MANIFEST, find_damage, read_manifest
from megatron_prealign.checkpoint.single_process.reader import ShardReader
from megatron_prealign.checkpoint.state import read_state
from megatron_prealign.cli import main
from megatron_prealign.conversion.from_hf import ImportResult, from_huggingface
from megatron_prealign.conversion.hf_directory import HuggingFaceDirectory
from megatron_prealign.errors import UserError
from megatron_prealign.tokenizer.load import load_tokenizer

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories that tests must not change."""
    directory = tmp_path_factory.mktemp("saved")
    return {name: save_model(make_model(name), directory / name) for name in ("llama", "llama3_tied", "gpt2")}


@pytest.fixture
def llama(saved: dict[str, Path], tmp_path: Path) -> Path:
    """A directory that tests may change."""
    shutil.copytree(saved["llama"], tmp_path / "llama")
    return tmp_path / "llama"


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    with ShardReader(directory) as reader:
        return {key: reader.read(key) for key in reader.tensors}


def change_tensors(directory: Path, changes: dict[str, torch.Tensor | None]) -> None:
    file = directory / "model.safetensors"
    tensors = {**load_file(file), **changes}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}, file)


def refusal(directory: Path, output: Path, **options: Any) -> str:
    """The one-line message; checks that no output is left."""
    before = set(os.listdir(output.parent))
    with pytest.raises(UserError) as caught:
        from_huggingface(directory, output, **options)
    assert "\n" not in str(caught.value)
    assert set(os.listdir(output.parent)) == before
    return str(caught.value)


def shard_of(full: torch.Tensor, name: str, partition_dim: int | None, rank: int) -> torch.Tensor:
    """The shard of one of two tensor-parallel ranks."""
    if partition_dim is None:
        return full
    if name.endswith("mlp.linear_fc1.weight"):
        # Gate and up projection are sharded separately.
        return torch.cat([part.chunk(2)[rank] for part in full.chunk(2)])
    return full.chunk(2, dim=partition_dim)[rank]


@pytest.mark.slow
@pytest.mark.parametrize(("written", "read"), [((1, 1), (2, 2)), ((2, 2), (2, 1))])
def test_it_loads_in_any_layout(
    saved: dict[str, Path], tmp_path: Path, workers: WorkerPool, written: tuple[int, int], read: tuple[int, int]
) -> None:
    """Written in one layout, read in another and by one process; the vocabulary is padded to 384 and to 512."""
    directory = tmp_path / "mcore"
    from_huggingface(saved["llama"], directory, tensor_parallel=written[0], pipeline_parallel=written[1])
    assert len(list(directory.glob("*.distcp"))) == written[0] * written[1]
    single = workers.run(1, parameters, str(directory), {})[0]
    assert single["embedding.word_embeddings.weight"][0].shape == (384, 32)
    hf = load_file(saved["llama"] / "model.safetensors")
    for name, other in ((EMBEDDING, "model.embed_tokens.weight"), (OUTPUT, "lm_head.weight")):
        assert torch.equal(single[name][0][:ROWS], hf[other])
    layout = {"tensor_model_parallel_size": read[0], "pipeline_model_parallel_size": read[1]}
    ranks = workers.run(read[0] * read[1], parameters, str(directory), layout)
    seen = set()
    for shards in ranks:
        for name, (shard, partition_dim, rank) in shards.items():
            full = single[name][0]
            if name in (EMBEDDING, OUTPUT):
                full = torch.cat([full, torch.zeros(512 - len(full), *full.shape[1:])])
            assert torch.equal(shard, shard_of(full, name, partition_dim, rank)), name
            seen.add(name)
    assert seen == single.keys()


def test_written_metadata(saved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "mcore"
    argv = ["--model", saved["llama3_tied"], "--output", output, "--tensor", 2, "--make-vocab-size-divisible-by", 8]
    assert main(["convert", "from-hf", *map(str, argv)]) == 0
    text = capsys.readouterr().out
    assert_facts(text, "261 ids", "padded to 272", "tokenizer has 257")
    assert "note:" not in text
    model = make_model("llama3_tied")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert_facts(text, f"{count:,} parameters", "38 tensors", "float32")
    summary = read_state(output)
    assert summary["kind"] == "weights" and summary["vocab_size"] == ROWS and summary["padded_vocab_size"] == 272
    assert summary["model"]["rope_scaling"]["rope_type"] == "llama3"
    assert summary["model"]["share_embeddings_and_output_weights"] is True
    assert summary["layout"]["tensor_model_parallel_size"] == 2
    assert summary["tokenizer_fingerprint"] == load_tokenizer(saved["llama3_tied"]).fingerprint
    assert load_tokenizer(output / "tokenizer").fingerprint == summary["tokenizer_fingerprint"]
    assert not (output / "tokenizer" / "model.safetensors").exists()
    assert find_damage(output, read_manifest(output), checksums=True) == []
    weights = weights_of(output)
    assert OUTPUT not in weights
    assert not weights[EMBEDDING][ROWS:].any()
    assert os.listdir(tmp_path) == ["mcore"]


def test_rows_for_new_tokens_are_the_mean(saved: dict[str, Path], llama: Path, tmp_path: Path) -> None:
    """A tokenizer with 20 words more than the 257 with which the model was made: 16 more than its embedding rows."""
    save_tokenizer(llama, extra=20)
    done = from_huggingface(llama, tmp_path / "mcore")
    assert (done.vocab_size, done.added_rows, done.dropped_rows, done.tokenizer_size) == (277, 16, 0, 277)
    hf = load_file(saved["llama"] / "model.safetensors")
    for key, name in ((EMBEDDING, "model.embed_tokens.weight"), (OUTPUT, "lm_head.weight")):
        mcore = weights_of(tmp_path / "mcore")[key]
        assert torch.equal(mcore[:ROWS], hf[name])
        mean = hf[name].mean(0)
        # A mean of 261 values of order 0.2, in single against double precision.
        torch.testing.assert_close(mcore[ROWS:277], mean.expand(16, -1), rtol=0, atol=1e-7)
        assert mcore.shape[0] == 384 and not mcore[277:].any()


def test_the_mean_excludes_rows_without_a_token(saved: dict[str, Path], tmp_path: Path) -> None:
    done = from_huggingface(saved["llama"], tmp_path / "mcore", vocab_size=265)
    assert (done.vocab_size, done.added_rows) == (265, 4)
    rows = load_file(saved["llama"] / "model.safetensors")["lm_head.weight"][:TOKENS]
    mcore = weights_of(tmp_path / "mcore")[OUTPUT][ROWS:265]
    torch.testing.assert_close(mcore, rows.mean(0).expand(4, -1), rtol=0, atol=1e-7)


def test_rows_without_a_token_can_be_dropped(saved: dict[str, Path], tmp_path: Path) -> None:
    done = from_huggingface(saved["llama"], tmp_path / "mcore", vocab_size=TOKENS, make_vocab_size_divisible_by=1)
    assert (done.vocab_size, done.padded_vocab_size, done.dropped_rows, done.added_rows) == (TOKENS, TOKENS, 4, 0)
    rows = load_file(saved["llama"] / "model.safetensors")["lm_head.weight"]
    assert torch.equal(weights_of(tmp_path / "mcore")[OUTPUT], rows[:TOKENS])
    text = refusal(saved["llama"], tmp_path / "other", vocab_size=TOKENS - 1)
    assert_facts(text, "--vocab-size is 256", "at least 257", saved["llama"])


@pytest.mark.parametrize(
    ("stored", "requested", "written"),
    [
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float16, None, torch.float32),
        (torch.float32, None, torch.float32),
        (torch.bfloat16, "fp32", torch.float32),
        (torch.float32, "bf16", torch.bfloat16),
    ],
)
def test_dtypes(tmp_path: Path, stored: torch.dtype, requested: str | None, written: torch.dtype) -> None:
    hf = save_model(make_model("llama", stored), tmp_path / "hf")
    done = from_huggingface(hf, tmp_path / "mcore", dtype=requested)
    weights = weights_of(tmp_path / "mcore")
    assert {tensor.dtype for tensor in weights.values()} == {written} and f"torch.{done.dtype}" == str(written)
    expected = load_file(hf / "model.safetensors")["lm_head.weight"].to(written)
    assert torch.equal(weights[OUTPUT][:ROWS], expected)


def test_values_that_overflow_the_dtype(llama: Path, tmp_path: Path) -> None:
    """The largest bfloat16 is slightly smaller than the largest float32."""
    change_tensors(llama, {"model.norm.weight": torch.full((32,), torch.finfo(torch.float32).max)})
    assert_facts(
        refusal(llama, tmp_path / "mcore", dtype="bf16"), "model.norm.weight", "too large", "bfloat16", "--dtype"
    )

    change_tensors(llama, {"model.norm.weight": torch.full((32,), 1e300, dtype=torch.float64)})
    text = refusal(llama, tmp_path / "mcore")
    assert_facts(text, "model.safetensors", "model.norm.weight", "too large", "float32")
    assert "--dtype" not in text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_that_are_not_finite(llama: Path, tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    broken = torch.ones(32, dtype=dtype)
    broken[3] = broken[30] = value
    change_tensors(llama, {"model.norm.weight": broken})
    text = refusal(llama, tmp_path / "mcore")
    assert_facts(text, llama / "model.safetensors", "2 of 32 values of model.norm.weight", "NaN")


def test_pickles_and_shards_give_the_same_bytes(saved: dict[str, Path], llama: Path, tmp_path: Path) -> None:
    from_huggingface(saved["llama"], tmp_path / "single")
    tensors = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    torch.save(tensors, llama / "pytorch_model.bin")
    assert "--allow-pickle" in refusal(llama, tmp_path / "mcore")
    from_huggingface(llama, tmp_path / "pickled", allow_pickle=True)
    sharded = save_model(make_model("llama"), tmp_path / "shards", max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    from_huggingface(sharded, tmp_path / "sharded")
    for name in ("pickled", "sharded"):
        assert read_manifest(tmp_path / name)["__0_0.distcp"] == read_manifest(tmp_path / "single")["__0_0.distcp"]


def test_gpt2_as_published(saved: dict[str, Path], tmp_path: Path) -> None:
    """Without the prefix of the class with an output layer, and with buffers."""
    directory = tmp_path / "gpt2"
    shutil.copytree(saved["gpt2"], directory)
    tensors = load_file(directory / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    old |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(4)}
    save_file(old, directory / "model.safetensors")
    change_config(directory, architectures=["GPT2Model"])
    from_huggingface(directory, tmp_path / "old")
    from_huggingface(saved["gpt2"], tmp_path / "new")
    # Not a buffer, despite the end of its name.
    save_file(old | {"h.9.attn.c_attn.bias": torch.ones(96)}, directory / "model.safetensors")
    assert "h.9.attn.c_attn.bias is unexpected" in refusal(directory, tmp_path / "other")
    assert read_manifest(tmp_path / "old")["__0_0.distcp"] == read_manifest(tmp_path / "new")["__0_0.distcp"]


def test_a_tied_output_layer_may_be_stored_too(saved: dict[str, Path], tmp_path: Path) -> None:
    directory = tmp_path / "tied"
    shutil.copytree(saved["llama3_tied"], directory)
    embedding = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(directory, {"lm_head.weight": embedding.clone()})
    from_huggingface(directory, tmp_path / "mcore")
    change_tensors(directory, {"lm_head.weight": embedding + 1})
    text = refusal(directory, tmp_path / "other")
    assert_facts(text, "lm_head.weight", "model.embed_tokens.weight", "differ", "tie_word_embeddings")
    change_tensors(directory, {"lm_head.weight": embedding[:-1]})
    assert_facts(refusal(directory, tmp_path / "other"), "lm_head.weight", [260, 32], [261, 32])


def test_every_wrong_tensor_is_listed(llama: Path, tmp_path: Path) -> None:
    changes = {
        "model.norm.weight": None,
        "model.layers.1.mlp.up_proj.weight": torch.zeros(3, 3),
        "model.layers.0.self_attn.q_proj.bias": torch.zeros(32),
        "model.layers.2.self_attn.rotary_emb.inv_freq": torch.zeros(4),
        "model.layers.3.input_layernorm.weight": torch.zeros(32, dtype=torch.int8),
    }
    change_tensors(llama, changes)
    text = refusal(llama, tmp_path / "mcore")
    assert "model.norm.weight is missing" in text
    assert_facts(text, "up_proj.weight", [3, 3], [48, 32])
    assert "q_proj.bias is unexpected" in text
    assert "input_layernorm.weight has dtype I8" in text
    assert "inv_freq" not in text


def test_a_config_of_another_shape_names_the_tensors(llama: Path, tmp_path: Path) -> None:
    change_config(llama, num_hidden_layers=5, vocab_size=300)
    text = refusal(llama, tmp_path / "mcore")
    assert "model.layers.4.input_layernorm.weight is missing" in text
    assert_facts(text, "lm_head.weight", [261, 32], [300, 32])


def test_other_models_are_refused_by_name(llama: Path, tmp_path: Path) -> None:
    BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path / "bert")
    text = refusal(tmp_path / "bert", tmp_path / "mcore")
    assert "BertModel" in text and "LlamaForCausalLM" in text and "GPT2LMHeadModel" in text
    change_config(llama, hidden_act="gelu", new_trick=0.5)
    text = refusal(llama, tmp_path / "mcore")
    assert "hidden_act is 'gelu'" in text and "new_trick" in text
    change_config(llama, hidden_act="silu")
    from_huggingface(llama, tmp_path / "mcore", ignore_config_fields=["new_trick"])


def test_tokenizers(llama: Path, tmp_path: Path) -> None:
    for file in llama.glob("*token*"):
        file.unlink()
    text = refusal(llama, tmp_path / "mcore")
    assert_facts(text, llama, "no tokenizer", "--tokenizer")
    (llama / "tokenizer_config.json").write_text("{}")
    assert_facts(refusal(llama, tmp_path / "mcore"), llama, "no vocabulary", "tokenizer_config.json")
    (llama / "tokenizer_config.json").unlink()
    save_tokenizer(tmp_path / "tokenizer")
    done = from_huggingface(llama, tmp_path / "mcore", tokenizer=tmp_path / "tokenizer")
    assert done.notes == [] and read_state(tmp_path / "mcore")["source"]["own_tokenizer"] is False
    assert (tmp_path / "mcore" / "tokenizer" / "tokenizer.json").exists()
    os.replace(tmp_path / "tokenizer" / "tokenizer.json", tmp_path / "elsewhere.json")
    (tmp_path / "tokenizer" / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    for file in (tmp_path / "tokenizer").iterdir():
        shutil.copy2(file, llama, follow_symlinks=False)
    text = refusal(llama, tmp_path / "other")
    assert_facts(text, llama / "tokenizer.json", "outside its directory", tmp_path / "elsewhere.json")


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"tensor_parallel": 0}, ("--tensor is 0",)),
        ({"pipeline_parallel": -1}, ("--pipeline is -1",)),
        ({"tensor_parallel": 4}, ("--tensor is 4", "common divisor", "2, 4")),
        ({"pipeline_parallel": 3}, ("--pipeline is 3", "divisor", "4 layers")),
        ({"make_vocab_size_divisible_by": 0}, ("--make-vocab-size-divisible-by is 0",)),
    ],
)
def test_invalid_options(
    saved: dict[str, Path], tmp_path: Path, options: dict[str, Any], facts: tuple[str, ...]
) -> None:
    assert_facts(refusal(saved["llama"], tmp_path / "mcore", **options), *facts)


def test_existing_directories_are_kept(saved: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine", encoding="utf-8")
    text = refusal(saved["llama"], tmp_path / "mine", overwrite=True)
    assert_facts(text, tmp_path / "mine", "contains files that", "choose another path")
    assert "--overwrite" not in text
    assert os.listdir(tmp_path / "mine") == ["notes"]
    from_huggingface(saved["llama"], tmp_path / "mcore")
    assert "--overwrite" in refusal(saved["gpt2"], tmp_path / "mcore")
    from_huggingface(saved["gpt2"], tmp_path / "mcore", overwrite=True)
    assert read_state(tmp_path / "mcore")["model"]["family"] == "gpt2"
    # A Hugging Face model directory is not replaced.
    text = refusal(saved["llama"], saved["llama"], overwrite=True)
    assert_facts(text, saved["llama"], "contains files that", "choose another path")
    assert "--overwrite" not in text


def test_an_interrupted_import_leaves_nothing_that_looks_complete(saved: dict[str, Path], tmp_path: Path) -> None:
    calls = []

    def interrupt(now: int, total: int) -> None:
        calls.append((now, total))
        assert os.listdir(tmp_path) == [".mcore.incomplete"]
        assert not (tmp_path / ".mcore.incomplete" / MANIFEST).exists()
        if len(calls) == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        from_huggingface(saved["llama"], tmp_path / "mcore", progress=interrupt)
    assert os.listdir(tmp_path) == []
    calls.clear()
    from_huggingface(saved["llama"], tmp_path / "mcore", progress=lambda now, total: calls.append((now, total)))
    size = sum(tensor.nbytes for tensor in load_file(saved["llama"] / "model.safetensors").values())
    assert calls[-1] == (size, size) and calls == sorted(calls)


def test_a_full_disk_leaves_nothing(saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors at writes of a tensor, at a sync and at the rename."""
    real = {"save": torch.save, "fsync": os.fsync, "replace": os.replace}
    for where, number in (("save", 1), ("save", 7), ("fsync", 1), ("fsync", 5), ("replace", 1)):
        calls = iter(range(1, 10_000))

        def failing(
            *args: Any, _calls: Any = calls, _number: int = number, _real: Any = real[where], **options: Any
        ) -> Any:
            if next(_calls) == _number:
                raise OSError(28, "No space left on device")
            return _real(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(torch if where == "save" else os, where, failing)
            assert "No space left on device" in refusal(saved["llama"], tmp_path / "mcore")
    assert os.listdir(tmp_path) == []


def test_one_tensor_at_a_time(saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hugging Face tensors of one Megatron-Core tensor, at most query, key and value, are freed before the next."""
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    read = HuggingFaceDirectory.read

    def tracking(self: HuggingFaceDirectory, name: str) -> torch.Tensor:
        nonlocal most
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(each() is not None for each in alive))
        return tensor

    monkeypatch.setattr(HuggingFaceDirectory, "read", tracking)
    from_huggingface(saved["llama"], tmp_path / "mcore")
    assert most == 3 and len(alive) == 39


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 70),
    st.sampled_from([2**31, 2**70, 10**400, 0.5, -1.0, float("nan"), float("inf"), "", "silu", "llama3", "\ud800"]),
    st.lists(st.sampled_from(["full_attention", 1, None]), max_size=2),
    st.dictionaries(
        st.sampled_from(["rope_type", "factor", "rope_theta", "type", "x"]), st.sampled_from([1, "linear", None])
    ),
)


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.dictionaries(
        st.sampled_from(
            [*SHAPE, "model_type", "architectures", "rope_parameters", "rope_scaling", "head_dim", "hidden_act"]
        ),
        VALUES,
        min_size=1,
        max_size=3,
    )
)
def test_any_config_values(saved: dict[str, Path], tmp_path: Path, changes: dict[str, Any]) -> None:
    """A one-line error, or the same weights: no value changes them silently."""
    directory, output = tmp_path / "fuzzed", tmp_path / "out"
    shutil.copytree(saved["llama"], directory, dirs_exist_ok=True)
    change_config(directory, **changes)
    try:
        done = from_huggingface(directory, output, overwrite=True)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 5000
        assert not output.exists() or is_of_llama(output)
    else:
        assert isinstance(done, ImportResult) and is_of_llama(output)


def is_of_llama(output: Path) -> bool:
    return weights_of(output)[EMBEDDING].shape == (384, CONFIGS["llama"].hidden_size)
