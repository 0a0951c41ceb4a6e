"""Videos of recordings, as MP4 or GIF."""

import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image

from ppo_tbptt.run.files import replacing
from ppo_tbptt.runtime.errors import InputError
from ppo_tbptt.watch.drawing import draw
from ppo_tbptt.watch.recording import Recording

SUFFIXES = (".mp4", ".gif")
"""File suffixes that can be written."""


class VideoError(InputError):
    """Why a video can't be written, in one line."""


Frame = Callable[[], np.ndarray]
"""Draws one picture, u8 ``[height, width, 3]``: thousands of them would not fit into memory."""


def frames_of(recordings: Sequence[Recording], *, note: str = "", hold: int = 0) -> list[Frame]:
    """Return the frames of all steps of ``recordings`` in order; the last of each is repeated ``hold`` times."""
    frames: list[Frame] = []
    for number, recording in enumerate(recordings, 1):
        episode = f"episode {number} of {len(recordings)}" if len(recordings) > 1 else ""
        text = "   ·   ".join(filter(None, (note, episode)))
        indices = [*range(recording.num_steps + 1), *[recording.num_steps] * hold]
        frames += [partial(draw, recording, index, text) for index in indices]
    return frames


def write_video(path: Path, frames: Sequence[Frame], fps: float) -> None:
    """Write an H.264 MP4 that plays in a browser, or a looping GIF, by the suffix of ``path``.

    Raises:
        VideoError: the suffix is another, the file can't be written or ffmpeg failed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise VideoError(f"{path}: must end in {' or '.join(SUFFIXES)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            if path.suffix.lower() == ".gif":
                file.write(gif(frames, fps))
            else:
                _write_mp4(file.name, frames, fps)
    except (OSError, RuntimeError) as error:
        raise VideoError(f"{path}: can't write this video ({' '.join(str(error).split())[:200]})") from error


def _write_mp4(path: str, frames: Sequence[Frame], fps: float) -> None:
    """Pipe the frames through ffmpeg.

    imageio-ffmpeg's own writer (0.8.1) ignores ffmpeg's exit status, so a full disk would leave a partial file.

    Raises:
        RuntimeError: ffmpeg failed; the message is ffmpeg's.
    """
    height, width, _ = frames[0]().shape
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
    command += ["-c:v", "libx264", "-crf", "20", "-pix_fmt", "yuv420p", "-threads", "1"]
    command += ["-movflags", "+faststart", "-f", "mp4", path]
    with tempfile.TemporaryFile() as log:
        # In a process group of its own, so that Ctrl-C does not reach it.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, process_group=0)
        assert process.stdin is not None
        try:
            with suppress(BrokenPipeError), process.stdin:  # the log says why
                for frame in frames:
                    process.stdin.write(frame().tobytes())
        except BaseException:
            process.kill()
            raise
        finally:
            code = process.wait()
        if code:
            log.seek(0)
            raise RuntimeError(log.read().decode(errors="replace").strip() or f"ffmpeg ended with status {code}")


def gif(frames: Sequence[Frame], fps: float) -> bytes:
    """Encode a looping GIF with one palette for all frames; Pillow merges equal consecutive ones."""
    sampled = np.concatenate([frames[i]() for i in sorted({i * (len(frames) - 1) // 7 for i in range(8)})])
    palette = Image.fromarray(sampled).quantize(255, dither=Image.Dither.NONE)
    images = (Image.fromarray(frame()).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    file = BytesIO()
    next(images).save(file, "GIF", save_all=True, append_images=images, duration=round(1000 / fps), loop=0)
    return file.getvalue()
