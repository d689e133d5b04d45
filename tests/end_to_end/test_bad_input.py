"""Every mistake at the door: an error that names the cause and the remedy, and a model that stays as it was."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator

import pytest
import snntorch as snn
import torch
from spikingjelly.activation_based import layer, neuron
from torch import Tensor, nn

import snncompress
import snncompress.extend
from snncompress import DataError, ModelError, OptionError, PlanError, PluginError, SNNCompressError, UnknownNameError
from tests.end_to_end.test_truths import snntorch_case, spikingjelly_case
from tests.equivalence import same, snapshot
from tests.networks import Case


@pytest.fixture(params=[spikingjelly_case, snntorch_case], ids=["spikingjelly", "snntorch"])
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    case = request.param()
    before = snapshot(case.model)
    yield case
    assert same(before, snapshot(case.model))


def apply(case: Case, criterion: object = "svs", ratio: object = 0.5, bits: object = 4, **options: object) -> nn.Module:
    options = {"data": case.x, "timesteps": case.timesteps, **options}
    return snncompress.apply(case.model, criterion, ratio, bits, **options)


def test_no_spiking_neuron() -> None:
    with pytest.raises(ModelError, match=r"Sequential has no spiking neuron .*spikingjelly.*converted to spikes first"):
        snncompress.apply(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), data=torch.rand(1, 3))


def test_several_frameworks() -> None:
    model = nn.Sequential(nn.Linear(4, 4), neuron.IFNode(), nn.Linear(4, 4), snn.Leaky(0.5, init_hidden=True))
    with pytest.raises(ModelError, match=r"mixes neurons of several frameworks: 3 \(snntorch\), 1 \(spikingjelly\)"):
        snncompress.apply(model, data=torch.rand(1, 4))


def test_not_a_module() -> None:
    with pytest.raises(ModelError, match=r"must be a torch\.nn\.Module, not dict"):
        snncompress.apply({}, data=torch.rand(1, 4))


def test_lazy_layer() -> None:
    model = nn.Sequential(nn.LazyLinear(4), neuron.IFNode(), nn.Linear(4, 2))
    with pytest.raises(ModelError, match=r"0\.weight is not initialised yet.*Run the model once"):
        snncompress.apply(model, data=torch.rand(1, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "sv"}, r"There is no criterion 'sv'\. Did you mean 'svs'\? Available: .*magnitude"),
        ({"quantizer": "rescale"}, r"There is no quantizer 'rescale'\. Did you mean 'rescaw'\?"),
        ({"scheduler": "oneshot"}, r"There is no scheduler 'oneshot'\. Did you mean 'one_shot'\?"),
        ({"adapter": "spikngjelly"}, r"There is no adapter 'spikngjelly'\. Did you mean 'spikingjelly'\?"),
    ],
)
def test_unknown_names(case: Case, options: dict[str, str], message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        apply(case, **options)


def test_a_class_instead_of_an_instance(case: Case) -> None:
    from snncompress_svs import SVS

    with pytest.raises(OptionError, match=r"a class: add parentheses"):
        apply(case, SVS)


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.0, 1.5, float("nan"), float("inf"), True, "half"])
def test_ratio_out_of_range(case: Case, ratio: object) -> None:
    with pytest.raises(OptionError, match=r"ratio must be a number in \[0, 1\)"):
        apply(case, ratio=ratio)
    with pytest.raises(OptionError, match=r"ratio\['0'\] must be a number in \[0, 1\)"):
        apply(case, ratio={"0": ratio})


def test_ratio_that_empties_a_layer(case: Case) -> None:
    with pytest.raises(OptionError, match=r"ratio 0\.99 would remove all 8 channels of '0' .*smaller ratio.*skip"):
        apply(case, ratio=0.99)


def test_ratio_key_that_matches_nothing(case: Case) -> None:
    with pytest.raises(OptionError, match=r"ratio: 'conv\*' matches no weight layer\. The model's: 0, "):
        apply(case, ratio={"conv*": 0.5})


@pytest.mark.parametrize("bits", [0, -1, 17, 4.0, True, "4", float("nan")])
def test_bits_out_of_range(case: Case, bits: object) -> None:
    with pytest.raises(OptionError, match=r"bits must be a whole number from 1 to 16"):
        apply(case, bits=bits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "pp"}, "order must be 'qp'"),
        ({"seed": 0.5}, "seed must be a whole number"),
        ({"finetune": -1}, "finetune must be None, a number of epochs"),
        ({"finetune": "yes"}, "finetune must be None, a number of epochs"),
        ({"skip": ["nothing*"]}, r"skip: 'nothing\*' matches no weight layer"),
        ({"skip": {"prun": []}}, r"keys 'prune' and 'quantize', not \['prun'\]"),
    ],
)
def test_other_options(case: Case, options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        apply(case, **options)


@pytest.mark.parametrize("timesteps", [0, -1, 2.0, True])
def test_timesteps(case: Case, timesteps: object) -> None:
    with pytest.raises(DataError, match="timesteps must be None or a whole number of at least 1"):
        apply(case, timesteps=timesteps)


def test_timesteps_and_forward(case: Case) -> None:
    with pytest.raises(DataError, match="timesteps or forward, not both"):
        apply(case, forward=lambda m, b: m(b))


def test_data_of_the_wrong_shape(case: Case) -> None:
    with pytest.raises(
        DataError,
        match=r"Sequential failed on a batch of shape \[4, 3, 8, 8\].*shape isn't what the model takes",
    ):
        apply(case, data=case.x.repeat(1, 3, 1, 1))


def test_data_of_the_wrong_dtype(case: Case) -> None:
    with pytest.raises(
        DataError, match=r"The data are torch\.uint8, the model's weights torch\.float.*Convert the data"
    ):
        apply(case, data=(case.x * 255).to(torch.uint8))


def test_data_on_the_wrong_device(case: Case) -> None:
    with pytest.raises(DataError, match=r"The data are on meta, the model on cpu\. Move one"):
        apply(case, data=case.x.to("meta").to(case.x.dtype))


@pytest.mark.parametrize("data", [torch.rand(0, 1, 8, 8), [torch.rand(0, 1, 8, 8)]])
def test_empty_batch(case: Case, data: object) -> None:
    with pytest.raises(DataError, match=r"Batch 0 is empty: shape \[0, 1, 8, 8\]"):
        apply(case, data=data)


@pytest.mark.parametrize("data", [[], iter([])])
def test_no_batch(case: Case, data: object) -> None:
    with pytest.raises(DataError, match="The data hold no batch"):
        apply(case, data=data)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_the_data_even_late(case: Case, value: float) -> None:
    bad = case.x.clone()
    bad[2, 0, 3, 3] = value
    with pytest.raises(DataError, match=r"Batch 0 holds NaN or infinite"):
        apply(case, data=bad)
    with pytest.raises(DataError, match=r"Batch 1 holds NaN or infinite"):
        apply(case, data=[case.x, bad])


@pytest.mark.parametrize("data", [3, "mnist", {"x": torch.rand(1, 1, 8, 8)}])
def test_not_data(case: Case, data: object) -> None:
    with pytest.raises(DataError, match=r"data must be a tensor, an \(x, y\) batch, a DataLoader or an iterable"):
        apply(case, data=data)


def test_batches_that_need_forward(case: Case) -> None:
    with pytest.raises(DataError, match=r"Batch 0 is a dict.*forward=lambda"):
        apply(case, data=[{"x": case.x}])


@pytest.mark.parametrize("options", [{"criterion": "taylor"}, {"finetune": 1}])
def test_labels_are_missing(case: Case, options: dict[str, object]) -> None:
    with pytest.raises(DataError, match=r"The data have no labels, and (criterion 'taylor'|finetune) needs labels"):
        apply(case, **options)
    with pytest.raises(DataError, match=r"Without data there are no labels"):
        apply(case, data=None, **options)


def test_wrong_number_of_labels(case: Case) -> None:
    with pytest.raises(DataError, match=r"3 labels for 4 samples"):
        apply(case, "taylor", data=(case.x, torch.zeros(3, dtype=torch.long)))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 2, 99]), r"Labels range from 0 to 99, but the model has \d+ classes"),
        (torch.tensor([0, 1, -1, 2]), r"Labels range from -1 to 2"),
        (torch.rand(4), r"Labels \[4\] in torch.float32 must be class indices"),
        (torch.zeros(4, 1, dtype=torch.long), r"Class indices must have shape \[N\], not \[4, 1\]"),
    ],
)
def test_wrong_labels(case: Case, labels: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        apply(case, "taylor", data=(case.x, labels))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forward": 3}, "forward must be callable"),
        ({"forward": lambda model: 1}, "in forward=: TypeError"),
        ({"forward": lambda model, batch: {}["x"]}, "in forward=: KeyError"),
        ({"skip": 5}, "skip takes names or globs"),
        ({"adapter": 5}, "adapter must be the name of a framework"),
        ({"seed": 2**70}, "seed must be a whole number from 0"),
    ],
)
def test_nothing_bare_comes_out(case: Case, options: dict[str, object], message: str) -> None:
    with pytest.raises(SNNCompressError, match=message):
        apply(case, timesteps=None if "forward" in options else 4, **options)


def test_a_later_batch_of_another_dtype(case: Case) -> None:
    with pytest.raises(DataError, match=r"The data are torch\.float16"):
        apply(case, data=[case.x, case.x.half()])


def test_no_weight_layer() -> None:
    with pytest.raises(ModelError, match="no convolution or linear layer"):
        snncompress.apply(nn.Sequential(neuron.IFNode()))


@pytest.mark.parametrize("options", [{"lr": -1}, {"lr": "1"}, {"weight_decay": float("nan")}, {"epochs": 1.5}])
def test_finetune_options(case: Case, options: dict[str, object]) -> None:
    with pytest.raises(OptionError, match="must be a"):
        snncompress.finetune(case.model, (case.x, torch.zeros(4).long()), timesteps=4, **options)


class Returning(snncompress.extend.Criterion):
    """A criterion that breaks its contract."""

    name = "returning"

    def __init__(self, value: object) -> None:
        self.value = value

    def score(self, layer: snncompress.extend.Layer, state: object) -> Tensor:
        return self.value(layer) if callable(self.value) else self.value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"Criterion 'returning', layer 0: score\(\) must return a tensor \[8\], not NoneType"),
        (torch.ones(3), r"layer 0: score\(\) must return one score per output channel, \[8\], not \[3\]"),
        (lambda layer: torch.ones(layer.channels, 1), r"one score per output channel, \[8\], not \[8, 1\]"),
        (
            lambda layer: torch.full((layer.channels,), torch.nan),
            r"layer 0: scores hold NaN .*division by zero",
        ),
        (lambda layer: torch.ones(layer.channels, device="meta"), "real numbers in a dense tensor, not .* on meta"),
        (lambda layer: 1 / 0, r"Criterion 'returning' failed in score\(\) on layer 0: ZeroDivisionError"),
    ],
)
def test_broken_criterion(case: Case, value: object, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        apply(case, Returning(value))


def test_criterion_of_another_granularity_or_need(case: Case) -> None:
    class Blocks(Returning):
        granularity = "block"

    class Needs(Returning):
        needs = frozenset({"spike"})

    with pytest.raises(
        OptionError, match=r"granularity 'block'; a Criterion scores a 'channel' or a 'weight', a BlockCriterion"
    ):
        apply(case, Blocks(None))
    with pytest.raises(OptionError, match=r"needs \['spike'\]; known are 'spikes', 'membrane', 'gradients'"):
        apply(case, Needs(None))


def test_a_population_that_never_fires_is_named() -> None:
    case = spikingjelly_case()
    case.model[6].v_threshold = 1e9
    with pytest.warns(
        snncompress.SilentNeuronsWarning, match=r"Neurons '6' never fired in calibration.*'svs' scores of '4' carry no"
    ) as seen:
        apply(case, skip={"prune": ["9"]})
    assert len(seen) == 1


def test_quantizing_twice(case: Case) -> None:
    compressed = apply(case)
    again = Case(compressed, case.x, case.timesteps)
    with pytest.raises(
        PlanError, match=r"is already quantized to 4 bits\. Start from the float model, or leave bits=None"
    ):
        apply(again)


def test_compressing_further(case: Case) -> None:
    """A compressed model can lose more channels; the plan continues and counts from the original."""
    once = apply(case, "magnitude", 0.25, 4)
    twice = apply(Case(once, case.x, case.timesteps), "magnitude", 0.5, None)
    before, after = (snncompress.plan_of(m).removed_channels() for m in (once, twice))
    assert len(before["0"]) == 2  # ⌈0.25·8⌉
    assert len(after["0"]) == 5  # 2 + ⌈0.5·6⌉
    assert set(before["0"]) < set(after["0"])
    replayed = snncompress.plan_of(twice).apply(case.model)
    assert {k: v.shape for k, v in replayed.state_dict().items()} == {k: v.shape for k, v in twice.state_dict().items()}


def test_plan_on_another_architecture(case: Case) -> None:
    plan = snncompress.plan_of(apply(case))
    with torch.random.fork_rng():
        shallow = nn.Sequential(layer.Conv2d(1, 8, 3), neuron.IFNode(), nn.Linear(4, 2))
        narrow = copy.deepcopy(case.model)
        narrow[0] = nn.Conv2d(1, 4, 3)
    with pytest.raises(PlanError, match=r"Sequential has no module '\d'.*another architecture"):
        plan.apply(shallow)
    with pytest.raises(PlanError, match=r"0 has 4 output channels, the plan expects 8\. The model isn't of the arch"):
        plan.apply(narrow)


def test_plan_of_a_model_that_has_none(case: Case) -> None:
    with pytest.raises(PlanError, match=r"holds no plan: it did not come from snncompress\.apply"):
        snncompress.plan_of(case.model)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": 99}',
        '{"format": 1, "edits": [{}], "whole": {}, "origin": {}}',
        "[" * 10_000,
    ],
)
def test_not_a_plan(text: str) -> None:
    with pytest.raises(PlanError, match=re.compile("Not a|Plan format 99", re.S)):
        snncompress.Plan.from_json(text)


def test_no_data_at_all(case: Case) -> None:
    """One warning says what was assumed."""
    model = copy.deepcopy(case.model).float()
    with pytest.warns(snncompress.SyntheticDataWarning) as seen:
        compressed = snncompress.apply(model, criterion="random", ratio=0.5, bits=4)
    assert [w.category for w in seen if w.category is not snncompress.DefaultSkipWarning] == [
        snncompress.SyntheticDataWarning
    ]
    message = str(seen[0].message)
    assert "synthetic samples of shape [1, 8, 8]" in message
    assert "constant current for T = 4" in message
    assert "Real data will score better" in message
    assert compressed[0].out_channels == 4


def test_every_error_is_an_snncompress_error() -> None:
    from snncompress import errors

    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, Exception)]
    assert all(issubclass(c, (SNNCompressError, UserWarning)) for c in classes)
    assert all(c.__name__ in snncompress.__all__ for c in classes)


def test_asking_for_what_is_protected_is_told() -> None:
    """fc1 is the first layer and feeds the classifier: by default nothing is left to do."""
    model = nn.Sequential(nn.Linear(4, 8), neuron.IFNode(), nn.Linear(8, 2))
    x = torch.rand(2, 4) * 5
    with pytest.warns(snncompress.NothingToDoWarning, match=r"Nothing was compressed\. '0': it .*'2': .*skip=\[\]"):
        snncompress.apply(model, "magnitude", 0.5, 4, data=x, timesteps=2)
    deep = nn.Sequential(nn.Linear(4, 8), neuron.IFNode(), nn.Linear(8, 8), neuron.IFNode(), nn.Linear(8, 2))
    with pytest.warns(snncompress.NothingToDoWarning, match=r"bits names '4', which is left alone: it is the class"):
        snncompress.apply(deep, "magnitude", 0.5, {"2": 4, "4": 4}, data=x, timesteps=2)
    with pytest.warns(snncompress.NothingToDoWarning, match=r"ratio names '2', which is left alone: it feeds"):
        snncompress.apply(deep, "magnitude", {"0": 0.5, "2": 0.5}, None, data=x, timesteps=2)
    small = snncompress.apply(model, "magnitude", 0.5, 4, data=x, timesteps=2, skip=[])
    assert small[0].out_features == 4
    half = snncompress.apply(model, "magnitude", 0.5, 4, data=x, timesteps=2, skip={"prune": []})
    assert half[0].out_features == 4
    assert not hasattr(half[0], "parametrizations")


def test_timesteps_for_a_model_that_loops_itself() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.lif, self.fc2 = nn.Linear(4, 8), snn.Leaky(beta=0.9), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            mem, out = self.lif.init_leaky(), []
            for _ in range(3):
                spikes, mem = self.lif(self.fc1(x), mem)
                out.append(self.fc2(spikes))
            return torch.stack(out)

    with pytest.raises(DataError, match=r"saw 4 rows, not one for each.*loops over time itself; leave timesteps=None"):
        snncompress.apply(Own(), "magnitude", 0.5, 4, data=torch.rand(2, 4), timesteps=4, skip=[])
    with pytest.raises(DataError, match=r"saw 4 rows, not one for each sample.*leave timesteps=None"):
        snncompress.profile(Own(), torch.rand(2, 4), timesteps=4)
    assert snncompress.profile(Own(), torch.rand(2, 4)).n_neuron_updates == 3 * 8


def test_criterion_without_a_name_or_a_returned_state(case: Case) -> None:
    class Unnamed(snncompress.extend.Criterion):
        def score(self, layer: snncompress.extend.Layer, state: object) -> Tensor:
            return torch.ones(layer.channels)

    class Forgets(Unnamed):
        name = "forgets"
        needs = frozenset({"spikes"})

        def begin(self, layer: snncompress.extend.Layer) -> Tensor:
            return torch.zeros(layer.channels)

        def observe(self, layer: snncompress.extend.Layer, state: Tensor, spikes: Tensor, membrane: None) -> None:
            state += 1

    with pytest.raises(OptionError, match="Unnamed has no name"):
        apply(case, Unnamed())
    with pytest.raises(PluginError, match=r"observe\(\) returned None; it must return the state"):
        apply(case, Forgets())
