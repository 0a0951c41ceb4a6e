"""With unchanged weights the update recomputes what the rollout computed. Everything else stands on this."""

from dataclasses import replace

import pytest
import torch
from helpers import fake_rollout, small_agent, starts, worst_replay
from hypothesis import given
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


@given(st.data())
def test_states_that_are_kept_where_sequences_can_begin_are_all_that_is_needed(data: st.DataObject) -> None:
    """Of a core with a wide state: others would be NaN. As many rows are allocated as there can be such steps."""
    steps, envs = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 3))
    bits = data.draw(st.lists(st.booleans(), min_size=steps * envs, max_size=steps * envs))
    length = data.draw(st.none() | st.integers(1, steps))
    stride = data.draw(st.none() | st.integers(1, length or steps))
    burn_in = data.draw(st.integers(0, 5)) if length else 0
    config = PPOConfig(rollout_steps=steps, sequence_length=length, sequence_stride=stride, burn_in=burn_in)
    agent = small_agent("retention")
    rollout = fake_rollout(agent, torch.tensor(bits).view(steps, envs), state_spacing=config.state_spacing)
    assert len(rollout.state.rows) == steps or len(rollout.state.rows) <= 3 + (steps - 1) // config.state_spacing
    every = fake_rollout(agent, rollout.start)
    for agents_own in (False, True):
        if agents_own:  # states computed anew are kept where the stored ones are
            rollout = replace(rollout, state=recomputed_states(agent, rollout))
        for sequences in (cut(rollout.start, length, stride, burn_in), cut(rollout.start, length)):
            assert max(worst_replay(agent, rollout, sequences)) < TOLERANCE
            first = sequences.index[0]
            torch.testing.assert_close(rollout.state.at(first), every.state.at(first))
    kept = ~rollout.state[:].isnan().all(2)
    torch.testing.assert_close(rollout.state.kept(), every.state[kept])


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
