"""Fault drills: break real training runs on purpose and check the result.

Rule: faults come from outside, or from a rank process started for that purpose (faulty_rank.py).
train.py has no code for them.
"""
