"""Continue prompts from a checkpoint, at any layout.

Rule: a continuation depends on the weights, the prompt and the seed, not on the layout or on the
other prompts.
"""
