"""``agents``: list the agents of the package, or print the card of one. Imports no torch."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ppo_tbptt.commands.console import interval, say, wide_console
from ppo_tbptt.commands.parser import Parser, UsageError
from ppo_tbptt.run.agents import AgentDir, Card, agent_at, nearest_agents, packaged_agents


def run(argv: list[str]) -> int:
    """Run the command."""
    parser = Parser(
        "agents",
        "The trained agents of the package: their tasks and results, or the whole card of one. Their names are taken "
        "wherever a run is: ppo-tbptt enjoy NAME, evaluate NAME, probe NAME, plot NAME --out curve.png, ...",
    )
    parser.add_argument(
        "agent", nargs="?", type=Path, metavar="AGENT", help="its name, or the folder of an exported one"
    )
    parser.option("--json", action="store_true", help="print the cards as JSON and nothing else")
    args = parser.parse_args(argv)
    chosen = list(packaged_agents().values()) if args.agent is None else [agent_at(args.agent)]
    agents = [agent for agent in chosen if agent is not None]
    if args.agent is not None and not agents:
        raise UsageError(f"{args.agent}: no agent; {nearest_agents(str(args.agent))}")
    cards = [agent.read_card() for agent in agents]
    if args.json:
        trees = [
            card.model_dump(mode="json") | {"folder": str(agent.path)}
            for agent, card in zip(agents, cards, strict=True)
        ]
        print(json.dumps(trees if args.agent is None else trees[0], indent=1))
    elif args.agent is None:
        _print_list(agents, cards, wide_console())
    else:
        print_card(agents[0], cards[0], Console(markup=False, emoji=False))
    return 0


def _print_list(agents: list[AgentDir], cards: list[Card], console: Console) -> None:
    table = Table(box=None, padding=(0, 1))
    table.add_column("agent", no_wrap=True)  # to be copied
    table.add_column("task", overflow="fold")
    for column in ("result [95 %]", "wiped", "steps", "MB"):
        table.add_column(column, justify="right", no_wrap=True)
    for agent, card in zip(agents, cards, strict=True):
        result = interval(card.result.mean, card.result.ci95)
        wiped = "-" if card.wiped is None else f"{card.wiped.mean:.2f}"
        row = (result, wiped, f"{card.env_steps / 1e6:.3g}M", f"{agent.weights.stat().st_size / 1e6:.1f}")
        table.add_row(agent.path.name, card.env_id, *row)
    console.print(table)
    say(console, "\nresult: the task's headline measure on held-out levels, such as the share of commands completed")
    say(console, "wiped: the same agent with its recurrent state wiped at every step")
    say(console, "watch one: ppo-tbptt enjoy NAME; its card: ppo-tbptt agents NAME")


def print_card(agent: AgentDir, card: Card, console: Console) -> None:
    """Print what a card says."""
    table = Table(box=None, padding=(0, 2), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in _rows(agent, card).items():
        table.add_row(*row)
    console.print(table, highlight=False)


def _rows(agent: AgentDir, card: Card) -> dict[str, str]:
    levels, best = card.levels, "" if card.headline_max is None else f" (at most {card.headline_max:g})"
    first, last = levels.first_seed, levels.first_seed + levels.num_seeds - 1
    megabytes = agent.weights.stat().st_size / 1e6
    rows = {
        "agent": f"{card.name}: {card.core}, {card.parameters:,} parameters, {megabytes:.1f} MB",
        "task": card.env_id,
        "options": ", ".join(f"{key} = {json.dumps(value)}" for key, value in card.options.items()) or "the task's own",
        "measure": f"{card.headline}{best}, {'greedy' if levels.greedy else 'sampled'} actions, held-out level seeds "
        f"{first} to {last} x {levels.repeats}, 95 % intervals over levels",
        "result": interval(card.result.mean, card.result.ci95),
    }
    if card.max_episode_steps is not None:
        rows["options"] += f"; episodes of at most {card.max_episode_steps:,} steps"
    if card.wiped is not None:
        rows["state wiped"] = f"{interval(card.wiped.mean, card.wiped.ci95)}: the same agent without its memory"
    if card.without_memory is not None:
        measure = interval(card.without_memory.mean, card.without_memory.ci95)
        rows["no memory"] = f"{measure}: an agent that was trained without memory"
    time = f"{card.hours:.1f} hours" if card.hours >= 1 else f"{60 * card.hours:.0f} minutes"
    changed = ", but for the options of the command" if f"train {card.config} --" in card.command else ""
    rows |= {
        "trained": f"{card.env_steps:,} steps in {time} on {card.machine}; {card.chosen}",
        "config": f"{card.config}{changed}" if card.config else "config.toml in its folder",
        "command": card.command,
        "versions": ", ".join(card.versions),
        "folder": str(agent.path),
    }
    return rows
