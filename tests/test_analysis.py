"""What is read from a run's folder, how runs are grouped, and the figures of a group."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path

import gymnasium as gym
import pytest
from configs_for_tests import tiny
from runs_for_tests import add_evaluation, make_run

from ppo_tbptt.analysis.figures import average
from ppo_tbptt.analysis.groups import Group, by_task, differences, goal, group_runs, reach, task_titles
from ppo_tbptt.analysis.published import AGENTS, published_curves
from ppo_tbptt.analysis.runs import Run, read_run
from ppo_tbptt.config import Config, EnvConfig
from ppo_tbptt.envs.memory_gym import import_memory_gym
from ppo_tbptt.run.files import JsonError
from ppo_tbptt.run.folder import RunDirError
from ppo_tbptt.run.metrics import MetricsError

ROOT = Path(__file__).parent.parent


def test_a_run_is_read(tmp_path: Path) -> None:
    """Iterations of 36 s, and evaluations of as long: hours count both, up to the evaluation itself."""
    run = read_run(make_run(tmp_path / "run", {10: 0.2, 20: 0.9, 30: 0.8}))
    assert (run.headline, run.headline_max) == ("success", 1.0)
    assert [(p.env_steps, p.mean) for p in run.held_out] == [(1000, 0.2), (2000, 0.9), (3000, 0.8)]
    assert [p.hours for p in run.held_out] == pytest.approx([0.11, 0.22, 0.33])
    assert (run.env_steps, run.steps_per_second) == (3000, 50)
    assert run.hours == pytest.approx(0.33)
    assert run.best == run.held_out[1]
    assert run.last == run.held_out[2]


def test_which_evaluations_count(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", {10: 0.2, 20: 0.3})
    add_evaluation(path, "a_published", 2000, 0.5)
    add_evaluation(path, "b_more_episodes", 2000, 0.6, repeats=100)
    add_evaluation(path, "c_few", 1000, 0.7, seeds=[200_000], repeats=9)
    add_evaluation(path, "d_greedy", 300, 0.9, greedy=True)
    add_evaluation(path, "e_forgetful", 400, 0.0, forget_every=1)
    add_evaluation(path, "f_seen_in_training", 500, 1.0, seeds=list(range(50)))
    add_evaluation(path, "g_not_of_this_run", 2050, 1.0)
    run = read_run(path)
    # The rows of training are of 8 episodes each, so even the few of one file are more.
    assert [(p.env_steps, p.mean) for p in run.held_out] == [(1000, 0.7), (2000, 0.5)]
    assert run.held_out[1].ci95 == pytest.approx((0.4, 0.6))


def test_greedy_results_where_there_are_no_others(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", {2: 0.1}, tiny(train={"eval_greedy": True}))
    add_evaluation(path, "greedy", 100, 0.9, greedy=True)
    assert [p.mean for p in read_run(path).held_out] == [0.9, 0.1]


BROKEN = {
    "no run": (None, "", "no such run folder"),
    "no metrics": ("metrics.jsonl", None, "no such metrics file"),
    "empty metrics": ("metrics.jsonl", "", "no metrics yet"),
    "text for a number": ("metrics.jsonl", '{"iteration": 1, "env_steps": "many"}\n{}\n', "env_steps is missing"),
    "evaluation of nothing": ("evaluations/a.json", "", "not valid JSON"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named(case: str, tmp_path: Path) -> None:
    name, text, reason = BROKEN[case]
    path = tmp_path / "run"
    if name is not None:
        add_evaluation(make_run(path, {1: 0.5}), "a", 100, 0.5)
        (path / name).unlink()
        if text is not None:
            (path / name).write_text(text)
    with pytest.raises((RunDirError, MetricsError, JsonError), match=reason) as caught:
        read_run(path)
    assert str(path / (name or "")) in str(caught.value)
    assert "\n" not in str(caught.value)


def groups_of(folder: Path, configs: Mapping[str, Config]) -> list[Group]:
    """Of runs with these names and configs."""
    return group_runs([read_run(make_run(folder / name, {2: 0.5}, config)) for name, config in configs.items()])


def test_groups(tmp_path: Path) -> None:
    """Seed and where it ran don't matter; the core does; a schedule is one setting."""
    other = tiny(core={"kind": "lstm"}, ppo={"learning_rate": {"initial": 1e-3, "final": 0.0}})
    third = tiny(seed=2, env={"num_workers": 3}, device="cuda")
    groups = groups_of(tmp_path, {"gru_1": tiny(seed=1), "lstm": other, "gru_2": third})
    assert [(g.letter, g.name, len(g.runs)) for g in groups] == [("A", "gru_*", 2), ("B", "lstm", 1)]
    assert differences(groups) == {
        "core.kind": {"A": "gru", "B": "lstm"},
        "ppo.learning_rate": {"A": 1e-3, "B": {"initial": 1e-3, "final": 0.0, "power": 1.0}},
    }
    assert by_task(groups) == [groups]


def test_more_ranks_are_another_setting(tmp_path: Path) -> None:
    """The config is that of one rank, so it does not tell; steps per iteration do."""
    runs = []
    for ranks in (1, 2):
        path = make_run(tmp_path / f"on_{ranks}", {2: 0.5})
        (path / "metrics.jsonl").write_text(json.dumps({"iteration": 3, "env_steps": 3 * 64 * ranks}) + "\n")
        runs.append(read_run(path))
    groups = group_runs(runs)
    assert differences(groups) == {"ranks": {"A": 1, "B": 2}}


def test_other_options_are_another_task(tmp_path: Path) -> None:
    shown = tiny(env={"options": {"num_show_steps": 2}})
    tasks = by_task(groups_of(tmp_path, {"a": tiny(), "b": shown}))
    assert [[group.name for group in groups] for groups in tasks] == [["a"], ["b"]]
    assert task_titles(tasks) == ["ppo_tbptt/PocMemory-v0", "ppo_tbptt/PocMemory-v0: num_show_steps = 2"]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    assert groups_of(tmp_path / "z", {"run": tiny()})[0].name == "run"
    assert groups_of(tmp_path, {"x/run": tiny(seed=0), "y/run": tiny(seed=1)})[0].name == "x/run, ..."


def runs_of(folder: Path, *held_out: Mapping[int, float]) -> list[Run]:
    """Runs of one config with these results."""
    return [read_run(make_run(folder / f"run{i}", curve, tiny(seed=i))) for i, curve in enumerate(held_out)]


def test_steps_and_hours_to_a_threshold(tmp_path: Path) -> None:
    curves = [{10: 0.4, 20: 0.6, 30: 0.9}, {10: 0.5, 20: 0.8, 40: 0.95}, {10: 0.0, 30: 0.2}]
    (group,) = group_runs(runs_of(tmp_path, *curves))
    assert goal([group]) == 1
    half = reach(group, 0.5, 1.0)
    assert (half.env_steps, half.runs) == (2000, 2)  # of 2000, 1000 and never
    assert half.hours == pytest.approx(0.22)
    most = reach(group, 0.9, 1.0)
    assert (most.env_steps, most.runs) == (4000, 2)
    never = reach(group, 0.95, 1.0)
    assert (never.env_steps, never.runs, never.at_the_latest) == (None, 1, False)  # one of three is no median
    assert reach(group, 0.0, 1.0).at_the_latest, "passed by the first result: who knows when"


def test_without_a_maximum_the_best_value_is_the_goal(tmp_path: Path) -> None:
    config = tiny(env={"id": "ppo_tbptt/ProbeDiscount-v0"})
    run = make_run(tmp_path / "run", {2: 0.5}, config)
    rows = [{"iteration": i, "env_steps": 100 * i, "eval/return": 10.0 * i} for i in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    groups = group_runs([read_run(run)])
    assert groups[0].runs[0].headline_max is None
    assert goal(groups) == 30
    assert reach(groups[0], 0.5, 30.0).env_steps == 200


def test_one_run_keeps_its_interval_over_levels_and_several_get_one_over_runs(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, *({2: value} for value in (0.1, 0.5, 0.6, 0.7, 1.0)))
    one = group_runs(runs[:1])[0].last
    assert one is not None and (one.ci95, one.iqm) == (None, None)
    all_of_them = group_runs(runs)[0].last
    assert all_of_them is not None and all_of_them.iqm is not None
    assert all_of_them.mean == pytest.approx(0.58)
    low, high = all_of_them.iqm.ci95 or (1.0, 0.0)
    assert 0.1 < low < all_of_them.iqm.mean < high < 1.0
    assert all_of_them.iqm.mean == pytest.approx(0.6)  # without the least and the greatest of five


def test_a_groups_curve_goes_as_far_as_all_its_runs(tmp_path: Path) -> None:
    """The second is evaluated at other steps: it is interpolated, and nothing is made up beyond its last."""
    runs = runs_of(tmp_path, {10: 0.0, 20: 0.4, 30: 0.8}, {10: 0.2, 30: 0.6}, {20: 0.5, 25: 0.5})
    curve = average([run.held_out for run in runs[:2]])
    assert curve is not None
    assert curve.env_steps.tolist() == [1000, 2000, 3000]
    assert curve.mean == pytest.approx([0.1, 0.4, 0.7])
    assert curve.low == pytest.approx([0.0, 0.4, 0.6])
    curve = average([run.held_out for run in runs])
    assert curve is not None and curve.env_steps.tolist() == [2000, 2500]


OF_OTHER_TASKS = {"quickstart", "mortar_mayhem_grid_short", "mortar_mayhem_b"}


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs").glob("*.toml")))
def test_shipped_tasks_have_their_published_curves(name: str) -> None:
    curves = published_curves(Config.load(ROOT / "configs" / f"{name}.toml").env)
    assert all(curve.agent in AGENTS and len(curve.means) > 20 for curve in curves)
    assert all(list(curve.env_steps) == sorted(set(curve.env_steps)) for curve in curves)
    published = name not in OF_OTHER_TASKS and not name.startswith("toy_")
    assert [curve.agent for curve in curves][:1] in ([["gru"], ["gru_rec"]] if published else [[]])


def test_published_figures() -> None:
    """Known values, and the two settings of one environment are not mixed up."""

    def last(**options: bool) -> float:
        return published_curves(EnvConfig(id="MysteryPath-Grid-v0", options=options))[0].means[-1]

    assert last() == pytest.approx(0.685, abs=1e-3)
    assert last(show_origin=True, show_goal=True) == 1
    grid = EnvConfig(id="MortarMayhem-Grid-v0")  # the environment's defaults are the published setting
    assert published_curves(grid)[0].means[-1] == 1
    assert published_curves(EnvConfig(id="MortarMayhem-Grid-v0", options={"arena_size": 6})) == []
    assert published_curves(EnvConfig(id="MortarMayhem-Grid-v0", max_episode_steps=50)) == []
    assert published_curves(EnvConfig(id="MortarMayhem-Grid-v0", options={"of_a_newer_version": 1})) == []
    assert published_curves(EnvConfig(id="MysteryPath-Grid-v0", options={"show_goal": True})) == []


def test_the_published_defaults_are_the_environments() -> None:
    """What a run leaves to the environment is known without it, from the data file: it must say the same."""
    import_memory_gym()
    for task in tomllib.loads((ROOT / "ppo_tbptt" / "analysis" / "published_tasks.toml").read_text())["task"]:
        entry_point = gym.spec(task["env_id"]).entry_point
        assert isinstance(entry_point, str)
        defaults = gym.envs.registration.load_env_creator(entry_point).default_reset_parameters  # type: ignore[attr-defined]
        assert {**task["options"], **task["defaults"]} == defaults, task["name"]
