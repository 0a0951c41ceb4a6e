"""``enjoy``: watch an agent play, in a window or as a video."""

from pathlib import Path

from rich.console import Console

from ppo_tbptt.commands.parser import Parser, UsageError, check_target, env_overrides, positive, seed
from ppo_tbptt.policy import Policy
from ppo_tbptt.watch import check_suffix, has_screen, record, show_window, write_video


def run(argv: list[str]) -> int:
    parser = Parser(
        "enjoy",
        "Watch one episode: what the agent sees beside the environment's ground truth.",
        'The task itself can be changed: --env.options.command-count "[3]".',
    )
    parser.add_argument("path", type=Path, metavar="RUN_OR_CHECKPOINT", help="a run's folder (its newest checkpoint)")
    parser.option("--seed", type=seed, default=200_000, help="level seed (default 200000, a held-out one)")
    parser.option("--video", type=Path, metavar="FILE", help="write a .mp4 or .gif instead of opening a window")
    parser.option("--greedy", action="store_true", help="take the most probable action instead of sampling")
    parser.option("--fps", type=positive, default=6, help="frames per second (default 6)")
    parser.option("--max-steps", type=positive, default=2_000, help="cut longer episodes (default 2000)")
    parser.option("--device", default="cpu", help="cpu (default), auto, cuda or cuda:N")
    args, rest = parser.parse_with_overrides(argv)
    overrides = env_overrides(rest)
    video: Path | None = args.video
    if video is not None:
        try:
            check_suffix(video)
        except ValueError as error:
            raise UsageError(str(error)) from error
        if video.parent.is_dir():  # else it is made
            check_target("--video", video)
    policy = Policy.load(args.path, device=args.device)
    console = Console(markup=False, emoji=False)
    recording = record(
        policy, policy.config.override(overrides).env, seed=args.seed, greedy=args.greedy, max_steps=args.max_steps
    )
    episode = recording.episode
    if episode is None:
        console.print(f"level {args.seed}: cut at {args.max_steps:,} steps")
    else:
        measures = "  ".join(f"{name} {value:g}" for name, value in episode.measures.items())
        console.print(
            f"level {args.seed}: return {episode.ret:.3f}  length {episode.length}  {measures}", highlight=False
        )
    if video is None and has_screen():
        show_window(recording.frames, args.fps, f"{policy.spec.env_id}, level {args.seed}")
        return 0
    if video is None:
        video = Path(f"{policy.spec.env_id.replace('/', '_').replace(':', '_')}_level_{args.seed}.mp4")
        console.print("no screen here, so this writes a video")
    write_video(video, recording.frames, args.fps)
    console.print(f"video: {video}", highlight=False, soft_wrap=True)
    return 0
