"""Checkpoints in Megatron-LM's directories: what is in them, how they are written, which are valid, who reads them.

Rule: at no instant can a reader take a half-written checkpoint for a whole one, and nothing read from a disk is run.

May import: data, engine, config, system, errors.
Does not belong here: a run, or what another library calls its checkpoints.
"""
