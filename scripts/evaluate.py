"""Evaluate an agent on held-out seeds: the same as `ppo-tbptt evaluate`."""

import sys

# The import is inside, because every spawned worker runs this file again.
if __name__ == "__main__":
    from ppo_tbptt.cli import main

    sys.exit(main(["evaluate", *sys.argv[1:]]))
