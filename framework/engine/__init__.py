"""How a task is run: the loop, optimizers, averages, checkpoints, stopping."""
