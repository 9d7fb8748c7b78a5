"""Runtime environment: device, process groups, seeds, logging, and all access to Megatron-Core's globals.

Parts of Megatron-Core 0.16.1 that are patched or replaced, and why:

- `cpu.py`: a torch function mode, `torch.cuda.current_device` and related functions, and the getters of the RNG
  tracker, so that the engine runs on a CPU with gloo.
- `optimizer.py`: `megatron.core.optimizer.Adam` and its flags, because the sharded state of torch's AdamW cannot be
  loaded.
- `index_builder.py`: `GPTDataset`'s index of exactly one epoch and the blending helper, in memory: the class itself has
  a cached loss mask and cache races, and its order of samples depends on the number requested.
- `checkpoint/sharded/save.py`: `FileSystemWriterAsync` and the planning of a save, without helper processes.
- `checkpoint/sharded/optimizer_state.py`: `DistributedOptimizer.sharded_param_state_fully_reshardable`, so that each
  rank saves its own ranges and nothing is gathered.
- `model/config.py`: `overlap_p2p_comm` with virtual stages, because batched sends of the interleaved schedule deadlock
  on two stages.
"""
