"""The outer loop, and what surrounds it."""
