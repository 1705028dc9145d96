import pytest
import torch
import torch.nn.functional as F

import stochastic_depth as sd
from stochastic_depth.data import FolderBatches
from stochastic_depth.models import CifarResNet
from stochastic_depth.train.build import build_optimizer, first_convolution
from stochastic_depth.train.config import OptimizerConfig
from stochastic_depth.train.runtime import Runtime
from stochastic_depth.train.step import evaluate, evaluate_parts, train_step
from support.data_sets import write_imagenet

CPU = Runtime("cpu", "float32", 1)


def batch(images: int, seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    return (
        torch.randn(images, 3, 8, 8, generator=rng, dtype=torch.float64),
        torch.randint(10, (images,), generator=rng),
    )


def test_a_step_is_nesterov_sgd_with_weight_decay_by_the_textbook():
    config = OptimizerConfig(learning_rate=0.05)
    model = CifarResNet(8).double()
    twin = CifarResNet(8).double()
    optimizer = build_optimizer(config, model)
    velocity = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    for step in range(3):
        images, labels = batch(6, step)
        train_step(model, optimizer, images, labels, first_convolution(model), CPU)
        twin.zero_grad()
        F.cross_entropy(twin(images), labels).backward()
        with torch.no_grad():
            for name, p in twin.named_parameters():
                gradient = p.grad + config.weight_decay * p
                velocity[name] = config.momentum * velocity[name] + gradient
                p -= config.learning_rate * (gradient + config.momentum * velocity[name])
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14, msg=name)


def test_a_step_measures_the_first_convolution():
    model = CifarResNet(8).double()
    images, labels = batch(6)
    first = first_convolution(model)
    measured = train_step(
        model, build_optimizer(OptimizerConfig(), model), images, labels, first, CPU
    )
    gradient = model.stem[0].weight.grad
    torch.testing.assert_close(measured.gradient_norm, (gradient**2).sum().sqrt())
    torch.testing.assert_close(measured.gradient_mean, gradient.abs().mean())


def test_bfloat16_changes_the_arithmetic_and_not_the_weights():
    model = CifarResNet(8)
    images, labels = batch(6)
    runtime = Runtime("cpu", "bfloat16", 1)
    seen = []
    model.stem[0].register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    train_step(
        model,
        build_optimizer(OptimizerConfig(), model),
        images.float(),
        labels,
        first_convolution(model),
        runtime,
    )
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_evaluation_counts_exactly_over_uneven_batches():
    model = CifarResNet(14).double()
    sd.apply(model, sd.LinearDecay(0.2))
    images, labels = batch(11)
    loss, error = evaluate(
        model, [(images[:4], labels[:4]), (images[4:5], labels[4:5]), (images[5:], labels[5:])], CPU
    )
    with torch.no_grad():
        logits = model.eval()(images)
    assert error == pytest.approx(100 * (logits.argmax(1) != labels).double().mean().item())
    assert abs(loss - F.cross_entropy(logits, labels).item()) < 1e-12


def test_evaluation_puts_the_mode_back_and_changes_nothing():
    model = CifarResNet(8).double()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    evaluate(model, [batch(4)], CPU)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("validation", [0, 6])
def test_images_for_validation_that_are_those_for_testing_are_evaluated_once(
    validation, tmp_path, monkeypatch
):
    write_imagenet(tmp_path)
    options = {"batch": 4, "seed": 0, "device": "cpu", "image_size": 16, "workers": 0}
    images = FolderBatches(tmp_path, validation=validation, **options)
    asked, its_own = [], images.evaluate
    monkeypatch.setattr(images, "evaluate", lambda part: asked.append(part) or its_own(part))
    network = CifarResNet(8, classes=3)
    found = evaluate_parts(network, images, CPU)
    assert asked == (["validation", "test"] if validation else ["validation"])
    assert found == {part: evaluate(network, its_own(part), CPU) for part in found}
    assert list(found) == ["validation", "test"]
