"""Watch an agent play: the same as `ppo-tbptt enjoy`."""

import sys

# The import is inside, because every spawned worker runs this file again.
if __name__ == "__main__":
    from ppo_tbptt.cli import main

    sys.exit(main(["enjoy", *sys.argv[1:]]))
