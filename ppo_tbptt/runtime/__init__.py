"""The machine: device, random generators, clocks, other ranks."""
