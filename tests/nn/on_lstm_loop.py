"""The published ON-LSTM as a plain loop over sequences, steps and layers, written from the paper's formulas: what the
modules are measured against. No pygen here."""

import torch


def cumax(x):
    """Cumulative softmax of (n,): a product with ones below the diagonal, so that it is no cumsum."""
    e = (x - x.max()).exp()
    return torch.ones(len(x), len(x), dtype=x.dtype).tril() @ (e / e.sum())


def step(x, h, c, weights, chunk_size):
    """One sequence, one step: x (I,), h and c (H,) -> h, c, (distance_forget, distance_in)."""
    hidden = len(h)
    chunks = hidden // chunk_size
    gates = weights["ih.0.weight"] @ x + weights["hh.weight"] @ h
    if "hh.bias" in weights:
        gates = gates + weights["ih.0.bias"] + weights["hh.bias"]
    master_in, master_forget, o, candidate, i, f = gates.split((chunks, chunks, *4 * (hidden,)))
    master_in, master_forget = 1 - cumax(master_in), cumax(master_forget)
    distances = 1 - master_forget.mean(), master_in.mean()
    # One master gate for chunk_size neighbours.
    of_chunk = torch.arange(hidden) // chunk_size
    master_in, master_forget = master_in[of_chunk], master_forget[of_chunk]
    both = master_in * master_forget
    keep = f.sigmoid() * both + (master_forget - both)
    write = i.sigmoid() * both + (master_in - both)
    c = keep * c + write * candidate.tanh()
    return o.sigmoid() * c.tanh(), c, distances


def sequence(x, h, c, weights, chunk_size):
    """x: (T, I) -> output (T, H), h, c, distances (2, T)."""
    outputs, distances = [], []
    for one in x:
        h, c, found = step(one, h, c, weights, chunk_size)
        outputs.append(h)
        distances.append(torch.stack(found))
    return torch.stack(outputs), h, c, torch.stack(distances, 1)


def weights_of(state_dict, cells, layer):
    start = f"{cells}.{layer}."
    return {key.removeprefix(start): value for key, value in state_dict.items() if key.startswith(start)}


def layers(x, states, state_dict, chunk_size):
    """All layers, and both directions where the state_dict has them, over one sequence.

    x: (T, I); states: (h, c) of every layer and direction, (H,) each -> output (T, D H), states, distances
    (2, L D, T).
    """
    directions = ["cells", "cells_reverse"] if "cells_reverse.0.hh.weight" in state_dict else ["cells"]
    after, distances, states = [], [], iter(states)
    for layer in range(sum(key.startswith("cells.") and key.endswith("hh.weight") for key in state_dict)):
        outputs = []
        for cells in directions:
            given = x.flip(0) if cells == "cells_reverse" else x
            output, h, c, found = sequence(given, *next(states), weights_of(state_dict, cells, layer), chunk_size)
            if cells == "cells_reverse":
                output, found = output.flip(0), found.flip(1)
            outputs.append(output)
            after.append((h, c))
            distances.append(found)
        x = torch.cat(outputs, 1)
    return x, after, torch.stack(distances, 1)


def batch(x, h, c, state_dict, chunk_size, lengths=None):
    """`layers` for each sequence of (T, B, I) alone -> output (T, B, D H), h, c (L D, B, H), distances (2, L D, T, B);
    0 behind a sequence's end."""
    steps, size = x.shape[:2]
    found = []
    for b in range(size):
        length = steps if lengths is None else lengths[b]
        states = [(h[i, b], c[i, b]) for i in range(len(h))]
        output, after, distances = layers(x[:length, b], states, state_dict, chunk_size)
        pad = steps - length
        found.append(
            (
                torch.nn.functional.pad(output, (0, 0, 0, pad)),
                torch.stack([one for one, _ in after]),
                torch.stack([one for _, one in after]),
                torch.nn.functional.pad(distances, (0, pad)),
            )
        )
    outputs, hs, cs, ds = zip(*found, strict=True)
    return torch.stack(outputs, 1), torch.stack(hs, 1), torch.stack(cs, 1), torch.stack(ds, 3)
