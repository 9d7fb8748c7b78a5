"""Entry points that combine the packages: `pretrain`, `evaluate`, `pretrain --validate` and `dataset prepare-cache`.
They share inputs, dictionary and run directory.

`pretrain.py` runs in this order, on all ranks: join the process group and lock the run directory; choose and verify the
checkpoint to resume from, because the blend depends on it; open tokenizer, dictionary and data, and build the sample
index once per node; build the model, drawing each full parameter from a generator seeded by (seed, name, layer), so
that a seed gives the same model in any layout; load the checkpoint; run the phases.

Work that can fail on one rank runs inside `runtime.agreement.on_every_rank` or `on_rank_zero`, and nothing inside it
waits for another rank: an exception reaches all ranks before any of them waits in a barrier.
"""
