"""Short videos of held-out episodes, made while an agent trains, which its numbers don't depend on."""

import sys
from time import perf_counter

from ppo_tbptt.config import Config
from ppo_tbptt.envs import EnvSpec
from ppo_tbptt.evaluation.policy import Policy
from ppo_tbptt.models import Agent
from ppo_tbptt.run.folder import RunDir
from ppo_tbptt.run.sinks import RunWriter

MOST_STEPS = 300
"""Longer episodes are cut."""
MOST_TIME = 0.03
"""Share of the time since the run was started (or resumed) that the videos may take."""
FPS = 6
HOLD = 6
"""Pictures for which the last one stays."""
MOST_GIF_PICTURES = 60
"""TensorBoard gets every second, third, ... one of more: its files hold every video that was ever made."""


class TrainingVideos:
    """Writes to ``videos/`` of a run, and the same as an animated GIF to TensorBoard.

    The agent is the one that trains; environment, recurrent state and action noise are its own.
    """

    def __init__(self, agent: Agent, spec: EnvSpec, config: Config, run: RunDir, writer: RunWriter) -> None:
        self._agent, self._spec, self._config, self._run, self._writer = agent, spec, config, run, writer
        self._began = perf_counter()
        self._spent = 0.0
        self._every = config.train.video_every

    def when_due(self, iteration: int, env_steps: int) -> None:
        """Make a video after every ``train.video_every`` iterations and after the last one.

        Skipped, but for the last, where videos have taken too much time. Whatever prevents one is said in one line,
        and there are no more.
        """
        last = env_steps >= self._config.total_steps
        if not self._every or (iteration % self._every and not last):
            return
        began = perf_counter()
        if not last and self._spent > MOST_TIME * (began - self._began):
            return
        train = self._config.train
        level = train.eval_first_seed + (-(-iteration // self._every) - 1) % train.eval_num_seeds
        try:
            self._make(level, env_steps)
        except Exception as error:  # whatever an environment's drawing or a full disk comes up with
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            print(f"warning: no more videos of this run ({reason})", file=sys.stderr)
            self._every = 0
        self._spent += perf_counter() - began

    def _make(self, level: int, env_steps: int) -> None:
        # Here, because they bring matplotlib, Pillow and ffmpeg, which training does without.
        from ppo_tbptt.watch.record import record, watched_env
        from ppo_tbptt.watch.video import gif, pictures, write_video

        policy = Policy(self._agent, self._spec, self._config, env_steps=env_steps)
        with watched_env(self._config.env) as env:
            greedy = self._config.train.eval_greedy
            recording = record(policy, env, seed=level, greedy=greedy, max_steps=MOST_STEPS)
        frames = pictures([recording], note=f"after {env_steps:,} steps", hold=HOLD)
        write_video(self._run.videos / f"steps_{env_steps:09d}_level{level}.mp4", frames, FPS)
        stride = -(-len(frames) // MOST_GIF_PICTURES)
        encoded = gif(frames[::stride], FPS / stride)
        height, width, _ = frames[0].shape
        self._writer.show(lambda board: board.gif("held-out episode", encoded, width, height, env_steps))
