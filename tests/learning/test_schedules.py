import pytest
import torch
import transformers

from patch.learning.schedules import MaskSchedule
from patch.methods import MaskLLM, PatchJoint, PatchTile


def test_learning_rate_is_that_of_transformers_cosine_schedule() -> None:
    schedule = MaskSchedule(PatchJoint(steps=40, warmup_steps=5, learning_rate=0.3), 0.45)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = transformers.get_cosine_schedule_with_warmup(optimizer, 5, 40)
    for step in range(40):
        assert schedule.learning_rate(step) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_scale_and_temperature_are_linear_and_the_last_step_stops_short_of_the_end() -> None:
    schedule = MaskSchedule(PatchTile(steps=100), 0.45)
    assert schedule.tiles(0).scale == 100
    assert schedule.tiles(50).scale == pytest.approx(300)
    assert schedule.tiles(99).scale == pytest.approx(496)
    assert schedule.tiles(99).temperature == pytest.approx(2 - 0.99 * 1.95)


@pytest.mark.parametrize(("sparsity", "start"), [(0.45, 4.0), (0.35, 2.0), (0.25, 2.0)])
def test_tile_temperature_of_patch_joint_starts_where_the_paper_says(sparsity: float, start: float) -> None:
    assert MaskSchedule(PatchJoint(), sparsity).tiles(0).temperature == start
    assert MaskSchedule(PatchTile(), sparsity).tiles(0).temperature == 2.0
    assert MaskSchedule(PatchJoint(tile_temperature=(3.0, 1.0)), sparsity).tiles(0).temperature == 3.0


def test_norm_term_fades_to_nothing_unless_told_otherwise() -> None:
    assert MaskSchedule(PatchJoint(steps=10), 0.45).norm_weight(5) == pytest.approx(5.0)
    assert MaskSchedule(PatchJoint(steps=10, norm_decay=False), 0.45).norm_weight(9) == 10.0


def test_papers_hyper_parameters_are_the_defaults() -> None:
    joint, tile, maskllm = PatchJoint(), PatchTile(), MaskLLM()
    assert (joint.learning_rate, joint.density_weight, joint.norm_weight) == (1e-3, 7, 10)
    assert (joint.tile_scale, joint.pattern_scale, joint.pattern_temperature) == ((25, 350), (100, 500), (4, 0.05))
    assert (tile.learning_rate, tile.density_weight, tile.norm_weight, tile.tile_scale) == (1e-4, 3, 0.1, (100, 500))
    assert (maskllm.learning_rate, maskllm.weight_decay, maskllm.norm_weight) == (1e-4, 0.1, 1e-5)
    assert {(m.steps, m.batch_size, m.betas, m.warmup_steps) for m in (joint, tile, maskllm)} == {
        (2000, 256, (0.9, 0.95), 5)
    }
