"""The run folder and the files in it: checkpoints, metrics, TensorBoard event files."""
