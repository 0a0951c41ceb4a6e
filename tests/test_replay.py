"""With unchanged weights the update recomputes what the rollout computed. Everything else stands on this."""

from dataclasses import replace

import pytest
import torch
from helpers import fake_rollout, small_agent, starts, worst_replay
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_tbptt.config import PPOConfig
from ppo_tbptt.models import CORES
from ppo_tbptt.ppo.refresh import recomputed_states
from ppo_tbptt.ppo.sequences import cut

LENGTHS = [1, 3, 16, None]
TOLERANCE = 1e-5  # float32


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("core", CORES)
def test_ratio_is_one(core: str, num_layers: int, length: int | None) -> None:
    agent = small_agent(core, num_layers)
    rollout = fake_rollout(agent, starts())
    ratio, value = worst_replay(agent, rollout, cut(rollout.start, length))
    assert ratio < TOLERANCE
    assert value < TOLERANCE


@given(
    st.integers(1, 20),
    st.integers(1, 4),
    st.sampled_from([*((length, None, 0) for length in LENGTHS), (3, 1, 0), (5, 2, 3), (None, 4, 0), (2, 2, 9)]),
    st.data(),
)
def test_any_start_pattern_and_any_minibatch(
    steps: int, envs: int, cutting: tuple[int | None, int | None, int], data: st.DataObject
) -> None:
    bits = data.draw(st.lists(st.booleans(), min_size=steps * envs, max_size=steps * envs))
    agent = small_agent("lstm", 2)
    rollout = fake_rollout(agent, torch.tensor(bits).view(steps, envs))
    sequences = cut(rollout.start, *cutting)
    ids = data.draw(st.permutations(range(sequences.mask.shape[1])))
    ids = torch.tensor(ids[: data.draw(st.integers(1, len(ids)))])
    assert max(worst_replay(agent, rollout, sequences, ids)) < TOLERANCE


WIDE = small_agent()
WIDE.core.wide_state = True


@settings(max_examples=40)
@given(
    st.sampled_from([*((length, None, 0) for length in (None, 1, 4)), (None, 3, 0), (6, 4, 0), (6, 2, 0)])
    | st.sampled_from([(4, None, 3), (4, 2, 6), (6, 3, 3), (3, None, 6)]),
    st.integers(7, 14) | st.integers(1, 14),
    st.sampled_from([0.0, 0.1, 0.4]),
    st.integers(0, 99),
)
def test_where_states_are_wide_those_that_sequences_can_begin_with_are_kept_and_no_others(
    cutting: tuple[int | None, int | None, int], steps: int, share: float, seed: int
) -> None:
    (length, stride, burn_in), envs = cutting, 3
    start = torch.rand(steps, envs, generator=torch.Generator().manual_seed(seed)) < share
    ppo = PPOConfig(sequence_length=length, sequence_stride=stride, burn_in=burn_in, rollout_steps=steps)
    spacing = ppo.state_spacing
    rollout = fake_rollout(WIDE, start, state_spacing=spacing)
    every = fake_rollout(WIDE, rollout.start)
    assert len(rollout.state.rows) <= (steps if spacing == 1 else 3 + (steps - 1) // spacing)
    kept = ~rollout.state[:].isnan().all(2)
    assert torch.equal(rollout.state.kept().flatten(0, -2), every.state[kept])
    since = torch.zeros(envs, dtype=torch.int64)
    for t in range(steps):
        since = torch.where(rollout.start[t], 0, since + 1) if t else since
        assert torch.equal(kept[t], since % spacing == 0)
    overlapping = cut(rollout.start, length, stride, burn_in)
    for sequences in (overlapping, overlapping.burn_in, cut(rollout.start, length)):
        if sequences is not None and len(sequences.index):
            first = sequences.index[0][sequences.lengths > 0]
            assert torch.equal(rollout.state.at(first), every.state.at(first))
    computed = replace(rollout, state=recomputed_states(WIDE, rollout)).state
    torch.testing.assert_close(computed[:], rollout.state[:], equal_nan=True)


def test_carried_state_matters() -> None:
    """The rollouts of these tests begin with a state that is not zero; forgetting it would be seen."""
    agent = small_agent()
    rollout = fake_rollout(agent, torch.zeros(6, 4, dtype=torch.bool))
    sequences = cut(rollout.start, None)
    forgotten = replace(rollout, state=replace(rollout.state, rows=torch.zeros_like(rollout.state.rows)))
    assert max(worst_replay(agent, rollout, sequences)) < TOLERANCE
    assert max(worst_replay(agent, forgotten, sequences)) > 1e-2


def test_burn_in_feeds_the_state_that_it_ends_with() -> None:
    """Stored states within an episode are wrong here; the one at its beginning is right, and warms the others."""
    agent = small_agent()
    rollout = fake_rollout(agent, torch.zeros(6, 4, dtype=torch.bool))
    rollout.state.rows[1:] = 0
    assert max(worst_replay(agent, rollout, cut(rollout.start, 2, burn_in=6))) < TOLERANCE
    assert max(worst_replay(agent, rollout, cut(rollout.start, 2, burn_in=1))) > 1e-2


def test_mutant_state_stored_after_the_step_is_caught() -> None:
    agent = small_agent()
    rollout = fake_rollout(agent, starts(), store="after")
    assert max(worst_replay(agent, rollout, cut(rollout.start, 3))) > 1e-2
