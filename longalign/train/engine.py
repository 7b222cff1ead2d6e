"""From a Config to a DeepSpeed engine, and the learning rate of a step."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import math
from collections.abc import Iterable, Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_modules
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from longalign.model import attention, kernels, ulysses
from longalign.model.activations import Activations, resolve_policy
from longalign.model.load import load_model, loads_weights, resolve_dtype
from longalign.model.loss import WeightedLoss
from longalign.model.rope import check_inv_freq, restore_inv_freq
from longalign.schema import Config
from longalign.train.state import make_moments


def learning_rate(step: int, n_steps: int, config: Config) -> float:
    """Linear warm-up over warmup_ratio of the steps, then a cosine from lr to lr_final at the last. Steps from 1."""
    warmup = math.ceil(config.warmup_ratio * n_steps)
    if step <= warmup:
        return config.lr * step / warmup
    done = (step - warmup) / max(n_steps - warmup, 1)
    return config.lr_final + (config.lr - config.lr_final) * (1 + math.cos(math.pi * done)) / 2


def deepspeed_config(config: Config, ranks: int, dtype: torch.dtype) -> dict[str, Any]:
    """The DeepSpeed configuration; cluster.deepspeed is merged over it."""
    cluster = config.cluster
    zero: dict[str, Any] = {"stage": cluster.zero_stage}
    if cluster.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if cluster.offload_param:
        zero["offload_param"] = {"device": "cpu"}
    made: dict[str, Any] = {
        # The loop says itself where a step ends and how losses are weighted; 2 only tells ZeRO that gradients of
        # several micro-steps accumulate. The batch sizes below follow from it and mean nothing here.
        "gradient_accumulation_steps": 2,
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": 2 * ranks,
        "gradient_clipping": config.grad_clip or 1e30,  # a number, so that the norm is measured either way
        "zero_optimization": zero,
        # Without ZeRO and with ZeRO-1, a bf16 gradient is added to its fp32 sum as soon as it is there, and freed;
        # else all of them would stand beside the sums, 2 bytes a parameter.
        "bf16": {"enabled": dtype == torch.bfloat16, "immediate_grad_update": True},
        # DeepSpeed would add up and exchange bf16 gradients in bf16: 8 bits of mantissa for a sum over packs.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    return _merge(made, cluster.deepspeed)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices, none for biases and norms. By name: ZeRO-3 has flattened the shapes."""
    plain: list[torch.nn.Parameter] = []
    decayed: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (plain if name.endswith("bias") or "norm" in name else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [g for g in groups if g["params"]]


def clip_gradients(parameters: Iterable[torch.nn.Parameter], limit: float) -> torch.Tensor:
    """Scale gradients so that their common norm is at most limit; returns the norm before, float32.

    Measured in float64, as ZeRO does: on a CPU a float32 sum of 30 million squares is off by 3e-3, and torch's own
    clip_grad_norm_ with it.
    """
    of_all = [parameter for parameter in parameters if parameter.grad is not None]
    norms = [torch.linalg.vector_norm(parameter.grad, dtype=torch.float64) for parameter in of_all]
    norm = torch.linalg.vector_norm(torch.stack(norms)).float() if norms else torch.zeros(())
    torch.nn.utils.clip_grads_with_norm_(of_all, limit, norm)
    return norm


def import_muon_uncompiled() -> None:
    """DeepSpeed imports Muon whatever the optimizer is, and its @torch.compile loads the compiler: 4 s of each rank."""
    from deepspeed.runtime import compiler

    compiler.compile, compiled = (lambda: lambda function: function), compiler.compile
    try:
        with contextlib.suppress(ImportError):  # it has moved in another release
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = compiled


@contextlib.contextmanager
def sharded_loading(settings: dict[str, Any]) -> Iterator[None]:
    """Within it from_pretrained shards every weight as it is read instead of holding all on each rank (ZeRO-3)."""
    zero3 = HfDeepSpeedConfig(settings)  # transformers sees it while it lives
    try:
        yield
    finally:
        del zero3
        unset_hf_deepspeed_config()  # an error's traceback may hold it


def build_engine(config: Config, ranks: int) -> Any:
    """Load the model with packed attention and its loss, and hand it to DeepSpeed. Returns the engine."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    device = config.cluster.device
    dtype = resolve_dtype(config, device)
    settings = deepspeed_config(config, ranks, dtype)
    # Random weights are drawn whole, so that they do not depend on the number of ranks.
    sharded = config.cluster.zero_stage == 3 and loads_weights(config)
    with sharded_loading(settings) if sharded else contextlib.nullcontext():
        model = load_model(config, dtype)
    backend = attention.backend_of(config, model.config, device)[0]
    attention.install(model, backend, config.deterministic, ulysses.make_group(config.cluster.sequence_parallel))
    if device == "cuda" and config.model.kernels == "auto":
        kernels.install(model)
    activations = Activations(model, resolve_policy(config, device))
    if config.cluster.zero_stage == 3 and activations.layers:
        # A layer's weights are gathered and freed together. For each of its modules apart, DeepSpeed's hooks alone take
        # a second of a 7B's micro-step, and ranks that cut MLPs into unlike numbers of tiles would gather unlike often.
        set_z3_leaf_modules(model, [type(activations.layers[0])])
        # The next layer comes whole while one is computed; DeepSpeed's own default is a fourth of a 7B's.
        numel = sum(getattr(weight, "ds_numel", weight.numel()) for weight in activations.layers[0].parameters())
        settings["zero_optimization"].setdefault("stage3_prefetch_bucket_size", max(50_000_000, numel))
    model.train()
    groups = parameter_groups(model, config.weight_decay)
    if config.cluster.offload_optimizer:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer = DeepSpeedCPUAdam(groups, lr=config.lr, betas=config.betas, adamw_mode=True)
    else:
        optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=device == "cuda")
    # DeepSpeed is not told of sequence parallelism (no mpu): to it all ranks are data-parallel, which is exact, see
    # worker.train_step. Weights and states are so divided among all ranks, too.
    import_muon_uncompiled()
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its memory use
        engine, *_ = deepspeed.initialize(model=WeightedLoss(model), optimizer=optimizer, config=settings)

    def clip() -> None:  # without ZeRO and in float32, DeepSpeed clips but forgets the norm it measured
        engine._global_grad_norm = clip_gradients(engine.module.parameters(), settings["gradient_clipping"])
        if not torch.isfinite(engine._global_grad_norm):
            engine.zero_grad()  # as ZeRO does by itself; AdamW passes over weights without a gradient

    engine.clip_fp32_gradients = clip
    engine.activations = activations
    restore_inv_freq(engine.module)  # DeepSpeed may cast or move buffers
    check_inv_freq(engine.module, config.model.rope.theta)
    make_moments(engine)  # at the first update they would find the GPU's or the host's memory full of activations
    return engine
