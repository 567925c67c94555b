"""Sampling with a MoA in diffusers: the default host where there is no ComfyUI."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from diffusers import ControlNetModel, EulerDiscreteScheduler, SchedulerMixin, UniPCMultistepScheduler
from torch import Tensor

from moa_core.adapters.deltas import deltas_of
from moa_core.adapters.ip_adapter_file import IPAdapter
from moa_core.adapters.photomaker_file import PhotoMaker
from moa_core.adapters.run import Adapters
from moa_core.address import block_shapes
from moa_core.learned.moa import MoA
from moa_core.routing.subject_area import opening_end
from moa_core.routing.trace import Trace
from moa_core.run import Call, Run
from moa_core.subjects.binding import Binding, OwnText
from moa_core.subjects.reference import prepare_reference
from moa_core.subjects.rows import Row
from moa_core.subjects.subject import Subject
from moa_core.subjects.view import View
from training.host.adapter import MoAUNet
from training.host.base import Base
from training.host.lora import face_lora, maker_lora
from training.host.prior import prior_of
from training.host.schedule import SCHEDULE, TIMESTEPS, sigma_at
from training.host.scouting import scout
from training.host.sdxl import TwoTexts, added_conditions
from training.host.tokenizer import LENGTH, bind_prompt, tokenize

Sampler = Literal["uni_pc", "euler"]
Control = Callable[[Tensor, Tensor, Tensor], dict[str, Any]]
"""Latents [2B, 4, h, w], timestep [2B], context [2B, T, D] -> what else diffusers' U-Net is given: a ControlNet's
residuals."""


def controlled_by(network: ControlNetModel, picture: Tensor, strength: float = 1.0) -> Control:
    """What a ControlNet says of a picture [H, W, 3] in 0..1, the same for all rows: `control` of `sample`."""

    def control(latents: Tensor, timestep: Tensor, context: Tensor) -> dict[str, Any]:
        shown = picture.to(latents).movedim(-1, 0).expand(len(latents), -1, -1, -1)
        down, middle = network(latents, timestep, context, shown, strength, return_dict=False)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

    return control


class MoAPipeline:
    """A base model with a MoA of either kind beside its U-Net."""

    def __init__(
        self,
        base: Base,
        moa: MoA | IPAdapter | PhotoMaker | None = None,
        unet: MoAUNet | None = None,
        adapters: Adapters | None = None,
    ):
        """unet: the base's U-Net with the MoA's mixture, where that is built already. adapters: of subjects that have
        one of their own; all others are the MoA's.

        Subjects of an IPAdapter are the caller's to make: its projector's tokens, flattened, of a CLIP vision model's
        output, of a face's embedding; likewise its mixture's `negative`. Those of a PhotoMaker are what its encoder
        makes of their photos, flattened. A file with a LoRA in it beside other LoRAs is one of the adapters.
        """
        self.base, self.moa, self.adapters = base, moa, adapters
        self.learned = moa.mixture if isinstance(moa, MoA) else None
        self.unet = unet or MoAUNet(base.unet, self.learned)
        self.device = next(base.unet.parameters()).device
        self.prior, self.blocks = prior_of(base.unet), block_shapes(base.unet.state_dict())
        self.timesteps = moa.config.timesteps if isinstance(moa, MoA) else TIMESTEPS
        self.photo_deltas = None
        if isinstance(moa, IPAdapter) and moa.changes:
            self.photo_deltas = deltas_of(base.unet, [face_lora(base.unet, moa)])
        elif isinstance(moa, PhotoMaker):
            self.photo_deltas = deltas_of(base.unet, [maker_lora(moa)])

    def encode_subject(
        self, pictures: Tensor | Sequence[Tensor], word: str, masks: Tensor | Sequence[Tensor | None] | None = None
    ) -> Subject:
        """P pictures [H, W, 3] in 0..1 of one person, their masks [H, W] -> a subject of a learned MoA."""
        own_masks = [None] * len(pictures) if masks is None else masks
        size = self.moa.image_encoder.size
        prepared = [prepare_reference(p, m, size) for p, m in zip(pictures, own_masks, strict=True)]
        return Subject(self.moa.encode(torch.stack(prepared).to(self.device))[None], word, word)

    def encode_prompt(self, prompt: str) -> Tensor:
        """[1, T, D]."""
        return self._read(tokenize(prompt)).last_hidden_state

    @torch.no_grad()
    def _read(self, tokens: list[int]) -> Any:
        """What the base's text encoder makes of them."""
        return self.base.text_encoder(torch.tensor([tokens], device=self.device))

    def __call__(self, prompt: str, subjects: list[Subject], negative: str = "", **options) -> tuple[Tensor, Trace]:
        """`sample` with subjects bound by their words, as the ComfyUI nodes bind them."""
        bindings = bind_prompt(prompt, subjects).bindings
        texts = [self._read(tokenize(text)) for text in (prompt, negative)]
        if isinstance(self.base.text_encoder, TwoTexts):
            pooled = torch.cat([text.pooler_output for text in texts])
            options["added"] = added_conditions(pooled, self.base.picture_size)
        if isinstance(self.moa, PhotoMaker):
            known = set() if self.adapters is None else self.adapters.subjects
            own = [each for each in bindings if each.subject not in known and each.subject.weight]
            fused = [self.fused_text(prompt, binding, self.moa) for binding in own]
            options["own_texts"] = [*options.get("own_texts", ()), *fused]
        return self.sample(*(text.last_hidden_state for text in texts), bindings, **options)

    def own_text(self, prompt: str, subject: Subject, occurrence: int, trigger: str) -> OwnText:
        """The prompt with the trigger in place of that occurrence, counted from 0, of the subject's word."""
        words = list(re.finditer(rf"\b{re.escape(subject.word)}\b", prompt))
        start, end = words[occurrence].span()
        return OwnText(subject, (self.encode_prompt(prompt[:start] + trigger + prompt[end:]),))

    def fused_text(self, prompt: str, binding: Binding, maker: PhotoMaker) -> OwnText:
        """The prompt with the bound token once for each photo of its subject, fused with what the photo shows.

        Raises ValueError where the prompt has no room for so many.
        """
        subject, place = binding.subject, binding.position
        identities = subject.features.unflatten(1, (-1, maker.encoder.width))  # [V, P, D]
        photos, tokens = identities.shape[1], tokenize(prompt)
        if place + photos >= LENGTH:
            raise ValueError(f"'{subject.word}' stands too late in the prompt for {photos} photos: move it forward")
        repeated = [*tokens[:place], *tokens[place : place + 1] * photos, *tokens[place + 1 :]]
        text = self._read(repeated[: LENGTH - 1] + tokens[-1:]).last_hidden_state
        places = range(place, place + photos)
        with torch.no_grad():
            texts = tuple(maker.encoder.fused(text, places, variant, subject.weight) for variant in identities)
        return OwnText(subject, texts, of_variants=True)

    def _run(
        self, subjects: list[Subject], batch: int, side: int, timesteps: list[float], strength: float, sparse: bool
    ):
        adapters = self.adapters
        if isinstance(self.moa, IPAdapter | PhotoMaker):
            known = Adapters({}, {}) if adapters is None else adapters
            photos = [subject for subject in subjects if subject not in known.subjects]
            images, parts, deltas, fused = dict(known.images), dict(known.parts), known.deltas, set(known.fused)
            if self.photo_deltas is not None:
                parts, deltas = {**parts, **dict.fromkeys(photos, (0,))}, self.photo_deltas
            if isinstance(self.moa, IPAdapter):
                images |= dict.fromkeys(photos, self.moa.mixture)
            else:
                fused |= set(photos)
            adapters = Adapters(images, parts, deltas, fused)
        learned_from = max(self.timesteps - 0.5, timesteps[-1])  # the last step is the MoA's, be it the only one
        return Run(
            subjects,
            batch,
            (side, side),
            opening_end(max((t for t in timesteps if t <= learned_from), default=0.0)),
            self.blocks,
            strength,
            sparse,
            self.learned,
            adapters,
            learned_from=learned_from,
            call_type=self.unet.call_type,
        )

    @torch.no_grad()
    def sample(
        self,
        positive: Tensor,
        negative: Tensor,
        bindings: Sequence[Binding] = (),
        steps: int = 20,
        cfg: float = 7.0,
        seed: int = 0,
        strength: float = 1.0,
        sparse: bool = True,
        batch: int = 1,
        same_noise: bool = False,
        sampler: Sampler = "uni_pc",
        subject_cfg: float | None = None,
        start: Tensor | None = None,
        control: Control | None = None,
        watch: Callable[[Call], None] | None = None,
        own_texts: Sequence[OwnText] = (),
        added: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Trace]:
        """Pictures [B, H, W, 3] in 0..1, and where the routers put the subjects; contexts are [1, T, D].

        Without bindings they are the plain base model's.
        same_noise: all pictures of the batch start as the first, as after ComfyUI's LatentBatchSeedBehavior.
        sampler: the paper's "uni_pc", or "euler", which paints what ComfyUI's `euler` on `simple` does.
        subject_cfg: None is plain classifier-free guidance. A number s is a guidance of our own, not the
        paper's, for one U-Net call more: uncond + cfg * (prior - uncond) + s * (moa - prior), which steers
        scene and subject apart. start: what to begin from instead of noise [B, 4, h, w], as `invert` gives it; then
        sampler must be "euler". control: beside the U-Net in every call. watch: sees every call with the MoA after it.
        own_texts: how the adapters of subjects read the positive prompt. added: what SDXL's U-Net is told besides, of
        the positive prompt and of the negative one.
        """
        context = torch.cat([c.expand(batch, -1, -1) for c in (positive, negative)])  # [2B, T, D]
        length = context.shape[1]
        rows = [
            Row(View(picture), bound, length, positive, own, positive)
            for bound, positive, own in ((tuple(bindings), True, tuple(own_texts)), ((), False, ()))
            for picture in range(batch)
        ]
        side = self.base.unet.config.sample_size
        kinds = 1 if same_noise else batch
        noise = torch.randn(kinds, 4, side, side, generator=torch.Generator().manual_seed(seed))
        noise = noise.expand(batch, -1, -1, -1)  # [B, 4, h, w]
        scheduler = _scheduler(sampler, steps)
        latents = noise.to(self.device) * scheduler.init_noise_sigma if start is None else start.to(self.device)
        trace = Trace((side, side), self.blocks)
        subjects = list(dict.fromkeys(binding.subject for binding in bindings))
        run = self._run(subjects, batch, side, scheduler.timesteps.tolist(), strength, sparse)
        acting = bool(bindings) and strength > 0.0

        def others(noisy: Tensor, timestep: Tensor, context: Tensor) -> dict[str, Any]:
            told = {} if control is None else control(noisy, timestep, context)
            if added is not None:
                told["added_cond_kwargs"] = {name: each.repeat_interleave(batch, 0) for name, each in added.items()}
            return told

        def predict(latents: Tensor, now: int) -> Tensor:
            noisy = torch.cat([latents] * 2)
            timestep = torch.tensor(float(now), device=self.device).expand(2 * batch)
            call = run.call(rows, float(now), noisy, context, timestep, self.prior)
            cond, uncond = self.unet.run(noisy, timestep, context, call, **others(noisy, timestep, context)).chunk(2)
            run.finish(call, rows, noisy)
            return uncond + cfg * (cond - uncond)

        if acting and run.wants_scouting:
            first = int(scheduler.timesteps[0])
            scale = 1.0 if sampler == "euler" else (sigma_at(first) ** 2 + 1) ** 0.5
            scout(run, predict, latents * scale, first)
        for t in scheduler.timesteps:
            timestep = t.float().to(self.device).expand(2 * batch)
            noisy = torch.cat([scheduler.scale_model_input(latents, t)] * 2)
            call = None
            if acting and (run.adapters is not None or float(t) <= run.learned_from):
                call = run.call(rows, float(t), noisy, context, timestep, self.prior)
            beside = others(noisy, timestep, context)
            moa, uncond = self.unet.run(noisy, timestep, context, call, **beside).chunk(2)
            if call is not None:
                trace.add(float(t), {layer: share[:batch] for layer, share in call.shares.items()})
                run.finish(call, rows, noisy)
                if watch:
                    watch(call)
            if subject_cfg is None or call is None:
                guided = uncond + cfg * (moa - uncond)
            else:
                prior, uncond = self.unet.run(noisy, timestep, context, None, **beside).chunk(2)
                guided = uncond + cfg * (prior - uncond) + subject_cfg * (moa - prior)
            latents = scheduler.step(guided, t, latents).prev_sample
        pictures = self.base.autoencoder.decode(latents)
        return (pictures / 2 + 0.5).clamp(0, 1).movedim(1, -1).cpu(), trace

    @torch.no_grad()
    def invert(self, picture: Tensor, prompt: str, steps: int = 50) -> Tensor:
        """What `sample` has to start from to draw this picture [H, W, 3] in 0..1 again, or with people swapped.

        DDIM inversion (paper, 5.3): the prior's own sampling of the prompt at guidance scale 1, backwards. Sample from
        it with as many steps of "euler" and cfg 1. -> [1, 4, h, w].
        """
        context, scheduler = self.encode_prompt(prompt), _scheduler("euler", steps)
        latents = self.base.autoencoder.encode(picture.to(self.device).movedim(-1, 0)[None] * 2 - 1)
        levels, sigmas = scheduler.timesteps.flip(0), scheduler.sigmas.flip(0)  # sigmas: 0 first, one more
        for t, sigma, next_sigma in zip([0.0, *levels[:-1]], sigmas[:-1], sigmas[1:], strict=True):
            timestep = torch.as_tensor(t).float().to(self.device).expand(1)
            noise = self.unet.run(latents / (sigma**2 + 1) ** 0.5, timestep, context, None)
            latents = latents + (next_sigma - sigma) * noise
        return latents


def _scheduler(sampler: Sampler, steps: int) -> SchedulerMixin:
    """UniPC on evenly spaced timesteps, or Euler on those of ComfyUI's `simple`: 999 and down in whole steps."""
    if sampler == "euler":
        # "leading" starts as ComfyUI does, from noise of variance sigma^2 + 1.
        scheduler = EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading")
        scheduler.set_timesteps(timesteps=[TIMESTEPS - 1 - int(i * TIMESTEPS / steps) for i in range(steps)])
    else:
        scheduler = UniPCMultistepScheduler(**SCHEDULE)
        scheduler.set_timesteps(steps)
    return scheduler
