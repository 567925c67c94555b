"""`python -m tests.help_pictures`: the pictures of the nodes' help pages (web/docs), drawn anew in a real ComfyUI.

To be run when the toy models or a node's look have changed. Needs ComfyUI and a Chromium.
"""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from playwright.sync_api import sync_playwright

from moa_core.subjects.reference import prepare_reference, show_reference
from tests.host.browser import find_browser
from toy_world.draw import draw_person, draw_scene
from toy_world.world import sample_scene, someone
from training.comfyui import PACK, Server, find_comfyui, make_base_directory
from training.comfyui.templates import read, to_api
from training.demo.painters import ComfyUIPainter
from training.demo.takes import MORPH, PRIOR, WITH_A, WITH_B

FOLDER = PACK / "web" / "docs"
SIDE, GAP = 192, 6


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        base = make_base_directory(Path(folder))
        for file in (
            "checkpoints/v1-5-pruned-emaonly-fp16.safetensors",
            "ipadapter/ip-adapter-plus-face_sd15.safetensors",
            "clip_vision/CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors",
            "photomaker/photomaker-v1.bin",
            "controlnet/instantid.safetensors",
            "moa_subjects/ann_00001_.safetensors",
        ):
            (base / "models" / file).parent.mkdir(exist_ok=True)
            (base / "models" / file).touch()  # names for the widgets
        settings = base / "user/default/comfy.settings.json"
        settings.parent.mkdir(parents=True)
        settings.write_text('{"Comfy.TutorialCompleted": true}')  # no welcome over the canvas
        with Server(find_comfyui(), base) as server:
            painter = ComfyUIPainter(server)
            save("MoALoader", graph(server, template("One person"), (750, 620)))
            save("MoAFromIPAdapter", graph(server, template("Your photo, your checkpoint"), (990, 725)))
            save("MoAFromPhotoMaker", graph(server, FROM_PHOTOMAKER, (860, 455)))
            save("MoAInstantIDControl", graph(server, INSTANTID_CONTROL, (980, 460)))
            save("MoASaveSubject", graph(server, SAVE_SUBJECT, (820, 300)))
            save("MoALoadSubject", graph(server, LOAD_SUBJECT, (600, 255)))
            save("MoAPatchModel", row([painter.paint(take)[0][0] for take in (PRIOR, WITH_A, WITH_B)]))
            loras = [picture for shown in painter.show("Two LoRAs, two people").values() for picture in shown]
            save("MoALoRASubject", row([np.asarray(picture) for picture in loras]))
            save("MoASubjectInterpolate", row(painter.paint(MORPH)[0]))
            maps = painter.paint(WITH_A)[1].convert("RGB")
            save("MoAReport", report(server))
            save("MoARouterVisualizer", maps.resize((900, round(900 * maps.height / maps.width))))
    save("MoASubjectEncoder", row(references()))
    save("MoAToySubject", row([np.asarray(draw_person(someone(seed, "man"), "man")[0]) for seed in (1, 4, 8, 11)]))


def references() -> list[np.ndarray]:
    """A picture, what Subject Encoder makes of it with its mask, and with the mask the wrong way round."""
    picture, who = draw_scene(sample_scene(np.random.default_rng(1)), SIDE)  # one person, a portrait
    pixels, white = torch.from_numpy(np.array(picture)) / 255, torch.from_numpy(who > 0).float()
    shown = [show_reference(prepare_reference(pixels, m, SIDE)) for m in (white, 1 - white)]
    return [np.asarray(picture), *((s * 255).byte().numpy() for s in shown)]


def report(server: Server) -> Image.Image:
    """The first picture without MoA and with it, and below them the beginning of what MoA Report says."""
    workflow = read("Check my files")
    entry = server.queue(to_api(workflow, server.get("/object_info")))
    number = {node.get("title", node["type"]): str(node["id"]) for node in workflow["nodes"]}
    pictures = [server.pictures(entry, number[title])[0] for title in ("Without MoA", "With MoA")]
    above = row([np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")) for picture in pictures])
    (text,) = entry["outputs"][number["MoAReport"]]["text"]
    lines = text.splitlines()[:9]
    canvas = Image.new("RGB", (900, above.height + GAP + 20 * len(lines)), "white")
    canvas.paste(above, (0, 0))
    for n, line in enumerate(lines):
        place = (4, above.height + GAP + 20 * n)
        ImageDraw.Draw(canvas).text(place, line, "black", ImageFont.load_default(14))
    return canvas


EMPTY_GRAPH = """
    app.graph.clear();
    const add = (type, x, y) => {
        const node = LiteGraph.createNode(type); app.graph.add(node); node.pos = [x, y]; return node };
    const slot = (patch) => patch.inputs.find(input => input.name.startsWith("subjects")).name;
"""
FROM_PHOTOMAKER = f"""() => {{ {EMPTY_GRAPH}
    const photomaker = add("MoAFromPhotoMaker", 30, 90), photos = add("LoadImage", 30, 210);
    const encoder = add("MoASubjectEncoder", 330, 180), patch = add("MoAPatchModel", 650, 90);
    photomaker.connect(0, encoder, 0); photos.connect(0, encoder, 1);
    photomaker.connect(0, patch, "moa"); encoder.connect(0, patch, slot(patch));
    encoder.widgets.find(w => w.name === "word").value = "woman";
}}"""
INSTANTID_CONTROL = f"""() => {{ {EMPTY_GRAPH}
    app.ui.settings.setSettingValue("Comfy.Minimap.Visible", false);
    const adapter = add("MoAFromIPAdapter", 30, 125), photo = add("LoadImage", 30, 285);
    const encoder = add("MoASubjectEncoder", 330, 125), net = add("ControlNetLoader", 330, 305);
    const pose = add("LoadImage", 330, 415), prompts = [add("CLIPTextEncode", 480, 60), add("CLIPTextEncode", 480, 87)];
    const control = add("MoAInstantIDControl", 690, 125), sampler = add("KSampler", 1010, 125);
    prompts.forEach((prompt, n) => {{ prompt.collapse(); prompt.connect(0, control, n) }});
    adapter.connect(0, encoder, 0); photo.connect(0, encoder, 1); net.connect(0, control, "control_net");
    encoder.connect(0, control, "subject"); pose.connect(0, control, "face");
    control.connect(0, sampler, "positive"); control.connect(1, sampler, "negative");
}}"""
SAVE_SUBJECT = f"""() => {{ {EMPTY_GRAPH}
    const moa = add("MoALoader", 30, 90), photo = add("MoAToySubject", 30, 200);
    const encoder = add("MoASubjectEncoder", 330, 90), saved = add("MoASaveSubject", 650, 90);
    moa.connect(0, encoder, "moa"); photo.connect(0, encoder, "image"); photo.connect(1, encoder, "mask");
    encoder.connect(0, saved, 0); saved.widgets.find(w => w.name === "filename_prefix").value = "ann";
}}"""
LOAD_SUBJECT = f"""() => {{ {EMPTY_GRAPH}
    const moa = add("MoALoader", 30, 90), loaded = add("MoALoadSubject", 30, 200);
    const patch = add("MoAPatchModel", 400, 90);
    moa.connect(0, patch, "moa"); loaded.connect(0, patch, slot(patch));
}}"""


def template(name: str) -> str:
    """JavaScript that opens a template."""
    return f"async () => {{ await window.app.loadGraphData({json.dumps(read(name))}) }}"


def graph(server: Server, build: str, size: tuple[int, int]) -> Image.Image:
    """The left top of a graph that JavaScript builds, as the frontend shows it."""
    with sync_playwright() as play, tempfile.TemporaryDirectory() as folder:
        browser = play.chromium.launch(executable_path=find_browser(), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(server.url)
        page.wait_for_function("() => window.LiteGraph?.registered_node_types?.MoAPatchModel", timeout=120_000)
        page.wait_for_timeout(5000)
        page.evaluate(build)
        page.evaluate(
            "() => { app.canvas.ds.scale = 0.9; app.canvas.ds.offset = [80, 100]; app.canvas.setDirty(true, true) }"
        )
        page.wait_for_timeout(3000)
        clip = {"x": 90, "y": 112, "width": size[0], "height": size[1]}
        page.screenshot(path=Path(folder) / "graph.png", clip=clip)
        browser.close()
        with Image.open(Path(folder) / "graph.png") as shot:
            return shot.convert("RGB")


def row(pictures: list[np.ndarray]) -> Image.Image:
    """Pictures [H, W, 3] uint8 beside each other."""
    canvas = Image.new("RGB", (len(pictures) * (SIDE + GAP) - GAP, SIDE), "white")
    for i, picture in enumerate(pictures):
        canvas.paste(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.LANCZOS), (i * (SIDE + GAP), 0))
    return canvas


def save(node: str, picture: Image.Image) -> None:
    picture.save(FOLDER / f"{node}.jpg", quality=85)
    print(f"{node}: {picture.size}, {(FOLDER / f'{node}.jpg').stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
