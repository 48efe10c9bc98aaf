"""One file per peer: loads the model once, then runs the workloads it is asked for, see `benchmark.worker`."""
