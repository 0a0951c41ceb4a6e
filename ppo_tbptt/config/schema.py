"""Every setting of a run: frozen, typed, complete. The text under a field is its help (`ppo-tbptt show --defaults`)."""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tomli_w

from ppo_tbptt.config import load as config_io
from ppo_tbptt.config.load import FieldHelp
from ppo_tbptt.config.tree import blame, checked_tree, merged
from ppo_tbptt.config.values import Bounds, Problem, Schedule, Table, construct, plain_tree, shown
from ppo_tbptt.config.values import ConfigError as ConfigError  # re-exported

SEED_LIMIT = 2**31
Size = Annotated[int, Bounds(1, 65_536)]
Count = Annotated[int, Bounds(1, SEED_LIMIT)]
Seed = Annotated[int, Bounds(0, SEED_LIMIT - 1)]
Steps = Annotated[int, Bounds(1, 10**15)]
Fraction = Annotated[float, Bounds(0, 1)]


def _check_seeds(table: Table, first: str, number: str) -> None:
    if getattr(table, first) + getattr(table, number) > SEED_LIMIT:
        text = f"{first} = {getattr(table, first)} and {number} = {getattr(table, number)}"
        raise Problem((number, first), f"{text} go beyond {SEED_LIMIT}; their sum must be at most that")


@dataclass(frozen=True, kw_only=True, slots=True)
class EnvConfig(Table):
    """The task, and how many copies of it are played."""

    id: str
    """Gymnasium id; `module:Id` imports the module first, in the workers too."""
    num_envs: Size = 32
    """Environments stepped side by side."""
    num_workers: Annotated[int, Bounds(0, 1024)] | Literal["auto"] = "auto"
    """Processes that share the environments, or each half; 0 runs them in this process. Results don't depend on it."""
    double_buffering: Literal["auto", "on", "off"] = "auto"
    """Half of the environments step while the agent acts for the others; auto: on CUDA, from 256 environments on."""
    first_seed: Seed = 0
    """First level seed of training; each episode draws one of `num_seeds` from here on."""
    num_seeds: Count = 100_000
    """Number of level seeds to train on."""
    max_episode_steps: Steps | None = None
    """Truncate longer episodes; none: as the environment does by itself."""
    replay: bool = True
    """Checkpoints hold what brings the environments back into the middle of their episodes: level seeds and actions."""
    step_timeout: Annotated[float, Bounds(0, 1e6, above=True)] = 60.0
    """Seconds after which a worker that has not answered is taken for hung, and is restarted."""
    max_worker_restarts: Annotated[int, Bounds(0, SEED_LIMIT)] = 10
    """Workers that may die, hang or raise in a run before it stops."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The environment's own reset options, `[env.options]`."""

    def check(self) -> None:
        if not re.fullmatch(r"[\w./:@+-]+", self.id):
            raise Problem(("id",), f"{shown(self.id)} is not an environment id; must be like MortarMayhem-Grid-v0")
        _check_seeds(self, "first_seed", "num_seeds")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(Table):
    """The feed-forward parts around the recurrent core."""

    hidden_size: Size = 512
    """Width of the shared hidden layer, and of one more each for policy and value."""
    cnn_channels: tuple[Size, Size, Size] = (32, 64, 64)
    """Channels of the three convolutions that read images."""
    cnn_features: Size | None = None
    """Dense layer after the convolutions; none: they feed the core directly, as in the published baseline."""
    vector_hidden_sizes: Annotated[tuple[Size, ...], Bounds(1, 16)] = (128,)
    """Layers that read vector observations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CoreConfig(Table):
    """The recurrent core."""

    kind: Literal["none", "rnn_tanh", "rnn_relu", "gru", "lstm"] = "gru"
    """The cell; "none" is an agent without memory, to compare with."""
    hidden_size: Size = 512
    """Width of each layer's state."""
    num_layers: Annotated[int, Bounds(1, 64)] = 1
    """Layers on top of each other."""
    dropout: Annotated[float, Bounds(0, 1, below=True)] = 0.0
    """Dropout between layers during the update, never while acting."""

    def check(self) -> None:
        if self.dropout > 0 and self.num_layers == 1:
            text = f"dropout = {self.dropout} acts between layers, and num_layers is 1"
            raise Problem(("dropout", "num_layers"), f"{text}; must be 0, or num_layers at least 2")


@dataclass(frozen=True, kw_only=True, slots=True)
class PPOConfig(Table):
    """The algorithm. Learning rate, entropy coefficient and clip range are numbers or schedules over steps."""

    rollout_steps: Annotated[int, Bounds(1, 1_000_000)] = 512
    """Steps per environment between updates."""
    sequence_length: Annotated[int, Bounds(1, 1_000_000)] | None = None
    """Longest stretch of backpropagation through time; none: whole episodes within the rollout."""
    num_epochs: Annotated[int, Bounds(1, 1000)] = 3
    """Passes over each rollout."""
    num_minibatches: Count = 8
    """Updates per epoch; fewer where a rollout has fewer sequences."""
    gamma: Fraction = 0.995
    """Discount."""
    gae_lambda: Fraction = 0.95
    """Decay of generalised advantage estimation: 0 is one-step, 1 is the whole return."""
    clip_range: Schedule = Schedule(initial=0.1)  # noqa: RUF009 (frozen)
    """How far the probability ratio may move from 1; also bounds the value's change."""
    learning_rate: Annotated[Schedule, Bounds(0, 1)] = Schedule(initial=2.75e-4, final=1e-5)  # noqa: RUF009
    """AdamW's step size."""
    entropy_coef: Schedule = Schedule(initial=1e-4, final=1e-6)  # noqa: RUF009
    """Weight of the entropy bonus."""
    value_coef: Annotated[float, Bounds(0, 1e6)] = 0.5
    """Weight of the value loss."""
    max_grad_norm: Annotated[float, Bounds(0, 1e9, above=True)] = 0.25
    """Longer gradients are scaled to this global norm; 1e9 never clips."""
    normalize_advantage: bool = False
    """Give the advantages of each minibatch mean 0 and deviation 1."""
    ratio: Literal["joint", "per_branch"] = "joint"
    """One probability ratio for the whole action, or one per branch and their losses averaged (published baselines)."""
    target_kl: Annotated[float, Bounds(0, 1e6, above=True)] | None = None
    """Stop updating on a rollout once the policy has moved this far; none: never."""
    weight_decay: Fraction = 0.01
    """AdamW's weight decay."""
    clip_value_loss: bool = True
    """Bound the value's change by `clip_range` too."""

    def check(self) -> None:
        if self.clip_range.initial == 0:
            raise Problem(("clip_range",), "initial is 0, so nothing can be learnt; must be above 0")
        if self.sequence_length is not None and self.sequence_length > self.rollout_steps:
            text = f"sequence_length = {self.sequence_length} is longer than rollout_steps = {self.rollout_steps}"
            remedy = "must be at most that; omit it for whole episodes"
            raise Problem(("sequence_length", "rollout_steps"), f"{text}; {remedy}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Table):
    """When to save and to evaluate."""

    checkpoint_every: Count = 50
    """Iterations between checkpoints."""
    checkpoint_minutes: Annotated[float, Bounds(0, 1e6, above=True)] | None = 15.0
    """A checkpoint at the latest after so many minutes too; none: by iterations alone."""
    eval_every: Annotated[int, Bounds(0, SEED_LIMIT)] = 0
    """Iterations between evaluations on held-out seeds; 0: never during training."""
    keep_checkpoints: Count = 3
    """Periodic checkpoints kept, beside the latest and the best."""
    eval_num_seeds: Count = 50
    """Held-out level seeds per evaluation."""
    eval_first_seed: Seed = 200_000
    """First of them; they must not be training seeds."""
    eval_repeats: Count = 3
    """Episodes per held-out seed."""
    eval_greedy: bool = False
    """Take the likeliest action instead of drawing one."""
    eval_max_steps: Steps = 16_384
    """Cut evaluated episodes here, as endless ones may never end."""
    video_every: Annotated[int, Bounds(0, SEED_LIMIT)] = 100
    """Iterations between videos of a held-out episode, skipped where they would take over 3 % of the time; 0: never."""
    max_nonfinite_updates: Count = 10
    """Updates in a row that may be skipped because loss or gradient is not finite before the run stops."""
    max_unwritable_minutes: Annotated[float, Bounds(0, 1e6)] = 30.0
    """How long a run goes on while it cannot write its files (a full disk) before it stops."""

    def check(self) -> None:
        _check_seeds(self, "eval_first_seed", "eval_num_seeds")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(Table):
    """Everything that decides a run. Defaults are the published MemoryGym baseline's, schedules ending with the run."""

    seed: Seed = 1
    """Seed of weights, action noise, minibatches and level choice."""
    device: str = "auto"
    """One of "auto" (CUDA where there is any), "cpu", "cuda", "cuda:N"."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the network; auto: bfloat16 on CUDA, float32 on the CPU. Weights, state and losses are float32."""
    storage: Literal["auto", "device", "host"] = "auto"
    """Where a rollout's observations lie on CUDA; auto: on the device while they fit, else page-locked on the host."""
    deterministic: bool = False
    """On CUDA only algorithms that give the same bits twice, slower; a CPU does so anyway."""
    compile: bool = False
    """Compile the encoder for updates, where there is a compiler. Meant for GPUs, unmeasured; no gain on a CPU."""
    total_steps: Steps
    """Environment steps to train for, over all environments (and all ranks, where several train)."""
    env: EnvConfig
    """[env]"""
    model: ModelConfig = ModelConfig()
    """[model]"""
    core: CoreConfig = CoreConfig()
    """[core]"""
    ppo: PPOConfig = PPOConfig()
    """[ppo]"""
    train: TrainConfig = TrainConfig()
    """[train]"""

    def check(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", self.device, re.ASCII):
            raise Problem(
                ("device",), f'{shown(self.device)} is not a device; must be "auto", "cpu", "cuda" or "cuda:N"'
            )
        if self.ppo.num_minibatches > self.batch_size:
            text = f"num_minibatches = {self.ppo.num_minibatches} exceeds the {self.batch_size} steps of a rollout"
            remedy = "must be at most ppo.rollout_steps * env.num_envs"
            raise Problem(("ppo.num_minibatches", "ppo.rollout_steps", "env.num_envs"), f"{text}; {remedy}")
        first, last = self.env.first_seed, self.env.first_seed + self.env.num_seeds - 1
        held_first, held_last = self.train.eval_first_seed, self.train.eval_first_seed + self.train.eval_num_seeds - 1
        if held_first <= last and first <= held_last:
            text = f"evaluation seeds {held_first}..{held_last} overlap the training seeds {first}..{last}"
            keys = ("train.eval_first_seed", "train.eval_num_seeds", "env.first_seed", "env.num_seeds")
            raise Problem(keys, f"{text}; held-out seeds must not overlap them")

    @property
    def batch_size(self) -> int:
        """Environment steps per iteration and rank."""
        return self.ppo.rollout_steps * self.env.num_envs

    @property
    def num_iterations(self) -> int:
        """The last iteration may go beyond `total_steps`: rollouts are never cut short."""
        return -(-self.total_steps // self.batch_size)

    @property
    def updates_per_iteration(self) -> int:
        """At most: rollouts with few sequences, and `target_kl`, make fewer."""
        return self.ppo.num_epochs * self.ppo.num_minibatches

    @classmethod
    def load(cls, path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> "Config":
        """Read a TOML file, then apply dotted overrides in their order.

        Text is read as typed on a command line (`{"ppo.gamma": "0.9"}`, see `parse_overrides`), other values are
        taken as they are. An override replaces the whole value at its key; None clears an optional one.
        Raises `ConfigError`, and nothing else, whatever the file holds.
        """
        return config_io.load(Config, path, overrides or {})

    @classmethod
    def from_dict(cls, tree: Any, source: str = "from_dict()") -> "Config":
        """The inverse of `to_dict`; `source` is named in errors, for `tree` may be anything."""
        with blame(source):
            return construct(Config, checked_tree(Config, tree))

    def override(self, overrides: Mapping[str, Any]) -> "Config":
        """A copy with dotted overrides over it, as `load` applies them."""
        return config_io.override(Config, self.to_dict(), overrides, "config")

    def to_dict(self) -> dict[str, Any]:
        """Plain nested tables, lists, text and numbers; what is None by default is left out."""
        return plain_tree(self)

    def to_toml(self) -> str:
        return tomli_w.dumps(self.to_dict())

    def replace(self, **changes: Any) -> "Config":
        """A changed copy. Dicts are merged at every depth, so the rest of their table (or schedule) stays.

        An option set to None is removed; a `Schedule` or a table object replaces the whole.
        """
        with blame("replace()"):
            return construct(Config, merged(Config, self.to_dict(), changes))


def parse_overrides(argv: Sequence[str]) -> dict[str, str]:
    """`["--ppo.learning-rate", "1e-4", "--core.kind=lstm"]` as `{"ppo.learning_rate": "1e-4", "core.kind": "lstm"}`.

    Keys are checked, values are read by `Config.load`: TOML, or a bare word for text; `1e6` where a whole number is
    wanted; `none` clears an optional value.
    """
    return config_io.parse_overrides(Config, argv)


def describe_fields() -> list[FieldHelp]:
    """Every setting with its type, default and help, in the order of the tables."""
    return config_io.describe_fields(Config)
