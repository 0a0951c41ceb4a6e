"""Search spaces: TOML files from dotted config keys to what may be drawn for them."""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ppo_tbptt.config import Config, ConfigError
from ppo_tbptt.config.fields import child, kinds, schema_of, shown
from ppo_tbptt.config.load import Problem, plain, read_toml, validate
from ppo_tbptt.envs import EnvSpec, make_env
from ppo_tbptt.runtime.errors import InputError

NOT_TUNED = ("total_steps", "env.id", "train.")
"""Keys, or what they begin with, that decide how trials are compared."""
EXAMPLE = "[1, 2], or like { low = 1e-4, high = 1e-2, log = true }"
Number = int | float


class _Range(BaseModel):
    """Numbers from ``low`` to ``high``, both included."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    low: Number
    high: Number
    step: Annotated[Number, Field(gt=0)] | None = None
    log: bool = False

    @model_validator(mode="after")
    def _check(self) -> "_Range":
        if self.low > self.high:
            raise Problem(("low",), f"{self.low} is above high = {self.high}; must be at most that")
        if self.log and self.low <= 0:
            raise Problem(("low",), f"{self.low} is not allowed with log = true; must be above 0")
        if self.log and self.step is not None:
            raise Problem(("step",), f"{self.step} is not allowed with log = true; must be one or the other")
        return self

    def distribution(self, whole: bool) -> BaseDistribution:
        """Return the distribution; ``whole``: of whole numbers, where all that is given is whole.

        Raises:
            Problem: ``high`` is not reached in steps.
        """
        low, high, step = self.low, self.high, self.step
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what optuna would do then is refused below
            if whole and all(isinstance(value, int | None) for value in (low, high, step)):
                made = IntDistribution(int(low), int(high), log=self.log, step=int(step or 1))
            else:
                made = FloatDistribution(float(low), float(high), log=self.log, step=step and float(step))
        if made.high != high:
            raise Problem(("high",), f"{high} is not low = {low} and steps of {step}; must be like {made.high}")
        return made


class _Choice(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    values: Annotated[list[Any], Field(min_length=1)]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A key of the config and its distribution; of a choice, the values by what stands for them in the study."""

    key: str
    distribution: BaseDistribution
    choices: Mapping[Any, Any]

    def suggest(self, trial: Trial) -> None:
        """Let the study draw the trial's value, if it has none yet."""
        match self.distribution:
            case CategoricalDistribution(choices=choices):
                trial.suggest_categorical(self.key, choices)
            case IntDistribution(low=low, high=high, step=step, log=log):
                trial.suggest_int(self.key, low, high, step=step, log=log)
            case FloatDistribution(low=low, high=high, step=step, log=log):
                trial.suggest_float(self.key, low, high, step=step, log=log)

    def value(self, drawn: Any) -> Any:
        """Return the config's value for what the study holds."""
        return self.choices[drawn] if self.choices else drawn

    def extremes(self) -> list[Any]:
        """List all choices, or the ends of the range."""
        if isinstance(self.distribution, IntDistribution | FloatDistribution):
            return [self.distribution.low, self.distribution.high]
        return list(self.choices.values())


@dataclass(frozen=True, slots=True)
class Space:
    """What is searched; ``tree`` is the file's content by dotted key."""

    parameters: Sequence[Parameter]
    tree: Mapping[str, Any]

    @classmethod
    def load(cls, path: Path, base: Config, overridden: Sequence[str] = ()) -> "Space":
        """Read a search space for ``base``, of which the keys in ``overridden`` were set on the command line.

        Raises:
            ConfigError: the file can't be read, a key is none of the config's or must not be tuned, a distribution is
                none, or the config accepts one of its values with no value of the other keys.
        """
        tree = dict(_flatten(read_toml(str(path))))
        for key in tree:
            for other in tree:
                if other.startswith(f"{key}."):
                    raise ConfigError(f"{path}: {key}: it and its part {other} are both there; must be one of them")
            if f"{key}.".startswith(NOT_TUNED):
                raise ConfigError(f"{path}: {key}: decides how trials are compared; must be the same for all of them")
            if key in overridden:
                raise ConfigError(f"{path}: {key}: set on the command line too; must be only one of the two")
        if not tree:
            raise ConfigError(f'{path}: nothing to search; must have lines like "ppo.gamma" = {EXAMPLE}')
        space = cls([_parameter(key, node, path) for key, node in tree.items()], tree)
        for parameter in space.parameters:
            for value in parameter.extremes():
                space._check(parameter, value, base, path)
        return space

    def _check(self, parameter: Parameter, value: Any, base: Config, path: Path) -> None:
        """Check that the config accepts a value, with its own values or with any one of another key."""
        own = {parameter.key: value}
        try:
            config = base.override(own)
            if parameter.key.startswith("env."):
                spec_of(config)
            return
        except InputError as error:
            refusal = str(error)
        for other in self.parameters:
            for theirs in other.extremes() if other is not parameter else ():
                try:
                    base.override({other.key: theirs, **own})
                    return
                except ConfigError:
                    continue
        for place in (f"override: {parameter.key}: ", f"command line: --{parameter.key.replace('_', '-')}: "):
            refusal = refusal.removeprefix(place)
        raise ConfigError(f"{path}: {parameter.key}: {refusal}")

    def suggest(self, trial: Trial) -> None:
        """Let the study draw all of a trial's values that it has not drawn yet."""
        for parameter in self.parameters:
            parameter.suggest(trial)

    def overrides(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config's values, by key, of what the study has drawn."""
        return {parameter.key: parameter.value(drawn[parameter.key]) for parameter in self.parameters}


def spec_of(config: Config) -> EnvSpec:
    """Make the config's environment, and return what it says about itself.

    Raises:
        EnvError: there is none, or it refuses the options.
    """
    task, previous = config.env, config.model.previous
    env = make_env(task.id, options=task.options, max_episode_steps=task.max_episode_steps, previous=previous)
    env.close()
    return env.spec


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield distributions by dotted key, quoted or as tables."""
    for name, node in tree.items():
        if isinstance(node, dict) and node and not {"low", "high", "values"} & node.keys():
            yield from _flatten(node, f"{prefix}{name}.")
        else:
            yield prefix + name, node


def _parameter(key: str, node: Any, path: Path) -> Parameter:
    source = f"{path}: {key}"
    if not isinstance(node, list | dict):
        raise ConfigError(f"{source}: {shown(node)} is no range or choice; must be like {EXAMPLE}")
    try:
        if isinstance(node, dict) and "values" not in node:
            # A range of 0 to 1 means whole numbers only where the config wants them.
            wanted = kinds(reduce(child, key.split("."), schema_of(Config)))
            return Parameter(key, validate(_Range, node, source).distribution("number" not in wanted), {})
        values = plain(validate(_Choice, node if isinstance(node, dict) else {"values": node}, source).values)
    except Problem as problem:
        raise ConfigError(": ".join(filter(None, (source, problem.keys[0], problem.text)))) from None
    # The study holds text, numbers and booleans; a list or a table is named by its JSON.
    choices = {json.dumps(v) if isinstance(v, list | dict) else v: v for v in values}
    if len(choices) < len(values):
        raise ConfigError(f"{source}: {shown(values)} has equal values; must be different ones")
    return Parameter(key, CategoricalDistribution(tuple(choices)), choices)
