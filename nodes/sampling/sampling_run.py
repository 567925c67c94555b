"""What a patched MODEL does around one sampling run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...moa_core.adapters.layer_hooks import deltas_on
from ...moa_core.adapters.run import Adapters
from ...moa_core.address import Layer
from ...moa_core.learned.moa import Mixture
from ...moa_core.routing.trace import TIMESTEPS, Trace
from ...moa_core.run import Run, who
from ...moa_core.subjects.subject import Subject
from ..experts.own_context import tokens_of_pictures
from ..host.attention_layers import foreign_layers, layer_of, unet_blocks
from ..host.messages import Message, NodeText
from ..prompt.clip_binding import BOUND_PROMPT, Binder
from ..prompt.missing_subjects import missing_subjects
from .batch_numbers import batch_numbers, numbers_of_sources
from .bound_rows import MODEL_COND, CONDPrompt, prompt_of
from .noise_levels import cut_from, learned_from, spans
from .other_nodes import beside_others, counts_as_within, is_part_of, no_other_device
from .past_runs import KEPT, PastRun, begins_whole, gone_before, made_by, owners_of, whole
from .run_notes import RunNotes, settings_of
from .scouting import scout
from .unet_call import SamplingRun

KEY = "moa"


class MoAHooks:
    """Two wrappers: one around a sampling run, one around every U-Net call in it.

    Attention layers are patched in a call and not before, so that the patches can be put where they belong whatever
    else is patched: ours see h before anyone changes it (token merging, tiling) and the attention's output after
    everyone else is done. Deltas are hooks on the U-Net's layers, there while a run samples.
    """

    def __init__(
        self,
        subjects: Sequence[Subject],
        strength: float = 1.0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        sparse: bool = True,
        learned: Mixture | None = None,
        adapters: Adapters | None = None,
        text: NodeText | None = None,
        timesteps: int = TIMESTEPS,
        sockets: Sequence[int] | None = None,
        binder: Binder | None = None,
        moa: object = None,
    ):
        """learned, adapters: see Run. timesteps: those that the learned experts were trained on. sockets: the number of
        each subject's; None: one after the other. binder: of the CLIP that goes with it. moa: the host's own of the
        learned experts, for the nodes that ask its image encoder.
        """
        self.subjects, self.strength, self.sparse = subjects, strength, sparse
        self.sockets = list(range(len(subjects)) if sockets is None else sockets)
        self.binder, self.moa = binder, moa
        self.start_percent, self.end_percent = start_percent, end_percent
        self.learned, self.adapters, self.timesteps = learned, adapters, timesteps
        self.text = text or NodeText()
        self._run: SamplingRun | None = None
        self._model = object()  # tells this MODEL's past runs from others'

    @property
    def people(self) -> int:
        """How many masks a picture has: one for each socket as far as the last that is connected."""
        return max(self.sockets, default=0) + 1

    @property
    def runs(self) -> list[PastRun]:
        """This MODEL's last runs, the newest last."""
        return KEPT.of(self._model)

    def past_runs(self) -> list[PastRun]:
        """All that are kept, in the order in which a picture is looked for: this MODEL's first, the newest first."""
        return KEPT.newest_first(self._model)

    def attach(self, model: ModelPatcher, *beside: ModelPatcher) -> None:
        """beside: what holds the experts' weights."""
        for patcher in beside:  # ComfyUI asks this to make the same once more, for another device
            patcher.cached_patcher_init = (no_other_device, ())
        model.set_additional_models(KEY, list(beside))
        model.set_attachments(KEY, self)
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, self.sample)
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, self.call_unet)

    def sample(
        self,
        executor,
        noise,
        latent_image,
        sampler,
        sigmas,
        denoise_mask=None,
        callback=None,
        disable_pbar=False,
        seed=None,
        **kwargs,
    ):
        """Around one sampling run: noise [B, 4, h, w], sigmas [steps + 1].

        Without a subject in any positive prompt it is the plain checkpoint's.
        """
        guider = executor.class_obj
        size = tuple(noise.shape[-2:])
        subjects, parts = self._shown(size, latent_image)
        own = dict(zip(subjects, subjects, strict=True))
        numbers = self._numbers(latent_image, noise, seed)
        conds = [(name, conditioning) for name, conds in guider.conds.items() for conditioning in conds]
        for _, conditioning in conds:
            conditioning["model_conds"] = tokens_of_pictures(conditioning["model_conds"], numbers)
        prompts = [prompt_of(name, conditioning, self.binder, own, numbers) for name, conditioning in conds]
        positives = [prompt.bound for prompt in prompts if prompt.positive]
        missing = missing_subjects(
            dict(zip(self.sockets, subjects, strict=True)), positives, self._has_read_others(guider)
        )
        foreign = foreign_layers(guider.model_patcher, unet_blocks(guider.model_patcher))
        self.text.say([*missing, *parts, *beside_others(foreign)])
        bound = any(prompt is not None and prompt.bindings for prompt in positives)
        if bound:
            for conditioning, prompt in zip(itertools.chain(*guider.conds.values()), prompts, strict=True):
                maps = prompt.maps(range(len(noise)), size)
                conditioning["model_conds"] = {**conditioning["model_conds"], MODEL_COND: maps}
        known = [s for s in subjects if any(p is not None and p.carries(s) for p in positives)]
        run = self._start(guider, noise, sigmas, prompts, known, foreign, numbers)
        levels = float(sigmas[0]), float(sigmas[-1])
        sources, same_sampling = gone_before(latent_image, levels[0], who(known), self.past_runs())
        if sources is not None:
            run.moa.goes_on_from([(past.places, picture) for past, picture in sources])
        if same_sampling:
            run.trace.goes_on_from([(past.trace, picture) for past, picture in sources])
        at_work = [bound and run.end_sigma <= sigma <= run.start_sigma for sigma in sigmas[:-1].tolist()]
        notes = RunNotes(settings_of(guider, sampler, sigmas))
        steps_of_moa = {n for n, works in enumerate(at_work) if works}
        rest = (denoise_mask, notes.after_each_step(callback, steps_of_moa), disable_pbar, seed)
        outer, self._run = self._run, run
        try:
            with self._deltas(guider.model_patcher):
                if bound and run.moa.wants_scouting:
                    timed = notes.after_each_step(None, ())
                    scout(run.moa, executor, noise, latent_image, sigmas, denoise_mask, timed, seed, **kwargs)
                samples = executor(noise, latent_image, sampler, sigmas, *rest, **kwargs)
        finally:
            self._run = outer
        self.text.add(run.doubts)
        run.trace.to_cpu()
        owners = owners_of(run.moa.subject_shares(), [self.sockets[self.subjects.index(subject)] for subject in known])
        sentences = [str(message) for message in missing]
        KEPT.add(
            PastRun(
                self._model,
                samples.detach().cpu(),
                levels,
                run.trace,
                sentences,
                bound,
                owners,
                self.people,
                run.moa.places,
                numbers,
                notes,
                part=bool(parts),
            )
        )
        return samples

    def call_unet(self, executor, *args, **kwargs):
        """Around one U-Net call; one without rows is the base model's own, compiled or not."""
        if MODEL_COND not in kwargs:
            return executor(*args, **kwargs)
        if self._run is None:
            return executor(*args, **{name: given for name, given in kwargs.items() if name != MODEL_COND})
        return self._run.call_unet(executor, *args, **kwargs)

    def _numbers(self, latents: Tensor, noise: Tensor, seed: int | None) -> list[int]:
        """Which pictures of the whole batch these are."""
        known = whole(made_by(latents.detach().cpu(), self.runs[::-1]))
        if known is not None:
            return numbers_of_sources(known)
        return batch_numbers(noise, seed, self.subjects)

    def _start(
        self,
        guider,
        noise: Tensor,
        sigmas: Tensor,
        prompts: list[CONDPrompt],
        known: list[Subject],
        foreign: frozenset[Layer],
        numbers: list[int],
    ) -> SamplingRun:
        sampling = guider.model_patcher.get_model_object("model_sampling")
        start, end = (float(sampling.percent_to_sigma(p)) for p in (self.start_percent, self.end_percent))
        learned = learned_from(sampling, self.timesteps, sigmas)
        if self.adapters is None:
            start = min(start, learned)
        size = tuple(noise.shape[-2:])
        first = max((sigma for sigma in sigmas[:-1].tolist() if end <= sigma <= min(start, learned)), default=end)
        blocks = unet_blocks(guider.model_patcher)
        moa = Run(
            known,
            len(noise),
            size,
            cut_from(sampling, first, self.end_percent),
            blocks,
            self.strength,
            self.sparse,
            self.learned,
            self.adapters,
            learned_from=learned,
            numbers=numbers,
        )
        by_number = {prompt.number: prompt for prompt in prompts}
        return SamplingRun(
            start,
            end,
            Trace(size, blocks),
            moa,
            spans(guider.conds, prompts, sampling),
            guider.model_patcher,
            by_number,
            foreign,
        )

    def _shown(self, size: tuple[int, int], latents: Tensor) -> tuple[list[Subject], list[Message]]:
        """The subjects as a run of that size, begun with these latents, is to show them, and what to say of it."""
        if all(subject.area is None for subject in self.subjects):
            return list(self.subjects), []
        from_whole = begins_whole(latents, self.past_runs())
        parts = [is_part_of(subject.area, size, from_whole) for subject in self.subjects]
        if not any(parts):
            return list(self.subjects), []
        shown = [replace(s, area=None) if part else s for s, part in zip(self.subjects, parts, strict=True)]
        within = {n: s.area for n, s, part in zip(self.sockets, self.subjects, parts, strict=True) if part}
        return shown, [counts_as_within(within, size)]

    def _has_read_others(self, guider) -> bool:
        """Whether the CLIP was given a prompt with a subject that no conditioning of the guider's has noted."""
        noted = [c[BOUND_PROMPT] for conds in guider.conds.values() for c in conds if BOUND_PROMPT in c]
        return self.binder is not None and self.binder.has_read_more_than(noted)

    def _deltas(self, model: ModelPatcher):
        """Hooks for the deltas that there are, as a context."""
        if self.adapters is None or self.adapters.deltas is None:
            return nullcontext()

        def now():
            call = self._run and self._run.call
            return call and call.changed

        return deltas_on(partial(layer_of, model), self.adapters.deltas, now)
