"""Files of weights, students made from teachers, and the teachers' own samplers.

Numbers named "official" are what facebookresearch/DiT (ed81ce2) and diffusers' AutoencoderKL answered with the weights
of helpers.fill on the inputs of helpers.wave. On one core the file takes about 10 seconds.
"""

import argparse
import hashlib
import io
import json
import math
import os
import random
import sys
import unittest.mock
import zipfile

import numpy as np
import pytest
import torch
from torch import nn
import torch.nn.functional as F

import models
from helpers import broken, fill, short_of_memory, wave, within
from models import AutoencoderKL, DiT, DiTTeacher, SiTTeacher, Teacher, load_weights, read_weights
from test_networks import ALPHA_BAR, SIGMA_NET, T_FIRST, T_LAST, T_STEPS, assert_official

TINY = dict(input_size=4, patch_size=2, in_channels=4, hidden_size=8, depth=1, num_heads=2, num_classes=3)
WRAPPERS = ["Teacher", "SiTTeacher", "DiTTeacher"]


# --- files ---

TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}


def safetensors(state, lead=b"", **changes):
    """The bytes of a .safetensors file. lead: spaces before the JSON. changes: entries of the header to put in."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in state.items():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        begin, data = len(data), data + raw
        header[name] = dict(dtype=TYPES[tensor.dtype], shape=list(tensor.shape), data_offsets=[begin, len(data)])
    text = lead + json.dumps({**header, **changes}).encode()
    return len(text).to_bytes(8, "little") + text + data


def torch_file(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def write(path, content):
    path.write_bytes(content)
    return path


def same(weights, state):
    return weights.keys() == state.keys() and all(torch.equal(weights[n], state[n]) for n in state)


def zeros(state):
    return {name: torch.zeros_like(entry) for name, entry in state.items()}


@pytest.fixture(scope="module")
def state():
    return fill(DiT(**TINY)).state_dict()


def wrapped(prefix, state):
    return {f"{prefix}{name}": entry for name, entry in state.items()}


@pytest.mark.parametrize("form", [
    lambda s: s,
    lambda s: {"model": s, "epoch": 3},
    lambda s: {"model": zeros(s), "ema": s, "opt": {"state": {}}},
    lambda s: {"state_dict": s},
    lambda s: {"ema": None, "model": s},
    lambda s: {"model": zeros(s), "ema": s, "args": argparse.Namespace(lr=1e-4)},  # what DiT's train.py writes
    lambda s: wrapped("module.", s),
    lambda s: wrapped("_orig_mod.module.", s),
    lambda s: {"ema": wrapped("module._orig_mod.module.", s)},
    lambda s: {name: nn.Parameter(entry) for name, entry in s.items()},
])
def test_every_form_of_a_checkpoint_gives_the_same_weights(form, state, tmp_path):
    for suffix, options in ((".pt", {}), (".pth", dict(_use_new_zipfile_serialization=False)), (".bin", {})):
        weights = read_weights(write(tmp_path / f"net{suffix}", torch_file(form(state), **options)))
        assert same(weights, state) and not any(entry.requires_grad for entry in weights.values())


def test_the_ema_is_what_is_read(state, tmp_path):
    path = write(tmp_path / "net.pt", torch_file({"ema": state, "model": zeros(state)}))
    wrong = broken(models, ('("ema", "model", "state_dict")', '("model", "ema", "state_dict")'))
    assert same(read_weights(path), state) and not same(wrong.read_weights(path), state)


@pytest.mark.parametrize("dtype", list(TYPES))
def test_safetensors_of_every_type_and_alignment(dtype, tmp_path):
    state = {"b": torch.arange(6).to(dtype).reshape(2, 3), "a": torch.tensor(7).to(dtype),
             "none": torch.zeros(0, 4, dtype=dtype), "module.c": torch.arange(3).to(dtype)}
    for lead in (b"", b" ", b"   "):
        weights = read_weights(write(tmp_path / "net.safetensors", safetensors(state, lead)))
        assert same(weights, {name.removeprefix("module."): entry for name, entry in state.items()})
        assert all(weights[name].dtype == dtype for name in weights)


def test_weights_are_mapped_and_writing_to_them_leaves_the_file_alone(state, tmp_path):
    for name, content in (("net.pt", torch_file(state)), ("net.safetensors", safetensors(state))):
        path = write(tmp_path / name, content)
        read_weights(path)["x_embedder.proj.bias"].add_(1)
        assert path.read_bytes() == content


class Stranger:
    def __reduce__(self):
        return os.system, ("echo this must not run",)


@pytest.mark.parametrize("name, content, reason", [
    ("net.pt", None, "cannot be read .*No such file"),
    ("net.pt", b"", "damaged"),
    ("net.pt", b"<html>404</html>", "damaged"),
    ("net.pt", torch_file([1, 2]), "no dict of tensors"),
    ("net.pt", torch_file({}), "no dict of tensors"),
    ("net.pt", torch_file({"lr": 0.1}), "'lr' is no plain tensor"),
    ("net.pt", torch_file({"a": Stranger()}), "a pickled posix.system|a pickled nt.system"),
    ("net.pt", torch_file({"a": torch.zeros(3).to_sparse()}), "'a' is no plain tensor"),
    ("net.pt", torch_file({"a": torch.zeros(3, device="meta")}), "'a' is no plain tensor"),
    ("net.pt", torch_file({"a\n\ud800": torch.zeros(3)}), r"'a\\n\\ud800' is no plain tensor"),
    ("net.pt", torch_file({"a": torch.zeros(3), "module.a": torch.zeros(3)}), "'a' twice"),
    ("net.pt", torch_file({"a": torch.zeros(999)})[:2000], "not a zip file"),
    ("net.pt", torch_file({"a": torch.full((99,), 7.0)}).replace(b"\0\0\xe0\x40", b"\0\0\xe0\x41", 1), "checksum"),
    ("net.safetensors", b"", "header"),
    ("net.safetensors", b"<html>404</html>", "header of"),
    ("net.safetensors", safetensors({"a": torch.zeros(3)})[:-1], "does not lie"),
    ("net.safetensors", safetensors({"a": torch.zeros(3)}) + b"\0", "header speaks of 12 bytes"),
    ("net.safetensors", safetensors({"a": torch.zeros(3)}).replace(b"F32", b"Q32"), "Q32"),
    ("net.safetensors", safetensors({"a": torch.zeros(3)}).replace(b"[3]", b"[4]"), "does not lie"),
    ("net.safetensors", safetensors({"a": torch.zeros(33)}).replace(b"[33]", b"[-1]"), "do not fit"),
    ("net.safetensors", safetensors({"a": torch.zeros(3), "b": torch.zeros(3)}).replace(b"[12, 24]", b"[ 0, 12]"),
     "does not lie"),
    ("net.safetensors", safetensors({"a": torch.zeros(3)}).replace(b'"__metadata__"', b'"a"           '), "twice"),
    ("net.safetensors", safetensors({}), "no dict of tensors"),
])
def test_a_file_that_is_no_weights_gives_one_sentence_with_its_name(name, content, reason, tmp_path, capfd):
    path = tmp_path / name
    if content is not None:
        write(path, content)
    with pytest.raises(ValueError, match=reason) as error:
        read_weights(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and len(message) < 500 and message.endswith(".")
    assert capfd.readouterr().out == ""  # nothing in the file was run


def test_overlapping_tensors_are_what_the_order_check_finds(tmp_path):
    content = safetensors({"a": torch.zeros(3), "b": torch.zeros(3)}).replace(b"[12, 24]", b"[ 0, 12]")
    path = write(tmp_path / "net.safetensors", content[:-12])
    with pytest.raises(ValueError, match="does not lie"):
        read_weights(path)
    assert len(broken(models, ("begin != position or ", "")).read_weights(path)) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads its own size from /proc")
def test_hostile_headers_allocate_next_to_nothing(tmp_path):
    import resource

    def entry(**changes):
        return {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12], **changes}}

    def lie(length, text=b"{}"):
        return length.to_bytes(8, "little") + text

    three = {"a": torch.zeros(3)}
    hostile = [(lie(2 ** 63), "header of"), (lie(2 ** 30), "header of"),
               (lie(2 ** 30), "header of"),  # this one in a file that is as long, though sparse
               (safetensors(three, **entry(shape=[2 ** 40])), "do not fit"),
               (safetensors(three, **entry(shape=[2 ** 62, 0], data_offsets=[0, 0])), "do not fit"),
               (safetensors(three, **entry(shape=[16] * 30)), "does not lie"),
               (safetensors(three, **entry(data_offsets=[0, 2 ** 62])), "do not fit"),
               (lie(10 ** 6, b"[" * 10 ** 6), "recursion"),
               (safetensors(three, wide=[[]] * 260_000), "damaged"),
               (torch_file({"a": torch.zeros(1).expand(10 ** 6, 10 ** 6)}), None)]
    read_weights(write(tmp_path / "warm.pt", torch_file(three)))
    limit = resource.getrlimit(resource.RLIMIT_AS)
    for i, (content, reason) in enumerate(hostile):
        path = write(tmp_path / f"net{'.pt' if reason is None else '.safetensors'}", content)
        if i == 2:
            os.truncate(path, 2 ** 30 + 100)
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20), limit[1]))
        try:
            if reason is None:
                assert read_weights(path)["a"].shape == (10 ** 6, 10 ** 6)  # one number, and a stride of 0
            else:
                with pytest.raises(ValueError, match=reason) as error:
                    read_weights(path)
                assert "emory" not in str(error.value)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limit)


def mutated(content, rng):
    """Some bytes flipped, set, cut out or doubled; now and then the end cut off."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        i, kind, n = rng.randrange(len(content)), rng.randrange(4), rng.randrange(1, 20)
        if kind == 0:
            content[i] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[i] = rng.randrange(256)
        elif kind == 2 and len(content) > n:
            del content[i:i + n]
        else:
            content[i:i] = content[i:i + n]
    return bytes(content[:rng.randrange(len(content))] if rng.random() < 0.1 else content)


def with_mutated_pickle(content, rng):
    """A .pt file with all its checksums right and its pickled part mutated: what an attacker would make."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            part = old.read(name)
            new.writestr(name, mutated(part, rng) if name.endswith("data.pkl") else part)
    return out.getvalue()


@pytest.mark.filterwarnings("ignore")  # torch's, about the damage
@pytest.mark.parametrize("name, kind, times", [
    ("net.safetensors", "header", 400), ("net.safetensors", "any", 200),
    ("net.pt", "any", 200), ("net.pt", "pickle", 200), ("net.pt", "old", 200)])
def test_a_mutated_file_loads_whole_or_gives_a_sentence(name, kind, times, tmp_path):
    rng, refused = random.Random(0), 0
    state = {f"w{i}": wave(3, 5, phase=i) for i in range(3)}
    if name == "net.safetensors":
        content = safetensors(state)
    else:
        content = torch_file({"ema": state, "epoch": 3}, _use_new_zipfile_serialization=kind != "old")
    for _ in range(times):
        if kind == "header":
            end = 8 + int.from_bytes(content[:8], "little")
            text = mutated(content[8:end], rng)  # a header of the right length, and other contents
            damaged = len(text).to_bytes(8, "little") + text + content[end:]
        else:
            damaged = (with_mutated_pickle if kind == "pickle" else mutated)(content, rng)
        path = write(tmp_path / name, damaged)
        try:
            with within():
                weights = read_weights(path)
        except ValueError as error:
            refused += 1
            assert not short_of_memory(error)
            assert str(path) in str(error) and len(str(error)) < 500
            continue
        assert all(type(n) is str and type(w) is torch.Tensor for n, w in weights.items())
        total = sum(w.double().sum() for w in weights.values())  # every number can be read
        assert total.dtype == torch.float64
        if kind == "any" and name == "net.pt":  # its checksums hold, so nothing of it has changed
            assert same(weights, state)
    assert times * 0.7 < refused < times or kind == "any" and refused > 0


# --- into a net ---


def test_load_weights_casts_copies_and_keeps_no_tie_to_the_file(state):
    net = DiT(**TINY)
    half = {name: entry.half() for name, entry in state.items()}
    load_weights(net, half, "net.pt")
    assert all(torch.equal(entry, half[name].float()) for name, entry in net.state_dict().items())
    half["x_embedder.proj.bias"].zero_()
    assert net.x_embedder.proj.bias.abs().max() > 0


@pytest.mark.parametrize("change, words", [
    (lambda s: s.pop("pos_embed"), ["1 missing (pos_embed)"]),
    (lambda s: s.update(extra=torch.zeros(1)), ["1 unexpected (extra)"]),
    (lambda s: s.update({"x_embedder.proj.bias": torch.zeros(9)}),
     ["1 mis-shaped (x_embedder.proj.bias is (9,), not (8,))"]),
    (lambda s: s.update({"x_embedder.proj.bias": torch.zeros(8).long()}), ["x_embedder.proj.bias is torch.int64"]),
    (lambda s: s.clear(), ["22 missing", ", ...", "it holds no DiT"]),
    (lambda s: (s.pop("pos_embed"), s.update({f"n{i}": torch.zeros(1) for i in range(9)})),
     ["1 missing", "9 unexpected (n0, n1, n2, n3, ...)"]),
])
def test_what_does_not_fit_is_named_and_the_net_stays_as_it_was(change, words, state):
    net, weights = DiT(**TINY), zeros(state)
    before = {name: entry.clone() for name, entry in net.state_dict().items()}
    change(weights)
    with pytest.raises(ValueError) as error:
        load_weights(net, weights, "net.pt")
    assert all(word in str(error.value) for word in ["net.pt does not fit", *words]), error.value
    assert "\n" not in str(error.value) and len(str(error.value)) < 1500
    assert same(net.state_dict(), before)


def test_a_teacher_of_another_size_is_told_by_its_sizes():
    with torch.device("meta"):
        small, large = models.dit_by_name("DiT-S/2"), models.dit_by_name("SiT-XL/2")
    with pytest.raises(ValueError) as error:
        load_weights(large, small.state_dict(), "DiT-S-2.pt")
    assert ("DiT-S-2.pt does not fit the network: it holds a DiT of hidden size 384, depth 12, patch size 2, expected "
            "is one of hidden size 1152, depth 28, patch size 2; 160 missing (") in str(error.value)
    assert len(str(error.value)) < 1500


# --- published nets ---


@pytest.mark.parametrize("name, sizes, numbers", [
    ("SiT-XL/2", (1152, 28, 16, 2), 675_129_632), ("DiT-S/2", (384, 12, 6, 2), 32_963_360),
    ("DiT-B/4", (768, 12, 12, 4), None), ("SiT-L/8", (1024, 24, 16, 8), None), ("DiT-XL/8", (1152, 28, 16, 8), None)])
def test_nets_by_name(name, sizes, numbers):
    with torch.device("meta"):
        net = models.dit_by_name(name)
    state = net.state_dict()
    assert (len(net.pos_embed[0, 0]), len(net.blocks), net.blocks[0].attn.num_heads, net.patch_size) == sizes
    assert len(state) == 12 + 10 * sizes[1]
    assert net.num_classes == 1000 and net.out_channels == 8 and state["pos_embed"].shape[1] == (32 // sizes[3]) ** 2
    assert numbers is None or sum(entry.numel() for entry in state.values()) == numbers


@pytest.mark.parametrize("name", ["XL/2", "DiT-XL/3", "DiT-H/2", "sit-xl/2", "DiT-XL/2 ", ""])
def test_a_name_of_no_net_is_refused(name):
    with pytest.raises(ValueError, match="as in SiT-XL/2"):
        models.dit_by_name(name)


def old_names(state):
    """A VAE's state dict as the published files have it, with the attention's weights as 1x1 convolutions."""
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, entry in state.items():
        for ours, theirs in new.items():
            if f"attentions.0.{ours}." in name:
                name = name.replace(f".{ours}.", f".{theirs}.")
                entry = entry[..., None, None] if entry.ndim == 2 else entry
        renamed[name] = entry
    return renamed


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_the_vaes_old_names_are_read(suffix, tmp_path):
    vae = fill(AutoencoderKL(block_out_channels=(32, 64), layers_per_block=1))
    old = old_names(vae.state_dict())
    assert len(old.keys() - vae.state_dict().keys()) == 16 and "encoder.mid_block.attentions.0.query.weight" in old
    path = write(tmp_path / f"vae{suffix}", (safetensors if suffix == ".safetensors" else torch_file)(old))
    net = AutoencoderKL(block_out_channels=(32, 64), layers_per_block=1)
    load_weights(net, read_weights(path), path)
    assert same(net.state_dict(), vae.state_dict())
    x = wave(1, 3, 8, 8)
    assert torch.equal(net.encode(x)[0], vae.encode(x)[0])
    wrong = broken(models, ('"query": "to_q", "key": "to_k"', '"query": "to_k", "key": "to_q"'))
    assert not same(wrong.read_weights(path), vae.state_dict())


def test_the_vaes_names_and_shapes_are_all_those_of_sd_vae_ft():
    # Official: the digest of all 248 names and shapes of diffusers' state dict.
    with torch.device("meta"):
        state = AutoencoderKL().state_dict()
    listed = json.dumps(sorted([name, list(entry.shape)] for name, entry in state.items()))
    assert hashlib.sha256(listed.encode()).hexdigest() == (
        "6286db08f9cfd63c3269bc33f220dd77e9ab46cd1173bb5f3f71ef61a92db085")


# --- students ---


def point():
    return wave(2, 4, 8, 8).double(), torch.tensor([0.9, 0.4]).double(), torch.tensor([0.2, 0.1]).double()


def check_start(m, kind):
    """The student of a teacher is the teacher, at any r, and in the teacher's convention."""
    teacher = getattr(m, kind)(fill(m.DiT(**SIGMA_NET)))
    student = type(teacher)(m.student_from_teacher(teacher.net))
    (x, t, r), y = (a.float() for a in point()), torch.tensor([1, 10])
    v = teacher(x, t=t, y=y)
    assert torch.equal(v, teacher.velocity(x, t=t, y=y)) and v.abs().max() > 0.1
    for r in (t, r, torch.zeros(2)):
        assert torch.equal(student(x, t=t, r=r, y=y), v)
        u, (tokens,) = student(x, t=t, r=r, y=y, taps=(1,))
        assert torch.equal(u, v) and tokens.shape == (2, 16, 48)
    fill(student.net)
    assert (student(x, t=t, r=r, y=y) - v).abs().max() > 1e-3  # then it hears r


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_student_starts_as_its_teacher_whatever_r_is(kind):
    check_start(models, kind)
    with pytest.raises(AssertionError):
        check_start(broken(models, ("{**student.state_dict(), **net.state_dict()}", "student.state_dict()")), kind)


def test_a_student_is_float32_and_leaves_its_teacher_alone(state):
    net = fill(DiT(**TINY)).to(torch.bfloat16).requires_grad_(False)
    student = models.student_from_teacher(net)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in student.parameters())
    assert not net.two_times and same(net.state_dict(), {n: e.bfloat16() for n, e in state.items()})
    with torch.device("meta"):
        assert models.student_from_teacher(DiT(**TINY)).pos_embed.is_meta


class Recorder(nn.Module):
    """A net that answers 0 and remembers the times it was called with."""

    num_classes = 10

    def forward(self, x, *, t, y, r=None, taps=()):
        self.times = t, r
        return torch.zeros_like(x)


def check_clocks(m):
    (x, t, r), y, net = point(), torch.tensor([1, 3]), Recorder()
    for kind, clock in (("Teacher", lambda t: models.CLOCK * t), ("SiTTeacher", lambda t: 1 - t)):
        getattr(m, kind)(net)(x, t=t, r=r, y=y)
        assert torch.equal(net.times[0], clock(t)) and torch.equal(net.times[1], clock(r))
    m.DiTTeacher(net)(x, t=T_STEPS[[999, 500]], r=T_STEPS[[3, 0]], y=y)
    assert torch.allclose(torch.stack(net.times), torch.tensor([[999.0, 500.0], [3.0, 0.0]]).double(), atol=1e-6)


def check_signs(m):
    """The wrapped average velocity, written out once more from the raw answer of a filled two-time net."""
    (x, t, r), y = point(), torch.tensor([1, 3])
    net = fill(m.DiT(**SIGMA_NET, two_times=True)).double()
    ours = net(x, t=models.CLOCK * t, r=models.CLOCK * r, y=y)[:, :4]
    assert torch.equal(m.Teacher(net)(x, t=t, r=r, y=y), ours)
    assert torch.equal(m.SiTTeacher(net)(x, t=t, r=r, y=y), -net(x, t=1 - t, r=1 - r, y=y)[:, :4])
    k, n = torch.tensor([700, 300]), torch.tensor([200, 0])
    alpha, sigma = (torch.from_numpy(a ** 0.5)[k].reshape(-1, 1, 1, 1) for a in (ALPHA_BAR, 1 - ALPHA_BAR))
    x_vp = x * (alpha + sigma)
    eps_hat = net(x_vp, t=k.double(), r=n.double(), y=y)[:, :4]
    u = eps_hat - (x_vp - sigma * eps_hat) / alpha
    assert torch.allclose(m.DiTTeacher(net)(x, t=T_STEPS[k], r=T_STEPS[n], y=y), u, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("check", [check_clocks, check_signs])
@pytest.mark.parametrize("mutation", [
    ("None if r is None else 1 - r)", "r)"), ("self.step_of(at_least_fp32(r))[1]", "self.step_of(at_least_fp32(r))[0]"),
    ("super().unguided(x_t, 1 - t, ", "super().unguided(x_t, t, ")])
def test_both_times_of_a_student_go_through_the_teachers_clock(check, mutation):
    check(models)
    with pytest.raises(AssertionError):
        check(broken(models, mutation))


def test_the_sign_of_a_wrapped_sit_student_is_checked():
    with pytest.raises(AssertionError):
        check_signs(broken(models, ("return -v_sit, tokens", "return v_sit, tokens")))


@pytest.mark.parametrize("kind", WRAPPERS)
def test_forward_derivative_of_a_wrapped_student_equals_central_differences(kind):
    net = fill(DiT(**SIGMA_NET, two_times=True)).double()
    student, y, (x, t, r) = getattr(models, kind)(net), torch.tensor([1, 3]), point()
    h = 1e-7 if kind == "DiTTeacher" else 1e-5  # k(t) bends once in a thousandth of t, and u turns in 1 of 999

    def u(x_t, time):
        return student(x_t, t=time, r=r, y=y)

    with torch.no_grad():
        for keep in ((1, 1), (1, 0), (0, 1)):
            direction = keep[0] * wave(*x.shape, phase=1.0).double(), keep[1] * torch.tensor([1.0, 0.7]).double()
            value, tangent = torch.func.jvp(u, (x, t), direction)
            plus, minus = (u(x + s * h * direction[0], t + s * h * direction[1]) for s in (1, -1))
            assert tangent.abs().max() > 1e-3 and torch.allclose(value, u(x, t), rtol=1e-9)
            assert torch.allclose(tangent, (plus - minus) / (2 * h), rtol=1e-5, atol=1e-6 * tangent.abs().max().item())


def test_beyond_the_dits_last_step_a_student_does_not_hear_t_and_at_it_does():
    student = DiTTeacher(fill(DiT(**SIGMA_NET, two_times=True)))
    x, y, r, still = wave(1, 4, 8, 8), torch.tensor([3]), torch.zeros(1), torch.zeros(1, 4, 8, 8)

    def d_t_u(t):
        return torch.func.jvp(lambda t: student(x, t=t, r=r, y=y), (t,), (torch.ones(1),))[1].abs().max()

    end = student.step_of(torch.ones(1))[0]
    assert end.item() == pytest.approx(T_LAST, abs=1e-6)
    assert d_t_u(torch.ones(1)) == 0 and d_t_u(end) > 100


def test_what_the_docstring_says_of_the_dits_clock():
    t = torch.linspace(T_FIRST + 1e-6, T_LAST - 1e-6, 400_001, dtype=torch.float64)
    k = DiTTeacher(nn.Identity()).step_of(t)[1]
    slope = (k[1:] - k[:-1]) / (t[1:] - t[:-1])
    found = slope.min().item(), slope[t[1:] > 0.5][0].item(), slope.max().item(), 1 / (1 - T_LAST)
    assert found == pytest.approx((176, 760, 15_757, 158), rel=0.005) and slope.argmax() > 399_000


def test_forward_guides_a_teacher_by_its_own_scale_and_never_a_student():
    x, t, y = wave(2, 4, 8, 8), torch.tensor([0.9, 0.4]), torch.tensor([1, 3])
    for kind in (Teacher, SiTTeacher, DiTTeacher):
        teacher = kind(fill(DiT(**SIGMA_NET)), w=2.5, cfg_channels=2)
        assert torch.equal(teacher(x, t=t, y=y), teacher.velocity(x, t=t, y=y, w=2.5, cfg_channels=2))
        assert torch.equal(teacher.velocity(x, t=t, y=y), kind(teacher.net)(x, t=t, y=y))  # velocity's own default: 1
        assert (teacher(x, t=t, y=y) - teacher.velocity(x, t=t, y=y))[:, :2].abs().max() > 1e-3
        student = kind(models.student_from_teacher(teacher.net))
        rows = []
        student.net.x_embedder.register_forward_hook(lambda module, inputs, out: rows.append(len(out)))
        student(x, t=t, r=t, y=y)
        assert rows == [2]
        student.w = 2.5
        with pytest.raises(ValueError, match="w must be 1, not 2.5"):
            student(x, t=t, r=t, y=y)


# --- DiT's sampler ---

OFFICIAL_DDPM = [  # steps, i, k, then mean and std and the first three numbers of: mean, log-variance, x_0
    (250, 0, 0, [0.001539728, 0.706006283, -0.0025008479, 0.36606345, 0.67250335],
     [-9.286730418, 0.027114518, -9.2775717, -9.2454395, -9.2764034],
     [0.001539728, 0.706006283, -0.0025008479, 0.36606345, 0.67250335]),
    (250, 1, 4, [0.001757379, 0.705540978, -0.0057239123, 0.37180412, 0.67032337],
     [-8.382859067, 0.342180476, -8.267889, -7.8593893, -8.2531147],
     [0.001822327, 0.705390286, -0.0066791475, 0.37350446, 0.66966182]),
    (250, 125, 502, [0.002303816, 0.722006786, -0.013216431, 0.39419052, 0.68193871],
     [-3.011997024, 0.000753329, -3.0117435, -3.0108471, -3.0117111],
     [0.064550223, 2.664165838, -0.87456763, 2.8527098, 1.8061717]),
    (250, 249, 999, [0.002805864, 0.731817170, -0.020154908, 0.41218951, 0.68740296],
     [-2.557229503, 0.000000595, -2.5572293, -2.5572286, -2.5572293],
     [2.909295693, 116.468325974, -39.306595, 126.51899, 77.578987]),
    (50, 1, 20, [0.002710309, 0.705041217, -0.019540282, 0.39731401, 0.66217375],
     [-7.137402761, 0.726487473, -6.8923349, -6.0308304, -6.8610334],
     [0.002732014, 0.705026396, -0.019856267, 0.39789134, 0.66197795]),
]


def check_ddpm(m):
    teacher = m.DiTTeacher(fill(m.DiT(**SIGMA_NET)))
    for steps, i, k, *official in OFFICIAL_DDPM:
        assert teacher.respaced(steps)[0][i] == k
        for out, expected in zip(teacher.denoise(wave(2, 4, 8, 8), torch.tensor([1, 10]), i, steps), official):
            flat = out.detach().double().flatten()
            found = [flat.mean().item(), flat.std().item(), *flat[:3].tolist()]
            assert found == pytest.approx(expected, abs=3e-6, rel=1e-5)


def test_ddpm_steps_are_the_official_ones():
    check_ddpm(models)
    for mutation in (("(1 / a - 1) ** 0.5", "(1 - a) ** 0.5"), (".cumsum(0).round()", ".cumsum(0).floor()"),
                     ("f * math.log(beta) + (1 - f)", "(1 - f) * math.log(beta) + f"), ("max(i, 1):max(i, 1)", "i:i"),
                     ("(a / a_below) ** 0.5", "a ** 0.5")):
        with pytest.raises((AssertionError, ValueError)):  # math.log(0) is a ValueError
            check_ddpm(broken(models, mutation))


def test_ddpm_has_the_official_steps_of_any_number():
    teacher = DiTTeacher(nn.Identity())
    k, alpha_bar = teacher.respaced(250)
    assert k[:6].tolist() == [0, 4, 8, 12, 16, 20] and k[-6:].tolist() == [979, 983, 987, 991, 995, 999]  # official
    assert np.allclose(alpha_bar, ALPHA_BAR[k], rtol=1e-12)
    assert teacher.respaced(21)[0][10] == 499 and teacher.respaced(1000)[0].tolist() == list(range(1000))
    for steps in (1, 1001):
        with pytest.raises(ValueError, match=f"not {steps}"):
            teacher.respaced(steps)


def test_ddpm_guides_eps_on_three_channels_as_the_official_code():
    # Official forward_with_cfg at step 500 and scale 4: the first numbers are those of the first, guided channel.
    net, x, y = fill(DiT(**SIGMA_NET)), wave(2, 4, 8, 8)[:1], torch.tensor([1])
    _, log_variance, x0_hat = DiTTeacher(net, w=4.0).denoise(x, y, 500, 1000)
    a = ALPHA_BAR[500]
    eps_hat = (x / a ** 0.5 - x0_hat) / (1 / a - 1) ** 0.5
    assert eps_hat[0].flatten()[:8].tolist() == pytest.approx(
        [0.546706021, -0.610015213, 0.400714844, -0.501371861, 0.632466912, -0.292789072, 0.996820629, -0.183226317],
        abs=3e-5)
    _, plain_log_variance, plain_x0 = DiTTeacher(net).denoise(x, y, 500, 1000)
    assert torch.allclose(log_variance, plain_log_variance, atol=1e-5)
    assert torch.allclose(x0_hat[:, 3], plain_x0[:, 3], atol=1e-4)
    assert (x0_hat - plain_x0)[:, :3].abs().amax(dim=(0, 2, 3)).min() > 1e-2
    _, log_variance, _ = DiTTeacher(net, w=4.0, cfg_channels=8).denoise(x, y, 500, 1000)  # never guided
    assert torch.allclose(log_variance, plain_log_variance, atol=1e-5)


class GaussianDiT(nn.Module):
    """A perfect DiT for data N(mean, std^2), variance of each of 250 steps included."""

    num_classes = 10

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x, *, t, y, taps=()):
        i = round(t[0].item() * 249 / 999)
        a, below = (ALPHA_BAR[round(999 * j / 249)] for j in (i, max(i - 1, 0)))
        eps_hat = (1 - a) ** 0.5 / (a * self.std ** 2 + 1 - a) * (x - a ** 0.5 * self.mean)
        f = 0.0
        if i:  # Var[x_below | x] = least + (how far the mean of x_below moves with x_0)^2 Var[x_0 | x]
            beta = 1 - a / below
            least = beta * (1 - below) / (1 - a)
            exact = least + (beta * below ** 0.5 / (1 - a) * self.std) ** 2 * (1 - a) / (a * self.std ** 2 + 1 - a)
            f = math.log(exact / least) / math.log(beta / least)
        return torch.cat([eps_hat, torch.full_like(x, 2 * f - 1)], dim=1)


def moments(sample, steps, shape=()):
    """Mean and variance, exactly, of a sampler that is linear in its noise: sample(eps) -> x_0, eps (B, *shape).

    Row 0 gets no noise; row 1 only eps = 1; row 2 only the first number that is drawn, as 1; and so on.
    """
    sources = iter(range(2, steps + 2))

    def one_row(size, **options):
        return F.one_hot(torch.tensor(next(sources)), size[0]).double().reshape(size)

    eps = F.one_hot(torch.tensor(1), steps + 2).double().reshape(-1, *shape)
    with unittest.mock.patch.object(torch, "randn", one_row):
        x = sample(eps).flatten()
    return x[0].item(), (x[1:] - x[0]).square().sum().item()


def check_ddpm_samples(m):
    def sample(eps):
        y = torch.zeros(len(eps), dtype=torch.int64)
        return m.DiTTeacher(GaussianDiT(0.7, std)).sample_ddpm(eps, y, generator=None)

    for std in (0.5, 1.5, 0.0):  # 0: all of the data at one point, so the last step must add no noise
        mean, variance = moments(sample, 250, (1, 1, 1))
        assert mean == pytest.approx(0.7, abs=1e-4)  # at k = 999 the path is not quite noise
        lost = 1e-4 if std else 0.0  # of the variance, because the last step adds no noise
        assert variance == pytest.approx(std ** 2 - lost, abs=1e-6)


def test_ddpm_samples_gaussian_data():
    check_ddpm_samples(models)
    for mutation in (("if i else 0.0", "if True else 0.0"), ("(log_variance / 2).exp()", "log_variance.exp()"),
                     ("steps=250, *, generator):\n        \"\"\"Sam", "steps=200, *, generator):\n        \"\"\"Sam"),
                     ("for i in reversed(range(steps)):\n            m", "for i in range(steps):\n            m")):
        with pytest.raises(AssertionError):
            check_ddpm_samples(broken(models, mutation))


def test_ddpm_is_made_by_its_generator_and_needs_a_learned_variance():
    net, y, eps = fill(DiT(**SIGMA_NET)), torch.tensor([1, 3]), wave(2, 4, 8, 8)
    first, again, other = (DiTTeacher(net).sample_ddpm(eps, y, 5, generator=torch.Generator().manual_seed(seed))
                           for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and first.isfinite().all()
    with pytest.raises(ValueError, match="learn_sigma"):
        DiTTeacher(fill(DiT(**TINY))).denoise(wave(2, 4, 4, 4), torch.tensor([1, 2]), 0, 250)


# --- SiT's sampler ---


def gaussian_velocity(mean, std):
    """E[eps - x_0 | x_t] for data N(mean, std^2)."""

    def velocity(x_t, *, t, y=None):
        t = t[:, None]
        x = x_t - (1 - t) * mean
        return (t - (1 - t) * std ** 2) / ((1 - t) ** 2 * std ** 2 + t ** 2) * x - mean

    return velocity


def check_sde(m):
    # With many steps only the last one's error is left. At t = 0.04, x_t - (1 - t) 0.7 has this variance and drift:
    t, data = 0.04, 0.25
    variance = (1 - t) ** 2 * data + t ** 2
    drift = (t - (1 - t) * data + t) / variance  # v + eps_hat, for each unit of it
    limit = variance * (1 - t * drift) ** 2
    assert limit == pytest.approx(0.245, abs=1e-4)  # as the docstring says
    error = {}
    for steps in (25, 50, 100, 250, 1000):
        mean, variance = moments(
            lambda eps: m.sample_sde(gaussian_velocity(0.7, 0.5), eps, steps=steps, generator=None), steps, (1,))
        error[steps] = variance - limit
        assert mean == pytest.approx(0.7, abs=1e-9)
    assert abs(error[250]) < 1e-3 and abs(error[1000]) < 2e-4
    for steps in (25, 50):  # Euler-Maruyama is of first order
        assert error[steps] / error[2 * steps] == pytest.approx(2, rel=0.2)


def test_sde_samples_gaussian_data():
    check_sde(models)
    for mutation in (("return x - drift * SDE_LAST_STEP", "return x + drift * SDE_LAST_STEP"),
                     ("(2 * (1 - k * dt) * dt) ** 0.5", "((1 - k * dt) * dt) ** 0.5"),
                     ("drift = v + eps_from_velocity(x, t, v)", "drift = v"),
                     ("(1 - SDE_LAST_STEP) / (steps - 1)", "1 / (steps - 1)"),
                     ("SDE_LAST_STEP = 0.04", "SDE_LAST_STEP = 0.08")):
        with pytest.raises(AssertionError):
            check_sde(broken(models, mutation))


def test_sde_is_given_labels_and_a_guided_teacher_and_counts_its_calls():
    teacher, y, eps, times = SiTTeacher(fill(DiT(**SIGMA_NET)), w=1.5), torch.tensor([1, 3]), wave(2, 4, 8, 8), []
    teacher.net.register_forward_pre_hook(lambda module, inputs, kw: times.append(kw["t"]), with_kwargs=True)
    first, again, other = (models.sample_sde(teacher, eps, y, 5, generator=torch.Generator().manual_seed(seed))
                           for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(times) == 15 and all(len(t) == 4 for t in times)  # conditional and null rows
    assert torch.stack(times[:5])[:, 0].tolist() == pytest.approx([0, 0.24, 0.48, 0.72, 0.96], abs=1e-6)
    with pytest.raises(ValueError, match="not 1"):
        models.sample_sde(teacher, eps, y, 1, generator=None)
