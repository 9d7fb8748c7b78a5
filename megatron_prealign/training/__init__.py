"""The training loop, its phases, callbacks and metrics.

`Trainer.step` zeroes gradients, sets the learning rate, calls the phase's `forward_backward` and updates the weights. A
phase splits the step into microbatches and passes them to `runtime.engine.run_schedule`: Megatron-Core's
`get_forward_backward_func()`, with word and language-model microbatches of different shapes in one pass, and idle
microbatches that pad an interleaved schedule to a multiple of the pipeline size.

Every loss is a sum over the step divided by a count that is the same on every rank (scored tokens, or positive pairs),
so every token has the same weight in any layout. Ids that only pad the vocabulary get zero probability, because their
number depends on the layout. Metrics are summed on the device (`meter.py`) and copied to the host for log lines.
"""
