"""Makes random generators that depend on a seed and on the purpose of the draws alone."""

import hashlib

import torch


def step_generator(seed: int, *keys: int | str) -> torch.Generator:
    """Returns a CPU generator for `seed` and `keys`, so that a resumed run draws what an unbroken one draws."""
    digest = hashlib.sha256(repr((seed, *keys)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def content_key(sample: torch.Tensor) -> str:
    """Returns a key of a tensor's values in float32, the same on every device and in every batch."""
    values = sample.detach().float().cpu().contiguous()
    return hashlib.sha256(repr(tuple(values.shape)).encode() + values.numpy().tobytes()).hexdigest()
