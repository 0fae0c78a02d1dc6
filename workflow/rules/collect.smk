"""From records to one tidy table, and from there to MLflow. Runs where Snakemake runs, never on a node."""


localrules:
    collect,
    mlflow,


rule collect:
    input:
        cell_records,
        cell_curves,
    output:
        parquet=f"{RUN}/runs.parquet",
        csv=f"{RUN}/runs.csv",
        curves=f"{RUN}/curves.parquet",
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


rule mlflow:
    input:
        runs=f"{RUN}/runs.parquet",
        curves=f"{RUN}/curves.parquet",
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
        "python -m patch mlflow {input.runs} --uri {params.uri} {params.artifacts} --output {output} > {log} 2>&1"
