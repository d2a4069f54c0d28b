"""However ranks share the work, they train and validate as one rank with all sequences does."""

from dataclasses import replace
from functools import cache
from unittest.mock import patch

import pytest
import torch
from helpers import ring_attention  # noqa: F401
from helpers.launches import in_group
from helpers.models import build
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.distributed import utils as dist_utils

from torchtitan_ext.jobs.job_file import parse_job
from torchtitan_ext.model import flavors
from torchtitan_ext.train.trainer import LighthouseTrainer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STEPS, SEQUENCES, SEQ_LEN = 2, 8, 256  # sequences per step
SETTINGS = [
    *("--checkpoint.no_enable", f"--training.seq_len={SEQ_LEN}", f"--training.global_batch_size={SEQUENCES}"),
    *("--lighthouse.top_k=16", "--lighthouse.tile_winners=4", "--lighthouse.dense_layers", "0"),
    *("--metrics.log_freq=1", "--metrics.no_enable_tensorboard", "--training.max_norm=0.1"),
    *("--validation.enable", "--validation.dataset=passkey", "--validation.dataset_path=255"),
    *(f"--validation.seq_len={SEQ_LEN}", "--validation.steps=1", f"--training.steps={STEPS}"),
]
BALANCED = "--parallelism.context_parallel_load_balancer headtail"
RING = f"{BALANCED} --parallelism.context_parallel_rotate_method alltoall"
COMPILED = "--compile.enable --compile.backend=aot_eager"
FOUR = {  # ranks that replicate, shard and share sequences, and other settings
    "replicas": (4, 1, 1, ""),
    "compiled replicas": (4, 1, 1, COMPILED),
    "replicas reduced once per step": (4, 1, 1, "--parallelism.fsdp_no_sync"),
    "replicas with a fused output": (4, 1, 1, "--loss.fuse_output"),
    "shards with a fused output": (1, 4, 1, "--loss.fuse_output"),
    "replicated shards": (2, 2, 1, "--parallelism.fsdp_no_sync --parallelism.fsdp_reshard_after_forward never"),
    "replicas that share sequences": (2, 1, 2, ""),
    "shards that share sequences": (1, 2, 2, ""),
    "balanced sequences": (1, 2, 2, BALANCED),
    "compiled sequences": (2, 1, 2, f"{BALANCED} {COMPILED}"),
    "rings that share sequences": (1, 2, 2, RING),
    "compiled rings": (1, 2, 2, f"{RING} {COMPILED}"),
    "split layers": (1, 2, 1, "--parallelism.tensor_parallel_degree 2"),
    "compiled split layers": (1, 2, 1, f"--parallelism.tensor_parallel_degree 2 {COMPILED}"),
    "pipelined shards": (1, 2, 1, "--parallelism.pipeline_parallel_degree 2 --training.local_batch_size 4"),
    "tied replicas": (4, 1, 1, "--model.flavor tied"),
    "tied shards": (1, 4, 1, "--model.flavor tied --parallelism.fsdp_reshard_after_forward always"),
    "tied shards with a fused output": (2, 2, 1, "--model.flavor tied --loss.fuse_output --parallelism.fsdp_no_sync"),
    "tied shards that share sequences": (1, 2, 2, "--model.flavor tied --parallelism.fsdp_reshard_after_forward never"),
}
EIGHT = {"eight shards": (1, 8, 1, ""), "eight shards that share sequences": (1, 4, 2, "")}
GROUPS = {1: {"alone": (1, 1, 1, ""), "tied": (1, 1, 1, "--model.flavor tied")}, 4: FOUR, 8: EIGHT}
WAYS = [*FOUR, *(pytest.param(way, marks=pytest.mark.eight) for way in EIGHT)]


def batches(step, rank, degree, size=1):
    """A rank's of a step, of which the labels that count are unequally many."""
    g = torch.Generator().manual_seed(step)
    tokens = torch.randint(256, (SEQUENCES, SEQ_LEN), generator=g)
    counted = torch.arange(SEQ_LEN) < SEQ_LEN // torch.arange(1, SEQUENCES + 1).unsqueeze(1)
    labels = tokens.roll(-1, 1).where(counted, IGNORE_INDEX)
    shares = (part[rank::degree].contiguous().split(size) for part in (tokens, labels))
    return [({"input": tokens}, labels) for tokens, labels in zip(*shares, strict=True)]


def train_each_way(rank, ways, folder):
    n_ranks = torch.distributed.get_world_size()
    flavors["tied"] = replace(flavors["debug"], n_heads=4, n_kv_heads=2, enable_weight_tying=True)
    degrees = ("data_parallel_replicate", "data_parallel_shard", "context_parallel")
    for name, (*sizes, settings) in ways.items():
        torch._dynamo.reset()
        arguments = [f"--parallelism.{degree}_degree={size}" for degree, size in zip(degrees, sizes, strict=True)]
        arguments += [*SETTINGS, *settings.split(), f"--job.dump_folder={folder}"]
        with patch.object(dist_utils, "init_distributed", lambda *_, **__: n_ranks):
            trainer = LighthouseTrainer(parse_job("configs/text/stage1.toml", arguments))
        start = build(flavors[trainer.job_config.model.flavor])
        # shards would start from other random numbers; a pipeline's stage has some of the layers
        whole = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(trainer.model_parts[0], start.state_dict(), options=whole)
        mesh, logged, validated = trainer.parallel_dims.get_optional_mesh("batch"), [], []
        share = (mesh.get_local_rank(), mesh.size()) if mesh else (0, 1)
        metrics = trainer.metrics_processor
        metrics.log_validation = lambda loss, step, to=validated: to.append(loss)
        metrics.log = lambda *values, to=logged, **_: to.append(values)
        for trainer.step in range(1, STEPS + 1):
            trainer.train_step(iter(batches(trainer.step, *share, trainer.job_config.training.local_batch_size)))
        for size in (1, 2, 4, 8) if n_ranks == 1 else (SEQUENCES // share[1],):
            trainer.validator.validation_dataloader = batches(0, *share, size)
            trainer.validator.validate(trainer.model_parts, 0)
        if rank == n_ranks - 1:  # on the last stage
            torch.save((logged, validated), folder / f"{name}.pt")
        trainer.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Gives, by name, what each step logged, and the losses of validation."""
    folder = tmp_path_factory.mktemp("degrees")
    train = cache(lambda n_ranks: in_group(train_each_way, n_ranks, GROUPS[n_ranks], folder))

    def run(way):
        [train(n_ranks) for n_ranks, ways in GROUPS.items() if way in ways]
        return torch.load(folder / f"{way}.pt")

    return run


@pytest.mark.parametrize("way", WAYS)
def test_all_ways_to_share_the_work_train_the_same(run, way):
    (alone, _), (logged, _) = run("tied" if "tied" in way else "alone"), run(way)
    assert len(alone) == STEPS and all(norm > 0.1 for *_, norm in alone)  # clipped
    for values, expected in zip(logged, alone, strict=True):
        assert values[1] == pytest.approx(expected[1], rel=1e-5)
        assert values[3] == pytest.approx(expected[3], rel=1e-4)


@pytest.mark.parametrize("way", ["alone", *WAYS])
def test_a_validation_loss_depends_on_the_documents_alone(run, way):
    """In batches of any size on any ranks, where documents have unequally many labels that count."""
    (_, [loss, *_]), (_, validated) = run("tied" if "tied" in way else "alone"), run(way)
    assert validated == pytest.approx([loss] * len(validated), rel=1e-6)
