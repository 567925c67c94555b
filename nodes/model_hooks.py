"""MoA inside ComfyUI's sampling: what a patched MODEL does beside the base model."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from comfy.ldm.modules import attention as host_attention
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..moa_core.address import Address, BlockShape
from ..moa_core.binding import BoundPrompt
from ..moa_core.expert import Attend
from ..moa_core.image_expert import PriorAttention
from ..moa_core.image_mixture import ImageCall, ImageRun
from ..moa_core.moa import ATTENTIONS
from ..moa_core.subject import Subject
from ..moa_core.trace import TIMESTEPS, Trace
from ..moa_core.unet_call import LearnedRun, UNetCall
from .bound_rows import MODEL_COND, CONDBindings, Rows
from .clip_binding import BOUND_PROMPT, NotedPrompt
from .messages import Message, NodeText

KEY = "moa"
RUNS_KEPT = 4


@dataclass
class SamplingRun:
    """One sampling run under way."""

    start_sigma: float
    end_sigma: float
    trace: Trace
    moa: LearnedRun | ImageRun
    spans: list[tuple[float, float, list[Subject]]]
    """(from, to) in sigma of every positive prompt, and its subjects."""

    def present(self, sigma: float) -> set[Subject]:
        """The subjects of the prompts at work at this noise level."""
        return {subject for start, end, there in self.spans if end <= sigma <= start for subject in there}


@dataclass
class PastRun:
    """What is kept of a sampling run."""

    samples: Tensor
    """The sampled latents, on the CPU."""
    trace: Trace
    """Empty where MoA did not act, or in no call that showed whole pictures."""
    missing: list[str]
    """A sentence for every subject that did not appear."""
    bound: bool
    """Whether any positive prompt carried a subject."""
    owners: Tensor
    """Whose each pixel is: the number of the subject [B, h, w], -1 for nobody's."""


class MoAHooks:
    """Two wrappers: one around a sampling run, one around every U-Net call in it.

    Nothing is patched outside a call, so that the attention patches of a call can be put where they
    belong whatever else is patched: ours see h before anyone changes it (token merging, tiling) and the
    attention's output after everyone else is done.
    """

    def __init__(
        self,
        start_run: Callable[..., LearnedRun | ImageRun],
        subjects: Sequence[Subject],
        strength: float,
        start_percent: float,
        end_percent: float,
        sparse: bool,
        text: NodeText | None = None,
        timesteps: int = TIMESTEPS,
    ):
        """start_run: LearnedRun or ImageRun with its mixture. timesteps: those it was trained on."""
        self.start_run, self.subjects, self.strength, self.sparse = start_run, subjects, strength, sparse
        self.start_percent, self.end_percent = start_percent, end_percent
        self.text, self.timesteps = text or NodeText(), timesteps
        self.runs: deque[PastRun] = deque(maxlen=RUNS_KEPT)
        """The last runs, the newest last."""
        self._run: SamplingRun | None = None

    def attach(self, model: ModelPatcher, mixture: ModelPatcher) -> None:
        model.set_additional_models(KEY, [mixture])
        model.set_attachments(KEY, self)
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, self.sample)
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, self.call_unet)

    def sample(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        """Around one sampling run: noise [B, 4, h, w], sigmas [steps + 1].

        Without a subject in any positive prompt it is the plain checkpoint's.
        """
        guider = executor.class_obj
        bindings = [_bindings(name, c, len(noise)) for name, conds in guider.conds.items() for c in conds]
        positives = [binding.prompt for binding in bindings if binding.positive]
        missing = missing_subjects(self.subjects, positives)
        self.text.say(missing)
        bound = any(prompt is not None and prompt.bindings for prompt in positives)
        if bound:
            for conditioning, binding in zip(itertools.chain(*guider.conds.values()), bindings, strict=True):
                conditioning["model_conds"] = {**conditioning["model_conds"], MODEL_COND: binding}
        sampling = guider.model_patcher.get_model_object("model_sampling")
        start, end = (float(sampling.percent_to_sigma(p)) for p in (self.start_percent, self.end_percent))
        start = min(start, _trained_sigma(sampling, self.timesteps))
        size = tuple(noise.shape[-2:])
        levels = [sigma for sigma in sigmas[:-1].tolist() if end <= sigma <= start]
        blocks = unet_blocks(guider.model_patcher)
        known = [s for s in self.subjects if any(p is not None and p.carries(s) for p in positives)]
        moa = self.start_run(known, len(noise), size, levels, self.strength, blocks, self.sparse)
        run = SamplingRun(start, end, Trace(size), moa, _spans(guider.conds, bindings, sampling))
        outer, self._run = self._run, run
        try:
            samples = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            self._run = outer
        run.trace.to_cpu()
        owners = _owners(run.moa.subject_shares(), [self.subjects.index(subject) for subject in known])
        sentences = [str(message) for message in missing]
        self.runs.append(PastRun(samples.detach().cpu(), run.trace, sentences, bound, owners))
        return samples

    def call_unet(self, executor, *args, **kwargs):
        """Around one U-Net call; one without rows is the base model's own, compiled or not."""
        if MODEL_COND not in kwargs:
            return executor(*args, **kwargs)
        return self._call(executor, *args, **kwargs)

    @torch.compiler.disable
    def _call(self, executor, x, timesteps, context, y=None, control=None, transformer_options={}, **kwargs):  # noqa: B006
        """One U-Net call: x [B, 4, h, w], timesteps [B], context [B, T, D].

        Not compiled: a compiled U-Net is the same for every step, what MoA does is not. And as ComfyUI has
        torch.compile trust that transformer_options never change, it would leave our patches out, or take one layer's
        for another's.
        """
        rows: Rows = kwargs.pop(MODEL_COND)
        run = self._run
        if run is None or not run.end_sigma <= (sigma := float(transformer_options["sigmas"][0])) <= run.start_sigma:
            return executor(x, timesteps, context, y, control, transformer_options, **kwargs)
        timestep = float(timesteps[0])  # before the U-Net is queued: afterwards it would wait for it

        options = dict(transformer_options)
        prior = _prior(executor.class_obj)
        call = run.moa.call(rows.rows, sigma, x, context, timesteps, prior, _attention(options), run.present(sigma))
        options["patches"] = _with_patches(options.get("patches", {}), call)
        out = executor(x, timesteps, context, y, control, options, **kwargs)
        if tuple(x.shape[-2:]) == run.trace.latent_shape:  # whole pictures, no areas of them
            self._record(run.trace, timestep, rows, len(transformer_options["cond_or_uncond"]), call)
        run.moa.finish(call, rows.rows, x)
        return out

    @staticmethod
    def _record(trace: Trace, timestep: float, rows: Rows, prompts: int, call: UNetCall | ImageCall) -> None:
        """Keep the shares of the rows under positive prompts; each prompt of a call has the same pictures."""
        pictures = len(rows.rows) // prompts
        for start in range(0, len(rows.rows), pictures):
            block = rows.rows[start : start + pictures]
            if block[0].positive:
                maps = {layer: share[start : start + pictures] for layer, share in call.shares.items()}
                trace.add(timestep, maps, [row.view.picture for row in block])


def _trained_sigma(sampling, timesteps: int) -> float:
    """The noise level between the last timestep that a MoA was trained on and the next one."""
    return math.inf if timesteps == TIMESTEPS else float(sampling.sigma(torch.tensor(timesteps - 0.5)))


def _bindings(name: str, conditioning: dict, pictures: int) -> CONDBindings:
    """What one of the guider's conditionings binds; nothing in the negative ones."""
    positive, text = "negative" not in name, conditioning.get("cross_attn")
    prompt: BoundPrompt | None = conditioning.get(BOUND_PROMPT) if positive else None
    if isinstance(prompt, NotedPrompt) and text is not None:
        prompt = prompt.grown_to(text)
    return CONDBindings.of_batch(pictures, prompt, text.shape[1] if text is not None else 1, positive)


def _spans(conds: dict, bindings: list[CONDBindings], sampling) -> list[tuple[float, float, list[Subject]]]:
    """When each positive prompt of the guider's is at work (SetTimestepRange), and its subjects."""
    spans = []
    for conditioning, binding in zip(itertools.chain(*conds.values()), bindings, strict=True):
        if binding.prompt is not None:
            percents = conditioning.get("start_percent", 0.0), conditioning.get("end_percent", 1.0)
            start, end = (float(sampling.percent_to_sigma(percent)) for percent in percents)
            spans.append((start, end, [bound.subject for bound in binding.prompt.bindings]))
    return spans


def _owners(shares: Tensor, numbers: list[int]) -> Tensor:
    """From the shares [S, B, h, w] of the subjects with these numbers."""
    if not numbers:
        return torch.full(shares.shape[1:], -1)
    best, owner = shares.max(dim=0)
    return torch.tensor(numbers)[owner].where(best > 0, -1)


def missing_subjects(subjects: Sequence[Subject], prompts: list[BoundPrompt | None]) -> list[Message]:
    """A message for every subject that no positive prompt carries."""
    known = [prompt for prompt in prompts if prompt is not None]
    if subjects and not known:
        return [
            Message(
                "No subject will appear: the prompt comes from another CLIP.",
                "No positive prompt carries what MoA Patch Model's CLIP noted. Connect it to the positive prompt's "
                "CLIPTextEncode; an encoder with a conditioning of its own drops it.",
            )
        ]
    bound = {id(binding.subject) for prompt in known for binding in prompt.bindings}
    quoted = " and ".join(dict.fromkeys(f"'{prompt.prompt}'" for prompt in known))
    messages = []
    for number, subject in enumerate(subjects):
        if id(subject) not in bound:
            same = sum(other.word == subject.word for other in subjects[: number + 1])
            lack, times = (
                (f"no '{subject.word}'", "") if same == 1 else (f"not {same} '{subject.word}'", f" {same} times")
            )
            messages.append(
                Message(
                    f"subject{number} will not appear: {lack} in the prompt.",
                    f"The prompt {quoted} does not hold the word '{subject.word}'{times}. Write it there, or change "
                    "the word in Subject Encoder.",
                )
            )
    return messages


def _attention(transformer_options: dict) -> Attend:
    """The attention of the host's own layers, with whatever another node has put in its place."""

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        return host_attention.optimized_attention(q, k, v, heads, transformer_options=transformer_options)

    return attend


def _prior(unet: torch.nn.Module) -> Callable[[Address], PriorAttention]:
    """The U-Net's own cross-attention at an address."""

    def at(address: Address) -> PriorAttention:
        attention = unet.get_submodule(address.to_ldm()).attn2
        return PriorAttention(attention.to_q, attention.to_k, attention.to_out, attention.heads)

    return at


def unet_blocks(model: ModelPatcher) -> dict[Address, BlockShape]:
    """Transformer blocks of the model's U-Net; none for a model that is no U-Net."""
    blocks = {}
    for name, module in model.model.diffusion_model.named_modules():
        address = Address.from_ldm(name)
        if address and isinstance(module, BasicTransformerBlock) and module.attn2 is not None:
            blocks[address] = BlockShape(module.attn1.to_q.in_features, module.attn2.to_k.in_features)
    return blocks


def _with_patches(patches: dict, call: UNetCall | ImageCall) -> dict:
    """The attention patches of one U-Net call with ours: first in, last out."""
    patches = dict(patches)
    held: dict[str, Tensor] = {}

    def hold(attention: str):
        def before(h, context, value, extra_options):
            held[attention] = h
            return h, context, value

        return before

    def mix(attention: str):
        def after(prior, extra_options):
            kind, number = extra_options["block"]
            address = Address(kind, number, extra_options["block_index"])
            size = tuple(extra_options["activations_shape"][-2:])  # its own: others may change it (Deep Shrink)
            return call.mix(address, attention, held.pop(attention), prior, size)

        return after

    for attention in ATTENTIONS:
        before, after = f"{attention}_patch", f"{attention}_output_patch"
        patches[before] = [hold(attention), *patches.get(before, [])]
        patches[after] = [*patches.get(after, []), mix(attention)]
    return patches
