"""What TensorBoard shows of a run. The x axis is environment steps everywhere."""

# pyright: reportAttributeAccessIssue=false
# protobuf makes its classes when they are imported.

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams import metadata as plugin
from tensorboard.plugins.hparams.api_pb2 import (
    STATUS_SUCCESS,
    Experiment,
    HParamInfo,
    MetricInfo,
    MetricName,
)
from tensorboard.plugins.hparams.plugin_data_pb2 import (
    HParamsPluginData,
    SessionEndInfo,
    SessionStartInfo,
)
from torch import Tensor
from torch.utils.tensorboard import summary

from ppo_tbptt.run.event_files import EventFile, filter_events
from ppo_tbptt.run.metrics import Report

NUM_HISTOGRAMS = 50
"""About as many over a run, but at least 10 iterations apart."""
SAMPLE_SIZE = 4096
"""Values that a histogram is made of."""
SHOWN_BY_DEFAULT = frozenset({"core.hidden_size", "core.kind", "env.id", "seed", "total_steps"})
"""Columns of the table of hyperparameters that are shown without asking: marked as what runs differ in."""
FINAL_PREFIX = "final/"
"""Prefix of what is known only when the run is done."""


class TensorBoard:
    """Writes a run's event file in ``folder``.

    Everything is in the file when a call returns. Every method but :meth:`close` raises an ``OSError`` that names the
    file when it can't write; then nothing of that call is in the file, and the next call works as soon as writing does.

    ``after``: the run goes on from so many environment steps; what stands behind them is cut off.
    """

    def __init__(self, folder: Path, *, after: int | None = None) -> None:
        if after is not None:
            filter_events(folder, lambda event: _is_kept(event, after))
        self._file = EventFile(folder, purge_from=None if after is None else after + 1)

    def write(self, report: Report) -> None:
        """All scalars of an iteration, by their tags."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in report.scalars.items()]
        self._append(Summary(value=values), report.env_steps)

    def layout(self, headline: str, env_steps: int, *, held_out: bool) -> None:
        """The page of custom scalars: what to look at first.

        ``held_out``: with charts of the evaluations during training. They are charts of their own, for a few points
        beside many count as outliers, which TensorBoard leaves out of its scale.
        """
        measures = dict.fromkeys(["success", headline, "return"])
        pages = {
            "Is it learning?": {name: [f"episode/{name}"] for name in measures},
            "Does it hold on new levels?": {f"{name} on held-out levels": [f"eval/{name}"] for name in measures},
            "Is the update sound?": {
                "entropy": ["policy/entropy"],
                "approximate KL and clip fraction": ["policy/approx_kl", "policy/clip_fraction"],
                "explained variance": ["policy/explained_variance"],
            },
            "Is it fast?": {
                "steps per second": ["time/steps_per_second"],
                "padding fraction": ["sequences/padding_fraction"],
            },
        }
        # Each tag is a regular expression that is matched from the start.
        layout = {
            title: {name: ["Multiline", [f"{tag}$" for tag in tags]] for name, tags in page.items()}
            for title, page in pages.items()
            if held_out or title != "Does it hold on new levels?"
        }
        self._append(summary.custom_scalars(layout), env_steps)

    def text(self, tag: str, text: str, env_steps: int) -> None:
        """A text that is shown as written."""
        block = "\n".join("    " + line for line in text.splitlines())  # as code, in Markdown
        content = summary.text(tag, block)
        content.value[0].tag = tag  # without the suffix that it got
        self._append(content, env_steps)

    def histograms(self, tensors: Mapping[str, Tensor], env_steps: int) -> None:
        """``hist/NAME`` of each tensor that has finite values, from :data:`SAMPLE_SIZE` of them.

        Waits for the device once.
        """
        samples = [_sample(x) for x in tensors.values()]
        columns = torch.cat(samples).cpu().split([len(x) for x in samples])
        values = []
        for name, column in zip(tensors, columns, strict=True):
            finite = column[column.isfinite()]
            if len(finite):
                values += summary.histogram(f"hist/{name}", finite.numpy().astype(np.float64), bins=64).value
        if values:
            self._append(Summary(value=values), env_steps)

    def gif(self, tag: str, data: bytes, width: int, height: int, env_steps: int) -> None:
        """An encoded GIF for the tab of images, where it plays."""
        image = Summary.Image(encoded_image_string=data, width=width, height=height, colorspace=3)
        self._append(Summary(value=[Summary.Value(tag=tag, image=image)]), env_steps)

    def hparams(self, config: Mapping[str, Any], measures: Mapping[str, float], env_steps: int) -> None:
        """The run's row in the table of hyperparameters, and ``final/NAME`` of each measure, to sort it by.

        ``config`` as of ``Config.to_dict``. All is in the run's own file, so that a run is one row; going on with the
        run removes it.
        """
        start, infos = SessionStartInfo(), []
        for key, value in _flat(config):
            kind = "bool" if isinstance(value, bool) else "string" if isinstance(value, str) else "number"
            setattr(start.hparams[key], f"{kind}_value", value)
            infos.append(HParamInfo(name=key, differs=key in SHOWN_BY_DEFAULT))
        metrics = [Summary.Value(tag=f"{FINAL_PREFIX}{name}", simple_value=value) for name, value in measures.items()]
        columns = [MetricInfo(name=MetricName(tag=value.tag)) for value in metrics]
        table = [
            _hparams_value(plugin.EXPERIMENT_TAG, experiment=Experiment(hparam_infos=infos, metric_infos=columns)),
            _hparams_value(plugin.SESSION_START_INFO_TAG, session_start_info=start),
            _hparams_value(plugin.SESSION_END_INFO_TAG, session_end_info=SessionEndInfo(status=STATUS_SUCCESS)),
        ]
        self._append(Summary(value=table + metrics), env_steps)

    def close(self) -> None:
        self._file.close()

    def _append(self, content: Summary, env_steps: int) -> None:
        self._file.append(Event(wall_time=time.time(), step=env_steps, summary=content))


def histograms_due(iteration: int, num_iterations: int) -> bool:
    """At the first iteration, then at equal distances."""
    return (iteration - 1) % max(10, num_iterations // NUM_HISTOGRAMS) == 0


def _is_kept(event: Event, after: int) -> bool:
    """Whether an event stays in the files of a run that goes on: not the future, nor what each start writes anew."""
    for value in event.summary.value:
        kind = value.metadata.plugin_data.plugin_name
        if value.tag.startswith(FINAL_PREFIX) or kind in ("hparams", "custom_scalars"):
            return False
        if kind == "text" and event.step == after:
            return False
    return event.step <= after


def _sample(x: Tensor) -> Tensor:
    """At most :data:`SAMPLE_SIZE` values, without the generator: steps of a large prime, so that no axis is preferred."""
    flat = x.reshape(-1)
    if len(flat) <= SAMPLE_SIZE:
        return flat
    return flat[torch.arange(SAMPLE_SIZE, device=x.device) * 2_654_435_761 % len(flat)]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | float | str]]:
    """Dotted keys; a list is text."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value if isinstance(value, bool | int | float | str) else str(value)


def _hparams_value(tag: str, **content: Any) -> Summary.Value:
    data = HParamsPluginData(version=plugin.PLUGIN_DATA_VERSION, **content).SerializeToString()
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=plugin.PLUGIN_NAME, content=data))
    return Summary.Value(tag=tag, metadata=metadata)
