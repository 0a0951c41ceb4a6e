"""A trained agent for use outside training: load it, reset it, ask it for actions."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppo_tbptt.config import Config
from ppo_tbptt.envs import EnvSpec
from ppo_tbptt.models import Agent
from ppo_tbptt.models.agent import build_agent
from ppo_tbptt.ppo.acting import ActorOutput, act
from ppo_tbptt.run.agents import agent_at
from ppo_tbptt.run.checkpoint import CheckpointError, load_checkpoint
from ppo_tbptt.run.folder import run_at
from ppo_tbptt.run.weights import SUFFIX, load_weights
from ppo_tbptt.runtime.device import prepare_device


class Policy:
    """A trained agent that keeps its recurrent state between calls.

        policy = Policy.load("runs/quickstart")
        obs, _ = env.reset(seed=200_000)
        action = policy.act(obs)

    ``act`` takes what a Gymnasium environment gives (an array, or a dict of them) and returns what its ``step``
    takes. An array with one more leading axis is a batch: one action and one state per row. For an agent that is fed
    the previous action or reward, wrap the environment: ``PreviousInputs(env, policy.agent.previous)``.
    """

    def __init__(
        self, agent: Agent, spec: EnvSpec, config: Config, *, env_steps: int = 0, path: Path | None = None
    ) -> None:
        """Act with `agent`, in its present state of training; `spec` is what it was trained on."""
        self.agent = agent.eval()
        self.spec = spec
        self.config = config
        self.env_steps = env_steps
        """Environment steps that the agent was trained for."""
        self.path = path
        """The checkpoint or weights that :meth:`load` has read."""
        self.value: Tensor | None = None
        """V of the last observation given to ``act``, ``[]`` or ``[N]``."""
        self._last: ActorOutput | None = None
        self._state: Tensor | None = None
        self._generator = torch.Generator()
        self.reset(seed=0)

    @classmethod
    def load(cls, path: str | Path, *, device: str = "cpu") -> "Policy":
        """Load a run's newest checkpoint, a checkpoint file, exported weights (``.safetensors``), or an agent.

        An agent is the folder of an exported one, or the name of one of the package's (``ppo-tbptt agents``).

        Raises:
            CheckpointError, RunDirError: ``path`` holds nothing that can be loaded.
            DeviceError: ``device`` does not exist.
        """
        file = Path(path)
        agent_dir = agent_at(file)
        file = file if agent_dir is None else agent_dir.weights
        run = run_at(file)
        if run is not None:
            file, tree = run.load_newest()
        else:
            tree = load_weights(file) if file.suffix.lower() == SUFFIX else load_checkpoint(file)
        where = prepare_device(device)
        try:
            config = Config.from_dict(tree["config"], source=str(file))
            spec, env_steps = EnvSpec.from_json(tree["spec"]), int(tree["env_steps"])
            _check_shapes(config, spec, tree["agent"])
            agent = build_agent(config, spec, where)
            agent.load_state_dict(tree["agent"])
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the file may hold anything
            reason = " ".join(str(error).split())[:200]
            if "agent" in tree.get("handed_in", []):
                what = f"{file}: its agent was handed in to the trainer and no config describes it"
                raise CheckpointError(f"{what}; build it, and load the checkpoint's 'agent' into it") from error
            raise CheckpointError(f"{file}: its weights and its config don't belong together ({reason})") from error
        return cls(agent, spec, config, env_steps=env_steps, path=file)

    @torch.no_grad()
    def reset(self, mask: np.ndarray | None = None, *, seed: int | None = None) -> None:
        """Reset the recurrent state of all rows, or of those where ``mask`` (bool ``[N]``) is True.

        ``seed`` restarts the stream of random numbers that actions are sampled with.
        """
        if seed is not None:
            self._generator.manual_seed(seed)
        if mask is None or self._state is None:
            self._state = None
        else:
            self._state = self.agent.reset_state(self._state, torch.from_numpy(mask).to(self.agent.device))

    @torch.no_grad()
    def act(self, obs: Any, *, greedy: bool = False) -> Any:
        """Choose the action for ``obs``: sampled, or the most probable one.

        Returns an int for a Discrete space and an int64 array ``[A]`` for a MultiDiscrete one; for a batch an array
        with a leading axis of N.

        Raises:
            ValueError: the agent was trained on other shapes, or the batch size has changed since ``reset``.
        """
        tensors, batched = self._tensors(obs)
        num = len(next(iter(tensors.values())))
        if self._state is None:
            self._state = self.agent.core.initial_state(num)
        if len(self._state) != num:
            raise ValueError(f"a batch of {num} observations after one of {len(self._state)}; call reset() between")
        uniforms = None
        if not greedy:
            uniforms = torch.rand(num, len(self.agent.action_nvec), generator=self._generator).to(self.agent.device)
        self._last = output = act(self.agent, tensors, self._state, uniforms)
        self._state = output.state_out
        self.value = output.value if batched else output.value[0]
        result = output.action.cpu().numpy()
        if self.spec.discrete:
            return result[:, 0] if batched else int(result[0, 0])
        return result if batched else result[0]

    @property
    def probs(self) -> list[np.ndarray]:
        """Probabilities of each branch's choices at the last observation, f32 ``[n]`` or ``[N, n]``.

        Raises:
            ValueError: ``act`` was never called.
        """
        if self.value is None or self._last is None:
            raise ValueError("no probabilities before the first act()")
        branches = [x.softmax(1).cpu().numpy() for x in self._last.logits.split(self.agent.action_nvec, 1)]
        return branches if self.value.ndim else [branch[0] for branch in branches]

    @property
    def state(self) -> np.ndarray:
        """The recurrent state after the last observation, f32 ``[D]`` or ``[N, D]``; D = 0 without memory.

        Raises:
            ValueError: ``act`` was not called since ``reset``.
        """
        if self.value is None or self._state is None:
            raise ValueError("no state before the first act() after reset()")
        state = self._state.cpu().numpy()
        return state if self.value.ndim else state[0]

    def _tensors(self, obs: Any) -> tuple[dict[str, Tensor], bool]:
        arrays = obs if isinstance(obs, dict) else {"obs": obs}
        if arrays.keys() != self.spec.obs.keys():
            raise ValueError(f"observations {sorted(arrays)}; this agent was trained on {sorted(self.spec.obs)}")
        batched, tensors = set(), {}
        for key, want in self.spec.obs.items():
            x = np.ascontiguousarray(arrays[key], dtype=want.dtype)
            if want.shape not in (x.shape, x.shape[1:]):
                raise ValueError(f"observation {key!r} of shape {x.shape}; this agent was trained on {want.shape}")
            batched.add(x.shape != want.shape)
            tensors[key] = torch.from_numpy(x[None] if x.shape == want.shape else x).to(self.agent.device)
        if len(batched) != 1:
            raise ValueError("some observations have a batch axis and some have none")
        return tensors, batched.pop()


def _check_shapes(config: Config, spec: EnvSpec, weights: dict[str, Tensor]) -> None:
    """Compare the weights that a file holds with those of the agent that it describes, before allocating any.

    Raises:
        ValueError: names or shapes differ.
    """
    with torch.device("meta"):
        expected = build_agent(config, spec, torch.device("meta")).state_dict()
    for name in expected.keys() | weights.keys():
        shapes = [list(tree[name].shape) if name in tree else "nothing" for tree in (expected, weights)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name}: {shapes[0]} expected, {shapes[1]} found")
