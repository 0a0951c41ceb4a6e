"""``python -m ppo_tbptt COMMAND ...``."""

from ppo_tbptt.cli import main

raise SystemExit(main())
