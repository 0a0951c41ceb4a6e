"""``ppo-tbptt COMMAND ...``: what a person types, and the exit codes.

train, evaluate, compare, plot, enjoy, probe, export, agents, show, benchmark, tune, ablate, soak

0 done, 2 wrong input (one line on standard error), 130 and 143 stopped by SIGINT and SIGTERM with a checkpoint written,
124 likewise by --max-minutes and --minutes, 1 anything else that went wrong: environments that keep failing, a disk
that stays full, another rank of a distributed run that is gone.
"""

import io
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from ppo_tbptt.runtime.errors import InputError, RunError, printable

TUNED = {"GOMP_SPINCOUNT": "10000", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
"""Read when torch is imported; what the user has set holds.

GOMP_SPINCOUNT: how long torch's idle threads spin for more work before they sleep. By default it is milliseconds, on
    the very cores that the environments' workers need between two steps of the network. On 2 cores this made whole
    iterations 8 % faster (mortar_mayhem_grid, bfloat16) and 10 % (quickstart); no spinning made them 6 % slower.
ONEDNN_PRIMITIVE_CACHE_CAPACITY: kernels are compiled for every shape and kept, 1024 of them by default. Shapes are few
    where they can be padded (:func:`~ppo_tbptt.runtime.device.pad_rows`), and new in every minibatch where they can't:
    with 32 an update of cpu/mortar_mayhem_grid takes 1.15 times as long as with 64, and 128 save 2 % more of it for
    55 MB.
"""
COMMANDS = ("train", "evaluate", "compare", "plot", "enjoy", "probe", "export", "agents", "show")
COMMANDS += ("benchmark", "tune", "ablate", "soak")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for name, value in TUNED.items():
        os.environ.setdefault(name, value)
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):  # file names may hold bytes that the terminal's encoding cannot say
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    argv = list(sys.argv[1:] if argv is None else argv)
    if any("\0" in argument for argument in argv):
        return _fail("a null byte in the command line; no value or file name can hold one", 2)
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        print(f"usage: ppo-tbptt {{{','.join(COMMANDS)}}} ... (each has its own --help)")
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        return _fail(f"{argv[0][:80]!r} is not a command; use one of {', '.join(COMMANDS)}", 2)
    try:  # a command is imported only now, so that what needs no torch, such as wrong arguments, does not wait for it
        return import_module(f"ppo_tbptt.commands.{argv[0]}").run(argv[1:])
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        return 130
    except InputError as error:
        return _fail(error, 2)
    except (RunError, OSError) as error:
        return _fail(error, 1)
    except RuntimeError as error:
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(error, torch.OutOfMemoryError):
            raise
        remedy = "lower env.num_envs or ppo.rollout_steps, or raise ppo.num_minibatches; the checkpoints stay"
        return _fail(f"the GPU's memory is full; {remedy} ({' '.join(str(error).split())[:200]})", 1)


def _fail(message: object, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    text = printable(message)
    print(f"warning: {text}" if category is UserWarning else f"{category.__name__}: {text}", file=sys.stderr)
