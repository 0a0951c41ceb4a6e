"""What may change when a run goes on, and what its settings then mean."""

from typing import Any

from ppo_tbptt.config import Config, ConfigError, Schedule, UserCoreConfig, keys_marked


def changes(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys in which two configs (as trees) differ, with both values; None where one has none."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**before, **after}:
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= changes(old, new, f"{prefix}{key}.")
        elif old != new:
            found[prefix + key] = (old, new)
    return found


def continued(saved: Config, config: Config) -> Config:
    """Return ``config`` for a run that went by ``saved`` so far.

    Schedules that were to end with the run keep the span that they had, whatever ``total_steps`` is now.

    Raises:
        ConfigError: something differs that cannot change in a run.
    """
    fixed = {*keys_marked("fixed"), *(["core"] if isinstance(config.core, UserCoreConfig) else [])}
    for key, (old, new) in changes(saved.to_dict(), config.to_dict()).items():
        if not fixed.isdisjoint([key, key.partition(".")[0]]):
            change = f"{old!r}, which can't become {new!r} in the middle of it"
            raise ConfigError(f"{key}: the run was started with {change}; start a new run for that")
    spans = {
        name: {"over_steps": saved.total_steps}
        for name, now in config.ppo
        if isinstance(now, Schedule) and now == getattr(saved.ppo, name)
        if now.final is not None and now.over_steps is None
    }
    return config if saved.total_steps == config.total_steps else config.replace(ppo=spans)


def describe_changes(saved: Config, config: Config) -> list[str]:
    """Say for each setting that differs what it was and is."""
    differing = changes(saved.to_dict(), config.to_dict()).items()
    return [
        f"{key}: {'none' if old is None else old} -> {'none' if new is None else new}" for key, (old, new) in differing
    ]
