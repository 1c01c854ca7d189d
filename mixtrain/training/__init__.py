"""One run on one rank: worker, loop, resume, signals, watchdog, run directory, logs, preflight.

May import: checkpoint, data, engine, config, system, errors.
Does not belong here: starting processes; converting or generating.
"""
