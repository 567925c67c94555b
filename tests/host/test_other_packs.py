"""What other packs hand over, by their habits: each is written here after what published packs do, in our words."""

import asyncio
import copy

import pytest
import torch
from lora_files import random_lora
from safetensors.torch import save_file

from training.comfyui import NAME, PACK

PROMPT = "a man and a woman in paris"


@pytest.fixture(scope="module")
def couple(host, loaded, each_moa):
    """A patched MODEL and its CLIP with a man and a woman, of every kind of expert."""
    with torch.inference_mode():
        people = [host.subject(each_moa, 1), host.subject(each_moa, 2, "woman")]
        return host.patch(loaded[0], loaded[1], each_moa, *people)


def differ(a, b) -> bool:
    return bool((a - b).abs().max() > 1e-3 * b.abs().max())


def rebuilt(conditioning):
    """The same embeddings in a conditioning that has lost what its maker did not know."""
    return [[text, {"pooled_output": extra["pooled_output"]}] for text, extra in conditioning]


def test_a_conditioning_that_was_copied_or_rebuilt_is_the_same(host, couple):
    model, clip = couple
    positive, negative = host.prompt(clip, PROMPT), host.prompt(clip, "ugly")
    expected = host.sample(model, positive, negative, steps=2)["samples"]
    copied = copy.deepcopy(positive)
    assert torch.equal(host.sample(model, copied, negative, steps=2)["samples"], expected)
    people = [b.subject for b in copied[0][1]["moa_bound_prompt"].bindings]
    assert [p.adapter for p in people] == [
        p.adapter for p in model.get_attachment("moa").subjects
    ]  # nothing large twice
    assert torch.equal(host.sample(model, rebuilt(positive), negative, steps=2)["samples"], expected)


def by_tokens(clip, text: str):
    """As encoders do that ask for a tuple and build the conditioning themselves."""
    text, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
    return [[text, {"pooled_output": pooled}]]


def test_an_encoder_that_asks_for_a_tuple_binds_as_clip_text_encode(host, loaded, couple):
    model, clip = couple
    skipped = host.run("CLIPSetLastLayer", clip, -2)[0]
    negative = host.prompt(clip, "ugly")
    for encoder, text in ((clip, "(" + PROMPT + ":1.2)"), (skipped, "a house, " * 40 + PROMPT)):
        expected = host.sample(model, host.prompt(encoder, text), negative, steps=2)["samples"]
        assert torch.equal(host.sample(model, by_tokens(encoder, text), negative, steps=2)["samples"], expected)
    assert differ(expected, host.sample(loaded[0], by_tokens(loaded[1], text), negative, steps=2)["samples"])


def test_it_reads_a_loras_trigger_as_well(host, loaded, loras):
    man = host.run("MoALoRASubject", "random-0.safetensors", "man", "sks person", 1.0, 1.0)[0]
    model, clip = host.patch(*loaded[:2], None, man)
    negative = host.prompt(clip, "ugly")
    drawn = [host.sample(model, encode(clip, PROMPT), negative)["samples"] for encode in (host.prompt, by_tokens)]
    assert torch.equal(*drawn)


def test_weights_put_on_the_finished_embedding_are_told(host, loaded, couple, caplog):
    model, clip = couple
    text, pooled = clip.encode_from_tokens(clip.tokenize(PROMPT), return_pooled=True)
    weighted = [[text * torch.linspace(0.9, 1.1, 77)[:, None], {"pooled_output": pooled}]]
    host.sample(model, weighted, host.prompt(clip, "ugly"), steps=1)
    assert "weights came after its encoding" in caplog.text and "CLIPTextEncode" in caplog.text


def tiled(model, tile: int, at_once: int):
    """A clone that shows the checkpoint tiles of the latents, some at once, one below the other in the batch."""

    def wrapper(apply_model, args):
        x, given = args["input"], args["c"]
        starts = sorted({*range(0, x.shape[-1] - tile, tile - 4), x.shape[-1] - tile})
        corners = [(top, left) for top in starts for left in starts]
        out, count = torch.zeros_like(x), torch.zeros_like(x)
        for first in range(0, len(corners), at_once):
            boxes = [
                (..., slice(t, t + tile), slice(left, left + tile)) for t, left in corners[first : first + at_once]
            ]
            rows = len(boxes) * len(x)

            def shown(value, boxes=boxes, rows=rows):
                if not isinstance(value, torch.Tensor):
                    return value
                if value.ndim == 4 and value.shape[-2:] == x.shape[-2:]:
                    value = torch.cat([value[box] for box in boxes])
                return value if len(value) == rows else value.repeat(rows // len(value), *[1] * (value.ndim - 1))

            tiles = torch.cat([x[box] for box in boxes])
            drawn = apply_model(tiles, shown(args["timestep"]), **{name: shown(value) for name, value in given.items()})
            for box, part in zip(boxes, drawn.chunk(len(boxes)), strict=True):
                out[box] += part
                count[box] += 1
        return out / count

    changed = model.clone()
    changed.set_model_unet_function_wrapper(wrapper)
    return changed


def test_in_tiles_everybody_is_where_they_are_in_the_picture(host, loaded, each_moa, caplog):
    """Each has an area in a picture that is shown in nine tiles, four at once."""
    left, right = torch.zeros(1, 192, 192), torch.zeros(1, 192, 192)
    left[..., :80], right[..., 112:] = 1, 1
    made = []
    for seed, word, area in ((1, "man", left), (2, "woman", right)):
        if each_moa is None:
            made.append(host.run("MoALoRASubject", f"random-{seed}.safetensors", word, area=area)[0])
        else:
            picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(seed))
            made.append(host.run("MoASubjectEncoder", each_moa, picture, word, area=area)[0])

    def drawn(at_once: int, *people):
        model, clip = host.patch(*loaded[:2], each_moa, *people)
        prompts = host.prompt(clip, PROMPT), host.prompt(clip, "ugly")
        return host.sample(tiled(model, 12, at_once), *prompts, size=24, steps=1)["samples"]

    nobody, man, both = drawn(4), drawn(4, made[0]), drawn(4, *made)
    assert (both - drawn(1, *made)).abs().max() < 1e-4 * both.abs().max()
    times = 1 if type(each_moa).__name__ == "LoadedMoA" else 3  # a learned expert acts outside the areas, with the word
    for effect, there, elsewhere in (
        (man - nobody, slice(0, 8), slice(18, None)),
        (both - man, slice(16, None), slice(0, 6)),
    ):
        by_column = effect.abs().mean(dim=(0, 1, 2))
        assert by_column[there].min() > 0 and by_column[there].mean() > times * by_column[elsewhere].mean()
    assert "cannot follow" not in caplog.text


def test_people_found_by_their_words_are_found_in_tiles(host, couple, loaded):
    """No tile alone says where the words are: all of a step's together do, however many are shown at once."""
    model, clip = couple
    positive, negative = host.prompt(clip, PROMPT), host.prompt(clip, "ugly")
    drawn = [
        host.sample(tiled(m, 16, n), positive, negative, size=24, steps=2)["samples"]
        for m, n in ((model, 3), (model, 1), (loaded[0], 3))
    ]
    assert (drawn[0] - drawn[1]).abs().max() < 1e-3 * drawn[0].abs().max()
    assert differ(drawn[0], drawn[2])


@pytest.mark.parametrize("way", ["halves", "shifted tiles"])
def test_parts_that_nobody_can_place_show_no_other_rows_subjects_and_are_told(host, loaded, each_moa, caplog, way):
    """Wrappers that cut the latents and keep what the conditioning brings, or shift it otherwise (SpotDiffusion)."""
    people = [host.subject(each_moa, 1), host.subject(each_moa, 2, "woman")]
    model, clip = host.patch(*loaded[:2], each_moa, *people)

    def halves(apply_model, args):
        x, given = args["input"], args["c"]
        drawn = [apply_model(half.contiguous(), args["timestep"], **given) for half in x.chunk(2, dim=-1)]
        return torch.cat(drawn, dim=-1)

    def shifted(apply_model, args):
        def part(value, number, shifts):
            is_map = isinstance(value, torch.Tensor) and value.ndim == 4
            return value.roll(shifts, (-2, -1)).chunk(2, dim=-1)[number].contiguous() if is_map else value

        drawn = [
            apply_model(
                part(args["input"], number, (0, 5)),
                args["timestep"],
                **{name: part(value, number, (3, 5)) for name, value in args["c"].items()},
            )
            for number in range(2)
        ]
        return torch.cat(drawn, dim=-1).roll(-5, -1)

    model = model.clone()
    model.set_model_unet_function_wrapper(halves if way == "halves" else shifted)
    drawn = host.sample(model, host.prompt(clip, PROMPT), host.prompt(clip, "ugly"), steps=2)["samples"]
    assert drawn.isfinite().all() and caplog.text.count("cannot follow") == 1


class Shared(torch.nn.Module):
    """A module of somebody's in the place of an attention, as LayerDiffuse's: its own keeps the original in a list."""

    def __init__(self, own):
        super().__init__()
        self.heads, self.original = own.heads, [own]

    def forward(self, h, context=None, value=None, **others):
        return 0.9 * self.original[0](h, context, value)


@pytest.mark.parametrize("which", ["some", "all"])
def test_attentions_that_are_another_nodes_are_left_alone_and_other_graphs_are_as_before(
    host, loaded, each_moa, caplog, which
):
    base, clip, _ = loaded
    changed = base.clone()
    for name in [n for n, m in base.model.named_modules() if n.endswith((".attn1", ".attn2"))]:
        if which == "all" or ".input_blocks." in name:
            changed.add_object_patch(name, Shared(base.get_model_object(name)))
    person = host.subject(each_moa, 1)

    def run(model, clip):
        return host.sample(model, host.prompt(clip, PROMPT), host.prompt(clip, "ugly"), steps=2)["samples"]

    before = run(*host.patch(base, clip, each_moa, person))
    plain = run(changed, clip)
    caplog.clear()
    both = run(*host.patch(changed, clip, each_moa, person))
    assert caplog.text.count("attention layers are another node's") == 1
    if which == "some":
        assert differ(both, plain) and differ(both, before)
    elif each_moa is not None:  # a LoRA has layers elsewhere
        assert torch.equal(both, plain)
    caplog.clear()
    assert torch.equal(run(*host.patch(base, clip, each_moa, person)), before)
    assert "another node" not in caplog.text


def attention_couple(model, region, mask):
    """As packs do it: a region's prompt beside the KSampler's within the attention, each where its mask is."""

    def attn2_patch(q, k, v, extra_options):
        k, v = (torch.cat([each, region.expand(len(each), -1, -1)]) for each in (k, v))
        return torch.cat([q, q]), k, v

    def attn2_output_patch(out, extra_options):
        size = extra_options["activations_shape"][-2:]
        where = torch.nn.functional.interpolate(mask[None], size, mode="nearest").view(1, -1, 1)
        whole, part = out.chunk(2)
        return whole * (1 - where) + part * where

    attn2_patch.__qualname__ = "AttentionCouple.patch.<locals>.attn2_patch"
    changed = model.clone()
    changed.set_model_attn2_patch(attn2_patch)
    changed.set_model_attn2_output_patch(attn2_output_patch)
    return changed


def test_attention_couple_is_told_by_name_and_both_act(host, loaded, couple, caplog):
    model, clip = couple
    mask = torch.zeros(1, 128, 128)
    mask[..., 64:] = 1
    region = host.prompt(clip, "a woman by the sea")[0][0]
    positive, negative = host.prompt(clip, PROMPT), host.prompt(clip, "ugly")
    alone = host.sample(model, positive, negative, steps=2)["samples"]
    assert "Couple" not in caplog.text
    both = host.sample(attention_couple(model, region, mask), positive, negative, steps=2)["samples"]
    assert caplog.text.count("Attention Couple: words in its region prompts bind nobody") == 1
    plain = host.sample(attention_couple(loaded[0], region, mask), positive, negative, steps=2)["samples"]
    assert differ(both, alone) and differ(both, plain)


@pytest.mark.parametrize("case", ["another format", "a picture's tile"])
def test_a_part_of_the_areas_picture_counts_as_within_the_area(host, loaded, each_moa, caplog, case):
    """The area is on the right; what nobody can place is not held to the right of itself."""
    area = torch.zeros(1, 192, 192)
    area[..., 160:] = 1
    if each_moa is None:
        people = [host.run("MoALoRASubject", "random-1.safetensors", "man", area=a)[0] for a in (area, None)]
    else:
        photo = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))
        people = [host.run("MoASubjectEncoder", each_moa, photo, "man", area=a)[0] for a in (area, None)]
    size = (16, 12) if case == "another format" else (16, 16)
    latent = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(2))
    if case == "another format":
        latent = torch.zeros_like(latent)
    drawn = []
    for person in people:
        model, clip = host.patch(*loaded[:2], each_moa, person)
        prompts = host.prompt(clip, PROMPT), host.prompt(clip, "ugly")
        if case != "another format":
            host.sample(model, *prompts, steps=1)  # a whole picture of that size, whose part this is not
        drawn.append(host.sample(model, *prompts, steps=2, latent={"samples": latent}, denoise=0.5)["samples"])
    assert torch.equal(*drawn)
    height, width = (8 * side for side in size)
    assert caplog.text.count(f"{width}x{height} is taken for a part of the area's picture") == 1
    assert "subject0's is for 192x192" in caplog.text


def test_a_smaller_or_larger_picture_of_the_areas_format_has_the_area_scaled(host, loaded, ip_moa, caplog):
    """As always: a first pass smaller than the mask, then the same made larger and sampled again."""
    area = torch.zeros(1, 256, 256)
    area[..., 128:] = 1
    photo = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    person = host.run("MoASubjectEncoder", ip_moa, photo, "man", area=area)[0]
    model, clip = host.patch(*loaded[:2], ip_moa, person)
    prompts = host.prompt(clip, PROMPT), host.prompt(clip, "ugly")
    first = host.sample(model, *prompts, steps=1)
    larger = host.run("LatentUpscaleBy", first, "nearest-exact", 1.5)[0]
    for latent in (first, larger):
        host.sample(model, *prompts, steps=2, latent=latent, denoise=0.5)
        shares = model.get_attachment("moa").runs[-1].trace.subject_area()[0]
        middle = shares.shape[1] // 2
        assert not shares[:, : middle - 2].any() and (shares[:, middle + 2 :] > 0.99).all()
    assert "taken for a part" not in caplog.text


def test_a_second_copy_of_the_pack_says_so_and_stays_out(host, caplog):
    import nodes

    before, folders = dict(nodes.NODE_CLASS_MAPPINGS), host.base / "custom_nodes"
    (folders / "ComfyUI-MoA").symlink_to(PACK)
    try:
        assert asyncio.run(nodes.load_custom_node(str(folders / "ComfyUI-MoA"), module_parent="custom_nodes"))
    finally:
        (folders / "ComfyUI-MoA").unlink()
    assert before == nodes.NODE_CLASS_MAPPINGS
    (said,) = [record.getMessage() for record in caplog.records if "installed twice" in record.getMessage()]
    assert f"{NAME};" in said and f"{folders / 'ComfyUI-MoA'} stays out" in said


@pytest.mark.parametrize("order", ["MoA first", "split first"])
def test_a_model_split_over_several_devices_is_refused_in_moas_words(host, loaded, each_moa, order):
    """With the host's own cloning onto a device, which here is the same one."""
    base, clip, _ = loaded
    if not hasattr(base, "deepclone_multigpu"):
        pytest.skip("this ComfyUI cannot split a MODEL")
    person = host.subject(each_moa)
    with pytest.raises(RuntimeError, match=r"MoA Patch Model: .*several GPUs.*MultiGPU CFG Split"):
        if order == "MoA first":
            host.patch(base, clip, each_moa, person)[0].deepclone_multigpu(new_load_device=torch.device("cpu"))
        split = base.clone()
        other = split.deepclone_multigpu(new_load_device=torch.device("cpu"))
        other.is_multigpu_base_clone = True
        split.set_additional_models("multigpu", [other])
        model, bound_clip = host.patch(split, clip, each_moa, person)
        host.sample(model, host.prompt(bound_clip, PROMPT), host.prompt(clip, "ugly"), steps=1)


class QuantizedWeight(torch.Tensor):
    """As ComfyUI-GGUF keeps a weight: bytes and a scale, of a shape that they do not have, which copy nothing."""

    @staticmethod
    def of(weight: torch.Tensor) -> "QuantizedWeight":
        scale = weight.abs().max() / 127
        made = (weight / scale).round().to(torch.int8).reshape(1, -1).as_subclass(QuantizedWeight)
        made.scale, made.real_shape = scale, weight.shape
        return made

    @property
    def shape(self):
        return self.real_shape

    def clone(self, *args, **kwargs):
        return self

    detach = clone

    def plain(self) -> torch.Tensor:
        return (self.as_subclass(torch.Tensor).float() * self.scale).view(self.real_shape)


def quantized(host):
    """The toy model with the weights of its attentions and convolutions quantized, and the same values in floats."""
    import comfy.ops

    class Layer:
        def get_weight(self, tensor, dtype):
            return tensor.plain().to(dtype) if isinstance(tensor, QuantizedWeight) else tensor.to(dtype)

        def forward(self, x):
            weight = self.get_weight(self.weight, x.dtype)
            if weight.ndim == 2:
                return torch.nn.functional.linear(x, weight, self.bias)
            return self._conv_forward(x, weight, self.bias)

    kinds = {base: type(base.__name__, (Layer, base), {}) for base in (
        comfy.ops.disable_weight_init.Linear, comfy.ops.disable_weight_init.Conv2d
    )}  # fmt: skip
    models = [host.run("CheckpointLoaderSimple", "toy.safetensors")[0] for _ in range(2)]
    for layer, same in zip(*(each.model.diffusion_model.modules() for each in models), strict=True):
        kind = next((kind for base, kind in kinds.items() if isinstance(layer, base)), None)
        if kind is not None:
            weight = QuantizedWeight.of(layer.weight)
            same.weight.copy_(weight.plain())
            layer.__class__ = kind
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return models


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_lora_over_another_packs_quantized_weights_is_what_it_is_over_their_values(host, loaded, kind):
    models = quantized(host)
    name = f"over-quantized-{kind}.safetensors"
    save_file(random_lora(loaded[0], kind=kind), host.base / "models/loras" / name)
    drawn = []
    for model in models:
        patched, clip = host.patch(model, loaded[1], None, host.run("MoALoRASubject", name, "man")[0])
        positive, negative = host.prompt(clip, PROMPT), host.prompt(clip, "ugly")
        prior = host.sample(model, positive, negative, steps=2)["samples"]
        drawn += [prior, host.sample(patched, positive, negative, steps=2)["samples"]]
        assert torch.equal(
            host.sample(model, positive, negative, steps=2)["samples"], prior
        )  # nothing of it is changed
    of_bytes, with_lora, of_values, expected = drawn
    assert differ(expected, of_values) and (of_bytes - of_values).abs().max() < 1e-4
    assert (with_lora - expected).abs().max() < 1e-4 * (expected - of_values).abs().max()
