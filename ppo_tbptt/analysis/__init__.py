"""Runs read from their folders, grouped, compared and drawn; and the probes of memory and gradients."""
