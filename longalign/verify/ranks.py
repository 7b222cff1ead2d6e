"""What every rank runs for `verify`: the probe's step through the real engine.

`python -m longalign.verify.ranks RUN/config.yaml PROBE RESULT.json [FOLDER]`: rank 0 writes the losses and the
gradient norm; with FOLDER the model is exported there before the step.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist

from longalign.config import load_frozen
from longalign.errors import UserError
from longalign.files import write_json
from longalign.train.engine import build_engine
from longalign.train.export import export
from longalign.train.worker import end, join, leave, train_step
from longalign.verify.model import LOSSES
from longalign.verify.probe import load


def main(config_file: str, probe: str, result: str, folder: str | None = None) -> int:
    config = load_frozen(config_file)
    join(config.cluster.device)
    try:
        engine = build_engine(config, dist.get_world_size())
        if folder:
            export(engine, config, Path(folder), step=0)
        shares = train_step(engine, *load(Path(probe)), config).double()
    except UserError as error:  # such as too little memory for the step, with a setting that fits
        print(f"error: {error}", file=sys.stderr)
        return 2
    dist.all_reduce(shares)
    if dist.get_rank() == 0:
        losses = dict(zip(LOSSES, shares.tolist(), strict=True))
        write_json(Path(result), {"losses": losses, "grad_norm": float(engine.get_global_grad_norm())})
    leave()
    return 0


if __name__ == "__main__":
    end(main(*sys.argv[1:]))
