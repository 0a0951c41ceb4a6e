"""Benchmark whole training iterations: their speed, where their time goes, and this machine's ceiling."""

from ppo_tbptt.benchmark.measure import MAX_EXTRA_ITERATIONS, Setting, compare, describe, measure, write_profile

__all__ = ["MAX_EXTRA_ITERATIONS", "Setting", "compare", "describe", "measure", "write_profile"]
