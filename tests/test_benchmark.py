"""The benchmark's figures fit together. How fast anything is, is not tested."""

import gzip
import json
import mmap
import subprocess
import sys
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from configs_for_tests import tiny
from helpers import refusal
from test_cli import POC, ROOT, SMALL

from ppo_tbptt.benchmark import arithmetic, cores
from ppo_tbptt.benchmark.arithmetic import forward_flop
from ppo_tbptt.benchmark.ceiling import measure_ceiling, unpadded
from ppo_tbptt.benchmark.measure import Setting, measure
from ppo_tbptt.benchmark.memory import peak_memory, process_bytes, tree
from ppo_tbptt.cli import main
from ppo_tbptt.config import Config
from ppo_tbptt.envs import make_env
from ppo_tbptt.models.cores import CORES, GRU, LSTM
from ppo_tbptt.run.metrics import Report
from ppo_tbptt.training.trainer import Trainer

QUICK = [*SMALL, "--warmup", "1", "--total-steps", "64"]
PARTS = {"environments", "inference", "transfer", "sequences", "learning", "rest"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "MEASURE_SECONDS", 1e-3)


def benchmark(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The JSON of one benchmark: all of standard output."""
    assert main(["benchmark", POC, *QUICK, "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def check(result: dict[str, Any], *, padded: bool = False) -> None:
    assert result["threads"] == 1 and result["torch"] == torch.__version__
    assert set(result["seconds"]) == PARTS
    speed, total = result["steps_per_second"], sum(result["seconds"].values())
    assert speed == pytest.approx(result["steps_per_iteration"] / total)
    assert result["spread"][0] <= speed <= result["spread"][1]
    ceiling = result["steps_per_iteration"] / sum(result["ceiling_seconds"].values())
    assert result["ceiling_steps_per_second"] == pytest.approx(ceiling)
    assert result["fraction_of_ceiling"] == pytest.approx(speed / ceiling)
    seconds_at_peak = result["flop_per_step"] / result["peak_flops"]["matmul"]  # this task has no images
    assert result["fraction_of_peak"] == pytest.approx(speed * seconds_at_peak)
    assert result["padded_over_valid"] == (result["padded_over_valid_if_padded"] if padded else 1)
    assert result["padded_over_valid_if_padded"] > 1
    assert result["peak_memory_mb"]["host"] > 50
    assert result["peak_memory_mb"]["device"] is None


def test_figures_of_both_settings_and_their_ratio_fit_together(capsys: pytest.CaptureFixture[str]) -> None:
    other = "--core.kind=none --precision bfloat16 --ppo.sequence-stride=4"
    result = benchmark(capsys, "--iterations", "2", "--vs", other)
    check(result)
    assert result["iterations"] == 2
    assert result["steps_per_iteration"] == 64
    assert (result["device"], result["precision"], result["num_workers"]) == ("cpu", "float32", 0)
    assert result["environments"].endswith(" in this process")
    assert result["config"]["source"] == POC
    assert result["config"]["overrides"]["ppo.rollout_steps"] == "16"
    check(result["vs"])
    own = {"core.kind": "none", "precision": "bfloat16", "ppo.sequence_stride": "4"}
    second = result["config"]["overrides"] | own
    assert result["vs"]["config"]["overrides"] == second != result["config"]["overrides"]
    assert result["vs"]["precision"] == "bfloat16"
    assert 1 == result["computed_over_counted"] < result["vs"]["computed_over_counted"] <= 8 / 4
    assert result["vs"]["flop_per_step"] < result["flop_per_step"]
    assert result["ratio"] == pytest.approx(result["vs"]["steps_per_second"] / result["steps_per_second"])
    assert result["ratio_spread"][0] <= result["ratio_spread"][1]


def test_settings_take_turns() -> None:
    order: list[str] = []

    class Spy(Trainer):
        def __next__(self) -> Report:
            order.append("A" if self.config.seed == 1 else "B")
            return super().__next__()

    with Spy(tiny(total_steps=10**6, seed=1)) as a, Spy(tiny(total_steps=10**6, seed=2)) as b:
        settings = [Setting(trainer=trainer, source="", overrides={}) for trainer in (a, b)]
        measure(settings, 1, 2, lambda text: None)
        assert "".join(order) == "ABABAB" + "AB"  # the last two for the memory
        assert [len(setting.iterations) for setting in settings] == [2, 2]
        assert a.iteration == b.iteration == 4


def test_for_a_person(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", POC, *QUICK, "--iterations", "1", "--vs", ""]) == 0
    out = capsys.readouterr().out
    for text in ("steps per second", "of the ceiling", "learning", "padded / valid", "peak memory", "times as fast"):
        assert text in out
    assert "computed / counted" not in out  # all that is computed counts
    assert main(["benchmark", POC, *QUICK, "--iterations", "1", "--vs", "--ppo.burn-in=4"]) == 0
    assert "computed / counted" in capsys.readouterr().out


@pytest.fixture
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "LENGTHS", (2, 50))
    monkeypatch.setattr(cores, "TURN_SECONDS", 0.0)


@pytest.mark.usefixtures("short_turns")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_core_is_timed_against_gru(precision: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = benchmark(capsys, "--cores", "--iterations", "2", "--core.hidden-size", "8", "--precision", precision)
    assert list(result["cores"]) == [kind for kind in CORES if kind != "none"]
    features, hidden = result["input_size"], 8
    gru, lstm = result["cores"]["gru"], result["cores"]["lstm"]
    assert (gru["parameters"], gru["state_size"]) == (3 * hidden * (features + hidden + 2), hidden)
    assert (lstm["parameters"], lstm["state_size"]) == (4 * hidden * (features + hidden + 2), 2 * hidden)
    assert (result["output_size"], result["steps"], result["lengths"]) == (hidden, 4 * 16 // 2, [2, 50])
    assert (result["precision"], result["device"], result["config"]["source"]) == (precision, "cpu", POC)
    for core in result["cores"].values():
        for name in ("projection", "acting", "update_2", "update_50"):
            low, high = core[name]["ratio_spread"]
            assert core[name]["seconds"] > 0 and low <= core[name]["ratio"] <= high


@pytest.mark.usefixtures("short_turns")
def test_cores_take_turns_with_gru(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each update's turn of a core follows one of GRU; both unroll whole sequences with gradients."""
    monkeypatch.setattr(cores, "CORES", {"gru": GRU, "lstm": LSTM})
    calls: list[tuple[str, int, bool]] = []
    for kind in (GRU, LSTM):

        def unroll(
            self: Any, x: torch.Tensor, state: torch.Tensor, sizes: torch.Tensor, original: Any = kind.unroll
        ) -> Any:
            calls.append((type(self).__name__, len(sizes), x.requires_grad))
            return original(self, x, state, sizes)

        monkeypatch.setattr(kind, "unroll", unroll)
    assert main(["benchmark", POC, *QUICK, "--cores", "--iterations", "2"]) == 0
    order = ["GRU", "LSTM"] + ["GRU"] * 4 + ["GRU", "LSTM"] * 2  # a warm-up each, GRU with itself, LSTM with GRU
    assert calls == [(kind, length, True) for length in (2, 50) for kind in order]
    out = capsys.readouterr().out
    for text in ("core", "weights", "projection", "acting", "update 50", "lstm", "times as fast as gru"):
        assert text in out


@pytest.mark.parametrize("option", ["--vs=--seed=2", "--profile=a.json", "--core.kind=lstm"])
def test_cores_are_timed_alone(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = refusal(capsys, "benchmark", POC, "--cores", option)
    assert "--cores" in error and option[2:].partition("=")[0] in error


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_profile_is_a_trace(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The profiler's library must not write to standard output either: hence capfd."""
    padded = ["--core.execution", "padded"] if name.endswith(".gz") else []
    check(benchmark(capfd, "--iterations", "1", "--profile", str(tmp_path / name), *padded), padded=bool(padded))
    data = (tmp_path / name).read_bytes()
    trace = json.loads(gzip.decompress(data) if name.endswith(".gz") else data)
    assert any(event["name"] == "aten::addmm" for event in trace["traceEvents"])


def test_flop_of_the_published_network_by_hand() -> None:
    config = Config.load(ROOT / "configs" / "mortar_mayhem_grid.toml")
    env = make_env(config.env.id, options=config.env.options)
    spec = env.spec
    env.close()
    assert spec.obs["obs"].shape == (84, 84, 3)
    conv = 20 * 20 * 32 * 8 * 8 * 3 + 9 * 9 * 64 * 4 * 4 * 32 + 7 * 7 * 64 * 3 * 3 * 64
    heads = 3 * 512 * 512 + 512 * (sum(spec.action_nvec) + 1)
    features = 7 * 7 * 64
    for core, gates, precision in (("gru", 3, "float32"), ("lstm", 4, "bfloat16"), ("rnn_tanh", 1, "bfloat16")):
        flop = forward_flop(config.replace(core={"kind": core}, precision=precision), spec)
        assert flop == {"conv": 2 * conv, "matmul": 2 * (gates * 512 * (features + 512) + heads)}


def test_the_counted_arithmetic_is_of_one_acting_and_all_epochs(capsys: pytest.CaptureFixture[str]) -> None:
    once, twice = (
        benchmark(capsys, "--iterations", "1", "--ppo.num-epochs", epochs)["flop_per_step"] for epochs in "12"
    )
    assert twice / once == pytest.approx(7 / 4)


@pytest.mark.parametrize(("sequence_length", "expected"), [(8, (8, 4)), (5, (5, 6)), (None, (16, 2))])
def test_the_ceiling_is_of_full_minibatches(sequence_length: int | None, expected: tuple[int, int]) -> None:
    """Steps of each sequence, and number of sequences: nothing is padded."""
    assert unpadded(tiny(ppo={"sequence_length": sequence_length})) == expected


def test_the_ceiling_leaves_the_environments_of_the_trainer_alone() -> None:
    with Trainer(tiny(env={"num_workers": 2})) as trainer:
        next(trainer)
        before = trainer.envs.obs["obs"].copy()
        ceiling = measure_ceiling(trainer)
        assert ceiling.keys() == {"acting", "learning", "environments"} and min(ceiling.values()) > 0
        assert np.array_equal(before, trainer.envs.obs["obs"])
        next(trainer)


def test_peak_memory_is_seen_and_stays() -> None:
    before = sum(map(process_bytes, tree()))
    with peak_memory(torch.device("cpu")) as memory, mmap.mmap(-1, 60_000_000) as block:
        block.write(bytes(range(100)) * 600_000)
        while memory["host"] < before / 1e6 + 50:  # until the thread has looked
            sleep(0.01)
    assert sum(map(process_bytes, tree())) < before + 50e6
    assert memory["host"] >= before / 1e6 + 50
    assert memory["device"] is None


def test_an_ended_process_holds_nothing() -> None:
    process = psutil.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert process_bytes(process) > 0 and process.pid in [p.pid for p in tree()]
    process.communicate()
    assert process_bytes(process) == 0
