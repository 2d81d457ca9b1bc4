"""A few random images in the files of Fashion-MNIST, and a fresh Accelerate for every test."""

import gzip

import fashion_mnist
import numpy
import pytest
from accelerate.state import AcceleratorState

COUNT = {"train": 40, "test": 70}


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    with gzip.open(path, "wb") as file:
        file.write(header + array.tobytes())


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of random images in the format of Fashion-MNIST."""
    folder = tmp_path_factory.mktemp("data")
    random = numpy.random.default_rng(0)
    for split, count in COUNT.items():
        name = folder / fashion_mnist.PREFIXES[split]
        write_idx(f"{name}-images-idx3-ubyte.gz", random.integers(0, 256, (count, 28, 28), dtype=numpy.uint8))
        write_idx(f"{name}-labels-idx1-ubyte.gz", (numpy.arange(count) % 10).astype(numpy.uint8))
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its settings for the process, so they are removed before each test."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
