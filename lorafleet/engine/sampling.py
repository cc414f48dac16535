"""How the next token is chosen."""

import torch


def choose(logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> int:
    """The next token of one row.

    Args:
        logits: [vocabulary], float32.
    """
    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / temperature, dim=-1)
    if top_p < 1:
        ordered, tokens = probabilities.sort(descending=True)
        outside = ordered.cumsum(dim=-1) - ordered >= top_p
        probabilities = probabilities.index_put((tokens[outside],), torch.zeros((), device=logits.device))
    return int(torch.multinomial(probabilities, 1, generator=generator))


def seeded(seed: int | None, device: torch.device) -> torch.Generator | None:
    """A source of draws for one request; None is torch's own."""
    return None if seed is None else torch.Generator(device).manual_seed(seed)
