"""Pictures of a recording: observations, action probabilities, and recurrent state, value and reward over time."""

from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ppo_tbptt.envs import MEMORY_GYM_IDS, EnvSpec
from ppo_tbptt.watch.recording import Recording, failed

VIEW = 336
"""Edge of a view in pixels, as large as MemoryGym's ground truth."""
MARGIN, GAP, PANEL = 24, 16, 256
"""Pixels around everything, between views, and across the panel beside them."""
MOST_ROWS = 11
"""Lines of the panel that can show action probabilities."""
MOST_UNITS = 64
"""Units of the recurrent state that are shown; of more, those that vary most."""

GROUND, TEXT, MUTED, LINE, EMPTY = "#fcfcfa", "#1f2328", "#6e7681", "#d0d4da", "#eceef1"
CHOSEN, OTHER, REWARD, FAILURE = "#0b62a8", "#c3cbd6", "#e08214", "#b3480e"  # told apart by the colour-blind too

Box = tuple[int, int, int, int]
"""Left, top, right, bottom."""
Branch = tuple[str, tuple[str, ...]]
"""The name of an action branch, empty if it is the only one, and the names of its choices."""

_GRID: tuple[Branch, ...] = (("", ("stay", "turn left", "turn right", "forward")),)
_AXES: tuple[Branch, ...] = (("horizontal", ("stay", "left", "right")), ("vertical", ("stay", "up", "down")))
_KNOWN: dict[str, tuple[Branch, ...]] = {
    **dict.fromkeys(MEMORY_GYM_IDS, _AXES),
    **dict.fromkeys(("MortarMayhem-Grid-v0", "MortarMayhemB-Grid-v0", "MysteryPath-Grid-v0"), _GRID),
    "Endless-MysteryPath-v0": (("", ("stay", "right", "up", "down")),),
    "ppo_tbptt/PocMemory-v0": (("", ("left", "right")),),
}


def draw(recording: Recording, index: int, note: str = "") -> np.ndarray:
    """Draw a recording after ``index`` steps, with ``note`` in the header.

    Returns:
        u8 ``[height, width, 3]``, both even as H.264 needs. Pictures of the same agent and environment have one size.
    """
    views = _views(recording, index)
    vectors = [(key, x) for key, x in recording.obs(index).items() if x.ndim == 1]
    left = max(VIEW + GAP + VIEW if not views else 0, VIEW, sum(view.width + GAP for _, view in views) - GAP)
    width = MARGIN + left + 2 * GAP + PANEL + MARGIN
    below = max((view.height for _, view in views), default=0)
    canvas = Image.new("RGB", (width + width % 2, 2400), GROUND)
    pen = ImageDraw.Draw(canvas)

    _draw_header(pen, recording, index, note, MARGIN, width - MARGIN)
    top = 84
    x = MARGIN
    for caption, view in views:
        _text(pen, (x, top - 8), caption, 13, MUTED, "ls")
        canvas.paste(view, (x, top))
        x += view.width + GAP
    bottom = top + below + (36 if views else 0)
    for caption, vector in vectors:
        box = (MARGIN, bottom, MARGIN + left, bottom + (22 if views else 64))
        bottom = _draw_vector(pen, recording, caption, vector, box) + 36
    panel = (MARGIN + left + 2 * GAP, top, width - MARGIN, top + max(below, 256))
    _draw_panel(pen, recording, index, panel)
    bottom = max(bottom, panel[3] + 36)
    ends = (MARGIN, width - MARGIN)
    if recording.states and recording.states[0].size:
        bottom = _draw_states(canvas, pen, recording, index, bottom + 8, *ends) + 32
    bottom = _draw_value_and_reward(canvas, pen, recording, index, bottom, *ends) + MARGIN
    return np.asarray(canvas.crop((0, 0, canvas.width, bottom + bottom % 2)))


# --- observations ------------------------------------------------------------------------------------------------


def _views(recording: Recording, index: int) -> list[tuple[str, Image.Image]]:
    """Return the observed images, then the environment's rendering, each with a caption."""
    views = []
    images = {key: x for key, x in recording.obs(index).items() if x.ndim == 3 and x.shape[2] in (1, 3)}
    for key, image in images.items():
        if _bare_id(recording.spec) in MEMORY_GYM_IDS:
            image = image.transpose(1, 0, 2)  # its frames are (column, row, channel)
        views.append(("what the agent sees" + (f": {key}" if len(images) > 1 else ""), _enlarge(image)))
    rendered = recording.rendered(index)
    if rendered is not None:
        views.append(("what there is", _enlarge(rendered)))
    return views


def _enlarge(image: np.ndarray) -> Image.Image:
    """Scale to at most :data:`VIEW`: by a whole factor if smaller, down if larger. Grey becomes RGB."""
    picture = Image.fromarray(np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image[..., :3])
    edge = max(picture.size)
    if edge > VIEW:
        return picture.resize((picture.width * VIEW // edge, picture.height * VIEW // edge), Image.Resampling.LANCZOS)
    factor = VIEW // edge
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _draw_vector(pen: ImageDraw.ImageDraw, recording: Recording, key: str, vector: np.ndarray, box: Box) -> int:
    """Draw a vector as coloured cells, with numbers where these fit. Returns the lower edge."""
    left, top, right, bottom = box
    several = len(recording.spec.obs) > 1
    _text(pen, (left, top - 8), f"{key}: " * several + f"{len(vector)} numbers", 13, MUTED, "ls")
    height = bottom - top
    width = min(2 * height + 20, max(14, (right - left) // len(vector)))
    height = min(height, width)
    a_row = (right - left) // width
    shown = vector[: a_row * 6]
    rows = -(-len(shown) // a_row)
    a_row = -(-len(shown) // rows)
    end = max(1.0, float(np.abs(vector).max()))
    for place, (value, colour) in enumerate(zip(shown, colours(shown, end), strict=True)):
        x, y = left + place % a_row * width, top + place // a_row * height
        pen.rectangle((x, y, x + width - 1, y + height - 1), fill=tuple(int(c) for c in colour), outline=LINE)
        if width >= 44:
            text = "white" if abs(value) > 0.6 * end else TEXT
            _text(pen, (x + width / 2, y + height / 2), f"{value:.2g}", 12 + height // 10, text, "mm")
    return top + rows * height


# --- header and panel ----------------------------------------------------------------------------------


def _draw_header(
    pen: ImageDraw.ImageDraw, recording: Recording, index: int, note: str, left: float, right: float
) -> None:
    _text(pen, (left, 42), recording.spec.env_id, 22, TEXT, "ls")
    _text(pen, (right, 42), f"step {index}", 18, TEXT, "rs")
    how = "most probable actions" if recording.greedy else "sampled actions"
    parts = [part for part in (note, how, f"level {recording.seed}") if part]
    _text(pen, (right - 112, 42), "   ·   ".join(parts), 15, MUTED, "rs")
    pen.line((left, 54, right, 54), fill=LINE)


def _draw_panel(pen: ImageDraw.ImageDraw, recording: Recording, index: int, box: Box) -> None:
    left, top, right, bottom = box
    acted = index < len(recording.probs)
    if acted:
        _text(pen, (left, top - 8), "what it does", 13, MUTED, "ls")
        _draw_actions(pen, recording, index, (left, top, right, bottom - 3 * 26 - 24))
    else:
        _draw_outcome(pen, recording, box)
    rewards = recording.rewards[:index]
    figures = {
        "value": f"{recording.values[index]:.3f}" if acted else "",
        "last reward": f"{rewards[-1]:.3f}" if rewards else "",
        "return so far": f"{sum(rewards):.3f}",
    }
    y = bottom - 3 * 26
    pen.line((left, y - 8, right, y - 8), fill=LINE)
    for name, figure in figures.items():
        y += 26
        _text(pen, (left, y - 8), name, 15, MUTED, "ls")
        _text(pen, (right, y - 8), figure, 18, TEXT, "rs")


def _draw_actions(pen: ImageDraw.ImageDraw, recording: Recording, index: int, box: Box) -> None:
    """Draw probabilities as bars: all of them, or where there are too many the chosen and the most probable ones."""
    left, y, right, bottom = box
    labels = action_labels(recording.spec)
    named = sum(1 for name, _ in labels if name)
    fits = named + sum(len(choices) for _, choices in labels) <= MOST_ROWS
    shown = labels if fits else labels[: MOST_ROWS // 2]
    most = max(1, (MOST_ROWS - len(shown) * bool(named)) // len(shown))
    lines = sum(bool(name) + (len(choices) if fits else min(most, len(choices))) for name, choices in shown)
    line = min(27, (bottom - y) // lines)
    for branch, (name, choices) in enumerate(shown):
        probs, chosen = recording.probs[index][branch], int(recording.actions[index][branch])
        if name:
            y += line
            _text(pen, (left, y - 5), name, 13, MUTED, "ls")
        rows = range(len(choices))
        if not fits and len(choices) > most:
            likely = sorted(rows, key=lambda choice: (choice != chosen, -probs[choice]))[:most]
            rows = sorted(likely)
        for choice in rows:
            y += line
            colour = CHOSEN if choice == chosen else TEXT
            _text(pen, (left, y - 4), choices[choice], 14, colour, "ls")
            start, end = left + 84, right - 58
            pen.rectangle((start, y - 14, end, y - 4), fill=EMPTY)
            length = (end - start) * float(probs[choice])
            if length >= 0.5:
                pen.rectangle((start, y - 14, start + length, y - 4), fill=CHOSEN if choice == chosen else OTHER)
            _text(pen, (right, y - 4), f"{100 * probs[choice]:.1f} %", 14, colour, "rs")
            if choice == chosen:
                pen.polygon([(left - 12, y - 14), (left - 12, y - 4), (left - 5, y - 9)], fill=CHOSEN)
    if len(shown) < len(labels):
        _text(pen, (left, y + 12), f"and {len(labels) - len(shown)} more branches", 13, MUTED, "ls")


def action_labels(spec: EnvSpec) -> tuple[Branch, ...]:
    """Name the action branches and their choices; in unknown environments by number."""
    known = _KNOWN.get(_bare_id(spec))
    if known is not None and tuple(len(choices) for _, choices in known) == spec.action_nvec:
        return known
    several = len(spec.action_nvec) > 1
    return tuple(
        (f"branch {number}" if several else "", tuple(str(choice) for choice in range(size)))
        for number, size in enumerate(spec.action_nvec)
    )


def _bare_id(spec: EnvSpec) -> str:
    """Return the environment's id without the module that registers it."""
    return spec.env_id.rpartition(":")[2]


def _draw_outcome(pen: ImageDraw.ImageDraw, recording: Recording, box: Box) -> None:
    left, top, right, _ = box
    episode, lost = recording.episode, failed(recording)
    word = {True: "failed", False: "solved", None: "the end"}[lost]
    if episode is not None and not episode.terminated and lost is not False:
        word = "out of time"
    colour = {True: FAILURE, False: CHOSEN, None: TEXT}[lost]
    pen.rounded_rectangle((left, top, right, top + 44), 6, fill=colour)
    _text(pen, ((left + right) / 2, top + 22), word, 20, "white", "mm")
    if episode is None:
        return
    y = top + 52
    for name, value in list({**episode.measures, "steps": episode.length}.items())[:5]:
        y += 22
        _text(pen, (left, y - 6), name.replace("_", " "), 14, MUTED, "ls")
        _text(pen, (right, y - 6), f"{value:.4g}", 16, TEXT, "rs")


# --- over time ---------------------------------------------------------------------------------------------


def select_units(states: np.ndarray) -> np.ndarray:
    """Select the units that vary most and order them so that correlated ones are neighbours.

    Each unit is a point in the plane of the first two principal components; they are sorted by angle.

    Args:
        states: f32 ``[T, D]``.

    Returns:
        i64 ``[R]`` with R <= :data:`MOST_UNITS`.
    """
    changes = states - states.mean(0)
    units = np.argsort(-(changes**2).mean(0), kind="stable")[:MOST_UNITS]
    changes = changes[:, units]
    axes = np.linalg.eigh(changes.T @ changes)[1][:, -2:]  # [R, 2], or [1, 1] of a single unit
    return units[np.argsort(np.arctan2(axes[:, -1], axes[:, 0]), kind="stable")]


def _scale_end(values: np.ndarray) -> float:
    """Return the end of a colour scale symmetric about 0, past which lie only outliers."""
    return max(1e-3, float(np.quantile(np.abs(values), 0.995))) if values.size else 1.0


def colours(values: np.ndarray, end: float) -> np.ndarray:
    """Map numbers to blue below 0, white at 0 and red above, darkest at ``-end`` and ``end``.

    Args:
        values: of any shape.
        end: above 0.

    Returns:
        u8 ``[..., 3]``.
    """
    from matplotlib import colormaps  # slow to import

    position = np.clip(values / end, -1, 1) * 127.5 + 127.5
    return (colormaps["RdBu_r"](position.round().astype(np.int64))[..., :3] * 255).round().astype(np.uint8)


def _axis_length(recording: Recording, index: int) -> int:
    """Return the length of the time axis in steps: exact once the episode is over, else a power of two."""
    if recording.over:
        return max(1, recording.num_steps)
    return max(32, 1 << index.bit_length())


def _reference_states(recording: Recording) -> np.ndarray:
    """Return the states ``[T, D]`` that order and scale the units: T doubles, so both seldom change in an episode."""
    known = len(recording.states)
    if not recording.over:
        known = 1 << (known.bit_length() - 1)
    return np.stack(recording.states[:known])


def _draw_states(
    canvas: Image.Image, pen: ImageDraw.ImageDraw, recording: Recording, index: int, top: int, left: int, right: int
) -> int:
    """Draw the recurrent state, one row per unit and one column per step. Returns the lower edge."""
    reference = _reference_states(recording)
    units = select_units(reference)
    end = _scale_end(reference[:, units])
    size = reference.shape[1]
    which = f"{size} units" if len(units) == size else f"the {len(units)} of its {size} units that change most"
    _text(pen, (left, top - 16), f"what it remembers: {which}, alike ones together, over time", 13, MUTED, "ls")
    _draw_scale(canvas, pen, end, top - 27, right)

    row = max(3, min(16, 176 // len(units)))
    height = row * len(units)
    pen.rectangle((left, top, right, top + height - 1), fill=EMPTY)
    states = np.stack(recording.states[: index + 1])[:, units]
    column = (right - left) / _axis_length(recording, index)
    cells = Image.fromarray(np.ascontiguousarray(colours(states, end).transpose(1, 0, 2)))
    width = max(1, min(right - left, round(column * len(states))))
    shrink = Image.Resampling.NEAREST if width >= len(states) else Image.Resampling.BOX
    canvas.paste(
        cells.resize((width, len(units)), shrink).resize((width, height), Image.Resampling.NEAREST), (left, top)
    )
    _mark_step(pen, left + column * index, column, top, top + height, right)
    return top + height


def _mark_step(pen: ImageDraw.ImageDraw, x: float, column: float, top: int, bottom: int, right: int) -> None:
    """Mark the current step."""
    x = min(x, right)
    end = min(x + column, right)
    middle = (x + end) / 2
    if end - x >= 4:
        pen.rectangle((x, top - 1, end, bottom), outline=TEXT, width=2)
    else:
        pen.line((end, top, end, bottom), fill=TEXT)
    pen.polygon([(middle - 6, top - 9), (middle + 6, top - 9), (middle, top - 2)], fill=TEXT)


def _draw_scale(canvas: Image.Image, pen: ImageDraw.ImageDraw, end: float, top: int, right: int) -> None:
    """Draw the colour scale, its right edge at ``right``."""
    bar = colours(np.linspace(-end, end, 80), end)[None].repeat(10, 0)
    text = f"{end:.2g}"
    _text(pen, (right, top + 10), text, 13, MUTED, "rs")
    canvas.paste(Image.fromarray(bar), (right - 120, top))
    pen.rectangle((right - 121, top - 1, right - 40, top + 10), outline=LINE)
    _text(pen, (right - 126, top + 10), f"-{text}", 13, MUTED, "rs")


def _draw_value_and_reward(
    canvas: Image.Image, pen: ImageDraw.ImageDraw, recording: Recording, index: int, top: int, left: int, right: int
) -> int:
    """Draw value (line) and reward (bars) over time on one scale. Returns the lower edge."""
    height = 72
    figures = [0.0, *recording.values, *recording.rewards]
    low, high = min(figures), max(figures)
    _text(pen, (left, top - 8), "what it expects (value)", 13, CHOSEN, "ls")
    _text(pen, (left + 156, top - 8), "and what it gets (reward)", 13, REWARD, "ls")
    _text(pen, (right, top - 8), f"{low:.2g} to {high:.2g}", 13, MUTED, "rs")

    fine = 3  # draw at this multiple and scale down, because Pillow does not smooth lines
    plot = Image.new("RGB", ((right - left) * fine, height * fine), EMPTY)
    fine_pen = ImageDraw.Draw(plot)
    unit = (height - 12) * fine / max(high - low, 1e-3)
    zero = 6 * fine + high * unit
    column = plot.width / _axis_length(recording, index)
    half = max(0.5 * fine, min(3 * fine, column / 6))
    for step, reward in enumerate(recording.rewards[:index]):
        if reward:
            x = min(column * (step + 1), plot.width - half)  # at the observation that it came with
            y = zero - reward * unit
            fine_pen.rectangle((x - half, min(y, zero), x + half, max(y, zero)), fill=REWARD)
    fine_pen.line((0, zero, plot.width, zero), fill=MUTED, width=fine)
    points = [(column * (t + 0.5), zero - value * unit) for t, value in enumerate(recording.values[: index + 1])]
    fine_pen.line(points, fill=CHOSEN, width=2 * fine, joint="curve")
    x, y = points[-1]
    radius = 4 * fine
    fine_pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=CHOSEN)
    canvas.paste(plot.resize((right - left, height), Image.Resampling.BOX), (left, top))
    return top + height


# --- text ------------------------------------------------------------------------------------------------------------


def text_line(text: str, width: int, height: int = 32) -> np.ndarray:
    """Draw a line of text: u8 ``[height, width, 3]``."""
    canvas = Image.new("RGB", (width, height), EMPTY)
    _text(ImageDraw.Draw(canvas), (MARGIN, height / 2), text, 14, MUTED, "lm")
    return np.asarray(canvas)


def _text(pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, colour: str, anchor: str) -> None:
    pen.text(at, text, fill=colour, font=_font(size), anchor=anchor)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
