"""Megatron-Core's layers on PyTorch alone: `model.transformer_impl: torch`. CPU, CUDA, fp32, bf16.

Rule: every layer has the constructor, forward signature and parameter attributes that Megatron-Core
expects of the layer it replaces. The result does not depend on which packages are installed.
"""
