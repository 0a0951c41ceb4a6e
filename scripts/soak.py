"""Train for long, watched: the same as `ppo-tbptt soak`."""

import sys

# The import is inside, because every spawned worker runs this file again.
if __name__ == "__main__":
    from ppo_tbptt.cli import main

    sys.exit(main(["soak", *sys.argv[1:]]))
