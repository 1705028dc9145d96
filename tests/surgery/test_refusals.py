"""Every refusal: what it says to do is done, and then the model applies and is verified."""

import ast
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import rnn

import stochastic_depth as sd

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 8


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + torch.relu(self.linear(x))


class Shows(Plain):
    """Most of its branch is an output too."""

    def forward(self, x):
        h = torch.relu(self.linear(x))
        return x + h, h


class Routes(nn.Module):
    """Gathers its branch in a tensor, in place; the router's logits are an output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x):
        h = self.norm(x)
        logits = self.router(h)
        first = logits.argmax(-1)
        out = torch.zeros_like(h)
        for n, expert in enumerate(self.experts):
            rows = (first == n).nonzero()[:, 0]
            out.index_add_(0, rows, expert(h[rows]))
        return x + out, logits


class TossesACoin(Plain):
    """Drops itself, under no name that anybody knows."""

    def forward(self, x):
        if self.training and torch.rand(()) < 0.5:
            return x
        return super().forward(x)


class RunsInEvaluationOnly(Plain):
    def forward(self, x):
        return x if self.training else super().forward(x)


class Fuses(Plain):
    """In training it adds in a way that is no addition."""

    def forward(self, x):
        if self.training:
            return x - -self.linear(x)
        return x + self.linear(x)


class Leaves(Plain):
    """Leaves a loss on itself, which is not there before the first pass."""

    def forward(self, x):
        h = self.inner(x)
        self.loss = h.square().mean()
        return x + h

    def inner(self, x):
        return self.linear(x)


class LeavesInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = Keeps()

    def forward(self, x):
        return x + self.branch(x)


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        h = self.linear(x)
        self.loss = h.square().mean()
        return h


class Model(nn.Module):
    """Two blocks of a kind between plain ones; the kind's side outputs are outputs."""

    def __init__(self, kind, others: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        plain = [Plain, Plain] if others else []
        self.blocks = nn.ModuleList(make() for make in [*plain, kind, kind])

    def forward(self, x):
        seen = []
        for block in self.blocks:
            out = block(x)
            x, *side = out if isinstance(out, tuple) else (out,)
            seen += side
        return x, seen


class Around(nn.Module):
    """The model itself is a block that cannot be cut: its branch is an output too."""

    def __init__(self, kind) -> None:
        super().__init__()
        self.inside, self.last = Model(kind), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = self.inside(x)[0]
        h = self.last(x)
        return x + h, h


class TimeFirst(nn.Module):
    """[time, samples, channels]."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Steps() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.linear(x).cumsum(0)


KINDS = {
    Shows: "needed for more than the addition",
    Routes: "written into another tensor in place",
    RunsInEvaluationOnly: "in 4 of 4 passes in training mode the model itself leaves it out",
    Fuses: "in training mode",
    LeavesInside: "its branch sets 'loss' of",
}


def followed(message: str) -> dict:
    """The options that an error advises."""
    options = {}
    for name in ("exclude", "include"):
        advised = re.search(rf"\b{name}=(\[.*?\])", message)
        if advised:
            options[name] = ast.literal_eval(advised[1])
    if 'gate="batch"' in message:
        options["gate"] = "batch"
    return options


def applies(make, x, message, **options):
    options |= followed(message)
    model = make()
    handle = sd.apply(model, sd.Uniform(0.5), example=x, **options)
    sd.verify(model, x, repeats=1)
    return [block.name for block in handle.blocks]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_advice_of_a_refused_block_makes_the_model_apply(kind):
    x = torch.randn(3, WIDTH)
    with pytest.raises(sd.errors.UnsupportedBlockError, match=KINDS[kind]) as refused:
        sd.apply(Model(kind), sd.Uniform(0.5), example=x)
    assert "exclude=['']" not in str(refused.value)
    assert applies(lambda: Model(kind), x, str(refused.value)) == ["blocks.0", "blocks.1"]


def test_where_chance_leaves_blocks_out_no_block_is_named_that_it_may_have_spared():
    with pytest.raises(sd.errors.UnsupportedBlockError) as refused:
        sd.apply(Model(TossesACoin), sd.Uniform(0.5), example=torch.randn(3, WIDTH))
    assert "set the model's own layer drop or drop path to 0" in str(refused.value)
    assert "exclude=" not in str(refused.value)


class Noise(nn.Module):
    def forward(self, x):
        return torch.rand(()) * x


class Noisy(Plain):
    """Closed, it draws no random number, so that later layers draw different ones."""

    def __init__(self, noise: bool) -> None:
        super().__init__()
        self.noise = Noise() if noise else nn.Identity()

    def forward(self, x):
        return x + self.noise(torch.relu(self.linear(x)))


class SomeNoisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Noisy(n % 2 == 0) for n in range(4))
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return torch.rand(()) * self.head(x)


def test_blocks_of_a_class_are_not_left_out_because_others_of_it_fail():
    x = torch.randn(3, WIDTH)
    with pytest.raises(sd.errors.UnsupportedBlockError) as refused:
        sd.apply(SomeNoisy(), sd.Uniform(0.5), example=x)
    assert followed(str(refused.value)) == {"exclude": ["layers.0", "layers.2"]}
    assert applies(SomeNoisy, x, str(refused.value)) == ["layers.1", "layers.3"]


def test_where_nothing_can_be_skipped_nothing_is_to_be_left_out():
    with pytest.raises(
        sd.errors.UnsupportedBlockError, match="no other block of the model"
    ) as refused:
        sd.apply(Model(Shows, others=False), example=torch.randn(3, WIDTH))
    assert not followed(str(refused.value))


def test_the_blocks_inside_of_a_model_that_is_none_are_still_skipped():
    x = torch.randn(3, WIDTH)
    with pytest.raises(sd.errors.UnsupportedBlockError) as refused:
        sd.apply(Around(Plain), example=x)
    names = applies(lambda: Around(Plain), x, str(refused.value))
    assert names == [f"inside.blocks.{n}" for n in range(4)]


class Modulates(nn.Module):
    """Two additions, and the branch of the second modulates that of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, e):
        m = torch.tanh(self.f(e))
        return x + torch.tanh(self.g(x)) * m, e + m * m


class TwoStreams(nn.Module):
    def __init__(self, kind) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(3))

    def forward(self, x, e):
        for block in self.blocks:
            x, e = block(x, e)
        return x, e


class ModulatesAndShows(Modulates):
    """Its branches are outputs of the model, too."""

    def forward(self, x, e):
        m = torch.tanh(self.f(e))
        return x + torch.tanh(self.g(x)) * m, e + m * m - 2 * m


@pytest.mark.parametrize(("kind", "works"), [(Modulates, True), (ModulatesAndShows, False)])
def test_one_gate_for_a_block_is_advised_where_it_works_and_its_additions_cannot_have_their_own(
    kind, works
):
    x = torch.randn(3, WIDTH), torch.randn(3, WIDTH)
    with pytest.raises(sd.errors.UnsupportedBlockError) as refused:
        sd.apply(TwoStreams(kind), sd.Uniform(0.5), example=x, granularity="unit")
    assert ('granularity="block" skips all' in str(refused.value)) == works
    if works:
        names = applies(lambda: TwoStreams(kind), x, str(refused.value))
        assert names == [f"blocks.{n}" for n in range(3)]


def without_source(others: int) -> nn.Module:
    """Two blocks that share a normalisation, and others; of a class whose source is not known."""
    scope = {"nn": nn, "torch": torch}
    exec(
        "class Block(nn.Module):\n"
        "    def __init__(self, norm):\n"
        "        super().__init__()\n"
        f"        self.norm, self.linear = norm, nn.Linear({WIDTH}, {WIDTH})\n"
        "    def forward(self, x):\n"
        "        return x + torch.tanh(self.linear(self.norm(x)))",
        scope,
    )
    shared = nn.LayerNorm(WIDTH)
    own = (nn.LayerNorm(WIDTH) for _ in range(others))
    return nn.Sequential(*(scope["Block"](norm) for norm in (shared, shared, *own)))


@pytest.mark.parametrize("others", [0, 1, 2, 3])
def test_of_blocks_that_fail_only_together_one_is_left_out(others):
    x = torch.randn(3, WIDTH)
    with pytest.raises(sd.errors.UnsupportedBlockError) as refused:
        sd.apply(without_source(others), example=x)
    assert "no other block" not in str(refused.value)
    assert len(applies(lambda: without_source(others), x, str(refused.value))) >= max(1, others)


@pytest.mark.parametrize("gate", ["sample", "subset"])
def test_samples_that_are_not_first_need_one_coin_for_all(gate):
    x = torch.randn(4, 3, WIDTH)
    with pytest.raises(sd.errors.ApplyError, match="is not the batch") as refused:
        sd.apply(TimeFirst(), example=x, gate=gate)
    assert len(applies(TimeFirst, x, str(refused.value), gate=gate)) == 2


class PackedTrunk(nn.Module):
    """Runs a recurrent layer on a packed sequence, in its own loop."""

    def __init__(self, layer=lambda: nn.LSTM(8, 8, batch_first=True)) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(2))

    def forward(self, x, lengths):
        for layer in self.layers:
            x = x + packed(layer, x, lengths)
        return x


def packed(layer, x, lengths):
    y, _ = layer(rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    return rnn.pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])[0]


class PackedLayer(nn.LSTM):
    def forward(self, x, lengths):
        y, _ = super().forward(
            rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        )
        return x + rnn.pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])[0]


class PackedLayers(PackedTrunk):
    def forward(self, x, lengths):
        for layer in self.layers:
            x = layer(x, lengths)
        return x


def test_a_packed_sequence_is_the_reason_and_a_layer_the_remedy():
    example = torch.randn(3, 5, 8), torch.tensor([5, 2, 3])
    with pytest.raises(sd.errors.UnsupportedBlockError) as caught:
        sd.apply(PackedTrunk(), example=example)
    assert "a packed sequence" in str(caught.value)
    assert "move these lines into the forward method of a layer" in str(caught.value)
    assert "needs more of it" not in str(caught.value)
    model = PackedLayers(lambda: PackedLayer(8, 8, batch_first=True))
    assert len(sd.apply(model, example=example).blocks) == 2


def test_what_a_block_keeps_between_calls_is_the_reason():
    class Echo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.last = nn.Linear(8, 8), None

        def forward(self, x):
            y = self.f(x)
            if self.last is not None:
                y = y + 0.1 * self.last
            self.last = y.detach()
            return x + y.tanh()

    with pytest.raises(
        sd.errors.UnsupportedBlockError, match="keeps a state from call to call"
    ) as caught:
        sd.apply(nn.Sequential(Echo(), Echo(), Echo()), example=torch.randn(4, 8))
    assert "random" not in str(caught.value)


class WaveNetLayer(nn.Module):
    """One large convolution for two outputs: the next layer's input, and a sum over all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.dilated = nn.Conv1d(8, 16, 3, padding=1)
        self.residual, self.skip = nn.Conv1d(8, 8, 1), nn.Conv1d(8, 8, 1)

    def forward(self, x):
        signal, gate = self.dilated(x).chunk(2, 1)
        inner = torch.tanh(signal) * torch.sigmoid(gate)
        return x + self.residual(inner), self.skip(inner)


class WaveNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(WaveNetLayer() for _ in range(3))

    def forward(self, x):
        total = 0
        for layer in self.layers:
            x, skip = layer(x)
            total = total + skip
        return total


def test_a_block_most_of_which_runs_when_it_is_closed_is_refused():
    x = torch.randn(2, 8, 12)
    own, shared = 8 * 8, 8 * 16 * 3
    with pytest.raises(
        sd.errors.UnsupportedBlockError, match="is needed for more than the addition"
    ) as caught:
        sd.apply(WaveNet(), example=x)
    assert f"{shared / (own + shared):.0%} of its FLOPs" in str(caught.value)
    plan = sd.plan(WaveNet(), x)
    assert all("of its FLOPs" in block.refusal for block in plan.blocks)


class Observed(nn.Module):
    """A residual block whose branch goes out too, so that it cannot be skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, x):
        y = self.f(x)
        return x + y, y.mean()


class Holder(nn.Module):
    """Has such blocks in its own branch, most of which is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(Observed() for _ in range(2))
        self.out = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))

    def forward(self, x):
        h, total = x, 0
        for block in self.inner:
            h, mean = block(h)
            total = total + mean
        return x + self.out(h), total


class Nested(nn.Module):
    def __init__(self, plain: int) -> None:
        super().__init__()
        self.around = nn.ModuleList(Holder() for _ in range(2))
        self.plain = nn.ModuleList(Plain() for _ in range(plain))

    def forward(self, x):
        total = 0
        for block in self.around:
            x, mean = block(x)
            total = total + mean
        for block in self.plain:
            x = block(x)
        return x, total


def test_what_excluding_takes_along_is_no_block_that_is_left():
    x = torch.randn(3, 8)
    with pytest.raises(sd.errors.UnsupportedBlockError, match="no other block of the model"):
        sd.apply(Nested(0), example=x)
    with pytest.raises(sd.errors.UnsupportedBlockError) as caught:
        sd.apply(Nested(2), example=x)
    shown = re.search(r"exclude=(\[.*?\])", str(caught.value))
    assert shown
    handle = sd.apply(Nested(2), example=x, exclude=ast.literal_eval(shown[1]))
    assert [block.name for block in handle.blocks] == ["plain.0", "plain.1"]


class Modulated(nn.Module):
    """All blocks share what is computed of a condition, which is more work than their own."""

    def __init__(self) -> None:
        super().__init__()
        self.condition = nn.Linear(8, 24)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, condition):
        shift, scale, gate = self.condition(condition).chunk(3, -1)
        for layer in self.layers:
            x = x + gate * torch.tanh(layer(x * (1 + scale) + shift))
        return x


def test_what_blocks_share_is_no_work_of_the_first_one():
    x, condition = torch.randn(3, 8), torch.randn(3, 8)
    handle = sd.apply(Modulated(), example=(x, condition))
    assert [block.name for block in handle.blocks] == ["layers.0", "layers.1", "layers.2"]


class Rectifies(nn.Module):
    """Changes its input in place, by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.linear(nn.functional.relu(x.view(-1, WIDTH), inplace=True)).view(x.shape)


def rectifier(inplace: bool) -> nn.Module:
    return nn.Sequential(nn.ReLU(inplace), nn.Linear(WIDTH, WIDTH))


class AddsTo(nn.Module):
    def __init__(self, f, copies: bool) -> None:
        super().__init__()
        self.f, self.copies = f, copies

    def forward(self, x):
        return x + self.f(x.clone() if self.copies else x)


class AddsToInLoop(nn.Module):
    def __init__(self, branches, copies: bool) -> None:
        super().__init__()
        self.branches, self.copies = nn.ModuleList(branches), copies

    def forward(self, x):
        for f in self.branches:
            x = x + f(x.clone() if self.copies else x)
        return x


def changing(branch, loop: bool, copies: bool = False) -> nn.Module:
    torch.manual_seed(0)
    first, branches = nn.Linear(WIDTH, WIDTH), [branch(), branch()]
    if loop:
        return nn.Sequential(first, AddsToInLoop(branches, copies))
    return nn.Sequential(first, *(AddsTo(f, copies) for f in branches))


@pytest.mark.parametrize("loop", [False, True])
def test_a_branch_that_changes_its_shortcut_in_place_is_named_with_the_remedy(loop):
    x = torch.randn(3, WIDTH)
    with pytest.raises(sd.errors.UnsupportedBlockError) as caught:
        sd.apply(changing(lambda: rectifier(True), loop), example=x)
    assert re.search(
        r"changes its shortcut in place, in '\S+\.0' \(ReLU, relu\)", str(caught.value)
    )
    assert "give it inplace=False, or write x + f(x.clone())" in str(caught.value)
    with pytest.raises(sd.errors.UnsupportedBlockError) as caught:
        sd.apply(changing(Rectifies, loop), example=x)
    assert re.search(
        r"changes its shortcut in place, in '\S+' \(Rectifies, relu\)", str(caught.value)
    )
    assert "inplace=False" not in str(caught.value)
    for model in (
        changing(lambda: rectifier(False), loop),
        changing(lambda: rectifier(True), loop, copies=True),
        changing(Rectifies, loop, copies=True),
    ):
        assert len(sd.apply(model, example=x).blocks) == 2
        sd.verify(model, x, repeats=1)


def dropping(inplace: bool) -> nn.Module:
    return nn.Sequential(nn.Dropout(0.5, inplace), nn.Linear(WIDTH, WIDTH))


@pytest.mark.parametrize("loop", [False, True])
def test_a_branch_that_changes_its_shortcut_in_training_only_is_named_with_the_remedy(loop):
    x = torch.randn(3, WIDTH)
    with pytest.raises(sd.errors.UnsupportedBlockError) as caught:
        sd.apply(changing(lambda: dropping(True), loop), example=x)
    assert "in training mode" in str(caught.value)
    assert "give it inplace=False, or write x + f(x.clone())" in str(caught.value)
    for model in (
        changing(lambda: dropping(False), loop),
        changing(lambda: dropping(True), loop, copies=True),
        changing(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), dropping(True)), loop),
    ):
        assert len(sd.apply(model, example=x).blocks) == 2


def test_a_change_in_place_that_changes_no_number_is_no_reason_to_refuse():
    behind_another = nn.Sequential(nn.ReLU(), AddsTo(rectifier(True), copies=False))
    assert len(sd.apply(behind_another, example=torch.randn(3, WIDTH)).blocks) == 1


class WritesOne(nn.Module):
    """The second branch is written into a tensor."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        for n, branch in enumerate(self.branches):
            y = branch(x).relu()
            if n == 1:
                out = torch.zeros_like(x)
                out[:, :3] = y[:, :3]
                y = out
            x = x + y
        return x


@pytest.mark.parametrize("gate", ["batch", "subset"])
@pytest.mark.parametrize(
    "survival", [sd.Uniform(0.5), [0.9, 0.8, 0.7], {"branches.0": 0.9, "branches.1": 0.5}]
)
def test_the_block_that_fails_is_named_in_whatever_form_p_is_given(survival, gate):
    x = torch.randn(5, 6)
    with pytest.raises(sd.errors.UnsupportedBlockError, match=r"'branches\.1'.*exclude=\["):
        sd.apply(WritesOne(), survival, example=x, gate=gate)


class Counts(nn.Module):
    """Returns a number of each branch that has run."""

    def __init__(self, together: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Plain() for _ in range(3))
        self.sums, self.together = [], together
        for block in self.blocks:
            block.linear.register_forward_hook(self.collect)

    def collect(self, _module, _inputs, output):
        self.sums.append(torch.tensor(output.sum().item()))

    def forward(self, x):
        self.sums.clear()
        for block in self.blocks:
            x = block(x)
        return x, torch.stack(self.sums) if self.together else list(self.sums)


@pytest.mark.parametrize(
    ("together", "named"),
    [
        (True, r"a tensor of shape \[2\], and its original \[3\]: if it collects a value"),
        (False, "3 tensors, and its original 4: if it collects a value"),
    ],
)
def test_a_value_of_each_branch_that_runs_is_the_reason(together, named):
    with pytest.raises(sd.errors.UnsupportedBlockError, match=named):
        sd.apply(Counts(together), example=torch.randn(3, WIDTH))
