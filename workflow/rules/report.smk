"""Tables and figures, from the runs table alone: no GPU, no model. Captions appear in the HTML report."""


localrules:
    tables,
    figures,


rule tables:
    input:
        f"{RUN}/runs.parquet",
    output:
        expand(
            f"{RUN}/tables/{{name}}.{{form}}",
            name=TABLE_NAMES,
            form=["csv", "md", "tex"],
        ),
        *[
            report(
                f"{RUN}/tables/{name}.html",
                caption=f"../report/{name}.rst",
                category="1. Tables",
                labels={"table": TITLES[name]},
            )
            for name in TABLE_NAMES
        ],
    log:
        f"{LOGS}/tables.log",
    benchmark:
        f"{LOGS}/tables.tsv"
    conda:
        ENVIRONMENT
    params:
        directory=subpath(output[0], parent=True),
        code=code_hash("report"),
    shell:
        "python -m patch tables {input} --output {params.directory} > {log} 2>&1"


rule figures:
    input:
        runs=f"{RUN}/runs.parquet",
        curves=f"{RUN}/curves.parquet",
    output:
        expand(f"{RUN}/figures/{{name}}.pdf", name=FIGURE_NAMES),
        *[
            report(
                f"{RUN}/figures/{name}.png",
                caption=f"../report/{name}.rst",
                category="2. Figures",
                labels={"figure": TITLES[name]},
            )
            for name in FIGURE_NAMES
        ],
    log:
        f"{LOGS}/figures.log",
    benchmark:
        f"{LOGS}/figures.tsv"
    conda:
        ENVIRONMENT
    params:
        directory=subpath(output[0], parent=True),
        code=code_hash("report"),
    shell:
        "python -m patch figures {input.runs} --output {params.directory} > {log} 2>&1"
