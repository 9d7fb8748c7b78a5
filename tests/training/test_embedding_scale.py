"""RMS of the embeddings without a run; `test_parallel_parity.py` compares it in every layout."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_prealign.training import embedding_scale as module
from megatron_prealign.training.embedding_scale import embedding_rms

WIDTH, ROWS, VOCABULARY = 8, 700, 650


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is computed, views aside."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result._base is None and not func.is_view:
            self.elements = max(self.elements, result.numel())
        return result


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "gather_parameters", lambda chunks: None)
    monkeypatch.setattr(module, "unwrap", lambda chunk: chunk)
    monkeypatch.setattr(module.dist, "all_reduce", lambda tensor: None)


def test_padding_does_not_count_and_no_copy_of_all_rows_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS", 64)
    torch.manual_seed(1)
    weight = torch.randn(ROWS, WIDTH)
    model = SimpleNamespace(
        pre_process=True,
        post_process=True,
        share_embeddings_and_output_weights=True,
        embedding=SimpleNamespace(word_embeddings=SimpleNamespace(weight=weight.bfloat16())),
    )
    runtime: Any = SimpleNamespace(device=torch.device("cpu"), tensor_rank=0)
    with Largest() as largest:
        measured = embedding_rms(runtime, [model], VOCABULARY)  # type: ignore[list-item]
    expected = weight[:VOCABULARY].bfloat16().double().square().mean().sqrt().item()
    assert measured == {"input": pytest.approx(expected, rel=1e-6)}
    assert largest.elements == 64 * WIDTH
