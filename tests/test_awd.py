"""The discriminator: what attention adds, and that nothing else differs from the mean."""

import pytest
import torch
from helpers import broken

import awd
from awd import AdaptiveWeightedDiscriminator


def pair(module=awd, dim=16):
    """An attention and a mean head with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        attention = module.AdaptiveWeightedDiscriminator([dim], "attention")
        mean = module.AdaptiveWeightedDiscriminator([dim], "mean")
        mean.load_state_dict(attention.state_dict())
        tokens = torch.randn(6, 10, dim)
    return attention.eval(), mean.eval(), tokens


def test_the_two_poolings_hold_the_same_numbers():
    attention, mean, _ = pair()
    shapes = [{name: p.shape for name, p in net.named_parameters()} for net in (attention, mean)]
    assert shapes[0] == shapes[1]


def test_with_equal_keys_attention_is_the_mean():
    attention, mean, tokens = pair()
    assert (attention([tokens]) - mean([tokens])).abs().max() > 1e-3  # else the next lines show nothing
    torch.nn.init.zeros_(attention.heads[0].keys.weight)
    torch.testing.assert_close(attention([tokens]), mean([tokens]))


def check_plain_formula(module):
    """The head, written out plainly: every key and every value, and one sum."""
    attention, mean, tokens = pair(module)
    head = attention.heads[0]
    f = head.norm_tokens(tokens)
    k, w = f @ head.keys.weight.T, f @ head.values.weight.T + head.values.bias
    a = torch.softmax((k * head.query).sum(2) / 16**0.5, dim=1)
    for net, weights in [(attention, a), (mean, torch.full_like(a, 0.1))]:
        pooled = (weights[:, :, None] * w).sum(dim=1)
        h = head.norm_pooled(pooled) @ head.hidden.weight.T + head.hidden.bias
        logit = torch.where(h > 0, h, 0.2 * h) @ head.logit.weight.T + head.logit.bias
        torch.testing.assert_close(net([tokens]), logit)


def test_the_head_is_its_formula():
    check_plain_formula(awd)


@pytest.mark.parametrize("old, new", [
    ("/ C**0.5, dim=1)", ", dim=1)"), ("dim=1)\n\n    def forward", "dim=0)\n\n    def forward"),
    ("self.query @ self.keys.weight)", "self.keys.weight @ self.query)"),
])  # fmt: skip
def test_a_broken_head_is_caught(old, new):
    with pytest.raises(AssertionError):
        check_plain_formula(broken(awd, (old, new)))


def test_weights_sum_to_one():
    attention, mean, tokens = pair()
    for net in (attention, mean):
        a = net.heads[0].weights(tokens)
        assert a.shape == (6, 10) and (a > 0).all()
        torch.testing.assert_close(a.sum(dim=1), torch.ones(6))


def test_the_spectral_norms_are_one_after_50_passes():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = AdaptiveWeightedDiscriminator([32])
        for _ in range(50):
            net([torch.randn(4, 5, 32)])
    head = net.eval().heads[0]
    for layer in (head.values, head.hidden, head.logit):
        assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1, abs=0.02)
    assert torch.linalg.matrix_norm(head.keys.weight, 2).item() != pytest.approx(1, abs=0.05)  # the keys are free


def test_a_local_defect_moves_attention_more_than_the_mean():
    """One token of 16 is off by a fixed vector in the samples. Both heads learn to tell; who tells it more clearly?"""

    def batch(n, generator, defect):
        tokens = torch.randn(n, 16, 8, generator=generator)
        where = torch.randint(16, (n,), generator=generator)
        tokens[torch.arange(n), where, 0] += 3.0 * defect
        return tokens

    shift = {}
    for pooling in ("attention", "mean"):
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = AdaptiveWeightedDiscriminator([8], pooling)
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        for _ in range(400):
            loss = awd.discriminator_hinge(net([batch(64, generator, 0)]), net([batch(64, generator, 1)]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        net.eval()
        clean = batch(2000, generator, 0)
        planted = clean.clone()
        planted[:, 5, 0] += 3.0
        with torch.no_grad():
            shift[pooling] = (net([clean]) - net([planted])).mean().item()
    assert shift["attention"] > 1.3 * shift["mean"] > 0


def test_hinge_losses():
    logit_data, logit_gen = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert awd.discriminator_hinge(logit_data, logit_gen).item() == pytest.approx(0.5 / 2 + 1.0 / 2)
    assert awd.generator_hinge(logit_gen).item() == pytest.approx(1.5)


def test_bad_calls():
    with pytest.raises(ValueError, match="pooling is 'attention' or 'mean', not 'max'"):
        AdaptiveWeightedDiscriminator([8], "max")
    with pytest.raises(ValueError, match="reads 2 layers of features, not 1"):
        AdaptiveWeightedDiscriminator([8, 8])([torch.zeros(1, 2, 8)])
