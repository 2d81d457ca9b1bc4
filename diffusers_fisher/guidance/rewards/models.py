"""Rewards from pretrained vision models of transformers: classifiers, CLIP, SigLIP, PickScore, aesthetics."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ...arguments import check_kinds
from ...errors import CheckpointError, InputError
from ...files import load_tensors
from .images import ImageInput

if TYPE_CHECKING:
    from transformers import (
        BlipForImageTextRetrieval,
        CLIPModel,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        SiglipModel,
    )

Module = TypeVar("Module", bound=torch.nn.Module)

MAX_TEXTS = 1000
"""Number of encoded texts that a reward keeps."""

CLIP_LARGE = "openai/clip-vit-large-patch14"
NO_REMOTE_CODE = {"trust_remote_code": False}
"""Without this, transformers asks on the console whether it may run code from a repository."""


class ClassifierReward:
    """Rewards the log probability (nats) of a class under a transformers image classifier.

    Args:
        model: an image-classification model that takes `pixel_values`, in evaluation mode.
        target: class name or number, or one per image.
        image_input: function from images in [0, 1] to `pixel_values`.
    """

    @check_kinds
    def __init__(self, model: PreTrainedModel, target: str | int | Sequence[str | int], image_input: ImageInput):
        self.model = model
        targets = [target] if isinstance(target, (str, int)) else list(target)
        self.targets = torch.tensor([self._number(entry) for entry in targets])
        self.image_input = image_input

    def __repr__(self) -> str:
        names = self.model.config.id2label or {}
        targets = [names.get(number, number) for number in self.targets.tolist()]
        return f"{type(self).__name__}({type(self.model).__name__}, target={targets})"

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, target: str | int | Sequence[str | int], **kwargs: Any
    ) -> ClassifierReward:
        """Loads a classifier and the settings of its image processor.

        Args:
            path: folder or Hub name of the checkpoint, such as "google/vit-base-patch16-224".
            target: class name or number, or one per image.
            **kwargs: arguments of transformers' `from_pretrained` (`dtype`, `device_map`, ...).
        """
        from transformers import AutoModelForImageClassification

        model = _freeze(AutoModelForImageClassification.from_pretrained(path, **NO_REMOTE_CODE | kwargs))
        return cls(model, target, ImageInput.from_pretrained(path, **_download_options(kwargs)))

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        targets = self.targets.to(images.device)
        if len(targets) not in (1, len(images)):
            raise InputError(f"Got {len(targets)} target classes for {len(images)} images; allowed: one, or as many.")
        log_probabilities = _to_float32(self.logits(images)).log_softmax(-1)
        return log_probabilities.gather(1, targets.expand(len(images))[:, None])[:, 0]

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Returns class scores (B, classes) of images (B, 3, H, W) in [0, 1]."""
        return self.model(pixel_values=self.image_input(images).to(self.model.dtype)).logits

    def _number(self, target: str | int) -> int:
        names = {str(name): int(number) for number, name in (self.model.config.id2label or {}).items()}
        if isinstance(target, str) and target in names:
            return names[target]
        if isinstance(target, int) and target in names.values():
            return target
        raise InputError(f"The classifier has no class {target!r}; allowed: {names}.")


@check_kinds
@dataclasses.dataclass(eq=False, repr=False)
class TextImageReward:
    """Rewards the similarity of image and text under a model with two encoders: CLIP, SigLIP, PickScore.

    The similarity is the cosine of the two embeddings. With `logits` it is the model's own logit,
    exp(logit_scale) cosine + logit_bias. Each text is encoded once, without a graph.

    Args:
        model: `CLIPModel`, `SiglipModel` or another model with `get_image_features` and `get_text_features`.
        tokenizer: tokenizer of the same checkpoint.
        image_input: function from images in [0, 1] to `pixel_values`.
        text: description of the wanted images, one for all or one per image; None: the prompts that the images were
            made from, which must not be empty.
        logits: whether to return the model's logit instead of the cosine.
    """

    model: CLIPModel | SiglipModel
    tokenizer: PreTrainedTokenizerBase
    image_input: ImageInput
    text: str | Sequence[str] | None = None
    logits: bool = False
    _text_embeddings: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict, init=False)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.model).__name__}, text={self.text!r}, logits={self.logits})"

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        text: str | Sequence[str] | None = None,
        logits: bool = False,
        processor: str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> TextImageReward:
        """Loads a model with two encoders, its tokenizer and the settings of its image processor.

        Args:
            path: folder or Hub name of the checkpoint.
            text: description of the wanted images; see the class.
            logits: whether to return the model's logit instead of the cosine.
            processor: checkpoint that holds the tokenizer and the image processor; None: the model's checkpoint.
            **kwargs: arguments of transformers' `from_pretrained` (`dtype`, `device_map`, ...).
        """
        from transformers import AutoModel, AutoTokenizer

        model = _freeze(AutoModel.from_pretrained(path, **NO_REMOTE_CODE | kwargs))
        source = path if processor is None else processor
        options = _download_options(kwargs, same_repository=processor is None)
        tokenizer = AutoTokenizer.from_pretrained(source, **NO_REMOTE_CODE | options)
        return cls(model, tokenizer, ImageInput.from_pretrained(source, **options), text, logits)

    @classmethod
    def clip(cls, text: str | Sequence[str] | None = None, path: str = CLIP_LARGE, **kwargs: Any) -> TextImageReward:
        """Makes the reward "cosine under CLIP" (Radford et al., 2103.00020)."""
        return cls.from_pretrained(path, text, **kwargs)

    @classmethod
    def siglip(
        cls, text: str | Sequence[str] | None = None, path: str = "google/siglip-so400m-patch14-384", **kwargs: Any
    ) -> TextImageReward:
        """Makes the reward "cosine under SigLIP" (Zhai et al., 2303.15343)."""
        return cls.from_pretrained(path, text, **kwargs)

    @classmethod
    def pick_score(
        cls, text: str | Sequence[str] | None = None, path: str = "yuvalkirstain/PickScore_v1", **kwargs: Any
    ) -> TextImageReward:
        """Makes the reward PickScore (Kirstain et al., 2305.01569), a number of about 17 to 23.

        PickScore is the logit of a CLIP-H model that was fine-tuned on choices of people.
        """
        processor = kwargs.pop("processor", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
        return cls.from_pretrained(path, text, True, processor, **kwargs)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        texts = _texts_of(len(images), self.text, prompts)
        features = _image_features(self.model, self.image_input(images))
        cosine = (features * self._text_features(texts).to(features)).sum(-1)
        if not self.logits:
            return cosine
        bias = getattr(self.model, "logit_bias", None)
        return self.model.logit_scale.exp().to(cosine) * cosine + (0 if bias is None else bias.to(cosine))

    @torch.no_grad()
    def _text_features(self, texts: list[str]) -> torch.Tensor:
        """Returns normalised embeddings (B, width)."""
        new_texts = [text for text in dict.fromkeys(texts) if text not in self._text_embeddings]
        if new_texts:
            # The type of `text_config` includes the dict and None that a constructor takes.
            length = self.model.config.text_config.max_position_embeddings  # type: ignore[union-attr]
            # SigLIP was trained on padded texts. CLIP takes its embedding at the end of the text, so padding is free.
            tokens = self.tokenizer(
                new_texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
            ).to(self.model.device)
            inputs = {name: tokens[name] for name in ("input_ids", "attention_mask") if name in tokens}
            features = _normalise(self.model.get_text_features(**inputs).pooler_output)
            self._text_embeddings |= dict(zip(new_texts, features, strict=True))
        result = torch.stack([self._text_embeddings[text] for text in texts])
        while len(self._text_embeddings) > MAX_TEXTS:  # the oldest first
            del self._text_embeddings[next(iter(self._text_embeddings))]
        return result


@check_kinds
@dataclasses.dataclass(eq=False, repr=False)
class BlipReward:
    """Rewards the match of image and text under BLIP (Li et al., 2201.12086), the network under ImageReward.

    The reward is the log-odds (nats) of a match by BLIP's matching head, whose text encoder attends to the image.
    ImageReward's own head of further layers is not among transformers' classes.

    Args:
        model: `BlipForImageTextRetrieval`, in evaluation mode.
        tokenizer: tokenizer of the same checkpoint.
        image_input: function from images in [0, 1] to `pixel_values`.
        text: description of the wanted images, one for all or one per image; None: the prompts that the images were
            made from, which must not be empty.
    """

    model: BlipForImageTextRetrieval
    tokenizer: PreTrainedTokenizerBase
    image_input: ImageInput
    text: str | Sequence[str] | None = None

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike = "Salesforce/blip-itm-base-coco", text: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> BlipReward:  # fmt: skip
        """Loads a model with its tokenizer and the settings of its image processor.

        Args:
            path: folder or Hub name of the checkpoint.
            text: description of the wanted images; see the class.
            **kwargs: arguments of transformers' `from_pretrained` (`dtype`, `device_map`, ...).
        """
        from transformers import AutoTokenizer, BlipForImageTextRetrieval

        model = _freeze(BlipForImageTextRetrieval.from_pretrained(path, **NO_REMOTE_CODE | kwargs))
        options = _download_options(kwargs)
        tokenizer = AutoTokenizer.from_pretrained(path, **NO_REMOTE_CODE | options)
        return cls(model, tokenizer, ImageInput.from_pretrained(path, **options), text)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        texts = _texts_of(len(images), self.text, prompts)
        length = self.model.config.text_config.max_position_embeddings  # type: ignore[union-attr]
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        logits = self.model(
            input_ids=tokens["input_ids"].to(images.device), attention_mask=tokens["attention_mask"].to(images.device),
            pixel_values=self.image_input(images).to(self.model.dtype),
        ).itm_score  # fmt: skip
        different, match = _to_float32(logits).unbind(1)
        return match - different


@check_kinds
@dataclasses.dataclass(eq=False, repr=False)
class AestheticReward:
    """Rewards the LAION aesthetic score, about 1 to 10: people's ratings as predicted from CLIP image embeddings.

    Args:
        model: `CLIPModel`.
        head: module from normalised embeddings (B, width) to scores (B, 1).
        image_input: function from images in [0, 1] to `pixel_values`.
    """

    model: CLIPModel
    head: torch.nn.Module
    image_input: ImageInput

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.model).__name__}, {type(self.head).__name__})"

    @classmethod
    def from_pretrained(cls, head: str | os.PathLike, path: str = CLIP_LARGE, **kwargs: Any) -> AestheticReward:
        """Loads CLIP and a head from a file.

        Args:
            head: a `.safetensors` file, or one of the published `.pth` files, which are read as weights only:
                `sac+logos+ava1-l14-linearMSE.pth` of christophschuhmann/improved-aesthetic-predictor (the head that
                most papers use), or `sa_0_4_vit_l_14_linear.pth` of LAION-AI/aesthetic-predictor.
            path: checkpoint of the CLIP model that the head was trained on.
            **kwargs: arguments of transformers' `from_pretrained` (`dtype`, `device_map`, ...).

        Raises:
            CheckpointError: the head's file is missing or damaged, or does not hold a chain of linear layers that ends
                in one number.
        """
        from transformers import CLIPModel

        layers = aesthetic_head(head)  # before the large download
        # The whole model is loaded: the image encoder alone reads the width of its projection from a part of the
        # config that some checkpoints leave out.
        model = _freeze(CLIPModel.from_pretrained(path, **kwargs))
        if layers[0].in_features != model.config.projection_dim:
            raise CheckpointError(
                f"The head '{head}' takes {layers[0].in_features} numbers, but embeddings of '{path}' have "
                f"{model.config.projection_dim}. Pass the CLIP model that the head was trained on."
            )
        return cls(model, layers.to(model.device), ImageInput.from_pretrained(path, **_download_options(kwargs)))

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return self.head(_image_features(self.model, self.image_input(images)))[:, 0]


def aesthetic_head(path: str | os.PathLike) -> torch.nn.Sequential:
    """Returns the chain of linear layers in an aesthetic predictor's file, without the dropout of its training.

    Raises:
        CheckpointError: the file is missing or damaged, or does not hold a chain of linear layers that ends in one
            number.
    """
    tensors = _head_tensors(Path(path))
    weights = (name for name in tensors if name.endswith("weight"))
    names = sorted(weights, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    biases = [name.removesuffix("weight") + "bias" for name in names]
    shapes = [tuple(tensors[name].shape) for name in names]
    is_chain = all(len(shape) == 2 for shape in shapes) and all(
        left[0] == right[1] for left, right in itertools.pairwise(shapes)
    )
    if not names or not is_chain or shapes[-1][0] != 1 or sorted(tensors) != sorted(names + biases):
        raise CheckpointError(
            f"'{path}' holds the tensors {sorted(tensors)} with weights of shapes {shapes}; allowed: a chain of "
            "linear layers that ends in one number."
        )
    layers = torch.nn.Sequential(*(torch.nn.Linear(inputs, outputs) for outputs, inputs in shapes))
    for layer, name, bias in zip(layers, names, biases, strict=True):
        layer.load_state_dict({"weight": tensors[name], "bias": tensors[bias]})
    return _freeze(layers)


def _head_tensors(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return load_tensors(path)[0]
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"The file of weights '{path}' can't be read: {error}. Name another file.") from error
    except Exception as error:  # torch documents no list: damaged archives and pickles raise errors of every kind
        # The message of torch is left out: it advises to execute code from the file.
        raise CheckpointError(
            f"'{path}' can't be read as a file of weights alone ({type(error).__name__}). Download the file again."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise CheckpointError(f"'{path}' holds a {type(content).__name__}; allowed: a dictionary of tensors.")
    return content


def _texts_of(count: int, text: str | Sequence[str] | None, prompts: Sequence[str]) -> list[str]:
    """Returns one text per image: `text`, or for None the prompts.

    Raises:
        InputError: texts of another number, or an empty prompt.
    """
    source = prompts if text is None else text
    texts = [source] * count if isinstance(source, str) else list(source)
    if len(texts) != count:
        raise InputError(f"Got {len(texts)} texts for {count} images; allowed: one, or one per image.")
    if text is None and not all(isinstance(each, str) and each.strip() for each in texts):
        raise InputError(
            f"The images were made from the prompts {texts}, and similarity to an empty text has no meaning. Give "
            "the reward a `text`, or prompts that are not empty (`prompts=` of `posterior_guidance`)."
        )
    return texts


def _download_options(kwargs: dict[str, Any], same_repository: bool = True) -> dict[str, Any]:
    """Returns those of a model's loading arguments that also apply to its tokenizer and image processor.

    `revision` and `subfolder` apply only to files in the same repository.
    """
    names = {"token", "cache_dir", "local_files_only", "force_download"}
    names |= {"revision", "subfolder"} if same_repository else set()
    return {name: value for name, value in kwargs.items() if name in names}


def _image_features(model: CLIPModel | SiglipModel, pixels: torch.Tensor) -> torch.Tensor:
    """Returns normalised embeddings (B, width)."""
    return _normalise(model.get_image_features(pixel_values=pixels.to(model.dtype)).pooler_output)


def _freeze(module: Module) -> Module:
    return module.eval().requires_grad_(False)


def _to_float32(x: torch.Tensor) -> torch.Tensor:
    """Returns `x` in float32; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _normalise(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(_to_float32(x), dim=-1)
