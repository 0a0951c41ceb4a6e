"""Runs side by side: the same as `ppo-tbptt compare`."""

import sys

# The import is inside, because every spawned worker runs this file again.
if __name__ == "__main__":
    from ppo_tbptt.cli import main

    sys.exit(main(["compare", *sys.argv[1:]]))
