"""Tables and figures, from the runs table alone: no GPU, no model. Captions appear in the HTML report.

`tables` and `figures` make all of a grid. `table_NAME` and `figure_NAME` make one, and run only the cells that it shows.
"""


localrules:
    tables,
    figures,
    target_table,
    target_figure,


CATEGORIES = {"claims": "3. Claims", "cells": "4. Where the numbers come from"}


rule tables:
    input:
        MEASURED,
        runs=RUNS,
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
                category=CATEGORIES.get(name, "1. Tables"),
                labels={"table": targets.TABLES[name].title},
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
        names=" ".join(f"--only {name}" for name in TABLE_NAMES),
        speed=lambda wildcards: SPEED,
        code=code_hash("report"),
    shell:
        "python -m patch tables {input.runs} --benchmarks {params.speed} --output {params.directory} {params.names}"
        " > {log} 2>&1"


rule figures:
    input:
        MEASURED,
        runs=RUNS,
    output:
        expand(f"{RUN}/figures/{{name}}.pdf", name=FIGURE_NAMES),
        *[
            report(
                f"{RUN}/figures/{name}.png",
                caption=f"../report/{name}.rst",
                category="2. Figures",
                labels={"figure": targets.FIGURES[name].title},
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
        names=" ".join(f"--only {name}" for name in FIGURE_NAMES),
        speed=lambda wildcards: SPEED,
        code=code_hash("report"),
    shell:
        "python -m patch figures {input.runs} --benchmarks {params.speed} --output {params.directory} {params.names}"
        " > {log} 2>&1"


rule target_table:
    input:
        speed_of_target,
        runs=runs_of_target,
    output:
        multiext(
            f"{RUN}/targets/{{target}}/table/{{target}}",
            ".csv",
            ".md",
            ".tex",
            ".html",
        ),
    log:
        f"{LOGS}/targets/{{target}}/table.log",
    benchmark:
        f"{LOGS}/targets/{{target}}/table.tsv"
    conda:
        ENVIRONMENT
    params:
        directory=subpath(output[0], parent=True),
        speed=lambda wildcards: SPEED,
        code=code_hash("report"),
    shell:
        "python -m patch tables {input.runs} --benchmarks {params.speed} --output {params.directory} --only {wildcards.target}"
        " > {log} 2>&1"


rule target_figure:
    input:
        speed_of_target,
        runs=runs_of_target,
    output:
        multiext(f"{RUN}/targets/{{target}}/figure/{{target}}", ".pdf", ".png"),
    log:
        f"{LOGS}/targets/{{target}}/figure.log",
    benchmark:
        f"{LOGS}/targets/{{target}}/figure.tsv"
    conda:
        ENVIRONMENT
    params:
        directory=subpath(output[0], parent=True),
        speed=lambda wildcards: SPEED,
        code=code_hash("report"),
    shell:
        "python -m patch figures {input.runs} --benchmarks {params.speed} --output {params.directory} --only {wildcards.target}"
        " > {log} 2>&1"


for name in targets.TABLES:

    rule:
        name:
            f"table_{name}"
        input:
            f"{RUN}/targets/{name}/table/{name}.md",
        localrule: True


for name in targets.FIGURES:

    rule:
        name:
            f"figure_{name}"
        input:
            f"{RUN}/targets/{name}/figure/{name}.png",
        localrule: True
