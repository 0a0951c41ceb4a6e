"""An agent for use elsewhere: the same as `ppo-tbptt export`."""

import sys

# The import is inside, because every spawned worker runs this file again.
if __name__ == "__main__":
    from ppo_tbptt.cli import main

    sys.exit(main(["export", *sys.argv[1:]]))
