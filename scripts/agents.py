"""The agents of the package: the same as `ppo-tbptt agents`."""

import sys

# The import is inside, because every spawned worker runs this file again.
if __name__ == "__main__":
    from ppo_tbptt.cli import main

    sys.exit(main(["agents", *sys.argv[1:]]))
