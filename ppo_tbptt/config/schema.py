"""Every setting of a run: frozen, typed, complete. The text under a field is its help (`ppo-tbptt show --defaults`)."""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_serializer, model_validator
from pydantic.json_schema import SkipJsonSchema

from ppo_tbptt.config import fields, load, shipped
from ppo_tbptt.config.fields import shown
from ppo_tbptt.config.load import Problem

SEED_LIMIT = 2**31
MAX_COMPUTED = 32
"""Steps that may be computed for each one that counts, where sequences overlap or are warmed up."""
REGULARIZED = ("rnn_tanh", "rnn_relu", "irnn", "gru", "ln_gru")
"""Cores that ``jacobian_norm_coef`` is for: their state is the hidden state alone."""

FIXED: Any = Field(json_schema_extra={"fixed": True})
"""Marks what cannot change when a run is resumed."""
SAME_SETTING: Any = Field(json_schema_extra={"same_setting": True})
"""Marks what runs of one setting may differ in: chance, where and how safely a run is done, what it keeps of it."""

Size = Annotated[int, Field(ge=1, le=65_536)]
Count = Annotated[int, Field(ge=1, le=SEED_LIMIT)]
CountOrZero = Annotated[int, Field(ge=0, le=SEED_LIMIT)]
Seed = Annotated[int, Field(ge=0, le=SEED_LIMIT - 1)]
Steps = Annotated[int, Field(ge=1, le=10**15)]
Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, le=1e6)]
Positive = Annotated[float, Field(gt=0, le=1e6)]
Nothing = Annotated[None, BeforeValidator(lambda value: None if value == "none" else value)]
"""None, also written "none", as TOML has no such value."""
AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Sizes = Annotated[tuple[Size, ...], Field(min_length=1, max_length=16), AsTuple]
Plain = BeforeValidator(load.plain)


class Table(BaseModel):
    """A table of settings, checked when it is made and constant from then on."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_serializer(mode="wrap")
    def _plain(self, handler: Callable[[Any], Any]) -> Any:
        """Leave out None where it is the default, and write "none" where it is not."""
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        tree = handler(self)
        return {k: "none" if v is None else v for k, v in tree.items() if v is not None or defaults.get(k) is not None}


class Schedule(Table):
    """Polynomial decay over environment steps; constant without `final`. A number stands for a constant one."""

    model_config = ConfigDict(json_schema_extra={"type": ["number", "object"], "minimum": 0, "maximum": 1e9})

    initial: Annotated[float, Field(ge=0, le=1e9)]
    """Value at the first step."""
    final: Annotated[float, Field(ge=0, le=1e9)] | Nothing = None
    """Value from `over_steps` on; none: constant at `initial`."""
    power: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Exponent of the decay; 1 is a straight line."""
    over_steps: Steps | Nothing = None
    """Environment steps until `final` is reached; none: `total_steps`."""

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: Any) -> Any:
        return {"initial": value} if isinstance(value, int | float) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _check(self) -> "Schedule":
        if self.final is None and (self.over_steps is not None or self.power != 1):
            name = "power" if self.over_steps is None else "over_steps"
            text = f"{getattr(self, name)} has no effect without final; set final or drop {name}"
            raise Problem((name, "final"), text)
        return self

    @model_serializer(mode="wrap")
    def _plain(self, handler: Callable[[Any], Any]) -> Any:
        tree = handler(self)
        return self.initial if self.final is None else {key: value for key, value in tree.items() if value is not None}

    def at(self, env_steps: int, total_steps: int) -> float:
        """`final + (initial - final) * (1 - min(env_steps / over_steps, 1)) ** power`; `final` exactly from there on.

        `env_steps` were done before; `total_steps` is the span of a schedule without one of its own.
        """
        if self.final is None:
            return self.initial
        remaining = 1.0 - min(env_steps / (self.over_steps or total_steps), 1.0)
        return self.final + (self.initial - self.final) * remaining**self.power


class CurriculumConfig(Table):
    """A curriculum for training; evaluations play the task's own options."""

    stages: Annotated[tuple[Annotated[dict[str, Any], Plain], ...], FIXED, AsTuple] = ()
    """Options over `[env.options]`, a table for each stage, the easiest first; none: no curriculum. Episodes are drawn
    from the stages that are open, at first one."""
    threshold: Annotated[float, Field(ge=-1e9, le=1e9)] = 0.8
    """Mean headline measure of the newest stage's last episodes that opens the next one, after an iteration."""
    episodes: Annotated[int, Field(ge=1, le=1_000_000)] = 100
    """How many episodes that mean is over."""
    own_share: Fraction = 0.1
    """Share of episodes that are of no stage: with `[env.options]` as they are."""


class EnvConfig(Table):
    """The task, and how many copies of it are played."""

    id: Annotated[str, FIXED, Field(pattern=r"^[\w./:@+-]+$", examples=["MortarMayhem-Grid-v0"])]
    """Gymnasium id; `module:Id` imports the module first, in the workers too."""
    num_envs: Size = 32
    """Environments stepped side by side."""
    num_workers: Annotated[Annotated[int, Field(ge=0, le=1024)] | Literal["auto"], SAME_SETTING] = "auto"
    """Worker processes that share the environments, or each half of them; 0 steps them in the training's own process.
    auto: one per core that may be used, by affinity and by the CPU quota of the cgroup, divided among a machine's
    ranks. Never more than environments. Results don't depend on it."""
    double_buffering: Annotated[Literal["auto", "on", "off"], SAME_SETTING] = "auto"
    """Half of the environments step while the agent acts for the others; auto: on CUDA, from 256 environments on."""
    first_seed: Seed = 0
    """First level seed of training; each episode draws one of `num_seeds` from here on."""
    num_seeds: Count = 100_000
    """Number of level seeds to train on."""
    max_episode_steps: Steps | Nothing = None
    """Truncate longer episodes; none: as the environment does by itself."""
    replay: Annotated[bool, SAME_SETTING] = True
    """Checkpoints hold what brings the environments back into the middle of their episodes: level seeds and actions."""
    step_timeout: Annotated[Positive, SAME_SETTING] = 60.0
    """Seconds that a worker may take to step all of its environments once, resets included; then it is taken for hung,
    killed and restarted. Has no effect with `num_workers = 0`: nothing can interrupt the training's own process."""
    max_worker_restarts: Annotated[CountOrZero, SAME_SETTING] = 10
    """Faults that are survived until the next one ends the training: environments that raise or give out NaN, which are
    made anew, and workers that die or hang, which are restarted. Counted by each rank, from 0 again when resumed."""
    options: Annotated[dict[str, Any], Plain] = Field(default={})
    """The environment's own reset options, `[env.options]`."""
    curriculum: CurriculumConfig = CurriculumConfig()
    """[env.curriculum]"""


class ModelConfig(Table):
    """The feed-forward parts around the recurrent core."""

    hidden_size: Size = 512
    """Width of the shared hidden layer, and of one more each for policy and value."""
    cnn_channels: Sizes = (32, 64, 64)
    """Channels of the convolutions that read images."""
    cnn_kernels: Sizes = (8, 4, 3)
    """Their kernels; as many as channels. Those of Mnih et al. 2015, as their strides."""
    cnn_strides: Sizes = (4, 2, 1)
    """Their strides. Where pictures are made of tiles, a first kernel and stride of one tile is cheaper."""
    cnn_features: Size | Nothing = None
    """Dense layer after the convolutions; none: they feed the core directly, as in the published baseline."""
    normalize_frames: bool = False
    """Centre frames on the mean of those that the environments begin with, and scale them to unit variance, so that
    what differs stands out; false: only divide by 255."""
    vector_hidden_sizes: Annotated[tuple[Size, ...], Field(min_length=0, max_length=16), AsTuple] = (128,)
    """Dense layers that read vector observations; []: these feed the core as they are, which suits one-hot ones."""
    previous_action: bool = False
    """Feed the core the action before, one-hot; zeros at an episode's first step."""
    previous_reward: bool = False
    """Feed the core the reward before; 0 at an episode's first step."""

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        num = len(self.cnn_channels)
        for name, sizes in {"cnn_kernels": self.cnn_kernels, "cnn_strides": self.cnn_strides}.items():
            if len(sizes) != num:
                text = f"{list(sizes)} for {num} convolutions (cnn_channels = {list(self.cnn_channels)})"
                raise Problem((name, "cnn_channels"), f"{text}; must be a list of {num}")
        return self

    @property
    def previous(self) -> tuple[str, ...]:
        """Which of the two there are; observations of the same names hold them."""
        return tuple(name for name in ("previous_action", "previous_reward") if getattr(self, name))


_Recurrent = Literal["rnn_tanh", "rnn_relu", "irnn", "gru", "ln_gru", "lstm", "ln_lstm"]
_CoreKind = Literal["none", _Recurrent, "mingru", "lru", "retention", "gated_delta"]


class CoreConfig(Table):
    """A recurrent core of this package."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": True})  # those of a core of one's own
    kind: Annotated[
        _CoreKind,
        FIXED,
        Field(examples=["my_module:MyCore"]),
    ] = "gru"
    """The cell:
    - none: no memory, to compare with.
    - rnn_tanh, rnn_relu: a plain recurrent network (Elman 1990).
    - irnn: rnn_relu that begins as the identity (Le et al. 2015).
    - gru: the gated recurrent unit (Cho et al. 2014).
    - lstm: long short-term memory (Hochreiter and Schmidhuber 1997).
    - ln_gru, ln_lstm: gru and lstm, layer-normalised inside (Ba et al. 2016).
    - mingru: a GRU whose gates see the input alone (Feng et al. 2024).
    - lru: a diagonal linear recurrence of complex numbers, then a gated linear unit (Orvieto et al. 2023).
    - retention: adds what it sees to a matrix for each head, which fades at a fixed rate (Sun et al. 2023).
    - gated_delta: replaces what such a matrix holds at a key, and learns when to forget (Yang et al. 2024).
    - my_module:MyCore: a class of yours, which gets what else is in this table."""
    hidden_size: Annotated[Size, FIXED] = 512
    """Width of each layer's output, and numbers in its state; two for each in "lstm", "ln_lstm" and "lru", and
    `hidden_size` / `num_heads` for each in "retention" and "gated_delta"."""
    num_heads: Annotated[Size, FIXED] = 4
    """Heads of "retention" and "gated_delta", among which `hidden_size` is divided; no effect on others."""
    num_layers: Annotated[int, FIXED, Field(ge=1, le=64)] = 1
    """Layers on top of each other."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout between layers during the update, never while acting."""
    residual: Annotated[bool, FIXED] = False
    """Add the input, projected to the core's size, to its output: what is seen now bypasses memory."""
    norm: Annotated[bool, FIXED] = False
    """Layer normalisation of the core's output, before a residual is added."""
    initial_state: Annotated[Literal["zeros", "learnt"], FIXED] = "zeros"
    """The state at the start of an episode: zeros, or a parameter, to which weight decay does not apply."""
    forget_bias: Annotated[float, FIXED, Field(ge=-100, le=100)] = 0.0
    """What an LSTM's forget gates have for a bias at first; 1 keeps memory longer (Jozefowicz et al. 2015)."""
    chrono_steps: Annotated[int, FIXED, Field(ge=3, le=1_000_000_000)] | Nothing = None
    """T_max of the chrono initialisation, the longest time that memory may have to last, in steps: biases of the gates
    that keep memory, of an LSTM or a GRU, are drawn so that these forget after up to so many (Tallec and Ollivier
    2018); none: zeros."""
    execution: Literal["packed", "padded"] = "packed"
    """How updates unroll a minibatch: its valid steps alone, or padded to its longest sequence and masked. The results
    are equal but for rounding; padding costs more."""

    @model_validator(mode="after")
    def _check(self) -> "CoreConfig":
        if self.kind in ("retention", "gated_delta") and self.hidden_size % self.num_heads:
            text = f"{self.num_heads} heads of hidden_size = {self.hidden_size} with kind = {shown(self.kind)}"
            raise Problem(("num_heads", "hidden_size"), f"{text}; must divide it")
        return self


class UserCoreConfig(Table):
    """A recurrent core from another package: its class, and the rest of the table as it is, for that class to check."""

    model_config = ConfigDict(extra="allow")
    kind: Annotated[str, FIXED, Field(pattern=r"^[\w.]+:[\w.]+$", examples=["my_module:MyCore"])]
    """The module, and the class in it."""
    residual: Annotated[bool, FIXED] = False
    """As of a built-in core."""
    norm: Annotated[bool, FIXED] = False
    """As of a built-in core."""

    @model_validator(mode="before")
    @classmethod
    def _plain_options(cls, value: Any) -> Any:
        return load.plain(value) if isinstance(value, Mapping) else value

    @property
    def options(self) -> dict[str, Any]:
        """What else is in the table: a copy, of plain TOML values."""
        return load.plain(self.model_extra)


def _is_user_core(core: Any) -> bool:
    return isinstance(core, Mapping) and ":" in str(core.get("kind"))


def _core(value: Any) -> Any:
    """Choose the class by ``kind``, so that errors are those of one class."""
    if not isinstance(value, Mapping):
        return value
    return (UserCoreConfig if _is_user_core(value) else CoreConfig).model_validate(value)


class PPOConfig(Table):
    """The algorithm. Learning rate, entropy coefficient and clip range are numbers or schedules over steps."""

    rollout_steps: Annotated[int, Field(ge=1, le=1_000_000)] = 512
    """Steps per environment between updates."""
    sequence_length: Annotated[int, Field(ge=1, le=1_000_000)] | Nothing = None
    """Longest stretch of backpropagation through time (k2); none: whole episodes within the rollout."""
    sequence_stride: Annotated[int, Field(ge=1, le=1_000_000)] | Nothing = None
    """Steps of a sequence that count in the loss, its last ones (k1); those before only carry gradient. Each step
    counts once, so a smaller stride makes more sequences, which overlap. none: all count."""
    burn_in: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Steps before a sequence that warm its state, without gradient or loss (Kapturowski et al. 2019)."""
    refresh_every: Annotated[int, Field(ge=0, le=1000)] = 0
    """Epochs after which the rollout's states are computed anew with the current weights; 0: never."""
    num_epochs: Annotated[int, Field(ge=1, le=1000)] = 3
    """Passes over each rollout."""
    num_minibatches: Count = 8
    """Updates per epoch; fewer where a rollout has fewer sequences."""
    gamma: Fraction = 0.995
    """Discount."""
    gae_lambda: Fraction = 0.95
    """Decay of generalised advantage estimation: 0 is one-step, 1 is the whole return."""
    clip_range: Schedule = Schedule(initial=0.1)
    """How far the probability ratio may move from 1; also bounds the value's change."""
    learning_rate: Annotated[Schedule, Field(json_schema_extra={"maximum": 1})] = Schedule(initial=2.75e-4, final=1e-5)
    """AdamW's step size."""
    entropy_coef: Schedule = Schedule(initial=1e-4, final=1e-6)
    """Weight of the entropy bonus."""
    value_coef: NonNegative = 0.5
    """Weight of the value loss."""
    max_grad_norm: Annotated[float, Field(gt=0, le=1e9)] = 0.25
    """Longer gradients are scaled to this norm; 1e9 never clips."""
    grad_clip: Literal["norm", "value", "per_layer", "none"] = "norm"
    """What `max_grad_norm` bounds: the global norm, each entry's size, the norm of each parameter, or nothing."""
    jacobian_norm_coef: NonNegative = 0.0
    """Weight of the regulariser that keeps the norm of gradients through time constant (Pascanu et al. 2013)."""
    value_gradient_scale: Fraction = 1.0
    """Share of the value loss's gradient that reaches what policy and value have in common; 0 detaches the value."""
    normalize_advantage: bool = False
    """Give the advantages of each minibatch mean 0 and deviation 1."""
    ratio: Literal["joint", "per_branch"] = "joint"
    """One probability ratio for the whole action, or one per branch and their losses averaged (published baselines)."""
    target_kl: Positive | Nothing = None
    """Stop updating on a rollout once the policy has moved this far; none: never."""
    weight_decay: Fraction = 0.01
    """AdamW's weight decay."""
    clip_value_loss: bool = True
    """Bound the value's change by `clip_range` too."""

    @property
    def state_spacing(self) -> int:
        """Steps between the states at which sequences, or their burn-in, can begin within an episode."""
        if self.sequence_length is None:
            return self.rollout_steps
        return math.gcd(self.sequence_length, self.sequence_stride or 0, self.burn_in)

    @property
    def computed_over_counted(self) -> float:
        """Steps that the core is unrolled over for each one that counts, where no episode ends within the rollout."""
        length, steps = self.sequence_length, self.rollout_steps
        stride = self.sequence_stride or length or steps
        computed = 0
        for end in range(stride, steps + stride, stride):
            begin = max(0, end - (length or end))
            computed += min(end, steps) - max(0, begin - self.burn_in)
        return computed / steps


class TrainConfig(Table):
    """When to save and to evaluate."""

    checkpoint_every: Annotated[Count, SAME_SETTING] = 50
    """Iterations between checkpoints."""
    checkpoint_minutes: Annotated[Positive | Nothing, SAME_SETTING] = 15.0
    """A checkpoint at the latest after so many minutes too; none: by iterations alone."""
    eval_every: Annotated[CountOrZero, SAME_SETTING] = 0
    """Iterations between evaluations on held-out seeds; 0: never during training."""
    keep_checkpoints: Annotated[Count, SAME_SETTING] = 3
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
    video_every: Annotated[CountOrZero, SAME_SETTING] = 100
    """Iterations between videos of a held-out episode, skipped where they would take over 3 % of the time; 0: never."""
    instruments_every: Annotated[CountOrZero, SAME_SETTING] = 0
    """Iterations between measurements of how gradients and states fare through time, `memory/*`; 0: never."""
    max_nonfinite_updates: Annotated[Count, SAME_SETTING] = 10
    """Updates in a row that may be skipped because loss or gradient is not finite before the run stops."""
    max_unwritable_minutes: Annotated[NonNegative, SAME_SETTING] = 30.0
    """How long a run goes on while it cannot write its files (a full disk) before it stops."""


class AuxConfig(Table):
    """Auxiliary losses of this package."""

    reconstruction_coef: NonNegative = 0.0
    """Weight of the loss of reconstructing the frame from the core's output; 0: none."""


class Config(Table):
    """Everything that decides a run. Defaults are the published MemoryGym baseline's, schedules ending with the run."""

    seed: Annotated[Seed, SAME_SETTING] = 1
    """Seed of weights, action noise, minibatches and level choice."""
    device: Annotated[
        str, SAME_SETTING, Field(pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?)$", examples=["auto", "cpu", "cuda", "cuda:N"])
    ] = "auto"
    """What to compute on; auto: CUDA where there is any."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the network; auto: bfloat16 on CUDA, float32 on the CPU. Weights, state and losses are float32."""
    storage: Annotated[Literal["auto", "device", "host"], SAME_SETTING] = "auto"
    """Where a rollout's observations lie on CUDA; auto: on the device while they fit, else page-locked on the host."""
    distinct_frames: Annotated[Literal["auto", "on", "off"], SAME_SETTING] = "auto"
    """Store and encode equal frames once; auto: unless the first rollout shows that too few of them repeat."""
    deterministic: Annotated[bool, SAME_SETTING] = False
    """On CUDA only algorithms that give the same bits twice, slower; a CPU does so anyway."""
    compile: Annotated[bool, SAME_SETTING] = False
    """Compile the encoder for updates, where there is a compiler. Meant for GPUs, unmeasured; no gain on a CPU."""
    total_steps: Steps
    """Environment steps to train for, over all environments (and all ranks, where several train)."""
    env: EnvConfig = Field(default={}, validate_default=True)
    """[env]"""
    model: Annotated[ModelConfig, FIXED] = ModelConfig()
    """[model]"""
    core: Annotated[CoreConfig | SkipJsonSchema[UserCoreConfig], BeforeValidator(_core)] = CoreConfig()
    """[core]"""
    ppo: PPOConfig = PPOConfig()
    """[ppo]"""
    train: TrainConfig = TrainConfig()
    """[train]"""
    aux: AuxConfig = AuxConfig()
    """[aux]"""
    losses: Annotated[dict[str, NonNegative], Plain] = Field(default={})
    """Auxiliary losses by name, or `my_module:my_loss`, each with its coefficient."""

    @model_validator(mode="after")
    def _check(self) -> "Config":
        for keys, wrong in self._conflicts():
            raise Problem(keys, wrong)
        return self

    def _conflicts(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Yield what does not go together: the keys, the first of them to blame, and what is wrong."""
        env, core, ppo, train = self.env, self.core, self.ppo, self.train
        for name in self.losses:
            if not re.fullmatch(r"[\w.]+(:[\w.]+)?", name):
                yield ("losses",), f"{shown(name)} is not the name of a loss; must be like my_module:my_loss"
        if self.aux.reconstruction_coef and "reconstruction" in self.losses:
            text = f"reconstruction_coef = {self.aux.reconstruction_coef} is the weight of losses.reconstruction too"
            yield ("aux.reconstruction_coef", "losses"), f"{text}; must be 0, or losses without it"
        if isinstance(core, CoreConfig) and core.dropout > 0 and core.num_layers == 1:
            text = f"dropout = {core.dropout} acts between layers, and num_layers is 1"
            yield ("core.dropout", "core.num_layers"), f"{text}; must be 0, or num_layers at least 2"
        if isinstance(core, CoreConfig) and core.kind == "none" and core.initial_state == "learnt":
            text = 'initial_state = "learnt" with kind = "none", which has no state'
            yield ("core.initial_state", "core.kind"), f'{text}; must be "zeros"'
        if isinstance(core, CoreConfig):
            yield from self._conflicts_of_gates(core)
        if core.kind == "none" and core.residual:
            yield ("core.residual", "core.kind"), 'true with kind = "none", which is its own shortcut; must be false'
        if core.kind == "none" and core.norm:
            yield ("core.norm", "core.kind"), 'true with kind = "none", which has no output of its own; must be false'
        if ppo.clip_range.initial == 0:
            yield ("ppo.clip_range",), "initial is 0, so nothing can be learnt; must be above 0"
        if (rate := max(ppo.learning_rate.initial, ppo.learning_rate.final or 0)) > 1:
            yield ("ppo.learning_rate",), f"{rate} is not allowed; must be a number from 0 to 1"
        if ppo.sequence_length is not None and ppo.sequence_length > ppo.rollout_steps:
            text = f"sequence_length = {ppo.sequence_length} is longer than rollout_steps = {ppo.rollout_steps}"
            remedy = "must be at most that; omit it for whole episodes"
            yield ("ppo.sequence_length", "ppo.rollout_steps"), f"{text}; {remedy}"
        yield from self._conflicts_through_time()
        if ppo.num_minibatches > self.batch_size:
            text = f"num_minibatches = {ppo.num_minibatches} exceeds the {self.batch_size} steps of a rollout"
            remedy = "must be at most ppo.rollout_steps * env.num_envs"
            yield ("ppo.num_minibatches", "ppo.rollout_steps", "env.num_envs"), f"{text}; {remedy}"
        if ppo.jacobian_norm_coef > 0:
            text = f"jacobian_norm_coef = {ppo.jacobian_norm_coef}"
            if core.kind not in REGULARIZED:
                remedy = f"must be 0, or the core one of {', '.join(REGULARIZED)}"
                yield ("ppo.jacobian_norm_coef", "core.kind"), f"{text} with kind = {shown(core.kind)}; {remedy}"
            if ppo.sequence_length == 1:
                text += " acts between the steps of a sequence, and sequence_length is 1"
                yield ("ppo.jacobian_norm_coef", "ppo.sequence_length"), f"{text}; must be 0, or sequences longer"
        if env.curriculum.stages and not train.eval_every:
            text = "eval_every = 0 with a curriculum, whose training episodes are not the task's"
            yield ("train.eval_every", "env.curriculum.stages"), f"{text}; must be at least 1"
        seeds = range(env.first_seed, env.first_seed + env.num_seeds)
        held_out = range(train.eval_first_seed, train.eval_first_seed + train.eval_num_seeds)
        of_env, of_train = ("env.num_seeds", "env.first_seed"), ("train.eval_num_seeds", "train.eval_first_seed")
        for keys, levels in ((of_env, seeds), (of_train, held_out)):
            if levels.stop > SEED_LIMIT:
                wrong = f"{len(levels)} level seeds from {levels.start} on are too many"
                yield keys, f"{wrong}; the last must be at most {SEED_LIMIT - 1}"
        if held_out.start < seeds.stop and seeds.start < held_out.stop:
            text = f"evaluation seeds {held_out.start}..{held_out.stop - 1} overlap the training seeds"
            remedy = "held-out seeds must not overlap them"
            keys = ("train.eval_first_seed", *of_train, *of_env)
            yield keys, f"{text} {seeds.start}..{seeds.stop - 1}; {remedy}"

    def _conflicts_of_gates(self, core: CoreConfig) -> Iterator[tuple[tuple[str, ...], str]]:
        kind = f"with kind = {shown(core.kind)}"
        if core.forget_bias and core.kind not in ("lstm", "ln_lstm"):
            text = f"forget_bias = {core.forget_bias} {kind}, which has no forget gate"
            yield ("core.forget_bias", "core.kind"), f"{text}; must be 0, or the core lstm or ln_lstm"
        if core.chrono_steps is not None and core.kind not in ("gru", "lstm", "ln_gru", "ln_lstm"):
            text = f"chrono_steps = {core.chrono_steps} {kind}, which has no gate that keeps memory"
            yield ("core.chrono_steps", "core.kind"), f"{text}; must be none, or the core gru, lstm, ln_gru or ln_lstm"
        if core.forget_bias and core.chrono_steps is not None:
            text = f"chrono_steps = {core.chrono_steps} and forget_bias = {core.forget_bias} are both for the same bias"
            yield ("core.chrono_steps", "core.forget_bias"), f"{text}; one of them must be omitted"

    def _conflicts_through_time(self) -> Iterator[tuple[tuple[str, ...], str]]:
        core, ppo = self.core, self.ppo
        length, stride, burn_in, steps = ppo.sequence_length, ppo.sequence_stride, ppo.burn_in, ppo.rollout_steps
        name, longest = ("rollout_steps", steps) if length is None else ("sequence_length", length)
        if stride is not None and stride > longest:
            text = f"sequence_stride = {stride} is longer than {name} = {longest}; must be at most that"
            yield ("ppo.sequence_stride", f"ppo.{name}"), f"{text}; omit it for sequences that don't overlap"
        if burn_in > steps:
            text = f"burn_in = {burn_in} is longer than rollout_steps = {steps}"
            yield ("ppo.burn_in", "ppo.rollout_steps"), f"{text}; must be below that"
        if burn_in and length is None:
            text = f"burn_in = {burn_in} has no effect without sequence_length: nothing is before a whole episode"
            yield ("ppo.burn_in", "ppo.sequence_length"), f"{text}; must be 0, or sequence_length set"
        if (stride or burn_in) and (computed := ppo.computed_over_counted) > MAX_COMPUTED:
            keys = ("ppo.sequence_stride", "ppo.burn_in") if stride else ("ppo.burn_in", "ppo.sequence_stride")
            of = f"with sequence_stride = {stride or longest}, {name} = {longest} and burn_in = {burn_in}"
            text = f"{of} each step that counts costs {computed:.1f} computed ones, above {MAX_COMPUTED}"
            yield (*keys, f"ppo.{name}"), f"{text}; must be a larger stride, or less of the others"
        if ppo.refresh_every and isinstance(core, CoreConfig) and core.dropout:
            text = f"refresh_every = {ppo.refresh_every} recomputes states without dropout, and core.dropout"
            keys = ("ppo.refresh_every", "core.dropout")
            yield keys, f"{text} = {core.dropout} acts in updates; one of them must be 0"

    @property
    def batch_size(self) -> int:
        """Environment steps per iteration and rank."""
        return self.ppo.rollout_steps * self.env.num_envs

    @property
    def num_iterations(self) -> int:
        """Iterations of the run; the last may go beyond `total_steps`: rollouts are never cut short."""
        return -(-self.total_steps // self.batch_size)

    @property
    def updates_per_iteration(self) -> int:
        """Updates per iteration at most: rollouts with few sequences, and `target_kl`, make fewer."""
        return self.ppo.num_epochs * self.ppo.num_minibatches

    @classmethod
    def load(cls, path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> "Config":
        """Read a TOML file, or the package's config of that name, then apply dotted overrides in their order.

        Text is read as typed on a command line (`{"ppo.gamma": "0.9"}`): TOML, a bare word for text, `1e6` for a whole
        number, `none` to clear an optional value. Other values are taken as they are, None clears. An override
        replaces the whole value at its key.

        Raises:
            ConfigError: whatever is wrong with the file or an override; nothing else is raised.
        """
        source = os.fspath(path)
        return cls._override(load.read_toml(shipped.config_file(source)), overrides or {}, source)

    @classmethod
    def from_dict(cls, tree: Any, source: str = "from_dict()") -> "Config":
        """Read what `to_dict` wrote; `source` is named in errors, for `tree` may be anything."""
        return load.validate(cls, tree, source)

    def override(self, overrides: Mapping[str, Any]) -> "Config":
        """Return a copy with dotted overrides over it, as `load` applies them."""
        return self._override(self.to_dict(), overrides, "config")

    def replace(self, **changes: Any) -> "Config":
        """Return a changed copy. Dicts are merged at every depth, so the rest of their table (or schedule) stays.

        An option set to None is removed; a `Schedule` or a table object replaces the whole.
        """
        tree = _without_other_core(self.to_dict(), changes.get("core"))
        tree = load.merge(fields.schema_of(Config), tree, changes, depth=load.MAX_OPTION_DEPTH + 2)
        return load.validate(Config, tree, "replace()")

    def to_dict(self) -> dict[str, Any]:
        """Return plain nested tables, lists, text and numbers; what is None by default is left out."""
        return self.model_dump(mode="json")

    def to_toml(self) -> str:
        """Write `to_dict` as TOML."""
        return tomli_w.dumps(self.to_dict())

    @classmethod
    def _override(cls, tree: dict[str, Any], overrides: Mapping[str, Any], source: str) -> "Config":
        kind = {"kind": overrides["core.kind"]} if "core.kind" in overrides else None
        return load.override(cls, _without_other_core(tree, kind), overrides, source)


def _without_other_core(tree: dict[str, Any], core: Any) -> dict[str, Any]:
    """Empty the core's table where the core is to be one of the other class: their options are not the same."""
    before = tree.get("core", {})
    is_other = isinstance(core, Mapping) and "kind" in core and _is_user_core(core) != _is_user_core(before)
    return {**tree, "core": {}} if is_other and isinstance(before, Mapping) else tree
