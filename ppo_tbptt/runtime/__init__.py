"""The machine: devices, random number generators, timing and distributed ranks."""
