"""Calls of the networks and autoencoders of `FAMILIES` by themselves, without their pipelines."""

import itertools
import math

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed

PROMPT = {"do_classifier_free_guidance": False}


def z_image(pipe, prompt, backbone):
    embeds = pipe.encode_prompt(list(prompt), max_sequence_length=8, **PROMPT)[0]

    def call(x, t):
        out = pipe.transformer(list(x.unsqueeze(2).unbind(0)), (1000 - t[None]) / 1000, embeds).sample
        return -torch.stack(out).squeeze(2)

    return call


def patches(x):
    """Patches of 2x2, each a token: (1, C, h, w) to (1, h/2 w/2, 4C)."""
    return x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def grid(backbone):
    """Rows and columns of the patches."""
    return list(itertools.product(*(range(side // 2) for side in backbone.shape[1:])))


def of_patches(tokens, x):
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    return tokens.reshape(1, rows, columns, -1, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def qwen_image(pipe, prompt, backbone):
    embeds, mask = pipe.encode_prompt(prompt)

    def call(x, t):
        tokens = pipe.transformer(
            hidden_states=patches(x), timestep=t[None] / 1000, encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask, img_shapes=[[(1, x.shape[2] // 2, x.shape[3] // 2)]],
        ).sample  # fmt: skip
        return of_patches(tokens, x)

    return call


def flux2(pipe, prompt, backbone):
    embeds, _ = pipe.encode_prompt(prompt, max_sequence_length=8, text_encoder_out_layers=(0, 1, 2))
    text_places = torch.tensor([[[0, 0, 0, token] for token in range(embeds.shape[1])]])
    places = torch.tensor([[[0, row, column, 0] for row, column in grid(backbone)]])
    scale = torch.tensor([4.0]) if pipe.transformer.config.guidance_embeds else None

    def call(x, t):
        tokens = pipe.transformer(
            hidden_states=patches(x), timestep=t[None] / 1000, guidance=scale, encoder_hidden_states=embeds,
            txt_ids=text_places, img_ids=places,
        ).sample  # fmt: skip
        return of_patches(tokens, x)

    return call


def sana(pipe, prompt, backbone):
    embeds, mask, _, _ = pipe.encode_prompt(prompt, max_sequence_length=8, **PROMPT)
    return lambda x, t: (
        pipe.transformer(x, encoder_hidden_states=embeds, encoder_attention_mask=mask, timestep=t[None]).sample
    )


def chroma(pipe, prompt, backbone):
    embeds, _, mask, *_ = pipe.encode_prompt(prompt, max_sequence_length=8, **PROMPT)
    places = torch.tensor([[0, row, column] for row, column in grid(backbone)]).float()
    mask = torch.cat([mask, torch.ones(1, len(places))], 1)

    def call(x, t):
        tokens = pipe.transformer(
            hidden_states=patches(x), timestep=t[None] / 1000, encoder_hidden_states=embeds,
            txt_ids=torch.zeros(embeds.shape[1], 3), img_ids=places, attention_mask=mask,
        ).sample  # fmt: skip
        return of_patches(tokens, x)

    return call


def lumina2(pipe, prompt, backbone):
    embeds, mask, _, _ = pipe.encode_prompt(prompt, system_prompt="", max_sequence_length=24, **PROMPT)
    return lambda x, t: -pipe.transformer(x, 1 - t[None] / 1000, embeds, mask).sample


def aura_flow(pipe, prompt, backbone):
    embeds = pipe.encode_prompt(prompt, max_sequence_length=8, **PROMPT)[0]
    return lambda x, t: pipe.transformer(x, encoder_hidden_states=embeds, timestep=t[None] / 1000).sample


def cogview4(pipe, prompt, backbone):
    embeds = pipe.encode_prompt(prompt, max_sequence_length=8, **PROMPT)[0]
    size = torch.tensor([backbone.pixels]).float()
    return lambda x, t: pipe.transformer(
        x, encoder_hidden_states=embeds, timestep=t[None], original_size=size, target_size=size,
        crop_coords=torch.zeros(1, 2),
    ).sample  # fmt: skip


LOG_SHIFTS = {"CogView4": math.log(0.75 * (2 / 256) ** 0.5 + 0.25)}
"""Shift of log(sigma/alpha) between the network's time and the sample's level: of two tokens, with 256 for base."""


def kandinsky_2_2(pipe, prompt, backbone):
    embeds = {"image_embeds": backbone.options["image_embeds"][:1]}
    return lambda x, t: pipe.unet(x, t, None, added_cond_kwargs=embeds).sample[:, :4]


def hunyuan_dit(pipe, prompt, backbone):
    clip, _, clip_mask, _ = pipe.encode_prompt(prompt, **PROMPT)
    t5, _, t5_mask, _ = pipe.encode_prompt(prompt, text_encoder_index=1, **PROMPT)
    # The place of one patch in a grid of 32x32: in the middle, as large as the whole grid.
    rope = get_2d_rotary_pos_embed(8, ((0, 0), (32, 32)), (1, 1), output_type="pt")

    def call(x, t):
        out = pipe.transformer(
            x, t[None], encoder_hidden_states=clip, text_embedding_mask=clip_mask, encoder_hidden_states_t5=t5,
            text_embedding_mask_t5=t5_mask, image_meta_size=torch.tensor([[1024.0, 1024, 16, 16, 0, 0]]),
            style=torch.tensor([0]), image_rotary_emb=rope,
        ).sample  # fmt: skip
        return out[:, :4]

    return call


def hidream(pipe, prompt, backbone):
    t5, _, llama, _, pooled, _ = pipe.encode_prompt(prompt, max_sequence_length=8, **PROMPT)
    return lambda x, t: (
        -pipe.transformer(
            x, timesteps=t[None], encoder_hidden_states_t5=t5, encoder_hidden_states_llama3=llama, pooled_embeds=pooled
        ).sample
    )


def _without_graph(network):
    def make(pipe, prompt, backbone):
        with torch.no_grad():
            return network(pipe, prompt, backbone)

    return make


NETWORKS = {
    name: _without_graph(network)
    for name, network in {
        "ZImage": z_image, "QwenImage": qwen_image, "Flux2Klein": flux2, "Flux2": flux2, "Sana": sana,
        "Chroma": chroma, "Lumina2": lumina2, "AuraFlow": aura_flow, "HunyuanDiT": hunyuan_dit,
        "HiDreamImage": hidream, "CogView4": cogview4, "KandinskyV22": kandinsky_2_2,
    }.items()
}  # fmt: skip
"""Functions of a pipeline, a list of one prompt and the table's line; they return the network as a function of
(1, C, h, w) and a time."""


def qwen_latents(vae, pixels):
    mean = vae.encode(pixels[:, :, None]).latent_dist.mean[:, :, 0]
    shift, scale = (torch.tensor(vae.config[name])[:, None, None] for name in ("latents_mean", "latents_std"))
    return (mean - shift) / scale


def flux2_latents(vae, pixels):
    """The statistics are those of channels (C, 2, 2) of patches."""
    mean = vae.encode(pixels).latent_dist.mean
    rows, columns = mean.shape[2] // 2, mean.shape[3] // 2
    shift, scale = (
        value.view(-1, 2, 2).repeat(1, rows, columns)
        for value in (vae.bn.running_mean, (vae.bn.running_var + vae.config.batch_norm_eps).sqrt())
    )
    return (mean - shift) / scale


ENCODERS = {
    "AutoencoderKLQwenImage": qwen_latents,
    "AutoencoderKLFlux2": flux2_latents,
    "AutoencoderDC": lambda vae, pixels: vae.encode(pixels).latent * vae.config.scaling_factor,
}
"""Functions from an autoencoder and pixels to scaled latents, by the autoencoder's class."""
