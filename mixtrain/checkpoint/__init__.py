"""Checkpoints in Megatron-LM's directory format: contents, writing, verifying and reading.

Rule: a reader never mistakes a half-written checkpoint for a complete one, and nothing read from
disk is executed.

May import: data, engine, config, system, errors.
Does not belong here: a run, or what another library calls its checkpoints.
"""
