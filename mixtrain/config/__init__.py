"""What a run is: keys, composition, rules, and every number that follows from them. No torch.

May import: system, errors.
Does not belong here: anything that looks at the machine, or needs a tensor.
"""
