"""Whether it is right and fast: parity, benchmarks, drills. Never imported by a run.

May import: everything.
Does not belong here: what a run needs.
"""
