"""Train an agent: the same as `ppo-tbptt train`."""

import sys

# The import is inside, because every spawned worker runs this file again.
if __name__ == "__main__":
    from ppo_tbptt.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
