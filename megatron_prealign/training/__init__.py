"""The training loop, its phases, callbacks and metrics.

`Trainer.step` zeroes gradients, sets the learning rate, calls the phase's `forward_backward` and updates. A phase cuts
the step into microbatches and passes them to `runtime.engine.run_schedule`: Megatron-Core's
`get_forward_backward_func()`, with word and language-model microbatches of different shapes in one pass, and idle
microbatches that fill an interleaved schedule up to a multiple of the pipeline size.

Every loss is a sum over the whole step divided by a number that is the same on every rank (scored tokens, or positive
pairs), so a token weighs the same in any layout. Ids that only pad the vocabulary get no probability, because their
number depends on the layout. Metrics are summed on the device (`meter.py`) and reach the host at log lines.
"""
