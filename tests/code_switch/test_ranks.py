"""The result for a sample does not depend on the rank, the other samples of the batch, or the order."""

from pathlib import Path
from typing import Any

import torch
from support.tiny import Tiny, recipe_of
from support.workers import WorkerPool

SAMPLES = 12


def switch_own_samples(values: dict[str, Any], directory: str) -> dict[int, list[Any]]:
    """Runs in workers: each rank switches its own samples, in batches of sizes that differ between ranks."""
    import torch.distributed as dist
    from support.token_datasets import open_samples

    from megatron_prealign.code_switch.switcher import CodeSwitcher, SequenceFormat
    from megatron_prealign.dictionary.switchable import switchable_table
    from megatron_prealign.dictionary.table import load_table
    from megatron_prealign.tokenizer.load import load_tokenizer

    rank, ranks = dist.get_rank(), dist.get_world_size()
    recipe = recipe_of(values, Path(directory) / str(rank))
    samples = open_samples(
        recipe.data,
        num_samples=SAMPLES,
        seed=3,
        languages=recipe.data.languages,
        cache_dir=Path(directory) / f"cache{rank}",
        lookahead=recipe.code_switch.lookahead_tokens(recipe.data.seq_length),
    )
    switcher = CodeSwitcher(
        switchable_table(load_table(recipe.dictionary.table), recipe.code_switch, recipe.data.languages),
        recipe.code_switch,
        SequenceFormat(seq_length=recipe.data.seq_length, eod_id=load_tokenizer(recipe.data.tokenizer).eod_id),
        seed=recipe.training.seed,
        languages=recipe.data.languages,
        device="cpu",
    )
    own = list(range(rank, SAMPLES, ranks))
    batches = [own[: rank + 1], own[rank + 1 :][::-1]]
    result = {}
    for batch in [each for each in batches if each]:
        source = samples.batch(batch)
        output = switcher(source.tokens, source.language, source.sample_id, 0)
        for position, index in enumerate(batch):
            result[index] = [each[position].tolist() for each in output[:4]]
    return result


def test_a_sample_is_the_same_on_any_rank_in_any_batch(workers: WorkerPool, tiny: Tiny, tmp_path) -> None:
    values = tiny.values(tmp_path)
    values["code_switch"] = {"ratio": 0.5, "label_mode": "mix"}
    alone = workers.run(1, switch_own_samples, values, str(tmp_path / "one"))[0]
    assert sorted(alone) == list(range(SAMPLES))
    for ranks in (2, 4):
        results = workers.run(ranks, switch_own_samples, values, str(tmp_path / str(ranks)))
        together = {index: sample for result in results for index, sample in result.items()}
        assert together == alone
    changed = sum(
        torch.tensor(tokens)[1:].ne(torch.tensor(labels)[:-1]).any().item() for tokens, labels, *_ in alone.values()
    )
    # samples in English, the only language with keys
    assert changed >= 4
