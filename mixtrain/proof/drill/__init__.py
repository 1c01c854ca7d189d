"""Breaking real training runs on purpose, and looking at what is left.

Rule: whatever is broken here is broken from outside, or in the process of a rank that was started
to be broken (faulty_rank.py); a run of train.py knows nothing of it.
"""
