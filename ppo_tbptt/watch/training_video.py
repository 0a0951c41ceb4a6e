"""Short videos of held-out episodes, made while an agent trains, which its numbers don't depend on."""

import sys
from time import perf_counter

from ppo_tbptt.evaluation.policy import Policy
from ppo_tbptt.run.sinks import RunWriter
from ppo_tbptt.training.callbacks import Callback, Iteration
from ppo_tbptt.training.trainer import Trainer

MOST_STEPS = 300
"""Longer episodes are cut."""
MOST_TIME = 0.03
"""Share of the time since the run was started (or resumed) that the videos may take."""
FPS = 6
HOLD = 6
"""Pictures for which the last one stays."""
MOST_GIF_PICTURES = 60
"""TensorBoard gets every second, third, ... one of more: its files hold every video that was ever made."""


class RecordVideos(Callback):
    """Record a held-out episode every ``train.video_every`` iterations and after the last one.

    It goes to ``videos/`` of the run, and as an animated GIF to TensorBoard. Environment, recurrent state and action
    noise are the recording's own. Videos but the last are skipped where they have taken too much time. Whatever
    prevents one is said in one line, and there are no more.
    """

    def __init__(self) -> None:
        self._began = perf_counter()
        self._spent = 0.0
        self._failed = False

    def after_iteration(self, iteration: Iteration) -> None:
        train, began = iteration.trainer.config.train, perf_counter()
        every = train.video_every
        if (
            self._failed
            or iteration.trainer.writer is None
            or not every
            or (iteration.number % every and not iteration.last)
        ):
            return
        if not iteration.last and self._spent > MOST_TIME * (began - self._began):
            return
        level = train.eval_first_seed + (-(-iteration.number // every) - 1) % train.eval_num_seeds
        try:
            _record(iteration.trainer, iteration.trainer.writer, level)
        except Exception as error:  # whatever an environment's drawing or a full disk comes up with
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            print(f"warning: no more videos of this run ({reason})", file=sys.stderr)
            self._failed = True
        self._spent += perf_counter() - began


def _record(trainer: Trainer, writer: RunWriter, level: int) -> None:
    # Here, because they bring matplotlib, Pillow and ffmpeg, which training does without.
    from ppo_tbptt.watch.record import record, watched_env
    from ppo_tbptt.watch.video import gif, pictures, write_video

    env_steps = trainer.env_steps
    policy = Policy(trainer.agent, trainer.envs.spec, trainer.config, env_steps=env_steps)
    with watched_env(trainer.config.env) as env:
        greedy = trainer.config.train.eval_greedy
        recording = record(policy, env, seed=level, greedy=greedy, max_steps=MOST_STEPS)
    frames = pictures([recording], note=f"after {env_steps:,} steps", hold=HOLD)
    write_video(writer.run.videos / f"steps_{env_steps:09d}_level{level}.mp4", frames, FPS)
    stride = -(-len(frames) // MOST_GIF_PICTURES)
    encoded = gif(frames[::stride], FPS / stride)
    height, width, _ = frames[0].shape
    writer.write_tensorboard(lambda board: board.gif("held-out episode", encoded, width, height, env_steps))
