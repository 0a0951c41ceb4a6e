"""Ways to train through time, or recurrent cores, compared: the same as `ppo-tbptt ablate`."""

import sys

# The import is inside, because every spawned process runs this file again.
if __name__ == "__main__":
    from ppo_tbptt.cli import main

    sys.exit(main(["ablate", *sys.argv[1:]]))
