"""The discriminator: what attention adds, and that nothing else differs from the mean."""

import pytest
import torch
from helpers import broken, seeded

import awd


def pair(m=awd):
    """An attention and a mean discriminator with the same weights, and tokens."""
    build = m.AdaptiveWeightedDiscriminator
    attention, mean = (seeded(lambda: build([16], pooling)) for pooling in ("attention", "mean"))
    mean.load_state_dict(attention.state_dict())
    return attention.eval(), mean.eval(), seeded(lambda: torch.randn(6, 10, 16))


def test_the_head_is_its_formula(m=awd):
    """Written out plainly, with every key and every value: the two poolings differ in a_i alone, and a sums to one."""
    attention, mean, tokens = pair(m)
    head = attention.heads[0]
    f = head.norm_tokens(tokens)
    k, z = f @ head.keys.weight.T, f @ head.values.weight.T + head.values.bias
    a = torch.softmax((k * head.query).sum(2) / 16**0.5, dim=1)
    for net, expected in ((attention, a), (mean, torch.full_like(a, 0.1))):
        torch.testing.assert_close(net.heads[0].weights(f), expected)
        torch.testing.assert_close(net.heads[0].weights(f).sum(dim=1), torch.ones(6))
        pooled = (expected[:, :, None] * z).sum(dim=1)
        h = head.norm_pooled(pooled) @ head.hidden.weight.T + head.hidden.bias
        logit = torch.where(h > 0, h, 0.2 * h) @ head.logit.weight.T + head.logit.bias
        torch.testing.assert_close(net([tokens]), logit)


@pytest.mark.parametrize("old, new", [
    ("/ C**0.5, dim=1)", ", dim=1)"), ("/ C**0.5, dim=1)", "/ C**0.5, dim=0)"),
    ("self.query @ self.keys.weight)", "self.keys.weight @ self.query)"), ("full((B, N), 1 / N)", "full((B, N), 1.0)"),
    ("F.leaky_relu(self.hidden(self.norm_pooled(pooled)), 0.2)", "F.relu(self.hidden(self.norm_pooled(pooled)))"),
])  # fmt: skip
def test_a_broken_head_is_caught(old, new):
    """A fault in the weights or in the head fails its formula."""
    with pytest.raises(AssertionError):
        test_the_head_is_its_formula(broken(awd, (old, new)))


def test_with_equal_keys_attention_is_the_mean():
    """The same parameters, and the same logits once all keys are equal."""
    attention, mean, tokens = pair()
    assert [p.shape for p in attention.parameters()] == [p.shape for p in mean.parameters()]
    assert (attention([tokens]) - mean([tokens])).abs().max() > 1e-3
    torch.nn.init.zeros_(attention.heads[0].keys.weight)
    torch.testing.assert_close(attention([tokens]), mean([tokens]))


def test_power_iteration_brings_the_spectral_norms_to_one_and_a_pass_leaves_them():
    """Of values, hidden and logit; the keys are free."""
    net, tokens = seeded(lambda: awd.AdaptiveWeightedDiscriminator([32])), seeded(lambda: torch.randn(4, 5, 32))
    for _ in range(50):
        net.power_iteration()
    head, before = net.heads[0], net([tokens])
    for layer in (head.values, head.hidden, head.logit):
        assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1, abs=0.02)
    assert torch.linalg.matrix_norm(head.keys.weight, 2).item() != pytest.approx(1, abs=0.05)
    assert torch.equal(net([tokens]), before)


def test_a_local_defect_moves_attention_more_than_the_mean():
    """One token of 16 is off by a fixed vector in the samples. Both heads learn to tell; attention more clearly."""
    shift = {}
    for pooling in ("attention", "mean"):
        generator = torch.Generator().manual_seed(0)
        net = seeded(lambda: awd.AdaptiveWeightedDiscriminator([8], pooling))
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        for _ in range(100):
            clean, planted = torch.randn(2, 64, 16, 8, generator=generator)
            planted[torch.arange(64), torch.randint(16, (64,), generator=generator), 0] += 3
            net.power_iteration()
            optimizer.zero_grad()
            awd.discriminator_hinge(net([clean]), net([planted])).backward()
            optimizer.step()
        clean = torch.randn(2000, 16, 8, generator=generator)
        planted = clean.clone()
        planted[:, 5, 0] += 3
        shift[pooling] = (net([clean]) - net([planted])).mean().item()
    assert shift["attention"] > 1.3 * shift["mean"] > 0


def test_hinge_losses_and_bad_calls():
    """By hand: (0 + 0.5)/2 + (0 + 1)/2, and -(-3 + 0)/2. Unknown poolings and lists of other lengths are refused."""
    logit_data, logit_gen = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert awd.discriminator_hinge(logit_data, logit_gen).item() == pytest.approx(0.75)
    assert awd.generator_hinge(logit_gen).item() == pytest.approx(1.5)
    for call in (lambda: awd.AdaptiveWeightedDiscriminator([8], "max"), lambda: pair()[0]([])):
        with pytest.raises(ValueError):
            call()
