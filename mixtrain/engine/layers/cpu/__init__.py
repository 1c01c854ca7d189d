"""Layers that only run on a CPU; those of a GPU lie beside this folder.

May import: config, system, errors.
Does not belong here: anything that a GPU run imports.
"""
