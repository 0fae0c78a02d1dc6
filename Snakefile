"""PATCH: from a config file to tables, figures, an MLflow store and a report.

    snakemake --cores all --configfile workflow/config/demo.yaml     run the grid of a config
    snakemake -n --configfile workflow/config/paper.yaml             show what would run, and why
    snakemake --report report.html --configfile ...                  the results as one HTML file

The rules are thin: each runs one command of `python -m patch`, which can be run by hand just so.
"""

from snakemake.utils import min_version

min_version("9.20")


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/prepare.smk"
include: "workflow/rules/prune.smk"
include: "workflow/rules/learn.smk"
include: "workflow/rules/compress.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/benchmark.smk"
include: "workflow/rules/collect.smk"
include: "workflow/rules/report.smk"


wildcard_constraints:
    model="[^/]+",
    text="[^/]+",
    seed=r"\d+",
    target="[^/]+",
    cell=".+",


localrules:
    all,
    demo,


rule all:
    default_target: True
    input:
        TABLES,
        FIGURES,
        f"{RUN}/mlflow.json",
        rules.benchmarks.input,


# The default config is the demo's, so this is `all` under the name that a newcomer looks for.
rule demo:
    input:
        rules.all.input,


onstart:
    collect_garbage_again()
