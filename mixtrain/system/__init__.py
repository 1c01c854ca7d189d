"""Files, processes and terminals of this machine: untrusted files, locks, the identity of a rank.

May import: errors.
Does not belong here: anything that knows configuration keys.
"""
