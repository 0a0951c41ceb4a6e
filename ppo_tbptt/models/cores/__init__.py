"""Recurrent cores. Their state is one flat vector per sequence, packed and unpacked here and nowhere else.

A built-in core is one class with the interface of :class:`Core` and an entry in ``CORES``. A core of the user's own is
such a class in any module, named ``kind = "module:Class"``; :mod:`ppo_tbptt.models.contract` checks it.
"""

from typing import Any

from ppo_tbptt.config import ConfigError
from ppo_tbptt.models.cores.core import Core, NoMemory, Normalized, Residual, Wrapper
from ppo_tbptt.models.cores.matrix import GatedDelta, Retention
from ppo_tbptt.models.cores.scan import LRU, MinGRU
from ppo_tbptt.models.cores.torch_rnn import GRU, IRNN, LSTM, LayerNormGRU, LayerNormLSTM, ReluRNN, TanhRNN
from ppo_tbptt.models.plugins import load_plugin, one_line

__all__ = ["CORES", "GRU", "LSTM", "Core", "NoMemory", "Normalized", "ReluRNN", "Residual", "TanhRNN", "Wrapper"]
__all__ += ["IRNN", "LRU", "GatedDelta", "LayerNormGRU", "LayerNormLSTM", "MinGRU", "Retention", "build_core"]

CORES: dict[str, type[Core]] = {
    "none": NoMemory,
    "rnn_tanh": TanhRNN,
    "rnn_relu": ReluRNN,
    "gru": GRU,
    "lstm": LSTM,
    "irnn": IRNN,
    "ln_gru": LayerNormGRU,
    "ln_lstm": LayerNormLSTM,
    "mingru": MinGRU,
    "lru": LRU,
    "retention": Retention,
    "gated_delta": GatedDelta,
}
"""By ``core.kind``; each is constructed as ``(input_size, config)``."""


def build_core(input_size: int, config: Any) -> Core:
    """Build the core that ``config.kind`` names, with what ``config.norm`` and ``config.residual`` ask for around it.

    Args:
        input_size: number of features F.
        config: the config's ``[core]``; a built-in core is given it as it is, a user's own an instance of its
            ``Config`` made of the ``options``.

    Raises:
        ConfigError: no such core, or one that refuses its options or is no core.
    """
    core = CORES[config.kind](input_size, config) if config.kind in CORES else _user_core(input_size, config)
    core = Normalized(core) if config.norm else core
    return Residual(core, input_size) if config.residual else core


def _user_core(input_size: int, config: Any) -> Core:
    core_class = load_plugin("core.kind", config.kind, CORES)
    where = f"core.kind: {config.kind!r}"
    if not isinstance(core_class, type) or not issubclass(core_class, Core):
        raise ConfigError(f"{where}: must be a subclass of ppo_tbptt.models.Core")
    if not hasattr(core_class, "Config"):
        raise ConfigError(f"{where}: has no class Config to hold its options")
    try:
        core = core_class(input_size, core_class.Config(**config.options))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {one_line(error)}") from error
    for name, least in (("state_size", 0), ("output_size", 1)):
        size = getattr(core, name, None)
        if type(size) is not int or size < least:
            raise ConfigError(f"{where}: its {name} is {size!r}; must be a whole number from {least} on")
    return core
