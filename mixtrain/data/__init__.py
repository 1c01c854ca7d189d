"""Text in, token batches out: preparing, indexing and reading data through Megatron-Core's datasets."""
