"""Patches of Megatron-Core and PyTorch: running without CUDA, gloo's gaps, Megatron-Core's faults.

May import: config, system, errors.
Does not belong here: anything that is not a patch of upstream code.
"""
