"""The commands as a person types them: exit codes, one-line errors, signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import refusal, train_tiny

from ppo_tbptt.cli import main
from ppo_tbptt.run.metrics import read_metrics

ROOT = Path(__file__).parent.parent
SMALL = ["--env.num-workers", "0", "--env.num-envs", "4", "--ppo.rollout-steps", "16", "--ppo.num-minibatches", "2"]
SMALL += ["--ppo.sequence-length=8", "--train.eval-num-seeds", "3", "--train.eval-repeats=1", "--device", "cpu"]
SMALL += ["--train.video-every=0"]
POC = str(ROOT / "configs" / "toy_poc_memory.toml")
DELAYED = str(ROOT / "configs" / "toy_delayed_choice.toml")


TRAIN = [sys.executable, str(ROOT / "scripts" / "train.py"), POC]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a few steps."""
    path = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", POC, "--run-dir", str(path), "--total-steps", "128", *SMALL]) == 0
    return path


def test_train_leaves_a_run_and_says_what_to_do_next(tmp_path: Path) -> None:
    command = [*TRAIN, "--run-dir", str(tmp_path / "run"), "--total-steps", "128", *SMALL]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "\n" not in done.stderr.strip()
    for text in ("success", "95 % interval", "tensorboard", "tbptt evaluate", "tbptt enjoy", "wiped before every step"):
        assert text in done.stdout
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"config.toml", "metrics.jsonl", "checkpoints"}
    result = json.loads((tmp_path / "run" / "evaluations" / "final.json").read_text())
    assert result["episodes"] == 3
    assert result["env_steps"] == 128


def test_continue_starts_goes_on_and_reprints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", POC, "--run-dir", str(tmp_path / "run"), "--continue", "--total-steps", "256", *SMALL]
    command += ["--train.checkpoint-every", "1"]
    assert main(command) == 0
    capsys.readouterr()
    assert main(command) == 0
    assert "held-out level seeds" in capsys.readouterr().out
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 4  # nothing was trained again
    (tmp_path / "run" / "evaluations" / "final.json").unlink()
    (tmp_path / "run" / "checkpoints" / "iteration_0000004.pt").unlink()
    assert main(command) == 0
    assert [row["iteration"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]


def test_continue_after_a_kill_before_the_first_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / ".iteration_0000001.pt.123.tmp").write_text("half")
    (run / "config.toml").write_text("seed = 1\n")
    (run / "metrics.jsonl").write_text('{"iteration": 1, "env_steps": 64}\n')
    assert main(["train", POC, "--run-dir", str(run), "--continue", "--total-steps", "64", *SMALL]) == 0
    assert [row["iteration"] for row in read_metrics(run / "metrics.jsonl")] == [1]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["iteration_0000001.pt"]


def test_evaluate_writes_the_documented_json(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    command = ["evaluate", str(run), "--num-seeds", "5", "--repeats", "2", "--json", str(file)]
    assert main([*command, "--num-workers", "0", "--device", "cpu"]) == 0
    result = json.loads(file.read_text())
    assert result["episodes"] == len(result["per_episode"]) == 10
    assert result["seeds"] == list(range(200_000, 200_005))
    assert set(result["measures"]["success"]) == {"mean", "ci95"}
    assert result["checkpoint"].endswith("iteration_0000002.pt")
    assert result["env_steps"] == 128
    assert "10 sampled episodes on 5 held-out level seeds" in capsys.readouterr().out


def test_evaluate_on_a_changed_task(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The cue is shown for 9 steps in which the agent can't move, and episodes are cut after 10: nobody arrives."""
    file = run.parent / "changed.json"
    command = ["evaluate", str(run), "--num-seeds", "4", "--num-workers", "0", "--json", str(file)]
    assert main([*command, "--env.options.num-show-steps", "9", "--env.max-episode-steps", "10"]) == 0
    assert [row["length"] for row in json.loads(file.read_text())["per_episode"]] == [10] * 4
    capsys.readouterr()
    assert "only --env.* can" in refusal(capsys, *command, "--core.kind", "lstm")


def test_the_command_evaluates_as_the_run_does_unless_told_otherwise(tmp_path: Path) -> None:
    settings = {"eval_num_seeds": 3, "eval_first_seed": 300_000, "eval_repeats": 1, "eval_greedy": True}
    train_tiny(tmp_path / "run", train={**settings, "eval_max_steps": 5}, total_steps=64)

    def played(*options: str) -> tuple[Any, ...]:
        file = tmp_path / "result.json"
        assert main(["evaluate", str(tmp_path / "run"), "--num-workers", "0", "--json", str(file), *options]) == 0
        result = json.loads(file.read_text())
        result = result[0] if isinstance(result, list) else result
        return tuple(result[key] for key in ("seeds", "repeats", "greedy", "max_steps"))

    levels = [300_000, 300_001, 300_002]
    assert played() == played("--all") == (levels, 1, True, 5)
    asked = ("--sampled", "--num-seeds", "1", "--first-seed", "7", "--repeats", "2", "--max-steps", "9")
    assert played(*asked) == ([7], 2, False, 9)
    assert played("--num-seeds", "2") == (levels[:2], 1, True, 5)


def test_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(ROOT / "configs" / "mortar_mayhem_grid.toml")]) == 0
    out = capsys.readouterr().out
    assert "parameters: 6,472,869" in out
    assert "16,384 steps an iteration, 10,000 iterations" in out
    assert main(["show", "--defaults"]) == 0
    assert "ppo.gae_lambda" in capsys.readouterr().out


def test_enjoy_writes_videos(tmp_path: Path) -> None:
    """On a task with images: the agent's view and the ground truth side by side."""
    from imageio_ffmpeg import count_frames_and_secs
    from PIL import Image, ImageSequence

    config = ["--env.id", "MortarMayhem-Grid-v0", "--model.cnn-channels", "[4, 4, 4]", "--train.eval-repeats", "1"]
    config += ["--env.options", "{command_count = [1]}", *[x for x in SMALL if "eval-repeats" not in x]]
    assert main(["train", POC, "--run-dir", str(tmp_path / "run"), "--total-steps", "64", *config]) == 0
    for name in ("a.mp4", "a.gif"):
        assert main(["enjoy", str(tmp_path / "run"), "--seed", "200001", "--video", str(tmp_path / name)]) == 0
    # 10 steps of one command, and the last observation, which stays for a second more, at 6 frames per second
    assert count_frames_and_secs(tmp_path / "a.mp4")[0] == 17
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.size == (1024, 784)
        seconds = sum(frame.info["duration"] for frame in ImageSequence.Iterator(gif)) / 1000
    assert seconds == pytest.approx(17 / 6, rel=0.1)


def test_enjoy_picks_failures_and_gives_up(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["enjoy", str(run), "--episodes", "3", "--video", str(tmp_path / "a.mp4"), "--pick"]
    seeds = {}
    for kind, success in (("failures", 0), ("successes", 1)):
        assert main([*command, kind]) == 0
        lines = capsys.readouterr().out.splitlines()[:-1]
        assert len(lines) == 3 and all(line.endswith(f"success {success}") for line in lines)
        seeds[kind] = {line.split(":")[0] for line in lines}
    assert not seeds["failures"] & seeds["successes"]
    (tmp_path / "a.mp4").unlink()
    monkeypatch.setattr("ppo_tbptt.commands.enjoy.MOST_TRIES", 4)
    command.append("successes")
    assert main([*command, "--env.max-episode-steps", "1"]) == 1  # too few to arrive anywhere
    assert capsys.readouterr().out == "no successes on the levels 200000 to 200003; gave up\n"
    assert main([*command, "--env.max-episode-steps", "1", "--seed", str(2**31 - 1)]) == 1  # there are no more levels
    assert capsys.readouterr().out == f"no successes on the levels {2**31 - 1} to {2**31 - 1}; gave up\n"
    assert main([*command, "--max-steps", "1"]) == 1
    assert "4 of them cut at --max-steps 1" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())


WRONG = {
    "missing config": (["train", "configs/quickstrat.toml"], "quickstrat.toml"),
    "unknown key": (["train", POC, "--ppo.lerning-rate", "1"], "learning"),
    "out of range": (["train", POC, "--ppo.gamma", "1.5"], "ppo.gamma"),
    "no CUDA": (["train", POC, "--device", "cuda:7"], "CUDA"),
    "resume nothing": (["train", "--resume", "nowhere"], "not a run folder"),
    "evaluate nothing": (["evaluate", "nowhere.pt"], "nowhere.pt"),
    "zero repeats": (["evaluate", POC, "--repeats", "0"], "at least 1"),
    "video of another kind": (["enjoy", POC, "--video", "a.avi"], "--video a.avi: must end in .mp4 or .gif"),
    "figure that is all suffix": (["plot", POC, "--out", ".png"], "--out .png: must end in .png, .svg or .pdf"),
    "figure of another kind": (["probe", POC, "--out", "a.jpeg"], "--out a.jpeg: must end in .png, .svg or .pdf"),
    "graph of another kind": (["export", POC, "--onnx", "a.pt"], "--onnx a.pt: must end in .onnx"),
    "compare nothing": (["compare"], "required: RUN"),
    "compare no run": (["compare", "nowhere"], "nowhere: no such run folder or agent"),
    "plot without a file": (["plot", POC], "--out"),
    "plot into no folder": (["plot", POC, "--out", "nowhere/a.png"], "there is no folder nowhere"),
    "export nothing": (["export", POC], "--onnx FILE.onnx"),
    "all of a file": (["evaluate", POC, "--all"], "takes a run's folder"),
    "no time to soak": (["soak", POC, "--minutes", "0"], "above 0"),
    "ablation of another task": (["ablate", POC], "must be 'ppo_tbptt/DelayedChoice-v0'"),
    "ablation of no run": (["ablate", DELAYED, "--only", "gru_delay5"], "like gru_delay3_length4_seed1"),
    "ablation by no jobs": (["ablate", DELAYED, "--jobs", "-1"], "at least 0"),
    "no iterations": (["benchmark", POC, "--iterations", "0"], "at least 1"),
    "wrong override of the second": (["benchmark", POC, "--vs", "--core.kidn lstm"], "core.kind"),
    "open quote": (["benchmark", POC, "--vs", "'--core.kind lstm"], "--vs"),
    "profile in no folder": (["benchmark", POC, "--profile", "nowhere/trace.json"], "no folder"),
    "unknown command": (["trian"], "train"),
    "unknown flag": (["evaluate", POC, "--nonsense", "1"], "nonsense"),
}


@pytest.mark.parametrize(("arguments", "says"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in refusal(capsys, *arguments)
    assert not any(tmp_path.iterdir())  # nothing was written


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_with_a_checkpoint(number: int, code: int, tmp_path: Path) -> None:
    """To the whole group, as a terminal's Ctrl-C does it: workers must not die before the trainer is done."""
    command = [*TRAIN, "--run-dir", str(tmp_path / "run"), "--total-steps", "100000000", *SMALL]
    command[command.index("--env.num-workers") + 1] = "2"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert "--resume" in out
    done = len(read_metrics(metrics))
    assert (tmp_path / "run" / "checkpoints" / f"iteration_{done:07d}.pt").exists()
