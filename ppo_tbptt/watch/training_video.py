"""The callback that records short videos of held-out episodes during training."""

import sys
from time import perf_counter

from ppo_tbptt.evaluation.policy import Policy
from ppo_tbptt.run.sinks import RunWriter
from ppo_tbptt.training.callbacks import Callback, Iteration
from ppo_tbptt.training.trainer import Trainer

MOST_STEPS = 300
"""Longer episodes are capped."""
MOST_TIME = 0.03
"""Largest share of the time since the run was started or resumed that videos may take."""
FPS = 6
HOLD = 6
"""Frames for which the last picture is repeated."""
MOST_GIF_FRAMES = 60
"""Of longer videos TensorBoard gets every second, third, ... frame, because its files keep all videos of a run."""


class RecordVideos(Callback):
    """Record a held-out episode every ``train.video_every`` iterations and after the last one.

    The video is written to the run's ``videos/``, and to TensorBoard as an animated GIF. It has its own environment,
    recurrent state and action noise, so training does not depend on it. All videos but the last are skipped while
    their share of the time exceeds :data:`MOST_TIME`. The first failure is reported in one line and ends recording.
    """

    def __init__(self) -> None:
        self._began = perf_counter()
        self._spent = 0.0
        self._failed = False

    def after_iteration(self, iteration: Iteration) -> None:
        """Record an episode if one is due."""
        trainer, began = iteration.trainer, perf_counter()
        train, every = trainer.config.train, trainer.config.train.video_every
        if self._failed or trainer.writer is None or not every:
            return
        due = iteration.number % every == 0 and self._spent <= MOST_TIME * (began - self._began)
        if not due and not iteration.last:
            return
        level = train.eval_first_seed + (-(-iteration.number // every) - 1) % train.eval_num_seeds
        try:
            _record(trainer, trainer.writer, level)
        except Exception as error:  # an environment's rendering may raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            print(f"warning: no more videos of this run ({reason})", file=sys.stderr)
            self._failed = True
        self._spent += perf_counter() - began


def _record(trainer: Trainer, writer: RunWriter, level: int) -> None:
    # Imported here, because training without videos needs neither matplotlib nor Pillow nor ffmpeg.
    from ppo_tbptt.watch.environment import watched_env
    from ppo_tbptt.watch.recording import record_episode
    from ppo_tbptt.watch.video import frames_of, gif, write_video

    env_steps = trainer.env_steps
    policy = Policy(trainer.agent, trainer.envs.spec, trainer.config, env_steps=env_steps)
    with watched_env(trainer.config.env, trainer.agent.previous) as env:
        greedy = trainer.config.train.eval_greedy
        recording = record_episode(policy, env, seed=level, greedy=greedy, max_steps=MOST_STEPS)
    frames = frames_of([recording], note=f"after {env_steps:,} steps", hold=HOLD)
    write_video(writer.run.videos / f"steps_{env_steps:09d}_level{level}.mp4", frames, FPS)
    stride = -(-len(frames) // MOST_GIF_FRAMES)
    encoded = gif(frames[::stride], FPS / stride)
    height, width, _ = frames[0]().shape
    writer.write_tensorboard(lambda board: board.image("held-out episode", encoded, width, height, env_steps))
