"""Megatron-Core's objects: process groups, the model, its layers and weights, the optimizer.

May import: config, system, errors.
Does not belong here: a step, a file of a run, a checkpoint.
"""
