"""4-bit weights after a mask or of the dense model, with adapters where asked for: a CompressedSet per cell."""


rule compress:
    input:
        unpack(compress_inputs),
    output:
        weights=f"{RUN}/{{cell}}/compress/compressed.safetensors",
        record=f"{RUN}/{{cell}}/compress/record.json",
    log:
        f"{LOGS}/{{cell}}/compress.log",
    benchmark:
        f"{LOGS}/{{cell}}/compress.tsv"
    conda:
        ENVIRONMENT
    threads: EXPERIMENT.threads
    resources:
        **cluster_resources("compress"),
        gpu=GPUS,
    params:
        options=compress_options,
        key=lambda wildcards: CELLS[wildcards.cell].key("compress"),
        directory=subpath(output.record, parent=True),
    shell:
        "python -m patch compress --model {input.model} {params.options}"
        " --threads {threads} --key {params.key} --output {params.directory} > {log} 2>&1"
