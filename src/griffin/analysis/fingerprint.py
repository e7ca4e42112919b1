"""Whether two models are the same one: a short hash of what makes their outputs."""

from __future__ import annotations

import hashlib
import json

import torch
from transformers import PreTrainedModel

_VALUES_OF_A_TENSOR = 64
_ABOUT_THE_FILES = ("_name_or_path", "transformers_version")  # of a config: where and by what it was saved


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str:
    """16 hex digits of the SHA-256 of a model's config and weights: the same model, wherever it was loaded from.

    Of every tensor its name, dtype and shape count, and 64 values at even distances: enough to tell a fine-tuned model
    from its base, in milliseconds. The order of a tensor in memory does not count.
    """
    settings = {key: value for key, value in model.config.to_diff_dict().items() if key not in _ABOUT_THE_FILES}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            at = torch.linspace(0, tensor.numel() - 1, _VALUES_OF_A_TENSOR, dtype=torch.float64).long()
            places = tuple(place.to(tensor.device) for place in torch.unravel_index(at, tensor.shape))
            values = tensor[places] if places else tensor.reshape(1)
            digest.update(bytes(values.cpu().contiguous().view(torch.uint8).tolist()))
    return digest.hexdigest()[:16]
