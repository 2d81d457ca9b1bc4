"""Identifies pipelines, images and latents, so that a run never mixes its results with those of others.

A digest is a hash. A note is a JSON mapping that a run keeps in its folder. `note_differences` compares the notes of
two runs and says in words what differs.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..backbones import backbone_of
from ..data import CachedLatents, Images, ImageStream
from ..errors import InputError
from ..files import read_table
from ..remote import is_url, open_filesystem, remote_access

ROWS = 1000  # about this number of rows of a dataset, evenly spaced, enter its digest
STREAM_ROWS = 100  # this number of first rows of a stream enter its digest
FILE_BYTES = 1024  # last bytes of an image file that enter its digest
VALUES = 1024  # first values of a tensor that enter its digest
DATA_NOTE = "data.json"  # file of the note of a run's data
ABSENT = object()
Note = Mapping[str, Any]
"""A JSON mapping."""


def note_differences(
    before: Note, now: Note, changeable: tuple[str, ...] = (), tolerance: float = 0.0, absent_is_null: bool = False
) -> list[str]:
    """Says in words which entries of two notes differ, such as "`steps` was 3, is 4".

    Args:
        changeable: beginnings of the names of entries that may differ.
        tolerance: relative difference that floats may have.
        absent_is_null: treat an absent entry as a null. Notes of older releases lack newer entries, whose default is
            null.
    """
    names = [name for name in sorted(before.keys() | now.keys()) if not name.startswith(changeable)]
    if absent_is_null:
        before, now = ({**dict.fromkeys(names), **note} for note in (before, now))
    return [
        f"`{name}` was {_describe_entry(before, name)}, is {_describe_entry(now, name)}"
        for name in names
        if not _agree(before.get(name, ABSENT), now.get(name, ABSENT), tolerance)
    ]


def refuse_differences(place: Path, relation: str, differences: Sequence[str], advice: str) -> None:
    """Raises `InputError` if there are differences.

    Args:
        place: the folder whose note differs.
        relation: what the folder is, such as "holds a run with other settings".
        differences: from `note_differences`.
        advice: a sentence that says what to do.
    """
    if differences:
        raise InputError(f"'{place}' {relation}: {'; '.join(differences)}. {advice}")


def pipeline_digests(pipe: DiffusionPipeline) -> dict[str, str]:
    """Returns hashes of everything that a pipeline's numbers depend on, `weights` and `configuration`.

    `weights` is a hash of the first 1024 values of every tensor of the components, the trace model and the latent
    statistics. `configuration` is a hash of the classes and settings of the components (the scheduler's too) and of
    the tokenizers.
    """
    weights, settings = hashlib.sha256(), {}
    for part, component in {**pipe.components, "trace_model": pipe.trace_model}.items():
        settings[part] = [type(component).__name__, _component_settings(component)]
        if isinstance(component, torch.nn.Module):
            for name, tensor in component.state_dict().items():
                weights.update(f"{part}.{name}".encode())
                weights.update(_bytes(tensor))
    spectrum = () if pipe.latent_spectrum is None else (pipe.latent_spectrum,)
    for statistic in (*(pipe.latent_statistics or ()), *spectrum):
        weights.update(_bytes(statistic))
    text = json.dumps(settings, sort_keys=True, default=str)
    return {"weights": weights.hexdigest()[:16], "configuration": hashlib.sha256(text.encode()).hexdigest()[:16]}


def autoencoder_note(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Returns what scaled latents depend on: the autoencoder's weights (as one sum) and scaling.

    Pipelines without an autoencoder are all alike: their samples are pixels.
    """
    vae = backbone_of(pipe).autoencoder
    if vae is None:
        return {"space": "pixel"}
    tensors = [parameter.detach().float().abs().mean().item() for parameter in list(vae.parameters())[:16]]
    config = vae.config if isinstance(vae, ConfigMixin) else {}
    scaling = {key: config.get(key) for key in ("scaling_factor", "shift_factor", "latents_mean", "latents_std")}
    return {"space": "latent", "autoencoder": type(vae).__name__, "weights": sum(tensors), **scaling}


def data_note(source: Images | CachedLatents) -> dict[str, Any] | None:
    """Returns the number of images, the first and last name, and a digest of names and captions.

    The content of files is not in it: images that can't be read may be repaired while a run lasts.

    For cached latents the result is the note of the images from which they were made, with the number of latents. A
    stream has no known length, so the note is None.
    """
    if isinstance(source, ImageStream):
        return None
    if isinstance(source, CachedLatents):
        note = source.folder / DATA_NOTE
        return {**(read_table(note) if note.is_file() else {}), "latents": len(source)}
    names = {"first": source.name(0), "last": source.name(len(source) - 1)}
    return {"images": len(source), **names, "rows": images_digest(source, with_files=False)}


def images_digest(images: Images, with_files: bool = True) -> str:
    """Returns the number of images, and a hash of names, captions, and sizes and ends of files.

    The hash covers about a thousand rows, evenly spaced. For a stream, whose length is unknown, it covers the first
    hundred rows.

    Args:
        with_files: whether the sizes and ends of files are in the hash.
    """
    if isinstance(images, ImageStream):
        rows = list(enumerate(itertools.islice(images.undecoded(), STREAM_ROWS)))
        count = f"the first {len(rows)}"
    else:
        rows = [(position, images.rows[position]) for position in range(0, len(images), max(1, len(images) // ROWS))]
        count = str(len(images))
    digest = hashlib.sha256(b"".join(_row_bytes(images, row, position, with_files) for position, row in rows))
    return f"{count}, sha256 {digest.hexdigest()[:16]}"


def row_digest(images: Images, row: dict[str, Any], position: int) -> str:
    """Returns a hash of the name and caption of one image, and of the size and end of its file."""
    return hashlib.sha256(_row_bytes(images, row, position)).hexdigest()[:12]


def _row_bytes(images: Images, row: dict[str, Any], position: int, with_files: bool = True) -> bytes:
    size, end = _size_and_end((with_files and row[images.data.image_column]) or {})
    entries = (images.row_name(row, position), images.row_caption(row), size)
    return json.dumps(entries, default=str).encode() + end


def _component_settings(component: object) -> object:
    """Returns the part of a component's configuration that depends neither on its folder nor on the release."""
    if hasattr(component, "backend_tokenizer"):
        backend = json.loads(component.backend_tokenizer.to_str())
        del backend["padding"], backend["truncation"]  # the last call set them
        return [backend, getattr(component, "model_max_length", None)]
    if hasattr(component, "get_vocab"):
        return [component.get_vocab(), getattr(component, "model_max_length", None)]
    config: object = getattr(component, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(values, Mapping):
        return None
    return {key: value for key, value in values.items() if not key.startswith("_") and key != "transformers_version"}


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.flatten()[:VALUES].float().cpu().numpy().tobytes()


def _size_and_end(entry: Mapping[str, Any]) -> tuple[int, bytes]:
    """Returns the size and the last bytes of an image's file, or nothing of a file that can't be opened here."""
    if entry.get("bytes"):
        return len(entry["bytes"]), entry["bytes"][-FILE_BYTES:]
    try:
        if is_url(entry["path"]):
            filesystem, path = open_filesystem(entry["path"])
            with remote_access(entry["path"]):
                return filesystem.size(path), b""  # the end would be one more request per image
        with open(entry["path"], "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - FILE_BYTES))
            return size, file.read()
    except (OSError, KeyError, TypeError, InputError):
        return 0, b""


def _agree(left: object, right: object, tolerance: float) -> bool:
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=tolerance)
    return left == right


def _describe_entry(note: Note, name: str) -> str:
    text = json.dumps(note[name], ensure_ascii=False) if name in note else "absent"
    return text if len(text) <= 120 else text[:117] + "..."
