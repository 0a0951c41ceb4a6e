"""Exported agents act as the agent does: ONNX graphs in onnxruntime, weights alone in a Policy."""

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from configs_for_tests import tiny
from helpers import refusal, train_tiny
from safetensors.torch import load_file, save_file

import ppo_tbptt.evaluation.policy
from ppo_tbptt.cli import main
from ppo_tbptt.config import Config
from ppo_tbptt.envs import make_env
from ppo_tbptt.evaluation.export import ExportError, export_onnx
from ppo_tbptt.evaluation.policy import Policy
from ppo_tbptt.models.agent import build_agent
from ppo_tbptt.models.heads import mode
from ppo_tbptt.run.checkpoint import CheckpointError
from ppo_tbptt.run.weights import load_weights, save_weights

POC = "ppo_tbptt/PocMemory-v0"


def untrained(env_id: str, core: str, num_layers: int = 1) -> Policy:
    """An agent whose state decides its actions."""
    table = {"kind": core, "num_layers": num_layers, "residual": num_layers > 1, "norm": num_layers > 1}
    config = tiny(env={"id": env_id}, core=table, model={"cnn_channels": [4, 4, 4], "normalize_frames": True})
    env = make_env(config.env.id)
    env.close()
    agent = build_agent(config, env.spec, torch.device("cpu"))
    for head in agent.heads.policy:
        torch.nn.init.orthogonal_(head.get_parameter("weight"), 2.0)
    return Policy(agent, env.spec, config, env_steps=7)


@pytest.mark.parametrize(
    ("env_id", "core", "num_layers"),
    [
        ("fixture_envs:fixture/DictToy-v0", "none", 1),
        ("fixture_envs:fixture/Tracer-v0", "rnn_tanh", 2),
        ("fixture_envs:fixture/ImageToy-v0", "irnn", 1),
        ("fixture_envs:fixture/DictToy-v0", "ln_gru", 2),
        ("fixture_envs:fixture/Tracer-v0", "lstm", 3),
        ("fixture_envs:fixture/Tracer-v0", "ln_lstm", 2),
        ("fixture_envs:fixture/DictToy-v0", "retention", 2),
        ("fixture_envs:fixture/Tracer-v0", "gated_delta", 1),
        ("fixture_envs:fixture/DictToy-v0", "mingru", 2),
        ("fixture_envs:fixture/ImageToy-v0", "lru", 2),
    ],
)
def test_onnx_plays_the_same_episode(env_id: str, core: str, num_layers: int, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    policy = untrained(env_id, core, num_layers)
    assert export_onnx(policy, tmp_path / "a.onnx").compared
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    names = list(policy.spec.obs)
    size = policy.agent.core.state_size
    assert [i.name for i in session.get_inputs()] == [*names, *(["state"] if size else [])]
    assert [o.name for o in session.get_outputs()] == ["logits", "value", *(["next_state"] if size else [])]

    env = make_env(policy.config.env.id)
    obs, episode = env.reset(200_000), None
    state = np.zeros((1, size), np.float32)
    while episode is None:
        batch = {key: obs[key][None] for key in names}
        logits, value, *after = session.run(None, {**batch, "state": state} if size else batch)
        state = after[0] if size else state
        action = np.atleast_1d(policy.act(obs, greedy=True))
        np.testing.assert_array_equal(mode(torch.from_numpy(logits), policy.spec.action_nvec)[0], action)
        assert float(value[0]) == pytest.approx(float(policy.value), abs=1e-4, rel=1e-4)  # type: ignore[arg-type]
        np.testing.assert_allclose(state[0], policy.state, atol=1e-4, rtol=1e-4)
        obs, _, _, _, episode = env.step(action)


def test_onnx_metadata_and_names(tmp_path: Path) -> None:
    """An observation may be called as the graph's own inputs and outputs are."""
    onnx = pytest.importorskip("onnx")
    policy = untrained(POC, "gru")
    spec = policy.spec.from_json(
        {**policy.spec.to_json(), "obs": [["state", [3], "float32"], ["value", [2], "float32"]]}
    )
    policy = Policy(build_agent(policy.config, spec, torch.device("cpu")), spec, policy.config, env_steps=7)
    exported = export_onnx(policy, tmp_path / "a.onnx")
    assert [port.name for port in exported.inputs] == ["state", "value", "agent_state"]
    assert [port.name for port in exported.outputs] == ["logits", "agent_value", "next_state"]
    properties = {p.key: p.value for p in onnx.load(tmp_path / "a.onnx").metadata_props}
    assert Config.from_dict(tomllib.loads(properties["config"])) == policy.config
    assert properties["env_id"] == "ppo_tbptt/PocMemory-v0"
    assert (properties["action_nvec"], properties["state_size"], properties["env_steps"]) == ("[2]", "8", "7")
    assert json.loads(properties["observations"]) == spec.to_json()["obs"]


def raising(error: Exception, cause: Exception | None = None) -> Callable[..., None]:
    def call(*_: object, **__: object) -> None:
        raise error from cause

    return call


FAILS = rf"torch {re.escape(torch.__version__)} fails .*; another version of torch may be able to "


@pytest.mark.parametrize(
    ("name", "broken", "reason"),
    [
        ("ppo_tbptt.evaluation.export.TOLERANCE", -1.0, "the graph's outputs are not the agent's"),
        (
            "torch.onnx.export",
            raising(RuntimeError("step 1/3\nfailed"), ValueError("rank\n5")),
            rf"{FAILS}\(ValueError: rank 5\)",
        ),
        (
            "onnx.checker.check_model",
            raising(RuntimeError("Split\n" + 999 * "x")),
            rf"{FAILS}\(RuntimeError: Split xxx",
        ),
    ],
)
def test_a_graph_that_differs_or_fails_is_not_written_and_the_reason_is_one_line(
    name: str, broken: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    file = tmp_path / "a.onnx"
    file.write_text("old")
    monkeypatch.setattr(name, broken)
    with pytest.raises(ExportError, match=rf"a\.onnx: not written, for .*{reason}") as caught:
        export_onnx(untrained(POC, "gru"), file)
    error = str(caught.value)
    assert "\n" not in error and len(error) < len(str(file)) + 400
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    changes = {"env": {"id": "fixture_envs:fixture/DictToy-v0"}, "model": {"cnn_channels": [4, 4, 4]}}
    return train_tiny(tmp_path_factory.mktemp("export") / "run", total_steps=64, **changes)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_packages_are_named(
    package: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    error = refusal(capsys, "export", run, "--onnx", tmp_path / "a.onnx")
    assert package in error and "pip install 'ppo-tbptt[onnx]'" in error


def test_the_printed_lines_play(run: Path, tmp_path: Path) -> None:
    """In a process of its own, for what it prints on both streams is what a person sees."""
    pytest.importorskip("onnxruntime")
    script = Path(__file__).parent.parent / "scripts" / "export.py"
    files = ["--onnx", str(tmp_path / "a.onnx"), "--safetensors", str(tmp_path / "a.safetensors")]
    done = subprocess.run(
        [sys.executable, str(script), str(run), *files], capture_output=True, text=True, timeout=100, check=True
    )
    assert done.stderr == ""
    assert re.search(r"input +image +uint8 \[batch, 84, 84, 3\]", done.stdout)
    assert re.search(r"output +next_state +float32 \[batch, 8\]", done.stdout)
    assert "equals the agent's" in done.stdout
    lines = [line[2:] for line in done.stdout.splitlines() if re.match(r"  (import|from|\w+(, \w+)* = )", line)]
    env = make_env("fixture_envs:fixture/DictToy-v0")
    names: dict[str, Any] = {"obs": env.reset(0)}
    exec("\n".join(lines), names)
    assert names["action"] == names["policy"].act(names["obs"], greedy=True).tolist()


def test_weights_alone_make_the_same_policy(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.SafeTensors"
    assert main(["export", str(run), "--safetensors", str(file)]) == 0
    ours, theirs = Policy.load(run), Policy.load(file)
    assert (theirs.config, theirs.spec, theirs.env_steps) == (ours.config, ours.spec, 64)
    obs = make_env("fixture_envs:fixture/DictToy-v0").reset(3)
    for _ in range(3):
        assert theirs.act(obs).tolist() == ours.act(obs).tolist()
        assert theirs.value == ours.value
    arguments = ["--num-seeds", "2", "--repeats", "1", "--num-workers", "0"]
    assert main(["evaluate", str(file), *arguments]) == 0
    assert "2 sampled episodes" in capsys.readouterr().out


def test_wrong_input_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no folder" in refusal(capsys, "export", run, "--safetensors", tmp_path / "no" / "a.safetensors")
    assert "gamma" in refusal(capsys, "export", run, "--ppo.gamma", "1")


SPEC = make_env(POC).spec.to_json()
HOSTILE: dict[str, dict[str, str | None]] = {
    "another format": {"format": "ppo_tbptt weights 2"},
    "no config": {"config": None},
    "config is no JSON": {"config": "{"},
    "config nested without end": {"config": "[" * 100_000},
    "config of a giant": {"config": json.dumps(tiny(core={"hidden_size": 65_536, "num_layers": 8}).to_dict())},
    "spec without fields": {"spec": "{}"},
    "steps are words": {"env_steps": "many"},
    "huge observations": {"spec": json.dumps({**SPEC, "obs": [["obs", [10**6, 10**6, 3], "uint8"]]})},
    "observations beyond 64 bits": {"spec": json.dumps({**SPEC, "obs": [["obs", [10**40], "float32"]]})},
    "an unknown field": {"spec": json.dumps({**SPEC, "colour": 1})},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_weights_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    policy = untrained(POC, "gru")
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    save_weights(good, policy.agent.state_dict(), policy.config, policy.spec, 7)
    Policy.load(good)
    metadata: dict[str, str | None] = {
        "format": "ppo_tbptt weights 1",
        "config": json.dumps(policy.config.to_dict()),
        "spec": json.dumps(policy.spec.to_json()),
        "env_steps": "7",
        **HOSTILE.get(case, {}),
    }
    save_file(load_file(good), bad, {key: value for key, value in metadata.items() if value is not None})
    with pytest.raises(CheckpointError, match=r"^\S*bad\.safetensors: [^\n]*$"):
        Policy.load(bad)


def test_a_file_is_not_given_more_memory_than_it_brings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = untrained(POC, "gru")
    giant = policy.config.replace(core={"hidden_size": 4_000})
    save_weights(tmp_path / "a.safetensors", policy.agent.state_dict(), giant, policy.spec, 7)
    built: list[str] = []

    def build(config: Config, spec: Any, device: torch.device) -> Any:
        built.append(device.type)
        return build_agent(config, spec, device)

    monkeypatch.setattr(ppo_tbptt.evaluation.policy, "build_agent", build)
    with pytest.raises(CheckpointError, match=r"expected, .* found"):
        Policy.load(tmp_path / "a.safetensors")
    assert built == ["meta"]


def test_onnxruntime_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert not export_onnx(untrained(POC, "gru"), tmp_path / "a.onnx").compared
    assert (tmp_path / "a.onnx").exists()


def test_files_that_are_no_safetensors(tmp_path: Path) -> None:
    for content in (b"", b"\xff" * 100, b'{"a": 1}', (10**18).to_bytes(8, "little") + b"{}"):
        (tmp_path / "a.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"a\.safetensors: not a safetensors file[^\n]*$"):
            load_weights(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="no such"):
        Policy.load(tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"no such|not a"):
        load_weights(tmp_path)
