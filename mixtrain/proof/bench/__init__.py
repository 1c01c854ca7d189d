"""Benchmarks: the same work by several implementations, each in its own processes, in turn.

Rule: what is compared must first have computed the same; a figure without its machine, versions and
commit is not kept.
"""
