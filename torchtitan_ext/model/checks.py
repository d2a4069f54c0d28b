"""What would stop a job later, or lose its state in silence, found before anything is built."""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass
from math import gcd
from netrc import NetrcParseError, netrc
from operator import attrgetter
from typing import Any, get_type_hints

from torch._dynamo import list_backends
from torchtitan.components.tokenizer import build_hf_tokenizer
from torchtitan.config import JobConfig
from torchtitan.config.job_config import Training, Validation
from torchtitan.distributed import ParallelDims
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from torchtitan_ext.command_line import MOUNT, is_address
from torchtitan_ext.data import check_dataset
from torchtitan_ext.lighthouse.context_parallel import check_context_parallel
from torchtitan_ext.lighthouse.ulysses import check_heads
from torchtitan_ext.patching import NotPatched, PatchingError, check_patched

from .args import LighthouseModelArgs, flavors
from .checkpoints import checkpoint_problems, data_parallel_degree
from .optimizer import optimizer_problems


def check_job(job_config: JobConfig) -> None:
    """Raise one ValueError that lists every problem of this launch: field, value and remedy.

    Every rank reads the same files and comes to the same answer.
    """
    problems = [*patch_problems(), *job_problems(job_config, launched_ranks())]
    if problems:
        if is_address(folder := job_config.job.dump_folder):
            with suppress(OSError):  # torchtitan has made it for its traces already
                os.removedirs(os.path.join(folder, job_config.comm.save_traces_folder))
        raise ValueError("this job can't run as configured:\n- " + "\n- ".join(problems))


def launched_ranks() -> int | None:
    """The number of processes that this one was launched with; None where no launcher tells."""
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None


def patch_problems() -> Iterator[str]:
    """That torchtitan is as released, which stops or spoils a training."""
    try:
        check_patched()
    except NotPatched as error:
        yield str(error)
    except PatchingError:
        pass  # its owner has changed it further, or the patches stayed elsewhere; the preflight tells


def job_problems(job_config: JobConfig, n_ranks: int | None) -> list[str]:
    """Every problem of a launch on `n_ranks` processes; None leaves out what depends on their number."""
    if problems := list(_type_problems(job_config)) or list(_address_problems(job_config)):
        return problems
    if not hasattr(job_config, "lighthouse"):
        return [
            f"job.custom_config_module = {job_config.job.custom_config_module!r}: "
            "set it to 'torchtitan_ext.model.config', which adds the [lighthouse] section"
        ]
    problems = [
        *_number_problems(job_config),
        *_model_problems(job_config),
        *optimizer_problems(job_config),
        *_data_problems(job_config),
        *_wandb_problems(job_config),
    ]
    dims = None
    if n_ranks is not None:
        try:
            dims = parallel_dims(job_config, n_ranks)
        except ValueError as error:
            problems.append(str(error))
        else:
            problems += _batch_problems(job_config, dims)
    return [*problems, *checkpoint_problems(job_config, dims)]


def _type_problems(settings: Any, section: str = "") -> Iterator[str]:
    """The fields of a dataclass, and of those in it, that hold a value of another type than they declare."""
    hints = get_type_hints(type(settings))
    for field in fields(settings):
        name, value = f"{section}{field.name}", getattr(settings, field.name)
        hint = hints[field.name]
        if is_dataclass(value):
            yield from _type_problems(value, f"{name}.")
            continue
        try:
            check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
        except TypeCheckError:
            kind = hint.__name__ if type(hint) is type else str(hint).replace("typing.", "")
            yield f"{name} = {value!r}: must be of type {kind}"


def _address_problems(settings: Any, section: str = "") -> Iterator[str]:
    """The paths in a dataclass, and in those in it, that lead to no place on this machine."""
    for field in fields(settings):
        name, value = f"{section}{field.name}", getattr(settings, field.name)
        if is_dataclass(value):
            yield from _address_problems(value, f"{name}.")
        elif isinstance(value, str) and name.endswith(("folder", "path")) and is_address(value):
            yield f"{name} = {value!r} is no path on this machine: {MOUNT}"


def parallel_dims(job_config: JobConfig, n_ranks: int) -> ParallelDims:
    """How `n_ranks` processes share the work, as torchtitan will have it. Raises ValueError if they can't."""
    degrees = {
        name: getattr(job_config.parallelism, f"{field}_degree")
        for name, field in {
            "dp_replicate": "data_parallel_replicate",
            "dp_shard": "data_parallel_shard",
            "cp": "context_parallel",
            "tp": "tensor_parallel",
            "pp": "pipeline_parallel",
            "ep": "expert_parallel",
            "etp": "expert_tensor_parallel",
        }.items()
    }
    try:
        return ParallelDims(**degrees, world_size=n_ranks)
    except (AssertionError, ZeroDivisionError) as error:
        product = " x ".join(f"{name} {degrees[name]}" for name in list(degrees)[:5])
        raise ValueError(
            f"[parallelism] {product}: the degrees' product must be the number of ranks, {n_ranks}; "
            "parallelism.data_parallel_shard_degree = -1 takes what the other degrees leave"
        ) from error


def sequences_at_once(job_config: JobConfig, dims: ParallelDims) -> int:
    """How many sequences a microbatch of all ranks holds; a step may accumulate several."""
    return job_config.training.local_batch_size * data_parallel_degree(dims)


def _batch_problems(job_config: JobConfig, dims: ParallelDims) -> Iterator[str]:
    training, degree = job_config.training, data_parallel_degree(dims)
    at_once, wanted = sequences_at_once(job_config, dims), training.global_batch_size
    if wanted == 0 or (wanted > 0 and wanted % at_once):
        below = wanted // at_once * at_once
        yield (
            f"training.global_batch_size = {wanted}: must be a multiple of training.local_batch_size x "
            f"data-parallel degree = {training.local_batch_size} x {degree} = {at_once}; nearest: "
            + (f"{below} or {below + at_once}" if below else f"{at_once}")
        )
    for name, section in data_sections(job_config):
        if section.seq_len % dims.seq_len_divisor:
            yield (
                f"{name}.seq_len = {section.seq_len}: must be a multiple of {dims.seq_len_divisor} for a "
                f"context-parallel degree of {dims.cp} and a tensor-parallel degree of {dims.tp}"
            )


def _number_problems(job_config: JobConfig) -> Iterator[str]:
    """Numbers that training divides by, counts to or allocates, and would trip over."""
    smallest = {"training.steps": 0, "training.gc_freq": 1, "metrics.log_freq": 1}
    for name, _ in data_sections(job_config):
        smallest |= {f"{name}.seq_len": 1, f"{name}.local_batch_size": 1}
    if job_config.validation.enable:
        smallest["validation.freq"] = 1
    if job_config.checkpoint.enable:
        smallest["checkpoint.interval"] = 1
    for field, least in smallest.items():
        if (number := attrgetter(field)(job_config)) < least:
            yield f"{field} = {number}: must be {least} or more"
    if job_config.checkpoint.enable and job_config.checkpoint.keep_latest_k == 1:
        yield (
            "checkpoint.keep_latest_k = 1: the one would be deleted while the next may not be complete; "
            "use 2 or more, or 0 to keep all"
        )
    table, longest = job_config.training.seq_len, job_config.validation.seq_len
    if job_config.validation.enable and longest > table:
        yield (
            f"validation.seq_len = {longest}: the model's positions end at training.seq_len = {table}; "
            "use that at most"
        )
    profiling = job_config.profiling
    profiled = profiling.profiler_warmup + profiling.profiler_active
    if profiling.enable_profiling and profiling.profile_freq < profiled:
        yield (
            f"profiling.profile_freq = {profiling.profile_freq}: must be profiler_warmup + profiler_active = "
            f"{profiled} or more"
        )


def _model_problems(job_config: JobConfig) -> Iterator[str]:
    flavor, lighthouse = job_config.model.flavor, job_config.lighthouse
    if flavor not in flavors:
        yield f"model.flavor = {flavor!r} is unknown: choose one of {', '.join(flavors)}"
    else:
        yield from _head_problems(job_config, flavors[flavor])
        n_layers = flavors[flavor].n_layers
        bad = [i for i in lighthouse.dense_layers or () if not 0 <= i < n_layers]
        if bad:
            yield (
                f"lighthouse.dense_layers = {lighthouse.dense_layers}: {bad} out of range, "
                f"flavor {flavor} has layers 0 to {n_layers - 1}"
            )
    yield from _loss_problems(job_config)
    mode = job_config.activation_checkpoint.mode
    option = job_config.activation_checkpoint.selective_ac_option
    if mode not in (modes := ("none", "selective", "full", "memory_budget")):
        yield f"activation_checkpoint.mode = {mode!r}: choose one of {', '.join(modes)}"
    elif mode == "selective" and option != "op" and not option.isdecimal():
        yield (
            f"activation_checkpoint.selective_ac_option = {option!r}: use 'op', or a number n to "
            "recompute every n-th block"
        )
    compiled = job_config.compile
    compiles_model = compiled.enable and "model" in compiled.components
    if mode == "memory_budget" and not compiles_model:
        yield (
            "activation_checkpoint.mode = 'memory_budget': the compiler keeps to the budget; set compile.enable to "
            "true, with 'model' in compile.components"
        )
    if compiled.enable and compiled.backend not in (backends := list_backends(exclude_tags=())):
        yield f"compile.backend = {compiled.backend!r}: choose one of {', '.join(backends)}"
    degree = job_config.parallelism.context_parallel_degree
    balancer = job_config.parallelism.context_parallel_load_balancer
    if degree > 1 and balancer not in ("headtail", None):
        yield (
            f"parallelism.context_parallel_load_balancer = {balancer!r}: attention is 'sdpa', for which "
            "torchtitan has 'headtail' alone; use that or None"
        )
    method = job_config.parallelism.context_parallel_rotate_method
    if degree > 1 and method == "alltoall" and balancer is None and compiles_model:
        yield (
            f"parallelism.context_parallel_rotate_method = {method!r}: without a load balancer each rank compiles "
            "another graph, and from torch 2.14 on they wait for each other forever; set "
            "parallelism.context_parallel_load_balancer to 'headtail', or compile.enable to false"
        )
    if not lighthouse.enable:
        return
    for name, section in data_sections(job_config):
        try:
            if degree > 1:
                check_context_parallel(lighthouse, section.seq_len, degree, balancer is not None)
            else:
                lighthouse.check_seq_len(section.seq_len)
        except ValueError as error:
            yield f"[lighthouse] on [{name}]: {error}"


def _head_problems(job_config: JobConfig, args: LighthouseModelArgs) -> Iterator[str]:
    parallelism = job_config.parallelism
    shards, degree = parallelism.tensor_parallel_degree, parallelism.context_parallel_degree
    n_heads, n_kv_heads = args.n_heads, args.n_kv_heads or args.n_heads
    if shards < 1:
        return  # named with the other degrees
    common = gcd(n_heads, n_kv_heads)
    if common % shards:
        fitting = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        yield (
            f"parallelism.tensor_parallel_degree = {shards}: must divide {n_heads} heads and {n_kv_heads} KV heads; "
            f"use one of {fitting}"
        )
    elif degree > 1 and parallelism.context_parallel_rotate_method == "allgather":
        try:
            check_heads(n_heads // shards, n_kv_heads // shards, degree)
        except ValueError as error:
            yield (
                f"parallelism.context_parallel_degree = {degree}: {error}; or set "
                "parallelism.context_parallel_rotate_method to 'alltoall', torch's ring attention"
            )


def data_sections(job_config: JobConfig) -> Iterator[tuple[str, Training | Validation]]:
    """The sections that say what sequences this job reads, by name."""
    yield "training", job_config.training
    if job_config.validation.enable:
        yield "validation", job_config.validation


def _loss_problems(job_config: JobConfig) -> Iterator[str]:
    if not job_config.loss.fuse_output:
        return
    dims = job_config.parallelism
    for field in ("tensor_parallel_degree", "pipeline_parallel_degree"):
        if getattr(dims, field) > 1:
            yield (
                f"parallelism.{field} = {getattr(dims, field)}: loss.fuse_output needs the whole output "
                "projection beside the loss; set one of the two back (1, or false)"
            )
    if dims.fsdp_reshard_after_forward == "always":
        yield (
            "parallelism.fsdp_reshard_after_forward = 'always': the output projection would be gone when "
            "the loss needs it; use 'default' or 'never', or set loss.fuse_output to false"
        )


def build_tokenizer(job_config: JobConfig) -> Any:
    """torchtitan's tokenizer of this job. Raises ValueError where its files don't make one."""
    try:
        return build_hf_tokenizer(job_config)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the tokenizers library raises bare Exceptions, and panics
        raise ValueError(str(error)) from error


def _wandb_problems(job_config: JobConfig) -> Iterator[str]:
    """Why W&B couldn't start, without which torchtitan trains on. Rank 0 speaks for all."""
    if not job_config.metrics.enable_wandb or int(os.environ.get("RANK", 0)):
        return
    try:
        import wandb

        settings = wandb.setup().settings  # wandb.login() would ask the server
        wandb.teardown()
    except Exception as error:  # whatever its settings spell
        yield f"metrics.enable_wandb = true: W&B can't start ({error}); correct that, or set it to false"
        return
    has_key = settings.identity_token_file or len(settings.api_key or "") >= 40
    with suppress(OSError, NetrcParseError):
        logins = netrc(os.path.expanduser(os.environ.get("NETRC", "~/.netrc"))).hosts.values()
        has_key = has_key or "user" in {name for name, *_ in logins}  # as W&B's are called
    if not has_key and settings.mode not in ("offline", "dryrun", "disabled"):
        yield (
            "metrics.enable_wandb = true: W&B has no whole API key on this machine; call `wandb login`, set "
            "WANDB_API_KEY, or set WANDB_MODE=offline to record locally"
        )


def _spelled_tokens(tokenizer: Any) -> list[str]:
    """The special tokens that a document can spell, because the model's own vocabulary holds their strings."""
    tokenizer.tokenizer.encode_special_tokens = True  # as documents are encoded
    tokenizer.tokenizer.no_padding()
    unknown = (tokenizer.config or {}).get("unk_token")  # which any text may be
    return [
        token.content
        for index, token in tokenizer.tokenizer.get_added_tokens_decoder().items()
        if token.special
        if token.content != unknown or index in (tokenizer.bos_id, tokenizer.eos_id)
        if index in tokenizer.tokenizer.encode(token.content, add_special_tokens=False).ids
    ]


def _data_problems(job_config: JobConfig) -> Iterator[str]:
    path, flavor = job_config.model.hf_assets_path, job_config.model.flavor
    try:
        tokenizer = build_tokenizer(job_config)
        for change in ("truncation", "padding"):
            if setting := getattr(tokenizer.tokenizer, change):
                yield (
                    f"model.hf_assets_path = {path!r}: its tokenizer.json sets {change}, {setting}, which would change "
                    "every document; set it to null there"
                )
        # Ids may leave gaps, and beyond the embeddings a GPU fails amid a step.
        ids = tokenizer.get_vocab().values()
        vocab_size = max(ids, default=-1) + 1
        if flavor in flavors and vocab_size > flavors[flavor].vocab_size:
            yield (
                f"model.hf_assets_path = {path!r}: its token ids go to {vocab_size - 1}, beyond the "
                f"{flavors[flavor].vocab_size} embeddings of model.flavor = {flavor!r}; "
                "choose a larger flavor or a smaller tokenizer"
            )
        elif tokenizer.bos_id is None and tokenizer.eos_id is None:
            yield (
                f"model.hf_assets_path = {path!r}: documents would run into each other, because the tokenizer has no "
                "token that begins or ends one; name it as bos_token or eos_token in tokenizer_config.json there"
            )
        elif spelled := _spelled_tokens(tokenizer):
            yield (
                f"model.hf_assets_path = {path!r}: a document that spells {' or '.join(spelled)} would get that control token, "
                f"because the {type(tokenizer.tokenizer.model).__name__} model in tokenizer.json can choose it for text; "
                "lower its score there below all others', or use a BPE tokenizer"
            )
    except Exception as error:  # bare ones of the tokenizers library
        yield (
            f"model.hf_assets_path = {path!r}: no tokenizer there ({error}); "
            f"give the folder that holds tokenizer.json (a relative path counts from {os.getcwd()})"
        )
    for name, section in data_sections(job_config):
        if (workers := section.dataloader.num_workers) not in (0, 1):
            yield (
                f"{name}.dataloader.num_workers = {workers}: use 0 or 1, because several workers would read the "
                "same files, and resume in another order"
            )
        ready = section.dataloader.prefetch_factor
        if ready is not None and ready < 1:
            yield f"{name}.dataloader.prefetch_factor = {ready}: must be 1 or more"
        try:
            check_dataset(section.dataset, section.dataset_path)
        except ValueError as error:
            yield str(error).replace("training.dataset", f"{name}.dataset")
