"""Longshore: reinforcement learning with verifiable rewards for language models, over several clusters at once."""

__version__ = "0.1.0"
