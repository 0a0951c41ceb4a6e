"""Policy and value heads, and the categorical distribution over A independent action branches."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ppo_tbptt.models.encoders import orthogonal_


class Heads(nn.Module):
    """One shared hidden layer, one hidden layer each for policy and value, one linear head per action branch."""

    def __init__(self, input_size: int, hidden_size: int, action_nvec: tuple[int, ...]) -> None:
        super().__init__()
        self.hidden = orthogonal_(nn.Linear(input_size, hidden_size), 2**0.5)
        self.policy_hidden = orthogonal_(nn.Linear(hidden_size, hidden_size), 2**0.5)
        self.value_hidden = orthogonal_(nn.Linear(hidden_size, hidden_size), 2**0.5)
        self.policy = nn.ModuleList(orthogonal_(nn.Linear(hidden_size, n), 0.1) for n in action_nvec)
        self.value = orthogonal_(nn.Linear(hidden_size, 1), 1.0)

    def forward(
        self, x: Float[Tensor, "M H"], value_gradient_scale: float = 1.0
    ) -> tuple[Float[Tensor, "M K"], Float[Tensor, "M"]]:
        """Return the logits of all branches side by side, and the values.

        The values' gradient into the shared hidden layer is multiplied by ``value_gradient_scale``.
        """
        x = F.relu(self.hidden(x), inplace=True)
        policy = F.relu(self.policy_hidden(x), inplace=True)
        logits = torch.cat([branch(policy) for branch in self.policy], 1)
        if value_gradient_scale != 1:
            x = torch.lerp(x.detach(), x, value_gradient_scale)  # x itself, as there is nothing between x and x
        return logits, self.value(F.relu(self.value_hidden(x), inplace=True)).squeeze(1)


def at_least_float32(x: Tensor) -> Tensor:
    """Widen what autocast made half as wide; float64 stays."""
    return x.float() if x.dtype.itemsize < 4 else x


def sample(
    logits: Float[Tensor, "M K"], noise: Float[Tensor, "M A"], nvec: tuple[int, ...]
) -> tuple[Int[Tensor, "M A"], Float[Tensor, "M A"]]:
    """Sample actions by inverting the cumulative distribution at ``noise``.

    Args:
        logits: of all branches side by side.
        noise: uniform on [0, 1): one number per branch decides an action, whatever the branch's size, so that the same
            noise and logits give the same action on any device.
        nvec: number of choices of each branch.

    Returns:
        Actions and their log-probabilities per branch.
    """
    actions, log_probs = [], []
    for branch, u in zip(at_least_float32(logits).split(nvec, 1), noise.unbind(1), strict=True):
        log_p = branch.log_softmax(1)
        action = (u[:, None] >= _cumulative(log_p.exp())).sum(1).clamp(max=branch.shape[1] - 1)
        actions.append(action)
        log_probs.append(log_p.gather(1, action[:, None]).squeeze(1))
    return torch.stack(actions, 1), torch.stack(log_probs, 1)


def _cumulative(p: Float[Tensor, "M K"]) -> Float[Tensor, "M K"]:
    """Sum along the last axis by doubling, in float64: ``cumsum`` has no deterministic kernel on CUDA."""
    x, reach = p.double(), 1
    while reach < p.shape[1]:
        x = torch.cat((x[:, :reach], x[:, reach:] + x[:, :-reach]), 1)
        reach *= 2
    return x.to(p.dtype)


def mode(logits: Float[Tensor, "M K"], nvec: tuple[int, ...]) -> Int[Tensor, "M A"]:
    """Return the most probable action of each branch (the first of equals)."""
    return torch.stack([branch.argmax(1) for branch in logits.split(nvec, 1)], 1)


def log_prob_and_entropy(
    logits: Float[Tensor, "M K"], action: Int[Tensor, "M A"], nvec: tuple[int, ...]
) -> tuple[Float[Tensor, "M A"], Float[Tensor, "M"]]:
    """Compute the log-probability of ``action`` per branch, and the entropy in nats summed over branches."""
    log_probs, entropies = [], []
    for branch, chosen in zip(at_least_float32(logits).split(nvec, 1), action.unbind(1), strict=True):
        log_p = branch.log_softmax(1)
        log_probs.append(log_p.gather(1, chosen[:, None]).squeeze(1))
        entropies.append(-(log_p.exp() * log_p).sum(1))
    return torch.stack(log_probs, 1), torch.stack(entropies).sum(0)
