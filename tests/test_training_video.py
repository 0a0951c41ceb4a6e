"""Videos while training: they come when they are due, and change nothing."""

from pathlib import Path

import pytest
from configs_for_tests import tiny
from helpers import timeless
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ppo_tbptt.config import Config
from ppo_tbptt.run.metrics import read_metrics
from ppo_tbptt.training.trainer import Trainer
from ppo_tbptt.watch.training_video import RecordVideos


def trained(config: Config, run: Path) -> list[dict[str, float]]:
    """The rows of the metrics, without what depends on the clock."""
    with Trainer(config, run, callbacks=[RecordVideos()]) as trainer:
        list(trainer)
    return [timeless(row) for row in read_metrics(run / "metrics.jsonl")]


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "videos").glob("*"))


def test_videos_change_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environments of both live in this process, and share its pygame."""
    monkeypatch.setattr("ppo_tbptt.watch.training_video.MOST_TIME", 1.0)  # none is skipped
    grid = {"id": "MortarMayhem-Grid-v0", "options": {"command_count": [1]}}
    config = tiny(env=grid, model={"cnn_channels": [4, 4, 4]})
    without = trained(config, tmp_path / "without")
    with_videos = trained(config.replace(train={"video_every": 2}), tmp_path / "with")
    assert with_videos == without
    assert len(without) == 4
    assert not (tmp_path / "without" / "videos").exists()
    assert names(tmp_path / "with") == ["steps_000000128_level200000.mp4", "steps_000000256_level200001.mp4"]

    events = EventAccumulator(str(tmp_path / "with"), size_guidance={"images": 0}).Reload()
    images = events.Images("held-out episode")
    assert [image.step for image in images] == [128, 256]
    assert all(image.encoded_image_string.startswith(b"GIF89a") for image in images)


def test_they_may_take_little_time_but_the_last_one_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppo_tbptt.watch.training_video.MOST_TIME", 0.0)
    trained(tiny(train={"video_every": 1}), tmp_path / "run")
    assert names(tmp_path / "run") == ["steps_000000064_level200000.mp4", "steps_000000256_level200003.mp4"]


def test_a_failure_is_one_line_and_no_more_videos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: "false")
    assert len(trained(tiny(train={"video_every": 1}), tmp_path / "run")) == 4
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("warning: no more videos")
    assert names(tmp_path / "run") == []
