"""Networks: encoders, recurrent cores, heads, and the agent that joins them."""

from ppo_tbptt.models.agent import Agent
from ppo_tbptt.models.cores import CORES, Core

__all__ = ["CORES", "Agent", "Core"]
