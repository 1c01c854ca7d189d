"""Convert tensors and configurations between Megatron-Core and Hugging Face.

Rule: the meaning of a tensor's name is a row in tensor_mapping.py, that of a key of config.json a
row in hf_config.py; anything without a row is refused.
"""
