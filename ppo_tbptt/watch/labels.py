"""What the actions of known environments are called."""

from ppo_tbptt.envs import MEMORY_GYM_IDS, EnvSpec

Branch = tuple[str, tuple[str, ...]]
"""A branch's name, empty where there is but one, and its choices' names."""

_GRID: tuple[Branch, ...] = (("", ("stay", "turn left", "turn right", "forward")),)
_AXES: tuple[Branch, ...] = (("horizontal", ("stay", "left", "right")), ("vertical", ("stay", "up", "down")))
_KNOWN: dict[str, tuple[Branch, ...]] = {
    **dict.fromkeys(MEMORY_GYM_IDS, _AXES),
    **dict.fromkeys(("MortarMayhem-Grid-v0", "MortarMayhemB-Grid-v0", "MysteryPath-Grid-v0"), _GRID),
    "Endless-MysteryPath-v0": (("", ("stay", "right", "up", "down")),),
    "ppo_tbptt/PocMemory-v0": (("", ("left", "right")),),
}


def action_labels(spec: EnvSpec) -> tuple[Branch, ...]:
    """Each branch of the action with its choices: by name where the environment is known, else by number."""
    known = _KNOWN.get(bare_id(spec))
    if known is not None and tuple(len(choices) for _, choices in known) == spec.action_nvec:
        return known
    several = len(spec.action_nvec) > 1
    return tuple(
        (f"branch {number}" if several else "", tuple(str(choice) for choice in range(size)))
        for number, size in enumerate(spec.action_nvec)
    )


def bare_id(spec: EnvSpec) -> str:
    """The environment's id without the module that registers it."""
    return spec.env_id.rpartition(":")[2]
