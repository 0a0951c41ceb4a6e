"""Control of gradients between the backward pass and the optimiser: a regulariser of their norm, and clipping."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ppo_tbptt.config import PPOConfig
from ppo_tbptt.models.cores.recurrence import Trace


def jacobian_norm(trace: Trace) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Compute how far the back-propagated signal's norm changes per step (Pascanu et al. 2013, eq. 9).

    With the gradient g_{t+1} of the loss by the state h_{t+1}, which includes the losses of all later steps, and the
    layer's Jacobian J = dh_{t+1} / dh_t it is, summed over all pairs of steps in a sequence,

        (|g_{t+1} J| / |g_{t+1}| - 1)^2.

    As there (eq. 10 and 11), it is differentiated by the recurrent weights, biases and gains in J alone: g_{t+1}, h_t
    and the projected input are constants. Pairs whose g_{t+1} is 0 are left out.

    Returns:
        The sum, which carries the gradient, and the number of pairs.
    """
    assert trace.steps is not None
    p, h, g = (x[trace.num_sequences :] for x in (trace.steps[0], trace.steps[1][0], trace.steps[2][0]))
    largest = g.abs().amax(1, keepdim=True)
    has_signal = largest > 0
    direction = F.normalize(g / largest.where(has_signal, 1), dim=1)  # the squares of small gradients would be 0
    h = h.detach().requires_grad_()
    (after,), _ = trace.cell.step(p, F.linear(h, trace.weight, trace.bias), [h], *trace.norms)
    (back,) = torch.autograd.grad(after, h, direction, create_graph=True)
    terms = (torch.linalg.vector_norm(back, dim=1) - 1).square()
    return terms.where(has_signal.squeeze(1), 0).sum(), has_signal.sum()


def clip_gradients(parameters: Sequence[nn.Parameter], config: PPOConfig) -> Float[Tensor, ""]:
    """Clip the gradients in place by ``max_grad_norm`` c, as ``grad_clip`` says; return their norm before that.

    norm: the gradient of all parameters, scaled to norm c where it is longer (Pascanu et al. 2013,
        https://arxiv.org/abs/1211.5063, algorithm 1).
    value: every entry into [-c, c].
    per_layer: the gradient of each parameter (a weight matrix, a bias), scaled to norm c where it is longer.
    none: not at all.
    """
    bound = config.max_grad_norm
    if config.grad_clip == "norm":
        return nn.utils.clip_grad_norm_(parameters, bound)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if config.grad_clip == "value":
        nn.utils.clip_grad_value_(parameters, bound)
    elif config.grad_clip == "per_layer":
        for parameter in parameters:
            nn.utils.clip_grad_norm_(parameter, bound)
    return norm
