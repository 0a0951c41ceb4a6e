"""Benchmark whole training iterations: their speed, where their time goes, and this machine's ceiling."""
