"""Weights and inputs that anyone can make again, so that a network can be checked without a download.

The numbers in the tests are what the official code answered (facebookresearch/DiT, willisma/SiT, diffusers) after its
networks had been filled by this same rule.
"""

import torch


def wave(*shape, phase=0, freq=0.37):
    """sin(freq * i + phase), i = flat index: a float32 tensor of this shape, computed in float64."""
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(freq * i + phase).reshape(shape).float()


@torch.no_grad()
def fill(module):
    """Overwrite all weights of a module by a fixed rule, put it in eval mode and return it.

    For the k-th name of sorted(state_dict): w_i = s * sin(0.7 i + k), s = 0.3 for embedders and adaLN, else 0.05.
    running_var becomes 1 + 0.5 * sin(0.7 i + k), a norm's gain 1 + w; pos_embed and integer entries stay.
    """
    state = module.state_dict()
    for k, name in enumerate(sorted(state)):
        entry = state[name]
        if name.endswith("pos_embed") or not entry.is_floating_point():
            continue
        wave_k = torch.sin(0.7 * torch.arange(entry.numel(), dtype=torch.float64) + k).reshape(entry.shape)
        if name.endswith("running_var"):
            values = 1 + 0.5 * wave_k
        else:
            values = (0.3 if "embedder" in name or "adaLN" in name else 0.05) * wave_k
            if name.endswith("weight") and entry.ndim == 1:
                values = 1 + values
        entry.copy_(values)  # state_dict shares memory with the module
    return module.eval()
