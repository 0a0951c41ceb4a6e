"""Recordings, their pictures, videos and the window, on toys that play in milliseconds."""

import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from configs_for_tests import tiny
from imageio_ffmpeg import get_ffmpeg_exe

from ppo_tbptt.config import Config
from ppo_tbptt.envs import Episode
from ppo_tbptt.evaluation.policy import Policy
from ppo_tbptt.models.agent import build_agent
from ppo_tbptt.watch.drawing import MOST_UNITS, action_labels, colours, draw, select_units
from ppo_tbptt.watch.environment import Env, remote_env, watched_env
from ppo_tbptt.watch.recording import Recording, failed, record_episode
from ppo_tbptt.watch.video import VideoError, frames_of, write_video
from ppo_tbptt.watch.window import Viewer, WindowError, show_window


def untrained(env_id: str = "ppo_tbptt/PocMemory-v0", **changes: Any) -> tuple[Policy, Config]:
    config = tiny(env={"id": env_id, "options": changes.pop("options", {})}, **changes)
    torch.manual_seed(0)
    with watched_env(config.env) as env:
        return Policy(build_agent(config, env.spec, torch.device("cpu")), env.spec, config), config


def played(env_id: str = "ppo_tbptt/PocMemory-v0", *, seed: int = 3, max_steps: int = 20, **changes: Any) -> Recording:
    policy, config = untrained(env_id, **changes)
    with watched_env(config.env) as env:
        return record_episode(policy, env, seed=seed, max_steps=max_steps)


# A MemoryGym task with pictures, and a network that is small.
GRID: dict[str, Any] = {"env_id": "MortarMayhem-Grid-v0", "options": {"command_count": [1]}}
GRID["model"] = {"cnn_channels": [4, 4, 4]}


@pytest.mark.parametrize("core", ["gru", "lstm", "none"])
def test_what_is_recorded_is_what_the_agent_computes(core: str) -> None:
    """Each step's distribution, value and state, recomputed from the recorded observations alone."""
    recording = played("fixture_envs:fixture/DictToy-v0", core={"kind": core})
    policy, _ = untrained("fixture_envs:fixture/DictToy-v0", core={"kind": core})
    agent = policy.agent
    state = agent.core.initial_state(1)
    assert recording.num_steps == len(recording.actions) == recording.episode.length  # type: ignore[union-attr]
    for t in range(recording.num_steps):
        obs = {key: torch.from_numpy(x.copy())[None] for key, x in recording.obs(t).items()}
        with torch.no_grad():
            output = agent.step(obs, state)
        state = output.state_out
        expected = [x.softmax(1)[0].numpy() for x in output.logits.split(recording.spec.action_nvec, 1)]
        for found, wanted in zip(recording.probs[t], expected, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-6)
        assert recording.values[t] == pytest.approx(float(output.value))
        np.testing.assert_array_equal(recording.states[t], state[0].numpy())


def test_failure_is_below_the_best_result_and_unknown_of_a_capped_episode() -> None:
    recording = played(max_steps=2)
    assert recording.capped and recording.over and recording.episode is None and recording.num_steps == 2
    assert failed(recording) is None
    for success, ret in ((1.0, 0.4), (0.0, 0.9)):
        recording.episode = Episode(-1, 3, ret, 7, True, {"success": success}, {})
        assert failed(recording) is (success == 0)


# --- pictures ------------------------------------------------------------------------------------------------------

SHOWN = {
    "without memory": ({"core": {"kind": "none"}}, 1024),
    "many branches": ({"env_id": "fixture_envs:fixture/Tracer-v0"}, 1024),
    "image": ({"env_id": "fixture_envs:fixture/ImageToy-v0"}, 672),
    "image and vector": ({"env_id": "fixture_envs:fixture/DictToy-v0"}, 672),
    "ground truth": (GRID, 1024),
}


@pytest.mark.parametrize(("arguments", "width"), SHOWN.values(), ids=SHOWN)
def test_pictures_have_one_even_size(arguments: dict[str, Any], width: int) -> None:
    recording = played(**arguments)
    shapes = {draw(recording, index).shape for index in range(recording.num_steps + 1)}
    ((height, found, channels),) = shapes
    assert (height % 2, found, channels) == (0, width, 3)


def test_the_views_are_the_right_way_round() -> None:
    """What MemoryGym's agent sees is (column, row); beside it the ground truth, which shows more, is not."""
    recording = played(**GRID)
    picture = draw(recording, 5)
    seen = recording.obs(5)["obs"].transpose(1, 0, 2).repeat(4, 0).repeat(4, 1)
    np.testing.assert_array_equal(picture[84 : 84 + 336, 24 : 24 + 336], seen)
    np.testing.assert_array_equal(picture[84 : 84 + 336, 24 + 352 : 24 + 352 + 336], recording.rendered(5))


def test_units_that_act_alike_are_neighbours() -> None:
    time = np.linspace(0, 6, 50)
    waves = [np.sin(time), np.cos(time)]
    states = np.stack([waves[unit % 2] for unit in range(10)] + [np.full(50, 0.9)], 1).astype(np.float32)
    order = select_units(states).tolist()
    kinds = [unit % 2 for unit in order if unit < 10]
    assert sum(a != b for a, b in pairwise(kinds)) == 1
    many = np.tile(states, (1, 50))
    constant = {unit for unit in range(many.shape[1]) if unit % 11 == 10}
    assert len(select_units(many)) == MOST_UNITS
    assert not constant & set(select_units(many).tolist())


def test_colours_are_even_about_white() -> None:
    below, zero, above = colours(np.array([-2.0, 0.0, 2.0]), 1.0).astype(int)
    assert zero.min() > 240
    assert below[2] > below[0] + 50 and above[0] > above[2] + 50  # blue, red


def test_actions_have_their_names_and_those_of_grids_do_what_they_say() -> None:
    assert action_labels(played(**GRID).spec) == (("", ("stay", "turn left", "turn right", "forward")),)
    assert action_labels(played("fixture_envs:fixture/Tracer-v0").spec) == (
        ("branch 0", ("0", "1", "2")),
        ("branch 1", ("0", "1")),
    )

    with watched_env(tiny(env={"id": "MysteryPath-Grid-v0"}).env) as env:
        env.reset(1)
        agent: Any = env._bare.agent  # type: ignore[attr-defined]
        turned = []
        for action in (0, 1, 2):
            env.step(np.array([action]))
            turned.append(agent.rotation)
        assert turned == [0, 90, 0]  # counterclockwise


# --- videos --------------------------------------------------------------------------------------------------------


def test_videos_read_back(tmp_path: Path) -> None:
    first, second = played(seed=3), played(seed=4)
    frames = frames_of([first, second], hold=2)
    expected = first.num_steps + second.num_steps + 2 + 2 * 2
    assert len(frames) == expected
    write_video(tmp_path / "a.mp4", frames, 5)
    shape = frames[0]().shape
    command = [get_ffmpeg_exe(), "-i", tmp_path / "a.mp4", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    decoded = subprocess.run(command, capture_output=True, check=True).stdout
    video = np.frombuffer(decoded, np.uint8).reshape(-1, *shape)
    assert video.shape == (expected, *shape)
    assert np.abs(video[0].astype(int) - frames[0]()).mean() < 4
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # a browser can start before it has all of it

    write_video(tmp_path / "a.gif", frames, 5)
    gif = iio.imread(tmp_path / "a.gif", index=None)
    assert gif.shape == (expected - 2 * 2, *shape)  # equal pictures are one that lasts longer
    assert np.abs(gif[3].astype(int) - frames[3]()).mean() < 4
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "a.gif"}


def test_a_video_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = frames_of([played()])
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: "false")
    with pytest.raises(VideoError, match=r"a\.mp4: can't write"):
        write_video(tmp_path / "a.mp4", frames, 5)
    assert not any(tmp_path.iterdir())


# --- the window ----------------------------------------------------------------------------------------------------


@pytest.fixture
def env() -> Iterator[Env]:
    with watched_env(tiny().env) as env:
        yield env


def press(view: Viewer, *keys: str) -> None:
    for key in keys:
        view.press(key)


def viewer(env: Env, **kwargs: Any) -> Viewer:
    return Viewer(untrained()[0], env, range(100), **{"first": 3, **kwargs})


def test_keys_walk_through_an_episode(env: Env) -> None:
    view = viewer(env)
    press(view, "right", "right")
    assert (view.index, view.recording.num_steps, view.playing) == (2, 2, False)
    seen = view.picture()
    press(view, "left", "left", "left")
    assert not view.tick()
    assert (view.index, view.recording.num_steps) == (0, 2)  # nothing is played again on the way
    press(view, "space")
    view.tick()
    view.tick()
    press(view, "space")
    np.testing.assert_array_equal(view.picture(), seen)


def test_keys_turn_over_levels(env: Env) -> None:
    view = viewer(env)
    press(view, "right", "page up")
    assert (view.recording.seed, view.index, view.playing) == (4, 0, True)
    press(view, "page down", "page down")
    assert view.recording.seed == 2
    before = view.recording
    press(view, "right", "r")
    assert view.recording.seed == 2 and view.recording is not before and view.index == 0
    press(view, *["page down"] * 5)
    assert view.recording.seed == 0  # there is nothing before
    press(view, "nonsense")
    assert view.open


def test_it_plays_as_many_episodes_as_asked_for(env: Env) -> None:
    view = viewer(env, episodes=2)
    seeds, ends = set(), 0
    while view.playing:
        ends += view.tick()
        seeds.add(view.recording.seed)
    assert (seeds, ends) == ({3, 4}, 2)


def test_the_window_listens(monkeypatch: pytest.MonkeyPatch, env: Env) -> None:
    """Real events through SDL, which here has no screen."""
    import pygame

    pygame.quit()  # what other tests' environments have left
    heard: list[tuple[str, int]] = []
    left = [pygame.K_RIGHT, pygame.K_LEFT, pygame.K_SPACE, pygame.K_PAGEUP, pygame.K_r, pygame.K_q]

    class Listening(Viewer):
        def press(self, key: str) -> None:
            super().press(key)
            heard.append((key, self.index))

        def picture(self) -> np.ndarray:
            while left and pygame.display.get_init():
                pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=left.pop(0)))
            return super().picture()

    view = Listening(untrained()[0], env, range(100))
    show_window(view, 5, "test")
    assert [key for key, _ in heard] == ["right", "left", "space", "page up", "r", "q"]
    assert heard[:2] == [("right", 1), ("left", 0)]
    assert view.recording.seed == 1


def test_no_screen_is_one_line(monkeypatch: pytest.MonkeyPatch, env: Env) -> None:
    monkeypatch.delenv("SDL_VIDEODRIVER")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(WindowError, match="--video"):
        show_window(viewer(env), 5, "test")


def test_an_environment_in_another_process_is_the_same() -> None:
    policy, config = untrained(**GRID)
    with remote_env(config.env) as env:
        there = record_episode(policy, env, seed=7)
    with watched_env(config.env) as env:
        here = record_episode(policy, env, seed=7)
    assert there.episode == here.episode
    for index in range(here.num_steps + 1):
        np.testing.assert_array_equal(draw(there, index), draw(here, index))
