"""Round trip of every family from Hugging Face to a checkpoint and back: tensors are bit-identical, and the logits of
the checkpoint match."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.hf_models import (
    CONFIGS,
    ROWS,
    SHAPE,
    change_config,
    logits_of,
    make_model,
    save_model,
    token_batch,
    train,
)
from support.mcore_models import logits
from support.messages import user_error
from support.workers import WorkerPool
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from megatron_prealign.conversion.from_hf import from_huggingface
from megatron_prealign.conversion.to_hf import ConvertSettings, to_huggingface

# fp32, sums in another order through four layers; logits are of order 1.
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


@dataclass(frozen=True)
class RoundTrip:
    hf: Path
    mcore: Path
    back: Path
    logits: torch.Tensor
    """Logits of transformers."""


def convert(name: str, directory: Path, *, trained: bool = False, dtype: torch.dtype = torch.float32) -> RoundTrip:
    model = make_model(name)
    model = (train(model) if trained else model).to(dtype)
    hf = save_model(model, directory / "hf")
    from_huggingface(hf, directory / "mcore", tensor_parallel=2, pipeline_parallel=2)
    to_huggingface(directory / "mcore", directory / "back", ConvertSettings(), show_progress=False)
    return RoundTrip(hf, directory / "mcore", directory / "back", logits_of(model))


# Families, and whether the model is trained a little.
MODELS = [
    pytest.param((name, trained), marks=[pytest.mark.slow] if trained else [])
    for name in CONFIGS
    for trained in (False, True)
]


@pytest.fixture(scope="module", params=MODELS, ids=str)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RoundTrip:
    name, trained = request.param
    return convert(name, tmp_path_factory.mktemp(name), trained=trained)


def assert_same_tensors(one: Path, other: Path) -> None:
    before, after = (load_file(directory / "model.safetensors") for directory in (one, other))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


def test_tensors_are_bit_identical(converted: RoundTrip) -> None:
    assert_same_tensors(converted.hf, converted.back)


def test_logits_match_transformers(converted: RoundTrip, workers: WorkerPool) -> None:
    mcore = workers.run(1, logits, str(converted.mcore), token_batch(), ROWS)[0]
    torch.testing.assert_close(mcore, converted.logits, **TOLERANCE)


def test_transformers_loads_the_result(converted: RoundTrip) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted.back)
    assert torch.equal(logits_of(model), converted.logits)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_bf16(tmp_path: Path, name: str) -> None:
    result = convert(name, tmp_path, dtype=torch.bfloat16)
    assert_same_tensors(result.hf, result.back)
    assert next(iter(load_file(result.back / "model.safetensors").values())).dtype is torch.bfloat16


def test_a_shape_that_transformers_does_not_support_is_refused(tmp_path: Path) -> None:
    """Newer versions support a Llama only if its heads divide the hidden size. Mistral has the same tensors."""
    shape = {**SHAPE, "num_attention_heads": 6, "head_dim": 8}
    model = AutoModelForCausalLM.from_config(MistralConfig(**shape, sliding_window=None))
    hf = save_model(model, tmp_path / "hf")
    change_config(hf, architectures=["LlamaForCausalLM"], model_type="llama", sliding_window=None)
    from_huggingface(hf, tmp_path / "mcore")
    try:
        LlamaConfig(**shape)
    except Exception:  # A private type of huggingface_hub.
        with user_error(tmp_path / "mcore", "transformers", "llama", "multiple of"):
            to_huggingface(tmp_path / "mcore", tmp_path / "back", ConvertSettings(), show_progress=False)
        assert not (tmp_path / "back").exists()
    else:
        to_huggingface(tmp_path / "mcore", tmp_path / "back", ConvertSettings(), show_progress=False)
        AutoModelForCausalLM.from_pretrained(tmp_path / "back")
