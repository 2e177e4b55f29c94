"""The text that a checkpoint was not trained on: the held-out tokens of the run that it lies in."""

from __future__ import annotations

import torch

from expertmesh.system.model.checkpoint import Checkpoint
from expertmesh.system.train.dataset import TokenDataset

LONGEST = 256  # tokens of a sequence
SEQUENCES = 32


def held_out_tokens(checkpoint: Checkpoint) -> torch.Tensor | None:
    """[B, S+1] int64: the first SEQUENCES windows of them; None for a checkpoint of no run.

    Data beside a checkpoint that has tokens which the model does not know is another model's.
    """
    config = checkpoint.config
    for folder in list(checkpoint.folder.resolve().parents)[:2]:  # of RUN/checkpoints/step-000300, or beside the data
        if not (folder / "data" / "meta.json").is_file():
            continue
        dataset = TokenDataset(folder / "data")
        length = min(LONGEST, config.context_length, dataset.validation_tokens - 1)
        if length < 1 or dataset.vocab_size > (config.vocab_size or 0):
            return None
        return next(dataset.validation_batches(SEQUENCES, length, 1))
    return None
