"""Perplexity and zero-shot accuracy of every cell. Finished texts and tasks survive an interruption."""


rule evaluate:
    input:
        unpack(evaluate_inputs),
    output:
        record=f"{RUN}/{{cell}}/evaluate/record.json",
        per_item=f"{RUN}/{{cell}}/evaluate/items.parquet",
    log:
        f"{LOGS}/{{cell}}/evaluate.log",
    benchmark:
        f"{LOGS}/{{cell}}/evaluate.tsv"
    conda:
        ENVIRONMENT
    threads: EXPERIMENT.threads
    resources:
        **cluster_resources("evaluate"),
        gpu=GPUS,
        # Finished texts and tasks are kept.
        requeues=5,
    params:
        options=evaluate_options,
        key=lambda wildcards: CELLS[wildcards.cell].key("evaluate"),
        directory=subpath(output.record, parent=True),
        state=f"{STATE}/evaluate",
    shell:
        "python -m patch evaluate --model {input.model} {params.options}"
        " --threads {threads} --key {params.key} --state {params.state} --output {params.directory} > {log} 2>&1"
