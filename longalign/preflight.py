"""Checks before long work starts: disk, memory, the data's tokenizer, the model's context, the run folder."""

from __future__ import annotations

from math import gcd
from pathlib import Path
from typing import Any

import torch

from longalign.data.plan import read_data
from longalign.errors import UserError
from longalign.files import human, require_disk
from longalign.model.cost import shape_of
from longalign.model.load import load_config, load_tokenizer, resolve_dtype, tokenizer_hash
from longalign.model.offload import free_host_memory
from longalign.model.rope import context_warning
from longalign.progress import warn
from longalign.schema import Config
from longalign.train.answers import questions_of
from longalign.train.heldout import heldout_packs


def count_parameters(config: Config) -> int:
    from transformers import AutoModelForCausalLM

    hf = load_config(config)
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(hf).parameters())


def check_sequence_parallel(config: Config) -> None:
    """Raises UserError if the processes of a host, or the model's query heads, cannot be shared out."""
    degree, processes = config.cluster.sequence_parallel, int(config.cluster.processes)
    if degree == 1:
        return
    heads = shape_of(load_config(config))["heads"]
    if processes % degree or heads % degree:
        allowed = [str(n) for n in range(1, gcd(heads, processes) + 1) if gcd(heads, processes) % n == 0]
        raise UserError(
            f"cluster.sequence_parallel={degree} must divide cluster.processes={processes} and the model's {heads} "
            f"query heads; allowed: {', '.join(allowed)}"
        )


def memory_needs(config: Config, parameters: int) -> tuple[float, float]:
    """Bytes of (one device's, this host's) memory for weights, gradients and optimizer states; not activations.

    Bytes a parameter, w being 2 in bf16 and 4 in fp32; ZeRO shards states over ranks from stage 1 on, sums of gradients
    from 2, weights from 3. As DeepSpeed 0.19.8 allocates them when gradients are summed in fp32 (data_types); its
    runtime/zero/stage_1_and_2.py and stage3.py in brackets:

        weights w, sums of gradients 4
        states        two Adam moments 8, with ZeRO fp32 master weights 4
        with offload_optimizer the states are the host's, and beside them
          all stages  gradients as the host's optimizer takes them 4 (fp32_partition.grad)
          1 and 2     weights on their way back w (param_buffer_of_bit16_for_cpu_offload_groups)
          3           the sums (grad_partitions_flat_buffer); 2 in fp32, too (accumulated_grads_in_cpu)

    Not counted: buckets of communication, and that torch rounds pinned memory up to a power of two.
    """
    cluster, ranks, here = config.cluster, config.cluster.ranks, int(config.cluster.processes)
    working, stage = torch.finfo(resolve_dtype(config, cluster.device)).bits // 8, cluster.zero_stage
    shard = lambda from_stage: ranks if stage >= from_stage else 1
    weights, sums = working * parameters / shard(3), 4 * parameters / shard(2)
    states = (8 + 4 * (stage > 0)) * parameters / shard(1)
    on_host = weights * cluster.offload_param
    device = weights + sums + states - on_host
    assert cluster.offload_optimizer != "auto", "settle_offload comes first"
    if cluster.offload_optimizer:
        device -= states
        on_host += states + (4 + working * (stage < 3)) * parameters / shard(1)
        if stage == 3 or (stage == 2 and working == 4):
            device, on_host = device - sums, on_host + sums
    return (0.0, (device + on_host) * here) if cluster.device == "cpu" else (device, on_host * here)


STATES = 0.75  # of a GPU's memory, that weights, gradients and optimizer states may take
ANY_GPU = 80e9  # bytes, where a run is prepared on a machine without one


def settle_offload(config: Config, gpu_bytes: float | None = None) -> Config:
    """With cluster.offload_optimizer=auto settled: true if the GPU would else have little room for activations.

    gpu_bytes: of a GPU's memory; None is this machine's. Device, processes and nodes must be settled.
    """
    if config.cluster.offload_optimizer != "auto":
        return config
    with_it = lambda offload: config.model_copy(
        update={"cluster": config.cluster.model_copy(update={"offload_optimizer": offload})}
    )
    if config.cluster.device == "cpu" or config.cluster.zero_stage == 0:
        return with_it(False)
    if gpu_bytes is None:
        gpu_bytes = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else ANY_GPU
    return with_it(memory_needs(with_it(False), count_parameters(config))[0] > STATES * gpu_bytes)


def disk_needs(config: Config, steps: int, parameters: int) -> float:
    """Bytes of the checkpoints that a run of `steps` keeps, of the one being written, and of the exported model."""
    saved = (steps - 1) // config.save_every if config.save_every else 0
    milestones = (steps - 1) // config.keep_every if config.keep_every else 0
    kept = min(saved, config.keep_last + milestones) + 1
    weights = torch.finfo(resolve_dtype(config, config.cluster.device)).bits // 8
    return parameters * (12.0 * kept + weights)


def check_disk(config: Config, run: Path, steps: int, parameters: int) -> None:
    """Raises UserError if the disk cannot hold checkpoints and model (preflight=false only warns)."""
    stands = sum(file.stat().st_size for file in run.glob("checkpoints/step-*/*"))
    try:
        require_disk(run, disk_needs(config, steps, parameters) - stands, "output_dir, or lower keep_last")
    except UserError as error:
        _refuse(config, str(error))


def check_memory(config: Config, parameters: int) -> None:
    """Raises UserError if host or GPU memory cannot hold weights and states (preflight=false only warns)."""
    if config.cluster.launcher in ("slurm", "torchrun"):
        return  # the run will be on other machines than this one
    device, host = memory_needs(config, parameters)
    if host > (free := free_host_memory()):
        _refuse(
            config,
            f"weights, gradients and optimizer states need {human(host)} of memory, {human(free)} are free here; "
            "use more machines, a higher cluster.zero_stage or a smaller model",
        )
    gpu = config.cluster.device == "cuda" and torch.cuda.is_available()
    if gpu and device > (have := torch.cuda.get_device_properties(0).total_memory):
        _refuse(
            config,
            f"weights, gradients and optimizer states need {human(device)} on each GPU, which has {human(have)}; "
            "set cluster.zero_stage=3, cluster.offload_optimizer=true, or use more GPUs",
        )


def _refuse(config: Config, problem: str) -> None:
    if config.preflight:
        raise UserError(f"{problem} (preflight=false starts anyway)")
    warn(problem)


def check_data(config: Config) -> dict[str, Any]:
    """The data's manifest. Raises UserError if another tokenizer made it; warns of what is allowed but doubtful."""
    _, data = read_data(config.data_dir)
    check_tokenizer(config, data)
    if config.eval_every and "heldout" in config.eval_tasks:
        heldout_packs(config)
    if config.eval_every:
        questions_of(config)
    elif config.eval_tasks != ["heldout"]:
        raise UserError(f"eval_tasks={config.eval_tasks} needs the steps between evaluations: eval_every=200")
    if message := context_warning(load_config(config), config.max_length, config.model.rope.theta):
        warn(message)
    return data


def check_tokenizer(config: Config, data: dict[str, Any]) -> None:
    """Raises UserError if another tokenizer than the model's made the data of this manifest."""
    if tokenizer_hash(load_tokenizer(config)) != data["tokenizer_hash"]:
        raise UserError(
            f"data_dir={config.data_dir} was tokenised with {data['tokenizer']}, whose ids are not those of "
            f"model.tokenizer={config.model.tokenizer}; run `longalign tokenize` for this model"
        )


def check_run_folder(run: Path, config: Config) -> None:
    """Raises UserError if output_dir holds something this run must not touch."""
    if run.is_file():
        raise UserError(f"output_dir={run} is a file; give a folder")
    if not run.is_dir() or not any(run.iterdir()):
        return
    if not (run / "config.yaml").is_file() or not (run / "plan").is_dir():
        raise UserError(f"output_dir={run} holds something else (no run of ours); give another folder")
    elsewhere = config.resume not in ("none", "auto") and run not in Path(config.resume).parents
    if elsewhere or (config.resume == "none" and not config.overwrite):
        raise UserError(f"output_dir={run} holds a run; resume=auto continues it, overwrite=true starts it over")
