"""MemoryGym: its ten tasks, their measures, and fixes for state that leaks from one episode into the next."""

import functools
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import xxhash

from ppo_tbptt.envs.interface import EnvError

INSTALL = "pip install --no-deps memory-gym==1.0.2"

Measure = Callable[[Any, Mapping[str, Any]], dict[str, float]]
"""(bare environment after its last step, that step's info, without "success" where truncated) -> measures."""


def _mortar_mayhem(env: Any, info: Mapping[str, Any]) -> dict[str, float]:
    # The environment says success, and that all commands were completed, whenever the last command has been judged,
    # even if the agent stood on the wrong tile. Rewards cannot tell (they are options): the position can.
    if "success" not in info:
        return {"success": 0.0, "commands_completed": float(env._current_command / env.num_commands)}
    success = bool(info["success"]) and tuple(env.normalized_agent_position) == tuple(env._target_pos)
    completed = (env._current_command - 1 + success) / env.num_commands
    return {"success": float(success), "commands_completed": float(completed)}


def _mystery_path(env: Any, info: Mapping[str, Any]) -> dict[str, float]:
    return {"success": float(info.get("success", 0)), "num_fails": float(env.num_fails)}


def _searing_spotlights(env: Any, info: Mapping[str, Any]) -> dict[str, float]:
    measures = {"success": float(info.get("success", 0)), "agent_health": _health(env)}
    if env.num_coins > 0:  # a fraction of no coins is no figure
        measures["coins_collected"] = float(env.coins_collected / env.num_coins)
    return measures


def _endless_mortar_mayhem(env: Any, info: Mapping[str, Any]) -> dict[str, float]:
    return {
        "commands_completed": float(env._total_commands_completed),
        "max_command_sequence": float(len(env._commands) - 1),
    }


def _endless_mystery_path(env: Any, info: Mapping[str, Any]) -> dict[str, float]:
    return {
        "tiles_visited": float(env.tiles_visited),
        "max_x": float(env.max_x_reached),
        "num_fails": float(env.num_fails),
    }


def _endless_searing_spotlights(env: Any, info: Mapping[str, Any]) -> dict[str, float]:
    return {"coins_collected": float(env.coins_collected), "agent_health": _health(env)}


def _health(env: Any) -> float:
    return float(env.current_agent_health / env.agent_health)


@dataclass(frozen=True, slots=True)
class Task:
    """How a task is judged: the headline measure, its largest value (None: unbounded) and all measures."""

    headline: str
    headline_max: float | None
    measure: Measure


_MORTAR_MAYHEM = Task("commands_completed", 1.0, _mortar_mayhem)
_MYSTERY_PATH = Task("success", 1.0, _mystery_path)

TASKS: dict[str, Task] = {
    "MortarMayhem-v0": _MORTAR_MAYHEM,
    "MortarMayhem-Grid-v0": _MORTAR_MAYHEM,
    "MortarMayhemB-v0": _MORTAR_MAYHEM,
    "MortarMayhemB-Grid-v0": _MORTAR_MAYHEM,
    "MysteryPath-v0": _MYSTERY_PATH,
    "MysteryPath-Grid-v0": _MYSTERY_PATH,
    "SearingSpotlights-v0": Task("success", 1.0, _searing_spotlights),
    "Endless-MortarMayhem-v0": Task("commands_completed", None, _endless_mortar_mayhem),
    "Endless-MysteryPath-v0": Task("tiles_visited", None, _endless_mystery_path),
    "Endless-SearingSpotlights-v0": Task("coins_collected", None, _endless_searing_spotlights),
}

MEMORY_GYM_IDS: tuple[str, ...] = tuple(TASKS)


def import_memory_gym(*, window: bool = False) -> None:
    """Register MemoryGym's ids, without sound, greeting and, unless `window`, without a screen.

    Raises:
        EnvError: memory-gym or pygame is not installed.
    """
    if not window:
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    os.environ.setdefault("SDL_NO_SIGNAL_HANDLERS", "1")  # else SDL swallows SIGTERM, also in the trainer's process
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "pkg_resources is deprecated")  # which pygame uses if it is still there
            importlib.import_module("memory_gym")
            _speed_up()
    except ModuleNotFoundError as error:
        if error.name == "memory_gym":
            raise EnvError(f"MemoryGym is not installed; install it with: {INSTALL}") from None
        raise EnvError(f"MemoryGym needs the module {error.name!r}, which is not installed ({INSTALL})") from None


def _speed_up() -> None:
    """Give MemoryGym's modules a pygame that does the same faster, and draw each command once."""
    import pygame

    if isinstance(getattr(sys.modules["memory_gym.mortar_mayhem"], "pygame", None), _Pygame):
        return
    command = functools.cache(sys.modules["memory_gym.pygame_assets"].Command)
    fast = _Pygame("pygame")
    vars(fast).update(vars(pygame), surfarray=SimpleNamespace(array3d=pixels), Surface=_surface)
    for name, module in list(sys.modules.items()):
        if name.startswith("memory_gym.") and getattr(module, "pygame", None) is pygame:
            vars(module)["pygame"] = fast
            if "mortar_mayhem" in name:
                vars(module)["Command"] = command


class _Pygame(ModuleType):
    """pygame as MemoryGym's modules see it."""


def _surface(size: Sequence[float], *args: Any) -> Any:
    """Make a surface whose rows do not all begin at multiples of 16 bytes.

    Such surfaces SDL copies past the processor's caches, which takes a frame 24 us instead of 2.
    """
    from pygame import Surface

    if size[0] % 4:
        return Surface(size, *args)
    return Surface((size[0] + 1, size[1]), *args).subsurface((0, 0), size)


_known_pixels: dict[tuple[tuple[int, int], bytes], np.ndarray] = {}
_MOST_KNOWN = 512
"""Frames of 21 kB each, in every process."""


def pixels(surface: Any) -> np.ndarray:
    """Return a surface's pixels, u8 ``[x, y, 3]``, as ``pygame.surfarray.array3d`` does, but not to be written to.

    Most frames have been shown before, and are found by the hash of the surface's memory in a tenth of the time.
    """
    if surface.get_bitsize() != 32 or surface.get_masks()[:3] != (0xFF0000, 0xFF00, 0xFF) or sys.byteorder != "little":
        from pygame import surfarray

        return surfarray.array3d(surface)
    key = surface.get_size(), xxhash.xxh3_128_digest(surface.get_buffer())
    if key not in _known_pixels:
        if len(_known_pixels) == _MOST_KNOWN:
            _known_pixels.clear()
        _known_pixels[key] = _convert(surface)
    return _known_pixels[key]


def _convert(surface: Any) -> np.ndarray:
    # Two passes in the order of memory are faster than one across it.
    words = np.array(surface.get_view("2"), order="C")
    channels, out = words.view(np.uint8).reshape(-1, 4), np.empty((*words.shape, 3), np.uint8)
    flat = out.reshape(-1, 3)
    for channel in range(3):
        flat[:, channel] = channels[:, 2 - channel]
    out.flags.writeable = False
    return out


def before_reset(env: Any, options: Mapping[str, Any]) -> None:
    """Clear state of the bare `env` that leaks into its next episode, and supply what a reset misses.

    * Endless Mortar Mayhem keeps drawing the last episode's sprite until the agent may move again, and every task
      draws it into the first ground truth frame.
    * Searing Spotlights draws the last episode's spotlights into the first frame if lights are never dimmed.
    * Searing Spotlights paints over its backgrounds where `hide_chessboard` or `black_background` is set, for good.
    * Searing Spotlights without an exit draws `env.exit` nonetheless, which then does not exist.
    """
    env.rotated_agent_surface, env.rotated_agent_rect = None, None
    if hasattr(env, "spotlight_surface"):
        env.spotlight_surface.fill(0)
        painted = env.blue_background_surface, env.red_background_surface
        originals = vars(env).setdefault("_background_originals", [surface.copy() for surface in painted])
        for surface, original in zip(painted, originals, strict=True):
            surface.blit(original, (0, 0))
    if not options.get("use_exit", True):
        env.exit = SimpleNamespace(surface=None, rect=None)


def after_reset(env: Any) -> None:
    """Let Searing Spotlights end without coins: it divides by their number, which a numpy NaN survives in silence."""
    if getattr(env, "num_coins", None) == 0:
        env.coins_collected = np.float64("nan")


def shown_command(env: Any, *, first: bool) -> str | None:
    """Return the command that Mortar Mayhem draws first (after reset), or in the next observation (before a step).

    "" is a pause between two commands, None no command at all.
    """
    queue = getattr(env, "_command_visualization_clone" if first else "_command_visualization", None)
    return queue[0] if queue else None


def render(env: Any, shown: str | None) -> Any:
    """Render the bare `env` with `shown` as Mortar Mayhem's command.

    Left alone the environment takes the command from a second queue: wrong as soon as a step is not rendered, a step
    early for the later commands of the endless task, and missing in the last frame of a command without a pause.
    """
    queue = getattr(env, "_command_visualization", None)
    if queue is None:
        return env.render()
    env._command_visualization = env._command_visualization_clone = [] if shown is None else [shown]
    try:
        return env.render()
    finally:
        env._command_visualization = queue
