"""Pictures as an MP4 or a GIF, one at a time."""

import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import overload

import imageio_ffmpeg
import numpy as np
from PIL import Image

from ppo_tbptt.run.files import replacing
from ppo_tbptt.runtime.errors import InputError
from ppo_tbptt.watch.draw import draw
from ppo_tbptt.watch.record import Recording

SUFFIXES = (".mp4", ".gif")
"""What a video's file can end in."""


class VideoError(InputError):
    """One line: which video can't be written, and why."""


class Pictures(Sequence[np.ndarray]):
    """Pictures that are drawn when they are asked for: thousands of them would not fit into memory."""

    def __init__(self, calls: Sequence[Callable[[], np.ndarray]]) -> None:
        self._calls = calls

    def __len__(self) -> int:
        return len(self._calls)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> "Pictures": ...
    def __getitem__(self, index: int | slice) -> "np.ndarray | Pictures":
        return Pictures(self._calls[index]) if isinstance(index, slice) else self._calls[index]()


def pictures(recordings: Sequence[Recording], *, note: str = "", hold: int = 0) -> Pictures:
    """All steps of ``recordings`` one after the other; the last of each stays for ``hold`` more pictures."""
    calls: list[Callable[[], np.ndarray]] = []
    for number, recording in enumerate(recordings, 1):
        episode = f"episode {number} of {len(recordings)}" if len(recordings) > 1 else ""
        text = "   ·   ".join(filter(None, (note, episode)))
        indices = [*range(recording.num_steps + 1), *[recording.num_steps] * hold]
        calls += [lambda r=recording, i=index, t=text: draw(r, i, t) for index in indices]
    return Pictures(calls)


def write_video(path: Path, frames: Sequence[np.ndarray], fps: float) -> None:
    """An H.264 MP4 that plays in a browser, or a GIF that loops, by the file's suffix. ``frames`` are u8 ``[H, W, 3]``.

    Raises:
        VideoError: another suffix, no room, no ffmpeg.
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


def _write_mp4(path: str, frames: Sequence[np.ndarray], fps: float) -> None:
    height, width, _ = frames[0].shape
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error"]
    command += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
    command += ["-c:v", "libx264", "-crf", "20", "-pix_fmt", "yuv420p", "-threads", "1"]
    command += ["-movflags", "+faststart", "-f", "mp4", path]
    with tempfile.TemporaryFile() as said:
        # In a group of its own: a Ctrl-C is not for it.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=said, process_group=0)
        assert process.stdin is not None
        try:
            for frame in frames:
                process.stdin.write(np.ascontiguousarray(frame).tobytes())
        except BrokenPipeError:
            pass  # it has said why
        except BaseException:
            process.kill()
            raise
        finally:
            with suppress(BrokenPipeError):
                process.stdin.close()
            code = process.wait()
        if code:
            said.seek(0)
            raise RuntimeError(said.read().decode(errors="replace").strip() or f"ffmpeg ended with status {code}")


def gif(frames: Sequence[np.ndarray], fps: float) -> bytes:
    """Equal frames in a row become one long one, and all share one palette, so that what stays costs nothing."""
    sampled = np.concatenate([frames[i] for i in sorted({i * (len(frames) - 1) // 7 for i in range(8)})])
    palette = Image.fromarray(sampled).quantize(255, dither=Image.Dither.NONE)
    images = (
        Image.fromarray(frames[i]).quantize(palette=palette, dither=Image.Dither.NONE) for i in range(len(frames))
    )
    file = BytesIO()
    next(images).save(file, "GIF", save_all=True, append_images=images, duration=round(1000 / fps), loop=0)
    return file.getvalue()
