"""``enjoy``: show an agent's episodes in a window or write them as a video."""

from argparse import Namespace
from pathlib import Path

from rich.console import Console

from ppo_tbptt.commands.parser import Parser, UsageError, check_target, positive, seed
from ppo_tbptt.commands.results import add_agent
from ppo_tbptt.config import SEED_LIMIT, EnvConfig
from ppo_tbptt.evaluation.policy import Policy
from ppo_tbptt.watch.environment import Env, remote_env, watched_env
from ppo_tbptt.watch.recording import Recording, failed, record_episode
from ppo_tbptt.watch.video import SUFFIXES, frames_of, write_video
from ppo_tbptt.watch.window import Viewer, has_screen, show_window

MOST_TRIES = 200
"""Episodes that ``--pick`` plays in a row without finding one before it gives up."""
HOLD_S = 1.0
"""Seconds for which a video shows the last picture of each episode."""


def run(argv: list[str]) -> int:
    """Run the command."""
    parser = Parser(
        "enjoy",
        "Watch episodes: what the agent sees beside the ground truth, what it does, expects and remembers.",
        'The task itself can be changed: --env.options.command-count "[3]".',
    )
    add_agent(parser)
    parser.option("--seed", type=seed, default=200_000, help="first level seed (default 200000, a held-out one)")
    parser.option("--episodes", type=positive, default=1, help="play so many, on level seeds one after the other")
    parser.option(
        "--pick",
        choices=("all", "failures", "successes"),
        default="all",
        help=f"keep only such episodes; gives up after {MOST_TRIES} in a row without one",
    )
    parser.option("--video", type=Path, metavar="FILE", help="write a .mp4 or .gif instead of opening a window")
    parser.option("--greedy", action="store_true", help="take the most probable action instead of sampling")
    parser.option("--fps", type=positive, default=6, help="steps per second (default 6)")
    parser.option("--max-steps", type=positive, default=2_000, help="cut longer episodes (default 2000)")
    parser.option("--device", default="cpu", help="cpu (default), auto, cuda or cuda:N")
    args, overrides = parser.parse_with_overrides(argv, only="env.")
    video: Path | None = args.video
    check_target("--video", video, SUFFIXES, makes_folder=True)
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    policy = Policy.load(args.path, device=args.device)
    config = policy.config.override(overrides).env
    if video is None and has_screen():
        return _window(policy, config, args, console)
    if video is None:
        video = Path(f"{policy.spec.env_id.replace('/', '_').replace(':', '_')}_level_{args.seed}.mp4")
        console.print("no screen here, so this writes a video")
    with watched_env(config, policy.agent.previous) as env:
        recordings = _episodes(policy, env, args, console)
    if not recordings:
        return 1
    note = "" if args.pick == "all" else args.pick
    write_video(video, frames_of(recordings, note=note, hold=round(HOLD_S * args.fps)), args.fps)
    console.print(f"video: {video}")
    return 0


def _window(policy: Policy, config: EnvConfig, args: Namespace, console: Console) -> int:
    with remote_env(config, policy.agent.previous) as env:
        levels, first = range(SEED_LIMIT), args.seed
        if args.pick != "all":
            levels, first = [recording.seed for recording in _episodes(policy, env, args, console)], 0
        if not levels:
            return 1
        protocol = {"episodes": args.episodes, "greedy": args.greedy, "max_steps": args.max_steps}
        show_window(Viewer(policy, env, levels, first=first, **protocol), args.fps, policy.spec.env_id)
    return 0


def _episodes(policy: Policy, env: Env, args: Namespace, console: Console) -> list[Recording]:
    """Record episodes from level ``--seed`` on until ``--episodes`` of the kind ``--pick`` are found.

    Raises:
        UsageError: the task does not tell failures from successes.
    """
    found: list[Recording] = []
    capped = level = tries = 0
    for level in range(args.seed, SEED_LIMIT):
        recording = record_episode(policy, env, seed=level, greedy=args.greedy, max_steps=args.max_steps)
        tries, capped, lost = tries + 1, capped + recording.capped, failed(recording)
        if args.pick != "all" and recording.episode is not None and lost is None:
            raise UsageError(f"--pick {args.pick}: {policy.spec.env_id} has no best result to tell failures by")
        if args.pick == "all" or lost is (args.pick == "failures"):
            found.append(recording)
            tries = 0
            console.print(_line(recording))
        if len(found) == args.episodes or tries == MOST_TRIES:
            break
    if len(found) < args.episodes:
        limit = f", {capped} of them cut at --max-steps {args.max_steps}" if capped else ""
        console.print(f"{len(found) or 'no'} {args.pick} on the levels {args.seed} to {level}{limit}; gave up")
    return found


def _line(recording: Recording) -> str:
    episode = recording.episode
    if episode is None:
        return f"level {recording.seed}: cut at {recording.num_steps:,} steps"
    measures = "  ".join(f"{name} {value:g}" for name, value in episode.measures.items())
    return f"level {recording.seed}: return {episode.ret:.3f}  length {episode.length}  {measures}"
