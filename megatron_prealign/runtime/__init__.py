"""Where a run happens: device, process groups, seeds, logging, and every touch of Megatron-Core's globals.

What is replaced in Megatron-Core 0.16.1, and why:

- `cpu.py`: a torch function mode, `torch.cuda.current_device` and friends, and the getters of the RNG tracker, so that
  the engine runs on a CPU with gloo.
- `optimizer.py`: `megatron.core.optimizer.Adam` and its flags, because the sharded state of torch's AdamW does
  not load.
- `index_builder.py`: `GPTDataset`'s index of exactly one epoch and the blending helper, in memory: the class itself has
  a cached loss mask and cache races, and its order of samples depends on how many are requested.
- `checkpoint/sharded/save.py`: `FileSystemWriterAsync` and the planning of a save, without helper processes.
- `checkpoint/sharded/optimizer_state.py`: `DistributedOptimizer.sharded_param_state_fully_reshardable`, so that each
  rank saves its own ranges and nothing is gathered.
- `model/config.py`: `overlap_p2p_comm` with virtual stages, because batched sends of the interleaved schedule deadlock
  on two stages.
"""
