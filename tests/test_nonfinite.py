"""NaN and infinity in an update: it is skipped and counted, the weights stay, and in the end the run stops."""

from typing import Any

import pytest
import torch
from helpers import poison, small_agent, update_once

from ppo_tbptt.config import PPOConfig
from ppo_tbptt.ppo.learner import Learner, NonFiniteError


def learner(poisoned: set[int], **options: Any) -> Learner:
    """One whose k-th losses, k in ``poisoned``, are NaN with NaN gradients."""
    config = PPOConfig(rollout_steps=23, num_epochs=2, num_minibatches=3, sequence_length=8)
    return Learner(
        small_agent(),
        config,
        total_steps=1000,
        generator=torch.Generator(),
        auxiliary=[poison(lambda k: k in poisoned)],
        **options,
    )


def weights(learner: Learner) -> list[torch.Tensor]:
    return [p.detach().clone() for p in learner.agent.parameters()]


def test_a_poisoned_update_changes_nothing_and_is_counted() -> None:
    other = learner({2})
    stats = update_once(other)
    assert (stats.num_updates, stats.num_nonfinite) == (6, 1)
    moments = [x for state in other.optimizer.state.values() for x in state.values()]
    assert all(x.isfinite().all() for x in [*weights(other), *moments])
    assert {"loss/total", "policy/approx_kl", "optim/grad_norm"} <= stats.scalars.keys()
    assert all(value == value for value in stats.scalars.values())
    assert stats.scalars["poison/one"] == 1, "the means are over the others"
    assert {int(state["step"]) for state in other.optimizer.state.values()} == {5}


def test_all_poisoned_leaves_the_weights_bit_for_bit_and_reports_no_losses() -> None:
    other = learner(set(range(6)))
    before = weights(other)
    stats = update_once(other)
    assert stats.num_nonfinite == 6
    assert all(torch.equal(x, y) for x, y in zip(before, weights(other), strict=True))
    plain = update_once(learner(set())).scalars.keys() - {"optim/grad_norm"}
    assert stats.scalars.keys() == {tag for tag in plain if tag.startswith(("optim/", "sequences/"))}
    assert all(value == value for value in stats.scalars.values())


def test_too_many_in_a_row_are_the_end_over_iterations_too() -> None:
    other = learner({4, 5, 6, 7}, max_nonfinite=4)
    update_once(other)
    with pytest.raises(NonFiniteError, match="in 4 updates in a row") as caught:
        update_once(other)
    assert caught.value.minibatch is not None
    assert len(caught.value.minibatch.action) > 0
    update_once(learner({0, 1, 2, 4, 5}, max_nonfinite=4))  # not in a row
    other = learner(set(range(1, 99)))
    update_once(other)
    with pytest.raises(
        NonFiniteError, match=r"^loss or gradient was NaN or infinite in 10 updates in a row; they were"
    ):
        update_once(other)
