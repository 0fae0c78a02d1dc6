"""The official repository's Quick Start, on the embedded model: prune, learn a PATCH-Joint mask, evaluate.

    python examples/quickstart.py

Differences from the official text: no `sys.path` lines, `get_llm` comes from `patch`, the embedded model and texts take
the place of the hub's, and the schedule is short, so that it ends in minutes on a CPU. On a GPU with hub access,
`model_name = "facebook/opt-125m"` and the lines marked "short" deleted give the official run.
"""

import tempfile

from transformers import AutoTokenizer

from patch import embedded, get_llm
from patch.fine_tune_mask import learn_mask
from patch.utils import evaluate, prepare_pruned_model

model_name = str(embedded.model_directory("embedded:smollm2-135m"))
checkpoint_name = tempfile.mkdtemp()

model, lm_eval_model = get_llm(
    model_name=model_name,
)
model.eval()
tokenizer = AutoTokenizer.from_pretrained(
    model_name,
    use_fast=False,
)

one_shot_args = {
    "prune_method": "wanda",
    "sparsity_type": "2:4",
    "sparsity_ratio": 0.5,
    "nsamples": 8,  # short: 128
    "calibration_length": 256,  # short
    "calibration_sampling": "packed",  # short
    "maskllm_checkpoint": None,
    "optimizer_FT_pruning": "adamw_torch",
    "calibration_dataset": "embedded:c4",  # c4
    "eval_dataset": "wikitext2",
    "shift_zero_metrics": False,
    "fine_tune": False,
}

target_sparsity_ratio = 0.45
mask_tile_size = (128, 128)

compressed_model = prepare_pruned_model(
    model,
    tokenizer,
    checkpoint_name,
    prune_args=one_shot_args,
    mask_tile_size=mask_tile_size,
    target_sparsity_ratio=target_sparsity_ratio,
)

learnable_args = {
    "learnable_mask": True,
    "mask_tile_size": mask_tile_size,
    "grad_checkpoint": True,
    "local_bs": 1,
    "optimizer": "adamw_torch",
    "fine_tuning_sequence_length": 256,  # short: 4096
    "steps": 2,  # short: 2000
    "batch_size": 1,  # short: 256
    "dataset": "embedded:wikipedia",  # slimpajama
    "target_sparsity_ratio": target_sparsity_ratio,
    "lr": 1e-3,
    "sparse_reg": 7,
    "weight_reg": 10.0,
    "temp_schedule_2_4": [4.0, 0.05],
    "scaler_schedule_2_4": [100.0, 500.0],
    "hard_2_4": False,
    "prior_strength_2_4": 3.0,
    "joint_optim": True,
    "temp_schedule_tile": [4.0, 0.05],
    "scaler_schedule_tile": [25.0, 350.0],
    "hard_tile": False,
    "prior_strength_tile": 3.0,
    "mask_llm": False,
    "layer_target": False,
}

model, lm_eval_model = learn_mask(
    model_name=model_name,
    compressed_model=compressed_model,
    tokenizer=tokenizer,
    mask_args=learnable_args,
)

ppl_test, lmharness_results = evaluate(
    model,
    lm_eval_model,
    tokenizer,
    evaluate_perplexity=True,
    eval_dataset="embedded:wikipedia",  # wikitext2
    eval_batch_size=1,
    test_lmharness=False,  # short: True
    length=512,  # short
)
print(  # noqa: T201
    f"perplexity {ppl_test:.2f}, sparsity {model.patch_mask.sparsity:.3f}, {lmharness_results}"
)
