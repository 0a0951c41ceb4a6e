"""``export``: write an agent as an ONNX graph, its weights alone, or as a folder to hand on."""

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ppo_tbptt.commands.console import say
from ppo_tbptt.commands.parser import Parser, UsageError, check_target
from ppo_tbptt.commands.results import add_agent
from ppo_tbptt.evaluation.export import PACKAGES, Port, export_onnx
from ppo_tbptt.evaluation.policy import Policy
from ppo_tbptt.run.weights import SUFFIX, save_weights


def run(argv: list[str]) -> int:
    """Run the command."""
    parser = Parser(
        "export",
        "Write a trained agent for use elsewhere: one step as ONNX, its weights alone, or a folder to hand on.",
        "--agent evaluates it on the held-out levels, also with its state wiped, and writes weights, config, card, "
        "learning curve and a GIF. Such a folder is taken wherever a run is.",
    )
    add_agent(parser)
    parser.option("--onnx", type=Path, metavar="FILE.onnx", help="(observations, state) -> (logits, value, next state)")
    parser.option("--safetensors", type=Path, metavar=f"FILE{SUFFIX}", help="weights and config, for Policy.load")
    parser.option(
        "--agent", metavar="NAME", help="write the folder NAME; of a run with evaluations its best checkpoint"
    )
    parser.option("--out", type=Path, metavar="FOLDER", help="with --agent: where to put it (default: here)")
    parser.option("--machine", metavar="TEXT", help="with --agent: what it was trained on (default: this machine)")
    text = "with --agent: a run of the same task without memory, for the card"
    parser.option("--without-memory", type=Path, metavar="RUN", help=text)
    args = parser.parse_args(argv)
    if args.agent is not None:
        if args.onnx is not None or args.safetensors is not None:
            raise UsageError("--agent: not with --onnx or --safetensors; export twice")
        from ppo_tbptt.commands.export_agent import export_agent  # here, as it takes matplotlib and ffmpeg

        return export_agent(args, Console(markup=False, emoji=False))
    for option in ("out", "machine", "without_memory"):
        if getattr(args, option) is not None:
            raise UsageError(f"--{option.replace('_', '-')}: only with --agent NAME")
    if args.onnx is None and args.safetensors is None:
        raise UsageError("what to write is needed: --onnx FILE.onnx, --safetensors FILE.safetensors, or --agent NAME")
    check_target("--onnx", args.onnx, [".onnx"])
    check_target("--safetensors", args.safetensors, [SUFFIX])
    policy = Policy.load(args.path)
    console = Console(markup=False, emoji=False)
    say(console, f"{policy.path}: {policy.spec.env_id} after {policy.env_steps:,} steps")
    if args.safetensors is not None:
        save_weights(args.safetensors, policy.agent.state_dict(), policy.config, policy.spec, policy.env_steps)
        _print_file(args.safetensors, console)
        load = f"policy = Policy.load({str(args.safetensors)!r})  # weights, config and spec are in it"
        say(console, f"  from ppo_tbptt import Policy\n  {load}")
    if args.onnx is not None:
        _export_onnx(policy, args.onnx, console)
    return 0


def _print_file(path: Path, console: Console) -> None:
    say(console, f"\nwritten to {path} ({path.stat().st_size / 1e6:.1f} MB)")


def _export_onnx(policy: Policy, path: Path, console: Console) -> None:
    exported = export_onnx(policy, path)
    _print_file(path, console)
    table = Table(box=None, padding=(0, 2), show_header=False)
    for kind, ports in (("input", exported.inputs), ("output", exported.outputs)):
        for port in ports:
            table.add_row(kind, port.name, f"{port.dtype} [{', '.join(['batch', *map(str, port.shape)])}]")
    console.print(table, markup=False)
    compared, checked = "one step in onnxruntime equals the agent's", f"checked but not run: that needs {PACKAGES}"
    say(console, compared if exported.compared else checked)
    for line in _usage(policy, path, exported.inputs):
        say(console, f"  {line}")


def _usage(policy: Policy, path: Path, inputs: list[Port]) -> list[str]:
    """Return lines of Python that act greedily in one step of one environment."""
    size, observations = policy.agent.core.state_size, list(policy.spec.obs)
    fed = [f"{key!r}: {'obs' if observations == ['obs'] else f'obs[{key!r}]'}[None]" for key in observations]
    fed += [f"{inputs[-1].name!r}: state"] if size else []
    splits = np.cumsum(policy.spec.action_nvec)[:-1].tolist()
    action = f"[int(branch.argmax()) for branch in np.split(logits[0], {splits})]"
    if policy.spec.discrete:
        action = "int(logits[0].argmax())"
    lines = ["import numpy as np, onnxruntime", f"session = onnxruntime.InferenceSession({str(path)!r})"]
    initial = f"np.zeros((1, {size}), np.float32)"
    if policy.agent.core.initial_state(1).any():
        lines[0] = f"import json, {lines[0].removeprefix('import ')}"
        of_file = "session.get_modelmeta().custom_metadata_map['initial_state']"
        initial = f"np.array([json.loads({of_file})], np.float32)"
    lines += [f"state = {initial}  # at the start of each episode"] if size else []
    outputs = "logits, value, state" if size else "logits, value"
    return [*lines, f"{outputs} = session.run(None, {{{', '.join(fed)}}})", f"action = {action}"]
