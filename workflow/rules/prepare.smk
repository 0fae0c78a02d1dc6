"""Models, tokens and questions: everything that may need a network, before anything that needs a GPU."""


localrules:
    prepare,


# All that may need a network, for clusters whose nodes have none: run this first where there is one.
rule prepare:
    input:
        network_files(),


rule prepare_model:
    output:
        f"{RUN}/{{model}}/model.json",
    log:
        f"{LOGS}/{{model}}/prepare_model.log",
    benchmark:
        f"{LOGS}/{{model}}/prepare_model.tsv"
    conda:
        ENVIRONMENT
    resources:
        **cluster_resources("prepare"),
    params:
        options=prepare_model_options,
    shell:
        "python -m patch prepare model {params.options} --output {output} > {log} 2>&1"


rule prepare_calibration:
    input:
        model=f"{RUN}/{{model}}/model.json",
    output:
        f"{RUN}/{{model}}/tokens/calibration-seed-{{seed}}.safetensors",
    log:
        f"{LOGS}/{{model}}/calibration-seed-{{seed}}.log",
    benchmark:
        f"{LOGS}/{{model}}/calibration-seed-{{seed}}.tsv"
    conda:
        ENVIRONMENT
    resources:
        **cluster_resources("prepare"),
    params:
        options=calibration_options,
        code=code_hash("prepare"),
    shell:
        "python -m patch prepare tokens --model {input.model} {params.options} --output {output} > {log} 2>&1"


# Text from a data set is only tokenised; text of the source "self" is written by the model, which wants a GPU.
rule prepare_training:
    input:
        model=f"{RUN}/{{model}}/model.json",
    output:
        f"{RUN}/{{model}}/tokens/training.safetensors",
    log:
        f"{LOGS}/{{model}}/training.log",
    benchmark:
        f"{LOGS}/{{model}}/training.tsv"
    conda:
        ENVIRONMENT
    resources:
        **cluster_resources("generate" if EXPERIMENT.training.generated else "prepare"),
        gpu=GPUS * EXPERIMENT.training.generated,
    params:
        options=training_options,
        code=code_hash("prepare"),
    shell:
        "python -m patch prepare tokens --model {input.model} {params.options} --output {output} > {log} 2>&1"


rule prepare_documents:
    input:
        model=f"{RUN}/{{model}}/model.json",
    output:
        f"{RUN}/{{model}}/tokens/documents.safetensors",
    log:
        f"{LOGS}/{{model}}/documents.log",
    benchmark:
        f"{LOGS}/{{model}}/documents.tsv"
    conda:
        ENVIRONMENT
    resources:
        **cluster_resources("prepare"),
    params:
        options=documents_options,
        code=code_hash("prepare"),
    shell:
        "python -m patch prepare tokens --model {input.model} {params.options} --output {output} > {log} 2>&1"


rule prepare_text:
    input:
        model=f"{RUN}/{{model}}/model.json",
    output:
        f"{RUN}/{{model}}/tokens/text-{{text}}.safetensors",
    log:
        f"{LOGS}/{{model}}/text-{{text}}.log",
    benchmark:
        f"{LOGS}/{{model}}/text-{{text}}.tsv"
    wildcard_constraints:
        text="|".join(EXPERIMENT.evaluation.perplexity) or "none",
    conda:
        ENVIRONMENT
    resources:
        **cluster_resources("prepare"),
    params:
        options=perplexity_options,
        code=code_hash("prepare"),
    shell:
        "python -m patch prepare tokens --model {input.model} {params.options} --output {output} > {log} 2>&1"


rule prepare_tasks:
    output:
        f"{RUN}/tasks.json",
    log:
        f"{LOGS}/prepare_tasks.log",
    benchmark:
        f"{LOGS}/prepare_tasks.tsv"
    conda:
        ENVIRONMENT
    resources:
        **cluster_resources("prepare"),
    params:
        options=shlex.join(task_names()),
    shell:
        "python -m patch prepare tasks {params.options} --output {output} > {log} 2>&1"


# Where a published mask lies, after downloading it.
rule prepare_released:
    output:
        f"{RUN}/{{cell}}/released.json",
    log:
        f"{LOGS}/{{cell}}/released.log",
    benchmark:
        f"{LOGS}/{{cell}}/released.tsv"
    conda:
        ENVIRONMENT
    resources:
        **cluster_resources("prepare"),
    params:
        options=released_options,
    shell:
        "python -m patch prepare released {params.options} --output {output} > {log} 2>&1"
