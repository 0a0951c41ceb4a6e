"""A window to step through an episode, which is played only as far as it is viewed."""

import os
import sys
from collections.abc import Sequence
from time import monotonic

import numpy as np

from ppo_tbptt.evaluation.policy import Policy
from ppo_tbptt.runtime.errors import InputError
from ppo_tbptt.watch.drawing import draw, text_line
from ppo_tbptt.watch.environment import Env
from ppo_tbptt.watch.recording import Recording, begin_episode, step_episode

KEYS = "space: play or pause     left, right: step     page up, page down: other level     R: restart     Esc, Q: close"
REST_S = 1.5
"""Seconds for which the last picture of an episode is shown before the next one begins."""


class WindowError(InputError):
    """Why no window can be opened, in one line."""


def has_screen() -> bool:
    """Whether this machine seems to have a screen."""
    return sys.platform in ("darwin", "win32") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


class Viewer:
    """The position in an episode, and what keys (``press``) and time (``tick``) do to it.

    The page keys select among the level seeds ``levels``. From the index ``first`` on ``episodes`` are played in a row.
    """

    def __init__(
        self,
        policy: Policy,
        env: Env,
        levels: Sequence[int],
        *,
        first: int = 0,
        episodes: int = 1,
        greedy: bool = False,
        max_steps: int = 16_384,
    ) -> None:
        self._policy, self._env, self._greedy, self._max_steps = policy, env, greedy, max_steps
        self._levels, self._place, self._last = levels, first, first + episodes - 1
        self.open = True
        self.recording: Recording
        self._select_level(first)

    def press(self, key: str) -> None:
        """Handle a key by its pygame name; unknown ones do nothing."""
        match key:
            case "space":
                if not self.playing and self._at_end():
                    self.index = 0
                self.playing = not self.playing
            case "right":
                self.playing = False
                self._forward()
            case "left":
                self.playing = False
                self.index = max(0, self.index - 1)
            case "page up":
                self._select_level(self._place + 1)
            case "page down":
                self._select_level(self._place - 1)
            case "r":
                self._select_level(self._place)
            case "escape" | "q":
                self.open = False

    def tick(self) -> bool:
        """Advance one step while playing. Returns whether an episode has just ended."""
        if self.playing and not self._at_end():
            self._forward()
            return self._at_end()
        if self.playing and self._place < self._last:
            self._select_level(self._place + 1)
        else:
            self.playing = False
        return False

    def picture(self) -> np.ndarray:
        """Draw the current step, with the keys below it: u8 ``[height, width, 3]``."""
        picture = draw(self.recording, self.index, "" if self.playing or self._at_end() else "paused")
        return np.concatenate([picture, text_line(KEYS, picture.shape[1])])

    def _at_end(self) -> bool:
        return self.recording.over and self.index == self.recording.num_steps

    def _forward(self) -> None:
        if self._at_end():
            return
        if self.index == self.recording.num_steps:
            step_episode(self._policy, self._env, self.recording, max_steps=self._max_steps)
        self.index += 1

    def _select_level(self, place: int) -> None:
        if 0 <= place < len(self._levels):
            self._place, self.index, self.playing = place, 0, True
            self.recording = begin_episode(self._policy, self._env, self._levels[place], greedy=self._greedy)


def show_window(viewer: Viewer, fps: float, title: str) -> None:
    """Show ``viewer`` in a window until it is closed.

    Its environment must run in another process (:mod:`ppo_tbptt.watch.environment`).

    Raises:
        WindowError: no window can be opened.
    """
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    import pygame

    try:
        pygame.display.init()
        if pygame.display.get_driver() in ("offscreen", "dummy") and "SDL_VIDEODRIVER" not in os.environ:
            raise pygame.error("no screen answers")  # SDL falls back to these drivers without an error
        picture = viewer.picture()
        height, width, _ = picture.shape
        desktop = pygame.display.get_desktop_sizes()[0]
        scale = min(1.0, 0.95 * desktop[0] / width, 0.9 * desktop[1] / height)  # for small screens
        size = round(width * scale), round(height * scale)
        screen = pygame.display.set_mode(size)
    except pygame.error as error:
        pygame.display.quit()
        raise WindowError(f"can't open a window ({error}); write a video instead: --video FILE.mp4") from error
    try:
        pygame.display.set_caption(title)
        pygame.key.set_repeat(300, 50)
        due = monotonic() + 1 / fps
        clock = pygame.time.Clock()
        while viewer.open:
            seen = (viewer.recording, viewer.index, viewer.playing)
            for event in pygame.event.get():
                if event.type == pygame.QUIT:
                    viewer.open = False
                elif event.type == pygame.KEYDOWN:
                    viewer.press(pygame.key.name(event.key))
            if monotonic() >= due:
                ended = viewer.tick()
                due = monotonic() + (REST_S if ended else 1 / fps)
            if seen != (viewer.recording, viewer.index, viewer.playing):
                picture = viewer.picture()
            surface = pygame.surfarray.make_surface(picture.transpose(1, 0, 2))
            screen.blit(surface if surface.get_size() == size else pygame.transform.smoothscale(surface, size), (0, 0))
            pygame.display.flip()
            clock.tick(60)
    finally:
        pygame.display.quit()
