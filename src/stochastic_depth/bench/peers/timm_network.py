"""Networks of timm, with timm's own drop path, which masks samples of a branch that it computed."""

from typing import Any

from stochastic_depth.bench.peers.names import CONSTANT, OURS
from stochastic_depth.bench.plain import copy_weights
from stochastic_depth.bench.workload import Step, Workload
from stochastic_depth.gates import GateKind
from stochastic_depth.models.published import library
from stochastic_depth.surgery import apply
from stochastic_depth.survival import Uniform

TIMM = "timm drop path"
SUBSET = 'stochastic-depth, gate="subset"'


def timm_peers(name: str, rate: float, workload: Workload) -> dict[str, Step]:
    """A training step of each peer, all from the same weights.

    Ours takes the rates over from the network's drop paths, and divides by p_l in training as they
    do. With gate="subset" it computes what timm does; with gate="batch" one coin decides for all
    samples.

    Args:
        name: of a network whose training steps are functions of the weights, the images and the
            drop path alone (no dropout).
        rate: timm's drop_path_rate, 1 - p_L.

    Raises:
        MissingExtraError: without timm.
    """
    timm = library("timm")
    options: dict[str, Any] = {"num_classes": 10, "in_chans": workload.channels}
    if name.startswith("vit"):
        options["img_size"] = workload.size
    constant = timm.create_model(name, **options)
    steps = {}
    gates: dict[str, GateKind | None] = {TIMM: None, OURS: "batch", SUBSET: "subset"}
    for peer, gate in gates.items():
        model = timm.create_model(name, drop_path_rate=rate, **options)
        copy_weights(constant, model)
        if gate is not None:
            survival = "own" if rate else Uniform(1.0)
            apply(model, survival, example=workload.images()[:2], gate=gate, scale="training")
        steps[peer] = workload.step(model)
    return {CONSTANT: workload.step(constant), **steps}
