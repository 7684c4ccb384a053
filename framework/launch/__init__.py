"""Starting runs: on this machine, in several processes, on a SLURM cluster."""
