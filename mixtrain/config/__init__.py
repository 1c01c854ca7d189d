"""Keys, composition and rules of a configuration, and every number derived from it. No torch.

May import: system, errors.
Does not belong here: anything that inspects the machine or needs a tensor.
"""
