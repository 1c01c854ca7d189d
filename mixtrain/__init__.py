"""mixtrain: train Mixtral-class Mixture-of-Experts models with Megatron-Core, from a laptop's CPU to a cluster."""

__version__ = "0.1.0"
