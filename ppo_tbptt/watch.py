"""An episode to look at: what the agent sees beside the environment's ground truth, as a video or in a window."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import imageio.v2 as imageio
import numpy as np

from ppo_tbptt.config import EnvConfig
from ppo_tbptt.envs import MEMORY_GYM_IDS, EnvError, EnvSpec, Episode, SingleEnv, make_env
from ppo_tbptt.models.build import check_fits
from ppo_tbptt.policy import Policy

VIEW = 336
"""Edge of each view in pixels; the ground truth of MemoryGym's tasks has this size."""
GAP = 8
"""Pixels between two views."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """One episode: ``frames`` are u8 ``[rows, columns, 3]``, one for each observation that the agent acted on,
    and one for the last."""

    frames: list[np.ndarray]
    episode: Episode | None
    """None where the episode was cut at the given number of steps."""


def record(policy: Policy, config: EnvConfig, *, seed: int, greedy: bool = False, max_steps: int = 16_384) -> Recording:
    """Play one episode of the environment ``config`` on level ``seed``.

    Raises:
        EnvError: the environment does not fit the agent, or neither renders nor has an image observation.
    """
    env = make_env(
        config.id, options=config.options, max_episode_steps=config.max_episode_steps, render_mode="ground_truth"
    )
    try:
        check_fits(policy.agent, env.spec)
        policy.reset(seed=seed)
        obs = env.reset(seed)
        frames = [_frame(env, policy.spec, obs)]
        episode = None
        while episode is None and len(frames) <= max_steps:
            action = policy.act(obs, greedy=greedy)
            obs, _, _, _, episode = env.step(np.atleast_1d(np.asarray(action, dtype=np.int64)))
            frames.append(_frame(env, policy.spec, obs))
    finally:
        env.close()
    return Recording(frames=frames, episode=episode)


def _frame(env: SingleEnv, spec: EnvSpec, obs: dict[str, np.ndarray]) -> np.ndarray:
    """The agent's view, and the environment's own rendering to the right of it."""
    views = [obs[key] for key, array in spec.obs.items() if len(array.shape) == 3 and array.shape[2] in (1, 3)]
    if spec.env_id in MEMORY_GYM_IDS:
        views = [view.transpose(1, 0, 2) for view in views]  # its frames are (column, row, channel)
    rendered = env.render()
    panels = [_enlarge(view) for view in views] + ([] if rendered is None else [_enlarge(rendered)])
    if not panels:
        raise EnvError(f"{spec.env_id}: nothing to show: it renders no image and its observations are none")
    height = max(panel.shape[0] for panel in panels)
    padded = [
        np.pad(
            panel, ((0, height - panel.shape[0]), (0, GAP), (0, 0)), constant_values=96
        )  # grey: views are often black
        for panel in panels
    ]
    joined = np.concatenate(padded, axis=1)[:, :-GAP]
    return np.ascontiguousarray(
        joined[: joined.shape[0] // 2 * 2, : joined.shape[1] // 2 * 2]
    )  # H.264 wants even sizes


def _enlarge(view: np.ndarray) -> np.ndarray:
    """By whole pixels, to about :data:`VIEW`; grey becomes RGB."""
    factor = max(1, VIEW // max(view.shape[:2]))
    view = np.repeat(np.repeat(np.asarray(view), factor, axis=0), factor, axis=1)
    return np.repeat(view, 3, axis=2) if view.shape[2] == 1 else view[..., :3]


def write_video(path: Path, frames: list[np.ndarray], fps: float) -> None:
    """An H.264 MP4 that plays in a browser, or a GIF that loops, by the file's suffix.

    Raises:
        ValueError: another suffix.
    """
    check_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".gif":
        imageio.mimwrite(path, frames, duration=1000 / fps, loop=0)  # type: ignore[arg-type]
    else:
        imageio.mimwrite(path, frames, fps=fps, codec="libx264", macro_block_size=2)  # type: ignore[arg-type]


def check_suffix(path: Path) -> None:
    """Raises:
    ValueError: neither .mp4 nor .gif.
    """
    if path.suffix.lower() not in (".mp4", ".gif"):
        raise ValueError(f"--video {path}: {path.suffix or 'no suffix'!r}; use .mp4 or .gif")


def has_screen() -> bool:
    """Whether a window can be opened here."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def show_window(frames: list[np.ndarray], fps: float, title: str) -> None:
    """Play ``frames`` in a window once; closing it or Escape ends it early.

    The episode is over by then: MemoryGym's environments own the process's only pygame display while they run.
    """
    os.environ.pop("SDL_VIDEODRIVER", None)
    import pygame

    pygame.quit()
    pygame.display.init()
    try:
        screen = pygame.display.set_mode((frames[0].shape[1], frames[0].shape[0]))
        pygame.display.set_caption(title)
        clock = pygame.time.Clock()
        for frame in frames:
            for event in pygame.event.get():
                if event.type == pygame.QUIT or (event.type == pygame.KEYDOWN and event.key == pygame.K_ESCAPE):
                    return
            pygame.surfarray.blit_array(screen, frame.transpose(1, 0, 2))
            pygame.display.flip()
            clock.tick(fps)
    finally:
        pygame.quit()
