"""The runs of the comparison of recurrent cores, and the tasks that they are of."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from ppo_tbptt.models.cores import CORES
from ppo_tbptt.training.callbacks import Callback

BASE, FLOOR = "gru", "none"
"""The core that the others are compared with, and the agent without memory."""
RATES = (1.0, 1 / 3, 3.0)
"""Factors on the config's learning rate that are tried for each core; of equally good ones the first is taken."""
SEARCH_SEED, SEARCH_LEVELS = 0, 300_000
"""Of the runs that choose the rate: neither this seed nor these levels are those of any result."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Task:
    """What the cores are compared on.

    Attributes:
        name: for folders; none is part of another, so that ``--only`` can tell them apart.
        title: for people.
        config: a config of the package.
        overrides: what differs from it, such as the budget of steps, by dotted key.
        key: of what the length is, by dotted key.
        lengths: empty where the task has but one.
        tuned_at: the length at which learning rates are tried.
        search: what differs in those runs, such as a smaller budget.
        seeds: of the runs at each length; those of the next length are 10 more, so that no two runs have one.
        chance: the score without memory.
    """

    name: str
    title: str
    config: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    key: str = ""
    lengths: tuple[int, ...] = ()
    tuned_at: int | None = None
    search: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...]
    chance: float | None = None

    @property
    def label(self) -> str:
        """What the length is."""
        return self.key.rpartition(".")[2]


TOYS = (
    Task(
        name="delayed_choice",
        title="delayed choice",
        config="toy_delayed_choice",
        key="env.options.delay",
        lengths=(7, 15, 31),
        tuned_at=15,
        seeds=(1, 2, 3),
        chance=1 / 4,
    ),
    Task(
        name="recall_ordered",
        title="ordered recall",
        config="toy_ordered_recall",
        key="env.options.items",
        lengths=(2, 4, 8),
        tuned_at=4,
        seeds=(1, 2, 3),
        chance=1 / 4,
    ),
    Task(
        name="recall_unordered",
        title="unordered recall",
        config="toy_unordered_recall",
        key="env.options.items",
        lengths=(2, 4, 8),
        tuned_at=4,
        seeds=(1, 2, 3),
        chance=1 / 2,
    ),
)
MEMORY_GYM = (
    Task(
        name="mortar_mayhem_grid_1_to_3",
        title="Mortar Mayhem on a grid, 1 to 3 commands",
        config="cpu/mortar_mayhem_grid",
        overrides={"env.options.command_count": [1, 2, 3], "env.curriculum.stages": []}
        | {"total_steps": 4_194_304, "train.eval_every": 16, "train.eval_first_seed": 200_000},
        search={"total_steps": 1_048_576},
        seeds=(1, 2),
    ),
    Task(
        name="mystery_path_grid_shown",
        title="Mystery Path on a grid, origin and goal shown",
        config="cpu/mystery_path_grid_shown",
        overrides={"total_steps": 4_194_304, "train.eval_every": 16},
        search={"total_steps": 1_048_576},
        seeds=(1, 2),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One run: a core on a task.

    length: of the task; None where it has but one.
    rate: the factor on the config's learning rate, for a run of the search; None: the best one of the search.
    """

    task: Task
    core: str
    length: int | None
    seed: int
    rate: float | None = None

    @property
    def name(self) -> str:
        """The run's folder: ``recall_ordered_gru_items4_seed11``, or ``..._rate0.33`` of the search."""
        length = "" if self.length is None else f"_{self.task.label}{self.length}"
        run = f"seed{self.seed}" if self.rate is None else f"rate{self.rate:.2g}"
        return f"{self.task.name}_{self.core}{length}_{run}"

    def needs(self) -> list["Trial"]:
        """The search of this core's learning rate on this task."""
        return [] if self.core == FLOOR or self.rate is not None else search(self.task, self.core)

    def callbacks(self) -> list[Callback]:
        """No more than the config says."""
        return []


def search(task: Task, core: str) -> list[Trial]:
    """List the runs that choose a core's learning rate on a task."""
    return [Trial(task=task, core=core, length=task.tuned_at, seed=SEARCH_SEED, rate=rate) for rate in RATES]


def trials(tasks: Sequence[Task]) -> Iterator[Trial]:
    """Yield all runs: of each task the search, the agent without memory once at each length, and all others."""
    for task in tasks:
        kinds = [kind for kind in CORES if kind != FLOOR]
        for kind in kinds:
            yield from search(task, kind)
        lengths = [(length, 10 * number) for number, length in enumerate(task.lengths or (None,))]
        yield from (Trial(task=task, core=FLOOR, length=at, seed=task.seeds[0] + more) for at, more in lengths)
        for seed, (at, more), kind in product(task.seeds, lengths, kinds):
            yield Trial(task=task, core=kind, length=at, seed=seed + more)
