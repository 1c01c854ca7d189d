"""Benchmarks: the same work by several implementations, each in its own processes, in turn.

Rule: variants are compared only after they have computed the same result. Readings are saved with
machine, versions and commit.
"""
