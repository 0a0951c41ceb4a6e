"""What a study is: runs that differ in a few settings, which ``ablate`` trains, and what they show together."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from matplotlib.figure import Figure

from ppo_tbptt.config import Config
from ppo_tbptt.run.folder import RunDir
from ppo_tbptt.training.callbacks import Callback

SIGNIFICANT = 0.05


@runtime_checkable
class Trial(Protocol):
    """One run of a study."""

    @property
    def name(self) -> str:
        """The run's folder."""
        ...

    def needs(self) -> Sequence["Trial"]:
        """List the runs whose results decide this one's config."""
        ...

    def callbacks(self) -> list[Callback]:
        """Return what the run needs beyond its config."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What the finished runs of a study show."""

    tables: dict[str, list[tuple[str, ...]]]
    """By title: the head, then the rows."""
    note: str
    """How the tables are to be read."""
    tree: Any
    """The same for the JSON file."""
    figure: Figure

    def markdown(self) -> str:
        """Write the tables as markdown, and the note below them."""
        text = ""
        for title, (head, *rows) in self.tables.items():
            lines = [head, ("---",) * len(head), *rows]
            text += f"{title}\n\n" * bool(title) + "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"
        return f"{text}{self.note}\n"


class Study(ABC):
    """Runs, their configs, and what they show."""

    folder: ClassVar[Path]
    """Where the runs lie unless told otherwise."""

    @abstractmethod
    def __init__(self, config: Path | None, overrides: dict[str, str]) -> None:
        """Read the configs that the runs differ from.

        Args:
            config: in place of the study's own one, where it takes another.
            overrides: for all runs, as typed, by dotted key.

        Raises:
            ConfigError: a config that does not fit.
        """

    @classmethod
    @abstractmethod
    def trials(cls) -> Sequence[Any]:
        """List all runs, in the order in which they begin."""

    @abstractmethod
    def config(self, trial: Any, folder: Path) -> Config:
        """Return a run's config; the runs that it needs are finished, in ``folder``."""

    @abstractmethod
    def results(self, folder: Path) -> Results | None:
        """Read the finished runs in ``folder``; None where there are none.

        Raises:
            JsonError: a result's file is broken.
        """


def final_evaluation(folder: Path, trial: Trial) -> Path:
    """Return the file that a finished run leaves."""
    return RunDir(folder / trial.name).evaluations / "final.json"
