"""The PPO loss by hand."""

import math

import pytest
import torch
from torch import Tensor

from ppo_tbptt.ppo.losses import normalize, ppo_loss
from ppo_tbptt.types import LossStats


def loss(**changes: object) -> LossStats:
    arguments: dict[str, object] = {
        "log_prob": torch.tensor([[math.log(1.5)], [math.log(0.5)], [math.log(1.1)], [0.0]]),
        "entropy": torch.tensor([1.0, 2.0, 3.0, 2.0]),
        "value": torch.tensor([1.0, 0.0, 0.0, 0.0]),
        "old_log_prob": torch.zeros(4, 1),
        "old_value": torch.tensor([0.0, 0.0, 0.0, 0.0]),
        "advantage": torch.tensor([1.0, -1.0, 2.0, 0.0]),
        "ret": torch.tensor([2.0, 1.0, 0.0, 0.0]),
        "clip_range": 0.2,
        "value_coef": 0.5,
        "entropy_coef": 0.1,
        "ratio": "joint",
        "clip_value_loss": True,
    }
    return ppo_loss(**{**arguments, **changes})  # type: ignore[arg-type]


def test_by_hand() -> None:
    stats = loss()
    # ratios 1.5 0.5 1.1 1: min(1.5, 1.2) = 1.2; min(-0.5, -0.8) = -0.8; 2.2; 0
    assert float(stats.policy_loss) == pytest.approx(-(1.2 - 0.8 + 2.2) / 4)
    # value moved by 1, clipped to 0.2: max((1 - 2)^2, (0.2 - 2)^2) = 3.24; then 1, 0, 0
    assert float(stats.value_loss) == pytest.approx((3.24 + 1) / 4)
    assert float(stats.entropy) == pytest.approx(2.0)
    assert float(stats.loss) == pytest.approx(-0.65 + 0.5 * 1.06 - 0.1 * 2.0)
    assert float(stats.clip_fraction) == pytest.approx(0.5)
    ratios = [1.5, 0.5, 1.1, 1.0]
    assert float(stats.approx_kl) == pytest.approx(sum(r - 1 - math.log(r) for r in ratios) / 4, rel=1e-5)


def test_value_loss_without_clipping() -> None:
    assert float(loss(clip_value_loss=False).value_loss) == pytest.approx(0.5)


def test_joint_and_per_branch_ratio() -> None:
    """Two branches with ratios 1.5 and 0.8: jointly 1.2, which is not clipped; apart 1.2 (clipped) and 0.8."""
    two = {
        "log_prob": torch.tensor([[math.log(1.5), math.log(0.8)]] * 4),
        "old_log_prob": torch.zeros(4, 2),
        "advantage": torch.ones(4),
        "clip_range": 0.25,
    }
    assert float(loss(**two, ratio="joint").policy_loss) == pytest.approx(-1.2)
    assert float(loss(**two, ratio="per_branch").policy_loss) == pytest.approx(-(1.25 + 0.8) / 2)
    assert float(loss(**two, ratio="joint").clip_fraction) == 0.0
    assert float(loss(**two, ratio="per_branch").clip_fraction) == 0.5


def gradient(log_prob: Tensor, **changes: object) -> Tensor:
    log_prob = log_prob.clone().requires_grad_()
    stats = loss(log_prob=log_prob, value_coef=0.0, entropy_coef=0.0, **changes)
    return torch.autograd.grad(stats.loss, log_prob)[0]


def test_at_ratio_one_it_is_the_policy_gradient() -> None:
    advantage = torch.tensor([1.0, -1.0, 2.0, 0.5])
    torch.testing.assert_close(gradient(torch.zeros(4, 1), advantage=advantage)[:, 0], -advantage / 4)


def test_no_gradient_beyond_the_clip() -> None:
    """Ratios 1.5 and 0.5: no gradient where the advantage asks to go further, all of it where it asks to come back."""
    log_prob = torch.tensor([[math.log(1.5)], [math.log(0.5)], [math.log(1.5)], [math.log(0.5)]])
    result = gradient(log_prob, advantage=torch.tensor([1.0, -1.0, -1.0, 1.0]))[:, 0]
    torch.testing.assert_close(result, torch.tensor([0.0, 0.0, 1.5 / 4, -0.5 / 4]))


def test_only_loss_carries_a_gradient() -> None:
    stats = loss(value=torch.zeros(4, requires_grad=True))
    assert stats.loss.requires_grad
    assert not any(getattr(stats, name).requires_grad for name in ("policy_loss", "value_loss", "entropy", "approx_kl"))


def test_normalize() -> None:
    result = normalize(torch.tensor([1.0, 2.0, 6.0]))
    assert float(result.mean()) == pytest.approx(0, abs=1e-6)
    assert float(result.square().mean()) == pytest.approx(1, rel=1e-5)
    assert normalize(torch.tensor([3.0])).tolist() == [0.0]
