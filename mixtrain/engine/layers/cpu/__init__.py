"""Implementations for the CPU only; engine/layers/ calls them on CPU tensors.

May import: config, system, errors.
Does not belong here: anything that a GPU run executes.
"""
