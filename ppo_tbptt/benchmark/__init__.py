"""How fast whole iterations are, on what their time goes, and how fast this machine would allow them to be."""

from ppo_tbptt.benchmark.measure import MAX_EXTRA_ITERATIONS, Setting, compare, describe, measure, write_profile

__all__ = ["MAX_EXTRA_ITERATIONS", "Setting", "compare", "describe", "measure", "write_profile"]
