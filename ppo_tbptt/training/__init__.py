"""The training loop, its callbacks, its reports and what its checkpoints hold."""
