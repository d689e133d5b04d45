"""The report is one whole page of HTML, needs nothing from elsewhere, and says what profiles and plans say."""

from __future__ import annotations

import copy
import functools
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from spikingjelly.activation_based import neuron
from torch import nn

import snncompress
from snncompress import OptionError, StorageError

ODD = "<img src=x onerror=alert(1)>"
VOID = {"meta", "link", "br", "rect"}  # rects of a bar have a title, and are closed


class Page(HTMLParser):
    """Elements, attributes and text of a page; raises where tags don't match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[list[str]] = []
        self.text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID - {"rect"}:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        elif tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    def row(self, first: str) -> list[str]:
        """The first row that begins so."""
        return next(row[1:] for row in self.cells if row and row[0] == first)


class Net(nn.Sequential):
    """Channels 0 and 1 of the first layer fire as pixels 0 and 1 do; the classes are read off them."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 4), neuron.IFNode(), nn.Linear(4, 4), neuron.IFNode(), nn.Linear(4, 2))
        with torch.no_grad():
            for layer in (self[0], self[2], self[4]):
                layer.weight.copy_(torch.eye(*layer.weight.shape))
                layer.bias.zero_()


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, str, dict[str, nn.Module]]:
    torch.manual_seed(0)
    dense, x = Net(), torch.eye(2)
    small = snncompress.apply(dense, "magnitude", ratio=0.5, bits=4, data=x, timesteps=2, skip={"quantize": ["0"]})
    models = {"dense": dense, ODD: small}
    path = tmp_path_factory.mktemp("report") / "report.html"
    data = (x, torch.tensor([0, 0]))  # the second one is wrong
    assert snncompress.report(models, data, path=path, timesteps=2, title=f"A & {ODD}") == path
    text = path.read_text()
    return Page(text), text, models


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(shown: tuple[Page, str, dict[str, nn.Module]]) -> None:
    page, text, _ = shown
    urls = [attrs.get(name) for _, attrs in page.tags for name in ("src", "href", "xlink:href", "action")]
    assert [url for url in urls if url and not url.startswith(("#", "data:"))] == []
    assert not re.search(r"https?:|url\(|@import|//\w", text)
    assert page.all("script") == page.all("img") == []
    assert page.all("html") == [{"lang": "en"}]
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))


def test_links_lead_somewhere_and_pictures_have_names(shown: tuple[Page, str, dict[str, nn.Module]]) -> None:
    page, _, _ = shown
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) == 6
    assert {link["href"] for link in page.all("a")} == {f"#{name}" for name in ids}
    assert len(page.all("svg")) == 4  # energy, size, channels, firing rates
    assert all(picture["aria-label"] for picture in page.all("svg"))
    assert all(float(bar["width"].removesuffix("%")) <= 78 for bar in page.all("rect"))


def test_text_of_the_users_is_text(shown: tuple[Page, str, dict[str, nn.Module]]) -> None:
    page, _, _ = shown
    assert f"A & {ODD}" in page.text
    assert ODD in page.text


def test_it_says_what_the_profiles_say(shown: tuple[Page, str, dict[str, nn.Module]]) -> None:
    page, _, models = shown
    compared = snncompress.compare(models, torch.eye(2), timesteps=2)
    before, after = compared.profiles.values()
    assert page.row("parameters")[:2] == [f"{before.n_params:,}", f"{after.n_params:,}"]
    assert page.row("size (MB)")[2] == f"{compared.ratios[ODD]['size_mb']:.4g}"
    assert page.row("accuracy (%)")[0] == "50"


def test_it_says_what_the_plan_says(shown: tuple[Page, str, dict[str, nn.Module]]) -> None:
    page, _, models = shown
    plan = snncompress.plan_of(models[ODD])
    assert page.row("criterion")[0].startswith("magnitude")
    assert "weights of output channel" in page.row("criterion")[1]
    assert [row[1:] for row in page.cells if row[0] == "0" and "→" in row[1]] == [["4 → 2", ""]]
    assert [row[1:] for row in page.cells if row[0] == "2" and "→" in row[-1]] == [["", "32 → 4"]]
    assert plan.skipped
    assert all([layer, why] in page.cells for layer, why in plan.skipped.items())


def test_one_plan_is_told_once_and_what_was_not_done_is_not(tmp_path: Path) -> None:
    pruned = snncompress.apply(Net(), "magnitude", ratio=0.5, bits=None, data=torch.eye(2), timesteps=2)
    twice = {"a": pruned, "b": copy.deepcopy(pruned)}
    page = Page(snncompress.report(twice, torch.eye(2), path=tmp_path / "r.html", timesteps=1).read_text())
    assert sum(row[:1] == ["criterion"] for row in page.cells) == 1
    assert any("plan of a;" in text for text in page.text)
    assert [row for row in page.cells if row[0] in ("quantizer", "order", "rounding")] == []


def test_without_labels_or_plan_it_says_less(tmp_path: Path) -> None:
    page = Page(snncompress.report({"net": Net()}, torch.eye(2), path=tmp_path / "r.html", timesteps=1).read_text())
    assert "accuracy (%)" not in [row[0] for row in page.cells]
    assert "How to load it" not in page.text
    assert any("holds no plan" in text for text in page.text)


def test_labels_that_fit_no_output_are_told(tmp_path: Path) -> None:
    data = [(torch.eye(2), torch.tensor([0, 7]))]
    page = Page(snncompress.report({"net": Net()}, data, path=tmp_path / "r.html", timesteps=1).read_text())
    assert "accuracy (%)" not in [row[0] for row in page.cells]
    assert any("no accuracy. Labels range from 0 to 7, but the model has 2 classes" in text for text in page.text)


@pytest.mark.parametrize("models", [{}, Net(), {"a": 1}])
def test_what_is_no_mapping_of_networks_is_refused(models: object, tmp_path: Path) -> None:
    for call in (functools.partial(snncompress.report, path=tmp_path / "r.html"), snncompress.compare):
        with pytest.raises(OptionError, match="mapping of names to networks") as caught:
            call(models, torch.eye(2))
        assert "Linear" not in str(caught.value)  # a network's layers tell nothing here


def test_two_networks_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="two networks of one name: 1, '1'"):
        snncompress.report({1: Net(), "1": Net()}, torch.eye(2), path=tmp_path / "r.html")


def test_where_it_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    def never(*_: object) -> None:
        raise AssertionError

    for path, error, message in (
        (tmp_path / "no" / "r.html", StorageError, f"there is no folder {tmp_path / 'no'}"),
        (tmp_path, StorageError, "it is a folder"),
        (3, OptionError, "not 3"),
    ):
        with pytest.raises(error, match=message):
            snncompress.report({"net": Net()}, torch.eye(2), path=path, forward=never)
    with pytest.raises(OptionError, match="title must be text"):
        snncompress.report({"net": Net()}, torch.eye(2), path=tmp_path / "r.html", title=3, forward=never)
