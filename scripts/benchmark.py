"""Measure the speed of training: the same as `ppo-tbptt benchmark`."""

import sys

# The import is inside, because every spawned worker runs this file again.
if __name__ == "__main__":
    from ppo_tbptt.cli import main

    sys.exit(main(["benchmark", *sys.argv[1:]]))
