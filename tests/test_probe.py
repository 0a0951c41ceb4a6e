"""The probe: which disturbances are played, the same for any number of workers, and what the command leaves."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers import refusal, train_tiny
from test_reference_evaluation import make_agent

from ppo_tbptt.analysis.probe import ProbeResult, draw_probe, probe_memory
from ppo_tbptt.analysis.runs import read_run
from ppo_tbptt.cli import main
from ppo_tbptt.commands import probe as command
from ppo_tbptt.config import EnvConfig
from ppo_tbptt.evaluation.evaluate import evaluate

TRACER = EnvConfig(id="fixture_envs:fixture/Tracer-v0")
LEVELS: dict[str, Any] = {"seeds": range(100, 130), "repeats": 3}


def play(**changes: Any) -> ProbeResult:
    return probe_memory(make_agent(TRACER.id), TRACER, **{**LEVELS, "num_workers": 0, **changes})


def test_it_plays_each_disturbance_once() -> None:
    """Episodes of at most 9 steps: wiping every 16 would be as good as never."""
    calls: list[tuple[int, int | None]] = []
    result = play(progress=lambda *call: calls.append(call))
    assert result.longest == 9
    assert [(trial.kind, trial.amount) for trial in result.trials] == [
        ("intact", None),
        *(("forget", k) for k in (1, 2, 4, 8)),
        ("shuffle", None),
        *(("noise", x) for x in (0.1, 0.3, 1.0)),
    ]
    assert calls[-1] == (9 * 90, 9 * 90)
    for trial, forget_every in zip(result.trials, (None, 1, 2, 4, 8), strict=False):
        same = evaluate(make_agent(TRACER.id), TRACER, **LEVELS, num_workers=0, forget_every=forget_every)
        assert trial.measures == same.measures
    returns = [trial.measures["return"].mean for trial in result.trials]
    assert len(set(returns)) == len(returns)  # each does something of its own to this agent


def test_the_number_of_workers_changes_nothing() -> None:
    assert play(seeds=range(100, 110)).to_dict() == play(seeds=range(100, 110), num_workers=2).to_dict()


def test_a_single_level_has_no_intervals_but_a_figure() -> None:
    result = play(seeds=[100], repeats=1)
    assert result.of("shuffle")[0].measures == result.of("intact")[0].measures  # nobody to exchange with
    assert draw_probe(result, title="one level", top=None).axes


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tiny(tmp_path_factory.mktemp("probe") / "run", total_steps=64)


SMALL = ["--num-seeds", "3", "--repeats", "2", "--num-workers", "0", "--device", "cpu"]


def test_the_command_leaves_table_figures_and_picture(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", str(run), *SMALL, "--max-steps", "6"]) == 0
    out = capsys.readouterr().out
    for text in ("as it is", "wiped at every step", "wiped every 4 steps", "another level's", "noise of 0.3 x RMS"):
        assert text in out
    assert "wiped every 8 steps" not in out
    (data,) = (run / "evaluations").glob("probe_*.json")
    tree = json.loads(data.read_text())
    assert tree["checkpoint"].endswith("iteration_0000001.pt")
    assert (tree["headline"], tree["longest"], tree["env_steps"]) == ("success", 6, 64)
    assert set(tree["trials"][0]["measures"]["success"]) == {"mean", "ci95"}
    # What reads a run's evaluations finds the undisturbed one in it.
    assert main(["evaluate", str(run), *SMALL, "--max-steps", "6", "--json", str(run.parent / "same.json")]) == 0
    same = json.loads((run.parent / "same.json").read_text())
    assert {key: tree[key] for key in same} == same
    assert data.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_another_task_is_written_only_where_told(run: Path, tmp_path: Path) -> None:
    before = set(run.rglob("*"))
    change = ["--env.options.num-show-steps", "3", "--json", str(tmp_path / "a.json")]
    assert main(["probe", str(run), *SMALL, *change, "--out", str(tmp_path / "a.svg")]) == 0
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")
    assert (tmp_path / "a.json").exists()
    assert set(run.rglob("*")) == before


def test_gradients_leave_table_numbers_and_picture(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--gradients", "--num-seeds", "3", "--num-workers", "0", "--device", "cpu"]
    assert main(["probe", str(run), *small]) == 0
    out = capsys.readouterr().out
    (data,) = (run / "evaluations" / "gradients").glob("*.json")
    tree = json.loads(data.read_text())
    assert tree["checkpoint"].endswith("iteration_0000001.pt") and tree["env_steps"] == 64
    assert (tree["rollout_steps"], tree["num_envs"], tree["seeds"]) == (16, 4, [200_000, 200_001, 200_002])
    norms, reach = tree["gradient_norms"], tree["gradient_horizon"]
    assert norms[0] == 1 and len(norms) == 8 and min(norms) > 0
    assert reach == next((k for k, norm in enumerate(norms) if norm < 0.01), 8)
    for text in (f"4 {norms[4]:.3g}", f"gradient horizon {reach}", f"{tree['saturation'][0]:.1%}"):
        assert text in " ".join(out.split())
    assert data.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    before = data.read_bytes()
    assert main(["probe", str(run), *small, "--num-workers", "2"]) == 0  # the last one holds
    assert data.read_bytes() == before
    assert read_run(run).env_steps == 64  # they are not taken for an evaluation


def test_wrong_input_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_tiny(tmp_path / "none", total_steps=64, core={"kind": "none"})
    for arguments, text in [
        ([tmp_path / "none"], "no memory to probe (core.kind = 'none')"),
        ([run, "--json", tmp_path / "no" / "a.json"], "there is no folder"),
        ([run, "--forget-every", "2"], "forget"),
        ([run, "--gradients", "--greedy"], "--greedy: not with --gradients"),
        ([run, "--gradients", "--max-steps", "9"], "--max-steps: not with --gradients"),
        ([tmp_path / "none", "--gradients"], "no memory to probe"),
    ]:
        assert text in refusal(capsys, "probe", *arguments)


def test_a_signal_stops_it_and_nothing_is_written(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(run.rglob("*"))

    def interrupted(*args: Any, progress: Any, **kwargs: Any) -> ProbeResult:
        def report(finished: int, total: int | None) -> None:
            if total is not None:  # in the midst of the disturbed episodes
                os.kill(os.getpid(), signal.SIGINT)
            progress(finished, total)

        return probe_memory(*args, progress=report, **kwargs)

    monkeypatch.setattr(command, "probe_memory", interrupted)
    assert main(["probe", str(run), *SMALL]) == 130
    assert "nothing was written" in capsys.readouterr().out
    assert set(run.rglob("*")) == before
