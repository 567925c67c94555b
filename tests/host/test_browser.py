"""The real frontend in a headless Chromium: what someone sees who opens a template and presses Run."""

import json
import re
import time

import pytest
from browser import find_browser
from layout import fit, links_behind_nodes, nodes_on_nodes, smallest_note, unread_notes
from test_blueprints import BLUEPRINTS, inside

from toy_world.shape import IMAGE_SIZE
from training.comfyui import NAME
from training.comfyui.templates import FOR_A_PHOTO, NAMES, read, to_api

OURS = ("moa", NAME)
DESIGNS = ["classic", "new"]
SEARCHES = [
    "face", "person", "people", "portrait", "identity", "character", "consistent character", "face swap", "swap",
    "morph", "photomaker", "pulid", "faceid", "face id lora", "ip-adapter", "instantid", "two loras", "character lora",
    "regional lora", "likeness",
]  # fmt: skip
SHOWN = {
    "classic": "() => { const [i] = app.graph._nodes.find(n => n.type === 'MoASubjectEncoder').imgs;"
    " return [i.src, i.naturalWidth, i.naturalHeight] }",
    "new": "() => { const { id } = app.graph._nodes.find(n => n.type === 'MoASubjectEncoder');"
    " const i = document.querySelector(`[data-node-id='${id}'] img`);"
    " return [i.src, i.naturalWidth, i.naturalHeight] }",
}
"""Address and size of the picture on Subject Encoder."""


@pytest.fixture(scope="module")
def browser(fresh_server):
    from playwright.sync_api import sync_playwright

    settings = fresh_server.base / "user/default/comfy.settings.json"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(  # no welcome over the canvas, nor over an app
        '{"Comfy.TutorialCompleted": true, "Comfy.OnboardingCoachmarks.Seen": ["appMode"]}'
    )
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=find_browser(), args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(browser, fresh_server):
    return new_page(browser, fresh_server)


def new_page(browser, server):
    page = browser.new_page(viewport={"width": 1900, "height": 1000})
    page.complaints = []
    page.on("console", lambda m: page.complaints.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(server.url)
    page.wait_for_function("() => window.LiteGraph?.registered_node_types?.MoAPatchModel", timeout=120_000)
    page.wait_for_timeout(2000)
    return page


def load(page, name, design="classic") -> dict:
    """Open a workflow in the classic or the new node design; what the frontend would send to ComfyUI for it."""
    page.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", design == "new")
    page.evaluate("async text => { await window.app.loadGraphData(JSON.parse(text)) }", json.dumps(read(name)))
    page.wait_for_timeout(1000)
    return json.loads(page.evaluate("async () => JSON.stringify((await window.app.graphToPrompt()).output)"))


def press_run(page, server) -> None:
    """Press Run, and wait until the server is done with it."""
    before = len(server.get("/history"))
    page.get_by_role("button", name="Run", exact=True).first.click()
    deadline = time.monotonic() + 240
    while len(server.get("/history")) == before:
        assert time.monotonic() < deadline, "the run did not end"
        page.wait_for_timeout(300)
    page.wait_for_timeout(1500)


def screenshot(page, path) -> None:
    page.screenshot(path=path)
    print(f"screenshot: {path}")


def set_widget(page, node: str, widget: str, value) -> None:
    """A value into a widget of the first node of that title or type."""
    page.evaluate(
        "([node, widget, value]) => { app.graph._nodes.find(n => n.title === node || n.type === node)"
        ".widgets.find(w => w.name === widget).value = value }",
        [node, widget, value],
    )


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_opens_whole(page, fresh_server, tmp_path, name, design):
    sent = load(page, name, design)
    ours = to_api(read(name), fresh_server.get("/object_info"))
    assert {node: {k: c[k] for k in ("class_type", "inputs")} for node, c in sent.items()} == ours
    missing = page.evaluate(
        "() => app.graph._nodes.filter(n => !LiteGraph.registered_node_types[n.type]).map(n => n.type)"
    )
    assert missing == []
    assert not page.get_by_text("Missing", exact=False).filter(visible=True).count()
    assert fit(page) > 8 / 14  # smaller, and no text is drawn
    screenshot(page, tmp_path / f"{name}.png")
    assert smallest_note(page) > 7.5
    assert unread_notes(page) + nodes_on_nodes(page) + links_behind_nodes(page) == []
    assert [c for c in page.complaints if any(name in c for name in OURS)] == []


def test_run_shows_a_picture(page, fresh_server, tmp_path):
    load(page, "One person")
    press_run(page, fresh_server)
    shown = "app.graph._nodes.find(n => n.type === 'SaveImage').imgs?.[0]?.naturalWidth"
    page.wait_for_function(f"() => {shown} === {IMAGE_SIZE}", timeout=20_000)
    screenshot(page, tmp_path / "run.png")
    statuses = [entry["status"]["status_str"] for entry in fresh_server.get("/history").values()]
    assert set(statuses) == {"success"}
    assert [c for c in page.complaints if any(name in c for name in OURS)] == []


@pytest.mark.parametrize("design", DESIGNS)
def test_what_is_amiss_stands_on_the_node_until_it_is_mended(page, fresh_server, tmp_path, design):
    load(page, "One person", design)
    set_widget(page, "KSampler", "steps", 2)
    for prompt, amiss in (("a dog on a beach", True), ("a man on a beach", False)):
        set_widget(page, "Prompt", "text", prompt)
        press_run(page, fresh_server)
        screenshot(page, tmp_path / f"{prompt}.png")
        warning = page.get_by_text("subject0 will not appear: no 'man' in the prompt.").filter(visible=True)
        assert warning.count() == amiss


@pytest.mark.parametrize("design", DESIGNS)
def test_subject_encoder_shows_what_it_encodes_and_doubts_a_mask_of_the_background(
    page, fresh_server, tmp_path, design
):
    load(page, "One person", design)
    set_widget(page, "KSampler", "steps", 2)
    set_widget(page, "MoAToySubject", "seed", 100 + DESIGNS.index(design))  # nobody's that is in ComfyUI's cache
    doubt = page.get_by_text("The mask looks like the background: try InvertMask.").filter(visible=True)
    shown = []
    for inverted in (False, True):
        if inverted:
            page.evaluate(
                "() => { const [toy, encoder] = ['MoAToySubject', 'MoASubjectEncoder'].map(type =>"
                " app.graph._nodes.find(n => n.type === type)), invert = LiteGraph.createNode('InvertMask');"
                " app.graph.add(invert); toy.connect(1, invert, 0); invert.connect(0, encoder, 2) }"
            )
        press_run(page, fresh_server)
        screenshot(page, tmp_path / f"inverted {inverted}.png")
        assert doubt.count() == inverted
        shown.append(page.evaluate(SHOWN[design]))
    assert [size for _, *size in shown] == [[64, 64], [64, 64]] and shown[0][0] != shown[1][0]


@pytest.mark.parametrize("word", SEARCHES)
def test_a_search_finds_the_nodes(page, word):
    page.evaluate("() => app.graph.clear()")
    page.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.get_by_placeholder("Add a node").fill(word)
    page.wait_for_timeout(1500)
    found = page.get_by_role("option").filter(has_text=re.compile("MoA|Subject")).filter(visible=True)
    assert found.count() >= 1
    page.keyboard.press("Escape")
    page.wait_for_timeout(300)


def add_people(page, *sockets: str) -> None:
    """A LoRA Subject of that title for each of these sockets of the graph's node that has them."""
    page.evaluate(
        "sockets => sockets.forEach((name, row) => {"
        " const node = app.graph._nodes.find(n => n.inputs?.some(i => i.name === name));"
        " const person = LiteGraph.createNode('MoALoRASubject'); person.title = name; person.pos = [-400, 250 * row];"
        " app.graph.add(person); person.connect(0, node, node.inputs.findIndex(i => i.name === name)) })",
        list(sockets),
    )
    page.wait_for_timeout(500)


def connected(page) -> list[list[str]]:
    """The sockets of MoA Patch Model that are connected, and the titles of the nodes that they are connected to."""
    page.wait_for_timeout(800)
    return page.evaluate(
        "() => app.graph._nodes.find(n => n.type === 'MoAPatchModel').inputs.filter(i => i.link != null)"
        ".map(i => [i.name, app.graph.getNodeById(app.graph.links[i.link].origin_id).title])"
    )


def unpack(page) -> None:
    page.evaluate(
        "() => { app.canvas.deselectAll(); app.canvas.selectItems(app.graph._nodes.filter(n => n.subgraph)) }"
    )
    page.evaluate("app.extensionManager.command.execute('Comfy.Graph.UnpackSubgraph')")


def test_three_people_stay_connected_in_a_copy_and_through_a_subgraph(page):
    load(page, "Two people")
    add_people(page, "subjects.subject2")
    before = connected(page)
    assert [name for name, _ in before][-3:] == [f"subjects.subject{n}" for n in range(3)]
    page.evaluate(
        "() => { app.canvas.selectItems(app.graph._nodes); app.canvas.copyToClipboard(); app.graph.clear();"
        " app.canvas.pasteFromClipboard() }"
    )
    assert connected(page) == before
    for packed in (["MoAPatchModel"], ["MoAPatchModel", "MoASubjectEncoder"]):
        page.evaluate(
            "types => { app.canvas.deselectAll();"
            " app.canvas.selectItems(app.graph._nodes.filter(n => types.includes(n.type))) }",
            packed,
        )
        page.evaluate("app.extensionManager.command.execute('Comfy.Graph.ConvertToSubgraph')")
        page.wait_for_function("() => app.graph._nodes.some(n => n.subgraph)")
        unpack(page)
        assert connected(page) == before


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_a_blueprint_is_found_like_a_node_and_holds_its_own(page, name):
    page.evaluate("() => app.graph.clear()")
    page.evaluate("app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    page.get_by_placeholder("Add a node").fill(name)
    page.get_by_role("option").filter(has_text=name).filter(visible=True).first.click()
    page.wait_for_function("() => app.graph._nodes.length === 1 && app.graph._nodes[0].subgraph")
    (outer,) = BLUEPRINTS[name]["nodes"]
    shown = page.evaluate(
        "() => { const [n] = app.graph._nodes; return {inputs: n.inputs.map(i => i.name),"
        " outputs: n.outputs.map(o => o.name), nodes: n.subgraph.nodes.map(n => n.type).sort()} }"
    )
    assert shown["inputs"][: len(outer["inputs"])] == [slot["name"] for slot in outer["inputs"]]
    assert shown["outputs"] == [slot["name"] for slot in outer["outputs"]]
    assert shown["nodes"] == sorted(part["type"] for part in inside(name)["nodes"])
    page.mouse.click(1000, 500)  # puts it down: until then it hangs on the mouse
    assert [c for c in page.complaints if any(name in c for name in OURS)] == []
    if "subject_b" in shown["inputs"]:
        add_people(page, "subject_a", "subject_b")
        unpack(page)
        assert connected(page) == [["subjects.subject0", "subject_a"], ["subjects.subject1", "subject_b"]]


@pytest.mark.parametrize("name", FOR_A_PHOTO)
def test_a_template_offers_the_files_that_it_needs_and_lacks_no_photo(page, tmp_path, name):
    load(page, name)
    page.get_by_test_id("error-overlay-see-errors").click()
    rows = page.get_by_test_id("missing-model-importable-rows")
    rows.wait_for()
    assert not page.get_by_text("Missing Inputs").count()
    screenshot(page, tmp_path / "offered.png")
    page.context.route("https://huggingface.co/**", lambda route: route.fulfill(body="a file"))
    loaders = [n for n in read(name)["nodes"] if "models" in n["properties"]]
    opened = []
    for node, button in zip(loaders, rows.get_by_role("button", name="Download").all(), strict=True):
        assert rows.get_by_text(node["widgets_values"][0], exact=True).is_visible()
        with page.expect_popup() as popup:
            button.click()
        opened.append(popup.value.url)
        popup.value.close()
    assert opened == [node["properties"]["models"][0]["url"] for node in loaders]


def test_a_template_is_an_app_of_its_prompt_and_people(page, fresh_server, tmp_path):
    load(page, "Two people")
    set_widget(page, "KSampler", "steps", 2)
    page.get_by_role("button", name="Enter app mode").click()
    app = page.get_by_test_id("linear-widgets")
    for label in ("who the man is", "who the woman is", "prompt", "seed"):
        assert app.get_by_text(label, exact=True).is_visible()
    app.locator("textarea").fill("a man and a woman on a beach")
    press_run(page, fresh_server)
    screenshot(page, tmp_path / "app.png")
    *_, run = fresh_server.get("/history").values()
    assert "a man and a woman on a beach" in json.dumps(run["prompt"][2])
    (saved,) = run["outputs"]["8"]["images"]
    shown = page.get_by_test_id("linear-center-panel").locator(f"img[src*='{saved['filename']}']").first
    assert shown.evaluate("picture => picture.naturalWidth") == IMAGE_SIZE
    page.get_by_role("button", name="Enter node graph").click()
    page.evaluate("() => app.graph.clear()")
    (file,) = fresh_server.pictures(run, "8")
    page.evaluate(  # as when it is dragged onto the canvas
        "bytes => app.handleFile(new File([new Uint8Array(bytes)], 'picture.png', {type: 'image/png'}))", list(file)
    )
    types = page.evaluate("() => app.graph._nodes.map(node => node.type).sort()")
    assert types == sorted(node["type"] for node in read("Two people")["nodes"])


def test_the_help_of_every_node_is_a_page_with_a_picture(browser, fresh_server, tmp_path):
    page = new_page(browser, fresh_server)  # where no node of another test still hangs on the mouse
    load(page, "One person")  # anything, for the canvas
    ours = [name for name, node in fresh_server.get("/object_info").items() if node["python_module"].endswith(NAME)]
    for name in ours:
        page.evaluate(
            "name => { app.graph.clear(); const node = LiteGraph.createNode(name); app.graph.add(node);"
            " node.pos = [400, 300] }",
            name,
        )
        page.wait_for_function(  # the button comes some frames after a selection, which a busy frontend may undo
            "() => { const [node] = app.graph._nodes;"
            " if (!app.canvas.selectedItems.has(node)) app.canvas.selectNode(node);"
            " return document.querySelector('[data-testid=info-button]') }",
            polling=300,
        )
        page.get_by_test_id("info-button").click()
        page.get_by_role("heading", name="When it goes wrong").wait_for(timeout=20_000)
        page.wait_for_timeout(500)
        screenshot(page, tmp_path / f"{name}.png")
        pictures = page.evaluate(
            "() => [...document.querySelectorAll('.node-help-content img')].map(e => e.naturalWidth)"
        )
        assert len(pictures) == 1 and pictures[0] >= 200, name
