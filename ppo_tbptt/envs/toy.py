"""Toy environments whose right answers are known, registered with gymnasium as `ppo_tbptt/<Name>-v0`.

Memory tasks, and probes whose values are known in closed form.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np


def vector_box(size: int) -> gym.spaces.Box:
    """Return the space of unbounded float32 vectors of `size` numbers."""
    return gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)


def vector(*values: float | int | bool) -> np.ndarray:
    """Return f32 [len(values)]."""
    return np.array(values, np.float32)


Step = tuple[Any, float, bool, bool, dict[str, Any]]


class ToyEnv(gym.Env[Any, Any]):
    """An environment whose reset takes the options that `default_reset_parameters` lists, all of them numbers.

    Unless a subclass says otherwise, it observes 0 and has two actions.

    headline: the measure it is judged by, with its largest value (None: unbounded).
    options: the ones of this episode, complete.
    t: steps taken in this episode.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (gymnasium's declaration)
    default_reset_parameters: ClassVar[dict[str, Any]] = {}
    minimum: ClassVar[float] = 1
    headline: tuple[str, float | None] = ("return", None)
    observation_space: gym.spaces.Space[Any] = vector_box(1)
    action_space: gym.spaces.Space[Any] = gym.spaces.Discrete(2)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    @classmethod
    def process_reset_params(cls, options: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the defaults updated by `options`.

        Raises:
            ValueError: one is unknown, no number, or below the class's `minimum`.
        """
        complete = dict(cls.default_reset_parameters)
        for key, value in (options or {}).items():
            if key not in complete:
                raise ValueError(f"unknown option {key!r}, existing ones: {', '.join(complete)}")
            if not isinstance(value, int | float) or not value >= cls.minimum:
                raise ValueError(f"{key} must be a number and at least {cls.minimum}, not {value!r}")
            complete[key] = value
        return complete

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; subclasses draw it in `begin`."""
        super().reset(seed=seed)
        self.options = self.process_reset_params(options)
        self.t = 0
        self.begin(seed)
        return self.observe(), {}

    def begin(self, seed: int | None) -> None:
        """Draw an episode from `np_random`, or from `seed` itself."""

    def observe(self) -> Any:
        """Return the observation of the present state."""
        return vector(0.0)


class PocMemory(ToyEnv):
    """Remember which end of a line is the right one.

    The agent starts in the middle of [-1, 1]. Goals +1 and -1 lie at the ends, at random: the right one has +1.
    Observation `[goal on the left, position, goal on the right]`; both goals read 0 once `num_show_steps`
    observations have shown them, and until then the agent cannot move, so that its position cannot remember for it.
    Actions: 0 left, 1 right, by `step_size`. Reward: -0.1 per step, but at an end +1 or -1, which terminates.
    Truncated after `num_show_steps` and four times the steps to an end.

    Without memory the decision in the middle is the same whatever was shown: success 0.5 at best, return
    -0.1 (length - 1) on average. With memory: success 1.0, return 1 - 0.1 (length - 1), where
    length = num_show_steps + 1 / step_size (0.4 by default).
    """

    default_reset_parameters: ClassVar[dict[str, Any]] = {"num_show_steps": 2, "step_size": 0.2}
    minimum = 0.01
    headline = ("success", 1.0)
    observation_space = vector_box(3)

    def begin(self, seed: int | None) -> None:
        self.right_end = 1 - 2 * int(self.np_random.integers(2))
        self.cell = 0
        self.cells = max(1, round(1 / self.options["step_size"]))

    def observe(self) -> np.ndarray:
        shown = self.right_end if self.t < self.options["num_show_steps"] else 0
        return vector(-shown, self.cell / self.cells, shown)

    def step(self, action: Any) -> Step:
        if self.t >= self.options["num_show_steps"]:
            self.cell += 1 if action == 1 else -1
        self.t += 1
        terminated = abs(self.cell) == self.cells
        success = terminated and self.cell == self.right_end * self.cells
        reward = (1.0 if success else -1.0) if terminated else -0.1
        truncated = not terminated and self.t >= self.options["num_show_steps"] + 4 * self.cells
        info = {"success": float(success)} if terminated or truncated else {}
        return self.observe(), reward, terminated, truncated, info


class DelayedChoice(ToyEnv):
    """Choose the action that the first observation named, `delay` steps later (after Hochreiter & Schmidhuber 1997).

    Observation `[whether the choice is due, four numbers]`: one of four cues, one-hot, at step 0; from then on Gaussian
    noise of deviation `noise` on the same line, so that no trace of the cue stays by itself. Actions do nothing until
    step `delay`, which ends the episode: reward 1 for the cue's action, else 0.

    Without memory, or with any fixed action, success is 1/4; with memory it is 1. Sequences begin with the episode, so
    backpropagation links choice and cue if, and only if, `sequence_length` is above `delay`.
    """

    default_reset_parameters: ClassVar[dict[str, Any]] = {"delay": 7, "noise": 1.0}
    minimum = 0
    headline = ("success", 1.0)
    observation_space = vector_box(5)
    action_space = gym.spaces.Discrete(4)

    def begin(self, seed: int | None) -> None:
        self.cue = int(self.np_random.integers(4))

    @property
    def due(self) -> bool:
        return self.t >= self.options["delay"]

    def observe(self) -> np.ndarray:
        if self.t == 0:
            return vector(self.due, *(self.cue == cue for cue in range(4)))
        return vector(self.due, *(self.options["noise"] * self.np_random.standard_normal(4)))

    def step(self, action: Any) -> Step:
        terminated, success = self.due, float(action == self.cue)
        self.t += 1
        return self.observe(), success * terminated, terminated, False, {"success": success} if terminated else {}


class Recall(ToyEnv):
    """Items shown one after the other, then one question at a step, each worth a reward of 1; then the episode ends.

    `items` is how many are shown. Observation `[whether an answer is due, one-hot item]`, without an item where there
    is none to see. Actions do nothing while items are shown, and no action changes what comes later.

    most: largest number of items.
    shown: the items, by number; a subclass draws them in `begin`.
    questions: for each, the item that is seen (None: none) and the right action.
    """

    default_reset_parameters: ClassVar[dict[str, Any]] = {"items": 4}
    headline = ("recalled", 1.0)
    most: ClassVar[int]
    shown: list[int]
    questions: list[tuple[int | None, int]]

    @classmethod
    def process_reset_params(cls, options: Mapping[str, Any] | None) -> dict[str, Any]:
        complete = super().process_reset_params(options)
        if complete["items"] not in range(1, cls.most + 1):
            raise ValueError(f"items must be a whole number from 1 to {cls.most}, not {complete['items']!r}")
        return complete

    def reset(self, *, seed: int | None = None, options: Mapping[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.right = 0
        return super().reset(seed=seed, options=options)

    def observe(self) -> np.ndarray:
        asked = self.t - len(self.shown)
        obs = np.zeros(self.observation_space.shape or (), np.float32)
        obs[0] = asked >= 0
        item = self.shown[self.t] if asked < 0 else self.questions[asked][0] if asked < len(self.questions) else None
        if item is not None:
            obs[1 + item] = 1
        return obs

    def step(self, action: Any) -> Step:
        asked = self.t - len(self.shown)
        right = asked >= 0 and int(action) == self.questions[asked][1]
        self.right += right
        self.t += 1
        terminated = asked + 1 == len(self.questions)
        share = self.right / len(self.questions)
        info = {"recalled": share, "success": float(share == 1)} if terminated else {}
        return self.observe(), float(right), terminated, False, info


class OrderedRecall(Recall):
    """See `items` symbols, each one of four, one after the other; then give them back in the same order.

    The questions show nothing: which symbol is due must be counted. The action is the symbol. An episode has
    2 `items` steps.

    Measures: `recalled`, the share of right answers, and `success`, whether all were right. Symbols are drawn
    independently and uniformly, so without memory every answer is right with probability 1/4: `recalled` is 1/4 and
    `success` is 4^-items on average, whatever is done. With memory both are 1.
    """

    most = 64
    observation_space = vector_box(5)
    action_space = gym.spaces.Discrete(4)

    def begin(self, seed: int | None) -> None:
        self.shown = self.np_random.integers(4, size=int(self.options["items"])).tolist()
        self.questions = [(None, symbol) for symbol in self.shown]


class UnorderedRecall(Recall):
    """See half of a set of 2 `items` things, one after the other; then say of each of the set whether it was shown.

    What is shown, its order, and the order of the questions are drawn uniformly. The set's things are the first of 32
    that an observation can hold. Action 1 is yes, 0 is no. An episode has 3 `items` steps. No answer depends on the
    order in which things were shown.

    Measures: `recalled`, the share of right answers, and `success`, whether all were right. Half of the set was shown,
    so without memory every answer is right with probability 1/2, and `recalled` is 1/2 on average, whatever is done;
    a fixed answer gets exactly 1/2 in every episode. With memory both are 1.
    """

    most = 16
    observation_space = vector_box(1 + 2 * most)

    def begin(self, seed: int | None) -> None:
        items = int(self.options["items"])
        self.shown = self.np_random.permutation(2 * items)[:items].tolist()
        asked = self.np_random.permutation(2 * items).tolist()
        self.questions = [(item, int(item in self.shown)) for item in asked]


class ProbeConstant(ToyEnv):
    """One step, observation 0, reward 1 whatever is done: V(0) = 1."""

    def step(self, action: Any) -> Step:
        return self.observe(), 1.0, True, False, {}


class ProbeObservation(ToyEnv):
    """One step, observation +1 or -1 at random, reward equal to it: V(obs) = obs."""

    def begin(self, seed: int | None) -> None:
        self.sign = 1 - 2 * int(self.np_random.integers(2))

    def observe(self) -> np.ndarray:
        return vector(self.sign)

    def step(self, action: Any) -> Step:
        return self.observe(), float(self.sign), True, False, {}


class ProbeDiscount(ToyEnv):
    """Two steps, observations 0 then 1, rewards 0 then 1: V(0) = gamma, V(1) = 1."""

    def observe(self) -> np.ndarray:
        return vector(self.t)

    def step(self, action: Any) -> Step:
        self.t += 1
        return self.observe(), float(self.t == 2), self.t == 2, False, {}


class ProbeAction(ToyEnv):
    """One step, observation 0, reward +1 for action 1 and -1 for action 0: a greedy policy takes 1, then V(0) = 1."""

    headline = ("success", 1.0)

    def step(self, action: Any) -> Step:
        return self.observe(), 1.0 if action == 1 else -1.0, True, False, {"success": float(action == 1)}


class ProbeActionObservation(ProbeObservation):
    """One step, observation +1 or -1 at random, reward +1 for action 1 at +1 and 0 at -1, else -1: V(obs) = 1 then."""

    headline = ("success", 1.0)

    def step(self, action: Any) -> Step:
        right = (action == 1) == (self.sign == 1)
        return self.observe(), 1.0 if right else -1.0, True, False, {"success": float(right)}


class Truncate(ToyEnv):
    """Reward 1 for ever, observation 0, truncated after `length` steps: V = 1 / (1 - gamma) iff truncation bootstraps.

    Without bootstrapping the value is that of half an episode or so, for gamma near 1 far below.
    """

    default_reset_parameters: ClassVar[dict[str, Any]] = {"length": 10}

    def step(self, action: Any) -> Step:
        self.t += 1
        return self.observe(), 1.0, False, self.t >= self.options["length"], {}


_TOYS = (
    PocMemory,
    DelayedChoice,
    OrderedRecall,
    UnorderedRecall,
    ProbeConstant,
    ProbeObservation,
    ProbeDiscount,
    ProbeAction,
    ProbeActionObservation,
    Truncate,
)
TOY_IDS: tuple[str, ...] = tuple(f"ppo_tbptt/{toy.__name__}-v0" for toy in _TOYS)

for _id, _toy in zip(TOY_IDS, _TOYS, strict=True):
    if _id not in gym.registry:
        gym.register(_id, entry_point=f"{__name__}:{_toy.__name__}")
