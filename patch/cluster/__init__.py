"""Running on a Slurm cluster: what jobs need, what Slurm says about them, and which of them compute what.

Knows Slurm, not Snakemake: the executor in `slurm/snakemake_executor_plugin_submitit` is built on it.
"""
