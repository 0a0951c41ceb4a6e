"""Polynomial decay, as a pure function of the environment steps taken so far."""


def schedule_value(initial: float, final: float | None, power: float, over_steps: int, step: int) -> float:
    """`final + (initial - final) * (1 - min(step / over_steps, 1)) ** power`; constant when `final` is None.

    `step` counts environment steps, not updates. Power 1 is a straight line, 2 falls fast first; from
    `over_steps` on the value stays at `final` exactly.
    """
    if final is None:
        return initial
    remaining = 1.0 - min(step / over_steps, 1.0)
    return final + (initial - final) * remaining**power
