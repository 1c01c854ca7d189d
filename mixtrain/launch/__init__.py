"""From a plan to processes: ranks of this machine, or a Slurm job whose tasks are ranks.

Rule: everything that can be known to be wrong is said before a process is started or a job is sent.

May import: training, checkpoint, data, config, system, errors; never torch.
Does not belong here: a step, or anything that a rank computes.
"""
