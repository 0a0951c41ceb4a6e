"""Runs read from their folders, grouped, compared and drawn; and the memory probe."""
