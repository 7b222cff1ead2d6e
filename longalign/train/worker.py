"""What every rank runs: `python -m longalign.train.worker RUN/config.yaml [more runs, one after the other]`.

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT come from the environment, set by launch.py or torchrun.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import deepspeed
import torch
import torch.distributed as dist
from datasets import Dataset
from transformers.utils import logging as transformers_logging

from longalign.config import load_frozen
from longalign.data.batch import Batch
from longalign.data.plan import Pack, Plan, read_data, steps_to_train
from longalign.errors import UserError
from longalign.forecast.fit import advice
from longalign.model.activations import Activations
from longalign.progress import Bar
from longalign.schema import Config
from longalign.streams import end_at_once, outlive_readers
from longalign.train import checkpoint
from longalign.train.bad_steps import BadSteps, TooManyBadSteps, poisoned
from longalign.train.breakdown import Breakdown
from longalign.train.engine import build_engine, learning_rate
from longalign.train.evaluation import Evaluation
from longalign.train.export import export
from longalign.train.grace import Grace, TooLate
from longalign.train.heartbeat import Heartbeat
from longalign.train.metrics import Journal, peak_memory_gb
from longalign.train.micro import micro_steps
from longalign.train.saver import Saver
from longalign.train.trace import Trace

_signal = 0  # the last SIGINT or SIGTERM received


def _on_signal(number: int, _frame: Any) -> None:
    global _signal
    _signal = number


def train_step(
    engine: Any,
    dataset: Dataset,
    packs: list[Pack],
    config: Config,
    breakdown: Breakdown | None = None,
    trace: Trace | None = None,
    between: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Forward, backward and update over the packs of one step. `between` two micro-steps it may be given up by raising.

    Returns this rank's shares of the three losses and, with a breakdown, of every group's, [3 + G].
    DeepSpeed averages gradients over ranks, hence loss * ranks; the weights already sum over the whole step, so
    nothing is divided by the number of micro-steps. Sequence parallelism changes none of this: the step's loss is still
    the sum of the ranks' shares, each of its own targets, and its gradient the sum of what the ranks' weights receive:
    the exchanges around attention carry back to every rank what other ranks' targets owe to its tokens.
    """
    shares: torch.Tensor | float = 0.0
    keep: Activations = engine.activations
    trace = trace or Trace(engine.device)
    # Where ranks run packs of their own, all wait for the one that has most slices.
    one_pack = dist.get_world_size() == config.cluster.sequence_parallel
    slice_tokens = config.slice_tokens or (keep.slice_tokens() if one_pack else None)
    trace.enter("data")
    for batch, weights, is_last, samples in micro_steps(dataset, packs, config, engine.device, breakdown, slice_tokens):
        with out_of_memory_told(config, batch):
            trace.enter("forward")
            keep.before(batch.input_ids.numel())
            loss, share = engine(batch, weights)
            trace.enter("backward")
            engine.set_gradient_accumulation_boundary(is_last)
            engine.backward(poisoned(loss) * dist.get_world_size(), scale_wrt_gas=False)
            keep.after()
            trace.enter("optimizer")
            engine.step()
            trace.enter("data")
        trace.losses.append((samples, loss.detach()))
        shares = shares + share
        if not is_last:
            between()
    assert isinstance(shares, torch.Tensor), "a step has packs"
    return shares


@contextlib.contextmanager
def out_of_memory_told(config: Config, batch: Batch | None = None) -> Iterator[None]:
    """Raises UserError, with a setting that fits, if the GPU's memory runs out within a micro-step, or before any."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        documents = batch.cu_seqlens.diff().tolist() if batch else None
        what = "as the engine was built"
        if documents:
            what = f"on a micro-step of {sum(documents):,} tokens in {len(documents)} documents"
        raise UserError(f"out of GPU memory {what}: {advice(config, documents)}") from error


def train(config: Config) -> None:
    """Train one run to its end, or until a signal asks to save and stop."""
    logs = Path(config.output_dir or "") / "logs"
    with Heartbeat(logs, dist.get_rank(), config.hang_timeout_s) as heartbeat:
        heartbeat.end("finished" if train_all(config, heartbeat) else "stopped")


def take_up(config: Config, engine: Any, plan: Plan) -> int:
    """Load the checkpoint that `resume` means, if there is one; returns the steps that are done."""
    start = checkpoint.find(config, together=True)
    if start is None:
        return 0
    done = checkpoint.check(start, plan.manifest["identity"])
    checkpoint.load(engine, start)
    checkpoint.abandon_after(Path(config.output_dir or ""), done)
    return done


def over_ranks(seconds: float, shares: torch.Tensor) -> list[float]:
    """The mean of their seconds; whether any rank was told to stop, so that all stop after this very step; the sums of
    their shares."""
    mine = torch.tensor([seconds / dist.get_world_size(), float(bool(_signal))], device=shares.device)
    summed = torch.cat([mine.double(), shares.double()])
    dist.all_reduce(summed)
    return summed.tolist()


def train_all(config: Config, heartbeat: Heartbeat) -> bool:
    """Whether all steps are done and the model is written. Raises TooManyBadSteps, with a checkpoint written."""
    assert config.output_dir is not None
    run, rank, device = Path(config.output_dir), dist.get_rank(), config.cluster.device
    dataset, data = read_data(config.data_dir)
    plan = Plan(run / "plan", data)
    n_steps, breakdown = steps_to_train(plan.n_steps, config), Breakdown(dataset)
    with out_of_memory_told(config):
        engine = build_engine(config, dist.get_world_size())
        done = take_up(config, engine, plan)
    journal = Journal(config, done, writes=rank == 0)
    trace, bad_steps = Trace(engine.device, heartbeat), BadSteps(config, dataset, journal, done)
    evaluation = Evaluation(config, engine, journal, n_steps, done) if config.eval_every else None
    if evaluation and evaluation.is_due(done):  # the run was stopped between this step's checkpoint and its evaluation
        with heartbeat.unwatched("evaluation"):
            evaluation.evaluate(done)
    saver = Saver(config, engine, plan.manifest["identity"], done)
    grace, stopped, lasted, began = Grace(config.grace_s, engine.device), 0.0, 0.0, time.monotonic()

    with saver, Bar("train", n_steps, "steps", done=done, quiet=rank != 0) as bar:
        for step in range(done + 1, n_steps + 1):
            packs, lr = plan.step(step), learning_rate(step, n_steps, config)
            for parameters in engine.optimizer.param_groups:
                parameters["lr"] = lr
            trace.begin(step)
            grace.begin(lasted)
            if device == "cuda":
                engine.activations.take_peak()  # that of loading, or of an evaluation
            try:
                shares = train_step(engine, dataset, packs, config, breakdown, trace, lambda: grace.check(_signal))
            except TooLate:
                stopped = True
                with heartbeat.unwatched("checkpoint"):
                    saver.keep(step - 1)
                break
            trace.enter("sync")
            sums = over_ranks(time.monotonic() - grace.began, shares)
            lasted, stopped, loss, loss_sequence, loss_token, *by_group = sums
            spent = trace.seconds()
            seconds, began = time.monotonic() - began, time.monotonic()
            grad_norm = float(engine.get_global_grad_norm())
            tokens = sum(p.tokens for p in packs)
            row = {
                "step": step,
                "epoch": plan.epoch(step),
                "loss": loss,
                "loss_sequence": loss_sequence,
                "loss_token": loss_token,
                **breakdown.rows(by_group, breakdown.counts(packs)),
                "lr": lr,
                "grad_norm": grad_norm,
                "skipped": bad_steps.is_bad(step, loss, grad_norm, packs, trace.losses),
                "tokens": tokens,
                "targets": sum(p.n_target for p in packs),
                "sequences": sum(p.n_sequences for p in packs),
                "packs": len(packs),
                "tokens_per_s": round(tokens / seconds, 1),
                "step_s": round(seconds, 4),
                "time": spent,
                "peak_mem_gb": peak_memory_gb(engine.activations.take_peak() if device == "cuda" else 0),
            }
            journal.write("metrics", row)
            bar.advance(1, note=f"loss {loss:.4f}, {tokens / seconds:,.0f} tokens/s")
            saver.poll()
            if bad_steps.too_many:  # the weights are still those of the last good step
                with heartbeat.unwatched("checkpoint"):
                    saver.keep(bad_steps.last_good)
                raise bad_steps.error(saver.saved)
            at_end = stopped or step == n_steps  # its checkpoint stands before anything else may fail, or take long
            if at_end or (config.save_every and step % config.save_every == 0):
                with heartbeat.unwatched("checkpoint"):
                    saver.keep(step) if at_end else saver.save(step)
                began = time.monotonic()
            if stopped and step < n_steps:
                break
            if evaluation and evaluation.is_due(step):
                with heartbeat.unwatched("evaluation"):
                    evaluation.evaluate(step)
                began = time.monotonic()
            heartbeat.watch()  # not in the first step, in which kernels may be compiled
    journal.close()
    if stopped and saver.saved < n_steps:
        if rank == 0:
            print(f"stopped after step {saver.saved}, which {run}/checkpoints holds", file=sys.stderr)
        return False
    with heartbeat.unwatched("export"):
        export(engine, config, run / "model", n_steps)
    engine.destroy()
    return True


COLLECTIVE_S = 1800  # a collective may take so much longer than a step's work: ranks wait in one while rank 0 writes


def join(device: str, hang_timeout_s: float | None = None) -> None:
    """Meet the other ranks, with the terminal left to the progress bar.

    Collectives time out after hang_timeout_s and half an hour more (None: after a week), so that the heartbeat, which
    tells where ranks stand, comes first. They alone limit the first step, checkpoints, evaluations and the export.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device")
    transformers_logging.disable_progress_bar()
    # DeepSpeed's shared-memory extension would be compiled on a CPU's first run for a minute; gloo serves.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))  # see cluster/workers.py
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    limit = timedelta(seconds=hang_timeout_s + COLLECTIVE_S if hang_timeout_s else 7 * 86400)
    deepspeed.init_distributed("nccl" if device == "cuda" else "gloo", verbose=False, timeout=limit)


def leave() -> None:
    """Part from the other ranks when all is done.

    One whose connection is gone has passed the barrier before; or it has failed, which its own exit code tells.
    """
    with contextlib.suppress(RuntimeError):
        dist.barrier()
    dist.destroy_process_group()


def end(code: int) -> NoReturn:
    """End this process as sys.exit does, but without taking Python itself down.

    There a thread of gloo that asks for Python's lock aborts the process (pytorch/pytorch#190489).
    """
    atexit._run_exitfuncs()  # such as wandb's
    end_at_once(code)


def main(paths: list[str]) -> int:
    """Run every frozen config in turn; returns the exit code (0 after a signal too: the launcher knows it sent it)."""
    outlive_readers()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _on_signal)
    configs = [load_frozen(path) for path in paths]
    join(configs[0].cluster.device, configs[0].hang_timeout_s)
    try:
        if dist.get_world_size() != (ranks := configs[0].cluster.ranks):
            raise UserError(f"{dist.get_world_size()} ranks were started, and the run was prepared for {ranks}")
        for config in configs:
            train(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TooManyBadSteps as error:
        print(f"error: {error}", file=sys.stderr)
        leave()
        return 1
    leave()
    return 0


if __name__ == "__main__":
    end(main(sys.argv[1:]))
