"""Certifies that a parallel layout does not change the result: compares every layout with one rank.

Rule: every layout trains the same weights on the same global batch. Each tensor slice on a rank is
compared with the same slice of the one-rank run's tensor. layouts.py and table.py need no torch.
"""
