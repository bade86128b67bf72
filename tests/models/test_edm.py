"""EDM and EDM2 against the results of NVlabs' code; ``edm_golden.py`` says how they were made."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import edm_golden as golden
import pytest
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff.checkpoints.layouts.edm import EDM, EDM2, FAMILIES
from fastdiff.models import edm, edm2
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.preconditioning import (
    ConsistencyPrecond,
    EDMPrecond,
    IDDPMPrecond,
    Preconditioned,
    VEPrecond,
    VPPrecond,
)
from fastdiff.solvers import SigmaSchedule, get_schedule, make_table
from fastdiff.testing import assert_within_2x

OUTPUTS = golden.read("edm_outputs.json")
KEYS = golden.read("edm_keys.json")
PRECONDS = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve", "iDDPMPrecond": "iddpm"}
NETWORKS = {"SongUNet": "song", "DhariwalUNet": "adm"}
SHAPE = [2, 3, 8, 8]
CASES = [
    (name, labels)
    for name, record in OUTPUTS.items()
    for labels in ("given", "absent")
    if labels in record
]
PUBLIC = {**edm.CONFIGS, **edm2.CONFIGS}


def tiny(name: str, dtype: torch.dtype = torch.float32) -> Preconditioned:
    """The model of a golden output with its weights."""
    record = OUTPUTS[name]
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in record["config"].items()}
    model: Preconditioned
    if record["precond"] == "EDM2":
        model = edm2.EDM2(edm2.EDM2Config(img_resolution=8, img_channels=3, **options))
    else:
        network = NETWORKS[options.pop("model_type")]
        precond = PRECONDS[record["precond"]]
        options = {"network": network, "precond": precond, "img_resolution": 8, **options}
        model = edm.build(edm.EDMConfig(**options))
    golden.fill(model)
    return model.to(dtype).eval().requires_grad_(False)


def arguments(model: Preconditioned, labels: str, dtype: torch.dtype) -> dict[str, Tensor]:
    config: Any = model.config
    given = {}
    if labels == "given" and config.label_dim:
        given["class_labels"] = torch.tensor([1, config.label_dim - 1])
    if labels == "given" and getattr(config, "augment_dim", 0):
        augment = golden.uniform("augment", (2, config.augment_dim))
        given["augment_labels"] = augment.bfloat16().to(dtype)
    return given


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x, sigma = golden.inputs(3, 8)
    return x.to(dtype), sigma.to(dtype)


@pytest.mark.parametrize(("name", "labels"), CASES)
def test_equals_the_reference(name: str, labels: str) -> None:
    record = OUTPUTS[name][labels]
    oracle = golden.decode(record["oracle"], torch.float64, SHAPE)
    reference = {
        kind: golden.decode(record[kind], torch.float32, SHAPE) for kind in ("float32", "bfloat16")
    }
    with torch.no_grad():
        model = tiny(name, torch.float64)
        x, sigma = inputs(torch.float64)
        mine = model(x, sigma, **arguments(model, labels, x.dtype))
        # Some hundred roundings one behind the other.
        assert (mine - oracle).abs().max() <= 1e-12 * oracle.abs().max()
        x, sigma = inputs()
        for kind in (torch.float32, torch.bfloat16):
            model = tiny(name, kind)
            given = arguments(model, labels, x.dtype)
            theirs = reference[str(kind).removeprefix("torch.")]
            # float32 in and out, as there, whatever the network's dtype.
            assert_within_2x(model(x, sigma, **given), oracle, theirs, f"{kind}")
        low = model(x.bfloat16(), sigma, **given)
        assert_within_2x(low, oracle, theirs.bfloat16(), "bfloat16 in and out")
        if isinstance(model, edm2.EDM2):
            wanted = torch.tensor(record["logvar"], dtype=torch.float64)
            mine = tiny(name, torch.float64).logvar(sigma.double())
            assert (mine - wanted).abs().max() <= 1e-12


@pytest.mark.parametrize("name", PUBLIC)
def test_names_and_shapes_of_the_public_checkpoints(name: str) -> None:
    family = EDM if name in edm.CONFIGS else EDM2
    theirs = {
        f"{place}.{key}" if place else key: tuple(shape)
        for place, index in KEYS["models"][name].items()
        for key, shape in KEYS["modules"][index]
    }
    with torch.device("meta"):
        model = family.build(PUBLIC[name])
    ours = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert ours == theirs
    assert family.recognise(theirs) == PUBLIC[name]
    assert (
        family.recognise({k: v for k, v in theirs.items() if k not in family.optional})
        == (PUBLIC[name])
    )
    buffers = {k for k in ours if k.endswith("resample_filter") or k == "u"}
    assert buffers <= family.optional
    assert all(other.recognise(theirs) is None for other in FAMILIES if other is not family)


@pytest.mark.parametrize("name", [name for name, record in OUTPUTS.items() if "given" in record])
def test_the_configuration_is_recognised(name: str) -> None:
    model = tiny(name)
    config: Any = model.config
    family = EDM if isinstance(config, edm.EDMConfig) else EDM2
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = family.recognise(shapes)
    assert found is not None
    with torch.device("meta"):
        again = family.build(found).state_dict()
    assert {key: tuple(value.shape) for key, value in again.items()} == shapes
    if family is EDM and config.precond in ("edm", "iddpm"):
        assert found == config


def test_computed_buffers_may_be_missing() -> None:
    for name in ("ncsnpp", "adm-iddpm"):
        whole = tiny(name)
        state = {k: v for k, v in whole.state_dict().items() if k not in EDM.optional}
        assert len(state) < len(whole.state_dict())
        with torch.device("meta"):
            model = edm.build(whole.config)
        model.load_state_dict(state, assign=True)
        x, sigma = inputs()
        assert torch.equal(model(x, sigma), whole(x, sigma))
        state.popitem()
        with pytest.raises(RuntimeError, match="Missing key"):
            model.load_state_dict(state)


@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp", "adm", "adm-iddpm", "edm2"])
def test_three_programs(name: str) -> None:
    """All steps' schedule at once, as one step at a time, and both as the model's forward."""
    model = tiny(name, torch.float64)
    x, _ = inputs(torch.float64)
    times = torch.tensor([[70.0, 3.0], [0.5, 0.004]], dtype=torch.float64)
    given = arguments(model, "given", x.dtype)
    prompt = model.prompt(**given)
    at_once = model.schedule(times, prompt)
    for step, sigma in enumerate(times):
        alone = model.schedule(sigma, prompt)
        values = torch.utils._pytree.tree_map(lambda value, step=step: value[step], at_once)
        for mine, right in zip(*map(torch.utils._pytree.tree_leaves, (values, alone)), strict=True):
            assert mine.shape[0] == 2
            torch.testing.assert_close(mine, right, rtol=1e-13, atol=1e-13)
        wanted = model(x, sigma, **given)
        torch.testing.assert_close(model.step(x, values, prompt), wanted, rtol=1e-12, atol=1e-12)


def test_labels_in_every_form() -> None:
    model = tiny("adm", torch.float64)
    x, sigma = inputs(torch.float64)
    rows = torch.eye(5, dtype=torch.float64)[[1, 4]]
    right = model(x, sigma, torch.tensor([1, 4]))
    assert torch.equal(model(x, sigma, rows), right)
    none = model(x, sigma)
    assert torch.equal(model(x, sigma, torch.tensor([5, 5])), none)
    assert (none - right).abs().max() > 1e-3


class Toy(Denoiser):
    """sin(x/2 + t/1000): what the consistency results were made with."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def prompt(self) -> None:
        return None

    def schedule(self, t: Tensor, prompt: None) -> Tensor:
        return t * 0.001

    def step(self, x: Tensor, schedule: Tensor, prompt: None) -> Tensor:
        return (x * 0.5 + schedule[:, None, None, None]).sin()


def test_consistency_models() -> None:
    for kind in ("karras", "boundary"):
        record = OUTPUTS["cm"][kind]
        oracle = golden.decode(record["oracle"], torch.float64, [4, 3, 4, 4])
        theirs = golden.decode(record["float32"], torch.float32, [4, 3, 4, 4])
        model = ConsistencyPrecond(Toy())
        if kind == "karras":
            # Without the boundary: EDM's weights with the same times.
            plain = EDMPrecond(Toy())
            model.scales = lambda s, plain=plain: plain.scales(s)._replace(noise=250 * s.log())  # type: ignore[method-assign]
        x, _ = golden.inputs(3, 4)
        x = torch.cat([x, x])
        sigma = torch.tensor([0.002, 0.0078125, 0.40625, 80.0], dtype=torch.float64)
        mine = model.double()(x, sigma)
        assert (mine - oracle).abs().max() <= 1e-13
        assert_within_2x(model.float()(x.float(), sigma.float()), oracle, theirs)
        assert (mine[0] == x[0]).all() == (kind == "boundary")


def test_consistency_solver_agrees_with_the_wrapped_model() -> None:
    """The boundary condition in the model, or in the solver's table over the raw network."""
    network = Toy().double()
    model = ConsistencyPrecond(network)
    x = 80 * golden.inputs(3, 4)[0]
    options: dict[str, Any] = {"x": x, "solver": "consistency", "schedule": "cm", "steps": 3}
    raw = fastdiff.sample(network, **options, prediction="edm", seed=0)
    mine = fastdiff.sample(model, **options, prediction="x0", seed=0)
    torch.testing.assert_close(mine, raw, rtol=1e-12, atol=1e-12)


def by_hand(
    model: Any, x: Tensor, steps: int, given: dict[str, Any], churn: float, generator: Any
) -> Tensor:
    """Algorithm 2 of the paper (1 where churn is 0), rho 7, in float64; every step draws noise."""
    ramp = torch.arange(steps, dtype=torch.float64) / (steps - 1)
    most, least = 80 ** (1 / 7), 0.002 ** (1 / 7)
    levels = [*((most + ramp * (least - most)) ** 7).tolist(), 0.0]
    gamma_max = min(churn / steps, math.sqrt(2) - 1)
    for here, to in itertools.pairwise(levels):
        gamma = gamma_max if 0.05 <= here <= math.inf else 0.0
        raised = here * (1 + gamma)
        if churn:
            z = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            x = x + math.sqrt(raised**2 - here**2) * 1.003 * z
        slope = (x - model(x, torch.full((2,), raised, dtype=x.dtype), **given)) / raised
        there = x + (to - raised) * slope
        if to:
            second = (there - model(there, torch.full((2,), to, dtype=x.dtype), **given)) / to
            there = x + (to - raised) * (slope + second) / 2
        x = there
    return x


@pytest.mark.parametrize("schedule", ["edm", "cm", None])
@pytest.mark.parametrize("churn", [0.0, 3.0])
def test_sampling_is_the_papers_algorithm(schedule: str | None, churn: float) -> None:
    model = tiny("adm", torch.float64)
    x = 80 * inputs(torch.float64)[0]
    given = {"class_labels": torch.tensor([1, 3])}
    options: dict[str, Any] = {"x": x, "steps": 5, "cond": given}
    if schedule is not None:
        options.update(schedule=schedule, prediction="x0")
    if churn:
        options.update(s_churn=churn, s_tmax=math.inf)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    solver = "edm_stochastic" if churn else "heun"
    mine = fastdiff.sample(model, solver=solver, generator=generators[0], **options)
    with torch.no_grad():
        right = by_hand(model, x, 5, given, churn, generators[1])
    torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10)


def test_other_schedules_are_refused() -> None:
    model = tiny("edm2")
    with pytest.raises(ValueError, match="schedule must be a sigma schedule"):
        fastdiff.sample(model, schedule="cosine", steps=2)
    with pytest.raises(ValueError, match="solver must be a table with sigma as its time"):
        fastdiff.sample(model, solver=make_table("heun", "edm", 3, prediction="x0"))
    schedule = SigmaSchedule(0.002, 80.0)
    table = make_table("heun", schedule, 3, prediction="x0")
    shape = (2, 3, 8, 8)
    mine = fastdiff.sample(model, shape, solver=table, seed=0)
    assert torch.equal(mine, fastdiff.sample(model, shape, solver="heun", steps=3, seed=0))
    # EDM's sampler stays within the levels of the network.
    assert levels_of(VEPrecond(Toy()), "edm") == pytest.approx((80, 0.02))
    assert levels_of(VEPrecond(Toy()), SigmaSchedule(0.5, 500.0)) == pytest.approx((100, 0.5))
    # A model that has no word on its time is given the schedule's.
    seen: list[float] = []

    def plain(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t[0]))
        return x

    fastdiff.sample(plain, (1, 3, 8, 8), schedule="edm", prediction="x0", solver="euler", steps=2)
    assert seen == pytest.approx([math.log(80) / 4, math.log(0.002) / 4])
    assert get_schedule("edm") is get_schedule("edm")


def levels_of(model: Preconditioned, schedule: Any) -> tuple[float, ...]:
    """The noise levels of a run in two steps."""
    seen: list[float] = []
    model.register_forward_pre_hook(lambda _, args: seen.append(float(args[1][0])))
    shape = (1, 3, 4, 4)
    fastdiff.sample(model, shape, schedule=schedule, prediction="x0", solver="euler", steps=2)
    return tuple(seen)


def test_levels_of_the_paper() -> None:
    """Table 1: VP from t = 1e-5 to 1, VE 0.02..100, iDDPM's timesteps."""
    network = Toy()
    assert VPPrecond(network).levels == pytest.approx((1.00049e-3, 152.17), rel=1e-4)
    assert VEPrecond(network).levels == (0.02, 100.0)
    iddpm = IDDPMPrecond(network)
    assert iddpm.u.shape == (1001,)
    assert float(iddpm.u[1000]) == 0
    assert (iddpm.u[1:] < iddpm.u[:-1]).all()
    time = VPPrecond(network).scales(torch.tensor([152.1], dtype=torch.float64)).noise
    assert float(time) == pytest.approx(999, rel=1e-4)


@pytest.mark.parametrize("name", ["ncsnpp", "adm", "edm2"])
def test_compiled(name: str) -> None:
    x, sigma = inputs()
    oracle_model = tiny(name, torch.float64)
    given = arguments(oracle_model, "given", torch.float64)
    oracle = oracle_model(x.double(), sigma.double(), **given)
    model = tiny(name)
    given = arguments(model, "given", torch.float32)
    with torch.no_grad():
        eager = model(x, sigma, **given)
        model = fastdiff.compile(model)
        for _ in range(2):
            assert_within_2x(model(x, sigma, **given), oracle, eager)
    report = fastdiff.report(model)
    assert len(report.graphs) == 1


def test_half_precision_keeps_frequencies_and_levels() -> None:
    for name, buffers in (("ncsnpp", 1), ("edm2", 4), ("adm-iddpm", 1)):
        model = tiny(name)
        before = {k: v.clone() for k, v in model.named_buffers() if "filter" not in k}
        assert len(before) == buffers
        for value in before.values():
            value += 1e-4
        model.load_state_dict(before, strict=False)
        model.half().bfloat16()
        for key, value in before.items():
            assert torch.equal(model.get_buffer(key), value)


def test_normalised_weights_are_kept_until_they_change() -> None:
    model = tiny("edm2")
    x, sigma = inputs()
    given = arguments(model, "given", x.dtype)
    layer = model.network.out_conv
    gain = model.network.out_gain
    with torch.no_grad():
        first = model(x, sigma, **given)
        kept = layer.effective(torch.float32, gain)
        assert layer.effective(torch.float32, gain) is kept
        gain.add_(1)
        changed = layer.effective(torch.float32, gain)
        torch.testing.assert_close(changed, kept * (gain / (gain - 1)))
        gain.sub_(1)
        layer.weight[0].mul_(-1)
        assert torch.equal(layer.effective(torch.float32, gain)[0], -kept[0])
        layer.weight.data = -layer.weight.data
        assert torch.equal(layer.effective(torch.float32, gain)[1], -kept[1])
        layer.weight[1:].mul_(-1)
        layer.weight.data = layer.weight.data.double()
        torch.testing.assert_close(layer.effective(torch.float32, gain), kept)
        model.load_state_dict({"unet.out_gain": torch.zeros([])}, strict=False, assign=True)
        assert not model(x, sigma, **given).equal(first)
        assert not layer.effective(torch.float32, model.network.out_gain).any()
    with torch.inference_mode():
        held = layer.effective(torch.bfloat16)
        assert layer.effective(torch.bfloat16) is held
    assert not held.is_inference()
    layer.requires_grad_(True)
    assert layer.effective(torch.float32).requires_grad
    copied = copy.deepcopy(model)
    assert copied.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp-skip-ve", "adm", "edm2"])
def test_gradients_reach_every_parameter(name: str) -> None:
    model = tiny(name).train().requires_grad_(True)
    x, sigma = inputs()
    x.requires_grad_(True)
    model(x, sigma, **arguments(model, "given", x.dtype)).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0
    for key, parameter in model.named_parameters():
        if not key.startswith("logvar"):
            assert parameter.grad is not None, key
            assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 8)}, r"x must have shape \[B, 3, 8, 8\], got \[2, 3, 8\]"),
        ({"x": torch.zeros(2, 3, 16, 16)}, r"x must have shape \[B, 3, 8, 8\]"),
        ({"x": torch.zeros(3, 3, 8, 8)}, r"t must have shape \[3\], got \[2\]"),
        ({"sigma": torch.ones(3)}, "class_labels must have the batch of t, 3, or 1, got 2"),
        ({"sigma": torch.ones([])}, r"t must have shape \[B\] or \[S, B\], got \[\]"),
        ({"labels": torch.tensor([0, 9])}, r"class_labels must be in 0\.\.\d .*got 9"),
        ({"labels": torch.tensor([-1, 0])}, r"class_labels must be in 0\.\.\d .*got -1"),
        ({"labels": torch.zeros(2, 2, dtype=torch.int64)}, r"class_labels must be \[B\] integers"),
        ({"labels": torch.zeros(2, 9)}, r"class_labels must have shape \[B, \d\]"),
    ],
)
@pytest.mark.parametrize("name", ["adm", "edm2"])
def test_bad_input(name: str, change: dict[str, Tensor], message: str) -> None:
    model = tiny(name)
    x, sigma = inputs()
    labels = change.get("labels", torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=message):
        model(change.get("x", x), change.get("sigma", sigma), labels)


def test_labels_that_a_network_lacks() -> None:
    x, sigma = inputs()
    for name in ("ncsnpp", "edm2-balanced"):
        with pytest.raises(ValueError, match="class_labels must be None"):
            tiny(name)(x, sigma, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="augment_labels must be None"):
        tiny("ncsnpp")(x, sigma, augment_labels=torch.zeros(2, 9))
    with pytest.raises(ValueError, match=r"augment_labels must have shape \[B, 2\]"):
        tiny("adm")(x, sigma, augment_labels=torch.zeros(2, 9))
    with pytest.raises(ValueError, match="augment_labels must have the batch of t"):
        tiny("adm")(x, sigma, augment_labels=torch.zeros(3, 2))


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (edm.EDMConfig, {"network": "vit"}, "network must be one of"),
        (edm.EDMConfig, {"precond": "eps"}, "precond must be one of"),
        (edm.EDMConfig, {"model_channels": 0}, "model_channels must be an integer from 1 up"),
        (edm.EDMConfig, {"model_channels": 30}, "model_channels must be a multiple of 4"),
        (edm.EDMConfig, {"channel_mult": [1, 2]}, "channel_mult must be a tuple of integers"),
        (edm.EDMConfig, {"channel_mult": ()}, "channel_mult must not be empty"),
        (edm.EDMConfig, {"img_resolution": 30}, "img_resolution must be a multiple of 4"),
        (edm.EDMConfig, {"resample_filter": (1, 2, 1)}, "resample_filter must have an even"),
        (edm.EDMConfig, {"network": "adm", "encoder_type": "skip"}, "encoder_type must be"),
        (edm.EDMConfig, {"label_dim": -1}, "label_dim must be an integer from 0 up"),
        (edm2.EDM2Config, {"num_blocks": True}, "num_blocks must be an integer"),
        (edm2.EDM2Config, {"res_balance": 1.5}, r"res_balance must be in 0\.\.1"),
        (edm2.EDM2Config, {"clip_act": math.inf}, "clip_act must be finite"),
        (edm2.EDM2Config, {"sigma_data": 0.0}, "sigma_data must be finite and at least"),
    ],
)
def test_bad_configurations(config: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_bad_constructions() -> None:
    with pytest.raises(TypeError, match="config must be an EDMConfig"):
        edm.EDMNetwork("adm")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="config must be an EDM2Config"):
        edm2.EDM2Network(edm.EDMConfig())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model must be a Denoiser"):
        EDMPrecond(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sigma_min must be positive"):
        ConsistencyPrecond(Toy(), sigma_min=0.0)
