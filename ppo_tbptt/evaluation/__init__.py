"""Held-out evaluation, and agents outside of training."""
