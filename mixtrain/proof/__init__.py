"""Proofs of correctness and speed: parity, benchmarks, fault drills. Never imported by a run.

May import: everything.
Does not belong here: what a run needs.
"""
