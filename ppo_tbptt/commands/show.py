"""``show``: a config with everything filled in, or every field with its type, default and help."""

import os
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from ppo_tbptt.commands.console import say
from ppo_tbptt.commands.parser import CONFIG_HELP, Parser, UsageError
from ppo_tbptt.config import Config, describe_fields
from ppo_tbptt.config.shipped import config_names
from ppo_tbptt.run.agents import packaged_agents


def run(argv: list[str]) -> int:
    """Run the command and return its exit code."""
    parser = Parser("show", "Print a config with everything filled in, and the sizes that follow from it.")
    parser.add_argument(
        "config", nargs="?", type=Path, metavar="CONFIG", help=f"{CONFIG_HELP}; or a run's or agent's folder"
    )
    parser.option("--defaults", action="store_true", help="every field with its type, default and help")
    args, overrides = parser.parse_with_overrides(argv)
    console = Console(markup=False, emoji=False)
    if args.defaults:
        _print_defaults(console)
        return 0
    if args.config is None:
        raise UsageError("a CONFIG is needed, such as quickstart (or --defaults)")
    config = Config.load(_file(args.config), overrides)
    say(console, config.to_toml())
    for line in _derived(config):
        say(console, f"# {line}")
    agent = packaged_agents().get(str(args.config))
    if agent and not os.path.lexists(args.config):
        say(console, f"# the agent {args.config} was trained with: {agent.read_card().command}")
    return 0


def _file(path: Path) -> Path:
    """Return the config in the folder of a run or an agent, and that of an agent after which no config is named."""
    if os.path.isfile(path / "config.toml"):
        return path / "config.toml"
    agent = packaged_agents().get(str(path))
    return path if agent is None or str(path) in config_names() else agent.config


def _derived(config: Config) -> list[str]:
    import torch

    from ppo_tbptt.envs import make_env
    from ppo_tbptt.models.agent import build_agent

    task, previous = config.env, config.model.previous
    env = make_env(task.id, options=task.options, max_episode_steps=task.max_episode_steps, previous=previous)
    env.close()
    spec = env.spec
    agent = build_agent(config, spec, torch.device("meta"))
    observations = ", ".join(f"{key} {'x'.join(map(str, a.shape))} {a.dtype}" for key, a in spec.obs.items())
    best = "" if spec.headline_max is None else f" (at most {spec.headline_max:g})"
    return [
        f"batch: {config.batch_size:,} steps an iteration, {config.num_iterations:,} iterations",
        f"updates: up to {config.updates_per_iteration} an iteration, each of about "
        f"{config.batch_size // config.ppo.num_minibatches:,} steps",
        f"parameters: {sum(p.numel() for p in agent.parameters()):,}; recurrent state of {agent.core.state_size}",
        f"observations: {observations}; action branches: {list(spec.action_nvec)}",
        f"headline measure: {spec.headline}{best}",
    ]


def _print_defaults(console: Console) -> None:
    for field in describe_fields():
        line = Text.assemble((field.key, "bold"), f" = {field.default}", (f"   {field.type}", "dim"))
        console.print(line, soft_wrap=True)
        console.print(Padding(Text(field.help), (0, 0, 0, 4)))
