"""What Megatron-Core and PyTorch need mended: running without CUDA, gloo's gaps, faults of Megatron-Core.

May import: config, system, errors.
Does not belong here: anything that is not a patch of somebody else's code.
"""
