"""The certificate that a layout does not change the mathematics: every layout against one rank.

Rule: the same weights and the same global batch go through every layout; all that training computes
is held against the one-rank run by its place in the whole. Pure parts (layouts, verdict, table)
know no torch.
"""
