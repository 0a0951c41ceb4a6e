"""Ids and reset options: where environments come from, and what is said of wrong ones."""

import subprocess
import sys
import warnings
from typing import Any

import gymnasium as gym
import pytest
from gymnasium.utils.env_checker import check_env

from ppo_tbptt.envs import EnvError, make_env
from ppo_tbptt.envs.toy import TOY_IDS, ToyEnv, vector


@pytest.mark.parametrize(
    ("env_id", "says"),
    [
        ("MortarMayhem-Gird-v0", "unknown environment 'MortarMayhem-Gird-v0'. Did you mean 'MortarMayhem-Grid-v0'"),
        ("ppo_tbptt/PocMemry-v0", "Did you mean 'ppo_tbptt/PocMemory-v0'"),
        ("no_such_module:Thing-v0", "cannot import module 'no_such_module'"),
        ("memory_gym:Thing-v0", "unknown environment 'memory_gym:Thing-v0'"),
        ("CartPole-v99", "unknown environment"),
    ],
)
def test_unknown_ids(env_id: str, says: str) -> None:
    with pytest.raises(EnvError, match=says) as caught:
        make_env(env_id)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"lenght": 3}, "unknown reset option 'lenght'. Did you mean 'length'"), ({"length": 0}, "length = 0")],
)
def test_toy_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(EnvError, match=says):
        make_env("ppo_tbptt/Truncate-v0", options=options)
    with pytest.raises(ValueError, match=r"option|must"):
        ToyEnv.process_reset_params(options)


def test_gymnasiums_own_environments_and_modules(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = make_env("CartPole-v1")
    assert env.spec.max_episode_steps == 500 and env.spec.obs["obs"].shape == (4,)
    (tmp_path / "their_module.py").write_text(
        "import gymnasium\ngymnasium.register('Theirs-v0', 'fixture_envs:Tracer')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    env = make_env("their_module:Theirs-v0")
    assert env.reset(3)["obs"].tolist() == vector(3, 0, 0).tolist() and env.spec.env_id == "their_module:Theirs-v0"


def test_missing_memory_gym_is_explained() -> None:
    code = (
        "import sys; sys.modules['memory_gym'] = None\n"
        "from ppo_tbptt.envs import make_env, EnvError\n"
        "try: make_env('MortarMayhem-v0')\n"
        "except EnvError as error: print(error)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install --no-deps memory-gym==1.0.2" in out and out.count("\n") == 1


@pytest.mark.parametrize("env_id", TOY_IDS)
def test_toys_pass_gymnasiums_checks(env_id: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(WARN|seed)")
        check_env(gym.make(env_id).unwrapped, skip_render_check=True)
