"""What the soak complains of."""

from dataclasses import replace
from pathlib import Path

import pytest
from configs_for_tests import tiny

from ppo_tbptt.benchmark.memory import tree
from ppo_tbptt.benchmark.soak import Sample, problems, soak

STEADY = [
    Sample(minutes=0.1 * k, memory_mb=300, files=20, threads=5, processes=3, steps_per_second=1000)
    for k in range(1, 51)
]


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"iteration": {k}, "env_steps": {k}}}\n' for k in range(1, 6)))
    return path


@pytest.mark.parametrize(
    ("grown", "complaint"),
    [
        ({"memory_mb": 310}, "memory grew from 300.0 to 310.0 MB"),
        ({"files": 21}, "files grew from 20 to 21"),
        ({"steps_per_second": 900}, "steps per second fell from 1,000 to 900"),
    ],
)
def test_what_grows_or_slows_down(grown: dict[str, float], complaint: str, metrics: Path) -> None:
    assert problems(STEADY, metrics) == []
    (found,) = problems([*STEADY[:-11], *(replace(s, **grown) for s in STEADY[-11:])], metrics)
    assert complaint in found
    assert problems([*(replace(s, **grown) for s in STEADY[:3]), *STEADY[3:]], metrics) == [], "while it warms up"


def test_metrics_with_a_hole(metrics: Path) -> None:
    metrics.write_text(metrics.read_text().replace('{"iteration": 3, "env_steps": 3}\n', ""))
    (found,) = problems(STEADY, metrics)
    assert "each of 4 iterations" in found


def test_it_looks_at_a_training_and_its_workers(tmp_path: Path) -> None:
    config = tiny(total_steps=10**9, env={"num_workers": 2})
    others = len(tree()) - 1  # of other tests
    samples = list(soak(config, tmp_path / "run", minutes=0.02, seconds_between=0.3))
    assert len(samples) >= 2
    assert {sample.processes - others for sample in samples} == {3}
    assert all(sample.memory_mb > 50 and sample.steps_per_second > 0 for sample in samples)
    with pytest.raises(RuntimeError, match="was over"):
        list(soak(tiny(total_steps=64), tmp_path / "short", minutes=10, seconds_between=1))
