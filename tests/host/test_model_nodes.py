"""Every node of the host that takes a MODEL and widgets and gives a MODEL, before and after MoA Patch Model."""

import torch
from test_stacking import PROMPT, differ

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
NOT_HERE = {"TorchCompileModel"}  # has a test of its own

SCENE = {"pictures": 1, "height": 16, "width": 16, "steps": 3}
# What a node needs in order to act: a tile is 32 latents wide, a window 16 pictures long, a cache skips no early step.
# Of few steps, Stable Cascade's schedule makes all but the first small, and in the first no image expert acts.
SCENES = {
    "HyperTile": SCENE | {"height": 8, "width": 64},
    "ContextWindowsManual": SCENE | {"pictures": 20, "height": 8, "width": 8},
    "EasyCache": SCENE | {"steps": 10},
    "LazyCache": SCENE | {"steps": 10},
    "ModelSamplingStableCascade": SCENE | {"steps": 10},
}
MUST_ACT = (  # windows side by side change nothing where nothing moves; test_stacking.py sees that they are there
    "EasyCache", "FreeU", "FreeU_V2", "HyperTile", "LazyCache", "PatchModelAddDownscale",
    "PerturbedAttentionGuidance", "RescaleCFG", "SelfAttentionGuidance", "TomePatchModel",
)  # fmt: skip


def model_nodes(host) -> dict[str, dict]:
    """Node ids, each with its widgets at their defaults."""
    found = {}
    for name, node in host.nodes.items():
        inputs = dict(node.INPUT_TYPES().get("required", {}))
        models = [key for key, spec in inputs.items() if spec[0] == "MODEL"]
        if list(node.RETURN_TYPES) != ["MODEL"] or models != ["model"] or name in NOT_HERE:
            continue
        widgets = {key: default(spec) for key, spec in inputs.items() if key != "model"}
        if all(value is not None for value in widgets.values()):
            found[name] = widgets
    return found


def default(spec) -> object:
    """What the frontend puts into a widget; None where the input is no widget, or a list without entries."""
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    choices = kind if isinstance(kind, list) else options.get("options")
    if choices is not None:
        return options.get("default") or next(iter(choices), None)
    return options.get("default") if kind in WIDGETS else None


def test_every_model_node_acts_beside_moa_and_moa_beside_it(host, loaded, each_moa):
    model, clip, _ = loaded
    people = [host.subject(each_moa, 1), host.subject(each_moa, 2, "woman")]
    patched, bound_clip = host.patch(model, clip, each_moa, *people)
    positive, negative = host.prompt(bound_clip, PROMPT), host.prompt(clip, "bad")

    def sample(model, name):
        torch.manual_seed(0)  # some draw from the global generator
        pictures, height, width, steps = SCENES.get(name, SCENE).values()
        latent = {"samples": torch.zeros(pictures, 4, height, width)}
        return host.sample(model, positive, negative, steps=steps, latent=latent)["samples"]

    without = {}
    acted, elsewhere, wrong = [], [], []
    for name, widgets in model_nodes(host).items():

        def apply(model, name=name, widgets=widgets):
            return host.run(name, model=model, **widgets)[0]

        try:
            node = apply(model)
            alone = sample(node, name)
        except Exception:  # made for another kind of model
            elsewhere.append(name)
            continue
        key = tuple(SCENES.get(name, SCENE).values())
        if key not in without:
            without[key] = sample(model, name), sample(patched, name)
        plain, moa_alone = without[key]
        acts = differ(alone, plain)
        acted += [name] if acts else []
        for order, both in (("after", apply(patched)), ("before", host.patch(node, clip, each_moa, *people)[0])):
            try:
                out = sample(both, name)
            except Exception as error:
                wrong.append(f"{name} {order} MoA stops: {error}")
                continue
            if acts and not differ(out, moa_alone):
                wrong.append(f"{name} {order} MoA does not act")
            if not differ(out, alone) or out.isfinite().all() < alone.isfinite().all():
                wrong.append(f"MoA does not act with {name} {order} it")
    print(f"{len(acted)} act: {', '.join(acted)}; not on this model: {', '.join(elsewhere)}")
    assert not wrong
    assert set(MUST_ACT) & host.nodes.keys() <= set(acted)
    assert len(acted) >= 20
