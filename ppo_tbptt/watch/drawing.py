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
    return _Page(recording, index).draw(note)


def text_line(text: str, width: int, height: int = 32) -> np.ndarray:
    """Draw a line of text: u8 ``[height, width, 3]``."""
    canvas = Image.new("RGB", (width, height), EMPTY)
    ImageDraw.Draw(canvas).text((MARGIN, height / 2), text, fill=MUTED, font=_font(14), anchor="lm")
    return np.asarray(canvas)


class _Page:
    """The picture of a recording after ``index`` steps. Methods that draw return their lower edge."""

    def __init__(self, recording: Recording, index: int) -> None:
        self.recording, self.index = recording, index
        self.views = _views(recording, index)
        views_width = sum(view.width + GAP for _, view in self.views) - GAP
        content = max(VIEW, views_width) if self.views else 2 * VIEW + GAP
        self.left, self.middle = MARGIN, MARGIN + content
        self.right = self.middle + 2 * GAP + PANEL
        width = self.right + MARGIN
        self.canvas = Image.new("RGB", (width + width % 2, 2400), GROUND)
        self.pen = ImageDraw.Draw(self.canvas)

    def draw(self, note: str) -> np.ndarray:
        self.header(note)
        top = 84
        x = self.left
        for caption, view in self.views:
            self.text((x, top - 8), caption, 13, MUTED)
            self.canvas.paste(view, (x, top))
            x += view.width + GAP
        below = max((view.height for _, view in self.views), default=0)
        bottom = top + below + (36 if self.views else 0)
        for key, vector in self.recording.obs(self.index).items():
            if vector.ndim == 1:
                bottom = self.vector(key, vector, bottom) + 36
        panel_bottom = top + max(below, 256)
        self.panel(top, panel_bottom)
        bottom = max(bottom, panel_bottom + 36)
        if self.recording.states and self.recording.states[0].size:
            bottom = self.states(bottom + 8) + 32
        bottom = self.value_and_reward(bottom) + MARGIN
        return np.asarray(self.canvas.crop((0, 0, self.canvas.width, bottom + bottom % 2)))

    def text(self, at: tuple[float, float], text: str, size: int, colour: str, anchor: str = "ls") -> None:
        self.pen.text(at, text, fill=colour, font=_font(size), anchor=anchor)

    def header(self, note: str) -> None:
        recording = self.recording
        self.text((self.left, 42), recording.spec.env_id, 22, TEXT)
        self.text((self.right, 42), f"step {self.index}", 18, TEXT, "rs")
        how = "most probable actions" if recording.greedy else "sampled actions"
        parts = [part for part in (note, how, f"level {recording.seed}") if part]
        self.text((self.right - 112, 42), "   ·   ".join(parts), 15, MUTED, "rs")
        self.pen.line((self.left, 54, self.right, 54), fill=LINE)

    def vector(self, key: str, vector: np.ndarray, top: int) -> int:
        """Draw an observed vector as coloured cells, with numbers where these fit."""
        several = len(self.recording.spec.obs) > 1
        self.text((self.left, top - 8), f"{key}: " * several + f"{len(vector)} numbers", 13, MUTED)
        room = self.middle - self.left
        height = 22 if self.views else 64
        width = min(2 * height + 20, max(14, room // len(vector)))
        height = min(height, width)
        a_row = room // width
        shown = vector[: a_row * 6]
        rows = -(-len(shown) // a_row)
        a_row = -(-len(shown) // rows)
        end = max(1.0, float(np.abs(vector).max()))
        for place, (value, colour) in enumerate(zip(shown, colours(shown, end), strict=True)):
            x, y = self.left + place % a_row * width, top + place // a_row * height
            self.pen.rectangle((x, y, x + width - 1, y + height - 1), fill=tuple(map(int, colour)), outline=LINE)
            if width >= 44:
                text = "white" if abs(value) > 0.6 * end else TEXT
                self.text((x + width / 2, y + height / 2), f"{value:.2g}", 12 + height // 10, text, "mm")
        return top + rows * height

    # --- the panel beside the views ---------------------------------------------------------------------------------

    def panel(self, top: int, bottom: int) -> None:
        """Draw the probabilities of the actions, or the outcome, and figures below."""
        recording, left = self.recording, self.right - PANEL
        figures_top = bottom - 3 * 26
        acted = self.index < len(recording.probs)
        if acted:
            self.text((left, top - 8), "what it does", 13, MUTED)
            self.actions(left, top, figures_top - 24)
        else:
            self.outcome(left, top)
        rewards = recording.rewards[: self.index]
        figures = {
            "value": f"{recording.values[self.index]:.3f}" if acted else "",
            "last reward": f"{rewards[-1]:.3f}" if rewards else "",
            "return so far": f"{sum(rewards):.3f}",
        }
        self.pen.line((left, figures_top - 8, self.right, figures_top - 8), fill=LINE)
        for row, (name, figure) in enumerate(figures.items(), 1):
            self.text((left, figures_top + 26 * row - 8), name, 15, MUTED)
            self.text((self.right, figures_top + 26 * row - 8), figure, 18, TEXT, "rs")

    def actions(self, left: int, y: int, bottom: int) -> None:
        """Draw probabilities as bars; where there are too many, of the chosen and the most probable choices."""
        labels = action_labels(self.recording.spec)
        named = sum(1 for name, _ in labels if name)
        fits = named + sum(len(choices) for _, choices in labels) <= MOST_ROWS
        shown = labels if fits else labels[: MOST_ROWS // 2]
        most = MOST_ROWS if fits else max(1, (MOST_ROWS - len(shown) * bool(named)) // len(shown))
        lines = sum(bool(name) + min(most, len(choices)) for name, choices in shown)
        line = min(27, (bottom - y) // lines)
        start, end = left + 84, self.right - 58
        for branch, (name, choices) in enumerate(shown):
            probs = self.recording.probs[self.index][branch]
            chosen = int(self.recording.actions[self.index][branch])
            if name:
                y += line
                self.text((left, y - 5), name, 13, MUTED)
            likely = sorted(range(len(choices)), key=lambda choice: (choice != chosen, -probs[choice]))
            for choice in sorted(likely[:most]):
                y += line
                colour, bar = (CHOSEN, CHOSEN) if choice == chosen else (TEXT, OTHER)
                self.text((left, y - 4), choices[choice], 14, colour)
                self.pen.rectangle((start, y - 14, end, y - 4), fill=EMPTY)
                length = (end - start) * float(probs[choice])
                if length >= 0.5:
                    self.pen.rectangle((start, y - 14, start + length, y - 4), fill=bar)
                self.text((self.right, y - 4), f"{100 * probs[choice]:.1f} %", 14, colour, "rs")
                if choice == chosen:
                    self.pen.polygon([(left - 12, y - 14), (left - 12, y - 4), (left - 5, y - 9)], fill=CHOSEN)
        if len(shown) < len(labels):
            self.text((left, y + 12), f"and {len(labels) - len(shown)} more branches", 13, MUTED)

    def outcome(self, left: int, top: int) -> None:
        episode, lost = self.recording.episode, failed(self.recording)
        word, colour = {True: ("failed", FAILURE), False: ("solved", CHOSEN), None: ("the end", TEXT)}[lost]
        if episode is not None and not episode.terminated and lost is not False:
            word = "out of time"
        self.pen.rounded_rectangle((left, top, self.right, top + 44), 6, fill=colour)
        self.text(((left + self.right) / 2, top + 22), word, 20, "white", "mm")
        if episode is None:
            return
        y = top + 52
        for name, value in list({**episode.measures, "steps": episode.length}.items())[:5]:
            y += 22
            self.text((left, y - 6), name.replace("_", " "), 14, MUTED)
            self.text((self.right, y - 6), f"{value:.4g}", 16, TEXT, "rs")

    # --- over time --------------------------------------------------------------------------------------------------

    def num_columns(self) -> int:
        """Return the length of the time axis in steps: exact once the episode is over, else a power of two."""
        if self.recording.over:
            return max(1, self.recording.num_steps)
        return max(32, 1 << self.index.bit_length())

    def states(self, top: int) -> int:
        """Draw the recurrent state, one row per unit and one column per step."""
        states, left, right = self.recording.states, self.left, self.right
        known = len(states)
        if not self.recording.over:  # doubles, so that the order and scale of units seldom change in an episode
            known = 1 << (known.bit_length() - 1)
        reference = np.stack(states[:known])
        size = reference.shape[1]
        units = select_units(reference)
        end = max(1e-3, float(np.quantile(np.abs(reference[:, units]), 0.995)))  # past it lie only outliers
        which = f"{size} units" if len(units) == size else f"the {len(units)} of its {size} units that change most"
        self.text((left, top - 16), f"what it remembers: {which}, alike ones together, over time", 13, MUTED)
        self.scale(end, top - 27)

        row = max(3, min(16, 176 // len(units)))
        height = row * len(units)
        self.pen.rectangle((left, top, right, top + height - 1), fill=EMPTY)
        shown = np.stack(states[: self.index + 1])[:, units]
        column = (right - left) / self.num_columns()
        cells = Image.fromarray(np.ascontiguousarray(colours(shown, end).transpose(1, 0, 2)))
        width = max(1, min(right - left, round(column * len(shown))))
        shrink = Image.Resampling.NEAREST if width >= len(shown) else Image.Resampling.BOX
        cells = cells.resize((width, len(units)), shrink).resize((width, height), Image.Resampling.NEAREST)
        self.canvas.paste(cells, (left, top))
        self.mark_step(left + column * self.index, column, top, top + height)
        return top + height

    def mark_step(self, x: float, column: float, top: int, bottom: int) -> None:
        x, end = min(x, self.right), min(x + column, self.right)
        middle = (x + end) / 2
        if end - x >= 4:
            self.pen.rectangle((x, top - 1, end, bottom), outline=TEXT, width=2)
        else:
            self.pen.line((end, top, end, bottom), fill=TEXT)
        self.pen.polygon([(middle - 6, top - 9), (middle + 6, top - 9), (middle, top - 2)], fill=TEXT)

    def scale(self, end: float, top: int) -> None:
        bar = colours(np.linspace(-end, end, 80), end)[None].repeat(10, 0)
        self.text((self.right, top + 10), f"{end:.2g}", 13, MUTED, "rs")
        self.canvas.paste(Image.fromarray(bar), (self.right - 120, top))
        self.pen.rectangle((self.right - 121, top - 1, self.right - 40, top + 10), outline=LINE)
        self.text((self.right - 126, top + 10), f"-{end:.2g}", 13, MUTED, "rs")

    def value_and_reward(self, top: int) -> int:
        """Draw value (line) and reward (bars) over time on one scale."""
        recording, left, right, height = self.recording, self.left, self.right, 72
        figures = [0.0, *recording.values, *recording.rewards]
        low, high = min(figures), max(figures)
        self.text((left, top - 8), "what it expects (value)", 13, CHOSEN)
        self.text((left + 156, top - 8), "and what it gets (reward)", 13, REWARD)
        self.text((right, top - 8), f"{low:.2g} to {high:.2g}", 13, MUTED, "rs")

        fine = 3  # draw at this multiple and scale down, because Pillow does not smooth lines
        plot = Image.new("RGB", ((right - left) * fine, height * fine), EMPTY)
        pen = ImageDraw.Draw(plot)
        unit = (height - 12) * fine / max(high - low, 1e-3)
        zero = 6 * fine + high * unit
        column = plot.width / self.num_columns()
        half = max(0.5 * fine, min(3 * fine, column / 6))
        for step, reward in enumerate(recording.rewards[: self.index]):
            if reward:
                x = min(column * (step + 1), plot.width - half)  # at the observation that it came with
                y = zero - reward * unit
                pen.rectangle((x - half, min(y, zero), x + half, max(y, zero)), fill=REWARD)
        pen.line((0, zero, plot.width, zero), fill=MUTED, width=fine)
        values = recording.values[: self.index + 1]
        points = [(column * (t + 0.5), zero - value * unit) for t, value in enumerate(values)]
        pen.line(points, fill=CHOSEN, width=2 * fine, joint="curve")
        (x, y), radius = points[-1], 4 * fine
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=CHOSEN)
        self.canvas.paste(plot.resize((right - left, height), Image.Resampling.BOX), (left, top))
        return top + height


def _views(recording: Recording, index: int) -> list[tuple[str, Image.Image]]:
    """Return the observed images, then the environment's rendering, each with a caption."""
    images = {key: x for key, x in recording.obs(index).items() if x.ndim == 3 and x.shape[2] in (1, 3)}
    views = []
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


def action_labels(spec: EnvSpec) -> tuple[Branch, ...]:
    """Name the action branches and their choices; in unknown environments by number."""
    known = _KNOWN.get(_bare_id(spec))
    if known is not None and tuple(len(choices) for _, choices in known) == spec.action_nvec:
        return known
    several = len(spec.action_nvec) > 1
    return tuple(
        (f"branch {number}" if several else "", tuple(map(str, range(size))))
        for number, size in enumerate(spec.action_nvec)
    )


def _bare_id(spec: EnvSpec) -> str:
    """Return the environment's id without the module that registers it."""
    return spec.env_id.rpartition(":")[2]


def select_units(states: np.ndarray) -> np.ndarray:
    """Select the units that vary most and order them so that correlated ones are neighbours.

    Each unit is a point in the plane of the first two principal components; they are sorted by angle. Returns i64
    ``[R]``, R <= :data:`MOST_UNITS`, of ``states``, f32 ``[T, D]``.
    """
    changes = states - states.mean(0)
    units = np.argsort(-(changes**2).mean(0), kind="stable")[:MOST_UNITS]
    changes = changes[:, units]
    axes = np.linalg.eigh(changes.T @ changes)[1][:, -2:]  # [R, 2], or [1, 1] of a single unit
    return units[np.argsort(np.arctan2(axes[:, -1], axes[:, 0]), kind="stable")]


def colours(values: np.ndarray, end: float) -> np.ndarray:
    """Map ``values`` to u8 ``[..., 3]``: blue below 0, white at 0 and red above, darkest at ``-end`` and ``end``."""
    from matplotlib import colormaps  # slow to import

    position = np.clip(values / end, -1, 1) * 127.5 + 127.5
    return (colormaps["RdBu_r"](position.round().astype(np.int64))[..., :3] * 255).round().astype(np.uint8)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
