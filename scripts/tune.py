"""Search for better settings: the same as `ppo-tbptt tune`."""

import sys

# The import is inside, because every spawned process runs this file again.
if __name__ == "__main__":
    from ppo_tbptt.cli import main

    sys.exit(main(["tune", *sys.argv[1:]]))
