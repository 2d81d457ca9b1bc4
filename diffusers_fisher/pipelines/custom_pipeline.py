"""For `DiffusionPipeline.from_pretrained(path, custom_pipeline=<this file>, trust_remote_code=True)`."""

from diffusers_fisher.pipelines import StableDiffusionFisherPipeline  # noqa: F401
