"""Learning masks and training weights: a MaskSet per cell, from other masks and much text. Resumes from its last saved
state."""


rule learn:
    input:
        unpack(prior_masks),
        model=cell_model,
        training=training_tokens,
    output:
        mask=f"{RUN}/{{cell}}/learn/mask.safetensors",
        record=f"{RUN}/{{cell}}/learn/record.json",
        curves=f"{RUN}/{{cell}}/learn/curves.parquet",
    log:
        f"{LOGS}/{{cell}}/learn.log",
    benchmark:
        f"{LOGS}/{{cell}}/learn.tsv"
    # The longest jobs, and others wait for their masks.
    priority: 10
    conda:
        ENVIRONMENT
    threads: EXPERIMENT.threads
    resources:
        **learning_resources(),
        # Saves its state when it is told to stop: a time limit is no end.
        requeues=50,
    params:
        options=learn_options,
        key=lambda wildcards: CELLS[wildcards.cell].key("learn"),
        directory=subpath(output.record, parent=True),
        state=f"{STATE}/learn",
    shell:
        "python -m patch learn --model {input.model} {params.options}"
        " --nodes {resources.nodes} --processes {resources.gpu}"
        " --threads {threads} --key {params.key} --state {params.state} --output {params.directory} > {log} 2>&1"
