"""On a GPU, what it computes is what the CPU computes, and bf16 moves it little. Skipped where there is none."""

from functools import partial

import pytest
import torch
from helpers import fill, wave

import data
import dmd_refine
import evaluate
import meanflow_td
from awd import AdaptiveWeightedDiscriminator
from models import AutoencoderKL, DiT, DiTTeacher, SiTTeacher, Velocity, add_noise

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
NET = dict(input_size=8, patch_size=2, in_channels=4, hidden_size=48, depth=3, num_heads=4, num_classes=10,
           learn_sigma=True)  # fmt: skip
NETWORKS = {  # what is filled, how it is called, how far it may be from the CPU: the VAE may round to TF32
    "DiT": (lambda: DiT(**NET), lambda net, x: net(x, t=x.new_tensor([999, 37]), y=x.new_tensor([1, 10]).long()), 1e-5),
    "VAE": (lambda: AutoencoderKL((32, 64)), lambda net, x: net.decode(net.encode(x[:, :3])[0]), 5e-3),
    "Inception": (evaluate.InceptionV3, lambda net, x: torch.cat([*net(x[:, :3] / 2 + 0.5).values()], 1), 1e-5)}
SAMPLERS = {"student": Velocity, "heun": SiTTeacher, "sde": SiTTeacher, "ddpm": DiTTeacher}


def drawn(*shape):  # on the CPU, the same for any device
    return torch.randn(shape, generator=data.rng(0, "cuda"))


def distance(one, other):  # how far the second is from the first, as a share of the first's norm
    return float((one.cpu() - other.cpu()).norm() / one.cpu().norm())


@NO_GPU
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_network_answers_as_on_the_cpu(name, device="cuda"):
    build, call, most = NETWORKS[name]
    cpu, gpu = (call(fill(build()).to(data.join(where)), wave(2, 4, 8, 8).to(where)) for where in ("cpu", device))
    assert distance(cpu, gpu) < most


def gradients(kind, device, amp=False):
    """du/dt, and the gradient of each loss in all that it trains, from the same numbers on any device."""
    x_t, x_gen, eps = drawn(3, 8, 4, 8, 8).to(data.join(device))
    r, t = torch.tensor([[0.1, 0.9], [0.5, 0.5]] * 4, device=device).T
    teacher, y = kind(fill(DiT(**NET)).requires_grad_(False)).to(device), torch.arange(8, device=device)
    fake, teacher.w = kind(fill(DiT(**NET))).to(device), 1.5
    student = kind(fill(DiT(**NET, two_times=True))).to(device)
    discriminator = fill(AdaptiveWeightedDiscriminator([NET["hidden_size"]] * 2)).to(device)

    def noised(x, generator, times):  # as dmd_refine's, with noise from the CPU
        noise, t = drawn(*x.shape).to(x), torch.linspace(*times, len(x), device=x.device)
        return add_noise(x, noise, t), noise, t

    losses = {
        "TD": (student, lambda: meanflow_td.meanflow_loss(student, x_t, teacher(x_t, t=t, y=y), r=r, t=t, y=y)),
        "DMD + AWD": (student, lambda: dmd_refine.generator_loss(
            teacher, fake, discriminator, meanflow_td.generate(student, eps, y), y, None, lambda_adv=0.1, taps=(0, 2))),
        "fake branch": (fake, lambda: dmd_refine.fake_loss(fake, x_gen, y, None)),
        "discriminator": (discriminator, lambda: dmd_refine.discriminator_loss(
            discriminator, teacher, x_t, x_gen, y, None, taps=(0, 2)))}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, torch.autocast(eps.device.type, torch.bfloat16, amp, False):
        patch.setattr(dmd_refine, "noised", noised)
        found = {"du/dt": meanflow_td.meanflow_target(student, x_t, eps, r=r, t=t, y=y)[1]}
        losses = {name: (player, loss_of()[0]) for name, (player, loss_of) in losses.items()}
    for name, (player, loss) in losses.items():  # as in `update`, backwards without autocast
        parts = torch.autograd.grad(loss, [p for p in player.parameters() if p.requires_grad], allow_unused=True)
        found[name] = torch.cat([part.flatten() for part in parts if part is not None])
    return found


@NO_GPU
@pytest.mark.parametrize("kind", [Velocity, SiTTeacher, DiTTeacher])
def test_a_loss_has_the_gradient_of_the_cpu(kind):
    expected, found = gradients(kind, "cpu"), gradients(kind, "cuda")
    assert max(distance(expected[name], found[name]) for name in expected) < 1e-3


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_GPU)])
def test_bf16_moves_a_gradient_by_percents_and_du_dt_not_at_all(device):
    full, half = gradients(Velocity, device), gradients(Velocity, device, amp=True)
    found = {name: distance(full[name], half[name]) for name in full}
    assert found.pop("du/dt") == 0 and all(0 < share < 0.1 for share in found.values()), found


@NO_GPU
@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_are_those_of_the_cpu(name, device="cuda"):
    found, y, eps = [], torch.arange(6), drawn(6, 4, 8, 8)
    for where in ("cpu", device):
        net = SAMPLERS[name](fill(DiT(**NET, two_times=name == "student")).requires_grad_(False)).to(data.join(where))
        net.w = 1.0 if name == "student" else 1.5
        found.append(evaluate.SAMPLERS[name][1](net, eps.to(where), y.to(where), 5, data.rng(0)))
    assert distance(*found) < 1e-3


@NO_GPU
def test_the_scripts_run_and_go_on(tmp_path, monkeypatch, device="cuda"):
    """Each script once, stage 1 also stopped at its third step. A GPU adds in any order, so not to the bit."""
    flags, path = ["--quick", "--batch=8", "--steps=4", f"--device={device}", f"--out={tmp_path}"], tmp_path / "td.pt"
    meanflow_td.main(flags)
    whole, rate = data.load(path, "")["ema"], meanflow_td.learning_rate
    path.unlink()
    monkeypatch.setattr(meanflow_td, "go_on", partial(data.go_on, every=0))
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(meanflow_td, "learning_rate", lambda k, *rest: rate(k, *rest) + 0 / (2 - k))
        meanflow_td.main(flags)
    assert data.load(path, "")["step"] == 2
    for module in (meanflow_td, dmd_refine):
        module.main(flags)
    found = data.load(path, "")["ema"]
    assert max(distance(weight, found[name]) for name, weight in whole.items() if weight.any()) < 1e-3
    evaluate.main([*flags[3:4], "--sample=3", f"--checkpoint={tmp_path / 'hd-seed0.pt'}", f"--out={tmp_path / 'x'}"])
    assert len(list((tmp_path / "x").glob("*.png"))) == 3
