"""On a GPU, what it computes is what the CPU computes. Skipped where there is none."""

import argparse
from functools import partial

import pytest
import torch
from helpers import fill, run_saving, tiny_teacher, wave
from test_speed import NET

import data
import evaluate
from awd import AdaptiveWeightedDiscriminator
from dmd_refine import discriminator_loss, fake_branch_loss, generator_loss
from meanflow_td import autocast, draw_times, generate, meanflow_loss, meanflow_target, sample, sample_ode
from models import AutoencoderKL, DiT, DiTTeacher, SiTTeacher, Teacher, frozen_copy, sample_sde

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def as_the_scripts_do():
    data.check_device(argparse.ArgumentParser(), "cuda")


def close(one, other, tolerance):
    """Whether the second is the first, up to a share of the first's norm."""
    return float((one - other.cpu()).norm() / one.norm()) < tolerance


@pytest.mark.parametrize("build, call, x", [
    (lambda: DiT(**NET), lambda net, x: net(x, t=x.new_tensor([999, 37]), y=x.new_tensor([1, 10]).long()),
     wave(2, 4, 8, 8)),
    (lambda: AutoencoderKL(block_out_channels=(32, 64)), lambda net, x: torch.cat(net.encode(x)), wave(2, 3, 32, 32)),
    (lambda: AutoencoderKL(block_out_channels=(32, 64)), lambda net, x: net.decode(x), wave(2, 4, 16, 16)),
    (evaluate.InceptionV3, lambda net, x: torch.cat([*net(x).values()], 1), (wave(2, 3, 64, 64) + 1) / 2),
], ids=["DiT", "encoder", "decoder", "Inception"])  # fmt: skip
@torch.no_grad()
def test_a_network_answers_as_on_the_cpu(build, call, x):
    net = fill(build())
    answer = call(net, x)
    assert close(answer, call(net.to(CUDA), x.to(CUDA)), 1e-5)


def gradients(kind, device, amp="off"):
    """The gradient of each loss in all that it trains, one vector each, from the same numbers on any device."""
    generator = data.rng(0, "cuda")
    x_0, eps, noise = torch.randn(3, 8, 4, 8, 8, generator=generator)
    (r, t), y = draw_times(8, generator, share_spans=0.5), torch.arange(8)
    x_0, eps, noise, r, t, y = (x.to(device) for x in (x_0, eps, noise, r, t, y))
    teacher = kind(fill(DiT(**NET)).requires_grad_(False), w=1.5).to(device)
    student = kind(fill(DiT(**NET, two_times=True))).to(device)
    fake = kind(frozen_copy(teacher.net)).requires_grad_(True)
    discriminator = fill(AdaptiveWeightedDiscriminator([NET["hidden_size"]] * 2)).to(device)
    t = t.clamp(*teacher.times) if kind is DiTTeacher else t
    losses = {
        "TD": (student, lambda: meanflow_loss(student, x_0, teacher(x_0, t=t, y=y), r=torch.minimum(r, t), t=t, y=y)),
        "DMD + AWD": (student, lambda: generator_loss(teacher, fake, discriminator, generate(student, eps, y), y, noise,
                                                      t, lambda_adv=0.1, taps=(0, 2))),
        "fake branch": (fake, lambda: (fake_branch_loss(fake, x_0, y, noise, t),)),
        "discriminator": (discriminator, lambda: discriminator_loss(
            discriminator, teacher, x_0, eps, y, torch.cat([noise, noise]), torch.cat([t, t]), taps=(0, 2))),
    }  # fmt: skip
    found = {}
    for name, (player, loss_of) in losses.items():
        with autocast(device, amp):
            loss = loss_of()[0]
        parts = torch.autograd.grad(loss, [p for p in player.parameters() if p.requires_grad], allow_unused=True)
        found[name] = torch.cat([part.flatten() for part in parts if part is not None])
    return found


@pytest.mark.parametrize("kind", [Teacher, SiTTeacher, DiTTeacher])
def test_a_loss_has_the_gradient_of_the_cpu(kind):
    expected, found = gradients(kind, torch.device("cpu")), gradients(kind, CUDA)
    assert {name: close(expected[name], found[name], 1e-3) for name in expected} == dict.fromkeys(expected, True)


def test_in_bf16_a_gradient_points_the_same_way_and_du_dt_is_not_rounded():
    full, half = gradients(Teacher, CUDA), gradients(Teacher, CUDA, "bf16")
    for name in full:
        assert torch.cosine_similarity(full[name], half[name], dim=0) > 0.98, name
        assert not torch.equal(full[name], half[name]), name
    student = Teacher(fill(DiT(**NET, two_times=True))).to(CUDA)
    x, v = torch.randn(2, 8, 4, 8, 8, generator=data.rng(0, "cuda", 0, CUDA), device=CUDA)
    r, t = draw_times(8, data.rng(0, "times", 0, CUDA))
    call = partial(meanflow_target, student, x, v, r=r, t=t, y=torch.arange(8, device=CUDA))
    with autocast(CUDA, "bf16"):
        _, du_dt = call()
    assert torch.equal(du_dt, call()[1])


def test_samples_from_the_same_noise_are_those_of_the_cpu():
    student, y = tiny_teacher(two_times=True), torch.arange(6) % 3
    eps = torch.randn(6, 1, 8, 8, generator=data.rng(0, "evaluation"))
    assert close(sample(student, eps, y, steps=2), sample(student.to(CUDA), eps.to(CUDA), y.to(CUDA), steps=2), 1e-4)


@pytest.mark.parametrize("kind, sampler", [
    (SiTTeacher, lambda teacher, eps, y, noises: sample_ode(teacher, eps, y, 5)),
    (SiTTeacher, lambda teacher, eps, y, noises: sample_sde(teacher, eps, y, 5, generator=noises)),
    (DiTTeacher, lambda teacher, eps, y, noises: teacher.sample_ddpm(eps, y, 5, generator=noises)),
], ids=["heun", "sde", "ddpm"])  # fmt: skip
def test_a_teachers_samples_from_the_same_noises_are_those_of_the_cpu(kind, sampler):
    teacher, y = kind(fill(DiT(**NET)).requires_grad_(False), w=1.5), torch.arange(6)
    eps = torch.randn(6, 4, 8, 8, generator=data.rng(0, "evaluation"))
    expected, found = (sampler(teacher.to(device), eps.to(device), y.to(device),
                               [data.rng(0, "sampler", i) for i in range(6)]) for device in ("cpu", CUDA))  # fmt: skip
    assert close(expected, found, 1e-3)


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path):
    """To the same bits on the CPU; here a kernel may add up in another order."""
    flags = ["--data", "glyphs", "--quick", "--device", "cuda", "--teacher-steps", 4, "--td-steps", 4]
    run_saving("meanflow_td", *flags, "--out", tmp_path / "whole")
    run_saving("meanflow_td", *flags, "--out", tmp_path / "killed", die=("td", 2))
    assert run_saving("meanflow_td", *flags, "--out", tmp_path / "killed") == "td 3"
    whole, killed = (torch.load(tmp_path / name / "td.pt", weights_only=True)["net"] for name in ("whole", "killed"))
    assert max(float((whole[name] - killed[name]).abs().max()) for name in whole) < 1e-5
