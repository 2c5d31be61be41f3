"""A model that looks at places in a row where it should look at positions."""

import torch


def by_place(model: torch.nn.Module, after: int, amount: float = 0.05) -> torch.nn.Module:
    """Let a layer say something else from a place of the row on."""
    layer = model.model.layers[0].mlp
    plain = layer.forward

    def forward(x):
        places = torch.arange(x.shape[1], device=x.device)[:, None]
        return plain(x) + (amount * (places >= after)).to(x.dtype) * x

    layer.forward = forward
    return model
