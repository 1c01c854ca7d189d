"""Train Mixtral-class Mixture-of-Experts models with Megatron-Core, on a laptop or a cluster."""

__version__ = "0.1.0"
