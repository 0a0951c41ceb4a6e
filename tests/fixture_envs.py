"""Environments for tests of the machinery: every number they give out can be told from its place."""

import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any, ClassVar, SupportsInt

import gymnasium as gym
import numpy as np

from ppo_tbptt.envs import BatchedEnv, Episode, LevelSource
from ppo_tbptt.envs.toy import ToyEnv, vector, vector_box

Step = tuple[Any, float, bool, bool, dict[str, Any]]


class GivenLevels(LevelSource):
    """Environment i plays the i-th level of each round, and those of the last one for ever; -1 leaves it idle.

    heard: (environment, episode) in the order in which it was told of them.
    """

    def __init__(self, *rounds: Sequence[int]) -> None:
        self.rounds, self.begun = rounds, [0] * len(rounds[0])
        self.heard: list[tuple[int, Episode]] = []

    def peek(self, env: int) -> int | None:
        level = self.rounds[min(self.begun[env], len(self.rounds) - 1)][env]
        return None if level < 0 else int(level)

    def begin(self, env: int) -> int | None:
        level = self.peek(env)
        self.begun[env] += 1
        return level

    def ended(self, env: int, episode: Episode) -> None:
        self.heard.append((env, episode))


def play(envs: BatchedEnv, rng: np.random.Generator, steps: int) -> list[Any]:
    """Random actions, each three times. Returns all that the batch gives out, as bytes and episodes."""
    nvec = envs.spec.action_nvec
    action = np.zeros((envs.num_envs, len(nvec)), np.int64)
    stream: list[Any] = [x.tobytes() for x in envs.obs.values()]
    for step in range(steps):
        if step % 3 == 0:
            action = rng.integers(0, nvec, action.shape)
        for group, rows in enumerate(envs.groups):
            envs.send(action[rows], group)
        results = [envs.receive(group) for group in range(len(envs.groups))]
        assert all(result.failed is None and result.faults == () for result in results)
        ends = [result.terminated | result.truncated for result in results]
        for name in ("reward", "terminated", "truncated"):
            stream.append(np.concatenate([getattr(result, name) for result in results]).tobytes())
        for key, x in envs.obs.items():
            finals = [result.final_obs[key][end] for result, end in zip(results, ends, strict=True)]
            stream += [x.tobytes(), np.concatenate(finals).tobytes()]
        stream.append([episode for result in results for episode in result.episodes])
    return stream


def ended(stream: list[Any]) -> list[Episode]:
    """All episodes in what `play` returned."""
    return [episode for entry in stream if isinstance(entry, list) for episode in entry]


def tracer_length(seed: SupportsInt, min_length: int = 3, max_length: int = 9) -> int:
    """Number of steps of Tracer's episode of level `seed`."""
    return min_length + int(seed) % (max_length - min_length + 1)


def tracer_terminates(seed: SupportsInt, min_length: int = 3, max_length: int = 9) -> bool:
    """Whether Tracer's episode of level `seed` is terminated, not truncated."""
    return (int(seed) // (max_length - min_length + 1)) % 2 == 0


def tracer_reward(t: SupportsInt, action: Any) -> float:
    """Reward of Tracer's step from observation `[seed, episode, t]` with `action`: exact in float32."""
    return int(t) + int(action[0]) / 4 + int(action[1]) / 16


class Tracer(ToyEnv):
    """Observation `[level seed, episode of this instance from 0, t]`; see `tracer_length`, `_terminates`, `_reward`."""

    default_reset_parameters: ClassVar[dict[str, Any]] = {"min_length": 3, "max_length": 9}
    observation_space = vector_box(3)
    action_space = gym.spaces.MultiDiscrete([3, 2])

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        self.episode = -1

    def begin(self, seed: int | None) -> None:
        self.level = seed or 0
        self.episode += 1

    def observe(self) -> np.ndarray:
        return vector(self.level, self.episode, self.t)

    def step(self, action: np.ndarray) -> Step:
        reward = tracer_reward(self.t, action)
        self.t += 1
        end = self.t == tracer_length(self.level, **self.options)
        terminates = tracer_terminates(self.level, **self.options)
        return self.observe(), reward, end and terminates, end and not terminates, {"last_t": self.t} if end else {}


class ImageToy(ToyEnv):
    """Recall a colour: one frame in it (0 red, 1 green), `delay` black ones, a white one; the next action answers.

    Reward 1 for the right answer, else 0; without memory 0.5 at best. Frames u8 [84, 84, 3].
    """

    default_reset_parameters: ClassVar[dict[str, Any]] = {"delay": 2}
    minimum = 0
    headline = ("success", 1.0)
    observation_space = gym.spaces.Box(0, 255, (84, 84, 3), np.uint8)
    action_space: gym.spaces.Space[Any] = gym.spaces.Discrete(2)

    def begin(self, seed: int | None) -> None:
        self.answer = self.np_random.integers(0, 2, 2).tolist()

    def observe(self) -> Any:
        frame = np.zeros((84, 84, 3), np.uint8)
        if self.t == 0:
            frame[:, :, self.answer[0]] = 255
        elif self.t > self.options["delay"]:
            frame[:] = 255
        return frame

    def step(self, action: Any) -> Step:
        self.t += 1
        end = self.t == self.options["delay"] + 2
        right = self.is_right(action)
        return self.observe(), float(end and right), end, False, {"success": float(right)} if end else {}

    def is_right(self, action: Any) -> bool:
        """Whether `action` is the answer."""
        return int(action) == self.answer[0]


class DictToy(ImageToy):
    """ImageToy with two questions: "image" as there, "vector" f32 [2] = [cue +1 or -1, then 0; 1 when to answer].

    The first action branch answers the colour, the second the cue (0 for -1, 1 for +1); both must be right: 0.25
    without memory.
    """

    observation_space = gym.spaces.Dict(  # pyright: ignore[reportAssignmentType]
        {"image": ImageToy.observation_space, "vector": vector_box(2)}
    )
    action_space = gym.spaces.MultiDiscrete([2, 2])

    def observe(self) -> dict[str, np.ndarray]:
        cue = 2 * self.answer[1] - 1 if self.t == 0 else 0
        return {"image": super().observe(), "vector": vector(cue, self.t > self.options["delay"])}

    def is_right(self, action: Any) -> bool:
        return [int(branch) for branch in action] == self.answer


class Faulty(ToyEnv):
    """Fails as told, -1 for never. Else observation `[t, level seed]`, reward 0.25, terminated after `length` steps.

    level: the level seed it fails at, -1 for all.  seconds: that each step takes.
    step_at: step (from 1) that raises.  fatal_at: that raises what is no Exception.
    exit_at: that ends the interpreter.  kill_at: that kills the process.  hang_at: that takes a minute.
     reward_at, obs_at: with NaN there.  shape_at: with an observation of three numbers.
    reset_at: reset (from 1, 0 for every) that raises.  space_at: likewise, after which there are three actions.
    kill_level: the level seed whose reset kills the process.
    """

    default_reset_parameters: ClassVar[dict[str, Any]] = {
        "length": 1000,
        "seconds": 0,
        **dict.fromkeys(("level", "step_at", "fatal_at", "exit_at", "kill_at", "hang_at"), -1),
        **dict.fromkeys(("reward_at", "obs_at", "shape_at", "reset_at", "space_at", "kill_level"), -1),
    }
    minimum = -1
    observation_space = vector_box(2)
    action_space = gym.spaces.Discrete(2)
    resets = 0

    def begin(self, seed: int | None) -> None:
        self.level = seed or 0
        self.resets += 1
        if self.options["kill_level"] == seed:
            os.kill(os.getpid(), signal.SIGKILL)
        self.fails = self.options["level"] in (-1, seed)
        if self._now("reset_at", 0, self.resets):
            raise RuntimeError("as told, in reset")
        if self._now("space_at", 0, self.resets):
            self.action_space = gym.spaces.Discrete(3)

    def observe(self) -> np.ndarray:
        if self._now("shape_at", self.t):
            return vector(0, 0, 0)
        return vector(np.nan if self._now("obs_at", self.t) else self.t, self.level)

    def step(self, action: Any) -> Step:
        self.t += 1
        time.sleep(self.options["seconds"])
        if self._now("step_at", self.t):
            raise RuntimeError("as told, in step")
        if self._now("fatal_at", self.t):
            raise BaseException("not even an Exception")
        if self._now("exit_at", self.t):
            sys.exit("as told")
        if self._now("kill_at", self.t):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._now("hang_at", self.t):
            time.sleep(60)
        reward = np.nan if self._now("reward_at", self.t) else 0.25
        return self.observe(), reward, self.t == self.options["length"], False, {}

    def _now(self, option: str, *when: int) -> bool:
        return self.fails and self.options[option] in when


class Moody(Faulty):
    """Its first instance is like any other; the second raises, and the third has another observation."""

    def __init__(self) -> None:
        super().__init__()
        with open(os.environ["MOODY"], "a") as log:
            number = log.tell()
            log.write("x")
        if number == 1:
            raise KeyError("moody")
        if number == 2:
            self.observation_space = vector_box(3)


for _kind in (Tracer, ImageToy, DictToy, Faulty, Moody):
    if f"fixture/{_kind.__name__}-v0" not in gym.registry:
        gym.register(f"fixture/{_kind.__name__}-v0", entry_point=f"fixture_envs:{_kind.__name__}")
