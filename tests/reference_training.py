"""A whole training in plain loops over ranks, environments and steps, written from the formulas.

Of the package it uses the agent's weights and its encoder and heads, nothing else; random numbers are drawn in the same
order from the same seeds. It is as slow as it looks.
"""

import math
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from ppo_tbptt.config import Config, CoreConfig
from ppo_tbptt.models import Agent

State = list[tuple[Tensor, Tensor]]
"""Hidden and cell state ``[H]`` of each layer; only an LSTM uses the latter. Of matrix memories the former is all their
matrices, key by value, ``[h d d]``."""


@dataclass
class Step:
    """One step of one environment; ``next_value`` is that of the observation that followed it."""

    start: bool
    obs: dict[str, Tensor]
    state: State
    action: list[int]
    log_prob: Tensor
    value: float
    reward: float = math.nan
    end: bool = False
    next_value: float = math.nan
    advantage: float = math.nan
    value_target: float = math.nan


@dataclass
class Sequence:
    """Steps that warm the state, and then those that gradients reach, of which the last ``counted`` count."""

    burn_in: list[Step]
    steps: list[Step]
    counted: int
    masks: list[Tensor | None] = field(default_factory=list)
    """Dropout between the layers in the update under way, of the former and the latter."""

    def __len__(self) -> int:
        return len(self.steps)


@dataclass
class Player:
    """An environment, number ``number`` of all, in the middle of its episode."""

    config: Config
    number: int
    state: State
    levels: int = 0
    start: bool = True
    ret: float = 0.0
    length: int = 0
    obs: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.env = gym.make(self.config.env.id.split(":")[1], disable_env_checker=True)
        self.reset()

    def see(self, obs: Any, action: list[int] | None = None, reward: float = 0.0) -> None:
        """What the agent sees after ``action`` and ``reward``; none of them at an episode's start."""
        self.obs, space = tensors(obs), self.env.action_space
        assert isinstance(space, gym.spaces.MultiDiscrete)
        if self.config.model.previous_action:
            choices = [(k, c) for k, n in enumerate(space.nvec) for c in range(n)]
            chosen = [float(action is not None and action[k] == c) for k, c in choices]
            self.obs["previous_action"] = torch.tensor(chosen)
        if self.config.model.previous_reward:
            self.obs["previous_reward"] = torch.tensor([float(np.float32(reward))])

    def reset(self) -> None:
        env = self.config.env
        sequence = np.random.SeedSequence(self.config.seed, spawn_key=(self.number, self.levels))
        level = env.first_seed + int(np.random.Generator(np.random.Philox(sequence)).integers(env.num_seeds))
        self.see(self.env.reset(seed=level)[0])
        self.start, self.ret, self.length, self.levels = True, 0.0, 0, self.levels + 1


class Reference:
    """Trains ``agent`` (a copy) by ``config``; ``dropout`` is the state of each rank's generator of dropout."""

    def __init__(self, config: Config, agent: Agent, dropout: list[Tensor]) -> None:
        self.config, self.agent, self.env_steps, self.updates = config, deepcopy(agent).eval(), 0, 0
        core: Any = self.agent.core
        for _ in range(config.core.residual + config.core.norm):
            core = core.core
        self.core = core
        ranks, per_rank = range(len(dropout)), config.env.num_envs
        self.players = [[Player(config, r * per_rank + n, self.initial()) for n in range(per_rank)] for r in ranks]
        if config.model.normalize_frames:
            for key, frame in self.players[0][0].obs.items():
                if frame.dtype == torch.uint8:
                    cnn: Any = self.agent.encoder.parts[key]
                    frames = torch.stack([player.obs[key].double() for player in self.players[0]])
                    cnn.mean = frames.mean(0)
                    cnn.std = ((frames - cnn.mean) ** 2).mean() ** 0.5
        self.noise, self.permutation, self.dropout = [], [], []
        for rank in ranks:
            noise, permutation = config.seed, config.seed + 1
            if rank:
                _, noise, permutation = np.random.SeedSequence((config.seed, rank, 0)).generate_state(3).tolist()
            self.noise.append(torch.Generator().manual_seed(noise))
            self.permutation.append(torch.Generator().manual_seed(permutation))
            self.dropout.append(torch.Generator())
            self.dropout[rank].set_state(dropout[rank])
        self.cells: list[tuple[int, Tensor, Tensor, Tensor]] = []
        """Of the last step: layer, x_t, h_{t-1}, h_t."""
        self.first_moment = [torch.zeros_like(p) for p in self.agent.parameters()]
        self.second_moment = [torch.zeros_like(p) for p in self.agent.parameters()]

    # --- the network -----------------------------------------------------------------------------------------------

    def initial(self) -> State:
        core = self.config.core
        assert isinstance(core, CoreConfig)
        if core.kind == "none":
            return []
        learnt = self.core.learnt_state
        width = core.hidden_size
        if core.kind in ("retention", "gated_delta"):
            width *= core.hidden_size // core.num_heads
        flat = torch.zeros(core.num_layers * width) if learnt is None else learnt
        parts = flat.view(-1, core.num_layers, width)
        return list(zip(parts[0], parts[-1], strict=True))

    def forward(self, obs: dict[str, Tensor], state: State, mask: Tensor | None) -> tuple[list[Tensor], Tensor, State]:
        """Logits of each branch, value, and the state after one step."""
        self.cells = []
        seen = x = torch.cat([*self.agent.encoder({key: value[None] for key, value in obs.items()}).values()], 1)[0]
        after: State = []
        for layer, (h, c) in enumerate(state):
            if layer and mask is not None:
                x = x * mask
            y, after_h, c = layer_step(self.core, self.config.core, layer, x, h, c)
            after.append((after_h, c))
            self.cells.append((layer, x, h, after_h))
            x = y
        if self.config.core.norm:
            around: Any = self.agent.core
            norm = around.core.norm if self.config.core.residual else around.norm
            x = normalized(x) * norm.weight + norm.bias
        if self.config.core.residual:
            shortcut: Any = self.agent.core.shortcut
            x = x + shortcut.weight @ seen + shortcut.bias
        logits, value = self.agent.heads(x[None])
        return list(logits[0].split(self.agent.action_nvec)), value[0], after

    # --- one iteration ---------------------------------------------------------------------------------------------

    def iterate(self) -> dict[str, float]:
        """One iteration; what must be logged of it, but for the clock."""
        episodes: list[dict[str, float]] = []
        with torch.no_grad():
            rollout = [
                self.collect(players, noise, episodes) for players, noise in zip(self.players, self.noise, strict=True)
            ]
        for steps in rollout:
            for steps_of_env in steps:
                self.estimate_advantages(steps_of_env)
        figures = {"episode/count": float(len(episodes))}
        for name in {name for episode in episodes for name in episode}:
            figures[name] = float(np.mean([episode[name] for episode in episodes if name in episode]))
        everything = [step for steps in rollout for steps_of_env in steps for step in steps_of_env]
        targets = np.array([step.value_target for step in everything])
        errors = targets - np.array([step.value for step in everything])
        figures["policy/explained_variance"] = 1 - errors.var() / targets.var()
        images = [key for key, shape in self.agent.obs_shapes.items() if len(shape) == 3]
        if images:
            pairs = zip(rollout, self.players, strict=True)
            figures["sequences/distinct_fraction"] = float(np.mean([distinct(*pair, images) for pair in pairs]))
        figures |= self.update(rollout)
        self.env_steps += len(everything)
        return figures | dict.fromkeys(
            ("faults/worker_restarts", "faults/cut_episodes", "faults/nonfinite_updates"), 0.0
        )

    def collect(
        self, players: list[Player], generator: torch.Generator, episodes: list[dict[str, float]]
    ) -> list[list[Step]]:
        """The steps of each environment; ``episodes`` gets what is logged of those that end."""
        uniform = torch.rand(
            self.config.ppo.rollout_steps, len(players), len(self.agent.action_nvec), generator=generator
        )
        steps: list[list[Step]] = [[] for _ in players]
        for t in range(self.config.ppo.rollout_steps):
            for n, player in enumerate(players):
                steps[n].append(self.play(player, uniform[t, n].tolist(), episodes))
        for player, steps_of_env in zip(players, steps, strict=True):
            for step, following in pairwise(steps_of_env):
                if not step.end:
                    step.next_value = following.value
            if not steps_of_env[-1].end:
                steps_of_env[-1].next_value = float(self.forward(player.obs, player.state, None)[1])
        return steps

    def play(self, player: Player, uniform: list[float], episodes: list[dict[str, float]]) -> Step:
        """One step of one environment."""
        state = self.initial() if player.start else player.state
        logits, value, after = self.forward(player.obs, state, None)
        action = []
        for branch, u in zip(logits, uniform, strict=True):
            p = branch.exp() / branch.exp().sum()
            action.append(min(sum(u >= float(p[: k + 1].sum()) for k in range(len(p))), len(p) - 1))
        log_prob = torch.stack([torch.log(b.exp() / b.exp().sum())[a] for b, a in zip(logits, action, strict=True)])
        step = Step(player.start, player.obs, state, action, log_prob, float(value))
        obs, reward, terminated, truncated, info = player.env.step(np.array(action))
        player.ret, player.length = player.ret + float(reward), player.length + 1
        step.reward = float(np.float32(reward))
        truncated = not terminated and (truncated or player.length == self.config.env.max_episode_steps)
        step.end = bool(terminated or truncated)
        player.see(obs, action, float(reward))
        player.state, player.start = after, False
        if step.end:
            step.next_value = float(self.forward(player.obs, after, None)[1]) if truncated else 0.0
            figures = {"episode/return": player.ret, "episode/length": float(player.length)}
            figures["episode/success"] = float(info.get("success", 0.0))
            episodes.append(figures | {f"env/{name}": float(value) for name, value in info.items()})
            player.reset()
        return step

    def estimate_advantages(self, steps: list[Step]) -> None:
        """Schulman et al. 2016, eq. 16, backwards through one environment's steps."""
        ppo, advantage = self.config.ppo, 0.0
        for step in reversed(steps):
            delta = step.reward + ppo.gamma * step.next_value - step.value
            advantage = delta + ppo.gamma * ppo.gae_lambda * (0.0 if step.end else advantage)
            step.advantage, step.value_target = advantage, advantage + step.value

    # --- the update ------------------------------------------------------------------------------------------------

    def scheduled(self, schedule: Any) -> float:
        if schedule.final is None:
            return schedule.initial
        done = min(1.0, self.env_steps / (schedule.over_steps or self.config.total_steps))
        return schedule.final + (schedule.initial - schedule.final) * (1 - done) ** schedule.power

    def sequences(self, steps: list[list[Step]]) -> list[Sequence]:
        """By environment, then time: as many as it takes for each step of an episode to count in one."""
        ppo, out = self.config.ppo, []
        for steps_of_env in steps:
            begins = [t for t, step in enumerate(steps_of_env) if t == 0 or step.start]
            for begin, end in zip(begins, [*begins[1:], len(steps_of_env)], strict=True):
                piece = steps_of_env[begin:end]
                k2 = ppo.sequence_length or len(piece)
                k1 = ppo.sequence_stride or k2
                for done in range(0, len(piece), k1):
                    first = max(0, done + k1 - k2) if ppo.sequence_length else 0
                    burn_in, own = piece[max(0, first - ppo.burn_in) : first], piece[first : done + k1]
                    out.append(Sequence(burn_in, own, len(piece[done : done + k1])))
        return out

    def split(self, sequences: list[Sequence], generator: torch.Generator) -> list[list[Sequence]]:
        """A permutation, and minibatches of equally many steps: the one in which a sequence's middle falls."""
        count, done = self.config.ppo.num_minibatches, 0
        total = sum(sequence.counted for sequence in sequences)
        minibatches: list[list[Sequence]] = [[] for _ in range(count)]
        for number in torch.randperm(len(sequences), generator=generator).tolist():
            sequence = sequences[number]
            minibatches[int((done + sequence.counted / 2) * count / total)].append(sequence)
            done += sequence.counted
        return minibatches

    def draw_dropout(self, sequences: list[Sequence], generator: torch.Generator) -> None:
        """Masks for the steps in the order in which they are packed: the longest first, time before sequence."""
        core = self.config.core
        assert isinstance(core, CoreConfig)
        ordered = sorted(sequences, key=len, reverse=True)
        warmed = sorted(ordered, key=lambda sequence: len(sequence.burn_in), reverse=True)
        for sequence in sequences:
            sequence.masks = [None] * (len(sequence.burn_in) + len(sequence))
        if not core.dropout:
            return
        for packed in (
            [(s, k) for k in range(self.config.ppo.burn_in) for s in warmed if k < len(s.burn_in)],
            [(s, len(s.burn_in) + k) for k in range(max(map(len, ordered), default=0)) for s in ordered if k < len(s)],
        ):
            if packed:
                keep = torch.empty(len(packed), core.hidden_size).bernoulli_(1 - core.dropout, generator=generator)
                for (sequence, k), row in zip(packed, keep / (1 - core.dropout), strict=True):
                    sequence.masks[k] = row

    @torch.no_grad()
    def refresh(self, steps: list[Step]) -> None:
        """Play one environment's steps again: the states are those of the present weights."""
        state = steps[0].state
        for step in steps:
            step.state = state = self.initial() if step.start else state
            state = self.forward(step.obs, state, None)[2]

    def update(self, rollout: list[list[list[Step]]]) -> dict[str, float]:
        """All epochs; what is logged of them."""
        ppo = self.config.ppo
        rates = {name: self.scheduled(getattr(ppo, name)) for name in ("learning_rate", "entropy_coef", "clip_range")}
        sequences = [self.sequences(steps) for steps in rollout]
        sums: dict[str, float] = {}
        weight, updates, padding = 0, 0, []
        for epoch in range(ppo.num_epochs):
            if epoch and ppo.refresh_every and epoch % ppo.refresh_every == 0:
                for steps in rollout:
                    for steps_of_env in steps:
                        self.refresh(steps_of_env)
            ranks = [self.split(s, generator) for s, generator in zip(sequences, self.permutation, strict=True)]
            for minibatches in ranks:
                groups = [group for group in minibatches if group]
                padded = sum(max(map(len, group)) * len(group) for group in groups)
                padding.append(1 - sum(len(s) for group in groups for s in group) / padded)
            kl = size_of_epoch = 0.0
            for parts in zip(*ranks, strict=True):
                size = sum(s.counted for part in parts for s in part)
                if not size:
                    continue
                for part, generator in zip(parts, self.dropout, strict=True):
                    self.draw_dropout(part, generator)
                figures = self.step([s for part in parts for s in part], **rates)
                for name, value in figures.items():
                    sums[name] = sums.get(name, 0.0) + size * value
                weight, updates = weight + size, updates + 1
                kl, size_of_epoch = kl + size * figures["policy/approx_kl"], size_of_epoch + size
            if ppo.target_kl is not None and kl / size_of_epoch > ppo.target_kl:
                break
        every = [s for rank in sequences for s in rank]
        lengths, counted = [len(s) for s in every], sum(s.counted for s in every)
        overlapping: dict[str, float] = {}
        if ppo.burn_in or ppo.sequence_stride not in (None, ppo.sequence_length):
            computed = sum(len(s.burn_in) + len(s) for s in every)
            overlapping["sequences/computed_over_counted"] = computed / counted
        return {
            **overlapping,
            **{name: value / weight for name, value in sums.items()},
            **{f"optim/{name}": value for name, value in rates.items()},
            "optim/updates": float(updates),
            "sequences/count": float(len(lengths)),
            "sequences/mean_length": sum(lengths) / len(lengths),
            "sequences/padding_fraction": sum(padding) / len(padding),
            "sequences/cut_fraction": sum(s.counted for s in every if not s.steps[0].start) / counted,
        }

    def step(
        self, sequences: list[Sequence], learning_rate: float, entropy_coef: float, clip_range: float
    ) -> dict[str, float]:
        """One minibatch: its figures before the step."""
        ppo, agent = self.config.ppo, self.agent
        steps = [step for sequence in sequences for step in sequence.steps[-sequence.counted :]]
        shift, scale = 0.0, 1.0
        if ppo.normalize_advantage:
            advantages = np.array([step.advantage for step in steps])
            shift, scale = float(advantages.mean()), float(advantages.std()) + 1e-8
        zero = torch.zeros(())
        policy_loss = value_loss = entropy = kl = clipped = zero
        pairs: list[tuple[int, Tensor, Tensor, Tensor]] = []
        for sequence in sequences:
            state = [*sequence.burn_in, *sequence.steps][0].state
            masks = iter(sequence.masks)
            with torch.no_grad():
                for step in sequence.burn_in:
                    state = self.forward(step.obs, state, next(masks))[2]
            for k, step in enumerate(sequence.steps):
                state = self.initial() if step.start else state
                logits, value, state = self.forward(step.obs, state, next(masks))
                pairs += self.cells if k else []
                if k < len(sequence) - sequence.counted:
                    continue
                p = [branch.exp() / branch.exp().sum() for branch in logits]
                log_prob = torch.stack([x.log()[a] for x, a in zip(p, step.action, strict=True)])
                advantage = (step.advantage - shift) / scale
                log_ratio = log_prob - step.log_prob
                ratios = (log_ratio.sum()[None] if ppo.ratio == "joint" else log_ratio).exp()
                for r in ratios:
                    bounded = min(max(r, zero + 1 - clip_range), zero + 1 + clip_range)
                    policy_loss = policy_loss - min(r * advantage, bounded * advantage) / len(ratios)
                    clipped = clipped + (abs(r.item() - 1) > clip_range) / len(ratios)
                error = (value - step.value_target) ** 2
                if ppo.clip_value_loss:
                    change = min(max(value - step.value, zero - clip_range), zero + clip_range)
                    error = max(error, (step.value + change - step.value_target) ** 2)
                value_loss = value_loss + error
                entropy = entropy - sum((x * x.log()).sum() for x in p)
                kl = kl + (log_ratio.sum().exp() - 1 - log_ratio.sum()).detach()
        policy_loss, value_loss, entropy = (x / len(steps) for x in (policy_loss, value_loss, entropy))
        loss = policy_loss + ppo.value_coef * value_loss - entropy_coef * entropy
        gradients = self.gradients(policy_loss - entropy_coef * entropy, ppo.value_coef * value_loss)
        regularised = {}
        if coef := ppo.jacobian_norm_coef:
            omega = self.jacobian_norm(loss, pairs)
            recurrent = [p for name, p in agent.core.named_parameters() if "_hh_" in name]
            of_omega = torch.autograd.grad(omega, recurrent, allow_unused=True, materialize_grads=True)
            by = dict(zip(recurrent, of_omega, strict=True))
            gradients = [g + coef * by.get(p, 0.0) for g, p in zip(gradients, agent.parameters(), strict=True)]
            loss, regularised = loss + coef * omega, {"loss/jacobian_norm": omega.item()}
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        self.adamw([self.clip(g, norm) for g in gradients], learning_rate)
        return {
            "loss/total": loss.item(),
            "loss/policy": policy_loss.item(),
            "loss/value": value_loss.item(),
            "policy/entropy": entropy.item(),
            "policy/approx_kl": kl.item() / len(steps),
            "policy/clip_fraction": clipped.item() / len(steps),
            "optim/grad_norm": norm,
            **regularised,
        }

    def jacobian_norm(self, loss: Tensor, pairs: list[tuple[int, Tensor, Tensor, Tensor]]) -> Tensor:
        """Pascanu et al. 2013, eq. 9 and 10: of one pair of steps after the other."""
        total, count = torch.zeros((), requires_grad=True), 0
        signals = torch.autograd.grad(loss, [after for *_, after in pairs], retain_graph=True) if pairs else ()
        for (layer, x, h, _), signal in zip(pairs, signals, strict=True):
            h = h.detach().requires_grad_()
            back = torch.autograd.grad(
                cell(self.core, self.config.core.kind, layer, x.detach(), h, h)[0], h, signal, create_graph=True
            )[0]
            if signal.norm() > 0:
                total, count = total + (back.norm() / signal.norm() - 1) ** 2, count + 1
        return total / max(count, 1)

    def clip(self, gradient: Tensor, norm_of_all: float) -> Tensor:
        bound, kind = self.config.ppo.max_grad_norm, self.config.ppo.grad_clip
        if kind == "value":
            return gradient.clamp(-bound, bound)
        norm = {"norm": norm_of_all, "per_layer": float((gradient**2).sum()) ** 0.5, "none": 0.0}[kind]
        return gradient * min(1.0, bound / (norm + 1e-6))

    def gradients(self, policy: Tensor, value: Tensor) -> list[Tensor]:
        """Of the sum of these losses, but for what policy and value share, which gets less of the value's."""
        named, scale = dict(self.agent.named_parameters()), self.config.ppo.value_gradient_scale
        of_policy, of_value = (
            torch.autograd.grad(x, list(named.values()), retain_graph=True, allow_unused=True, materialize_grads=True)
            for x in (policy, value)
        )
        scales = [1.0 if name.startswith("heads.value") else scale for name in named]
        return [a + s * b for a, s, b in zip(of_policy, scales, of_value, strict=True)]

    @torch.no_grad()
    def adamw(self, gradients: list[Tensor], learning_rate: float) -> None:
        """Loshchilov and Hutter 2019, algorithm 2, with torch's betas and epsilon."""
        self.updates += 1
        named = zip(self.agent.named_parameters(), gradients, self.first_moment, self.second_moment, strict=True)
        for (name, p), g, m, v in named:
            if name.split(".")[-1] not in ("learnt_state", "nu", "theta", "gamma"):
                p *= 1 - learning_rate * self.config.ppo.weight_decay
            m += 0.1 * (g - m)
            v += 0.001 * (g**2 - v)
            p -= learning_rate * (m / (1 - 0.9**self.updates)) / ((v / (1 - 0.999**self.updates)).sqrt() + 1e-8)


def layer_step(core: Any, config: Any, layer: int, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's output after one step, and the two parts of its state, of which most cores have but one."""
    if config.kind in ("retention", "gated_delta"):
        return *matrix_memory(core, config, layer, x, h), c
    if config.kind == "mingru":  # Feng et al. 2024
        own = core.layers[layer]
        z, candidate = (own.weight @ x + own.bias).chunk(2)
        h = (1 - z.sigmoid()) * h + z.sigmoid() * candidate
        return h, h, c
    if config.kind == "lru":  # Orvieto et al. 2023; h and c are the state's real and imaginary parts
        own, size = core.layers[layer], len(h)
        radius, angle = (-own.nu.exp()).exp(), own.theta.exp()
        a, b = radius * angle.cos(), radius * angle.sin()
        of_x = own.weight @ x
        real, imaginary = (own.gamma.exp() * part for part in of_x[: 2 * size].chunk(2))
        h, c = a * h - b * c + real, a * c + b * h + imaginary
        y = own.c[:, :size] @ h + own.c[:, size:] @ c + of_x[2 * size :]
        linear, gate = (own.out.weight @ y + own.out.bias).chunk(2)
        return linear * gate.sigmoid(), h, c
    h, c = cell(core, config.kind, layer, x, h, c)
    return h, h, c


def matrix_memory(core: Any, config: CoreConfig, layer: int, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's output and state ``[h d d]`` after one step.

    Sun et al. 2023, equations 6 and 8, and Yang et al. 2024, equation 10, whose state is transposed here.
    """
    size, heads = config.hidden_size, config.num_heads
    d = size // heads
    p = core.projections[layer].weight @ x
    outputs, states = [], []
    for n, s in enumerate(state.view(heads, d, d)):
        q, k, v, gate = p[: 4 * size].view(4, heads, d)[:, n]
        if config.kind == "retention":
            s = (1 - 2.0 ** (-5 - n)) * s + torch.outer(k, v)
            o = q @ s / d**0.5
        else:
            decay, strength = p[4 * size :].view(2, heads)[:, n]
            rate = core.log_rate[layer, n].exp() * (1 + (decay + core.step_bias[layer, n]).exp()).log()
            q, k, v = q * q.sigmoid(), k * k.sigmoid(), v * v.sigmoid()
            q, k = q / q.norm(), k / k.norm()
            forget = torch.eye(d) - strength.sigmoid() * torch.outer(k, k)
            s = (-rate).exp() * forget @ s + strength.sigmoid() * torch.outer(k, v)
            o = q @ s
        outputs.append(o / ((o**2).mean() + 1e-5).sqrt() * gate * gate.sigmoid())
        states.append(s)
    return core.outputs[layer].weight @ torch.cat(outputs), torch.stack(states).flatten()


def normalized(x: Tensor) -> Tensor:
    return (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()


def summed(core: Any, kind: str, layer: int, which: str, y: Tensor) -> Tensor:
    """What a layer's input (``which`` is ih) or its state (hh) adds to the gates ``[GH]``."""
    of_y = getattr(core.rnn, f"weight_{which}_l{layer}") @ y
    if kind.startswith("ln_"):
        size = core.rnn.hidden_size
        groups = of_y.split([4 * size] if kind == "ln_lstm" else [2 * size, size])
        of_y = torch.cat([normalized(group) for group in groups]) * core.norms[f"gain_{which}_l{layer}"]
    return of_y + getattr(core.rnn, f"bias_{which}_l{layer}")


def cell(core: Any, kind: str, layer: int, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden and cell state after one step ``[H]``, by torch's documentation, and Ba et al. 2016 and its supplement."""
    of_x, of_h = summed(core, kind, layer, "ih", x), summed(core, kind, layer, "hh", h)
    if kind in ("lstm", "ln_lstm"):
        i, f, g, o = (of_x + of_h).chunk(4)
        c = shown = f.sigmoid() * c + i.sigmoid() * g.tanh()
        if kind == "ln_lstm":
            shown = normalized(c) * core.norms[f"gain_c_l{layer}"] + core.norms[f"bias_c_l{layer}"]
        return o.sigmoid() * shown.tanh(), c
    if kind in ("gru", "ln_gru"):
        (xr, xz, xn), (hr, hz, hn) = of_x.chunk(3), of_h.chunk(3)
        r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
        return (1 - z) * (xn + r * hn).tanh() + z * h, c
    return ((of_x + of_h).tanh() if kind == "rnn_tanh" else (of_x + of_h).relu()), c


def distinct(steps: list[list[Step]], players: list[Player], images: list[str]) -> float:
    """The share of frames of a rank that are equal to no earlier one, those that its environments show now included."""
    shown = [step.obs for steps_of_env in steps for step in steps_of_env] + [player.obs for player in players]
    return sum(len({bytes(obs[key].numpy()) for obs in shown}) for key in images) / (len(images) * len(shown))


def tensors(obs: Any) -> dict[str, Tensor]:
    """An observation by key; frames in bytes, vectors as floats."""
    arrays = obs if isinstance(obs, dict) else {"obs": obs}
    return {key: torch.from_numpy(x if x.dtype == np.uint8 else x.astype(np.float64)) for key, x in arrays.items()}
