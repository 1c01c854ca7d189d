"""Start a plan: as ranks on this machine, or as a Slurm job whose tasks are ranks.

Rule: everything that can be checked beforehand is checked before a process or a job starts.

May import: training, checkpoint, data, config, system, errors; never torch.
Does not belong here: a step, or anything that a rank computes.
"""
