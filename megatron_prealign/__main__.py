"""`python -m megatron_prealign`: the same command line as the installed `megatron-prealign`."""

from megatron_prealign.cli import main

# Megatron-Core's checkpoint writers spawn processes that import this file again; without the guard they would train.
if __name__ == "__main__":
    raise SystemExit(main())
