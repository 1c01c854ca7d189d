"""Between Megatron-Core's tensors and configuration and those of Hugging Face's Mixtral: pure functions, no model.

Rule: what a name means stands in a row of tensor_mapping.py or hf_config.py and nowhere else; what no row covers is refused.
"""
