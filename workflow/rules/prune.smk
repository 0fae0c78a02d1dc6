"""One-shot pruning: a MaskSet per cell.

A job per cell, although `prune` can make several masks in one pass: Snakemake would delete or redo all of a job's masks
when one of them fails or changes.
"""


rule prune:
    input:
        model=cell_model,
        calibration=calibration_tokens,
        released=released_mask,
    output:
        mask=f"{RUN}/{{cell}}/prune/mask.safetensors",
        record=f"{RUN}/{{cell}}/prune/record.json",
    log:
        f"{LOGS}/{{cell}}/prune.log",
    benchmark:
        f"{LOGS}/{{cell}}/prune.tsv"
    # Before evaluations: learning waits for these masks.
    priority: 5
    conda:
        ENVIRONMENT
    threads: EXPERIMENT.threads
    resources:
        **cluster_resources("prune"),
        gpu=GPUS,
    params:
        options=prune_options,
        key=lambda wildcards: CELLS[wildcards.cell].key("prune"),
        directory=subpath(output.record, parent=True),
    shell:
        "python -m patch prune --model {input.model} {params.options}"
        " --threads {threads} --key {params.key} --output {params.directory} > {log} 2>&1"
