"""Text in, token batches out: preparing, indexing and reading data through Megatron-Core's datasets.

May import: config, system, errors.
Does not belong here: the model, and where a run is.
"""
