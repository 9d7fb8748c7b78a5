"""What a row becomes does not depend on which rank switches it, with which other rows, or in which order."""

from pathlib import Path
from typing import Any

import torch
from support.tiny import Tiny, recipe_of
from support.workers import WorkerPool

ROWS = 12


def switch_shares(values: dict[str, Any], directory: str) -> dict[int, list[Any]]:
    """Runs in workers: each rank switches its own share of the rows, cut differently from its neighbours', and all rows
    once more on its own."""
    import torch.distributed as dist
    from support.token_datasets import open_samples

    from megatron_prealign.code_switch import CodeSwitcher, RowFormat
    from megatron_prealign.dictionary.switchable import switchable_table
    from megatron_prealign.dictionary.table import load_table
    from megatron_prealign.tokenizer.load import load_tokenizer

    rank, ranks = dist.get_rank(), dist.get_world_size()
    recipe = recipe_of(values, Path(directory) / str(rank))
    samples = open_samples(
        recipe.data,
        num_samples=ROWS,
        seed=3,
        languages=recipe.data.languages,
        cache_dir=Path(directory) / f"cache{rank}",
        lookahead=recipe.code_switch.lookahead_tokens(recipe.data.seq_length),
    )
    switcher = CodeSwitcher(
        switchable_table(load_table(recipe.dictionary.table), recipe.code_switch, recipe.data.languages),
        recipe.code_switch,
        RowFormat(seq_length=recipe.data.seq_length, eod_id=load_tokenizer(recipe.data.tokenizer).eod_id),
        seed=recipe.training.seed,
        languages=recipe.data.languages,
        device="cpu",
    )
    own = list(range(rank, ROWS, ranks))
    batches = [own[: rank + 1], own[rank + 1 :][::-1]]
    result = {}
    for batch in [each for each in batches if each]:
        rows = samples.rows(batch)
        output = switcher(rows.tokens, rows.language, rows.sample_id, 0)
        for at, index in enumerate(batch):
            result[index] = [each[at].tolist() for each in output[:4]]
    return result


def test_a_row_is_the_same_on_any_rank_in_any_batch(workers: WorkerPool, tiny: Tiny, tmp_path) -> None:
    values = tiny.values(tmp_path)
    values["code_switch"] = {"ratio": 0.5, "label_mode": "mix"}
    alone = workers.run(1, switch_shares, values, str(tmp_path / "one"))[0]
    assert sorted(alone) == list(range(ROWS))
    for ranks in (2, 4):
        answers = workers.run(ranks, switch_shares, values, str(tmp_path / str(ranks)))
        together = {index: row for answer in answers for index, row in answer.items()}
        assert together == alone
    changed = sum(torch.tensor(row[0])[1:].ne(torch.tensor(row[1])[:-1]).any().item() for row in alone.values())
    # rows of English, the only language with keys
    assert changed >= 4
