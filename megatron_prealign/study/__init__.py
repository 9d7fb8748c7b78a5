"""Studies: a matrix of runs and seeds that is trained, resumed and tabulated by one command."""
