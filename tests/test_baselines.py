"""What MoA is compared with: each baseline is what its name says, and learns by the same loop."""

import dataclasses
from pathlib import Path

import pytest
import torch
from adapter_runs import image_run
from safetensors import safe_open
from toy_run import config

from moa_core.adapters.ip_adapter_file import load_ip_adapter
from moa_core.learned.unet_call import BoundTokens
from moa_core.routing.word_router import SCOUTED
from moa_core.subjects.binding import Binding
from moa_core.subjects.rows import Row
from moa_core.subjects.subject import Subject
from moa_core.subjects.view import View
from toy_world import shape
from training.finetune.methods import METHODS
from training.finetune.model import build, trained
from training.finetune.optimizer import learning_rate
from training.host.prior import prior_of
from training.toy.comparison import CONTENDERS, compare, configuration, train_row
from training.toy.results import HEADINGS, ROUTED, UNROUTED, report


class Setting:
    """A method on the toy base, one noisy input for it, and two people at two words.

    In float64: what is the same differs by rounding, 1e-16 for each operation, and so by less than assert_close allows.
    """

    def __init__(self, toy: Path, method: str):
        plain = config(toy, Path("nowhere"))
        model = dataclasses.replace(plain.model, method=method)
        self.base, self.moa, self.model = build(dataclasses.replace(plain, model=model))
        self.model.double()
        exact = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
        self.inputs = (torch.randn(2, 4, 16, 16, **exact), torch.tensor([700, 700]))
        self.context = torch.randn(2, 77, shape.TEXT_ENCODER["hidden_size"], **exact)
        self.features = torch.randn(2, self.moa.config.feature_dim, **exact)

    def people(self, *order: int) -> BoundTokens:
        """Both at the words of the first row, in this order."""
        return BoundTokens(torch.tensor([0, 0]), torch.tensor([3, 8]), self.features[list(order)])

    @torch.no_grad()
    def predict(self, bound: BoundTokens | None = None) -> torch.Tensor:
        return self.model.unet(*self.inputs, self.context, bound)

    @torch.no_grad()
    def prior(self) -> torch.Tensor:
        return self.model.unet.run(*self.inputs, self.context, None)


def test_no_moa_layer_differs_from_moa_by_its_layers_alone(toy):
    ours, ablated = (
        configuration(next(row for row in CONTENDERS if row.name == name), config(toy, Path("run")), Path("run"), 8)
        for name in ("MoA", "no MoA layer")
    )
    same = {"model": dataclasses.replace(ablated.model, method="moa"), "run": ours.run}
    assert dataclasses.replace(ablated, **same) == ours != ablated


def test_the_rate_of_every_row_falls_to_nothing(toy):
    for row in CONTENDERS:
        if row.folder:
            optim = configuration(row, config(toy, Path("run")), Path("run"), 8).optimizer
            rates = [learning_rate(optim, step) / optim.lr for step in range(optim.steps)]
            assert rates == [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_finetuning_in_place_starts_as_the_prior_and_knows_no_routing(toy):
    setting = Setting(toy, "cross_attention")
    drawn, shares = setting.predict(), setting.model.unet.call.shares
    torch.testing.assert_close(drawn, setting.prior())
    for (_, attention), share in shares.items():
        torch.testing.assert_close(share, torch.full_like(share, float(attention == "attn2")))
    names = trained(setting.model)
    assert any("attn2" in name for name in names) and not any("attn1" in name or "router" in name for name in names)


def test_fastcomposer_finetunes_every_attention_and_shows_people_after_the_first_fifth(toy):
    setting = Setting(toy, "fastcomposer")
    setting.predict()
    assert all((share == 1).all() for share in setting.model.unet.call.shares.values())
    names = [name for name in trained(setting.model) if not name.startswith("image_encoder.")]
    assert {name.split(".")[-4].rpartition("_")[2] for name in names if ".expert.to_q" in name} == {"attn1", "attn2"}
    assert not any("router" in name or "subject_prompt.position" in name for name in names)
    torch.nn.init.normal_(setting.moa.mixture.subject_prompt.mlp[-1].weight)
    setting.model.unet.call_type = METHODS["fastcomposer"].sampling_call
    noisy, _ = setting.inputs
    for timestep, shown in ((999, False), (800, False), (799, True), (10, True)):
        setting.inputs = (noisy, torch.tensor([timestep] * 2))
        assert torch.equal(setting.predict(setting.people(0, 1)), setting.predict()) != shown


def test_the_ip_adapter_adds_to_a_frozen_prior_and_knows_no_words(toy):
    setting = Setting(toy, "ip_adapter")
    learning = [name for name in trained(setting.model) if not name.startswith("image_encoder.")]
    assert {name.split(".")[-2] for name in learning} == {"to_k", "to_v", "proj", "norm"}
    one, exchanged, nobody = (
        setting.predict(setting.people(0, 1)),
        setting.predict(setting.people(1, 0)),
        setting.predict(),
    )
    torch.testing.assert_close(one, exchanged)
    assert (one[0] - nobody[0]).abs().max() > 1e-4  # the first row has pictures,
    torch.testing.assert_close(one[1], nobody[1])  # the second has none
    for name, parameter in setting.model.named_parameters():
        if "to_v" in name and parameter.requires_grad:
            parameter.data.zero_()
    torch.testing.assert_close(setting.predict(setting.people(0, 1)), setting.prior())


def test_the_ip_adapter_is_written_as_its_files_are_and_adds_the_same_where_a_person_is(toy, tmp_path):
    """With an area that is the whole picture, MoA From IP-Adapter's kind of MoA does what was trained."""
    setting = Setting(toy, "ip_adapter")
    random = torch.Generator().manual_seed(2)
    for name, parameter in setting.model.named_parameters():
        if parameter.requires_grad and not name.startswith("image_encoder."):
            stirred = parameter + 0.2 * torch.randn(parameter.shape, generator=random)
            parameter.data = stirred.half().to(parameter)
    METHODS["ip_adapter"].save(setting.moa, tmp_path / "ip-adapter.safetensors")
    with safe_open(tmp_path / "ip-adapter.safetensors", "pt") as file:
        numbers = {int(name.split(".")[1]) for name in file.keys() if name.startswith("ip_adapter.")}  # noqa: SIM118
    processors = list(setting.base.unet.attn_processors)  # by which other packs find the layers
    assert numbers == {n for n, name in enumerate(processors) if name.endswith("attn2.processor")}
    adapter = load_ip_adapter(tmp_path / "ip-adapter.safetensors")
    assert adapter.projector.reads == "image_embeds"
    with torch.no_grad():
        tokens = adapter.projector.double()(setting.features[:1])
        adapter.mixture.negative = adapter.projector(torch.zeros_like(setting.features[:1]))[0]
    subject = Subject(tokens.flatten(1), "man", "man", area=torch.ones(1, 16, 16))
    blocks = setting.moa.config.blocks
    run = image_run(adapter.mixture.double(), [subject], blocks)
    rows = [Row(View(0), (Binding(3, subject),), 77, True), Row(View(0), (), 77, False)]
    unet = setting.model.unet
    with torch.no_grad():
        call = run.call(rows, 700.0, setting.inputs[0], setting.context, setting.inputs[1], prior_of(unet.unet))
        routed = unet.run(*setting.inputs, setting.context, call)
    one = BoundTokens(torch.tensor([0]), torch.tensor([3]), setting.features[:1])
    torch.testing.assert_close(routed, setting.predict(one))
    assert (routed - setting.prior()).abs().amax(dim=(1, 2, 3)).min() > 1e-2


def test_without_spacetime_a_subject_is_the_same_in_every_layer_and_timestep(toy):
    prompts = {}
    for method in ("moa", "moa_without_spacetime"):
        setting = Setting(toy, method)
        prompt = setting.moa.mixture.subject_prompt
        torch.nn.init.normal_(prompt.mlp[-1].weight)
        early, late = (prompt(setting.features[:1], setting.context[0, :1], torch.tensor([t])) for t in (900, 10))
        prompts[method] = torch.cat([early, late]).std(dim=0).max()
        assert prompt.position.weight.requires_grad == (method == "moa")
    assert prompts["moa"] > 1e-2 and prompts["moa_without_spacetime"] < 1e-12


def test_the_evidence_holds_every_row_and_trains_none_twice(toy, tmp_path, monkeypatch):
    monkeypatch.setattr("training.toy.comparison.TEST_SCENES", 4)
    monkeypatch.setattr("training.toy.cases.STEPS", 2)
    for module in ("cases", "figures", "comparison"):
        monkeypatch.setattr(f"training.toy.{module}.PER_PROMPT", 2)
    settings = config(toy, tmp_path)
    result = compare(settings, tmp_path, steps=1, singles=1, pairs=1)
    assert list(result["rows"]) == ["prior", *(row.name for row in CONTENDERS)]
    for name, row in result["rows"].items():
        assert row.keys() == HEADINGS.keys() and f"| {name} |" in report(result)
        assert all(estimate is None or estimate[1] <= estimate[0] <= estimate[2] for estimate in row.values())
        calls = 2 + (name == "MoA, three-term guidance")  # no MoA acts on the first of two steps
        calls += SCOUTED * (name == ROUTED)
        assert row["calls"][0] == calls
    assert report(result).count("| identity at least 0.9 of the unrouted |") == 1
    assert "**Not trained" not in report(result) and report(result).count("| ahead of both baselines on the mean") == 1
    assert result["rows"][ROUTED] != result["rows"][UNROUTED]  # the same weights, other pictures
    assert (tmp_path / "evidence.png").exists() and (tmp_path / "evidence.json").exists()
    files = list(tmp_path.glob("*/checkpoints/step-00000001/*"))
    assert len(files) == 3 * len({row.folder for row in CONTENDERS} - {None})
    before = {path: path.stat().st_mtime_ns for path in files}
    train_row(configuration(CONTENDERS[0], settings, tmp_path, steps=1))
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())
    two = compare(settings, tmp_path, steps=1, seeds=2, singles=1, pairs=1, contenders=CONTENDERS[:1])
    alone = report(two)
    assert "| MoA |" in alone and "| no MoA layer |" not in alone and "baselines on the mean" not in alone
    assert "; no MoA layer; " in next(line for line in alone.splitlines() if line.startswith("**Not trained"))
    assert {path.name for path in tmp_path.glob("moa-*")} == {"moa-0", "moa-1"}
    assert two["rows"]["MoA"]["prior_inside"] != result["rows"]["MoA"]["prior_inside"]
    assert ", with 2 seeds each" in report(result | {"seeds": two["seeds"]})
    with pytest.raises(ValueError, match="for other steps: give another --run"):
        train_row(configuration(CONTENDERS[0], settings, tmp_path, steps=2))
