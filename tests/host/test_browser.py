"""The real frontend in a headless Chromium: what someone sees who opens a template and presses Run."""

import json

import pytest
from browser import find_browser

from training.comfyui import NAME
from workflows import NAMES, read, to_api

OURS = ("moa", NAME)


@pytest.fixture(scope="module")
def page(fresh_server):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=find_browser(), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1900, "height": 1000})
        page.complaints = []
        page.on("console", lambda m: page.complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.goto(fresh_server.url)
        page.wait_for_function("() => window.LiteGraph?.registered_node_types?.MoAPatchModel", timeout=120_000)
        page.wait_for_timeout(2000)
        page.keyboard.press("Escape")  # the welcome of a first start
        yield page
        browser.close()


def load(page, name) -> dict:
    """Open a workflow; what the frontend would send to ComfyUI for it."""
    page.evaluate("async text => { await window.app.loadGraphData(JSON.parse(text)) }", json.dumps(read(name)))
    page.wait_for_timeout(1000)
    return json.loads(page.evaluate("async () => JSON.stringify((await window.app.graphToPrompt()).output)"))


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_opens_whole(page, fresh_server, tmp_path, name):
    sent = load(page, name)
    page.screenshot(path=tmp_path / f"{name}.png")
    print(f"screenshot: {tmp_path / name}.png")
    ours = to_api(read(name), fresh_server.get("/object_info"))
    assert {node: {k: c[k] for k in ("class_type", "inputs")} for node, c in sent.items()} == ours
    missing = page.evaluate(
        "() => app.graph._nodes.filter(n => !LiteGraph.registered_node_types[n.type]).map(n => n.type)"
    )
    assert missing == []
    assert not page.get_by_text("Missing", exact=False).filter(visible=True).count()
    boxes = page.evaluate("() => app.graph._nodes.map(n => [n.title, ...n.pos, ...n.size])")
    for i, (title, x, y, w, h) in enumerate(boxes):
        for other, x2, y2, w2, h2 in boxes[:i]:
            apart = x + w <= x2 or x2 + w2 <= x or y + h <= y2 - 30 or y2 + h2 <= y - 30  # 30: a title's height
            assert apart, f"{title} lies on {other}"
    page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")  # as the template browser does
    page.wait_for_function("() => app.canvas.ds.scale > 8 / 14", timeout=5000)  # smaller, and no text is drawn
    assert [c for c in page.complaints if any(name in c for name in OURS)] == []


def test_run_shows_a_picture(page, fresh_server, tmp_path):
    load(page, "moa_single_subject")
    page.get_by_role("button", name="Run", exact=True).first.click()
    shown = "app.graph._nodes.find(n => n.type === 'SaveImage').imgs?.[0]?.naturalWidth"
    page.wait_for_function(f"() => {shown} === 128", timeout=120_000)
    page.wait_for_timeout(1000)
    page.screenshot(path=tmp_path / "run.png")
    print(f"screenshot: {tmp_path}/run.png")
    statuses = [entry["status"]["status_str"] for entry in fresh_server.get("/history").values()]
    assert statuses == ["success"]
    assert [c for c in page.complaints if any(name in c for name in OURS)] == []
