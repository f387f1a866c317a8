from __future__ import annotations

import torch

from autoglm_lab.training.activation_store import ActivationStore


def test_no_more_than_two_layers_are_back_at_a_time() -> None:
    store = ActivationStore(torch.device("cpu"), least=0)
    given = [[torch.full((4, 4), float(10 * layer + part)) for part in range(3)] for layer in range(6)]
    fetch = [[store.put(layer, one) for one in tensors] for layer, tensors in enumerate(given)]
    copies = list(store._layers.values())
    for layer in reversed(range(6)):
        for part in range(3):
            torch.testing.assert_close(fetch[layer][part](), given[layer][part])
            back = [index for index, kept in enumerate(copies) if any(one._back is not None for one in kept)]
            assert back == [index for index in (layer - 1, layer) if index >= 0]
    torch.testing.assert_close(fetch[4][1](), given[4][1])  # asked for again, it comes again
    store.begin_step()
    assert not any(one._back is not None or one._host is not None for kept in copies for one in kept)
