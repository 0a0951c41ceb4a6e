"""What an agent owes to its memory: the same as `ppo-tbptt probe`."""

import sys

# The import is inside, because every spawned worker runs this file again.
if __name__ == "__main__":
    from ppo_tbptt.cli import main

    sys.exit(main(["probe", *sys.argv[1:]]))
