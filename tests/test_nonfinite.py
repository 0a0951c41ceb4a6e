"""NaN and infinity in an update: it is skipped and counted, the weights stay, and in the end the run stops."""

from collections.abc import Iterator

import pytest
import torch
from helpers import fake_rollout, fake_targets, poison, small_agent

from ppo_tbptt.config import PPOConfig
from ppo_tbptt.ppo.learner import Learner, NonFiniteError, UpdateStats
from ppo_tbptt.runtime.timing import Timer


def learner(poisoned: set[int], max_nonfinite: int = 10) -> Learner:
    """One whose k-th losses, k in ``poisoned``, are NaN with NaN gradients."""
    config = PPOConfig(rollout_steps=23, num_epochs=2, num_minibatches=3, sequence_length=8)
    return Learner(
        small_agent(),
        config,
        total_steps=1000,
        generator=torch.Generator(),
        max_nonfinite=max_nonfinite,
        auxiliary=[poison(lambda k: k in poisoned)],
    )


def update(learner: Learner) -> UpdateStats:
    start = torch.rand(23, 4, generator=torch.Generator().manual_seed(3)) < 0.15
    rollout = fake_rollout(small_agent(), start)
    return learner.update(rollout, fake_targets(rollout), 0, Timer())


def weights(learner: Learner) -> list[torch.Tensor]:
    return [p.detach().clone() for p in learner.agent.parameters()]


def numbers(learner: Learner) -> Iterator[torch.Tensor]:
    for state in learner.optimizer.state.values():
        yield from state.values()


def test_a_poisoned_update_changes_nothing_and_is_counted() -> None:
    other = learner({2})
    stats = update(other)
    assert (stats.num_updates, stats.num_nonfinite) == (6, 1)
    assert all(x.isfinite().all() for x in [*weights(other), *numbers(other)])
    assert {"loss/total", "policy/approx_kl", "optim/grad_norm"} <= stats.scalars.keys()
    assert all(value == value for value in stats.scalars.values()), "the means are over the others"
    assert {int(state["step"]) for state in other.optimizer.state.values()} == {5}


def test_all_poisoned_leaves_the_weights_bit_for_bit_and_reports_no_losses() -> None:
    other = learner(set(range(6)))
    before = weights(other)
    stats = update(other)
    assert stats.num_nonfinite == 6
    assert all(torch.equal(x, y) for x, y in zip(before, weights(other), strict=True))
    plain = update(learner(set())).scalars.keys()
    assert stats.scalars.keys() == {tag for tag in plain if tag.startswith(("optim/", "sequences/"))} - {
        "optim/grad_norm"
    }
    assert all(value == value for value in stats.scalars.values())


def test_too_many_in_a_row_are_the_end_over_iterations_too() -> None:
    other = learner({4, 5, 6, 7}, max_nonfinite=4)
    update(other)
    with pytest.raises(NonFiniteError, match="in 4 updates in a row") as caught:
        update(other)
    assert caught.value.minibatch is not None
    assert len(caught.value.minibatch.action) > 0
    update(learner({3, 4, 6, 7}, max_nonfinite=4))  # not in a row
