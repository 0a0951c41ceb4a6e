"""With unchanged weights the update recomputes what the rollout computed. Everything else stands on this."""

from dataclasses import replace

import pytest
import torch
from helpers import fake_rollout, fake_targets, small_agent, worst_replay
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ppo_tbptt.models import CORES
from ppo_tbptt.ppo.sequences import cut, gather
from ppo_tbptt.types import Sequences

LENGTHS = [1, 3, 16, None]
TOLERANCE = 1e-5  # float32


def some_starts(steps: int = 37, envs: int = 4) -> Tensor:
    return torch.rand(steps, envs, generator=torch.Generator().manual_seed(3)) < 0.15


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("core", CORES)
def test_ratio_is_one(core: str, num_layers: int, length: int | None) -> None:
    agent = small_agent(core, num_layers)
    rollout = fake_rollout(agent, some_starts())
    ratio, value = worst_replay(agent, rollout, cut(rollout.start, length))
    assert ratio < TOLERANCE
    assert value < TOLERANCE


@given(st.integers(1, 20), st.integers(1, 4), st.sampled_from(LENGTHS), st.data())
def test_any_start_pattern_and_any_minibatch(steps: int, envs: int, length: int | None, data: st.DataObject) -> None:
    bits = data.draw(st.lists(st.booleans(), min_size=steps * envs, max_size=steps * envs))
    agent = small_agent("lstm", 2)
    rollout = fake_rollout(agent, torch.tensor(bits).view(steps, envs))
    sequences = cut(rollout.start, length)
    ids = data.draw(st.permutations(range(sequences.mask.shape[1])))
    ids = torch.tensor(ids[: data.draw(st.integers(1, len(ids)))])
    assert max(worst_replay(agent, rollout, sequences, ids)) < TOLERANCE


def test_carried_state_matters() -> None:
    """The rollouts of these tests begin with a state that is not zero; forgetting it would be seen."""
    agent = small_agent()
    rollout = fake_rollout(agent, torch.zeros(6, 4, dtype=torch.bool))
    sequences = cut(rollout.start, None)
    forgotten = replace(rollout, state=torch.zeros_like(rollout.state))
    assert max(worst_replay(agent, rollout, sequences)) < TOLERANCE
    assert max(worst_replay(agent, forgotten, sequences)) > 1e-2


def test_mutant_state_stored_after_the_step_is_caught() -> None:
    agent = small_agent()
    rollout = fake_rollout(agent, some_starts(), store="after")
    assert max(worst_replay(agent, rollout, cut(rollout.start, 3))) > 1e-2


def test_mutant_reshape_without_swapping_axes_is_caught() -> None:
    """[T, N] flattened and chunked as it lies in memory: each "sequence" then jumps between environments."""
    agent = small_agent()
    rollout = fake_rollout(agent, torch.zeros(12, 4, dtype=torch.bool))
    index = torch.arange(48).view(16, 3).T.contiguous()
    mutant = Sequences(index=index, mask=torch.ones_like(index, dtype=torch.bool))
    assert max(worst_replay(agent, rollout, mutant)) > 1e-2


def test_garbage_in_padding_changes_nothing() -> None:
    """Padding points at step 0 of environment 0; whatever lies there must not leak into other sequences."""
    agent = small_agent("gru", 2)
    rollout = fake_rollout(agent, some_starts())
    sequences = cut(rollout.start, 16)
    ids = torch.arange(1, sequences.mask.shape[1])  # all but the sequence that holds step 0 of environment 0
    before = gather(rollout, fake_targets(rollout), sequences, ids)
    with torch.no_grad():
        expected = agent.unroll(before.obs, before.state, before.sequences_per_step)
    rollout.obs["obs"][0, 0] = 1e6
    rollout.state[0, 0] = 1e6
    garbage = Sequences(index=torch.where(sequences.mask, sequences.index, 0), mask=sequences.mask)
    assert (~sequences.mask[:, ids]).any()
    after = gather(rollout, fake_targets(rollout), garbage, ids)
    with torch.no_grad():
        output = agent.unroll(after.obs, after.state, after.sequences_per_step)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.value, expected.value)
