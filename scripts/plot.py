"""Learning curves as a picture: the same as `ppo-tbptt plot`."""

import sys

# The import is inside, because every spawned worker runs this file again.
if __name__ == "__main__":
    from ppo_tbptt.cli import main

    sys.exit(main(["plot", *sys.argv[1:]]))
