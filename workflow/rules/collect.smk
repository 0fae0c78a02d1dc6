"""From records to one tidy table, and from there to MLflow. Runs where Snakemake runs, never on a node."""


localrules:
    collect,
    collect_target,
    mlflow,


rule collect:
    input:
        cell_records,
        cell_curves,
    output:
        parquet=f"{RUN}/runs.parquet",
        csv=f"{RUN}/runs.csv",
        curves=f"{RUN}/curves.parquet",
        paired=f"{RUN}/paired.parquet",
        experiment=f"{RUN}/experiment.json",
    log:
        f"{LOGS}/collect.log",
    benchmark:
        f"{LOGS}/collect.tsv"
    conda:
        ENVIRONMENT
    params:
        options=collect_options(),
        key=lambda wildcards: grid_key(),
    shell:
        "python -m patch collect {params.options} --output {output.parquet} > {log} 2>&1"


# With the cells of one table or figure only; the others are listed as not run.
use rule collect as collect_target with:
    output:
        parquet=f"{RUN}/targets/{{target}}/runs.parquet",
        csv=f"{RUN}/targets/{{target}}/runs.csv",
        curves=f"{RUN}/targets/{{target}}/curves.parquet",
        paired=f"{RUN}/targets/{{target}}/paired.parquet",
        experiment=f"{RUN}/targets/{{target}}/experiment.json",
    log:
        f"{LOGS}/targets/{{target}}/collect.log",
    benchmark:
        f"{LOGS}/targets/{{target}}/collect.tsv"


rule mlflow:
    input:
        runs=RUNS,
        artifacts=TABLES + FIGURES,
    output:
        f"{RUN}/mlflow.json",
    log:
        f"{LOGS}/mlflow.log",
    benchmark:
        f"{LOGS}/mlflow.tsv"
    conda:
        ENVIRONMENT
    params:
        uri=EXPERIMENT.mlflow_uri,
        artifacts=lambda wildcards, input: shlex.join(
            f"--artifact={path}" for path in input.artifacts
        ),
        code=code_hash("report"),
    shell:
        "python -m patch mlflow {input.runs} --uri {params.uri} --masks results {params.artifacts} --output {output}"
        " > {log} 2>&1"
