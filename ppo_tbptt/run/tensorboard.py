"""A run in TensorBoard: scalars, charts, text, histograms, videos and hyperparameters by environment steps."""

# pyright: reportAttributeAccessIssue=false
# protobuf creates its classes at import.

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams import metadata as plugin
from tensorboard.plugins.hparams.api_pb2 import STATUS_SUCCESS, Experiment, HParamInfo, MetricInfo, MetricName
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo
from torch import Tensor
from torch.utils.tensorboard import summary

from ppo_tbptt.run.event_files import EventFile, filter_events
from ppo_tbptt.run.metrics import Report

NUM_HISTOGRAMS = 50
"""Approximate number of histograms over a run; they are at least 10 iterations apart."""
SAMPLE_SIZE = 4096
"""Number of values sampled for a histogram."""
SHOWN_BY_DEFAULT = frozenset({"core.hidden_size", "core.kind", "env.id", "seed", "total_steps"})
"""Hyperparameters whose columns TensorBoard shows by default, because they are marked as differing."""
FINAL_PREFIX = "final/"
"""Prefix of the tags of a finished run's measures."""


class TensorBoard(EventFile):
    """Writes a run's event file in ``folder``.

    Calls write synchronously and raise an ``OSError`` where that fails; later calls write it then.

    Args:
        folder: the run folder.
        after: environment steps of the checkpoint that the run is resumed from; later events are removed.
    """

    def __init__(self, folder: Path, *, after: int | None = None) -> None:
        if after is not None:
            filter_events(folder, lambda event: _is_kept(event, after))
        super().__init__(folder, purge_from=None if after is None else after + 1)

    def write(self, report: Report) -> None:
        """Write all scalars of an iteration."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in report.scalars.items()]
        self.add(Summary(value=values), report.env_steps)

    def layout(self, headline: str, env_steps: int, *, held_out: bool) -> None:
        """Write the layout of the custom scalars page.

        ``held_out`` adds charts of the held-out evaluations. They are separate charts, because TensorBoard would treat
        their few points beside many others as outliers and leave them out of the axis range.
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
        # TensorBoard matches each tag as a regular expression, from the start.
        layout = {
            title: {name: ["Multiline", [f"{tag}$" for tag in tags]] for name, tags in page.items()}
            for title, page in pages.items()
            if held_out or title != "Does it hold on new levels?"
        }
        self.add(summary.custom_scalars(layout), env_steps)

    def text(self, tag: str, text: str, env_steps: int) -> None:
        """Write preformatted text."""
        block = "\n".join("    " + line for line in text.splitlines())  # a code block in Markdown
        content = summary.text(tag, block)
        content.value[0].tag = tag  # without torch's suffix
        self.add(content, env_steps)

    def histograms(self, tensors: Mapping[str, Tensor], env_steps: int) -> None:
        """Write ``hist/NAME`` of each tensor, from the finite ones of :data:`SAMPLE_SIZE` values.

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
            self.add(Summary(value=values), env_steps)

    def image(self, tag: str, data: bytes, width: int, height: int, env_steps: int) -> None:
        """Write an encoded PNG or GIF for the Images tab, where the latter plays."""
        image = Summary.Image(encoded_image_string=data, width=width, height=height, colorspace=3)
        self.add(Summary(value=[Summary.Value(tag=tag, image=image)]), env_steps)

    def hparams(self, config: Mapping[str, Any], measures: Mapping[str, float], env_steps: int) -> None:
        """Write the run's row of the HParams table, and ``final/NAME`` of each measure.

        ``config`` is that of ``Config.to_dict``. Resuming the run removes the row.
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
        self.add(Summary(value=table + metrics), env_steps)


def histograms_due(iteration: int, num_iterations: int) -> bool:
    """Return whether histograms are due: at the first iteration, then at equal intervals."""
    return (iteration - 1) % max(10, num_iterations // NUM_HISTOGRAMS) == 0


def _is_kept(event: Event, after: int) -> bool:
    """Return whether a resumed run keeps an event: it is not later, and not written anew at each start."""
    for value in event.summary.value:
        kind = value.metadata.plugin_data.plugin_name
        if value.tag.startswith(FINAL_PREFIX) or kind in ("hparams", "custom_scalars"):
            return False
        if kind == "text" and event.step == after:
            return False
    return event.step <= after


def _sample(x: Tensor) -> Tensor:
    """Take up to :data:`SAMPLE_SIZE` values without an RNG, in strides of a large prime across all axes."""
    flat = x.reshape(-1)
    if len(flat) <= SAMPLE_SIZE:
        return flat
    return flat[torch.arange(SAMPLE_SIZE, device=x.device) * 2_654_435_761 % len(flat)]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | float | str]]:
    """Yield dotted keys with their values; values other than numbers and booleans become text."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value if isinstance(value, bool | int | float | str) else str(value)


def _hparams_value(tag: str, **content: Any) -> Summary.Value:
    data = HParamsPluginData(version=plugin.PLUGIN_DATA_VERSION, **content).SerializeToString()
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=plugin.PLUGIN_NAME, content=data))
    return Summary.Value(tag=tag, metadata=metadata)
