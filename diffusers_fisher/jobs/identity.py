"""By what a pipeline and images are known again, so that records of others are never mixed in."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from typing import Any

import torch

from ..data import Images, ImageStream

ROWS = 1000  # about so many rows, evenly spaced, by which data are known again
STREAM_ROWS = 100  # the same of a stream, the first
FILE_BYTES = 1024  # the last ones of an image's file
VALUES = 1024  # of every tensor


def pipeline_digests(pipe: Any) -> dict[str, str]:
    """Hashes of all a pipeline's numbers depend on: `weights` and `configuration`.

    The former is of the first 1024 values of every tensor of the components, the trace model and the latent
    statistics; the latter of the components' classes and settings, the scheduler's too, and of the tokenizers.
    """
    weights, settings = hashlib.sha256(), {}
    for part, component in {**pipe.components, "trace_model": pipe.trace_model}.items():
        settings[part] = [type(component).__name__, _settings(component)]
        if isinstance(component, torch.nn.Module):
            for name, tensor in component.state_dict().items():
                weights.update(f"{part}.{name}".encode())
                weights.update(_bytes(tensor))
    for statistic in pipe.latent_statistics or ():
        weights.update(_bytes(statistic))
    text = json.dumps(settings, sort_keys=True, default=str)
    return {"weights": weights.hexdigest()[:16], "configuration": hashlib.sha256(text.encode()).hexdigest()[:16]}


def images_digest(images: Images) -> str:
    """How many images there are, and a hash of rows' names, captions, and sizes and ends of files.

    The rows are about a thousand, evenly spaced; of a stream, whose length is not known, the first hundred.
    """
    if isinstance(images, ImageStream):
        rows = list(enumerate(itertools.islice(images.undecoded(), STREAM_ROWS)))
        said = f"the first {len(rows)}"
    else:
        rows = [(position, images.rows[position]) for position in range(0, len(images), max(1, len(images) // ROWS))]
        said = str(len(images))
    found = hashlib.sha256()
    for position, row in rows:
        found.update(_said(images, row, position))
    return f"{said}, sha256 {found.hexdigest()[:16]}"


def row_digest(images: Images, row: Mapping[str, Any], position: int) -> str:
    """A hash of the name and caption of one image, and of its file's size and end."""
    return hashlib.sha256(_said(images, row, position)).hexdigest()[:12]


def _said(images: Images, row: Any, position: int) -> bytes:
    size, end = _size_and_end(row[images.data.image_column] or {})
    told = (images.row_name(row, position), images.row_caption(row), size)
    return json.dumps(told, default=str).encode() + end


def _settings(component: Any) -> Any:
    """What of a component's configuration does not depend on where and with what release it was loaded."""
    if hasattr(component, "backend_tokenizer"):
        backend = json.loads(component.backend_tokenizer.to_str())
        del backend["padding"], backend["truncation"]  # of its last call
        return [backend, component.model_max_length]
    if hasattr(component, "get_vocab"):
        return [component.get_vocab(), component.model_max_length]
    config: Any = getattr(component, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(values, Mapping):
        return None
    return {key: value for key, value in values.items() if not key.startswith("_") and key != "transformers_version"}


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.flatten()[:VALUES].float().cpu().numpy().tobytes()


def _size_and_end(entry: Mapping[str, Any]) -> tuple[int, bytes]:
    """Of the file of an image; of one that can't be opened here (it is on the Hub, say): nothing."""
    if entry.get("bytes"):
        return len(entry["bytes"]), entry["bytes"][-FILE_BYTES:]
    try:
        with open(entry["path"], "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - FILE_BYTES))
            return size, file.read()
    except (OSError, KeyError, TypeError):
        return 0, b""
