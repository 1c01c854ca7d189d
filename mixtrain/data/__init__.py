"""Text in, token batches out: prepares, indexes and reads data through Megatron-Core's datasets.

May import: config, system, errors.
Does not belong here: the model, and the progress of a run.
"""
