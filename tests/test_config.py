"""Config: what is accepted, what is refused and how it is said, and the objects themselves."""

import tomllib
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
from configs_for_tests import BASE, MINIMAL, base, error_of, write
from gymnasium.envs.registration import load_env_creator

from ppo_tbptt.config import (
    Config,
    CoreConfig,
    EnvConfig,
    PPOConfig,
    Schedule,
    TrainConfig,
    UserCoreConfig,
    describe_fields,
)
from ppo_tbptt.config.resume import continued
from ppo_tbptt.training.trainer import Trainer

CONFIGS = Path(__file__).parents[1] / "configs"
TASKS = {
    **dict.fromkeys(["mortar_mayhem_grid", "mortar_mayhem_b_grid"], 163_840_000),
    **dict.fromkeys(["mystery_path_grid", "mystery_path_grid_shown"], 163_840_000),
    **dict.fromkeys(["mortar_mayhem", "mortar_mayhem_b"], 491_520_000),
    **dict.fromkeys(["mystery_path", "searing_spotlights"], 409_600_000),
    **dict.fromkeys(["endless_mortar_mayhem", "endless_mystery_path", "endless_searing_spotlights"], 819_200_000),
}


# Shipped files


@pytest.mark.parametrize("name", TASKS)
def test_task_configs_hold_the_published_settings(name: str) -> None:
    config = Config.load(CONFIGS / f"{name}.toml")
    assert config.total_steps == TASKS[name]
    assert (config.batch_size, config.updates_per_iteration) == (32 * 512, 24)
    assert config.num_iterations * config.batch_size == config.total_steps
    # The grids end with their schedules; longer runs stay at the final value from there on.
    span = None if "grid" in name else 327_680_000 if name == "searing_spotlights" else 163_840_000
    assert config.ppo.learning_rate == Schedule(initial=2.75e-4, final=1e-5, over_steps=span)
    entropy = 1e-3 if name.startswith("mystery_path") else 1e-4
    assert config.ppo.entropy_coef == Schedule(initial=entropy, final=1e-6, over_steps=span)
    assert config.ppo.clip_range == Schedule(initial=0.1)
    single_branch = "grid" in name or name == "endless_mystery_path"
    assert config.ppo.ratio == ("joint" if single_branch else "per_branch")
    varying = {"learning_rate", "entropy_coef", "ratio"}
    assert config.ppo.model_dump(exclude=varying) == PPOConfig().model_dump(exclude=varying)
    assert config.core == CoreConfig(kind="gru", hidden_size=512)
    assert config.aux.reconstruction_coef == (0.1 if "searing" in name else 0)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.toml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_shipped_config_trains_for_one_tiny_iteration(path: Path) -> None:
    ppo = {"rollout_steps": 4, "num_minibatches": 1, "num_epochs": 1, "sequence_length": 2}
    config = Config.load(path).replace(device="cpu", env={"num_envs": 2, "num_workers": 0}, ppo=ppo)
    with Trainer(config) as trainer:
        report = next(trainer)
    assert (report.env_steps, report.scalars["optim/updates"]) == (8, 1)
    assert report.scalars["policy/approx_kl"] == pytest.approx(0, abs=1e-6)  # the first update replays the rollout


@pytest.mark.parametrize("name", [*TASKS, "quickstart"])
def test_options_exist_in_the_environment(name: str) -> None:
    pytest.importorskip("memory_gym")
    path = CONFIGS / f"{name}.toml"
    config = Config.load(path)
    known = load_env_creator(gym.spec(config.env.id).entry_point).default_reset_parameters  # type: ignore
    assert config.env.options.keys() <= known.keys()
    text = path.read_text().split("[env.options]")[1].split("\n\n")[0]
    for line in filter(None, text.splitlines()):
        option = line.split(" = ")[0]
        assert (config.env.options[option] != known[option]) == ("default:" in line) or name == "quickstart", line


# Refusals: (tree, words that must be in the line: key, value, remedy)

REFUSALS: list[tuple[Any, list[str]]] = [
    (base(ppo={"lerning_rate": 0.1}), ["ppo.lerning_rate: ", "0.1", "ppo.learning_rate?"]),
    (base(learning_rate=1e-4), ["learning_rate: ", "0.0001", "ppo.learning_rate?"]),
    (base(hidden_size=7), ["hidden_size: ", "7", "model.hidden_size or core.hidden_size?"]),
    ({"totl_steps": 3, "env": {"id": "A-v0"}}, ["totl_steps: unknown", "3", "total_steps?"]),  # which is missing, too
    (base(ppo={"qqqq": True}), ["ppo.qqqq: ", "true", "ppo.gamma"]),
    (base(**{"ppo.gamma": 0.5}), ['"ppo.gamma": ', "did you mean ppo.gamma?"]),
    ({"total_steps": 1}, ["env.id: missing", "text"]),
    (base(env={"id": "two words"}), ["env.id: ", '"two words"', "MortarMayhem-Grid-v0"]),
    (base(seed=True), ["seed: true", "a whole number from 0"]),
    (base(ppo={"clip_range": True}), ["ppo.clip_range: true", "a table {initial"]),
    (base(seed={"a": 1}), ["seed: ", "{a = 1}", "a whole number"]),
    (base(ppo={"gamma": float("nan")}), ["ppo.gamma: nan", "a number from 0 to 1"]),
    (base(seed=10**5000), ["seed: <int>", "from 0 to"]),
    (base(env={"num_workers": "many"}), ["env.num_workers: ", '"many"', 'or "auto"']),
    (base(core={"kind": "gur"}), ["core.kind: ", '"gur"', '"gru"']),
    (base(device="tpu"), ["device: ", '"tpu"', '"cuda:N"']),
    (base(model={"cnn_channels": []}), ["model.cnn_channels: []", "a list of at least 1 and at most 16"]),
    (base(model={"cnn_channels": [1, 2]}), ["model.cnn_kernels: [8, 4, 3] for 2 ", "= [1, 2]", "a list of 2"]),
    (base(model={"cnn_strides": [14]}), ["model.cnn_strides: [14] for 3 ", "a list of 3"]),
    (base(ppo={"clip_range": {"initial": 0.1, "finl": 0.2}}), ["ppo.clip_range.finl: ", "ppo.clip_range.final?"]),
    (base(ppo={"clip_range": {"final": 0.1}}), ["ppo.clip_range.initial: missing", "number"]),
    (base(ppo={"clip_range": {"initial": 0.1, "over_steps": 9}}), ["ppo.clip_range.over_steps: 9", "set final"]),
    (base(ppo={"max_grad_norm": 0}), ["ppo.max_grad_norm: 0", "above 0"]),
    (base(ppo={"learning_rate": {"initial": 0.1, "final": 3}}), ["ppo.learning_rate: 3", "from 0 to 1"]),
    (base(ppo={"clip_range": 0}), ["ppo.clip_range: ", "0", "above 0"]),
    (base(core={"dropout": 0.1}), ["core.dropout: ", "0.1", "num_layers at least 2"]),
    (base(core={"kind": "none", "residual": True}), ["core.residual: ", "true", '"none"', "must be false"]),
    (base(core={"kind": "none", "norm": True}), ["core.norm: ", "true", '"none"', "must be false"]),
    (base(core={"forget_bias": 1}), ["core.forget_bias: ", "= 1.0", '"gru"', "must be 0, or the core lstm"]),
    (
        base(core={"kind": "irnn", "chrono_steps": 9}),
        ["core.chrono_steps: ", "= 9", '"irnn"', "must be none, or the core gru"],
    ),
    (base(core={"kind": "lstm", "chrono_steps": 2}), ["core.chrono_steps: 2", "a whole number from 3", "none"]),
    (
        base(core={"kind": "ln_lstm", "chrono_steps": 9, "forget_bias": 1}),
        ["core.chrono_steps: ", "= 9", "forget_bias = 1.0", "one of them must be omitted"],
    ),
    (base(ppo={"sequence_length": 513}), ["ppo.sequence_length: ", "513", "rollout_steps = 512"]),
    (base(ppo={"sequence_length": 8, "sequence_stride": 9}), ["ppo.sequence_stride: ", "9", "sequence_length = 8"]),
    (base(ppo={"sequence_stride": 513}), ["ppo.sequence_stride: ", "513", "rollout_steps = 512", "at most"]),
    (base(ppo={"sequence_length": 36, "sequence_stride": 1}), ["ppo.sequence_stride: ", "= 36 ", "34.8", "above 32"]),
    (
        base(ppo={"sequence_stride": 8}),
        ["ppo.sequence_stride: ", "rollout_steps = 512", "32.5", "larger stride"],
    ),
    (base(ppo={"sequence_length": 4, "burn_in": 200}), ["ppo.burn_in: ", "sequence_stride = 4", "above 32"]),
    (base(ppo={"sequence_length": 512, "burn_in": 513}), ["ppo.burn_in: ", "513", "rollout_steps = 512"]),
    (base(ppo={"burn_in": 5}), ["ppo.burn_in: ", "5 has no effect", "sequence_length set"]),
    (
        base(ppo={"refresh_every": 2}, core={"dropout": 0.1, "num_layers": 2}),
        ["ppo.refresh_every: ", "2", "core.dropout = 0.1", "must be 0"],
    ),
    (base(env={"num_envs": 2}, ppo={"rollout_steps": 2, "num_minibatches": 5}), ["ppo.num_minibatches: ", "4 steps"]),
    (base(env={"first_seed": 2**31 - 5, "num_seeds": 6}), ["env.num_seeds: 6 level seeds from 2147483643"]),
    (base(train={"eval_first_seed": 99_999}), ["train.eval_first_seed: ", "99999..100048", "must not overlap"]),
    (base(env={"options": {"a": float("nan")}}), ["env.options.a: nan", "finite numbers"]),
    (base(env={"options": {"a": [object()]}}), ['env.options.a: "<object>"', "text, finite"]),
    (base(env={"options": {"a": 2**63}}), ["env.options.a: ", "64 bits"]),
    (base(env={"options": {"a": "\ud800"}}), ["env.options.a: ", "text, finite"]),
    (base(**{"a\nb": "c\u2028d"}), ['"a\\nb": ', "must be one of seed"]),
    ({**BASE, 5: 7}, ["5: unknown", "7", "must be one of seed"]),
    (base(core={"kind": "my module:C"}), ["core.kind: ", '"my module:C"', '"my_module:MyCore"']),
    (base(losses={"a b": 1}), ["losses: ", '"a b"', "my_module:my_loss"]),
    (base(losses={"m:f": -1}), ['losses."m:f": -1', "a number from 0"]),
    (
        base(aux={"reconstruction_coef": 0.1}, losses={"reconstruction": 1}),
        ["aux.reconstruction_coef: ", "= 0.1", "losses.reconstruction", "must be 0"],
    ),
    (base(losses=[1]), ["losses: [1]", "a table, each a number"]),
    (5, ["config: 5", "must be a table"]),
]


@pytest.mark.parametrize(("tree", "words"), REFUSALS, ids=[words[0] for _, words in REFUSALS])
def test_refusals_name_source_key_value_and_remedy(tree: Any, words: list[str]) -> None:
    message = error_of(Config.from_dict, tree, source="runs/my.toml")
    assert message.startswith("runs/my.toml: " + words[0]), message
    for word in words:
        assert word in message


def test_combinations_that_look_odd_but_work() -> None:
    Config.from_dict(base(core={"kind": "none"}, ppo={"sequence_length": 512, "ratio": "per_branch"}))
    Config.from_dict(base(ppo={"num_minibatches": 32 * 512, "gamma": 1, "learning_rate": 0}))
    Config.from_dict(base(ppo={"sequence_length": 512, "sequence_stride": 512, "burn_in": 512, "refresh_every": 9}))
    Config.from_dict(base(ppo={"sequence_stride": 9}))
    Config.from_dict(base(core={"kind": "none"}, ppo={"sequence_length": 33, "sequence_stride": 1, "refresh_every": 1}))
    Config.from_dict(base(env={"num_seeds": 200_000}))  # ends right before the held-out seeds
    Config.from_dict(base(train={"eval_first_seed": 2**31 - 50}))
    Config.from_dict(base(device="cuda:3", env={"id": "some.module:name/Space_Env.x-v12"}))
    assert Config.from_dict(base(ppo={"gamma": 1})).ppo.gamma.__class__ is float


def test_nested_too_deeply() -> None:
    tree: Any = {}
    for _ in range(50_000):
        tree = {"a": tree}
    assert "nested at most" in error_of(Config.from_dict, base(env={"options": tree}))


# Cores and losses from other packages


MINE = base(core={"kind": "my_module:MyCore", "width": 3, "net": {"sizes": [1, 2]}}, losses={"my_module:recon": 0.1})


def test_a_core_from_another_package_keeps_its_options() -> None:
    config = Config.from_dict(MINE)
    assert isinstance(config.core, UserCoreConfig)
    assert (config.core.kind, config.core.options) == ("my_module:MyCore", {"width": 3, "net": {"sizes": [1, 2]}})
    assert config.losses == {"my_module:recon": 0.1}
    assert Config.from_dict(tomllib.loads(config.to_toml())) == config


def test_cores_of_one_package_and_another_do_not_share_options() -> None:
    config = Config.from_dict(MINE)
    assert config.replace(core={"kind": "lstm"}).core == CoreConfig(kind="lstm")
    assert config.override({"core.kind": "none"}).core == CoreConfig(kind="none")
    other = config.replace(core={"kind": "other:Core", "width": None}, losses={"my_module:recon": None})
    assert other.to_dict()["core"] == {"kind": "other:Core", "residual": False, "norm": False, "net": {"sizes": [1, 2]}}
    assert other.losses == {}
    core = {"kind": "a:B", "residual": True, "norm": True, "x": 1}
    assert Config.from_dict(BASE).replace(core=core).to_dict()["core"] == core


def test_what_is_fixed_on_resume() -> None:
    saved = Config.from_dict(MINE)
    assert continued(saved, saved.replace(losses={"my_module:recon": 0.2}, env={"num_envs": 3})).env.num_envs == 3
    for key, changes in {
        "core.width": {"core": {"width": 4}},
        "core.depth": {"core": {"depth": 4}},
        "core.kind": {"core": {"kind": "gru"}},
        "model.cnn_channels": {"model": {"cnn_channels": [1, 2, 3]}},
        "env.id": {"env": {"id": "Other-v0"}},
    }.items():
        assert error_of(continued, saved, saved.replace(**changes)).startswith(f"{key}: the run was started with")
    builtin = Config.from_dict(base(core={"num_layers": 2}))
    assert continued(builtin, builtin.replace(core={"dropout": 0.1})).core != builtin.core


# Files


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (MINIMAL + "seed = = 3", ["not valid TOML", "line 3"]),
        (MINIMAL + "seed = 1\nseed = 2\n", ["not valid TOML", "line 4"]),
        (MINIMAL.encode() + b"# \xff", ["not UTF-8 at line 3"]),
        ("a = " + "[" * 100_000, ["nested too deeply"]),
        (MINIMAL + "seed = " + "9" * 5000, ["c.toml: "]),
        ("#" * (2**20 + 1), ["larger than 1,048,576 bytes"]),
        ("", ["total_steps: missing"]),
    ],
    ids=["syntax", "twice", "encoding", "nesting", "digits", "size", "empty"],
)
def test_broken_files(tmp_path: Path, content: str | bytes, words: list[str]) -> None:
    path = write(tmp_path, content)
    message = error_of(Config.load, path)
    assert message.startswith(f"{path}: ")
    for word in words:
        assert word in message


def test_what_is_no_file(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL, "quickstart.toml")
    assert f"did you mean {tmp_path / 'quickstart.toml'}?" in error_of(Config.load, tmp_path / "quikstart.toml")
    assert f"did you mean {tmp_path / 'quickstart.toml'}?" in error_of(Config.load, tmp_path / "quickstart")
    assert error_of(Config.load, tmp_path / "zzz.toml").endswith("no such file; must be a small .toml file")
    assert "no such file" in error_of(Config.load, tmp_path / "none" / "zzz.toml")
    assert "is a folder" in error_of(Config.load, tmp_path)
    assert "not a regular file" in error_of(Config.load, "/dev/null")
    assert "cannot be read" in error_of(Config.load, tmp_path / ("x" * 300))
    assert "no such file" in error_of(Config.load, "a\0b.toml")


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode()
    assert Config.load(write(tmp_path, content)).total_steps == 1000


# Objects


def test_none_stays_where_it_is_not_the_default(tmp_path: Path) -> None:
    config = Config.from_dict(base(train={"checkpoint_minutes": "none"}))
    assert config.train.checkpoint_minutes is None
    assert Config.load(write(tmp_path, config.to_toml())) == config
    assert config.replace(precision="float32").train.checkpoint_minutes is None
    assert config.override({"train.eval_every": "3"}).train.checkpoint_minutes is None
    assert config.override({"train.checkpoint_minutes": "3"}).train.checkpoint_minutes == 3
    assert "sequence_length" not in config.to_toml()


def test_replace_merges_tables_schedules_and_options() -> None:
    config = Config.from_dict(base(env={"options": {"a": 1, "b": 2}}, ppo={"target_kl": 0.1}))
    changed = config.replace(
        seed=2,
        core={"kind": "lstm"},
        ppo={"learning_rate": {"initial": 1e-3}, "clip_range": 0.3, "target_kl": None},
        env={"options": {"b": None, "c": {"d": [3]}}},
        train=TrainConfig(eval_every=7),
    )
    assert (changed.seed, changed.core) == (2, CoreConfig(kind="lstm"))
    assert changed.ppo.learning_rate == Schedule(initial=1e-3, final=1e-5)
    assert (changed.ppo.clip_range, changed.ppo.target_kl) == (Schedule(initial=0.3), None)
    assert changed.env.options == {"a": 1, "c": {"d": [3]}}
    assert changed.train.eval_every == 7
    assert config == Config.from_dict(base(env={"options": {"a": 1, "b": 2}}, ppo={"target_kl": 0.1})), "untouched"
    assert config.replace() == config


def test_replace_is_checked() -> None:
    config = Config.from_dict(BASE)
    assert error_of(config.replace, sed=2).startswith("replace(): sed: ")
    assert error_of(config.replace, core={"dropout": 0.5}).startswith("replace(): core.dropout: ")
    assert error_of(config.replace, env=None).startswith("replace(): env: none")


def test_direct_construction_is_checked_and_frozen() -> None:
    with pytest.raises(ValueError, match="gamma"):
        PPOConfig(gamma=1.5)
    config = Config(total_steps=10, env=EnvConfig(id="A-v0"))
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


def test_options_are_a_copy() -> None:
    options = {"a": [1]}
    config = Config.from_dict(base(env={"options": options}, core={"kind": "m:C", **options}))
    options["a"].append(2)
    config.to_dict()["env"]["options"]["a"].append(3)
    assert isinstance(config.core, UserCoreConfig)
    config.core.options["a"].append(4)
    assert config.env.options == config.core.options == {"a": [1]}


def test_derived_sizes() -> None:
    config = Config.from_dict(base(total_steps=101, env={"num_envs": 5}, ppo={"rollout_steps": 10}))
    assert (config.batch_size, config.num_iterations, config.updates_per_iteration) == (50, 3, 24)
    assert config.replace(total_steps=100).num_iterations == 2


def test_every_field_has_help_type_and_default() -> None:
    rows = {row.key: row for row in describe_fields()}
    assert all(row.help and row.type and row.default for row in rows.values())
    assert rows["ppo.learning_rate"].type == "a number from 0 to 1, or a table {initial, final, power, over_steps}"
    assert rows["env.num_workers"].type == 'a whole number from 0 to 1_024, or "auto"'
    assert rows["losses"].type == "a table, each a number from 0 to 1_000_000"
    assert (rows["ppo.sequence_length"].default, rows["total_steps"].default) == ("none", "required")
    assert rows["core.kind"].help.startswith("The cell")
    assert rows["ppo.learning_rate"].default == "{initial = 0.000275, final = 1e-05, power = 1.0}"
    assert {key.partition(".")[0] for key in rows} == {*Config.model_fields}
