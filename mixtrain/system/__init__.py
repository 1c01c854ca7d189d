"""Files, processes, terminals, ranks: untrusted files, locks, a rank's identity, collectives.

May import: errors.
Does not belong here: anything that knows configuration keys.
"""
