"""Random draws that depend on a seed and on what they are for, and on nothing else."""

import hashlib

import torch


def step_generator(seed: int, *keys: int | str) -> torch.Generator:
    """A CPU generator determined by `seed` and `keys`, so that a resumed run draws what an unbroken one would."""
    digest = hashlib.sha256(repr((seed, *keys)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
