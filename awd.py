"""The discriminator of stage 2: adaptive weighted discrimination (AWD).

Stage 2 pulls the student's samples towards the teacher's distribution by two score estimates (dmd_refine.py), and can
make them no sharper than these. A discriminator that sees real data supplies what they miss: it reads the frozen
teacher's own features of a noised image (PRIOR: LADD, Sauer et al., arXiv 2403.12015) and tells data from samples.
PAPER (Cheng et al., arXiv 2511.08930): once a student is well placed by stage 1, what is still wrong with it is local,
a stroke too thin or an edge too soft. A head that averages all tokens dilutes the few that matter. AWD learns where to
look (we saw no gain over the mean):

    f (B, N, C), after a LayerNorm:  keys k_i = K f_i, values z_i = SN linear(f_i)
    a      = softmax_i(q . k_i / sqrt(C))          ONE learned query q, so a (B, N) is a weight for each token
    pooled = sum_i a_i z_i                         (B, C)
    logit  = SN linear( LeakyReLU( SN linear( LayerNorm(pooled) ) ) )

"SN" is a spectral norm: a weight is divided by its largest singular value, which a power iteration estimates, so that
the layer's gain is at most 1 (PRIOR: Miyato et al., arXiv 1802.05957). Keys and query stay free.
The baseline, pooling="mean", is the same head with a_i = 1/N. Nothing else differs between the two.
PRIOR: the hinge loss (LADD). OURS: the layers and the head's width, which the paper does not state.

    logits = AdaptiveWeightedDiscriminator(dims=[128])(features)      features: [(B, N, 128)]. On images, one entry for
                                                                      each tapped layer, its tokens the patches; in 2D
                                                                      a single one, whose tokens are the tapped layers
    loss_d = discriminator_hinge(logits of data, logits of samples);  loss_g = generator_hinge(logits of samples)
"""

import torch
from torch import nn
import torch.nn.functional as F
from torch.nn.utils.parametrizations import spectral_norm


class TokenHead(nn.Module):
    """One logit for some tokens (B, N, C), pooled by attention or by the mean: (B,)."""

    def __init__(self, dim, pooling):
        super().__init__()
        self.pooling = pooling
        self.norm_tokens = nn.LayerNorm(dim)
        self.keys = nn.Linear(dim, dim, bias=False)
        self.query = nn.Parameter(torch.randn(dim))
        self.values = spectral_norm(nn.Linear(dim, dim))
        self.norm_pooled = nn.LayerNorm(dim)
        self.hidden = spectral_norm(nn.Linear(dim, dim))
        self.logit = spectral_norm(nn.Linear(dim, 1))

    def weights(self, tokens):
        """How much each token counts: a (B, N), rows that sum to one, for tokens (B, N, C) after LayerNorm."""
        B, N, C = tokens.shape
        if self.pooling == "mean":
            return tokens.new_full((B, N), 1 / N)
        # a = softmax_i(q . k_i / sqrt(C)),  and  q . k_i = q . (K f_i) = (q K) . f_i, one vector for all tokens
        return torch.softmax(tokens @ (self.query @ self.keys.weight) / C**0.5, dim=1)

    def forward(self, tokens):
        tokens = self.norm_tokens(tokens)  # (B, N, C)
        a = self.weights(tokens)  # (B, N)
        # pooled = sum_i a_i z_i, at 1/N of the work: sum_i a_i (W f_i + b) = W (sum_i a_i f_i) + b
        pooled = self.values((a[:, :, None] * tokens).sum(dim=1))  # (B, C)
        return self.logit(F.leaky_relu(self.hidden(self.norm_pooled(pooled)), 0.2)).squeeze(1)  # (B,)


class AdaptiveWeightedDiscriminator(nn.Module):
    """A head for each entry of the features of the frozen teacher.

    dims: the channels C of each entry. pooling: "attention" (AWD) or "mean" (the baseline).
    features: a list of (B, N, C) -> logits (B, len(dims)), positive for data.
    """

    def __init__(self, dims, pooling="attention"):
        super().__init__()
        if pooling not in ("attention", "mean"):
            raise ValueError(f"pooling is 'attention' or 'mean', not {pooling!r}")
        self.heads = nn.ModuleList(TokenHead(dim, pooling) for dim in dims)

    @torch.no_grad()
    def power_iteration(self):
        """Bookkeeping of spectral_norm, to skip at first. Torch improves its estimates whenever a weight is read in
        training mode. We allow it once, before each update, so that all passes of an update see the same weights."""
        self.train()
        for head in self.heads:
            _ = head.values.weight, head.hidden.weight, head.logit.weight  # to read is to step
        self.eval()

    def forward(self, features):
        return torch.stack([head(f) for head, f in zip(self.heads, features, strict=True)], dim=1)  # (B, len(dims))


def discriminator_hinge(logit_data, logit_gen):
    """Mean of max(0, 1 - D(data)) + max(0, 1 + D(sample)): what the discriminator minimises. Logits of any shape."""
    return F.relu(1 - logit_data).mean() + F.relu(1 + logit_gen).mean()


def generator_hinge(logit_gen):
    """Minus the mean of D(sample): the generator's side of the hinge loss."""
    return -logit_gen.mean()
