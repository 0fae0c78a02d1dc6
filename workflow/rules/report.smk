"""Tables and figures, from the runs table alone: no GPU, no model. Captions appear in the HTML report."""


localrules:
    tables,
    figures,


rule tables:
    input:
        f"{RUN}/runs.parquet",
    output:
        TABLES,
    log:
        f"{LOGS}/tables.log",
    benchmark:
        f"{LOGS}/tables.tsv"
    conda:
        ENVIRONMENT
    params:
        code=code_hash("report"),
        directory=subpath(output[0], parent=True),
    shell:
        "python -m patch tables {input} --output {params.directory} > {log} 2>&1"


rule figures:
    input:
        f"{RUN}/runs.parquet",
    output:
        FIGURES,
    log:
        f"{LOGS}/figures.log",
    benchmark:
        f"{LOGS}/figures.tsv"
    conda:
        ENVIRONMENT
    params:
        code=code_hash("report"),
        directory=subpath(output[0], parent=True),
    shell:
        "python -m patch figures {input} --output {params.directory} > {log} 2>&1"
