"""The commands of ``ppo-tbptt``, one module each with ``run(argv) -> exit code``."""
