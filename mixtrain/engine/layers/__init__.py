"""Megatron-Core's layers on PyTorch alone: `model.transformer_impl: torch`. The same on CPU and CUDA, fp32 and bf16.

Rule: everything here has the constructor, the forward signature and the marks on parameters that Megatron-Core expects
of the part it stands for; what it computes does not depend on which packages are installed.
"""
