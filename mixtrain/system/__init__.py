"""Files, processes and terminals of this machine: reading what others wrote, locks, ranks of one host.

May import: errors.
Does not belong here: anything that knows a key of a configuration.
"""
