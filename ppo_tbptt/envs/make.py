"""Make an environment from its id, and check its reset options and spaces: imports, registries, one-line errors."""

import difflib
import importlib
import json
import traceback
from collections.abc import Iterable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs import registration

import ppo_tbptt.envs.toy  # noqa: F401 (registers the toys)
from ppo_tbptt.envs import memory_gym
from ppo_tbptt.envs.interface import ArraySpec, EnvError

GROUND_TRUTH = "ground_truth"
"""Render mode of `make_env` that shows what is hidden from the agent, where the environment can draw it."""

_SUPPORTED_OBSERVATIONS = (
    "Box of uint8 and shape (height, width, channels), Box of numbers and shape (n,), or a Dict of such boxes"
)


def open_env(env_id: str, render_mode: str | None) -> gym.Env[Any, Any]:
    """Make `env_id`, importing what registers it: `module` for `module:Id`, MemoryGym by itself.

    MemoryGym's environments come without gymnasium's wrappers, all others with them (hence with their TimeLimit),
    except for the passive checker.

    Raises:
        EnvError: the module or the id does not exist, or raises.
    """
    module, _, name = env_id.rpartition(":")
    if module:
        _import(module, env_id)
    if name in memory_gym.TASKS:
        memory_gym.import_memory_gym(window=render_mode == "human")
        mode = "debug_rgb_array" if render_mode == GROUND_TRUTH else render_mode
        return gym.make(name, render_mode=mode, disable_env_checker=True).unwrapped
    if name not in gym.registry:
        hint = _suggestion(name, {**memory_gym.TASKS, **gym.registry})
        raise EnvError(
            f"unknown environment {env_id!r}.{hint}"
            " Environments of other packages are written module:Id, with the module that registers them"
        )
    mode = _picture_mode(name) if render_mode == GROUND_TRUTH else render_mode
    options: dict[str, Any] = {} if mode is None else {"render_mode": mode}
    try:
        return gym.make(name, disable_env_checker=True, **options)
    except gym.error.Error as error:
        raise EnvError(f"{env_id}: {_one_line(error)}") from error
    except (Exception, SystemExit) as error:
        raise EnvError(f"{env_id}: its constructor raised {_raised(error)}") from error


def _import(module: str, env_id: str) -> None:
    try:
        importlib.import_module(module)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{module}.".startswith(f"{missing}."):  # not something that the module imports
            raise EnvError(f"cannot import module {module!r} of environment {env_id!r}") from None
        raise EnvError(f"{env_id}: importing {module!r} raised {_raised(error)}") from error


def _picture_mode(name: str) -> str | None:
    entry = gym.spec(name).entry_point
    creator = registration.load_env_creator(entry) if isinstance(entry, str) else entry
    modes = getattr(creator, "metadata", {}).get("render_modes", [])
    return "rgb_array" if "rgb_array" in modes else None


def plain_options(env_id: str, options: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Pass `options` through JSON, so that environments see the same with any number of workers.

    Raises:
        EnvError: JSON cannot carry them.
    """
    try:
        return None if options is None else json.loads(json.dumps(dict(options)))
    except (TypeError, ValueError) as error:
        raise EnvError(f"{env_id}: reset options must be numbers, strings, lists or tables ({error})") from None


def check_options(env_id: str, env: gym.Env[Any, Any], options: Mapping[str, Any]) -> None:
    """Check `options` against the class's `default_reset_parameters` and `process_reset_params`, where it has them.

    Raises:
        EnvError: an option does not exist (the message lists those that do), or its value is refused.
    """
    cls: Any = type(env.unwrapped)
    known = getattr(cls, "default_reset_parameters", None)
    if known is None:
        return
    for key in options:
        if key not in known:
            hint = _suggestion(str(key), known)
            raise EnvError(f"{env_id}: unknown reset option {key!r}.{hint} Existing ones: {', '.join(known)}")
    try:
        cls.process_reset_params(dict(options))
    except Exception as error:
        raise _refused(env_id, options, error) from error


def try_options(env_id: str, env: Any, options: Mapping[str, Any]) -> None:
    """Play one step of MemoryGym, which refuses many an impossible option only there.

    Raises:
        EnvError: reset or step raised.
    """
    try:
        memory_gym.before_reset(env, options)
        env.reset(seed=0, options=dict(options))
        env.step(0 if isinstance(env.action_space, spaces.Discrete) else [0, 0])
    except Exception as error:
        raise _refused(env_id, options, error) from error


def observation_specs(space: gym.Space[Any], env_id: str) -> dict[str, ArraySpec]:
    """Describe the arrays of an observation space.

    Raises:
        EnvError: `space` is neither a supported Box nor a Dict of them.
    """
    if isinstance(space, spaces.Dict):
        return {str(key): _box_spec(box, env_id, f"observation {key!r}") for key, box in space.spaces.items()}
    return {"obs": _box_spec(space, env_id, "the observation")}


def _box_spec(space: gym.Space[Any], env_id: str, name: str) -> ArraySpec:
    if isinstance(space, spaces.Box):
        shape = tuple(int(size) for size in space.shape)
        if len(shape) == 3 and space.dtype == np.uint8:
            return ArraySpec(shape=shape, dtype="uint8")
        if len(shape) == 1 and np.issubdtype(space.dtype, np.number):
            return ArraySpec(shape=shape, dtype="float32")
        found = f"a Box of {space.dtype} and shape {shape}"
    else:
        found = f"a {type(space).__name__}"
    raise EnvError(f"{env_id}: {name} is {found}; supported: {_SUPPORTED_OBSERVATIONS}")


def action_spec(space: gym.Space[Any], env_id: str) -> tuple[tuple[int, ...], bool, np.ndarray]:
    """Describe an action space.

    Returns the number of choices per branch, whether a plain int is wanted, and the first choice per branch (i64 [A]).

    Raises:
        EnvError: `space` is neither Discrete nor a MultiDiscrete of rank one.
    """
    if isinstance(space, spaces.Discrete):
        return (int(space.n),), True, np.array([space.start], np.int64)
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim == 1:
        start = np.asarray(getattr(space, "start", np.zeros_like(space.nvec)), np.int64)
        return tuple(int(n) for n in space.nvec), False, start
    found = f"{type(space).__name__} of shape {space.shape}"
    raise EnvError(f"{env_id}: the action space is {found}; supported: Discrete, or MultiDiscrete of rank one")


def _refused(env_id: str, options: Mapping[str, Any], error: Exception) -> EnvError:
    """Make an EnvError that names the options which the failing line mentions (else all of them) and its reason."""
    line = traceback.extract_tb(error.__traceback__)[-1].line or ""
    named = {key: value for key, value in options.items() if str(key) in line} or options
    values = ", ".join(f"{key} = {value!r}" for key, value in named.items())
    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return EnvError(_one_line(f"{env_id} does not work with the reset options {values} ({reason}, at: {line})"))


def _raised(error: BaseException) -> str:
    """Describe an error and the last line that it went through."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return _one_line(f"{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})")


def _suggestion(wrong: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(wrong, list(known))
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
