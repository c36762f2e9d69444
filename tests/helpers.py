"""Weights and inputs that anyone can make again: the rule by which the reference values in these tests were made."""

import torch


def fill(module):
    """Fill a module's state dict in place by a fixed rule, and return the module.

    For the k-th name of sorted(state_dict), k counting every entry, in float64 and then cast:
        w_i = s sin(0.7 i + k),  i the flat index;   s = 0.3 where the name contains "embedder" or "adaLN", else 0.05
        running_var: 1 + 0.5 sin(0.7 i + k);   one-dimensional "...weight" (gains of norms): 1 + w_i
        "...pos_embed" and integer entries stay as they are."""
    state = module.state_dict()
    for k, name in enumerate(sorted(state)):
        value = state[name]
        if name.endswith("pos_embed") or not value.is_floating_point():
            continue
        wave_k = torch.sin(0.7 * torch.arange(value.numel(), dtype=torch.float64) + k).reshape(value.shape)
        if name.endswith("running_var"):
            filled = 1 + 0.5 * wave_k
        else:
            filled = (0.3 if "embedder" in name or "adaLN" in name else 0.05) * wave_k
            if name.endswith("weight") and value.ndim == 1:
                filled = 1 + filled
        value.copy_(filled)
    return module


def wave(shape, phase=0.0, freq=0.37):
    """sin(freq i + phase), i the flat index, in float64 and then float32. shape: a tuple."""
    count = torch.Size(shape).numel()
    return torch.sin(freq * torch.arange(count, dtype=torch.float64) + phase).float().reshape(shape)
