"""Broken plugins are reported and cost nothing but themselves: tried with distributions made up on disk."""

from __future__ import annotations

import importlib.metadata
import itertools
import textwrap
from pathlib import Path

import pytest

import snncompress
from snncompress import OptionError, PluginError, UnknownNameError
from snncompress.contract.registry import PluginRecord, Registry, registry

_number = itertools.count()

HEADER = """
from snncompress.extend import Criterion, EnergyModel, Quantizer, Scheduler, Target, hookimpl

class Scored(Criterion):
    def score(self, layer, state):
        return layer.weight.flatten(1).sum(1)
"""


def criterion(*names: str) -> str:
    """A plugin that offers criteria of these names."""
    classes = "\n".join(f"class C{i}(Scored):\n    '''Is {n}.'''\n    name = {n!r}" for i, n in enumerate(names))
    calls = "\n".join(f"    register(C{i})" for i in range(len(names)))
    return f"{classes}\n@hookimpl\ndef register_criteria(register):\n{calls}"


class Site:
    """A folder of made-up distributions."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def install(self, distribution: str, source: str, *, header: str = HEADER, module: str | None = None) -> None:
        """Write a distribution, version 1.0, whose entry point ``plugin`` names a module with this source."""
        name = f"made_up_{next(_number)}"
        (self.path / f"{name}.py").write_text(header + textwrap.dedent(source))
        info = self.path / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[snncompress]\nplugin = {module or name}\n")

    def registry(self) -> Registry:
        found = importlib.metadata.distributions(path=[str(self.path)])
        return Registry([point for distribution in found for point in distribution.entry_points])


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.syspath_prepend(tmp_path)
    return Site(tmp_path)


def names(found: Registry, kind: str = "criterion") -> list[str]:
    return [entry.name for entry in found.entries(kind)]


def test_a_plugin_is_found_with_the_distribution_it_comes_from(site: Site) -> None:
    site.install("good", criterion("one", "two"))
    found = site.registry()
    assert found.records == [PluginRecord("plugin", "good 1.0", "loaded", "")]
    assert [(e.name, e.kind, e.distribution, e.summary) for e in found.entries("criterion")] == [
        ("one", "criterion", "good 1.0", "Is one."),
        ("two", "criterion", "good 1.0", "Is two."),
    ]
    assert found.find("criterion", "two").name == "two"


def test_one_plugin_may_offer_every_kind(site: Site) -> None:
    site.install(
        "all-kinds",
        """
        from snncompress.extend import Adapter

        class Q(Quantizer):
            name = "q"
            def tensor_quant(self, bits): ...

        class S(Scheduler):
            name = "s"
            def ratio(self, target, step, steps): ...

        class E(EnergyModel):
            name = "e"
            def energy_pj(self, counts): ...

        class T(Target):
            name = "t"

        class A(Adapter):
            framework = "a"
            def is_neuron(self, module): ...
            def reset(self, model): ...
            def run(self, model, x, timesteps): ...
            def identities(self, model, stand_in): ...
            def observe(self, neuron, observer, *, membrane): ...
            def remove_channels(self, neuron, indices, axis): ...

        @hookimpl
        def register_quantizers(register): register(Q)

        @hookimpl
        def register_schedulers(register): register(S)

        @hookimpl
        def register_energy_models(register): register(E)

        @hookimpl
        def register_targets(register): register(T)

        @hookimpl
        def register_adapters(register): register(A)
        """,
    )
    found = site.registry()
    kinds = ("quantizer", "scheduler", "energy model", "target", "adapter")
    assert {kind: names(found, kind) for kind in kinds} == {
        "quantizer": ["q"],
        "scheduler": ["s"],
        "energy model": ["e"],
        "target": ["t"],
        "adapter": ["a"],
    }


BROKEN = {
    "raises on import": ("raise RuntimeError('no GPU here')", "RuntimeError: no GPU here"),
    "imports what is missing": ("import no_such_module_at_all", "no_such_module_at_all"),
    "syntax error": ("def f(:", "SyntaxError"),
    "misspelt hook": (
        "@hookimpl\ndef register_criterion(register): register(Scored)",
        "register_criterion",
    ),
    "misspelt argument": ("@hookimpl\ndef register_criteria(registrar): ...", "registrar"),
    "hook raises": ("@hookimpl\ndef register_criteria(register): 1 / 0", "ZeroDivisionError"),
    "not a class": ("@hookimpl\ndef register_criteria(register): register(42)", "not 42"),
    "an instance": (
        criterion("instance").replace("register(C0)", "register(C0())"),
        "takes a subclass of snncompress.extend.Criterion",
    ),
    "another kind of class": (
        criterion("kind").replace("register_criteria", "register_quantizers"),
        "takes a subclass of snncompress.extend.Quantizer",
    ),
    "abstract class": (
        "class A(Criterion):\n    name = 'a'\n@hookimpl\ndef register_criteria(register): register(A)",
        "A lacks score",
    ),
    "unnamed class": (
        "@hookimpl\ndef register_criteria(register): register(Scored)",
        "Scored has no 'name'",
    ),
    "empty name": (criterion(""), "C0 has no 'name'"),
    "name that is no string": (
        criterion("x").replace("name = 'x'", "name = 3"),
        "C0 has no 'name'",
    ),
    "registers nothing": ("@hookimpl\ndef register_criteria(register): ...", "registers nothing"),
    "hook without hookimpl": (criterion("bare").replace("@hookimpl", ""), "registers nothing"),
}


@pytest.mark.parametrize(("source", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_plugin_is_reported_and_the_others_work(site: Site, source: str, said: str) -> None:
    site.install("a-good", criterion("before"))
    site.install("broken", source)
    site.install("c-good", criterion("after"))
    found = site.registry()

    (failed,) = [record for record in found.records if record.status == "failed"]
    assert (failed.name, failed.distribution) == ("plugin", "broken 1.0")
    assert said in failed.error
    assert names(found) == ["after", "before"]
    assert found.find("criterion", "before").name == "before"
    with pytest.raises(UnknownNameError) as raised:
        found.find("criterion", "wanted")
    assert "broken 1.0" in str(raised.value)
    assert said in str(raised.value)


def test_an_entry_point_to_a_missing_module_is_reported(site: Site) -> None:
    site.install("good", criterion("fine"))
    site.install("gone", "", module="module_that_was_never_written")
    found = site.registry()
    assert [(r.distribution, r.status) for r in found.records] == [
        ("gone 1.0", "failed"),
        ("good 1.0", "loaded"),
    ]
    assert "module_that_was_never_written" in found.records[0].error


def test_what_a_broken_plugin_offered_before_it_failed_is_not_kept(site: Site) -> None:
    site.install("half", criterion("half").replace("register(C0)", "register(C0); register(None)"))
    assert names(site.registry()) == []


def test_two_plugins_that_claim_one_name(site: Site) -> None:
    site.install("first", criterion("shared", "mine"))
    site.install("second", criterion("shared"))
    site.install("third", criterion("theirs"))
    found = site.registry()

    (failed,) = [record for record in found.records if record.status == "failed"]
    assert failed.distribution == "second 1.0"
    assert "criterion 'shared' is also offered by first 1.0" in failed.error
    with pytest.raises(PluginError, match=r"'shared' is claimed by first 1\.0 and second 1\.0"):
        found.find("criterion", "shared")
    assert found.find("criterion", "mine").name == "mine"
    assert found.find("criterion", "theirs").name == "theirs"


def test_three_plugins_that_claim_one_name_are_all_named(site: Site) -> None:
    for distribution in ("x", "y", "z"):
        site.install(distribution, criterion("shared"))
    with pytest.raises(PluginError, match=r"x 1\.0 and y 1\.0 and z 1\.0"):
        site.registry().find("criterion", "shared")


def test_one_name_in_two_kinds_is_no_clash(site: Site) -> None:
    site.install("first", criterion("even"))
    site.install(
        "second",
        "class S(Scheduler):\n    name = 'even'\n    def ratio(self, target, step, steps): return target\n"
        "@hookimpl\ndef register_schedulers(register): register(S)",
    )
    found = site.registry()
    assert [record.status for record in found.records] == ["loaded", "loaded"]
    assert (names(found), names(found, "scheduler")) == (["even"], ["even"])


def test_one_plugin_that_uses_a_name_twice(site: Site) -> None:
    site.install("twice", criterion("same", "same"))
    (record,) = site.registry().records
    assert record.status == "failed"
    assert "'same'" in record.error


def test_ours_come_first_whatever_the_alphabet_says(site: Site) -> None:
    """A stranger can contest a built-in name but never take it over silently."""
    site.install("aaa", criterion("shared"))
    site.install("snncompress", criterion("shared", "ours"))
    found = site.registry()
    assert [(r.distribution, r.status) for r in found.records] == [
        ("snncompress 1.0", "loaded"),
        ("aaa 1.0", "failed"),
    ]
    assert found.find("criterion", "ours").name == "ours"


def test_an_unknown_name_gets_the_choices_and_the_nearest(site: Site) -> None:
    site.install("good", criterion("magnitude", "svs"))
    with pytest.raises(UnknownNameError) as raised:
        site.registry().find("criterion", "magnitud")
    text = str(raised.value)
    assert "no criterion 'magnitud'" in text
    assert "Did you mean 'magnitude'?" in text
    assert "Available: magnitude, svs." in text
    assert "failed" not in text


def test_an_unknown_name_like_nothing_gets_no_suggestion(site: Site) -> None:
    site.install("good", criterion("magnitude"))
    with pytest.raises(UnknownNameError) as raised:
        site.registry().find("criterion", "qqq")
    assert "Did you mean" not in str(raised.value)


def test_where_nothing_is_installed(site: Site) -> None:
    with pytest.raises(UnknownNameError, match="Available: none"):
        site.registry().find("criterion", "svs")


def test_a_name_becomes_an_instance_and_an_instance_stays(site: Site) -> None:
    site.install("good", criterion("fine"))
    found = site.registry()
    made = found.resolve("criterion", "fine", snncompress.extend.Criterion)
    assert type(made).name == "fine"
    assert found.resolve("criterion", made, snncompress.extend.Criterion) is made


def test_a_class_in_place_of_an_instance_is_told_so(site: Site) -> None:
    site.install("good", criterion("fine"))
    found = site.registry()
    cls = found.find("criterion", "fine")
    with pytest.raises(OptionError, match="add parentheses"):
        found.resolve("criterion", cls, snncompress.extend.Criterion)
    with pytest.raises(OptionError, match=r"must be a name or an instance of snncompress\.extend\.Criterion, not 3"):
        found.resolve("criterion", 3, snncompress.extend.Criterion)


def test_plugins_gives_records_that_a_caller_may_change() -> None:
    snncompress.plugins().clear()
    assert snncompress.plugins() == registry().records
    assert registry().records != []


def test_what_is_listed_can_be_found() -> None:
    listings = {
        "criterion": snncompress.criteria,
        "quantizer": snncompress.quantizers,
        "scheduler": snncompress.schedulers,
        "energy model": snncompress.energy_models,
        "target": snncompress.targets,
    }
    for kind, listing in listings.items():
        entries = listing()
        assert [e.name for e in entries] == sorted(e.name for e in entries)
        for entry in entries:
            assert registry().find(kind, entry.name) is entry.cls
            assert entry.summary, entry
            assert entry.distribution.startswith("snncompress")
