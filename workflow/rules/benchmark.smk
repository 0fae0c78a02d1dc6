"""Timings and sizes: a table per benchmark, of random tiles at a model's shapes and of the masks of cells. Each job has a
GPU to itself; where it finds other processes on it, it fails instead of timing them too.
"""


localrules:
    benchmarks,
    benchmark_table,


rule benchmarks:
    input:
        expand(f"{RUN}/benchmarks/{{benchmark}}.csv", benchmark=BENCHMARKS),


rule benchmark_table:
    input:
        benchmark_parts,
    output:
        f"{RUN}/benchmarks/{{benchmark}}.csv",
    log:
        f"{LOGS}/benchmarks/{{benchmark}}.log",
    benchmark:
        f"{LOGS}/benchmarks/{{benchmark}}.tsv"
    wildcard_constraints:
        benchmark="[a-z]+",
    conda:
        ENVIRONMENT
    shell:
        "python -m patch benchmark join {input} --output {output} > {log} 2>&1"


rule benchmark_random:
    output:
        rows=f"{RUN}/benchmarks/{{benchmark}}/random/{{shape}}/rows.csv",
        record=f"{RUN}/benchmarks/{{benchmark}}/random/{{shape}}/record.json",
    log:
        f"{LOGS}/benchmarks/{{benchmark}}/random/{{shape}}.log",
    benchmark:
        f"{LOGS}/benchmarks/{{benchmark}}/random/{{shape}}.tsv"
    wildcard_constraints:
        benchmark="[a-z]+",
        shape="[^/]+",
    # After what others wait for.
    priority: -5
    conda:
        ENVIRONMENT
    threads: EXPERIMENT.threads
    resources:
        **cluster_resources("benchmark"),
        gpu=all_gpus(),
    params:
        options=random_benchmark_options,
        key=benchmark_key,
    shell:
        "python -m patch benchmark --exclusive --key {params.key} {wildcards.benchmark} {params.options}"
        " --output {output.rows} > {log} 2>&1"


rule benchmark_mask:
    input:
        unpack(mask_benchmark_inputs),
    output:
        rows=f"{RUN}/benchmarks/{{benchmark}}/masks/{{cell}}/rows.csv",
        record=f"{RUN}/benchmarks/{{benchmark}}/masks/{{cell}}/record.json",
    log:
        f"{LOGS}/benchmarks/{{benchmark}}/masks/{{cell}}.log",
    benchmark:
        f"{LOGS}/benchmarks/{{benchmark}}/masks/{{cell}}.tsv"
    wildcard_constraints:
        benchmark="[a-z]+",
    priority: -5
    conda:
        ENVIRONMENT
    threads: EXPERIMENT.threads
    resources:
        **cluster_resources("benchmark"),
        gpu=all_gpus(),
    params:
        options=mask_benchmark_options,
        key=benchmark_key,
    shell:
        "python -m patch benchmark --exclusive --key {params.key} {wildcards.benchmark} {params.options}"
        " --output {output.rows} > {log} 2>&1"
