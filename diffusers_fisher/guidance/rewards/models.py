"""Rewards by pretrained vision models of transformers: classifiers, CLIP, SigLIP, PickScore, aesthetic predictors."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError, InputError
from ...files import load_tensors
from .images import ImageInput

CLIP_LARGE = "openai/clip-vit-large-patch14"


class ClassifierReward:
    """Log-probability (nats) of a class under a transformers image classifier.

    Args:
        model: an image-classification model that takes `pixel_values`; put in evaluation mode by the caller.
        target: class name or number, or one for each image.
        image_input: from images in [0, 1] to `pixel_values`.
    """

    def __init__(self, model: Any, target: str | int | Sequence[str | int], image_input: ImageInput):
        self.model = model
        targets = [target] if isinstance(target, (str, int)) else list(target)
        self.targets = torch.tensor([self._number(entry) for entry in targets])
        self.image_input = image_input

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, target: str | int | Sequence[str | int], **kwargs: Any
    ) -> ClassifierReward:
        """Loads a classifier with its image processor's settings, such as "google/vit-base-patch16-224".

        `kwargs` (`dtype`, `device_map`, ...) go to transformers' `from_pretrained`.
        """
        from transformers import AutoModelForImageClassification

        model = _frozen(AutoModelForImageClassification.from_pretrained(path, **kwargs))
        return cls(model, target, ImageInput.from_pretrained(path, **_places(kwargs)))

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        targets = self.targets.to(images.device)
        if len(targets) not in (1, len(images)):
            raise InputError(f"{len(targets)} target classes for {len(images)} images; give one, or as many.")
        log_probabilities = _wide(self.logits(images)).log_softmax(-1)
        return log_probabilities.gather(1, targets.expand(len(images))[:, None])[:, 0]

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Class scores (B, classes) of images (B, 3, H, W) in [0, 1]."""
        return self.model(pixel_values=self.image_input(images).to(self.model.dtype)).logits

    def _number(self, target: str | int) -> int:
        names = {str(name): int(number) for number, name in self.model.config.id2label.items()}
        if isinstance(target, str) and target in names:
            return names[target]
        if isinstance(target, int) and target in names.values():
            return target
        raise InputError(f"The classifier has no class {target!r}; it has {names}.")


class TextImageReward:
    """Similarity of image and text under a model with two towers: CLIP, SigLIP, PickScore.

    The cosine of the two embeddings, or with `logits` the model's own logit, exp(logit_scale) cosine + logit_bias.
    Texts are encoded once, without a graph.

    Args:
        model: `CLIPModel`, `SiglipModel` or another with `get_image_features` and `get_text_features`.
        tokenizer: of the same checkpoint.
        image_input: from images in [0, 1] to `pixel_values`.
        text: what the images should show, one for all or one an image; None: the prompts they were made from, which
            may not be empty then.
        logits: the model's logit instead of the cosine.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        image_input: ImageInput,
        text: str | Sequence[str] | None = None,
        logits: bool = False,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.image_input = image_input
        self.text = text
        self.logits = logits
        self._encoded: dict[str, torch.Tensor] = {}

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        text: str | Sequence[str] | None = None,
        logits: bool = False,
        processor: str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> TextImageReward:
        """Loads any such checkpoint; `processor` where tokenizer and image processor are another's.

        `kwargs` (`dtype`, `device_map`, ...) go to transformers' `from_pretrained`.
        """
        from transformers import AutoModel, AutoTokenizer

        model = _frozen(AutoModel.from_pretrained(path, **kwargs))
        source, places = (path if processor is None else processor), _places(kwargs, own=processor is None)
        tokenizer = AutoTokenizer.from_pretrained(source, **places)
        return cls(model, tokenizer, ImageInput.from_pretrained(source, **places), text, logits)

    @classmethod
    def clip(cls, text: str | Sequence[str] | None = None, path: str = CLIP_LARGE, **kwargs: Any) -> TextImageReward:
        """Cosine under CLIP (Radford et al., 2103.00020)."""
        return cls.from_pretrained(path, text, **kwargs)

    @classmethod
    def siglip(
        cls, text: str | Sequence[str] | None = None, path: str = "google/siglip-so400m-patch14-384", **kwargs: Any
    ) -> TextImageReward:
        """Cosine under SigLIP (Zhai et al., 2303.15343)."""
        return cls.from_pretrained(path, text, **kwargs)

    @classmethod
    def pick_score(
        cls, text: str | Sequence[str] | None = None, path: str = "yuvalkirstain/PickScore_v1", **kwargs: Any
    ) -> TextImageReward:
        """PickScore (Kirstain et al., 2305.01569): the logit of a CLIP-H tuned on people's choices, about 17 to 23."""
        processor = kwargs.pop("processor", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
        return cls.from_pretrained(path, text, True, processor, **kwargs)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        given = prompts if self.text is None else self.text
        texts = [given] * len(images) if isinstance(given, str) else list(given)
        if len(texts) != len(images):
            raise InputError(f"{len(texts)} texts for {len(images)} images; give one, or one an image.")
        if self.text is None and not all(isinstance(text, str) and text.strip() for text in texts):
            raise InputError(
                f"The images were made from the prompts {texts}, and a similarity to no words says nothing. Give the "
                "reward a `text`, or prompts that are not empty (`prompts=` of `posterior_guidance`)."
            )
        shown, said = _image_features(self.model, self.image_input(images)), self._text_features(texts)
        cosine = (shown * said.to(shown)).sum(-1)
        if not self.logits:
            return cosine
        bias = getattr(self.model, "logit_bias", None)
        return self.model.logit_scale.exp().to(cosine) * cosine + (0 if bias is None else bias.to(cosine))

    @torch.no_grad()
    def _text_features(self, texts: list[str]) -> torch.Tensor:
        """Normalised embeddings (B, width)."""
        new = [text for text in dict.fromkeys(texts) if text not in self._encoded]
        if new:
            length = self.model.config.text_config.max_position_embeddings
            # SigLIP was trained on padded texts; CLIP reads its embedding where the text ends.
            tokens = self.tokenizer(
                new, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
            ).to(self.model.device)
            inputs = {name: tokens[name] for name in ("input_ids", "attention_mask") if name in tokens}
            features = _normalised(self.model.get_text_features(**inputs).pooler_output)
            self._encoded |= dict(zip(new, features, strict=True))
        return torch.stack([self._encoded[text] for text in texts])


class AestheticReward:
    """The LAION aesthetic predictor: people's ratings, about 1 to 10, from a normalised CLIP image embedding.

    Args:
        model: `CLIPModel`.
        head: (B, width) embeddings to (B, 1) scores.
        image_input: from images in [0, 1] to `pixel_values`.
    """

    def __init__(self, model: Any, head: torch.nn.Module, image_input: ImageInput):
        self.model = model
        self.head = head
        self.image_input = image_input

    @classmethod
    def from_pretrained(cls, head: str | os.PathLike, path: str = CLIP_LARGE, **kwargs: Any) -> AestheticReward:
        """Loads CLIP and a head from a file.

        Args:
            head: `.safetensors`, or the `.pth` files as published (read as weights only):
                `sac+logos+ava1-l14-linearMSE.pth` of christophschuhmann/improved-aesthetic-predictor, the one most
                papers use, or `sa_0_4_vit_l_14_linear.pth` of LAION-AI/aesthetic-predictor.
            path: the CLIP that the head was trained on.
            **kwargs: to transformers' `from_pretrained` (`dtype`, `device_map`, ...).

        Raises:
            CheckpointError: the head's file is missing, damaged, or no chain of linear layers onto one number.
        """
        from transformers import CLIPModel

        layers = aesthetic_head(head)  # before the large download
        # The whole model: the vision tower alone takes its projection's width from a part of the config that not all
        # checkpoints fill in.
        model = _frozen(CLIPModel.from_pretrained(path, **kwargs))
        if layers[0].in_features != model.config.projection_dim:
            raise CheckpointError(
                f"The head '{head}' takes {layers[0].in_features} numbers, but '{path}' embeds in "
                f"{model.config.projection_dim}; give the CLIP that it was trained on."
            )
        return cls(model, layers.to(model.device), ImageInput.from_pretrained(path, **_places(kwargs)))

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return self.head(_image_features(self.model, self.image_input(images)))[:, 0]


def aesthetic_head(path: str | os.PathLike) -> Any:
    """The linear layers of an aesthetic predictor's file, one after another (dropout between them is for training).

    Raises:
        CheckpointError: missing, damaged, or no chain of linear layers onto one number.
    """
    tensors = _head_tensors(Path(path))
    names = sorted((name for name in tensors if name.endswith("weight")), key=_numbers)
    biases = [name.removesuffix("weight") + "bias" for name in names]
    shapes = [tuple(tensors[name].shape) for name in names]
    chained = all(len(shape) == 2 for shape in shapes) and all(
        before[0] == after[1] for before, after in itertools.pairwise(shapes)
    )
    if not names or not chained or shapes[-1][0] != 1 or sorted(tensors) != sorted(names + biases):
        raise CheckpointError(
            f"'{path}' holds {sorted(tensors)} of weights' shapes {shapes}; an aesthetic predictor is a chain of "
            "linear layers onto one number."
        )
    layers = []
    for name, bias in zip(names, biases, strict=True):
        layer = torch.nn.Linear(tensors[name].shape[1], tensors[name].shape[0])
        layer.load_state_dict({"weight": tensors[name], "bias": tensors[bias]})
        layers.append(layer)
    return _frozen(torch.nn.Sequential(*layers))


def _head_tensors(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return load_tensors(path)[0]
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's own words advise to run what the file holds.
        raise CheckpointError(
            f"'{path}' can't be read as a file of weights alone ({type(error).__name__}); download it again."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise CheckpointError(f"'{path}' holds a {type(content).__name__}; it must hold a table of tensors.")
    return content


def _places(kwargs: dict[str, Any], own: bool = True) -> dict[str, Any]:
    """Of the arguments for a model, those that say where its other files lie; `own`: in the same repository."""
    names = {"token", "cache_dir", "local_files_only", "force_download", *(("revision", "subfolder") if own else ())}
    return {name: value for name, value in kwargs.items() if name in names}


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _image_features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Normalised embeddings (B, width)."""
    return _normalised(model.get_image_features(pixel_values=pixels.to(model.dtype)).pooler_output)


def _frozen(module: Any) -> Any:
    return module.eval().requires_grad_(False)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normalised(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(_wide(x), dim=-1)
